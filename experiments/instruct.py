"""Instruction tuning at scale of tasks: python -m experiments.instruct --config=configs/instruct.py

The same number of examples and updates is spent on 4, 6, 8, ... tasks, each of which is told in words. Then tasks of categories
that no model was trained on are asked, and new inputs of the tasks that it was (Wei et al. 2022, Wang et al. 2022). A decoder and
an encoder-decoder learn from the same rows. Each seed draws which tasks are held out, which are learnt, and how models begin; a
larger set of tasks has the smaller ones in it. Every training is a run of experiments.sft in a folder of its own, and what was
written is kept in records.jsonl: what is there is not made again.
"""

from itertools import combinations

import numpy as np

from experiments import common, launch, sft, study
from jaxalign import keys, shard
from jaxalign.data import instructions, tables
from jaxalign.evaluation import engine, metrics, records, statistics
from jaxalign.evaluation.rouge import rouge_l
from jaxalign.prompts import phrasings, template
from jaxalign.train import log

MEASURES = {
    "exact_match": metrics.exact_match,
    "rouge_l": lambda text, targets: rouge_l(text, targets, stem=True),  # as Super-NaturalInstructions has it, from 0 to 1
}
KINDS = {"unseen": "Tasks of categories that no model was trained on", "seen": "New inputs of tasks that the model was trained on"}


def rows_of(source: str, count: int, *, words: int, seed: int) -> list[dict]:
    """The rows of files, or `count` of a generated world, without those of more than `words` words."""
    generated = source in common.GENERATED
    rows = common.read_rows(source, count, seed=seed) if generated else instructions.read(source)
    return [row for row in rows if len(" ".join([row["definition"], row["input"], *row["targets"][:1]]).split()) <= words]


def courses(*, source, asked, count, words, held_out, examples, questions, cap, temperature, numbers, seed: int):
    """Yields (n, rows to learn from, {kind: rows to be asked}) of each n of `numbers`; of n = 0 nothing is learnt, or seen.

    Args: source, asked: of rows to learn from, and of those that are asked; count: of a generated world's; words: most of a row;
        held_out: categories that are; examples: to learn from in all; questions: of a kind, at most; cap, temperature: of
        instructions.mixture. ValueError where there are fewer tasks than n.
    """
    learnt, fresh = (rows_of(name, count, words=words, seed=2 * seed + k) for k, name in enumerate((source, asked)))
    both = {row["task"] for row in learnt} & {row["task"] for row in fresh}
    learnt, fresh = ([row for row in rows if row["task"] in both] for rows in (learnt, fresh))
    names = _drawn({row["category"] for row in learnt}, seed)[:held_out]
    rest, unseen = instructions.hold_out(learnt, names)[0], instructions.hold_out(fresh, names)[1]
    tasks = _drawn({row["task"] for row in rest}, seed)
    if max(numbers) > len(tasks):
        raise ValueError(f"curve.numbers = {numbers}: without those of held-out categories there are {len(tasks)} tasks")
    for n in numbers:
        own, new = ([row for row in rows if row["task"] in tasks[:n]] for rows in (rest, fresh))
        mixed = instructions.mixture(own, examples, cap=cap, temperature=temperature, seed=seed) if n else []
        sides = {"unseen": unseen, "seen": new} if n else {"unseen": unseen}
        yield n, mixed, {kind: [rows[k] for k in _order(len(rows), seed)[:questions]] for kind, rows in sides.items()}


def _order(size: int, seed: int):
    return tables.order(size, size, seed=seed, step=0)


def _drawn(names: set, seed: int) -> list:
    """All of them, in an order that is drawn."""
    return [sorted(names)[k] for k in _order(len(names), seed)]


def lessons(rows, known, *, seed: int) -> list[dict]:
    """Rows as they are asked, each by a template that is drawn for it, in an order that is: {"prompt", "answer", "targets"}."""
    found = []
    for row, form in zip(rows, phrasings.drawn(rows, known, seed=seed), strict=True):
        asked = template.render(form, row)
        found.append({"prompt": asked.text, "answer": template.target(form, row) + asked.after, "targets": row["targets"]})
    return [found[k] for k in _order(len(found), seed)] if found else []


def asker(model, tokenizer, mesh, path, *, measure: str, chat: bool, batch: int, length: int, written: int):
    """-> ask(name, loaded, lessons) -> what the measure says of each greedy answer, [N], kept in a file of records."""
    settings = {"batch": batch, "context": length, "length": written, "temperature": 0.0}
    generate, start = engine.generator(model, mesh, tokenizer, **settings), common.start_of(model)

    def ask(name, loaded, asked):
        about = {"task": name, "model": loaded.digest}
        wanted = [
            about | {"id": n, "prompt": records.fingerprint(one["prompt"], one["targets"], settings, chat, measure)}
            for n, one in enumerate(asked)
        ]

        def write(numbers, tell):
            prompts = [common.document(tokenizer, asked[n]["prompt"], None, chat=chat, start=start) for n in numbers]
            generate(loaded.params, keys.of_rows(keys.key(0, "evaluate"), numbers), prompts, ("\n\n",), tell)

        def judge(n, found):
            answer, right = found[0].text.strip(), asked[n]["targets"]
            return {"asked": asked[n]["prompt"], "answer": answer, "targets": right, measure: MEASURES[measure](answer, right)}

        return [record[measure] for record in records.collect(path, wanted, [1] * len(asked), write, judge)]

    return ask


def trained(stage, name: str, folder, learnt: list[dict], seed: int) -> str:
    """The source of the stage's model once it has learnt these lessons, in FOLDER/NAME; of none: as it is."""
    if not learnt:
        return stage.model.source
    stage = stage.copy_and_resolve_references()
    stage.seed, path = seed, folder / f"lessons_{records.fingerprint(learnt)}.jsonl"
    launch.write_rows(path, learnt)
    stage.data.source = str(path)
    return launch.Stages(folder, {name: stage}, {name: sft.run}).path(f"stage:{name}")


def units(by_seed: list[list[float]]) -> list[float]:
    """What errors are taken over: means of seeds or, where there is one seed, its questions."""
    return [float(np.mean(values)) for values in by_seed] if len(by_seed) > 1 else by_seed[0]


def findings(found: dict) -> list[str]:
    """Args: found: {model: {kind: {n: values of each of the units}}}."""
    told, best = [], {}
    for name, kinds in found.items():
        unseen = kinds["unseen"]
        few, many = min(unseen), max(unseen)
        best[name] = unseen[many]
        verdict = (
            "as the papers have it" if study.more(unseen[many], unseen[few]) > 0 else "which does not show what the papers have"
        )
        told.append(f"{name}, unseen tasks, {many} tasks against {few}: {study.compared(unseen[many], unseen[few])}, {verdict}.")
        steps = [f"{n} to {m}: {study.compared(unseen[m], unseen[n])}" for n, m in zip(sorted(unseen), sorted(unseen)[1:])]
        told.append(f"{name}, step by step, from {'; '.join(steps)}.")
        means = ", ".join(f"{np.mean(x):.2f} with {n}" for n, x in sorted(kinds["seen"].items()))
        told.append(f"{name}, new inputs of its tasks: {means}; unseen tasks with {many}: {np.mean(best[name]):.2f}.")
    for name, other in combinations(best, 2):
        told.append(f"Unseen tasks, {name} against {other}, at the most tasks: {study.compared(best[name], best[other])}.")
    return told


def run(config, workdir):
    mesh, known = shard.make_mesh(**config.mesh), phrasings.load(config.templates)
    sources = [config.learners[name] for name in ("decoder_source", "encoder_decoder_source")]
    names, askers = [source.removeprefix("stage:") for source in sources if source], {}
    found = {name: {kind: {} for kind in KINDS} for name in names}
    for seed in range(config.seed, config.seed + config.curve.seeds):
        folder = workdir / f"seed_{seed}"
        for n, learnt, asked in courses(**config.course, numbers=config.curve.numbers, seed=seed):
            taught = lessons(learnt, known, seed=seed)
            for name in names:
                stage = config.stages[name]
                source = trained(stage, f"{name}_{n}", folder, taught, seed)
                loaded = common.load(source, stage.model, mesh, seed=seed, scratch=stage.scratch)
                if name not in askers:
                    how = {"batch": config.batch, "length": config.length, "written": config.written, "chat": stage.data.chat}
                    path = workdir / "records.jsonl"
                    askers[name] = asker(loaded.model, loaded.tokenizer, mesh, path, measure=config.measure, **how)
                for kind, rows in asked.items():
                    values = askers[name](f"{name}, {n} tasks, seed {seed}, {kind}", loaded, lessons(rows, known, seed=seed))
                    found[name][kind].setdefault(n, []).append(values)
                    log.say(f"{name}, {n} tasks, seed {seed}, {kind}: {np.mean(values):.3f} of {len(values)}")
    found = {name: {kind: {n: units(x) for n, x in of.items()} for kind, of in kinds.items()} for name, kinds in found.items()}
    summary, drawn = {}, {title: {"x": "tasks trained on", "curves": {}} for title in KINDS.values()}
    for name, kinds in found.items():
        for kind, title in KINDS.items():
            drawn[title]["curves"][name] = [[n, *statistics.mean(values)] for n, values in sorted(kinds[kind].items())]
            for n, values in kinds[kind].items():
                summary |= study.over_seeds(f"{name}/{kind}/{n}", values)
    study.leave(workdir, config, summary, drawn, findings(found))


if __name__ == "__main__":
    launch.main(run, "instruct")
