"""The boundary of knowledge of a model that is there: the variant smollm2 of configs/knowledge.py, for experiments/knowledge.py."""

from pathlib import Path

import numpy as np

from experiments import common, evaluate, launch, study
from jaxalign import shard
from jaxalign.evaluation import engine, records, selective
from jaxalign.ops import truthfulness
from jaxalign.train import log


def derived(rewards) -> tuple[float, float]:
    """Of a table: the probability of being right above which to answer is best, and that above which to say anything is."""
    answers, hedges = truthfulness.thresholds(truthfulness.Table(*rewards))
    return answers, min(answers, hedges)


def title_of(rewards) -> str:
    return " / ".join(f"{x:g}" for x in rewards)


def own_probability(config, workdir: Path, mesh, answered: list[dict]) -> list[float]:
    """How probable the model found what it wrote, in the words in which it was asked; 0 of nothing."""
    loaded = common.load(config.model.source, config.model, mesh, seed=config.seed)
    score = engine.scorer(loaded.model, mesh, batch=config.batch, length=engine.longest(loaded.model))
    wrote = [record for record in answered if record["answer"]]
    about = {"task": "own probability", "model": loaded.digest}
    marks = [records.fingerprint(record["asked"], record["written"]) for record in wrote]
    wanted = [about | {"id": record["id"], "prompt": mark} for record, mark in zip(wrote, marks, strict=True)]
    start = common.start_of(loaded.model)
    documents = [
        common.document(loaded.tokenizer, one["asked"], one["written"][0], chat=False, eos=False, start=start) for one in wrote
    ]

    def ask(numbers, tell):
        score(loaded.params, [documents[n] for n in numbers], tell)

    found = records.collect(
        workdir / "records.jsonl", wanted, [1] * len(wrote), ask, lambda n, said: {"p": float(np.exp(said[0].logp))}
    )
    p = {record["id"]: record["p"] for record in found}
    return [p.get(record["id"], 0.0) for record in answered]


def run(config, workdir: Path):
    """A model asked what cannot be known, what is widely believed, and facts; of these what its own probability is good for."""
    mesh = shard.make_mesh(**config.mesh)
    runs = dict.fromkeys(config.stages, lambda settings, folder, stages: evaluate.run(settings, folder))
    stages, summary = launch.Stages(workdir, config.stages, runs), {}
    for name in config.stages:
        stages.path(f"stage:{name}")
        figures = log.read_json(workdir / name / "summary.json")["figures"]
        summary |= {
            f"{name}/{part.removeprefix(f'{name}/')}/{key}": x
            for part, of in figures.items()
            for key, x in of.items()
            if x is not None
        }
    answered = log.read_lines(workdir / "qa_wikidata" / "records.jsonl")
    right = np.array([record["exact_match"] for record in answered])
    p = np.array(own_probability(config, workdir, mesh, answered))
    sure = selective.calibrated(p[::2], right[::2])(p[1::2])  # every other question is for calibration
    right = right[1::2]
    for rewards in config.tables:
        table, (above, speaks) = truthfulness.Table(*rewards), derived(rewards)
        always = np.asarray(truthfulness.reward(right > 0, False, True, table))
        rule = np.asarray(truthfulness.reward(right > 0, sure < above, sure > speaks, table))
        for name, x in (("always", always), ("rule", rule), ("rule - always", rule - always), ("coverage", sure > speaks)):
            summary |= study.over_seeds(f"{title_of(rewards)}/{name}", x)
    shares = np.linspace(0.1, 1, 10)
    surest = [right[sure >= np.quantile(sure, 1 - share)] for share in shares]
    curve = [[float(share), *study.over_seeds("", x).values()] for share, x in zip(shares, surest, strict=True)]
    for n in (1, -1):
        summary |= study.over_seeds(f"surest {shares[n]:.0%}/accuracy", surest[n])
    title, across = "Accuracy of the share of questions it is surest of", "share that is answered"
    figures = {title: {"x": across, "curves": {"own probability": curve}}}
    study.leave(workdir, config, summary, figures, findings(summary, config.tables))


def findings(summary: dict, rewards) -> list[str]:
    """What the numbers say."""

    def told(name):
        error = summary.get(f"{name}_error")  # of one example there is none
        return f"{summary[name]:.2f}" + (f" ± {error:.2f}" if error is not None else "")

    unknown, known, true, best = (
        told(f"{name}/accuracy") for name in ("known_unknowns/unknown", "known_unknowns/known", "truthfulqa/micro", "surest 20%")
    )
    said = [
        f'It prefers "Unknown" in {unknown} of the questions that nobody can answer, and the answer in {known} of the others.',
        f"TruthfulQA: {true} of the best answers are above all false ones; true is {told('truthfulqa/micro/mc2')} of the whole.",
        f"Of facts it has {told('surest 100%/accuracy')} right, and of the fifth that it is surest of {best}.",
    ]
    for table in rewards:
        name = title_of(table)
        more, error = summary[f"{name}/rule - always"], summary[f"{name}/rule - always_error"]
        than = "no different from" if abs(more) <= 2 * error else "more than" if more > 0 else "less than"
        said.append(
            f"Rewards {name}: by thresholds of its calibrated probability it speaks to {told(f'{name}/coverage')} of them, and has "
            f"{told(f'{name}/rule')} each, {than} by answering always, {told(f'{name}/always')}; silent {table[2]:g}."
        )
    return said
