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
from jaxalign.models import files
from jaxalign.train import log


def run(config, workdir: Path, stages: launch.Stages | None = None):
    """Sample two responses to every prompt and have one preferred."""
    mesh, gold = shard.make_mesh(**config.mesh), common.gold_reward(config.gold.lexicon)
    if (workdir / "checkpoints").exists():
        raise ValueError(f"{workdir} holds a training run, whose settings and summary would be lost: give another --workdir")
    source = (stages or launch.Stages(workdir, config.stages, {"sft": sft.run})).path(config.model.source)
    began = time.monotonic()
    loaded = common.load(source, config.model, mesh, seed=config.seed)
    prompts = common.openings(loaded.tokenizer, seed=config.seed, start=common.start_of(loaded.model), **config.prompts)
    draw = common.sampler(loaded.model, mesh, loaded.tokenizer.eos_token_id, config.sample)
    shuffled = order(len(prompts), len(prompts), seed=config.seed, step=0)

    rows, equal, unscored = [], 0, 0
    for numbers, count in common.parts(list(shuffled), config.run.batch):
        batch = common.rows_of(prompts, numbers, config.prompts.length, mesh, loaded.model.config.vocab)
        drawn = [draw(loaded.params, keys.of_rows(keys.key(config.seed, "compare", which), numbers), batch) for which in (0, 1)]
        pair = [side for side, _ in drawn]
        said = [common.texts(loaded.tokenizer, side) for side in pair]
        scores = [gold([response for _, response in side]) for side in said]
        tokens = [common.ids(side) for side in pair]
        draws = shard.fetch(jax.vmap(jax.random.uniform)(keys.of_rows(keys.key(config.seed, "annotate"), numbers)))
        first, ceiling = annotators.prefer(*np.nan_to_num(scores), draws, temperature=config.annotator.temperature)
        for r in range(count):
            a, b = (0, 1) if first[r] else (1, 0)
            written = [side[r][1] for side in tokens]
            if written[0] == written[1]:  # nothing to prefer
                equal += 1
                continue
            if not np.isfinite([scores[a][r], scores[b][r]]).all():
                unscored += 1
                continue
            rows.append(
                {
                    "prompt": said[0][r][0],
                    "chosen": said[a][r][1],
                    "rejected": said[b][r][1],
                    "prompt_ids": tokens[0][r][0],
                    "chosen_ids": written[a],
                    "rejected_ids": written[b],
                    "gold_chosen": float(scores[a][r]),
                    "gold_rejected": float(scores[b][r]),
                    "ceiling": float(ceiling[r]),
                }
            )
    if not rows:
        raise ValueError(
            f"nothing to compare: of {len(prompts)} prompts {equal} have two equal responses, and {unscored} one that the gold "
            f"score fails on; is sample.temperature = {config.sample.temperature:g} above 0?"
        )
    launch.write_rows(workdir / "comparisons.jsonl", rows)
    both = np.array([[row["gold_chosen"], row["gold_rejected"]] for row in rows])
    summary = {
        "comparisons": len(rows),
        "equal": equal,
        "unscored": unscored,
        "gold/mean": both.mean(),
        "gold/std": both.std(),
        "agreement/ceiling": np.mean([row["ceiling"] for row in rows]),
        "agreement/annotator": np.mean((both[:, 0] > both[:, 1]) + 0.5 * (both[:, 0] == both[:, 1])),
        "seconds": time.monotonic() - began,
    }
    log.write_json(workdir / "config.json", log.plain(config))
    told = {name: float(value) for name, value in summary.items()}
    shard.together("comparisons written")
    log.write_json(workdir / "summary.json", told | {"sha256": files.sha256(workdir / "comparisons.jsonl")})
    shard.together("compared")
    log.say(f"{len(rows)} comparisons in {workdir / 'comparisons.jsonl'}")


def rows_in(source: str) -> str:
    """The comparisons in a folder that `run` left, or the source itself -> a path. ValueError where they were changed."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    path, written = folder / "comparisons.jsonl", log.read_json(folder / "summary.json").get("sha256")
    if written and path.exists() and files.sha256(path) != written:
        raise ValueError(f"{path} is not as it was written: its sha256 is not the one in summary.json. Make that stage again")
    return str(path)


if __name__ == "__main__":
    launch.main(run, "compare")
