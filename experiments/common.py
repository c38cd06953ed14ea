"""What the drivers share: flags, stages, and models, rows and texts by config."""

import hashlib
import json
import re
import runpy
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from jaxalign import keys, shard
from jaxalign.data import reviews, sources, tables, text
from jaxalign.models import checkpoints, decoder
from jaxalign.rewards import score_texts, sentiment
from jaxalign.sample import sample
from jaxalign.train import checkpoint, log, report
from jaxalign.types import Batch, Model, TrainState

HEADS = {"value": lambda width: 0.0, "reward": lambda width: (width + 1) ** -0.5}  # Ziegler et al. 2019
ARCHITECTURE = "architecture.json"  # of a run's folder
GENERATED = {"reviews": reviews.reviews, "openings": reviews.openings}  # sources that need no file


def main(run, name: str, *, folder: bool = True):
    """Parse the flags and call run(config, workdir), or run(config) where the run leaves no folder.

    What a user can mend ends in a paragraph, not in a traceback.
    """

    def start(arguments):
        if len(arguments) > 1:
            sys.exit(f"what is {arguments[1]!r}? A setting is given as --config.section.key=value")
        logging.set_verbosity(logging.WARNING)
        given = flags.FLAGS
        if given.distributed:
            address, *place = given.distributed.split("/")
            jax.distributed.initialize(*([address, *map(int, place)] if place else []))
        try:
            run(given.config, *([Path(given.workdir)] if folder else []))
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


class Stages(NamedTuple):
    """The stages before a run: where their folders are, their settings, and the run(config, folder, stages) of each."""

    root: Path
    settings: Any
    runs: dict

    def path(self, source: str) -> str:
        """A source as a path: "stage:NAME" is the folder of that stage, which is run first if it is not there yet."""
        if not source.startswith("stage:"):
            return source
        name = source.removeprefix("stage:")
        folder, settings = self.root / name, self.settings[name].copy_and_resolve_references()
        if (folder / "summary.json").exists():
            made = json.loads((folder / "config.json").read_text())
            if changed := log.difference(made, log.plain(settings)):
                raise ValueError(
                    f"stage {name} in {folder} was made with other settings: {'; '.join(changed)}. "
                    f"Delete that folder to make it again, or choose another --workdir."
                )
            log.say(f"stage {name}: reusing {folder}")
        else:
            log.say(f"stage {name}: making {folder}")
            self.runs[name](settings, folder, self)
        return str(folder)


class Loaded(NamedTuple):
    """A model on a mesh, its tokenizer, and digests that tell them from others."""

    model: Model
    params: Any
    tokenizer: Any
    digest: str
    tokenizer_digest: str


def load(source: str, settings, mesh, *, seed: int, scratch=None, head: str | None = None) -> Loaded:
    """The model of a source: as checkpoints.load has them, a run's folder that has no model yet but checkpoints, or "scratch", a
    new one of the architecture in the `scratch` section.

    Args:
        settings: the config's model section.
        head: the scalar head to have, "value" or "reward", drawn anew where the source brings none (HEADS: its kernel's std).
    """
    key, form = keys.key(seed, "init"), {"dtype": settings.dtype, "remat": settings.remat}
    if source == "scratch":
        tokenizer = reviews.tokenizer() if scratch.tokenizer == "reviews" else checkpoints.tokenizer(scratch.tokenizer)
        architecture, host = decoder.DecoderConfig(vocab=len(tokenizer), **scratch.architecture, **form), None
    elif (Path(source) / ARCHITECTURE).exists() and not (Path(source) / "model").exists():
        tokenizer = checkpoints.tokenizer(settings.tokenizer or Path(source) / "tokenizer")
        saved = json.loads((Path(source) / ARCHITECTURE).read_text()) | form
        architecture = decoder.DecoderConfig(**saved)
        like = shard.unbox(jax.eval_shape(decoder.build(architecture).init, key))
        host = checkpoint.load_params(Path(source) / "checkpoints", like)
    else:
        tokenizer = checkpoints.tokenizer(settings.tokenizer or source)
        architecture, host = checkpoints.load(source, **form)
    model = decoder.build(replace(architecture, scalar=HEADS[head](architecture.width) if head else None))
    if host is None:
        params, _ = shard.create(model.init, mesh, key)
    else:
        if head and "scalar" not in host:
            host["scalar"] = shard.fetch(jax.jit(lambda key: shard.unbox(model.init(key)["scalar"]))(key))
        elif not head:
            host.pop("scalar", None)
        params = shard.put(host, shard.shardings(jax.eval_shape(model.init, key), mesh))
    words = tokenizer.backend_tokenizer.to_str().encode()
    return Loaded(model, params, tokenizer, digest(params), hashlib.sha256(words).hexdigest()[:16])


def digest(tree) -> str:
    """Sixteen hexadecimal digits that tell this tree of arrays from others."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.ascontiguousarray(shard.fetch(leaf)))
    return total.hexdigest()[:16]


def new_state(loaded: Loaded, tx, mesh, **carried):
    """The state before the first step, made where it belongs, sharing no buffer with `loaded`. -> (TrainState, its shardings)"""

    def make(params):
        params = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.int32(0), params, tx.init(params), {name: jnp.float32(value) for name, value in carried.items()})

    where = shard.shardings(jax.eval_shape(lambda key: make(loaded.model.init(key)), jax.random.key(0)), mesh)
    return jax.jit(make, out_shardings=where)(loaded.params), where


def read_rows(source: str, count: int, *, seed: int) -> list[dict]:
    """`count` rows (0: all) of a file, a hub data set, or a generated world (GENERATED)."""
    if source in GENERATED:
        return [{"text": text} for text in GENERATED[source](count, seed=seed)]
    rows = sources.read(source)
    return rows[:count] if count else rows


def openings(tokenizer, *, source: str, count: int, template: str, length: int, seed: int) -> tables.Table:
    """Prompts to be continued: the first `length` tokens of each row's filled template."""

    def make(row):
        return text.prompt_completion(tokenizer, text.fill(template, row), "", eos=False)

    return tables.collect(read_rows(source, count, seed=seed), make, length=length, source=source, targets=False)


def rows_of(documents, numbers, length: int, mesh):
    """Prompts by number, left-padded, on the mesh."""
    return shard.place(tables.pad([documents[n] for n in numbers], length, side="left"), mesh)


def sampler(model: Model, mesh, eos: int, settings):
    """The compiled sampler: (params, keys, prompts) -> Batch."""
    draw = partial(sample, model, eos=eos, **settings)
    return shard.on_mesh(jax.jit(lambda params, row_keys, prompts: draw(params, row_keys, prompts)[0]), mesh)


def texts(tokenizer, batch: Batch) -> list[tuple[str, str]]:
    """Prompt and response of each row; special tokens are left out."""
    tokens, real, written = shard.fetch((batch.tokens, batch.segments > 0, batch.weights > 0))

    def decode(mask):
        return [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(tokens, mask, strict=True)]

    return list(zip(decode(real & ~written), decode(written), strict=True))


def gold_reward(tokenizer, lexicon: str):
    """-> (batch) -> the gold scores of its responses, f32 [B]: `rewards.sentiment` of each.

    Args: lexicon: "reviews" for the generated world's, or a .jsonl file of token and valence.
    """
    found = reviews.VALENCES if lexicon == "reviews" else {row["token"]: row["valence"] for row in sources.read(lexicon)}

    def score(batch: Batch) -> np.ndarray:
        return score_texts(partial(sentiment, valences=found), [response for _, response in texts(tokenizer, batch)])

    return score


def parts(documents: list, size: int):
    """`documents`, `size` at a time, the last filled up with its first document. Yields (documents [size], how many count)."""
    for start in range(0, len(documents), size):
        part = documents[start : start + size]
        yield part + [part[0]] * (size - len(part)), len(part)


def describe(workdir: Path, loaded: Loaded):
    """Leave what a run's checkpoints need to be read without its config: the architecture and the tokenizer."""
    workdir.mkdir(parents=True, exist_ok=True)
    log.write_json(workdir / ARCHITECTURE, asdict(loaded.model.config))
    if jax.process_index() == 0:
        loaded.tokenizer.save_pretrained(workdir / "tokenizer")


def append(path: Path, rows: list[dict]):
    """More rows of a .jsonl file, from process 0."""
    if jax.process_index() == 0:
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def finish(workdir: Path, loaded: Loaded, params, summary: dict):
    """Leave the model, the summary and the report of a run that has ended."""
    checkpoints.export(workdir / "model", loaded.model.config, params, tokenizer=loaded.tokenizer)
    log.write_json(workdir / "summary.json", summary)
    report.write(workdir)
    log.say(json.dumps(summary, indent=2))
    log.say(f"model in {workdir / 'model'}, report in {workdir / 'report.html'}")
