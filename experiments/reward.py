"""A reward model from comparisons: python -m experiments.reward --config=configs/reward.py"""

import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from experiments import common, compare, launch, sft
from jaxalign import rewards, score, shard
from jaxalign.data import tables, text
from jaxalign.objectives.reward import pairwise
from jaxalign.train import loop, optim
from jaxalign.train.step import make_step


def comparisons(tokenizer, *, source, count, held_out, prompt, chosen, rejected, margin, chat, length):
    """-> (training pairs, held-out pairs), each (chosen, rejected, row), two Documents and what the source says of them.

    Rows that experiments.compare made carry the ids that the model wrote, which are used as they are; others are tokenised.
    """

    def make(row):
        if "chosen_ids" not in row:
            asked = text.fill(prompt, row)
            return tuple(common.document(tokenizer, asked, text.fill(side, row), chat=chat) for side in (chosen, rejected))
        if tokenizer.decode(row["chosen_ids"], skip_special_tokens=True) != row["chosen"]:
            raise ValueError("chosen_ids are not the tokens of 'chosen': another tokenizer wrote these comparisons")
        sides = [np.array(row["prompt_ids"] + row[side], np.int32) for side in ("chosen_ids", "rejected_ids")]
        return tuple(text.Document(ids, (np.arange(len(ids)) >= len(row["prompt_ids"])).astype(np.float32)) for ids in sides)

    rows = common.read_rows(source, count, seed=0)
    table = common.collect(rows, make, length=length, source=source, keep="end")
    told = [rows[n] | {"margin": float(text.fill(margin, rows[n])) if margin else 0.0} for n in table.rows]
    return common.split([(*pair, row) for pair, row in zip(table.documents, told, strict=True)], held_out, "data.held_out")


def scorer(model, mesh, *, size: int, length: int):
    """-> (params, documents) -> their scores, f32 [n]."""
    measure = shard.on_mesh(jax.jit(partial(score.last_scalar, model)), mesh)

    def scores(params, documents):
        found = []
        for part, count in common.parts(list(documents), size):
            batch = tables.check(tables.pad(part, length), model.config.vocab, targets=False)
            found.append(shard.fetch(measure(params, shard.place(batch, mesh)))[:count])
        return np.concatenate(found)

    return scores


def run(config, workdir: Path, stages: launch.Stages | None = None):
    """Train on comparisons. Before and after, the head takes in the map that gives held-out responses mean 0 and the std wanted.

    summary.json: accuracy on held-out comparisons and its standard error; accuracy_ceiling, what a judge who knew the gold scores
    would reach, and correlation with them, where the rows tell.
    """
    mesh = shard.make_mesh(**config.mesh)
    stages = stages or launch.Stages(workdir, config.stages, {"sft": sft.run, "compare": compare.run})
    source, found = stages.path(config.model.source), stages.path(config.data.source)
    began = time.monotonic()
    loaded = common.load(source, config.model, mesh, seed=config.seed, head="reward")
    data = config.data.to_dict() | {"source": f"{found}/comparisons.jsonl" if Path(found).is_dir() else found}
    train, held_out = comparisons(loaded.tokenizer, **data)
    scores = scorer(loaded.model, mesh, size=config.run.batch, length=config.data.length)

    def normalised(params, std):
        """-> (the model whose scores of the held-out responses have mean 0 and this std, those of the chosen and the rejected)"""
        both = np.stack([scores(params, [pair[side] for pair in held_out]) for side in (0, 1)])
        gain, bias = rewards.normaliser(both, std=std)
        return rewards.fold(params, gain, bias), gain * both + bias

    loaded = loaded._replace(params=normalised(loaded.params, config.normalise.before)[0])
    objective = partial(pairwise, model=loaded.model, **config.objective)
    tx = optim.adam(steps=config.run.steps, **config.optim)
    state, where = common.new_state(loaded, tx, mesh)
    step = shard.compile_step(make_step(objective, tx, accumulate=config.run.accumulate), mesh, where)

    def data_at(i):
        picked = [train[n] for n in tables.order(len(train), config.run.batch, seed=config.seed, step=i)]
        chosen, rejected, rows = zip(*picked, strict=True)
        pairs = tables.pairs(chosen, rejected, [row["margin"] for row in rows], config.data.length)
        for side in (pairs.chosen, pairs.rejected):
            tables.check(side, loaded.model.config.vocab)
        return shard.place(pairs, mesh)

    launch.begin(workdir, loaded)
    around = time.monotonic() - began
    texts = common.digest([(chosen.tokens, rejected.tokens) for chosen, rejected, _ in train])
    state = loop.fit(
        step,
        state,
        data_at,
        workdir=workdir,
        stop=config.run.steps,
        config=config,
        identity={"model": loaded.digest, "tokenizer": loaded.tokenizer_digest, "data": texts},
        tokens_per_step=2 * config.run.batch * config.data.length,
        **config.loop,
    )
    ended = time.monotonic()
    params, (chosen, rejected) = normalised(state.params, config.normalise.after)
    right = (chosen > rejected) + 0.5 * (chosen == rejected)
    summary = {
        "reward_model/accuracy": right.mean(),
        "reward_model/accuracy_stderr": right.std() / len(right) ** 0.5,
        "comparisons/trained": len(train),
        "comparisons/held_out": len(held_out),
    }
    rows = [row for _, _, row in held_out]
    if "ceiling" in rows[0]:
        gold = [row[side] for side in ("gold_chosen", "gold_rejected") for row in rows]
        summary["reward_model/accuracy_ceiling"] = np.mean([row["ceiling"] for row in rows])
        summary["reward_model/gold_correlation"] = np.corrcoef(gold, np.concatenate([chosen, rejected]))[0, 1]
    summary["seconds"] = around + launch.looped(workdir) + time.monotonic() - ended
    launch.finish(workdir, loaded, params, summary)


if __name__ == "__main__":
    launch.main(run, "reward")
