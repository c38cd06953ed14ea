"""The three requests that every evaluation is made of, over a sharded model. Tasks are no matter of this file.

    score = scorer(model, mesh, batch=8, length=2048)
    score(params, documents)                      log-likelihoods: of the targets of each document (Said)
    rolling(score, params, texts, ...)            of whole texts, in windows
    generate = generator(model, mesh, tokenizer, batch=8, context=2048, length=64, temperature=0.0)
    generate(params, row_keys, prompts, ["\n"])   continuations, greedy or sampled, up to a stop string (Written)

Results are in the order of the requests. Requests of about one length make a batch, as many columns wide as its length, rounded up
(`columns`), says of each: so what else is asked changes no result, and few shapes are compiled. All is a function of its
arguments: no training's random state is touched.

Of a long run, `tell(number, result)` hears of each request when it is answered, those that are longest first.
"""

import re
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import sample, shard
from jaxalign.data import tables, text
from jaxalign.prompts import constrain
from jaxalign.score import by_chunk, of_logits, shift

SHORT = 32  # columns: the least, and those in which the targets of most requests are
ENDS = 8  # documents that differ in the last token alone, such as letters of choices, and are read as one row
STATES = 16  # of tables of stop strings, a multiple, so that others compile nothing anew
CONTEXT = 2048  # most tokens of a model that has no longest text, as lm-evaluation-harness has it


class Said(NamedTuple):
    """About the targets of one document."""

    logp: float  # nats, their sum
    greedy: bool  # each is the most likely token
    tokens: int  # how many there are
    cut: bool  # the document was too long, and lost its start


class Written(NamedTuple):
    """A continuation."""

    text: str  # up to the stop string, without special tokens
    tokens: list[int]  # as drawn: with EOS, or the token that completes the stop string
    ended: bool  # by EOS or by a stop string
    cut: bool  # the prompt was too long, and lost its start


def longest(model, length: int = 0) -> int:
    """`length`, or, where that is 0, as many tokens as the model was made for."""
    return length or getattr(model.config, "context", CONTEXT)


def scorer(model, mesh, *, batch: int, length: int):
    """-> score(params, documents, tell=None) -> [Said], one a document.

    Args:
        batch: rows at a time; it divides over the mesh.
        length: most tokens that the model reads; the last one of a document is not read. Longer ones lose their start.
    Raises ValueError, naming the document, where one has no target, or more than are left of it.
    """
    work = shard.on_mesh(jax.jit(partial(_said, model), static_argnums=3), mesh)

    def score(params, documents, tell=None):
        fitted = [_fitted(document, length, number) for number, document in enumerate(documents)]
        kept = [document for document, _ in fitted]
        reads = _shared(kept)
        found = [None] * len(kept)
        for (wide, sources, last), rows, count in _alike([_shape(kept[read[0][0]], length) for read in reads], batch):
            asked = [_but_last(kept[reads[row][0][0]]) for row in rows]
            ends = np.array([[kept[same[0]].tokens[-1] for same in (reads[row] * ENDS)[:ENDS]] for row in rows], np.int32)
            placed = _placed(asked, wide, sources, model, mesh)
            logp, greedy = shard.fetch(work(params, placed, shard.place(ends, mesh), last))
            for r, row in enumerate(rows[:count]):
                for end, n in ((end, n) for end, same in enumerate(reads[row]) for n in same):
                    targets = int((kept[n].weights > 0).sum())
                    found[n] = Said(float(logp[r, end]), bool(greedy[r, end]), targets, fitted[n][1])
                    if tell:
                        tell(n, found[n])
        return found

    return score


def rolling(score, params, texts: list[list[int]], *, length: int, prefix: int) -> list[Said]:
    """Whole texts, given as tokens, of which each is predicted once. -> [Said], one a text

    Args: length: of `score`; prefix: the token that stands before the first one of a text (`prefix_of`).
    """
    parts = [windows(tokens, length=length, prefix=prefix) for tokens in texts]
    said = iter(score(params, [window for part in parts for window in part]))
    whole = [[next(said) for _ in part] for part in parts]
    return [Said(sum(x.logp for x in one), all(x.greedy for x in one), sum(x.tokens for x in one), False) for one in whole]


def windows(tokens: list[int], *, length: int, prefix: int) -> list[text.Document]:
    """A text of any length as documents of which a model reads at most `length` tokens, and each token is a target of one.

    As lm-evaluation-harness has it: each window begins with the last token of the one before it, and the last window reads as far
    back as it can.
    """
    whole, parts = [prefix, *tokens], []
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        kept = np.array(whole[max(0, end - length) : end + 1], np.int32)
        parts.append(text.Document(kept, (np.arange(len(kept)) >= len(kept) - (end - start)).astype(np.float32)))
    return parts


def generator(model, mesh, tokenizer, *, batch: int, context: int, length: int, **settings):
    """-> generate(params, row_keys, prompts, until=(), tell=None) -> [Written], one a prompt.

    A row is decoded to EOS, `length`, or the token that completes one of the stop strings `until`, which may be special tokens; the
    text is cut before it.
    Args:
        batch: rows at a time; it divides over the mesh.
        context: most tokens of prompt and continuation. Longer prompts lose their start.
        settings: of sample.sample: temperature, ...
    Raises ValueError where there is no room for a prompt.
    """
    if context <= length:
        raise ValueError(f"{length} tokens to write, and the model reads at most {context}: there is no room for a prompt")
    room, eos = context - length, -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    added = tokenizer.get_added_vocab()

    def draw(params, row_keys, prompts, until):
        return sample.sample(model, params, row_keys, prompts, length=length, eos=eos, until=until, **settings)[0]

    work = shard.on_mesh(jax.jit(draw), mesh)

    @cache
    def table(until):
        found = constrain.until(tokenizer, until, vocab=model.config.vocab)
        return np.pad(found, ((0, -len(found) % STATES), (0, 0)))

    def generate(params, row_keys, prompts, until=(), tell=None):
        until = tuple(stop for stop in until if stop)
        stops, specials = table(until) if until else None, {eos, *(added[stop] for stop in until if stop in added)}
        kept = [text.fit(prompt, room, keep="end", source_length=context) for prompt in prompts]
        found = [None] * len(kept)
        for (wide, sources), rows, count in _alike([_sides(prompt, room, context) for prompt in kept], batch):
            drawn = shard.fetch(
                work(params, row_keys[np.array(rows)], _placed([kept[n] for n in rows], wide, sources, model, mesh), stops)
            )
            for r, n in enumerate(rows[:count]):
                tokens = drawn.tokens[r][drawn.weights[r] > 0].tolist()
                stop = next((i for i, token in enumerate(tokens) if token in specials), len(tokens))
                answer, stopped = cut(tokenizer.decode(tokens[:stop], skip_special_tokens=True), until)
                was_cut = len(kept[n].ids) < len(prompts[n].ids)
                found[n] = Written(answer, tokens, stopped or stop < len(tokens) or len(tokens) < length, was_cut)
                if tell:
                    tell(n, found[n])
        return found

    return generate


def cut(answer: str, until) -> tuple[str, bool]:
    """A text before that stop string which is the first to be complete, and whether there is one."""
    found = [(answer.find(stop) + len(stop), answer.find(stop)) for stop in until if stop and stop in answer]
    return (answer[: min(found)[1]], True) if found else (answer, False)


def whole(tokenizer, context: str, continuation: str) -> text.Document:
    """A context and, as the targets, its continuation, tokenised as one text: what follows the tokens of the context alone.

    As lm-evaluation-harness has it, for numbers that are to agree: white space at the end of the context goes to the continuation,
    and an empty context is BOS, or EOS. Where a token lies across the boundary, the context is not quite what it is alone;
    `text.prompt_completion` tokenises the two apart, as what is sampled will stand.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if stripped:
        ids, count = encoded(tokenizer, stripped + continuation), len(encoded(tokenizer, stripped))
    else:
        prefix, ids = prefix_of(tokenizer), tokenizer(continuation, add_special_tokens=False)["input_ids"]
        ids, count = ids if ids[:1] == [prefix] else [prefix, *ids], 1
    return text.of_ids(ids[:count], ids[count:], vocab=len(tokenizer))


def encoded(tokenizer, string: str) -> list[int]:
    """Tokens of a text, with the special ones that the tokenizer puts around one by habit, but where the text begins with them."""
    spelt = string.startswith(tokenizer.decode([prefix_of(tokenizer)]))
    return tokenizer(string, add_special_tokens=not spelt)["input_ids"]


def prefix_of(tokenizer) -> int:
    """What stands before a text: BOS, or EOS. ValueError where the tokenizer has neither."""
    if (found := tokenizer.bos_token_id) is None and (found := tokenizer.eos_token_id) is None:
        raise ValueError("this tokenizer has no BOS and no EOS token, so nothing can stand before a text")
    return found


def perplexity(logp, counts) -> float:
    """exp(-sum logp / sum counts) over texts: weighted by tokens, words or bytes, whichever `counts` are; its log2, of bytes, is in
    bits a byte."""
    return float(np.exp(-np.sum(logp) / np.sum(counts)))


def words(string: str) -> int:
    """How many words a text has for perplexities of lm-evaluation-harness."""
    return len(re.split(r"\s+", string))


def columns(size: int) -> int:
    """`size` rounded up to one of 32, 48, 64, 96, 128, 192, ..."""
    power = max(SHORT, 1 << (size - 1).bit_length())
    return power * 3 // 4 if size <= power * 3 // 4 and power > SHORT else power


def _said(model, params, asked, ends, last: int):
    """About rows that lack their last token: log-probability of their targets and of each of `ends` behind. -> f32, bool [B,ENDS]

    Args: last: columns at the end in which all targets are; 0: a row has none but its end.
    """

    def one(head, part):
        hidden, tokens = part
        logits = model.unembed(head, hidden)
        return of_logits(logits, tokens).logp, logits.argmax(-1) == tokens

    hidden, _ = model.read(params, asked)
    logp, greedy = one(model.head(params), (hidden[:, -1:], ends))
    if last:
        wanted = asked.targets[:, -last:] > 0
        said, best = by_chunk(model, params, one, (shift(hidden)[:, -last:], asked.tokens[:, -last:]), chunk=64)
        logp += jnp.where(wanted, said, 0).sum(1, keepdims=True)
        greedy &= (best | ~wanted).all(1, keepdims=True)
    return logp, greedy


def _fitted(document, length: int, number: int):
    """-> (the document to its last target, of which at most `length` tokens are read; whether it lost its start)"""
    targets = np.flatnonzero(document.weights > 0)
    if not len(targets):
        raise ValueError(f"document {number} has no target: the continuation is empty, or no token of its own")
    document = document._replace(tokens=document.tokens[: targets[-1] + 1], weights=document.weights[: targets[-1] + 1])
    kept = text.fit(document, length + 1, keep="end", source_length=length)
    if (kept.weights > 0).sum() < len(targets):
        raise ValueError(f"document {number} has {len(targets)} targets, and the model reads {length} tokens: see `windows`")
    return kept, len(kept.ids) < len(document.ids)


def _but_last(document):
    return document._replace(tokens=document.tokens[:-1], weights=document.weights[:-1])


def _shared(documents) -> list[list[list[int]]]:
    """Numbers of documents that are one but for the last token: a list for each last token, at most ENDS of these together."""
    groups = {}
    for number, document in enumerate(documents):
        read = _but_last(document)
        ends = groups.setdefault((read.ids, (read.weights > 0).tobytes()), {})
        ends.setdefault(int(document.tokens[-1]), []).append(number)
    whole = [[*ends.values()] for ends in groups.values()]
    return [group[start : start + ENDS] for group in whole for start in range(0, len(group), ENDS)]


def _sides(document, length: int, source_length: int) -> tuple[int, int]:
    """Columns of a document, and of its source."""
    sources = 0 if document.source is None else min(columns(len(document.source)), source_length)
    return min(columns(len(document.tokens)), length), sources


def _shape(document, length: int) -> tuple[int, int, int]:
    """Columns that are read of a document, those of its source, and those at the end that may have targets."""
    read = _but_last(document)
    wide, sources = _sides(read, length, length)
    back = len(read.tokens) - next(iter(np.flatnonzero(read.weights > 0)), len(read.tokens))
    return wide, sources, 0 if not back else min(SHORT, wide) if back <= SHORT else wide


def _alike(shapes: list, batch: int):
    """Rows of one shape, `batch` at a time, the largest first. Yields (shape, rows, how many count): the last are filled up."""
    for shape in sorted(set(shapes), reverse=True):
        alike = [row for row, other in enumerate(shapes) if other == shape]
        for start in range(0, len(alike), batch):
            rows = alike[start : start + batch]
            yield shape, rows + rows[:1] * (batch - len(rows)), len(rows)


def _placed(documents, wide: int, sources: int, model, mesh):
    padded = tables.pad(documents, wide, side="left", source_length=sources)
    return shard.place(tables.check(padded, model.config.vocab, targets=False), mesh)
