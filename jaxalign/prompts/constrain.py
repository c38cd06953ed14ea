"""Constrained generation: which tokens may follow, and which end a text, as tables.

table i32 [states, V]: in state s, token v leads to state table[s, v]. State 0 is the first.

`to_answers`, `to_regex`: -1 is not allowed. Where what was said is whole, EOS is allowed; behind it nothing matters. From every
state an EOS can be reached.
`until`: -1 ends the text.
"""

import re

import numpy as np

from jaxalign.data.text import prompt_completion

# Put behind a regular expression, so that no match can go on: outlines-core 0.2.14 loses tokens there ("," of "no(, sir)?").
END = "\x00"


def to_answers(tokenizer, answers, *, vocab: int, eos: int, before: str = ":") -> np.ndarray:
    """The table of a set of texts, each in the tokens that the tokenizer makes of it, behind `before`.

    Only in these: then P(answer) is what training and scoring say of it, and not a sum over spellings that no model has seen.
    Args:
        vocab: the model's, which may be larger than the tokenizer's.
        before: how a prompt ends, for it matters to the tokens; in a conversation it is a line break.
    Raises ValueError for no answers, or an empty one.
    """
    rows, states = [np.full(vocab, -1, np.int32)], {(): 0}
    for answer in answers:
        document, said = prompt_completion(tokenizer, before, answer, eos=False, bos=False), ()
        tokens = document.tokens[document.weights > 0].tolist()
        if not tokens:
            raise ValueError(f"the answer {answer!r} has no tokens")
        for token in tokens:
            said, last = (*said, token), states[said]
            if said not in states:
                states[said] = len(rows)
                rows.append(np.full(vocab, -1, np.int32))
            rows[last][token] = states[said]
        rows[states[said]][eos] = 0
    if len(rows) == 1:
        raise ValueError("no answers to choose from")
    return np.stack(rows)


def to_regex(tokenizer, pattern: str, *, vocab: int, eos: int) -> np.ndarray:
    """The table of all texts that a regular expression matches as a whole, in any tokens that spell them; by outlines-core.

    Special tokens, and those that hold a part of a character, are never allowed.
    Raises ImportError without the package; ValueError for what is no regular expression, or has no match in these tokens.
    """
    try:
        from outlines_core import Index, Vocabulary
    except ImportError as error:
        raise ImportError('regular expressions want the package outlines-core: pip install -e ".[constrain]"') from error
    try:
        re.compile(pattern)
        found = Index(f"(?:{pattern})\\x00", Vocabulary(eos, _spelled(tokenizer) | {END: [vocab]}))
    except (re.error, ValueError) as error:
        raise ValueError(f"the regular expression {pattern!r}: {error}") from error
    final, steps, states, into = found.get_final_states(), found.get_transitions(), [found.get_initial_state()], {}
    for state in states:  # which grows by those that real tokens lead to
        for token, to in sorted(steps[state].items()):
            if token not in (eos, vocab):
                states += [to] * (to not in into and to != states[0])
                into.setdefault(to, set()).add(state)
    whole = {state for state in states if steps[state].get(vocab) in final}
    alive, ahead = set(whole), whole  # from where a match can be completed
    while ahead:
        ahead = {state for to in ahead for state in into.get(to, ())} - alive
        alive |= ahead
    if states[0] not in alive:
        raise ValueError(f"the regular expression {pattern!r} has no match in the tokens of this tokenizer")
    number = {state: n for n, state in enumerate(state for state in states if state in alive)}
    table = np.full((len(number), vocab), -1, np.int32)
    for state, n in number.items():
        for token, to in steps[state].items():
            if token not in (eos, vocab):
                table[n, token] = number.get(to, -1)
        if state in whole:
            table[n, eos] = 0
    return table


def until(tokenizer, stops, *, vocab: int) -> np.ndarray:
    """The table of texts that end with the token that completes one of the stop strings, by Aho and Corasick's automaton.

    Special tokens are no text; those that are a stop string themselves end one. A token that holds a part of a character completes
    none.
    Raises ValueError for no stop strings, or an empty one.
    """
    if not all(stops) or not stops:
        raise ValueError(f"stop strings {stops!r}: one at least, and none of them empty")
    letters = {letter: n for n, letter in enumerate(sorted(set("".join(stops))))}
    begun = sorted({stop[:n] for stop in stops for n in range(len(stop))}, key=len)  # what may have been said of one: the states
    done, other, no_letter = len(begun), len(letters), len(letters) + 1
    step = np.zeros((done + 1, len(letters) + 2), np.int32)  # [state, letter]
    for state, said in enumerate(begun):
        for letter, n in letters.items():
            grown = said + letter
            ended = any(grown.endswith(stop) for stop in stops)
            step[state, n] = done if ended else next(begun.index(grown[k:]) for k in range(len(grown) + 1) if grown[k:] in begun)
    step[done], step[:, no_letter] = done, np.arange(done + 1)

    spelled = [(token, text) for text, tokens in _spelled(tokenizer).items() for token in tokens]
    spelt = np.full((max(len(text) for _, text in spelled), vocab), no_letter)  # [letter of a token, token]
    spelt[0] = other
    for token, text in spelled:
        spelt[: len(text), token] = [letters.get(letter, other) for letter in text]
    spelt[0, [*_special(tokenizer)]] = no_letter
    table = np.repeat(np.arange(done)[:, None], vocab, axis=1)
    for letter in spelt:
        table = step[table, letter]
    table[:, [token for text, token in tokenizer.get_added_vocab().items() if text in stops]] = done
    return np.where(table == done, -1, table).astype(np.int32)


def _special(tokenizer) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(token for token in added if added[token].special)}


def _spelled(tokenizer) -> dict[str, list[int]]:
    """{text inside a text: the tokens that spell it}; special tokens spell none"""
    start, special = tokenizer("a", add_special_tokens=False)["input_ids"][-1:], _special(tokenizer)
    ids = [token for token in range(len(tokenizer)) if token not in special]
    whole, *texts = tokenizer.batch_decode([start, *(start + [token] for token in ids)], clean_up_tokenization_spaces=False)
    spelled = {}
    for token, text in zip(ids, texts, strict=True):
        if text.startswith(whole) and len(text) > len(whole) and not {END, "\ufffd"} & set(text):
            spelled.setdefault(text[len(whole) :], []).append(token)
    return spelled
