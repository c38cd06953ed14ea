"""How a run starts, what runs before it, and what it leaves: flags, stages, files.

Exit codes of every program:

    0          done
    1          a mistake that its user can mend, said in a paragraph; or a fault of the program, with a traceback
    70         stuck (train.watch)
    75, 134    another process of the run has ended (train.watch)
    130, 143   SIGINT, SIGTERM (129: SIGHUP): saved where there is something to save, and the same command goes on
"""

import fcntl
import json
import os
import re
import runpy
import shlex
import socket
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, config_flags

from experiments.settings import check
from jaxalign import shard
from jaxalign.models import adapters, checkpoints, files, peft
from jaxalign.prompts import template
from jaxalign.train import checkpoint, log, report, watch

ARCHITECTURE = "architecture.json"  # of a run's folder, for reading its checkpoints
MADE_FROM = "made_from.json"  # of a stage's folder: what it read
HOW = ("mesh", "loop")  # settings that change how a stage is made, not what comes out


def main(run, name: str, *, folder: bool = True, check=check):
    """Parse the flags, check the settings, and call run(config, workdir), or run(config) where the run leaves no folder.

    What a user can mend ends in a paragraph, not in a traceback. One process at a time writes in a workdir.
    Args: check: (config) -> raises ValueError where a setting is wrong.
    """

    def start(arguments):
        if len(arguments) > 1:
            sys.exit(f"what is {arguments[1]!r}? A setting is given as --config.section.key=value")
        logging.set_verbosity(logging.WARNING)
        given = flags.FLAGS
        try:
            keep_compiled()
            watch.trim_when_compiled()
            _join(given.distributed)
            check(given.config)
            _agree(given.config)
            if folder:
                with writing(given.workdir) as workdir:
                    log.write_text(workdir / "command.txt", shlex.join(["python", *sys.orig_argv[1:]]))
                    run(given.config, workdir)
            else:
                run(given.config)
        except KeyboardInterrupt:
            _leave(130, "stopped; the same command goes on from what is done")
        except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
            if given.debug:
                raise
            _leave(1, f"{type(error).__name__}: {error}\n(--debug shows where)")
        except AttributeError as error:
            if given.debug or not isinstance(error.obj, ConfigDict):
                raise
            _leave(1, f"the config has no setting {error.name!r}, which experiments.{name} reads: is it another program's?")

    app.run(start, flags_parser=partial(_parse, name, folder))


def _leave(code: int, said: str):
    """End. Of several processes one ends at once: an orderly end would wait for the others, for minutes, and they for this one."""
    with suppress(OSError):
        print(said, file=sys.stderr, flush=True)
    if jax.process_count() > 1:
        os._exit(code)
    sys.exit(code)


def _agree(config):
    """ValueError where the processes of a run were given different settings: they would not compute the same."""
    if jax.process_count() > 1:
        of_all = multihost_utils.process_allgather(np.uint32(int(template.fingerprint(log.plain(config))[:8], 16))).ravel()
        if other := np.flatnonzero(of_all != of_all[0]).tolist():
            raise ValueError(f"processes {', '.join(map(str, other))} were given other settings than process 0: give all the same")


def _parse(name: str, folder: bool, arguments):
    """Define and read the flags. A mistake ends in a paragraph that leads to the right one."""
    default = f"configs/{name}.py"
    given = [x.lstrip("-").partition("=") for x in arguments[1:] if x.startswith("-")]
    twice = [flag for flag, times in Counter(flag for flag, _, _ in given).items() if times > 1]
    if twice:
        sys.exit(f"--{twice[0]} is given twice: {' and '.join(value for flag, _, value in given if flag == twice[0])}")
    if ("config", "", "") in given:
        sys.exit(f"--config wants its file behind a '=': --config={default}")
    given = next((value for flag, _, value in given if flag == "config"), default)
    path, _, variant = given.partition(":")
    if not Path(path).is_file():
        known = ", ".join(str(x) for x in sorted(Path("configs").glob("[a-z]*.py"))) or "none here; run from the repository's root"
        sys.exit(f"--config={given}: there is no file {path}. Configurations: {known}")
    try:
        variants = runpy.run_path(path).get("VARIANTS", {})
    except SyntaxError as error:
        sys.exit(f"--config={given}: {path} is no Python: {error}")
    if variant and variant not in variants:
        sys.exit(f"--config={given}: {path} has no variant '{variant}'. Variants: {', '.join(variants) or 'none'}")
    known = f"; variants: {', '.join(variants)}" if variants else ""
    try:
        config_flags.DEFINE_config_file(
            "config", default, f"Settings, {path} or {path}:VARIANT{known}. Single ones as --config.KEY=VALUE."
        )
        flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
        flags.DEFINE_string(
            "distributed", "", "One of several processes: 'auto' on a pod or cluster, else ADDRESS:PORT/PROCESSES/NUMBER."
        )
        if folder:
            help = "Folder of the run: checkpoints, metrics, samples, model, report. A run that is there goes on."
            flags.DEFINE_string("workdir", f"runs/{name}", help)
        for flag in ("config", "debug", "distributed", *(["workdir"] if folder else [])):
            flags.FLAGS.register_key_flag_for_module(arguments[0], flags.FLAGS[flag])  # else --help hides them
        return app.parse_flags_with_usage(arguments)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        cause = re.sub(r"[\\'\"]", "", re.sub(r"\\n|\n", ". ", str(error)))  # ml_collections quotes quotes
        sys.exit(f"no such setting or value: {cause}\nThe settings of {path}, and what they mean, are in that file.")


def config_of(name: str, variant: str):
    """The settings of this project's configs/NAME.py:VARIANT, checked. ValueError where there is no such variant."""
    known = runpy.run_path(str(Path(__file__).parents[1] / "configs" / f"{name}.py"))
    if variant not in known["VARIANTS"]:
        raise ValueError(f"{variant!r} is no variant of configs/{name}.py; there are {', '.join(known['VARIANTS'])}")
    config = known["get_config"](variant)
    check(config)
    return config


def keep_compiled():
    """Keep compiled programs in the user's cache, for the next start, unless JAX's own settings say where, or "" for nowhere.

    Nowhere, too, where that folder cannot be written. Whoever can write in it can run programs as this user.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxalign"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return
    if os.access(folder, os.W_OK | os.X_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _join(place: str):
    """Become one of several processes: "" for none, "auto", or ADDRESS:PORT/PROCESSES/NUMBER."""
    heard = {"heartbeat_timeout_seconds": 30}  # from a process that is gone; the others then end, too
    if place == "auto":
        jax.distributed.initialize(**heard)
    elif found := re.fullmatch(r"(.+:\d+)/(\d+)/(\d+)", place):
        jax.distributed.initialize(found[1], int(found[2]), int(found[3]), **heard)
    elif place:
        raise ValueError(f"--distributed={place}: it is 'auto' or ADDRESS:PORT/PROCESSES/NUMBER, such as 10.0.0.1:8476/4/0")


@contextmanager
def writing(folder: str | Path):
    """Yields the folder, made where it is not there, in which nobody else writes until the context ends, or the process.

    Raises OSError where there can be no such folder, or another process, also one on another machine, writes in it.
    """
    folder, lock, refused = local(folder), None, ""
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / ".lock", "a+")  # noqa: SIM115 (closed below). It stays: who deletes a lock lets two in
            refused = _locked(folder, lock)
        except OSError as error:
            refused = f"{folder} cannot be the folder of a run: {error.strerror}. Give another one"
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(bool(refused))):
        refused = refused or f"{folder} was refused to process 0, which says why"
    try:
        if refused:
            raise OSError(refused)
        yield folder
    finally:
        if lock:
            lock.close()


def local(path: str | Path) -> Path:
    if re.match(r"\w{2,}:/", str(path)):
        raise OSError(
            f"{path} is not on this machine. Give a local path and copy it there in the end, or mount the bucket (gcsfuse)"
        )
    return Path(path)


def _locked(folder: Path, lock) -> str:
    """Take the lock, which the system lets go of when the process ends, and write down who has it. -> why that cannot be, or "" """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        return f"{lock.read() or 'another process'} is writing in {folder}: wait for its end, stop it, or give another folder"
    except OSError as error:  # some network file systems have no locks
        log.say(f"WARNING: {folder} cannot be locked ({error.strerror}): see to it that nothing else writes there")
        return ""
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return ""


class Stages(NamedTuple):
    """The stages before a run: where their folders are, their settings, and the run(config, folder, stages) of each."""

    root: Path
    settings: Any
    runs: dict

    def path(self, source: str) -> str:
        """A source as a path: "stage:NAME" is the folder of that stage, which is run first if it is not there yet.

        Raises ValueError where the stage that is there was made with other settings, or from other stages than those there now.
        """
        if not source.startswith("stage:"):
            return source
        name = source.removeprefix("stage:")
        if name not in self.runs or name not in self.settings:
            raise ValueError(f"{source}: the stages are {', '.join(name for name in self.runs if name in self.settings) or 'none'}")
        shard.together(f"before stage {name}")
        self._check(name)
        folder, settings = self.root / name, self.settings[name].copy_and_resolve_references()
        made_from = folder / MADE_FROM
        if (folder / "summary.json").exists() and (made_from.exists() or not self._made_from(log.plain(settings))):
            log.say(f"stage {name}: reusing {folder}")
        else:
            log.say(f"stage {name}: making {folder}")
            with writing(folder):
                self.runs[name](settings, folder, self)
                log.write_json(made_from, self._made_from(log.plain(settings)))
        shard.together(f"after stage {name}")
        return str(folder)

    def _check(self, name: str):
        """Refuse a stage that is there but was made otherwise, the stages that it reads first."""
        folder, settings = self.root / name, log.plain(self.settings[name].copy_and_resolve_references())
        for before in self._before(settings):
            self._check(before)
        if not (folder / "summary.json").exists():
            return
        made_from, then, now = self._made_from(settings), log.read_json(folder / "config.json"), settings
        then, now = ({key: x for key, x in kept.items() if key not in HOW} for kept in (then, now))
        kept = folder / MADE_FROM  # absent: it will be made on from there
        kept = log.read_json(kept) if kept.exists() else made_from
        if changed := log.difference(then, now) + log.difference(kept, made_from):
            raise ValueError(
                f"stage {name} in {folder} was made otherwise: {'; '.join(changed)}. "
                f"Delete that folder to make it again, or choose another --workdir."
            )

    def _before(self, settings: dict) -> list[str]:
        """The stages that these settings read."""
        return sorted(set(re.findall(r'"stage:(\w+)"', json.dumps(settings))) & set(self.settings))

    def _made_from(self, settings: dict) -> dict:
        """What these settings read: {stage: its summary but for the seconds, name of a setting: the sha256 of its file}."""
        summaries = {name: log.read_json(self.root / name / "summary.json") for name in self._before(settings)}
        sources = {name: x for name, x in log.flat(settings).items() if name.endswith("source") and Path(str(x)).is_file()}
        read = {name: files.sha256(Path(path)) for name, path in sources.items()}
        return read | {name: {key: x for key, x in found.items() if key != "seconds"} for name, found in summaries.items()}

    def seconds(self) -> float:
        """What the stages that are there took together."""
        made = [self.root / name / "summary.json" for name in self.settings]
        return sum(log.read_json(path)["seconds"] for path in made if path.exists())


def begin(workdir: Path, loaded):
    """Leave what a run's checkpoints need to be read without its config: the architecture and the tokenizer.

    Those of a run that is there stay: if this is another one, the loop will refuse it, and nothing may be lost by that.
    """
    if checkpoint.steps(workdir / "checkpoints"):
        return
    workdir.mkdir(parents=True, exist_ok=True)
    log.write_json(workdir / ARCHITECTURE, asdict(loaded.model.config) | ({"base": loaded.base} if loaded.base else {}))
    if jax.process_index() == 0:
        loaded.tokenizer.save_pretrained(workdir / "tokenizer")
        files.seal(workdir / "tokenizer")


@contextmanager
def replacing(path: str | Path):
    """Yields write(row): the rows of a .jsonl file, from process 0, which takes the place of `path` if the context ends well."""
    if jax.process_index() != 0:
        yield lambda row: None
        return
    path = local(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    try:
        with open(new, "w", encoding="utf-8") as file:
            yield lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_rows(path: str | Path, rows):
    """The rows of a .jsonl file, by `replacing`."""
    with replacing(path) as write:
        for row in rows:
            write(row)


def looped(workdir: Path) -> float:
    """Seconds that the steps of a run took, those before an interruption included."""
    return log.read_lines(workdir / "metrics.jsonl")[-1]["time/elapsed_s"]


def finish(workdir: Path, loaded, params, summary: dict):
    """Leave the model, the summary and the report of a run that has ended.

    An adapter is merged into the model. It stands beside in PEFT's format, too, where that has a name for it, and alone where no
    plain model can hold it.
    """
    summary = {name: float(x) for name, x in summary.items()}
    config, adapter, left = loaded.model.config, loaded.model.config.adapter, "model"
    if adapter and adapter.kind in peft.TYPES.values():
        peft.export(workdir / "adapter", config, params, base=loaded.base["source"])
        left = "adapter"
    if not (adapter and adapter.virtual):
        checkpoints.export(workdir / "model", *adapters.merge(config, params), tokenizer=loaded.tokenizer)
        left = "model"
    log.write_json(workdir / "summary.json", summary)
    if jax.process_index() == 0:
        report.write(workdir)
    shard.together("finished")
    log.say(json.dumps(summary, indent=2))
    log.say(f"{left} in {workdir / left}, report in {workdir / 'report.html'}")
