"""Comparisons by a simulated annotator: python -m experiments.compare --config=configs/compare.py

Leaves comparisons.jsonl, a row a prompt: prompt, chosen and rejected as text and as the ids that the model wrote, the gold scores
of both (which nothing trains on), and the ceiling, how often a judge who knew them would agree with this annotator.
"""

import json
import time
from pathlib import Path

import jax
import numpy as np

from experiments import common, sft
from jaxalign import keys, shard
from jaxalign.data.tables import order
from jaxalign.feedback import annotators
from jaxalign.train import log


def run(config, workdir: Path, stages: common.Stages | None = None):
    """Sample two responses to every prompt and have one preferred."""
    began = time.monotonic()
    mesh = shard.make_mesh(**config.mesh)
    stages = stages or common.Stages(workdir, config.stages, {"sft": sft.run})
    loaded = common.load(stages.path(config.model.source), config.model, mesh, seed=config.seed)
    prompts = common.openings(loaded.tokenizer, seed=config.seed, **config.prompts).documents
    draw = common.sampler(loaded.model, mesh, loaded.tokenizer.eos_token_id, config.sample)
    gold = common.gold_reward(loaded.tokenizer, config.gold.lexicon)
    shuffled = order(len(prompts), len(prompts), seed=config.seed, step=0)

    rows = []
    for numbers, count in common.parts(list(shuffled), config.run.batch):
        batch = common.rows_of(prompts, numbers, config.prompts.length, mesh)
        pair = [draw(loaded.params, keys.of_rows(keys.key(config.seed, "annotate", which), numbers), batch) for which in (0, 1)]
        scores, said = [gold(side) for side in pair], [common.texts(loaded.tokenizer, side) for side in pair]
        tokens = [shard.fetch((side.tokens, side.weights > 0, side.segments > 0)) for side in pair]
        first, ceiling = annotators.prefer(*scores, temperature=config.annotator.temperature, seed=config.seed + len(rows))
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
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "comparisons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    log.say(f"{len(rows)} comparisons in {workdir / 'comparisons.jsonl'}")


if __name__ == "__main__":
    common.main(run, "compare")
