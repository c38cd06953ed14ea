"""What a run writes: metrics.jsonl, samples.jsonl, JSON files, a line for whoever watches, and optional sinks. Process 0 writes.

A line of metrics.jsonl is {"step": n, "loss/total": ..., ...}: what step n said (the first is 1), and hooks of the state after it.
Floats are in the fewest digits that give the same number back, null where a value is not finite. All that may differ between two
equal runs is named time/...:

    time/step_s          seconds a step, since the line before
    time/elapsed_s       seconds since step 0, those of interrupted runs included
    time/tokens_per_s    where the loop knows how many tokens a step has
    time/compiles        programs compiled since this process entered the loop
"""

import json
import math
import os
import sys
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

HEADLINE = {  # of the line for whoever watches, in this order, where they exist
    "loss/total": "loss",
    "reward/score": "reward",
    "reward/accuracy": "accuracy",
    "gold/held_out": "gold",
    "policy/kl": "KL",
    "time/tokens_per_s": "tokens/s",
}
LIVE_EVERY, PLAIN_EVERY = 0.1, 10.0  # seconds between two states of the line at a terminal, and between two lines in a file


def say(text: str):
    """Print, on process 0."""
    if jax.process_index() == 0:
        with unread():
            print(text, flush=True)


@contextmanager
def unread():
    """A run outlives whoever reads what it prints: Ctrl-C also ends the `tee` behind a pipe, and the run is yet to be saved."""
    try:
        yield
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def write_json(path, value):
    """The file is replaced at once or not at all."""
    if jax.process_index() == 0:
        _replace(Path(path), json.dumps(value, indent=2, default=str).encode() + b"\n")


def write_text(path, text: str):
    """Likewise, of text to which a line's end is added."""
    if jax.process_index() == 0:
        _replace(Path(path), text.encode() + b"\n")


def _replace(path: Path, data: bytes):
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    os.replace(new, path)


def plain(config) -> dict:
    """A configuration, ConfigDict or dict, as JSON gives it back."""
    return json.loads(config.to_json_best_effort() if hasattr(config, "to_json_best_effort") else json.dumps(config, default=str))


def flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    leaves = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def difference(old: dict, new: dict) -> list[str]:
    """What changed between two nested dicts: "optim.learning_rate: 0.001 -> 0.0003"."""
    old, new = ({name: json.dumps(value) for name, value in flat(tree).items()} for tree in (old, new))
    changed = [name for name in [*old, *(new.keys() - old.keys())] if old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}" for name in sorted(changed)]


def value_of(name: str, x) -> float | int:
    """A metric as a Python number: waits for the device. Raises ValueError for what is not one number."""
    if isinstance(x, int | float):
        return x
    x = np.asarray(x)[()]
    if x.shape != ():
        raise ValueError(
            f"metric {name} has shape {x.shape}; a metric is one number (a list of dicts named 'samples' goes to samples.jsonl)"
        )
    return float(str(x)) if np.issubdtype(x.dtype, np.floating) or x.dtype.kind == "V" else x.item()


def _strict(value):
    """JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _strict(part) for name, part in value.items()}
    return [_strict(part) for part in value] if isinstance(value, list | tuple) else value


def read_json(path) -> dict:
    """The object of a JSON file; {} where there is none. ValueError, naming the file, where it is not JSON."""
    try:
        return json.loads(Path(path).read_bytes()) if Path(path).exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}), though it was written whole. Make what is in its folder again") from error


def read_lines(path) -> list[dict]:
    """The objects of a .jsonl file; none where there is no file. A last line that was torn off is left out."""
    return [found for found, _ in _lines(path) if found is not None]


def _lines(path):
    """Yields (object, its bytes) of each line; (None, bytes) of one that is torn, or damaged."""
    path = Path(path)
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            yield json.loads(line) if line.endswith(b"\n") else None, line
        except ValueError:
            yield None, line


def cut(path, start: int):
    """Drop the lines of steps above `start` (0: all): an uninterrupted run has not written them yet. And torn or damaged ones."""
    path, lines = Path(path), [(found["step"] if _is_line(found) else None, line) for found, line in _lines(path)]
    kept = [line for step, line in lines if step is not None and step <= (start or -1)]
    if start and (damaged := sum(step is None for step, _ in lines[:-1])):  # the last may have been torn as the machine stopped
        say(f"WARNING: {damaged} lines of {path} are damaged and were dropped")
    if len(kept) < len(lines):
        _replace(path, b"".join(kept))


def _is_line(found) -> bool:
    return isinstance(found, dict) and isinstance(found.get("step"), int)


class Log:
    """The growing files of a run that `start` steps were done of, and its line on the terminal."""

    def __init__(self, workdir, *, start: int, stop: int, config: dict, sinks=()):
        self.stop, self.sinks, self.printed = stop, [], -math.inf
        self.recent, self.newest = deque(maxlen=20), {}  # (step, when); the newest value of each metric
        self.on = jax.process_index() == 0
        if not self.on:
            return
        unknown = set(sinks) - set(SINKS)
        if unknown:
            raise ValueError(f"sinks: {', '.join(sorted(unknown))}; there are {', '.join(SINKS)}")
        workdir = Path(workdir)
        self.sinks = [SINKS[name](workdir, start, config) for name in sinks]
        for name in ("metrics", "samples"):
            cut(workdir / f"{name}.jsonl", start)
        self.metrics = open(workdir / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (closed by close)
        self.samples = open(workdir / "samples.jsonl", "a", buffering=1)  # noqa: SIM115
        self.live = Live(console=Console(), auto_refresh=False) if sys.stdout and sys.stdout.isatty() else None
        if self.live:
            self.live.start()

    def write(self, done: int, values: dict, samples=()):
        """One line of metrics, and one a sample, behind `done` steps. `values` are Python numbers."""
        if not self.on:
            return
        for sample in samples:
            self.samples.write(json.dumps(_strict({"step": done, **sample}), ensure_ascii=False) + "\n")
        self.metrics.write(json.dumps(_strict({"step": done, **values})) + "\n")
        for sink, _ in self.sinks:
            sink(done, values)
        with unread():
            self._show(done, values)

    def _show(self, done: int, values: dict):
        now = time.monotonic()
        self.recent.append((done, now))
        self.newest |= values
        known = [f"  {label} {short(self.newest[name])}" for name, label in HEADLINE.items() if name in self.newest]
        line = f"step {done}/{self.stop}{''.join(known)}"
        (first, then), left = self.recent[0], self.stop - done
        if left and done > first:
            line += f"  {duration((now - then) / (done - first) * left)} left"
        if self.live and (now - self.printed >= LIVE_EVERY or not left):
            self.printed = now
            self.live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif not self.live and (now - self.printed >= PLAIN_EVERY or not left):
            self.printed = now
            print(line, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.on:
            if self.live:
                with unread():
                    self.live.stop()
            for _, close in self.sinks:
                close()
            self.metrics.close()
            self.samples.close()


def short(value) -> str:
    """A number for people: 12.3k, 0.0421."""
    if isinstance(value, float | int) and abs(value) >= 10000:
        for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """0:42, 3:05, 2:07:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def tensorboard(workdir: Path, start: int, config: dict):
    """-> (write(i, values), close()), into workdir/tensorboard."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("sink 'tensorboard' needs tensorboardX: pip install tensorboardX") from error
    writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1 if start else 0)

    def write(i, values):
        for name, value in values.items():
            writer.add_scalar(name, value, i)

    return write, writer.close


def wandb(workdir: Path, start: int, config: dict):
    """-> (write(i, values), close()). The run's id is kept in workdir/wandb_id: a resumed run goes on in the same curves."""
    try:
        import wandb as client
    except ImportError as error:
        raise ImportError("sink 'wandb' needs wandb: pip install wandb") from error
    kept = workdir / "wandb_id"
    known = kept.read_text().strip() if start and kept.exists() else None
    run = client.init(id=known, resume="allow" if known else None, name=workdir.name, dir=str(workdir), config=config)
    kept.write_text(run.id)
    return lambda i, values: run.log(values, step=i), run.finish


SINKS = {"tensorboard": tensorboard, "wandb": wandb}
