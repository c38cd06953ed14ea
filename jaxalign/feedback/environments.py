"""Environments, which answer a policy turn after turn: tools, games, users.

An environment is a function (state, text) -> (state, observation, reward, done), or (state, text) -> reward, which is one of one
turn. It changes nothing but what it returns, so that an episode can be played again. What it says becomes tokens of weight 0, which
the policy reads and is not trained on: `ops.advantages.gae` passes over them, from the policy's last token before them to its first
one behind.
"""

import re
import warnings
from typing import Any, NamedTuple

import numpy as np

from jaxalign.data import arithmetic
from jaxalign.data.text import Document
from jaxalign.evaluation import metrics
from jaxalign.prompts import extract


class Episode(NamedTuple):
    document: Document  # the prompt and all turns; weights 1 on what the policy wrote
    reward: float  # the sum over turns; NaN where the environment failed, which means that it abstained
    state: Any  # of the environment, after the last turn
    turns: int
    done: bool  # whether the environment ended it, also by failing, and not a limit


def play(environment, states, prompts: list[Document], draw, *, encode, decode, turns: int, length: int) -> list[Episode]:
    """Let policy and environment take turns, from each prompt and its state on.

        episodes = play(guess, states, prompts, draw, encode=encode, decode=tokenizer.decode, turns=3, length=96 - 16)
        batch = tables.pad([episode.document for episode in episodes], 96)
        scores = np.array([episode.reward for episode in episodes], np.float32)     for `rollout.assemble`

    Args:
        draw: (documents, turn) -> the ids of a response to each, up to and including EOS. It is asked for all of them in every
            turn, so that shapes stay the same; for episodes that have ended, with their prompts, and to no effect.
        encode: (observation) -> its ids, with all that a template puts around it. decode: (ids of a response) -> text.
        turns: at most. length: tokens that there may be for the policy to go on; an observation that leads beyond it ends the
            episode and is left out.
    Raises ValueError for a prompt that is empty, longer than `length` or of an encoder-decoder. Where the environment raises, a
    warning says so.
    """
    for row, prompt in enumerate(prompts):
        if prompt.source is not None or not 0 < len(prompt.tokens) <= length:
            raise ValueError(f"prompt {row}: {len(prompt.tokens)} tokens; it has 1 to length = {length}, and no source")
    episodes = [
        Episode(Document(prompt.tokens, np.zeros(len(prompt.tokens), np.float32)), 0.0, state, 0, False)
        for prompt, state in zip(prompts, states, strict=True)
    ]
    live = list(range(len(episodes)))
    for turn in range(turns):
        if not live:
            break
        said = draw([episodes[row].document if row in live else prompt for row, prompt in enumerate(prompts)], turn)
        for row in list(live):
            episode = episodes[row]
            document = _and(episode.document, said[row], 1.0)
            try:
                answer = environment(episode.state, decode(said[row]))
                state, observation, reward, done = answer if isinstance(answer, tuple) else (episode.state, "", answer, True)
                reward = float(reward)
            except Exception as error:  # an environment is anybody's code
                warnings.warn(f"the environment failed, {type(error).__name__}: {error}, in turn {turn} of row {row}", stacklevel=2)
                state, observation, reward, done = episode.state, "", np.nan, True
            last = done or turn + 1 == turns
            seen = [] if last else encode(observation)
            goes_on = not last and len(document.tokens) + len(seen) <= length
            document = _and(document, seen, 0.0) if goes_on else document
            episodes[row] = Episode(document, episode.reward + reward, state, turn + 1, bool(done))
            if not goes_on:
                live.remove(row)
    return episodes


# --------------------------------------------------------- environments; a state is the row that the prompt was made of


def guess(state, text):
    """A number to be found, state["secret"], as data.arithmetic.secrets has them. Reward: 1 for it; else a hint is told."""
    told = arithmetic.hint(state["secret"], text)
    return state, told, float(not told), not told


def last_number(state, text):
    """A reward that can be verified: 1 where the answer of the text (prompts.extract.number) is state["answer"], else 0."""
    said = extract.number(text)
    return float(said is not None and said == float(state["answer"]))


def exact(state, text):
    """A reward that can be verified: 1 where the first line of the text is state["answer"], but for case and a full stop."""
    said, right = (x.strip().partition("\n")[0].strip().removesuffix(".").lower() for x in (text, str(state["answer"])))
    return float(said == right)


def search(passages: list[dict], scores):
    """An environment of two turns: the policy's first is a query, and it is told the best passage and the number to cite it by;
    its second answers. State: the columns "answers" and "is_impossible" of SQuAD 2.0.

    Reward: the F1 of the answer's words, its citations apart, with the reference that is nearest (Rajpurkar et al. 2016). Where
    there is no answer: 1 for "unanswerable", else 0.
    Args: passages: with "title" and "text"; scores: (queries) -> [queries, passages], such as prompts.retrieval.bm25.
    """

    def answer(state, text):
        if "found" not in state:
            best = int(np.argmax(scores([text])[0]))
            found = passages[best]
            return state | {"found": best}, f"[{best + 1}] {found['title']}: {found['text']}", 0.0, False
        said = re.sub(r"\[\d+\]", "", text)
        return state, "", metrics.token_f1(said, ["unanswerable"] if state["is_impossible"] else state["answers"]), True

    return answer


def _and(document: Document, ids, weight: float) -> Document:
    """The document, and behind it tokens of this weight."""
    tokens = np.concatenate([document.tokens, np.asarray(ids, np.int32)])
    return Document(tokens, np.concatenate([document.weights, np.full(len(ids), weight, np.float32)]))
