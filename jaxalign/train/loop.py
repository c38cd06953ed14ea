"""The loop: step after step, with a record of each, and the same numbers whether it was interrupted or not."""

import json
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.train import checkpoint, log
from jaxalign.types import TrainState

FINITE = ("loss/total", "train/grad_norm")  # metrics that end the run where they are not finite
HEED = 8  # of several processes, every so many steps all ask all whether one was told to stop
COMPILED = "/jax/core/compile/backend_compile_duration"


def fit(
    step,
    state: TrainState,
    data_at,
    *,
    workdir,
    stop: int,
    config,
    log_every: int,
    save_every: int,
    keep: int,
    save_seconds: float = 600.0,
    identity: dict[str, str] | None = None,
    hooks=(),
    sinks=(),
    tokens_per_step: int | None = None,
) -> TrainState:
    """state, metrics = step(state, data_at(i)) for i = start .. stop - 1, where start is what workdir's newest checkpoint says.

    Where step and data_at depend on their arguments alone, the numbers are those of an uninterrupted run, bit for bit, on the same
    devices. Metrics are read while the next step runs, so nothing waits for the step that was just begun.

    SIGINT and SIGTERM end the run after the step they fall in, saved, with exit code 130 and 143; a second one ends it at once.
    Args:
        step: (state, data) -> (state, metrics); may donate the state. Metrics: one number a name; "samples", where it is there, a
            list of JSON-ready dicts (prompt, response, score, ...), written whole at every step that has it.
        config: of the run, to be kept in config.json; a change is printed.
        log_every, save_every: in steps; the last step is logged and saved in any case. save_seconds: save by the clock, too.
        keep: how many checkpoints stay.
        identity: what must not change within a run, by name: digests of the tokenizer and the reference. (Shapes never may.)
        hooks: called hook(i, state, metrics) after each step; what one returns, {name: number}, joins the metrics of that step,
            which is then logged.
        sinks: of log.SINKS.
        tokens_per_step: for time/tokens_per_s.
    Raises ValueError where identity changed (or checkpoint.Mismatch, for shapes), FloatingPointError where the loss is not finite.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    config, identity = log.plain(config), identity or {}
    state = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), state)
    start, state, seconds = _resume(workdir, state, stop, config, identity)
    log.write_json(workdir / "config.json", config)
    done, ended, saved = start, 0, time.monotonic()
    with (
        _signals() as told,
        _compiles() as compiled,
        log.Log(workdir, start=start, stop=stop, config=config, sinks=sinks) as lines,
        checkpoint.Saver(workdir / "checkpoints", keep=keep) as saver,
    ):
        record = _Record(workdir, lines, start, seconds, tokens_per_step, compiled)
        for i in range(start, stop):
            state, metrics = step(state, data_at(i))
            more = [hook(i, state, metrics) or {} for hook in hooks]
            metrics = {name: x for part in (metrics, *more) for name, x in part.items()}
            record.put(i, metrics, i % log_every == 0 or i + 1 == stop or any(more) or "samples" in metrics)
            ended, late = _agreed(i, told, time.monotonic() - saved > save_seconds)
            if (i + 1) % save_every == 0 or i + 1 == stop or ended or late:
                record.settle()
                _check_params(i, state, workdir)
                saver.save(i + 1, state, {"seconds": record.seconds(), "identity": identity, "versions": _versions()})
                saved = time.monotonic()
            done = i + 1
            if ended:
                break
    if number := ended or _agreed(0, told, False)[0]:
        command = shlex.join(sys.orig_argv)
        log.say(f"{signal.Signals(number).name}: stopped at step {done} of {stop}, saved. The same command resumes: {command}")
        raise SystemExit(128 + number)
    return state


def _resume(workdir: Path, state: TrainState, stop: int, config: dict, identity: dict):
    """-> (steps done, their state, seconds spent on them): those of the newest checkpoint, or the beginning."""
    found = checkpoint.restore(workdir / "checkpoints", state)
    if found is None:
        return 0, state, 0.0
    for bad, reason in found.skipped.items():
        log.say(f"WARNING: checkpoint {bad} cannot be read and was set aside as {bad}.corrupt ({reason})")
    for name in sorted(identity | found.meta["identity"]):
        then, now = (kept.get(name, "absent") for kept in (found.meta["identity"], identity))
        if then != now:
            raise ValueError(
                f"the run in {workdir} has {name} = {then}, this command has {now}: another run. Take another workdir."
            )
    done = ": nothing is left to do" if found.step >= stop else ""
    log.say(f"resuming at step {found.step} of {stop} ({workdir}){done}")
    for line in log.difference(found.meta["versions"], _versions()):
        log.say(f"  version changed: {line}; the numbers may differ in the last digits")
    kept = workdir / "config.json"
    if kept.exists():
        for line in log.difference(json.loads(kept.read_text()), config):
            log.say(f"  config changed: {line}")
    return found.step, found.state, found.meta["seconds"]


class _Record:
    """The metrics of the last step, on their way from the device to the log."""

    def __init__(self, workdir, lines: log.Log, start: int, seconds: float, tokens: int | None, compiled: list):
        self.workdir, self.lines, self.tokens, self.compiled = workdir, lines, tokens, compiled
        self.began = time.monotonic() - seconds
        self.written, self.at = start, time.monotonic()  # steps that a line was written for, and when
        self.waiting = None

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def put(self, i: int, metrics: dict, logged: bool):
        """Take the metrics of step i, which may still be running, and settle those of the step before."""
        for x in metrics.values():
            if isinstance(x, jax.Array):
                x.copy_to_host_async()
        before, self.waiting = self.waiting, (i, metrics, logged)
        self._write(before)

    def settle(self):
        """Wait for the last step, and write its metrics."""
        last, self.waiting = self.waiting, None
        self._write(last)

    def _write(self, step):
        if step is None:
            return
        i, metrics, logged = step
        broken = {name: x for name in FINITE if name in metrics and not np.isfinite(x := log.value_of(name, metrics[name]))}
        if logged or broken:
            values = {name: log.value_of(name, x) for name, x in metrics.items() if name != "samples"}
            now = time.monotonic()
            values["time/step_s"] = (now - self.at) / (i + 1 - self.written)
            values["time/elapsed_s"] = now - self.began
            if self.tokens:
                values["time/tokens_per_s"] = self.tokens / values["time/step_s"]
            values["time/compiles"] = len(self.compiled)
            self.written, self.at = i + 1, now
            self.lines.write(i, values, metrics.get("samples", ()))
        if broken:
            name, value = next(iter(broken.items()))
            raise FloatingPointError(f"{name} is {value} at step {i}. {_advice(self.workdir)}")


def _check_params(i: int, state: TrainState, workdir: Path):
    """A finite loss may still be followed by an update that is not: look before saving."""
    if not _finite(state.params):
        raise FloatingPointError(f"the parameters are not finite after step {i}, though its loss is. {_advice(workdir)}")


@jax.jit
def _finite(tree):
    parts = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.bool_(True), *parts]).all()


def _advice(workdir: Path) -> str:
    done = checkpoint.steps(workdir / "checkpoints")
    where = f"the newest checkpoint is at step {done[-1]}" if done else "there is no checkpoint yet"
    return (
        f"Nothing of it was saved: {where}, and the same command goes on from there. A lower learning rate, more warm-up "
        f"or a smaller clip_norm often helps; else look at the rows of that step: is a number not finite, or every weight 0?"
    )


@contextmanager
def _signals():
    """A list that SIGINT and SIGTERM are added to; the second one ends the process."""
    told = []

    def heed(number, _):
        if told:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h\n")  # the cursor, which the live line hides
            os._exit(128 + number)
        told.append(number)
        os.write(2, b"\nfinishing this step, then saving; once more to stop at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    old = {number: signal.signal(number, heed) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _compiles():
    """A list that grows by one with every program that XLA compiles or loads from its cache."""
    seen = []

    def count(event, seconds, **_):
        if event == COMPILED:
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def _agreed(i: int, told: list[int], late: bool) -> tuple[int, bool]:
    """(signal or 0, whether to save by the clock), the same on every process."""
    mine = (told[0] if told else 0, late)
    if jax.process_count() == 1:
        return mine
    if i % HEED:
        return 0, False
    signals, lates = multihost_utils.process_allgather(np.array(mine, np.int32)).T
    return int(signals.max()), bool(lates[0])


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("jaxalign", "jax", "orbax-checkpoint")}
