"""Learning in an environment, or by a reward that is code: python -m experiments.environment --config=configs/environment.py

GRPO, in the run of experiments/ppo.py. There, and in every program that is made of it, `config.environment` says who answers the
policy and rewards it in the place of a reward model, and a row of `config.prompts` is the first state. One of your own, or a reward
of your own, is the `environment` of an Algorithm, in a file like this one; `environment.name` is then what the run calls it.
"""

from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from experiments import common
from jaxalign import shard
from jaxalign.data import sources, tables, text
from jaxalign.feedback import environments
from jaxalign.prompts import retrieval

BUILT_IN = {f.__name__: f for f in (environments.guess, environments.last_number, environments.exact)}


class Start(NamedTuple):
    """Where an episode begins."""

    prompt: text.Document
    state: dict  # the row that the prompt was made of

    @property
    def ids(self) -> bytes:
        """What tells it from others: prompts may be equal where states are not."""
        return self.prompt.ids + repr(self.state).encode()


def openings(config, policy, mesh, own=None):
    """What a run begins with: -> (prompts, or Starts; columns of a row, and of its source; who plays, or None)

    play(draw, params, keys, starts, group) -> (Batch, f32 [B], logp): as `respond` of experiments/ppo.py; the sum of an episode's
    rewards is its score, NaN where the environment failed. Episodes of one turn are prompts and responses as without environment,
    so that the prompt of a group is read once; in others logp is None.
    """
    name = config.environment.name
    answers = own or (search_in(config.environment.passages) if name == "search" else BUILT_IN.get(name))
    if name and answers is None:
        raise ValueError(
            f"environment.name = {name!r}: there are {', '.join(BUILT_IN)}, search; one's own is given by an Algorithm"
        )
    if own and not name:
        raise ValueError("environment.name is empty, so the Algorithm's own environment would not be asked: give it a name")
    settings = {**config.prompts, "seed": config.seed, "start": common.start_of(policy.model)}
    if not name:
        columns, source = common.prompt_columns(policy.model, config.prompts.length)
        return common.openings(policy.tokenizer, **settings), (columns + config.sample.length, source), None
    if settings["start"] is not None:
        raise ValueError(f"environment.name = {name}: in an episode a decoder has its turns, no encoder-decoder")
    turns, vocab = config.environment.turns, policy.model.config.vocab
    length = config.environment.length if turns > 1 else config.prompts.length
    encode = partial(observed, policy.tokenizer, chat=config.prompts.chat)
    decode = partial(policy.tokenizer.decode, skip_special_tokens=True)
    width = length + config.sample.length

    def play(draw, params, row_keys, starts, group):
        prompts, states = zip(*starts, strict=True)

        def drawn(documents, row_keys, *group):
            batch, logp = draw(params, row_keys, common.rows_of(documents, range(len(documents)), length, mesh, vocab), *group)
            return batch, logp, [response for _, response in common.ids(batch)]

        def played(respond):
            known = {"encode": encode, "decode": decode, "turns": turns, "length": length}
            episodes = environments.play(answers, states, prompts, respond, **known)
            return episodes, shard.place(np.array([episode.reward for episode in episodes], np.float32), mesh)

        if turns == 1:
            batch, logp, said = drawn(prompts, row_keys, group)
            return batch, played(lambda documents, turn: said)[1], logp
        of_turn = jax.vmap(jax.random.fold_in, (0, None))
        episodes, scores = played(lambda documents, turn: drawn(documents, of_turn(row_keys, turn))[2])
        batch = tables.check(tables.pad([episode.document for episode in episodes], width), vocab)
        return shard.place(batch, mesh), scores, None

    found = [Start(*both) for both in common.openings_and_rows(policy.tokenizer, **settings)]
    return found, (width, 0), play


def search_in(source: str):
    """environments.search in the passages of a file, by BM25. ValueError where it has no "title" or "text"."""
    if not source:
        raise ValueError("environment.passages names the file that environment.name = search looks into")
    passages = sources.read(source)
    sources.require(passages, ("title", "text"), source)
    scores = retrieval.bm25([f"{passage['title']} {passage['text']}" for passage in passages])
    return environments.search(passages, scores)


def observed(tokenizer, observation: str, *, chat: bool) -> list[int]:
    """What the policy reads of an observation: its tokens; in a chat those of a user's turn and of the assistant's beginning."""
    if not chat:
        return tokenizer(observation, add_special_tokens=False)["input_ids"]
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    after = text.chat(tokenizer, [*before, {"role": "user", "content": observation}], generate=True)
    return after.tokens[len(text.chat(tokenizer, before).tokens) :].tolist()


def dialogues(tokenizer, batch) -> list[tuple[str, str]]:
    """The prompt of each row and all that was said after it, what the environment said in [brackets]."""
    batch, told = shard.fetch(batch), []
    for tokens, real, wrote in zip(batch.tokens, batch.segments > 0, batch.weights > 0, strict=True):
        turns = np.split(tokens[real], np.flatnonzero(np.diff(wrote[real])) + 1)
        prompt, *said = (tokenizer.decode(part, skip_special_tokens=True) for part in turns)
        told.append((prompt, " ".join(f"[{x.strip()}]" if n % 2 else x for n, x in enumerate(said))))
    return told


if __name__ == "__main__":
    from experiments import grpo, launch, ppo  # which import this file
    from jaxalign.objectives import online

    launch.main(partial(ppo.run, algorithm=grpo.of_groups(online.grpo)), "environment")
