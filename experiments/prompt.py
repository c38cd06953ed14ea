"""Prompt it, or fine-tune it: python -m experiments.prompt --config=configs/prompt.py

How often a model is right against k, the demonstrations in its prompt: chosen at random, balanced or nearest, plain and
calibrated, without and with chains of thought ("Let's think step by step." where k = 0). Beside that the same model once SFT or
GRPO has trained it on rows of the same pool, asked as it was trained: behind no demonstrations or some, to answer at once or
behind a chain of thought. All are asked the same rows, in the same words. Leaves report.html and what it is made of
(experiments/study.py), and records.jsonl, a line for each row and each way to ask; what is there is not asked again.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import common, grpo, launch, ppo, sft, study
from jaxalign import keys, shard
from jaxalign.data import text
from jaxalign.evaluation import engine, records, statistics
from jaxalign.objectives import online
from jaxalign.prompts import answers, demonstrations, extract, reasoning
from jaxalign.prompts import template as templates
from jaxalign.train import log

CHUNK = 32  # rows that reason without demonstrations, until the answers of all of them are known


class Reading(NamedTuple):
    """How an answer is found in what is written."""

    read: Any  # (text) -> the answer, or None
    therefore: str  # what asks for it behind a chain of thought without demonstrations
    mark: str  # what stands before an answer that was asked for, where `read` looks for it


READ = {
    "after": Reading(extract.after, reasoning.THEREFORE["text"], "The answer is"),
    "number": Reading(extract.number, reasoning.THEREFORE["number"], "####"),
    "letter": Reading(extract.letter, reasoning.THEREFORE["choice"], ""),
    "yes_no": Reading(extract.yes_no, reasoning.THEREFORE["yes or no"], ""),
}


class Task(NamedTuple):
    """Rows that are asked, and those that may be shown or trained on."""

    template: templates.Template
    pool: list[dict]
    rows: list[dict]
    words: list[str]  # to choose among, by log-probability; [] where the answer is written, and read by `read`
    read: Reading | None

    @property
    def direct(self) -> templates.Template:
        """The template without chains of thought."""
        return replace(self.template, rationale="")


def task_of(*, template: str, pool: str, pool_count: int, rows: str, count: int, read: str, seed: int) -> Task:
    """The task of a config: rows in an order drawn by the seed. What is asked is not in the pool, though the files be the same."""

    def asks(row):
        return templates.question(made, row)[0]

    def some(source, count, without=()):
        found = common.read_rows(source, count if source in common.GENERATED else 0, seed=seed)
        order = np.random.default_rng(np.random.SeedSequence(seed)).permutation(len(found))
        return [found[n] for n in order if asks(found[n]) not in without][: count or None]

    made = templates.load(template)
    words, asked = [] if read else [*templates.words(made).values()], some(rows, count)
    return Task(made, some(pool, pool_count, {*map(asks, asked)}), asked, words, READ.get(read))


class Asker(NamedTuple):
    """A model that is asked, by jaxalign.evaluation.engine. What it answered is kept in a file of records."""

    loaded: common.Loaded
    score: Any
    generate: Any
    path: Path
    key: Any
    length: int  # most tokens of a prompt and its answer
    written: int  # of an answer that is written

    def document(self, prompt, answer=None):
        start = common.start_of(self.loaded.model)
        return templates.document(self.loaded.tokenizer, prompt, answer, chat=False, eos=False, start=start)

    def prompts(self, task: Task, template, rows, ranking, *, k: int, best_last: bool = False):
        """Each row's prompt, behind as many of k demonstrations of the pool as there is room for."""

        def count(prompt):
            document = self.document(prompt, task.words[0] if task.words else None)
            return len(document.tokens) + (0 if document.source is None else len(document.source))

        room = demonstrations.within(count, length=self.length, answer=0 if task.words else self.written)
        return demonstrations.few_shot(template, rows, task.pool, ranking, k=k, best_last=best_last, fits=room)

    def ask(self, name: str, task: Task, prompts, free=(), rows=None, *, thinks: bool = False) -> list[dict]:
        """The record of each row: what was "said", whether it is "right" and, beside content-free prompts, "calibrated".

        Args: name: of the way to ask; free: the same prompts without content, for calibration; rows: not the task's; thinks: let
            it reason first, and then ask for the answer.
        """
        rows = task.rows if rows is None else rows
        about = {"task": name, "model": self.loaded.digest}
        settings = [task.words, self.written, thinks, *(prompt.text for prompt in free)]
        wanted = [
            about | {"id": n, "prompt": records.fingerprint(prompt.text, prompt.after, *settings)}
            for n, prompt in enumerate(prompts)
        ]
        told = [{"asked": prompt.text, "shots": prompt.shots, "dropped": prompt.dropped} for prompt in prompts]
        targets = [templates.target(task.direct, row) for row in rows]
        if task.words:
            return self._choose(task.words, prompts, list(free), wanted, told, targets)

        read, therefore, mark = task.read

        def judge(n, written):
            (last, thought), answer = written[0], read(targets[n])
            said = read(f"{mark} {last.text}" if thinks else last.text)
            wrote = f"{thought}\n{therefore}{last.text}" if thinks else last.text
            return told[n] | {"wrote": wrote, "said": said, "target": answer, "right": float(said == answer)}

        def answered(numbers, asked, tell=None):
            until = () if thinks else (task.template.separator,)  # nobody showed it how to end
            documents = [self.document(prompt) for prompt in asked]
            return self.generate(self.loaded.params, keys.of_rows(self.key, numbers), documents, until, tell)

        def write(numbers, tell):
            if not thinks:
                answered(numbers, [prompts[n] for n in numbers], tell=lambda k, written: tell(k, (written, "")))
            for first in range(0, len(numbers), CHUNK) if thinks else ():
                part = numbers[first : first + CHUNK]
                found = reasoning.zero_shot([prompts[n] for n in part], lambda asked, _, ns=part: answered(ns, asked), therefore)
                for k, (last, thought) in enumerate(found):
                    tell(first + k, (last, thought.text))

        return records.collect(self.path, wanted, [1] * len(prompts), write, judge)

    def _choose(self, words, prompts, free, wanted, told, targets):
        asked = [[prompt, *free] for prompt in prompts]
        documents = [self.document(prompt, word) for each in asked for prompt in each for word in words]

        def judge(n, logp):
            logp = answers.of_labels(np.reshape(logp, (-1, len(words))), np.arange(len(words)))
            found = {"right": logp[0]} | ({"calibrated": answers.calibrated(logp[0], logp[1:])} if free else {})
            right = {name: float(words[answers.search(x)[0]] == targets[n]) for name, x in found.items()}
            p = dict(zip(words, np.exp(logp[0]).tolist(), strict=True))
            return told[n] | {"said": max(p, key=p.get), "target": targets[n], "p": p} | right

        def score(numbers, tell):
            self.score(self.loaded.params, [documents[n] for n in numbers], lambda k, said: tell(k, said.logp))

        return records.collect(self.path, wanted, [len(words) * (1 + len(free))] * len(prompts), score, judge)


def asker(loaded, mesh, path, *, seed: int, batch: int, length: int, written: int) -> Asker:
    """Args: length: 0: as many tokens as the model was made for."""
    length = engine.longest(loaded.model, length)
    score = engine.scorer(loaded.model, mesh, batch=batch, length=length)
    generate = engine.generator(loaded.model, mesh, loaded.tokenizer, batch=batch, context=length, length=written, temperature=0.0)
    return Asker(loaded, score, generate, path, keys.key(seed, "evaluate"), length, written)


def curves(ask: Asker, task: Task, *, shots, seeds: int, rankings) -> dict:
    """{way to ask: {k: the records of all seeds}}"""
    found = {}
    empty = [column for column in text.fields(task.template.text) if column not in task.template.slots]
    nothing = answers.content_free(task.rows[0], empty)
    for ranking in rankings:
        ways = {ranking: task.direct} | ({f"{ranking}, thought": task.template} if task.template.rationale and task.read else {})
        for seed in range(1 if ranking == "nearest" else seeds):
            ranked = demonstrations.by_name(ranking, task.direct, task.rows, task.pool, seed=seed, anew=False)
            for way, template in ways.items():
                for k in shots:
                    how = {"k": k, "best_last": ranking == "nearest"}
                    prompts = ask.prompts(task, template, task.rows, ranked, **how)
                    alike = task.words and (ranking != "nearest" or not k)  # the demonstrations are, of all rows
                    free = ask.prompts(task, template, nothing, ranked, **how) if alike else ()
                    name = f"{way}, {k} shots, seed {seed}" if k else "thought, no shots" if template.rationale else "no shots"
                    if k or seed == 0:
                        found.setdefault(way, {}).setdefault(k, []).extend(
                            ask.ask(name, task, prompts, free, thinks=bool(template.rationale) and not k)
                        )
    return found


def accuracy(found: list[dict], name: str = "right") -> statistics.Estimate:
    """Its error is clustered by row, which several seeds may have been asked."""
    return statistics.clustered([record[name] for record in found], [record["id"] for record in found])


class Pupil(NamedTuple):
    """A model that is asked as it was trained."""

    source: str
    shots: int  # demonstrations before a row, drawn at random
    thought: bool  # a chain of thought comes before the answer

    def template(self, task: Task) -> templates.Template:
        return task.template if self.thought else task.direct

    def prompts(self, ask: Asker, task: Task, rows, *, seed: int, anew: bool):
        """Args: anew: demonstrations are drawn for each row; else once, for all."""
        ranked = demonstrations.by_name("random", task.direct, rows, task.pool, seed=seed, anew=anew)
        return ask.prompts(task, self.template(task), rows, ranked, k=self.shots)


def write_rows(path, task: Task, template, prompts):
    """What SFT and RL learn from: {"prompt", "completion", "answer"} of each row of the pool. An answer has no chain of thought."""

    def learnt(row, prompt):
        completion, answer = (templates.target(each, row) + prompt.after for each in (template, task.direct))
        return {"prompt": prompt.text, "completion": completion, "answer": answer}

    launch.write_rows(path, map(learnt, task.pool, prompts))


def findings(summary: dict, trained: dict) -> list[str]:
    """What the numbers say, in sentences. Args: summary: {"way/k" or a name, ..., and the same with _error}; trained: {name: k}."""

    def told(name):
        return f"{summary[name]:.2f} ± {summary[f'{name}_error']:.2f}"

    prompted = [name for name in summary if "/" in name and not name.endswith("_error")]
    best = max(prompted, key=summary.get)
    way, _, k = best.rpartition("/")
    said = [f"Of {len(prompted)} ways to prompt the best one here is {way} with {k} demonstrations: {told(best)} of rows right."]
    said.append("It was chosen by the same rows, so on others it is likely to be worse.")
    for name, k in trained.items():
        apart = 2 * float(np.hypot(summary[f"{name}_error"], summary[f"{best}_error"]))
        better = summary[name] - summary[best]
        than = "as much as" if abs(better) <= apart else "more than" if better > 0 else "less than"
        said.append(f"{name}, asked behind {k} demonstrations, has {told(name)}, {than} the best prompt (two errors decide).")
    return said


def run(config, workdir):
    mesh = shard.make_mesh(**config.mesh)
    task, settings = task_of(**config.task, seed=config.seed), {"batch": config.batch, "length": config.length}
    settings |= {"written": config.written, "seed": config.seed}
    load = partial(common.load, settings=config.model, mesh=mesh, seed=config.seed)
    asked = partial(asker, mesh=mesh, path=workdir / "records.jsonl", **settings)
    drawn, summary = {}, {}
    ask = asked(load(config.model.source))
    for way, by_k in curves(ask, task, **config.curve).items():
        for name, shown in (("right", way), ("calibrated", f"{way}, calibrated")):
            for k, found in by_k.items() if all(name in each[0] for each in by_k.values()) else ():
                value, error = accuracy(found, name)
                drawn.setdefault(shown, []).append([k, value, error])
                summary |= {f"{shown}/{k}": value, f"{shown}/{k}_error": error}
                log.say(f"{shown}, k = {k}: {value:.3f} ± {error:.3f}")
    beside = {name: Pupil(**each) for name, each in config.beside.items() if each.source}
    for name, pupil in beside.items():
        path = workdir / f"train_{name}.jsonl"
        write_rows(path, task, pupil.template(task), pupil.prompts(ask, task, task.pool, seed=config.seed, anew=True))
        if stage := config.stages.get(pupil.source.removeprefix("stage:")):
            (stage.data if "data" in stage else stage.prompts).source = str(path)
    del ask  # and its parameters, before stages make others
    reinforced = partial(ppo.run, algorithm=grpo.of_groups(online.grpo))
    runs = {"sft": sft.run, "sft_thought": sft.run, "grpo": reinforced, "sft_grpo": reinforced}
    stages, ks = launch.Stages(workdir, config.stages, runs), sorted(config.curve.shots)
    for name, pupil in beside.items():
        tuned = asked(load(stages.path(pupil.source)))
        value, error = accuracy(tuned.ask(name, task, pupil.prompts(tuned, task, task.rows, seed=0, anew=False)))
        drawn[f"{name}, behind {pupil.shots}"] = [[ks[0], value, error], [ks[-1], value, error]]
        summary |= {name: value, f"{name}_error": error}
        log.say(f"{name}, behind {pupil.shots} shots: {value:.3f} ± {error:.3f}")
    figure = {"Share of held-out rows that are answered rightly": {"x": "demonstrations", "curves": drawn}}
    study.leave(workdir, config, summary, figure, findings(summary, {name: pupil.shots for name, pupil in beside.items()}))


if __name__ == "__main__":
    launch.main(run, "prompt")
