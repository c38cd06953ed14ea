"""How a run starts, what runs before it, and what it leaves: flags, stages, files."""

import json
import re
import runpy
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jaxalign import shard
from jaxalign.models import checkpoints
from jaxalign.train import log, report

ARCHITECTURE = "architecture.json"  # of a run's folder, for reading its checkpoints
HOW = ("mesh", "loop")  # settings that change how a stage is made, not what comes out


def main(run, name: str, *, folder: bool = True):
    """Parse the flags and call run(config, workdir), or run(config) where the run leaves no folder.

    What a user can mend ends in a paragraph, not in a traceback.
    """

    def start(arguments):
        if len(arguments) > 1:
            sys.exit(f"what is {arguments[1]!r}? A setting is given as --config.section.key=value")
        logging.set_verbosity(logging.WARNING)
        given = flags.FLAGS
        try:
            _join(given.distributed)
            run(given.config, *([Path(given.workdir)] if folder else []))
        except KeyboardInterrupt:
            print("stopped; the same command goes on from what is done", file=sys.stderr)
            sys.exit(130)
        except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
            if given.debug:
                raise
            sys.exit(f"{type(error).__name__}: {error}\n(--debug shows where)")

    app.run(start, flags_parser=partial(_parse, name, folder))


def _parse(name: str, folder: bool, arguments):
    """Define and read the flags. A mistake ends in a paragraph that leads to the right one."""
    default = f"configs/{name}.py"
    given = next((x.split("=", 1)[1] for x in arguments if x.startswith("--config=")), default)
    path, _, variant = given.partition(":")
    if not Path(path).is_file():
        known = ", ".join(str(x) for x in sorted(Path("configs").glob("[a-z]*.py"))) or "none here; run from the repository's root"
        sys.exit(f"--config={given}: there is no file {path}. Configurations: {known}")
    variants = runpy.run_path(path).get("VARIANTS", {})
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


def _join(place: str):
    """Become one of several processes: "" for none, "auto", or ADDRESS:PORT/PROCESSES/NUMBER."""
    if place == "auto":
        jax.distributed.initialize()
    elif found := re.fullmatch(r"(.+:\d+)/(\d+)/(\d+)", place):
        jax.distributed.initialize(found[1], int(found[2]), int(found[3]))
    elif place:
        raise ValueError(f"--distributed={place}: it is 'auto' or ADDRESS:PORT/PROCESSES/NUMBER, such as 10.0.0.1:8476/4/0")


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
        if (folder / "summary.json").exists():
            log.say(f"stage {name}: reusing {folder}")
        else:
            log.say(f"stage {name}: making {folder}")
            self.runs[name](settings, folder, self)
            log.write_json(folder / "made_from.json", self._made_from(log.plain(settings)))
        shard.together(f"after stage {name}")
        return str(folder)

    def _check(self, name: str):
        """Refuse a stage that is there but was made otherwise, the stages that it reads first."""
        folder, settings = self.root / name, log.plain(self.settings[name].copy_and_resolve_references())
        made_from = self._made_from(settings)
        for before in made_from:
            self._check(before)
        if not (folder / "summary.json").exists():
            return
        then, now = ({key: x for key, x in kept.items() if key not in HOW} for kept in (_read(folder / "config.json"), settings))
        if changed := log.difference(then, now) + log.difference(_read(folder / "made_from.json"), made_from):
            raise ValueError(
                f"stage {name} in {folder} was made otherwise: {'; '.join(changed)}. "
                f"Delete that folder to make it again, or choose another --workdir."
            )

    def _made_from(self, settings: dict) -> dict:
        """{stage: its summary but for the seconds} of the stages that these settings read."""
        names = sorted(set(re.findall(r'"stage:(\w+)"', json.dumps(settings))) & set(self.settings))
        summaries = {name: _read(self.root / name / "summary.json") for name in names}
        return {name: {key: x for key, x in found.items() if key != "seconds"} for name, found in summaries.items()}

    def seconds(self) -> float:
        """What the stages that are there took together."""
        made = [self.root / name / "summary.json" for name in self.settings]
        return sum(_read(path)["seconds"] for path in made if path.exists())


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def begin(workdir: Path, loaded):
    """Leave what a run's checkpoints need to be read without its config: the architecture and the tokenizer."""
    workdir.mkdir(parents=True, exist_ok=True)
    log.write_json(workdir / ARCHITECTURE, asdict(loaded.model.config))
    if jax.process_index() == 0:
        loaded.tokenizer.save_pretrained(workdir / "tokenizer")


def append(path: Path, rows: list[dict]):
    """More rows of a .jsonl file, from process 0."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def looped(workdir: Path) -> float:
    """Seconds that the steps of a run took, those before an interruption included."""
    return log.read_lines(workdir / "metrics.jsonl")[-1]["time/elapsed_s"]


def finish(workdir: Path, loaded, params, summary: dict):
    """Leave the model, the summary and the report of a run that has ended."""
    summary = {name: float(x) for name, x in summary.items()}
    checkpoints.export(workdir / "model", loaded.model.config, params, tokenizer=loaded.tokenizer)
    log.write_json(workdir / "summary.json", summary)
    if jax.process_index() == 0:
        report.write(workdir)
    shard.together("finished")
    log.say(json.dumps(summary, indent=2))
    log.say(f"model in {workdir / 'model'}, report in {workdir / 'report.html'}")
