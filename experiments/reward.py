"""A reward model from comparisons: python -m experiments.reward --config=configs/reward.py"""

import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from experiments import common, compare, sft
from jaxalign import rewards, score, shard
from jaxalign.data import sources, tables, text
from jaxalign.objectives.reward import pairwise
from jaxalign.train import loop, optim
from jaxalign.train.step import make_step


def comparisons(tokenizer, *, source, count, held_out, prompt, chosen, rejected, length):
    """-> (training pairs, held-out pairs, rows of the held-out pairs); a pair is (chosen, rejected), two Documents.

    Rows that experiments.compare made carry the ids that the model wrote, which are used as they are; others are tokenised.
    """

    def make(row):
        if "chosen_ids" in row:
            sides = [np.array(row["prompt_ids"] + row[side], np.int32) for side in ("chosen_ids", "rejected_ids")]
            return tuple(text.Document(ids, (np.arange(len(ids)) >= len(row["prompt_ids"])).astype(np.float32)) for ids in sides)
        asked = text.fill(prompt, row)
        return tuple(text.prompt_completion(tokenizer, asked, text.fill(side, row)) for side in (chosen, rejected))

    rows = sources.read(source)
    table = tables.collect(rows[:count] if count else rows, make, length=length, source=source, keep="end")
    kept = [rows[n] for n in table.rows[-held_out:]]
    return table.documents[:-held_out], table.documents[-held_out:], kept


def scorer(model, mesh, size: int, length: int):
    """-> (params, documents) -> their scores, f32 [n]."""
    measure = shard.on_mesh(jax.jit(partial(score.last_scalar, model)), mesh)

    def scores(params, documents):
        found = []
        for part, count in common.parts(list(documents), size):
            found.append(shard.fetch(measure(params, shard.place(tables.pad(part, length), mesh)))[:count])
        return np.concatenate(found)

    return scores


def run(config, workdir: Path, stages: common.Stages | None = None):
    """Train on comparisons. Before and after, the head takes in the map that gives held-out responses mean 0 and variance 1.

    summary.json: accuracy on held-out comparisons and its standard error; accuracy_ceiling, what a judge who knew the gold scores
    would reach, and correlation with them, where the rows tell.
    """
    began = time.monotonic()
    mesh = shard.make_mesh(**config.mesh)
    stages = stages or common.Stages(workdir, config.stages, {"sft": sft.run, "compare": compare.run})
    source, found = stages.path(config.model.source), stages.path(config.data.source)
    loaded = common.load(source, config.model, mesh, seed=config.seed, head="reward")
    data = config.data.to_dict() | {"source": f"{found}/comparisons.jsonl" if Path(found).is_dir() else found}
    train, held_out, rows = comparisons(loaded.tokenizer, **data)
    scores = scorer(loaded.model, mesh, config.run.batch, config.data.length)

    def normalised(params):
        """-> (the model whose scores of the held-out responses have mean 0 and variance 1, those of the chosen and the rejected)"""
        both = np.stack([scores(params, side) for side in zip(*held_out, strict=True)])
        gain, bias = rewards.normaliser(both)
        return rewards.fold(params, gain, bias), gain * both + bias

    loaded = loaded._replace(params=normalised(loaded.params)[0])
    objective = partial(pairwise, model=loaded.model, **config.objective)
    tx = optim.adam(steps=config.run.steps, **config.optim)
    state, where = common.new_state(loaded, tx, mesh)
    step = shard.compile_step(make_step(objective, tx, accumulate=config.run.accumulate), mesh, where)

    def data_at(i):
        picked = [train[n] for n in tables.order(len(train), config.run.batch, seed=config.seed, step=i)]
        chosen, rejected = zip(*picked, strict=True)
        return shard.place(tables.pairs(chosen, rejected, np.zeros(len(picked)), config.data.length), mesh)

    common.describe(workdir, loaded)
    state = loop.fit(
        step,
        state,
        data_at,
        workdir=workdir,
        stop=config.run.steps,
        config=config,
        identity={"model": loaded.digest, "tokenizer": loaded.tokenizer_digest},
        log_every=config.run.log_every,
        save_every=config.run.save_every,
        keep=config.run.keep,
        tokens_per_step=2 * config.run.batch * config.data.length,
    )
    params, (chosen, rejected) = normalised(state.params)
    right = (chosen > rejected) + 0.5 * (chosen == rejected)
    summary = {
        "reward_model/accuracy": right.mean(),
        "reward_model/accuracy_stderr": right.std() / len(right) ** 0.5,
        "comparisons/trained": len(train),
        "comparisons/held_out": len(held_out),
    }
    if "ceiling" in rows[0]:
        gold = [row[side] for side in ("gold_chosen", "gold_rejected") for row in rows]
        summary["reward_model/accuracy_ceiling"] = np.mean([row["ceiling"] for row in rows])
        summary["reward_model/gold_correlation"] = np.corrcoef(gold, np.concatenate([chosen, rejected]))[0, 1]
    summary["seconds"] = time.monotonic() - began
    common.finish(workdir, loaded, params, {name: float(value) for name, value in summary.items()})


if __name__ == "__main__":
    common.main(run, "reward")
