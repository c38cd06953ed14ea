"""What the drivers share: models, rows and texts by config."""

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.launch import ARCHITECTURE
from jaxalign import keys, models, shard
from jaxalign.data import arithmetic, compositions, opinions, reviews, sources, tables, text
from jaxalign.models import adapters, checkpoints, peft
from jaxalign.models.files import digest
from jaxalign.models.parts import Adapter
from jaxalign.prompts import template as templates
from jaxalign.rewards import score_texts, sentiment
from jaxalign.sample import sample
from jaxalign.train import checkpoint, log
from jaxalign.types import Batch, Model, TrainState, join

HEADS = {"value": lambda width: 0.0, "reward": lambda width: (width + 1) ** -0.5}  # Ziegler et al. 2019
GENERATED = {  # sources that need no file: (count, *, seed) -> rows
    **{
        make.__name__: lambda count, *, seed, make=make: [{"text": text} | reviews.cut(text) for text in make(count, seed=seed)]
        for make in (reviews.reviews, reviews.openings)
    },
    **{make.__name__: make for make in (arithmetic.secrets, arithmetic.games, arithmetic.solutions)},
    **{make.__name__: make for make in (arithmetic.sums, arithmetic.held_out_sums, arithmetic.told_sums)},
    "compositions": compositions.compositions,
    **{make.__name__: make for make in (opinions.sentiment, opinions.entailment, opinions.similarity, opinions.choice)},
}
TOKENIZERS = {"reviews": reviews.tokenizer, "arithmetic": arithmetic.tokenizer, "compositions": compositions.tokenizer}  # of these


class Loaded(NamedTuple):
    """A model on a mesh, its tokenizer, and digests that tell them from others.

    base: of a model with an adapter, the source of its other weights, and their digest.
    goes_on: its adapter is one that was trained before.
    """

    model: Model
    params: Any
    tokenizer: Any
    digest: str
    tokenizer_digest: str
    base: dict | None = None
    goes_on: bool = False

    @property
    def reference(self):
        """The parameters that a run is held to: its first ones or, where an adapter goes on, those of the model below.

        Virtual tokens stay as they begin. No weight is copied.
        """
        return adapters.neutral(self.params) if self.goes_on else self.params


def form_of(settings) -> dict:
    """What a config's model section says of how a model computes, beside what it computes."""
    return {"dtype": settings.dtype, "remat": settings.remat, "attention": settings.attention}


def load(
    source: str,
    settings,
    mesh,
    *,
    seed: int,
    scratch=None,
    head: str | None = None,
    draw_head: bool = True,
    adapter=None,
    tokens: tuple[str, ...] = (),
) -> Loaded:
    """The model of a source: as checkpoints.load has them; a run's folder that has no model yet but checkpoints; "scratch", a new
    one of the architecture in the `scratch` section; or the folder of an adapter, as PEFT has them, merged into the model that it
    names, or, as ADAPTER@MODEL, into another.

    Args:
        settings: the config's model section.
        head: the scalar head to have, "value" or "reward" (HEADS: the std of its kernel's first values).
        draw_head: draw that head where the source brings none; else that is an error.
        adapter: the config's section of a model that is to be trained: the fields of models.parts.Adapter; kind "none": train all.
        tokens: special tokens for a model that is there to have; those that it lacks are drawn.
    """
    key, form = keys.key(seed, "init"), form_of(settings)
    if source == "scratch":
        named = settings.tokenizer or scratch.tokenizer
        tokenizer = TOKENIZERS[named]() if named in TOKENIZERS else checkpoints.tokenizer(named)
        architecture, host, base = models.config_of({"vocab": len(tokenizer), **scratch.architecture, **form}), None, None
    else:
        tokenizer, architecture, host, base = _read(source, settings, form, key)
        if tokens:
            architecture, host = _with_tokens(tokenizer, architecture, host, tokens, jax.random.fold_in(key, 3))
        std = HEADS[head](architecture.width) if head else None
        if head and not draw_head and "scalar" in host and not np.isclose(architecture.scalar, std):
            raise ValueError(f"{source} holds no {head} head: its checkpoints are of another kind of run")
    wanted = Adapter(**adapter) if adapter is not None and adapter.kind != "none" else None
    own = architecture.adapter
    if own and adapter is not None and ((adapter.kind, adapter.length) != (own.kind, own.length) or adapter.source):
        told = "adapter.kind and length say the same, and adapter.source nothing, to train it on"
        raise ValueError(f"{source} has a {own.kind} of {own.length}; {told}")
    if wanted and host is not None and not own:
        architecture, host = adapters.adapt(architecture, host, wanted, jax.random.fold_in(key, 1))
        base = {"source": _absolute(source), "digest": digest(_frozen(architecture, host))}
    model = models.build(replace(architecture, scalar=HEADS[head](architecture.width) if head else None))
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
    goes_on = wanted is not None and wanted.source != ""
    return Loaded(model, params, tokenizer, digest(params), hashlib.sha256(words).hexdigest()[:16], base, goes_on)


def _absolute(source: str) -> str:
    """The same, wherever it is read."""
    parts = [source] if Path(source).exists() else source.split("@")
    return "@".join(str(Path(part).resolve()) if Path(part).exists() else part for part in parts)


def _read(source: str, settings, form: dict, key):
    """-> tokenizer, architecture, host parameters, Loaded.base. An adapter is merged with the weights that it was trained on."""
    name, _, below = (source, "", "") if Path(source).exists() else source.partition("@")
    folder = Path(name)
    if (folder / peft.CONFIG).exists():
        below = below or peft.base_of(folder)
        tokenizer, architecture, host, _ = _read(below, settings, form, key)
        if not settings.tokenizer and (folder / "tokenizer.json").exists():
            tokenizer = checkpoints.tokenizer(name)
        architecture, host = peft.load(folder, architecture, host)
        if architecture.adapter.virtual:
            return tokenizer, architecture, host, {"source": _absolute(below), "digest": digest(_frozen(architecture, host))}
        return tokenizer, *adapters.merge(architecture, host), None
    if not (folder / ARCHITECTURE).exists() or (folder / "model").exists():
        return checkpoints.tokenizer(settings.tokenizer or source), *checkpoints.load(source, **form), None
    tokenizer = checkpoints.tokenizer(settings.tokenizer or folder / "tokenizer")
    saved = log.read_json(folder / ARCHITECTURE) | form
    base = saved.pop("base", None)
    architecture = models.config_of(saved)
    like = shard.unbox(jax.eval_shape(models.build(architecture).init, key))
    host = checkpoint.load_params(folder / "checkpoints", adapters.split(like, adapters.trained_leaves(architecture))[1])
    if base is None:
        return tokenizer, architecture, host, None
    _, plain, below, _ = _read(base["source"], settings, form, key)
    below = {name: part for name, part in below.items() if name != "scalar"}  # which is the run's own
    below |= {"scalar": host["scalar"]} if "scalar" in host else {}
    below = adapters.adapt(replace(plain, scalar=architecture.scalar), below, architecture.adapter, jax.random.fold_in(key, 2))[1]
    if digest(_frozen(architecture, below)) != base["digest"]:
        raise ValueError(f"{base['source']} is no longer the model that the adapter in {source} was trained on")
    if architecture.adapter.virtual:
        return tokenizer, architecture, join(below, host), base
    return tokenizer, *adapters.merge(architecture, join(below, host)), None


def _with_tokens(tokenizer, architecture, host, tokens, key):
    """The tokenizer learns special tokens. -> architecture and parameters with a row for each that it lacked, in the embedding and
    in a head of its own, drawn as the others lie: normal, with their mean and standard deviation in each dimension."""
    first = len(tokenizer)
    new = tokenizer.add_tokens(list(tokens), special_tokens=True)

    def grown(rows, key):
        drawn = rows.mean(0) + rows.std(0) * np.asarray(jax.random.normal(key, (new, rows.shape[1])))
        return np.concatenate([rows[:first], drawn.astype(rows.dtype), rows[first + new :]])  # a table may have had spare rows

    for n, (part, name) in enumerate([("embed", "tokens"), ("head", "kernel")]):
        if part in host:
            host = host | {part: host[part] | {name: grown(host[part][name], jax.random.fold_in(key, n))}}
    return replace(architecture, vocab=len(host["embed"]["tokens"])), host


def _frozen(architecture, params):
    return adapters.split(params, adapters.trained_leaves(architecture))[0]


def new_state(loaded: Loaded, tx, mesh, **carried):
    """The state before the first step, made where it belongs. -> (TrainState, its shardings)

    It shares the frozen arrays with `loaded`, and no other.

    Args: carried: what TrainState.loop holds, by name; arrays whose rows are to be split, in the boxes of shard.declare_rows.
    """

    def make(params):
        params = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.int32(0), params, tx.init(params), jax.tree.map(jnp.asarray, carried))

    leaves = adapters.trained_leaves(loaded.model.config)
    frozen, trained = adapters.split(loaded.params, leaves)
    abstract = jax.eval_shape(lambda key: make(adapters.split(loaded.model.init(key), leaves)[1]), jax.random.key(0))
    where = shard.shardings(abstract, mesh)
    return jax.jit(lambda params: shard.unbox(make(params)), out_shardings=where)(trained).replace(frozen=frozen), where


def read_rows(source: str, count: int, *, seed: int) -> list[dict]:
    """`count` rows (0: all) of a file, a hub data set (hub:owner/name[:config][@split]), or a generated world (GENERATED)."""
    if source in GENERATED:
        if not count:
            raise ValueError(f"{source!r} has no end: say how many rows, by `count`")
        return GENERATED[source](count, seed=seed)
    name, _, split = source.partition("@") if source.startswith("hub:") else (source, "", "")
    rows = sources.read(name, split=split or "train")
    return rows[:count] if count else rows


def split(items: list, held_out: int, name: str):
    """-> (all but the last `held_out`, those). ValueError where a side is empty."""
    if not 0 < held_out < len(items):
        raise ValueError(f"{name} = {held_out} of {len(items)}: at least one must be on each side")
    return items[:-held_out], items[-held_out:]


def start_of(model: Model) -> int | None:
    """The token that an encoder-decoder starts to decode with; None for a decoder."""
    return getattr(model.config, "start", None)


def document(
    tokenizer, prompt: str, answer: str | None, *, chat: bool, eos: bool = True, start: int | None = None
) -> text.Document:
    """A prompt that is one text, and its answer as the targets: as `prompts.template.document` has them."""
    asked = templates.Prompt(prompt, "", [{"role": "user", "content": prompt}])
    return templates.document(tokenizer, asked, answer, chat=chat, eos=eos, start=start)


def fill_each(template: str, row: dict) -> list[str]:
    """A template of one {column}, which is a list: filled with each of its entries. ValueError where it is none."""
    (column,) = text.fields(template)
    if not isinstance(row.get(column), list):
        raise ValueError(f"'{column}' is {text.brief(row.get(column))}, not a list")
    return [text.fill(template, row | {column: entry}) for entry in row[column]]


def collect(rows, make, *, length: int, source: str, **settings) -> tables.Table:
    """tables.collect, and a line on what became of the rows."""
    table = tables.collect(rows, make, length=length, source=source, **settings)
    told = ", ".join(f"{name} {count}" for name, count in table.counts.items() if count)
    log.say(f"{source}, at most {length} tokens: {told}")
    return table


def openings(
    tokenizer, *, source: str, count: int, template: str, length: int, chat: bool, seed: int, start: int | None = None
) -> list[text.Document]:
    """Prompts to be continued: each row's filled template, as a user's turn or, plain, its first `length` tokens.

    Args: start: of `start_of`.
    """
    settings = {"source": source, "count": count, "template": template, "length": length, "chat": chat}
    return [prompt for prompt, _ in openings_and_rows(tokenizer, **settings, seed=seed, start=start)]


def openings_and_rows(tokenizer, *, source, count, template, length, chat, seed, start=None) -> list[tuple[text.Document, dict]]:
    """The same, each with the row that it was made of."""

    def make(row):
        return document(tokenizer, text.fill(template, row), None, chat=chat, start=start)

    rows, keep = read_rows(source, count, seed=seed), "end" if chat else "start"
    table = collect(rows, make, length=length, source=source, keep=keep, targets=False)
    return [(prompt, rows[n]) for prompt, n in zip(table.documents, table.rows, strict=True)]


def prompt_columns(model: Model, length: int) -> tuple[int, int]:
    """Of rows of prompts of at most `length` tokens: columns, and columns of the source, where an encoder-decoder has them."""
    return (length, 0) if start_of(model) is None else (1, length)


def rows_of(documents, numbers, length: int, mesh, vocab: int):
    """Prompts by number, left-padded, on the mesh; columns as of `prompt_columns`."""
    found = [documents[n] for n in numbers]
    batch = tables.pad(found, length if found[0].source is None else 1, side="left", source_length=length)
    return shard.place(tables.check(batch, vocab, targets=False), mesh)


def sampler(model: Model, mesh, eos: int, settings):
    """The compiled sampler: (params, keys, prompts, group=1) -> (Batch, logp). ValueError without an EOS: nothing would ever end.

    group: of so many rows, one behind the other, the prompt is the same, and read once.
    """
    if eos is None:
        raise ValueError("this tokenizer has no EOS token, so no response would ever end: set its eos_token")

    def draw(params, row_keys, prompts, group=1):
        return sample(model, params, row_keys, jax.tree.map(lambda x: x[::group], prompts), eos=eos, **settings)[:2]

    return shard.on_mesh(jax.jit(draw, static_argnums=3), mesh)


def ids(batch: Batch) -> list[tuple[list, list]]:
    """The tokens of each row's prompt, which an encoder-decoder has as its source, and of the response."""
    batch = shard.fetch(batch)
    written = batch.weights > 0
    prompt = (batch.tokens, (batch.segments > 0) & ~written) if batch.source is None else (batch.source, batch.source_segments > 0)
    rows = zip(*prompt, batch.tokens, written, strict=True)
    return [(read[real].tolist(), tokens[targets].tolist()) for read, real, tokens, targets in rows]


def texts(tokenizer, batch: Batch) -> list[tuple[str, str]]:
    """Prompt and response of each row; special tokens are left out."""
    return [tuple(tokenizer.decode(part, skip_special_tokens=True) for part in row) for row in ids(batch)]


def gold_reward(lexicon: str):
    """-> (responses) -> their gold scores, f32 [B]: `rewards.sentiment` of each text.

    Args: lexicon: "reviews" for the generated world's, or a .jsonl file of token and valence.
    """
    valences = reviews.VALENCES
    if lexicon != "reviews":
        rows = sources.read(lexicon)
        sources.require(rows, ("token", "valence"), lexicon, numbers=("valence",))
        valences = {row["token"]: row["valence"] for row in rows}
    return partial(score_texts, partial(sentiment, valences=valences))


def held_out_means(objective, mesh, documents, size: int, **lengths):
    """-> (params) -> {name: its mean over all these documents}, of what an objective (params, Batch) -> (sum, sums) says."""
    measure = shard.on_mesh(jax.jit(objective), mesh)

    def means(params) -> dict[str, float]:
        found = []
        for part, count in parts(documents, size):
            batch = tables.pad(part, **lengths)
            batch.weights[count:] = 0
            found.append(shard.fetch(measure(params, shard.place(batch, mesh))[1]))
        total = {name: sum(float(sums[name]) for sums in found) for name in found[0]}
        return {name: x / total["weight"] for name, x in total.items() if name != "weight"}

    return means


def parts(documents: list, size: int):
    """`documents`, `size` at a time, the last filled up with its first document. Yields (documents [size], how many count)."""
    for start in range(0, len(documents), size):
        part = documents[start : start + size]
        yield part + [part[0]] * (size - len(part)), len(part)
