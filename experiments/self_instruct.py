"""Self-Instruct: python -m experiments.self_instruct --config=configs/self_instruct.py

A model goes on with lists of instructions, of which those that are fit and new join the pool; says which ask for a label; and
writes examples of each (jaxalign/feedback/self_instruct.py). It is then trained on these and, beside that, on as many examples of
the seed tasks, which people wrote. All three models are asked Natural Instructions, whose tasks are in neither.

Leaves instructions.jsonl, datacard.md and .json with what became of all that was written, records.jsonl and answers.jsonl, from
which an interrupted run goes on, and the report.
"""

import zlib
from functools import partial

from experiments import common, evaluate, launch, sft, study
from jaxalign import keys, shard
from jaxalign.data import sources
from jaxalign.evaluation import engine, records, statistics
from jaxalign.feedback import self_instruct
from jaxalign.prompts import template
from jaxalign.train import log

FIRST, PEOPLES, OWN = "as it was", "trained on the seed tasks", "trained on its own"
INSTRUCTIONS, EXAMPLES = "what became of instructions", "what became of examples"  # of the data card


def asker(loaded, mesh, path, *, seed: int, batch: int, length: int, chat: bool, sample):
    """-> write and score of jaxalign.feedback.self_instruct, by a model; what it said is kept in a file of records."""
    model, tokenizer = loaded.model, loaded.tokenizer
    context = engine.longest(model, length)
    generate = engine.generator(model, mesh, tokenizer, batch=batch, context=context, **sample)
    measure = engine.scorer(model, mesh, batch=batch, length=context)
    how = [chat and tokenizer.chat_template, context]

    def document(prompt, answer=None):
        return template.document(tokenizer, prompt, answer, chat=chat, eos=False, start=common.start_of(model))

    def collect(name, prompts, count, *settings, ask, judge):
        about = {"task": name, "model": loaded.digest}
        marks = [records.fingerprint(prompt.text, how, settings) for prompt in prompts]
        wanted = [about | {"id": n, "prompt": mark} for n, mark in enumerate(marks)]
        return records.collect(path, wanted, [count] * len(prompts), ask, judge)

    def write(name, prompts, until):
        def ask(numbers, tell):
            row_keys = keys.of_rows(keys.key(seed, "sample", zlib.crc32(name.encode()) >> 1), numbers)
            generate(loaded.params, row_keys, [document(prompts[n]) for n in numbers], until, tell)

        def judge(n, written):
            return {"asked": prompts[n].text, "wrote": written[0].text, "ended": written[0].ended}

        found = collect(name, prompts, 1, until, sample, seed, ask=ask, judge=judge)
        return [(record["wrote"], record["ended"]) for record in found]

    def score(name, prompts, words):
        asked = [document(prompt, word) for prompt in prompts for word in words]

        def ask(numbers, tell):
            measure(loaded.params, [asked[n] for n in numbers], lambda k, said: tell(k, said.logp))

        def judge(n, logp):
            return {"asked": prompts[n].text, "logp": logp}

        return [record["logp"] for record in collect(name, prompts, len(words), words, ask=ask, judge=judge)]

    return write, score


def examiner(loaded, mesh, path, *, batch: int, length: int, chat: bool, seed: int, tasks, source, template, count, written):
    """-> (params, digest) -> the records of `count` rows, asked without demonstrations in the words that SFT has learnt."""
    asked = launch.config_of("evaluate", tasks)
    asked.update(seed=seed, template=template, shots=0, chat=chat, length=length, batch=batch)
    asked.data.source, asked.sample.length = source, written
    measure = evaluate.prepare(asked, loaded._replace(params=None), mesh, count)
    return lambda params, digest: measure(params, digest, path)[0]


def findings(said: dict, scores: dict) -> list[str]:
    """Args: said: self_instruct.card; scores: ROUGE-L of each row [N], from 0 to 100, of FIRST, PEOPLES and OWN."""
    instructions, examples = said[INSTRUCTIONS], said[EXAMPLES]
    rounds = [*said["new in a round"].values()]
    told = [
        f"Of {instructions['written']} instructions that the model wrote, {instructions['kept']} were fit and new "
        f"({instructions['kept'] / instructions['written']:.0%}): {rounds[0]} in the first round, {rounds[-1]} in the last of "
        f"{len(rounds)}. Their ROUGE-L with the nearest seed task is {said['ROUGE-L with the nearest seed']:.2f} in the mean.",
        f"Of {examples['written']} examples, {examples['kept']} can be learnt from, of {said['instructions']} tasks; "
        f"{said['share of classification']:.0%} of them ask for a label.",
    ]
    means = ", ".join(f"{name} {value:.1f} ± {error:.1f}" for name, (value, error) in _means(scores).items())
    told.append(f"ROUGE-L on {len(scores[FIRST])} rows of Natural Instructions: {means}.")
    for name, other in ((OWN, FIRST), (PEOPLES, FIRST), (OWN, PEOPLES)):
        if name in scores and other in scores:
            told.append(f"The model {name} against the one {other}: {study.compared(scores[name], scores[other])}.")
    if OWN in scores:
        found = "That agrees in sign" if study.more(scores[OWN], scores[FIRST]) > 0 else "That is not found here"
        told.append(f"Wang et al. 2022 gained 33 points by it, with GPT-3, which had followed no instruction before. {found}.")
    return told


def _means(scores: dict) -> dict:
    return {name: statistics.mean(values) for name, values in scores.items()}


def figures(said: dict, scores: dict) -> dict:
    """For the report; arguments as of `findings`."""
    nearest = [[float(k) + 0.05, n] for k, n in said["nearest seed"].items()]
    rounds = [[int(k), n] for k, n in said["new in a round"].items()]
    rouge = {name: [[k, *estimate]] for k, (name, estimate) in enumerate(_means(scores).items())}
    return {
        "New instructions by their likeness to the nearest seed task": {"x": "ROUGE-L", "curves": {"instructions": nearest}},
        "Instructions that were fit and new": {"x": "round", "curves": {"instructions": rounds}},
        "ROUGE-L on Natural Instructions": {"x": "", "curves": rouge, "points": list(rouge)},
    }


def leave_rows(path, rows) -> str:
    launch.write_rows(path, rows)
    return str(path)


def run(config, workdir):
    mesh = shard.make_mesh(**config.mesh)
    tasks = sources.read(config.data.source)
    sources.require(tasks, ("instruction", "instances", "is_classification"), config.data.source)
    stages = launch.Stages(workdir, config.stages, dict.fromkeys(config.stages, sft.run))
    if "writer" in config.stages:
        shown = {"human": config.grow.human + config.grow.model, "count": config.grow.count, "shots": config.examples.shots}
        taught = self_instruct.lessons(tasks, **shown, size=config.stages.writer.data.count, seed=config.seed)
        config.stages.writer.data.source = leave_rows(workdir / "lessons.jsonl", taught)
    config.model.source = stages.path(config.model.source)
    load = partial(common.load, settings=config.model, mesh=mesh, seed=config.seed)
    loaded = load(config.model.source)

    how = {"seed": config.seed, "batch": config.batch, "length": config.length, "chat": config.chat}
    write, score = asker(loaded, mesh, workdir / "records.jsonl", **how, sample=config.sample.to_dict())
    made, grown = self_instruct.grow(write, tasks, **config.grow, seed=config.seed)
    asked = [each["instruction"] for each in made]
    labels = self_instruct.kinds(score, asked, tasks, shots=config.examples.shots, seed=config.seed)
    rows, answered = self_instruct.examples(write, asked, labels, tasks, **config.examples, seed=config.seed)
    said = self_instruct.card(made, rows, tasks, {INSTRUCTIONS: grown, EXAMPLES: answered}, rounds=config.grow.rounds)
    log.write_json(workdir / "datacard.json", said)
    log.write_text(workdir / "datacard.md", self_instruct.card_text(said, f"Self-instructed from {config.data.source}"))
    if not rows:
        raise ValueError(f"no example was fit to learn from; {workdir / 'datacard.md'} says what became of all that was written")
    peoples = self_instruct.of_people(tasks)
    own = leave_rows(workdir / "instructions.jsonl", rows)
    seeds = leave_rows(workdir / "seeds.jsonl", [peoples[n % len(peoples)] for n in range(len(rows))])

    exam = examiner(loaded, mesh, workdir / "answers.jsonl", **how, **config.evaluate)
    found = {FIRST: exam(loaded.params, loaded.digest)}
    beside = ((PEOPLES, "seeds", seeds, config.beside.seeds_source), (OWN, "own", own, config.beside.own_source))
    for name, stage, path, source in beside:
        if source:
            config.stages[stage].data.source = path
            tuned = load(stages.path(source))
            found[name] = exam(tuned.params, tuned.digest)
    scores = {name: [record["rouge_l"] for record in each] for name, each in found.items()}
    summary = {name: x for name, x in said.items() if not isinstance(x, dict)}
    for name, (value, error) in _means(scores).items():
        summary |= {f"rouge_l/{name}": value, f"rouge_l/{name}_error": error}
    study.leave(workdir, config, summary, figures(said, scores), findings(said, scores))


if __name__ == "__main__":
    launch.main(run, "self_instruct")
