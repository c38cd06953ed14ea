"""GPT-1's input transformations: what a classifier reads is one sequence of tokens, or two. Radford et al. 2018, section 3.3.

    classification    <s> text <e>
    entailment        <s> premise <$> hypothesis <e>
    similarity        both orders of the pair, <s> one <$> other <e> and <s> other <$> one <e>
    choice            <s> context <$> answer <e> for each answer

Each gives a tuple of documents of at most `length` tokens; where there are more, the longest piece loses its last ones. The last
token is always <e>, whose state the head reads. Every token but the first is a target of the auxiliary language model.

<s>, <$> and <e> are TOKENS, special tokens that the tokenizer must have. ValueError where it has not, or nothing fits.
"""

import numpy as np

from jaxalign.data.text import Document

TOKENS = ("<|start|>", "<|delimiter|>", "<|classify|>")


def classification(tokenizer, text: str, *, length: int) -> tuple[Document]:
    return (_laid_out(tokenizer, [text], length),)


def entailment(tokenizer, premise: str, hypothesis: str, *, length: int) -> tuple[Document]:
    return (_laid_out(tokenizer, [premise, hypothesis], length),)


def similarity(tokenizer, one: str, other: str, *, length: int) -> tuple[Document, Document]:
    return tuple(_laid_out(tokenizer, pair, length) for pair in ([one, other], [other, one]))


def choice(tokenizer, context: str, answers: list[str], *, length: int) -> tuple[Document, ...]:
    return tuple(_laid_out(tokenizer, [context, answer], length) for answer in answers)


def _laid_out(tokenizer, pieces, length) -> Document:
    known = tokenizer.get_added_vocab()
    if not known.keys() >= set(TOKENS):
        raise ValueError(f"this tokenizer has no {', '.join(token for token in TOKENS if token not in known)}")
    start, delimiter, end = (known[token] for token in TOKENS)
    pieces = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    room = length - len(pieces) - 1
    if room < len(pieces):
        raise ValueError(f"length = {length}: no room for text beside {len(pieces) + 1} special tokens")
    while sum(map(len, pieces)) > room:
        max(pieces, key=len).pop()
    tokens = [token for piece in pieces for token in (delimiter, *piece)]
    tokens = np.array([start, *tokens[1:], end], np.int32)
    return Document(tokens, (np.arange(len(tokens)) > 0).astype(np.float32))
