"""What the drivers share: models, rows and texts by config."""

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.launch import ARCHITECTURE
from jaxalign import keys, shard
from jaxalign.data import reviews, sources, tables, text
from jaxalign.models import checkpoints, decoder
from jaxalign.rewards import score_texts, sentiment
from jaxalign.sample import sample
from jaxalign.train import checkpoint, log
from jaxalign.types import Batch, Model, TrainState

HEADS = {"value": lambda width: 0.0, "reward": lambda width: (width + 1) ** -0.5}  # Ziegler et al. 2019
GENERATED = {"reviews": reviews.reviews, "openings": reviews.openings}  # sources that need no file


class Loaded(NamedTuple):
    """A model on a mesh, its tokenizer, and digests that tell them from others."""

    model: Model
    params: Any
    tokenizer: Any
    digest: str
    tokenizer_digest: str


def load(source: str, settings, mesh, *, seed: int, scratch=None, head: str | None = None, draw_head: bool = True) -> Loaded:
    """The model of a source: as checkpoints.load has them, a run's folder that has no model yet but checkpoints, or "scratch", a
    new one of the architecture in the `scratch` section.

    Args:
        settings: the config's model section.
        head: the scalar head to have, "value" or "reward" (HEADS: the std of its kernel's first values).
        draw_head: draw that head where the source brings none; else that is an error.
    """
    key, form = keys.key(seed, "init"), {"dtype": settings.dtype, "remat": settings.remat}
    if source == "scratch":
        named = settings.tokenizer or scratch.tokenizer
        tokenizer = reviews.tokenizer() if named == "reviews" else checkpoints.tokenizer(named)
        architecture, host = decoder.DecoderConfig(vocab=len(tokenizer), **scratch.architecture, **form), None
    elif (Path(source) / ARCHITECTURE).exists() and not (Path(source) / "model").exists():
        tokenizer = checkpoints.tokenizer(settings.tokenizer or Path(source) / "tokenizer")
        saved = json.loads((Path(source) / ARCHITECTURE).read_text()) | form
        if head and not draw_head and saved["scalar"] != HEADS[head](saved["width"]):
            raise ValueError(f"{source} holds no {head} head: its checkpoints are of another kind of run")
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
        if not head:
            host.pop("scalar", None)
        elif "scalar" not in host:
            if not draw_head:
                raise ValueError(f"{source} has no scalar head (score.weight): experiments.reward makes a reward model of it")
            host["scalar"] = shard.fetch(jax.jit(lambda key: shard.unbox(model.init(key)["scalar"]))(key))
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
    """`count` rows (0: all) of a file, a hub data set (hub:owner/name[:config][@split]), or a generated world (GENERATED)."""
    if source in GENERATED:
        if not count:
            raise ValueError(f"{source!r} has no end: say how many rows, by `count`")
        return [{"text": text} for text in GENERATED[source](count, seed=seed)]
    name, _, split = source.partition("@") if source.startswith("hub:") else (source, "", "")
    rows = sources.read(name, split=split or "train")
    return rows[:count] if count else rows


def split(items: list, held_out: int, name: str):
    """-> (all but the last `held_out`, those). ValueError where a side is empty."""
    if not 0 < held_out < len(items):
        raise ValueError(f"{name} = {held_out} of {len(items)}: at least one must be on each side")
    return items[:-held_out], items[-held_out:]


def document(tokenizer, prompt: str, answer: str | None, *, chat: bool, eos: bool = True) -> text.Document:
    """A prompt, and its answer as the targets (None: to be sampled): as turns of a user and the assistant, or one behind the other.

    Args: eos: end a plain answer with EOS; an assistant's turn always has its end.
    """
    if chat:
        asked = {"role": "user", "content": prompt}
        said = [] if answer is None else [{"role": "assistant", "content": answer}]
        return text.chat(tokenizer, [asked, *said], generate=answer is None)
    return text.prompt_completion(tokenizer, prompt, answer or "", eos=eos and answer is not None)


def collect(rows, make, *, length: int, source: str, **settings) -> tables.Table:
    """tables.collect, and a line on what became of the rows."""
    table = tables.collect(rows, make, length=length, source=source, **settings)
    told = ", ".join(f"{name} {count}" for name, count in table.counts.items() if count)
    log.say(f"{source}, at most {length} tokens: {told}")
    return table


def openings(tokenizer, *, source: str, count: int, template: str, length: int, chat: bool, seed: int) -> list[text.Document]:
    """Prompts to be continued: each row's filled template, as a user's turn or, plain, its first `length` tokens."""

    def make(row):
        return document(tokenizer, text.fill(template, row), None, chat=chat)

    rows, keep = read_rows(source, count, seed=seed), "end" if chat else "start"
    return collect(rows, make, length=length, source=source, keep=keep, targets=False).documents


def rows_of(documents, numbers, length: int, mesh, vocab: int):
    """Prompts by number, left-padded, on the mesh."""
    batch = tables.pad([documents[n] for n in numbers], length, side="left")
    return shard.place(tables.check(batch, vocab, targets=False), mesh)


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


def gold_reward(lexicon: str):
    """-> (responses) -> their gold scores, f32 [B]: `rewards.sentiment` of each text.

    Args: lexicon: "reviews" for the generated world's, or a .jsonl file of token and valence.
    """
    valences = reviews.VALENCES
    if lexicon != "reviews":
        rows = sources.read(lexicon)
        sources.require(rows, ("token", "valence"), lexicon)
        valences = {row["token"]: row["valence"] for row in rows}
    return partial(score_texts, partial(sentiment, valences=valences))


def parts(documents: list, size: int):
    """`documents`, `size` at a time, the last filled up with its first document. Yields (documents [size], how many count)."""
    for start in range(0, len(documents), size):
        part = documents[start : start + size]
        yield part + [part[0]] * (size - len(part)), len(part)
