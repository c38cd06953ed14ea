"""Supervised fine-tuning: python -m experiments.sft --config=configs/sft.py"""

import time
from functools import partial
from pathlib import Path

from experiments import common, evaluate, launch
from jaxalign import shard
from jaxalign.data import tables, text
from jaxalign.objectives.supervised import sft
from jaxalign.train import log, loop, optim
from jaxalign.train.step import make_step


def documents(tokenizer, *, source, count, held_out, prompt, completion, chat, length, source_length, seed, start=None):
    """-> (training documents, held-out documents). Args: start: of common.start_of."""

    def make(row):
        return common.document(tokenizer, text.fill(prompt, row), text.fill(completion, row), chat=chat, start=start)

    rows, fitted = common.read_rows(source, count, seed=seed), {"length": length, "source_length": source_length}
    found = common.collect(rows, make, source=source, keep="end", **fitted).documents
    return common.split(found, held_out, "data.held_out")


def prepare(config, mesh, loaded, objective=sft):
    """-> (the compiled step, the state before the first one). Args: objective: as of `run`."""
    objective = partial(objective, model=loaded.model, **config.objective)
    tx = optim.adam(steps=config.run.steps, **config.optim)
    state, where = common.new_state(loaded, tx, mesh)
    return shard.compile_step(make_step(objective, tx, accumulate=config.run.accumulate, **config.guard), mesh, where), state


def run(config, workdir: Path, stages: launch.Stages | None = None, objective=sft):
    """Train on completions. Leaves a model and summary.json: the held-out loss before and after, nats a token.

    Args: objective: (params, Batch, *, model, **config.objective) -> (sum, sums); another one of one's own.
    """
    began = time.monotonic()
    mesh = shard.make_mesh(**config.mesh)
    loaded = common.load(config.model.source, config.model, mesh, seed=config.seed, scratch=config.scratch, adapter=config.adapter)
    train, held_out = documents(loaded.tokenizer, seed=config.seed, start=common.start_of(loaded.model), **config.data)
    lengths = {"length": config.data.length, "source_length": config.data.source_length}
    rows = tables.pack(train, **lengths)
    step, state = prepare(config, mesh, loaded, objective)
    means = common.held_out_means(partial(sft, model=loaded.model), mesh, held_out, config.run.batch, **lengths)

    def data_at(i):
        numbers = tables.order(len(rows), config.run.batch, seed=config.seed, step=i)
        batch = tables.pack_rows([rows[n] for n in numbers], **lengths)
        return shard.place(tables.check(batch, loaded.model.config.vocab), mesh)

    asked = evaluate.hook(loaded, mesh, workdir, **config.evaluate)

    def watched(done, state):
        every = config.evaluate.every
        return {"nll/held_out": means(state.model_params)["loss/nll"]} if every and done % every == 0 else {}

    log.say(tables.preview(loaded.tokenizer, shard.fetch(data_at(0)), rows=1))
    launch.begin(workdir, loaded)
    texts = common.digest([(x.tokens, x.source) for x in train])
    before, loaded = means(loaded.params)["loss/nll"], loaded._replace(params=None)  # the state has what is needed of them
    around = time.monotonic() - began
    state = loop.fit(
        step,
        state,
        data_at,
        workdir=workdir,
        stop=config.run.steps,
        hooks=[watched, asked],
        config=config,
        identity={"model": loaded.digest, "tokenizer": loaded.tokenizer_digest, "data": texts},
        tokens_per_step=config.run.batch * config.data.length,
        **config.loop,
    )
    ended = time.monotonic()
    summary = {
        "nll/before": before,
        "nll/after": means(state.model_params)["loss/nll"],
        "documents": len(train),
        "rows": len(rows),
    }
    summary["seconds"] = around + launch.looped(workdir) + time.monotonic() - ended
    launch.finish(workdir, loaded, state.model_params, summary)


if __name__ == "__main__":
    launch.main(run, "sft")
