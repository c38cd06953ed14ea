"""Comparisons by a simulated annotator: python -m experiments.compare --config=configs/compare.py

Leaves comparisons.jsonl, a row a prompt: prompt, chosen and rejected as text and as the ids that the model wrote, the gold scores
of both (which nothing trains on), and the ceiling, how often a judge who knew them would agree with this annotator.
"""

import time
from pathlib import Path

import jax
import numpy as np

from experiments import common, launch, sft
from jaxalign import keys, shard
from jaxalign.data.tables import order
from jaxalign.feedback import annotators
from jaxalign.train import log


def run(config, workdir: Path, stages: launch.Stages | None = None):
    """Sample two responses to every prompt and have one preferred."""
    mesh = shard.make_mesh(**config.mesh)
    source = (stages or launch.Stages(workdir, config.stages, {"sft": sft.run})).path(config.model.source)
    began = time.monotonic()
    loaded = common.load(source, config.model, mesh, seed=config.seed)
    prompts = common.openings(loaded.tokenizer, seed=config.seed, **config.prompts)
    draw = common.sampler(loaded.model, mesh, loaded.tokenizer.eos_token_id, config.sample)
    gold = common.gold_reward(config.gold.lexicon)
    shuffled = order(len(prompts), len(prompts), seed=config.seed, step=0)

    rows = []
    for numbers, count in common.parts(list(shuffled), config.run.batch):
        batch = common.rows_of(prompts, numbers, config.prompts.length, mesh, loaded.model.config.vocab)
        pair = [draw(loaded.params, keys.of_rows(keys.key(config.seed, "compare", which), numbers), batch) for which in (0, 1)]
        said = [common.texts(loaded.tokenizer, side) for side in pair]
        scores = [gold([response for _, response in side]) for side in said]
        tokens = [shard.fetch((side.tokens, side.weights > 0, side.segments > 0)) for side in pair]
        draws = shard.fetch(jax.vmap(jax.random.uniform)(keys.of_rows(keys.key(config.seed, "annotate"), numbers)))
        first, ceiling = annotators.prefer(*scores, draws, temperature=config.annotator.temperature)
        for r in range(count):
            a, b = (0, 1) if first[r] else (1, 0)
            written = [ids[r][weights[r]].tolist() for ids, weights, _ in tokens]
            ids, weights, real = tokens[0]
            if written[0] == written[1]:  # nothing to prefer
                continue
            rows.append(
                {
                    "prompt": said[0][r][0],
                    "chosen": said[a][r][1],
                    "rejected": said[b][r][1],
                    "prompt_ids": ids[r][real[r] & ~weights[r]].tolist(),
                    "chosen_ids": written[a],
                    "rejected_ids": written[b],
                    "gold_chosen": float(scores[a][r]),
                    "gold_rejected": float(scores[b][r]),
                    "ceiling": float(ceiling[r]),
                }
            )
    if not rows:
        raise ValueError(f"the two responses to each of {len(prompts)} prompts are equal: there is nothing to compare")
    if jax.process_index() == 0:
        (workdir / "comparisons.jsonl").unlink(missing_ok=True)
    launch.append(workdir / "comparisons.jsonl", rows)
    both = np.array([[row["gold_chosen"], row["gold_rejected"]] for row in rows])
    summary = {
        "comparisons": len(rows),
        "gold/mean": both.mean(),
        "gold/std": both.std(),
        "agreement/ceiling": np.mean([row["ceiling"] for row in rows]),
        "agreement/annotator": np.mean((both[:, 0] > both[:, 1]) + 0.5 * (both[:, 0] == both[:, 1])),
        "seconds": time.monotonic() - began,
    }
    log.write_json(workdir / "config.json", log.plain(config))
    log.write_json(workdir / "summary.json", {name: float(value) for name, value in summary.items()})
    shard.together("compared")
    log.say(f"{len(rows)} comparisons in {workdir / 'comparisons.jsonl'}")


if __name__ == "__main__":
    launch.main(run, "compare")
