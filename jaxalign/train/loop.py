"""The loop: step after step, with a record of each, and the same numbers whether it was interrupted or not."""

import shlex
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxalign.train import checkpoint, log
from jaxalign.train.watch import Watch, peers
from jaxalign.types import TrainState

FINITE = ("loss/total", "train/grad_norm")  # of a step that does not skip what is not sound
IN_A_ROW = "train/skipped_in_a_row"  # of one that does
ASK_SECONDS, ASK_STEPS = 1.0, 16  # of several processes, all ask all whether one was told to stop: how often, at least


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
    keep_every: int = 0,
    best: str = "",
    verify: bool = True,
    patience: int = 10,
    stuck_seconds: float = 1800.0,
    identity: dict[str, str] | None = None,
    hooks=(),
    sinks=(),
    tokens_per_step: int | None = None,
) -> TrainState:
    """state, metrics = step(state, data_at(i)) for i = start .. stop - 1, where start is what workdir's newest checkpoint says.

    Where step and data_at depend on their arguments alone, the numbers are those of an uninterrupted run, bit for bit, on the same
    devices. Metrics are read while the next step runs, so nothing waits for the step that was just begun. Line n of the record is
    of the n-th step, checkpoint n of the state after it.

    SIGINT and SIGTERM end the run after the step they fall in, saved; `train.watch` has the exit codes.
    Args:
        step: (state, data) -> (state, metrics); may donate the state. Metrics: one number a name; "samples", where it is there, a
            list of JSON-ready dicts (prompt, response, score, ...).
        config: of the run, to be kept in config.json; a change is printed.
        log_every, save_every: in steps. The last step is logged and saved in any case; one that has names of metrics which the
            step before did not have is logged, too. save_seconds: save by the clock, too. A save runs in the background.
        keep: how many of the last checkpoints stay; keep_every: those of multiples of this stay, too; best: a metric: each step
            that has it is saved, and the one where it was largest stays ("-nll/held_out": where it was smallest).
        verify: compare the digests of a checkpoint that is read.
        patience: the run ends, saved, when so many updates in a row were skipped (make_step).
        stuck_seconds: the run ends where a step takes longer than this and than 20 times the longest before it; compilation is
            excluded.
        identity: what must not change within a run, by name: digests of the tokenizer and the reference. (Shapes never may.)
        hooks: called hook(n, state) after n steps, n = 0 included; what one returns, {name: number}, joins the metrics of line n.
        sinks: of log.SINKS.
        tokens_per_step: for time/tokens_per_s.
    Raises ValueError where identity changed (or checkpoint.Mismatch, for shapes), FloatingPointError where the loss is not finite.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    config, identity = log.plain(config), identity or {}
    state = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), state)
    start, state, seconds = _resume(workdir, state, stop, config, identity, verify)
    log.write_json(workdir / "config.json", config)
    with (
        log.Log(workdir, start=start, stop=stop, config=config, sinks=sinks) as lines,
        checkpoint.Saver(workdir / "checkpoints", keep=keep, keep_every=keep_every, best=best) as saver,
        Watch(stuck_seconds=stuck_seconds) as watch,
        peers(),  # innermost: the others would wait for a process that is gone
    ):
        record = _Record(lines, start, seconds, tokens_per_step, watch.compiled)
        ask, saved, ended = _Ask(start), time.monotonic(), 0

        def observe(done):
            return {name: x for hook in hooks for name, x in (hook(done, state) or {}).items()}

        if start == 0 and (seen := observe(0)):
            record.put(0, seen, True)
        for i in range(start, stop):
            done = i + 1
            watch.step(done)
            state, metrics = step(state, data_at(i))
            watch.step(done)
            metrics = metrics | observe(done)
            record.put(done, metrics, done % log_every == 0 or done == stop)
            ended, late = ask.all(done, watch.told, time.monotonic() - saved > save_seconds)
            over = record.skipped >= patience or done == stop or bool(ended)
            if over or late or done % save_every == 0 or best.removeprefix("-") in metrics:
                record.settle()
                _check_params(done, state, workdir)
                about = {"seconds": record.seconds(), "identity": identity, "versions": _versions()}
                saver.save(done, state, about, metrics=record.newest, wait=over)
                saved = time.monotonic()
            while saver.failures:
                log.say(f"WARNING: {saver.failures.pop(0)}")
            if over:
                break
        if record.skipped >= patience:
            raise FloatingPointError(
                f"{record.skipped} updates in a row were skipped, the last for a loss of {record.newest.get('loss/total')} and a "
                f"gradient norm of {record.newest.get('train/grad_norm')}. The parameters are those before them, saved at step "
                f"{done}. {ADVICE} The same command goes on behind those rows."
            )
    if ended:
        command = shlex.join(sys.orig_argv)
        log.say(f"{signal.Signals(ended).name}: stopped at step {done} of {stop}, saved. The same command resumes: {command}")
        raise SystemExit(128 + ended)
    return state


def _resume(workdir: Path, state: TrainState, stop: int, config: dict, identity: dict, verify: bool):
    """-> (steps done, their state, seconds spent on them): those of the newest checkpoint, or the beginning."""
    found = checkpoint.restore(workdir / "checkpoints", state, verify=verify)
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
    try:
        changed = log.difference(log.read_json(workdir / "config.json") or config, config)
    except ValueError as error:
        changed = [f"{error}; it is written anew"]
    for line in changed:
        log.say(f"  config changed: {line}")
    return found.step, found.state, found.meta["seconds"]


class _Record:
    """The metrics of the last step, on their way from the device to the log.

    skipped: updates that were skipped in a row, as far as is known. newest: the numbers of the last step that was settled.
    """

    def __init__(self, lines: log.Log, start: int, seconds: float, tokens: int | None, compiled: list):
        self.lines, self.tokens, self.compiled = lines, tokens, compiled
        self.began = time.monotonic() - seconds
        self.written, self.at = start, time.monotonic()  # steps that a line was written for, and when
        self.waiting, self.names = None, set()
        self.skipped, self.newest = 0, {}

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def put(self, done: int, metrics: dict, logged: bool):
        """Take the metrics of a step, which may still be running, and settle those of the step before."""
        for x in metrics.values():
            if isinstance(x, jax.Array):
                x.copy_to_host_async()
        logged = logged or not metrics.keys() <= self.names
        before, self.waiting, self.names = self.waiting, (done, metrics, logged), set(metrics)
        self._write(before)

    def settle(self):
        """Wait for the last step, and write its metrics."""
        last, self.waiting = self.waiting, None
        self._write(last)

    def _write(self, step):
        if step is None:
            return
        done, metrics, logged = step
        values = {name: log.value_of(name, x) for name, x in metrics.items() if name != "samples"}
        self.newest, self.skipped = values, int(values.get(IN_A_ROW, 0))
        broken = [] if IN_A_ROW in values else [name for name in FINITE if not np.isfinite(values.get(name, 0.0))]
        if logged or broken:
            now = time.monotonic()
            times = {"time/step_s": (now - self.at) / max(1, done - self.written), "time/elapsed_s": now - self.began}
            if self.tokens:
                times["time/tokens_per_s"] = self.tokens / times["time/step_s"]
            self.written, self.at = done, now
            self.lines.write(done, values | times | {"time/compiles": len(self.compiled)}, metrics.get("samples", ()))
        if broken:
            raise FloatingPointError(f"{broken[0]} is {values[broken[0]]} at step {done}. Nothing of it was saved. {ADVICE}")


ADVICE = (
    "A lower learning rate, more warm-up or a smaller clip_norm often helps; else look at the rows of that step: is a number not "
    "finite, or every weight 0?"
)


def _check_params(done: int, state: TrainState, workdir: Path):
    """A finite loss may still be followed by an update that is not: look before saving."""
    if not _finite(state.params):
        saved = checkpoint.steps(workdir / "checkpoints")
        raise FloatingPointError(
            f"the parameters are not finite after step {done}, though its loss is. Nothing of it was saved: "
            f"{f'the newest checkpoint is of step {saved[-1]}' if saved else 'there is no checkpoint yet'}. {ADVICE}"
        )


@jax.jit
def _finite(tree):
    parts = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.bool_(True), *parts]).all()


class _Ask:
    """(signal or 0, whether to save by the clock), the same on every process. Asking waits for all, so it is not always done."""

    def __init__(self, start: int):
        self.last, self.next, self.at = start, start, time.monotonic()

    def all(self, done: int, told: list[int], late: bool) -> tuple[int, bool]:
        mine = (told[0] if told else 0, late)
        if jax.process_count() == 1:
            return mine
        if done < self.next:
            return 0, False
        now = time.monotonic()
        a_step = (now - self.at) / max(1, done - self.last)
        signals, lates, steps = multihost_utils.process_allgather(np.array([*mine, a_step], np.float32)).T
        self.last, self.at = done, now
        self.next = done + int(np.clip(ASK_SECONDS / steps.max(), 1, ASK_STEPS))
        return int(signals.max()), bool(lates[0])


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("jaxalign", "jax", "orbax-checkpoint")}
