"""Constitutional AI (Bai et al. 2022): a model criticises and revises what it said, and says which of two answers is better.

All is text in and text out; who writes and who chooses is given:

    write(name, prompts) -> texts         choose(name, prompts) -> P(A) of each, f64 [N]

A principle has an "id" and three requests: "critique", for the faults; "revision", for better words; "preference", which is better.
"""

import numpy as np

from jaxalign.evaluation import judges
from jaxalign.prompts.demonstrations import at_random
from jaxalign.prompts.template import Prompt

TURNS = ("Human", "Assistant", "CritiqueRequest", "Critique", "RevisionRequest", "Revision")
STOPS = tuple(f"\n\n{turn}:" for turn in TURNS)  # where a plain text goes on to a turn that was not asked for


def asked(said, examples=()) -> Prompt:
    """What comes next after `said`, an odd number of TURNS, behind examples, which are {turn: text} of all of them."""
    whole = [*([example[turn] for turn in TURNS] for example in examples), said]
    told = "".join(f"\n\n{turn}: {text}" for part in whole for turn, text in zip(TURNS, part))
    roles = ("user", "assistant") * len(TURNS)
    messages = [{"role": role, "content": text} for part in whole for role, text in zip(roles, part)]
    return Prompt(f"{told}\n\n{TURNS[len(said)]}:", "", messages, len(examples))


def drawn(count: int, number: int, *, of: int, seed: int) -> list[int]:
    """Which principles, no one twice, serve example `number`: the first so many of an order that is keyed by (seed, number)."""
    if count > of:
        raise ValueError(f"{count} principles for one example, where there are {of}")
    return at_random(seed)(number, np.arange(of))[:count].tolist()


def revise(rows, principles, examples, write, *, rounds: int, seed: int) -> list[dict]:
    """What is said to each row's "prompt", what is wrong with it by a principle, and what is said then; so for some rounds.

    -> rows | {"principles": ids [rounds], "critiques": texts [rounds], "responses": texts [rounds + 1], "response": the last one}.
    Each round sees the prompt and the last response alone, behind the examples. Differs from section 3.1 in that no principle comes
    twice to one prompt. ValueError where there are fewer principles than rounds.
    """
    prompts = [row["prompt"] for row in rows]
    turns = [drawn(rounds, n, of=len(principles), seed=seed) for n in range(len(rows))]
    responses, critiques = [write("response", [asked([prompt]) for prompt in prompts])], []
    for k in range(rounds):
        rules = [principles[turn[k]] for turn in turns]
        said = [[prompt, last, rule["critique"]] for prompt, last, rule in zip(prompts, responses[-1], rules, strict=True)]
        critiques.append(write(f"critique {k + 1}", [asked(each, examples) for each in said]))
        said = [[*each, found, rule["revision"]] for each, found, rule in zip(said, critiques[-1], rules, strict=True)]
        responses.append(write(f"revision {k + 1}", [asked(each, examples) for each in said]))
    made = []
    for n, row in enumerate(rows):
        told = {"principles": [principles[i]["id"] for i in turns[n]], "critiques": [texts[n] for texts in critiques]}
        made.append(row | told | {"responses": [texts[n] for texts in responses], "response": responses[-1][n]})
    return made


def opinions(name: str, pairs, principles, form, choose, *, count: int, orders: int, seed: int) -> np.ndarray:
    """P(A) of pairs {"prompt": a conversation, "first", "second"}, by `count` principles each, drawn. -> f64 [N, count, orders]

    Order 0 shows `first` as (A), order 1 `second`. Args: form: a Template of {prompt}, {preference}, {first} and {second}.
    """
    prompts = []
    for n, pair in enumerate(pairs):
        for i in drawn(count, n, of=len(principles), seed=seed):
            prompts += judges.in_both_orders(form, principles[i] | pair, pair["first"], pair["second"])[:orders]
    return np.reshape(choose(name, prompts), (len(pairs), count, orders))


def preference(p, *, clamp=(0.0, 1.0)) -> np.ndarray:
    """P(the first is better): the mean over principles and orders. `opinions` [..., count, orders] -> f64 [...]

    With both orders it is exactly 1 - what it is of the pair the other way round, so a taste for a letter cancels. Section 4.1.
    Args: clamp: bounds of each opinion; after a chain of thought a model is too sure: (0.4, 0.6) there.
    """
    p = np.clip(p, *clamp)
    return np.abs(np.arange(p.shape[-1]) - p).mean((-2, -1))
