"""Constrained generation: which tokens may follow, as a table.

table i32 [states, V]: in state s, token v leads to state table[s, v]; -1 is not allowed. State 0 is the first. Where what was said
is whole, EOS is allowed; behind it nothing matters. From every state an EOS can be reached.
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
        found = Index(f"(?:{pattern})\\x00", Vocabulary(eos, _spelled(tokenizer, eos) | {END: [vocab]}))
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


def _spelled(tokenizer, eos: int) -> dict[str, list[int]]:
    """{text inside a text: the tokens that spell it}"""
    start, known = tokenizer("a", add_special_tokens=False)["input_ids"][-1:], tokenizer.added_tokens_decoder
    ids = [token for token in range(len(tokenizer)) if token != eos and not (token in known and known[token].special)]
    whole, *texts = tokenizer.batch_decode([start, *(start + [token] for token in ids)], clean_up_tokenization_spaces=False)
    spelled = {}
    for token, text in zip(ids, texts, strict=True):
        if text.startswith(whole) and len(text) > len(whole) and not {END, "\ufffd"} & set(text):
            spelled.setdefault(text[len(whole) :], []).append(token)
    return spelled
