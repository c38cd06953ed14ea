"""Answers from any model: python -m experiments.sample --config=configs/sample.py --config.prompt="..."

A line of --config.output has the prompt; the text; tokens, its ids; logp of each, in nats at the sampling temperature (1 where
the text was greedy or given; a plain text that is given is scored without EOS); total, their sum; and drawn_logp, of what top-k,
top-p or `constraint`, a regular expression or a set of answers, left each token to be drawn from.
"""

from contextlib import nullcontext
from functools import partial

import jax
import numpy as np

from experiments import common, launch
from jaxalign import keys, sample, score, shard
from jaxalign.data import tables, text
from jaxalign.prompts import constrain
from jaxalign.train import log


def documents(config, tokenizer, start=None):
    """-> (the prompts, a Document of each, with the completion where one is to be scored). Args: start: of common.start_of."""
    prompts = [config.prompt]
    if config.prompts.source:
        rows = common.read_rows(config.prompts.source, config.prompts.count, seed=config.seed)
        prompts = [text.fill(config.prompts.template, row) for row in rows]

    if "" in prompts:
        raise ValueError(f"{config.prompts.source or 'prompt'}, row {prompts.index('')}: the prompt is empty, nothing to continue")
    chat = config.chat and bool(tokenizer.chat_template)
    how = {"chat": chat, "eos": False, "start": start}
    return prompts, [common.document(tokenizer, prompt, config.completion or None, **how) for prompt in prompts]


def allowed_by(config, loaded, prompt: text.Document):
    """The constraint's table of tokens (jaxalign.prompts.constrain), None for none. ValueError for two, or without an EOS."""
    pattern, answers, eos = config.constraint.regex, config.constraint.answers, loaded.tokenizer.eos_token_id
    if not (pattern or answers):
        return None
    if pattern and answers:
        raise ValueError("constraint.regex and constraint.answers are both given: an answer is held to one of them")
    if eos is None:
        raise ValueError("this tokenizer has no EOS token, so there is no telling where a constrained answer ends")
    known = {"vocab": loaded.model.config.vocab, "eos": eos}
    if pattern:
        return constrain.to_regex(loaded.tokenizer, pattern, **known)
    before = loaded.tokenizer.decode(prompt.tokens[-1:], skip_special_tokens=True)
    return constrain.to_answers(loaded.tokenizer, answers, before=before, **known)


def draw(params, allowed, row_keys, prompts, *, model, **settings):
    """Responses. -> (Batch, {"logp", and "drawn_logp" where it is another})"""
    batch, logp, drawn_logp = sample.sample(model, params, row_keys, prompts, allowed=allowed, **settings)
    cut = allowed is not None or (settings["temperature"] > 0 and (settings["top_k"] > 0 or settings["top_p"] < 1))
    return batch, {"logp": logp} | ({"drawn_logp": drawn_logp} if cut else {})


def judge(params, _, __, batch, *, model):
    """What the model says of texts that are given. -> (Batch, {"logp"})"""
    return batch, {"logp": score.evaluate(model, params, batch)[0].logp}


def run(config):
    """Print an answer to each prompt, and write all there is to know of it to config.output."""
    with launch.replacing(config.output) if config.output else nullcontext(lambda line: None) as write:
        answers(config, write)


def answers(config, write):
    """Print an answer to each prompt, and write(line) all there is to know of it."""
    mesh = shard.make_mesh(**config.mesh)
    loaded = common.load(config.model.source, config.model, mesh, seed=config.seed)
    prompts, found = documents(config, loaded.tokenizer, common.start_of(loaded.model))
    length = tables.bucket(max(len(document.tokens) for document in found), 16)
    source_length = tables.bucket(max(0 if document.source is None else len(document.source) for document in found), 16)
    if config.completion:
        work, side, draws, allowed = partial(judge, model=loaded.model), "right", 1, None
    else:
        eos = -1 if loaded.tokenizer.eos_token_id is None else loaded.tokenizer.eos_token_id
        work, side, draws = partial(draw, model=loaded.model, eos=eos, **config.sample), "left", config.draws
        allowed = allowed_by(config, loaded, found[0])
    work = shard.on_mesh(jax.jit(work), mesh)
    numbers = np.repeat(np.arange(len(found)), draws)
    row_keys = keys.of_rows(keys.key(config.seed, "sample"), numbers)

    for rows, count in common.parts(list(range(len(numbers))), config.batch):
        padded = tables.pad([found[numbers[row]] for row in rows], length, side=side, source_length=source_length)
        placed = shard.place(tables.check(padded, loaded.model.config.vocab, targets=False), mesh)
        batch, values = shard.fetch(work(loaded.params, allowed, row_keys[np.array(rows)], placed))
        for r, row in list(enumerate(rows))[:count]:
            written = batch.weights[r] > 0
            tokens = batch.tokens[r][written]
            answer = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
            said = {name: [float(x) for x in value[r][written]] for name, value in values.items()}
            line = {"prompt": prompts[numbers[row]], "text": answer, "tokens": tokens.tolist(), **said}
            write(line | {"total": sum(said["logp"])})
            log.say(f"{line['prompt']} ⟶ {answer}  [{len(tokens)} tokens, log-probability {sum(said['logp']):.3f}]")


if __name__ == "__main__":
    launch.main(run, "sample", folder=False)
