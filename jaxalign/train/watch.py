"""What watches a run from outside its steps: signals, compilations, and a clock for steps that do not end.

A run that is stopped ends with one of these exit codes:

    130, 143   SIGINT, SIGTERM (and 129, SIGHUP, of a terminal that is closed): saved, unless the step it fell in did not end within
               GRACE seconds; the last checkpoint then serves
    70         stuck: a step took far longer than any before it; the stacks of all threads are on stderr
    75, 134    another process of the run has ended: start all of them again. (134, SIGABRT, is JAX's own end, once that process has
               sent no heartbeat for a while.)
"""

import ctypes
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress

import jax

GRACE = 25.0  # seconds from a signal to the end of the process; clouds that take a machine back give 30
STUCK, PEER_LOST = 70, 75
PATIENT = 20  # times the longest step so far
LOWERED, COMPILED = "/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration"


class Watch:
    """One thread that looks at the clock. Entered for the time of a loop, which calls `step(i)` where step i begins.

    told: the signals that came, in order. compiled: seconds of each program compiled, or loaded from the cache.
    """

    def __init__(self, *, stuck_seconds: float):
        self.stuck_seconds = stuck_seconds
        self.told, self.compiled, self.compiling = [], [], False
        self.at, self.since, self.longest, self.deadline = 0, time.monotonic(), 0.0, None

    def step(self, i: int):
        """Step i begins; the one before it has ended."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self.since) if i > self.at else self.longest
        self.at, self.since, self.compiling = i, now, False

    def __enter__(self):
        self.ended, self.old = threading.Event(), {}
        self.wake, self.woken = os.pipe()
        for end in (self.wake, self.woken):
            os.set_blocking(end, False)
        if threading.current_thread() is threading.main_thread():
            # Python runs a handler between two of its own instructions, which may be long in coming: the pipe is written at once
            self.old_wakeup = signal.set_wakeup_fd(self.woken, warn_on_full_buffer=False)
            heeded = [signal.SIGINT, signal.SIGTERM]
            heeded += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL else []  # nohup has it ignored
            self.old = {number: signal.signal(number, self._heed) for number in heeded}
        jax.monitoring.register_event_duration_secs_listener(self._count)
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        jax.monitoring.unregister_event_duration_listener(self._count)
        if self.old:
            for number, handler in self.old.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self.old_wakeup)
        os.write(self.woken, b"\0")
        self.thread.join()
        os.close(self.wake)
        os.close(self.woken)

    def _heed(self, number, _):
        if self.told:
            self._leave(128 + number, "stopped at once")
        self.told.append(number)
        _warn("finishing this step, then saving; once more to stop at once")

    def _count(self, event, seconds, **_):
        self.compiling = event == LOWERED or (self.compiling and event != COMPILED)
        if event == COMPILED:
            self.compiled.append(seconds)
            self.since = time.monotonic()  # the step's clock starts again behind a compilation

    def _look(self):
        while not self.ended.is_set():
            patience = max(self.stuck_seconds, PATIENT * self.longest)
            select.select([self.wake], [], [], min(1.0, patience / 4))
            now = time.monotonic()
            try:
                numbers = [number for number in os.read(self.wake, 64) if number in self.old]
            except BlockingIOError:
                numbers = []
            if numbers and self.deadline is None:
                self.deadline = (now + GRACE, 128 + numbers[0])
            if self.deadline and now > self.deadline[0]:
                said = f"step {self.at} did not end within {GRACE:g} s: stopping without it; the last checkpoint is whole"
                self._leave(self.deadline[1], said)
            if now - self.since > patience and not self.compiling:
                faulthandler.dump_traceback(all_threads=True)
                place = f" on process {jax.process_index()} of {jax.process_count()}" if jax.process_count() > 1 else ""
                if place:
                    time.sleep(5)  # the others are about to see it, too: let them show where they are before this one is gone
                self._leave(STUCK, f"stuck{place}: step {self.at} has run for {now - self.since:.0f} s; the stacks are above")

    def _leave(self, code: int, said: str):
        cursor = "\x1b[?25h" if sys.stdout and sys.stdout.isatty() else ""  # which the live line hides
        _warn(f"{said} (exit code {code})", cursor)
        os._exit(code)


def _warn(text: str, before: str = ""):
    """Written at once, and though nobody reads it: who does may have been stopped by the same Ctrl-C."""
    with suppress(OSError):
        os.write(2, f"{before}\n{text}\n".encode())


def trim_when_compiled():
    """What compiling took and freed goes back to the system from now on, though malloc was told to keep what is freed."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: event == COMPILED and trim(0))


@contextmanager
def peers():
    """Ends this process, with a word on why, where a computation fails because another process of the run is gone.

    Nothing can be saved then, and waiting for an orderly end would only wait for the one that is gone.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, TimeoutError) as error:
        if jax.process_count() == 1:
            raise
        reason = (str(error).splitlines() or [""])[0][:200]
        said = (
            f"process {jax.process_index()} of {jax.process_count()}: another process of this run has ended, or cannot be reached "
            f"({reason}). Start all processes again: they go on from the last checkpoint (exit code {PEER_LOST})"
        )
        _warn(said)
        os._exit(PEER_LOST)
