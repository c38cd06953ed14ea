"""From text to tokens with training weights.

Where a prompt ends and a target begins is settled in the text, and pieces are tokenised so that no token lies across: the
boundary is exact, and it is never searched for in tokens or in decoded text.
"""

import math
import re
from string import Formatter
from typing import NamedTuple

import numpy as np

from jaxalign.data import templates
from jaxalign.data.sources import brief, is_number, names

FIELD = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")  # column[index][index]


class Document(NamedTuple):
    """One text as tokens. weights[0] is 0: nothing predicts the first token."""

    tokens: np.ndarray  # i32 [n]
    weights: np.ndarray  # f32 [n]; > 0 where the token is a target
    source: np.ndarray | None = None  # i32 [m], what an encoder reads; the first token is then the one that decoding starts with

    @property
    def ids(self) -> bytes:
        """What tells it from documents of other tokens."""
        return self.tokens.tobytes() + (b"" if self.source is None else b"|" + self.source.tobytes())


def prompt_completion(tokenizer, prompt: str, completion: str, *, eos: bool = True, bos: bool | None = None) -> Document:
    """A prompt and, as the targets, its completion and EOS.

    The tokens of the prompt are those of the prompt alone, which is what a sampler will be given. So is no space put between
    the two: it belongs to the start of the completion (" yes"), for a prompt that ends in a space is cut into other tokens.
    With completion = "" and eos = False it is the prompt to sample from.
    Args:
        eos: end with the tokenizer's EOS, once, whether or not the completion spells it out.
        bos: start with the tokenizer's BOS, once likewise; None does as the tokenizer does by habit.
    Raises ValueError where the tokenizer has no such token.
    """
    return _document(tokenizer, [(prompt, 0.0), (completion, 1.0)], eos=eos, bos=bos)


def in_steps(tokenizer, prompt: str, steps: list[str]) -> Document:
    """A prompt and the steps of its solution. Targets: the last token of each step, where a step is judged. No EOS.

    Raises ValueError for a step that has no token.
    """
    document = _document(tokenizer, [(prompt, 0.0), *((step, n) for n, step in enumerate(steps, 1))], eos=False, bos=None)
    ends = (document.weights != np.append(document.weights[1:], 0)) & (document.weights > 0)
    if ends.sum() != len(steps):
        raise ValueError(f"{len(steps)} steps, of which {ends.sum()} have a token that something stands before")
    return document._replace(weights=ends.astype(np.float32))


def source_target(tokenizer, source: str, target: str, *, start: int, eos: bool = True) -> Document:
    """For an encoder-decoder: a source and EOS for the encoder; for the decoder `start` and, as the targets, the target and EOS.

    Each is tokenised by itself, as T5 has it. With target = "" and eos = False it is the prompt to sample from.
    Args: start: id of the token that decoding starts with. Raises ValueError where the tokenizer has no EOS.
    """
    read = _document(tokenizer, [(source, 0.0)], eos=True, bos=None).tokens
    written = _document(tokenizer, [(target, 1.0)], eos=eos, bos=False).tokens
    return _behind(start, written, read)


def plain(tokenizer, text: str, *, eos: bool = True, bos: bool | None = None) -> Document:
    """A text of which every token is a target, and EOS. Arguments as of `prompt_completion`."""
    return _document(tokenizer, [(text, 1.0)], eos=eos, bos=bos)


def chat(tokenizer, messages: list[dict], *, generate: bool = False) -> Document:
    """A conversation through the tokenizer's chat template. Targets: what the assistant says, with the token that ends its turn.

    An assistant's turn begins where the template leaves off for messages[:i] with a generation prompt, and ends with the last
    special token of messages[:i + 1]. The document ends with its last such turn, as a sampled response does; what a template
    writes behind it is left out. The pieces are tokenised one by one, so the prompt that is sampled from
    (`chat(messages[:i], generate=True)`) is a prefix of the document that is trained on, token by token.
    Args:
        messages: [{"role": ..., "content": ...}, ...], both strings.
        generate: the prompt for the assistant's next turn instead; no targets.
    Raises ValueError where there is no assistant's turn to learn or no turn of another to answer; where the template refuses the
    messages; where it rewrites an earlier turn once a later one is there; where it ends a turn without a special token.
    """
    roles = _roles(messages)
    turns = [i for i, role in enumerate(roles) if role == "assistant"]
    if roles[:1] in ([], ["assistant"]):
        raise ValueError(
            "a conversation starts with a message to the assistant: " + (f"the roles are {roles}" if roles else "it is empty")
        )
    if generate and roles[-1] == "assistant":
        raise ValueError("the assistant has had the last word already: leave its turn out to sample it anew")
    if not generate and not turns:
        raise ValueError(f"no turn of the assistant to learn from: the roles are {roles}; generate=True makes a prompt")

    cuts = [(len(messages), True) if generate else (turns[-1] + 1, False)]
    cuts += [cut for i in turns for cut in ((i, True), (i + 1, False))]
    whole, *around = templates.render(tokenizer, messages, cuts)
    pieces, done = [], 0
    for i, before, after in zip(turns, around[::2], around[1::2], strict=True):
        if not (len(before) >= done and after.startswith(before) and whole.startswith(after)):
            raise ValueError(
                f"the chat template writes messages 0 to {i} otherwise once more of them follow, so there is no telling where "
                f"message {i} stands in the text; make one conversation of each turn of the assistant, ending with it"
            )
        end = len(after.rstrip())
        if not _ends_special(tokenizer, whole[len(before) : end]):
            raise ValueError(
                f"the chat template ends the turn of message {i} without a special token: a model would not learn to stop"
            )
        pieces += [(whole[done : len(before)], 0.0), (whole[len(before) : end], 0.0 if generate else 1.0)]
        done = end
    if generate:
        pieces.append((whole[done:], 0.0))
    return _document(tokenizer, pieces, eos=False, bos=False)


def fit(document: Document, length: int, *, keep: str = "start", source_length: int = 0) -> Document:
    """At most `length` tokens: the first ones (keep = "start": EOS goes) or the last ones (keep = "end": BOS goes).

    With a source, it is of the source that the first or the last ones are kept, at most `source_length` (0: `length`), the last
    token among them, which is its EOS; and the first ones of the rest, for there decoding starts.
    """
    if keep not in ("start", "end"):
        raise ValueError(f"keep = {keep!r}; there are 'start' and 'end'")
    if document.source is not None:
        source, most = document.source, source_length or length
        if len(source) > most:
            source = np.append(source[: most - 1], source[-1]) if keep == "start" else source[-most:]
        return document._replace(tokens=document.tokens[:length], weights=document.weights[:length], source=source)
    spare = len(document.tokens) - length
    if spare <= 0:
        return document
    kept = slice(length) if keep == "start" else slice(spare, None)
    return _headless(document.tokens[kept], document.weights[kept])


def fields(template: str) -> list[str]:
    """What a template takes from a row: ["targets[0]"] of "{targets[0]}". ValueError where a brace has no other."""
    return [field for _, field, _, _ in _parsed(template) if field is not None]


def fill(template: str, row: dict) -> str:
    """A template with the columns of a row: "{question}", "{targets[0]}", "{answers[text][0]}"; "{{" and "}}" are braces.

    Columns and indices, nothing else: no attributes, conversions or formats. Raises ValueError where there is no such column or
    index, where its value is no string or number, for a list or null inside a text is hardly meant, and where the text cannot be
    written in UTF-8, for no tokenizer takes it.
    """
    parts = _parsed(template)
    whole = "".join(
        text if field is None else text + _value(field, format, conversion, row) for text, field, format, conversion in parts
    )
    try:
        whole.encode("utf-8")
    except UnicodeEncodeError as error:
        half = whole[error.start]
        raise ValueError(f"template {brief(template)}: {half!r} in the text is half of a pair, and no character") from error
    return whole


def number(template: str, row: dict) -> float:
    """The finite number of one column, as in "{margin}". ValueError where it is a text, a bool, or too large."""
    column = fields(template)
    if len(column) != 1 or template != f"{{{column[0]}}}":
        raise ValueError(f"template {brief(template)}: a number is one column and nothing around it, such as '{{margin}}'")
    value = _found(column[0], "", None, row)
    if not is_number(value):
        raise ValueError(f"{_named(column[0])} is {brief(value)}, not a finite number")
    return float(value)


def of_ids(prompt: list[int], completion: list[int], *, vocab: int, start: int | None = None) -> Document:
    """A prompt and the completion that a model wrote, the targets, as the ids that they were. ValueError for what is no such id.

    Args: start: of an encoder-decoder, the token that decoding starts with: the prompt is then the source.
    """
    for name, ids in (("prompt", prompt), ("completion", completion)):
        if not isinstance(ids, list):
            raise ValueError(f"the ids of the {name} are {brief(ids)}, not a list")
        for place, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < vocab:
                raise ValueError(f"id {place} of the {name} is {brief(token)}, no token of a vocabulary of {vocab}")
    if start is not None:
        return _behind(start, completion, prompt)
    tokens = np.array(prompt + completion, np.int32)
    return _headless(tokens, (np.arange(len(tokens)) >= len(prompt)).astype(np.float32))


def _parsed(template: str) -> list:
    try:
        return list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {brief(template)}: {error}; a brace that is meant is written twice") from error


def _named(field: str) -> str:
    return f"'{{{repr(field)[1:-1]}}}' of the template"


def _value(field, format, conversion, row) -> str:
    value = _found(field, format, conversion, row)
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        hint = f"; {{{repr(field)[1:-1]}[0]}} is its first" if isinstance(value, list | tuple) else ""
        raise ValueError(f"{_named(field)} is no text but {brief(value)}{hint}")
    return str(value)


def _found(field, format, conversion, row):
    path = FIELD.fullmatch(field)
    column, indices = (path[1], path[2].strip("[]").split("][") if path[2] else []) if path else (field, [])
    if format or conversion or column not in row:
        raise ValueError(f"{_named(field)} is not a column; the columns are: {names(row)}")
    value = row[column]
    for index in indices:
        try:
            value = value[int(index)] if isinstance(value, list | tuple) else value[index]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{_named(field)}: there is no [{repr(index)[1:-1]}] in {brief(value)}") from error
    return value


def _document(tokenizer, pieces, *, eos, bos) -> Document:
    """Pieces of text (text, weight) as one document."""
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None:
        bos = tokenizer("a")["input_ids"][:1] == [first]  # the habit of this tokenizer
    if (bos and first is None) or (eos and last is None):
        raise ValueError(f"this tokenizer has no {'BOS' if bos and first is None else 'EOS'} token; set it, or ask for none")
    tokens, weights, before, new = [], [], "", []
    for text, weight in pieces:
        new = _following(tokenizer, before, text)
        tokens, weights = tokens + new, weights + [weight] * len(new)
        before = text or before
    if bos and tokens[:1] != [first]:
        tokens, weights = [first, *tokens], [0.0, *weights]
    if eos and new[-1:] != [last]:
        tokens, weights = [*tokens, last], [*weights, 1.0]
    return _headless(np.array(tokens, np.int32), np.array(weights, np.float32))


def _following(tokenizer, before: str, text: str) -> list[int]:
    """The tokens of `text` where it follows `before`, of which no token is changed.

    Where a token would lie across the boundary, `text` is cut as after a line break, so that a tokenizer which puts a space in
    front of every text (SentencePiece) puts none here.
    """
    if not before or not text:
        return _ids(tokenizer, text)
    for anchor in (before, "\n"):
        both = tokenizer(anchor + text, add_special_tokens=False, return_offsets_mapping=True)
        count = sum(start < len(anchor) for start, _ in both["offset_mapping"])
        whole = all(end <= len(anchor) for _, end in both["offset_mapping"][:count])
        if whole and both["input_ids"][:count] == _ids(tokenizer, anchor):
            return both["input_ids"][count:]
    return _ids(tokenizer, text)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _behind(start, target, source) -> Document:
    tokens = np.array([start, *target], np.int32)
    return _headless(tokens, np.ones(len(tokens), np.float32))._replace(source=np.array(source, np.int32))


def _headless(tokens, weights) -> Document:
    weights = weights.copy()
    weights[:1] = 0
    return Document(tokens, weights)


def _ends_special(tokenizer, text: str) -> bool:
    known = tokenizer.added_tokens_decoder
    return any(known[token].special for token in _ids(tokenizer, text)[-1:] if token in known)


def _roles(messages) -> list[str]:
    for i, message in enumerate(messages):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
            raise ValueError(f"message {i} is not {{'role': text, 'content': text}}: {str(message)[:120]}")
    return [message["role"] for message in messages]
