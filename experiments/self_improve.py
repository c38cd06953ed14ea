"""A model that learns from its own words: python -m experiments.self_improve --config=configs/self_improve.py

Each method of jaxalign.feedback.self_improvement draws samples for problems of a pool, keeps some, and trains on them by SFT, for
as many rounds as it has. What comes of it is measured on held-out problems: how often a sample (temperature 1), the likeliest
answer and the majority of samples are right, pass@k, and the KL from the base, in nats a response. All of it over several seeds, of
which each has problems, a base and samples of its own, in a folder seed_N. What is there is neither trained nor drawn again.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import common, launch, sft, study
from jaxalign import keys, shard
from jaxalign.data import text
from jaxalign.evaluation import engine, records
from jaxalign.feedback import self_improvement
from jaxalign.feedback.self_improvement import METHODS, Drawn
from jaxalign.ops import best_of_n
from jaxalign.ops.vote import vote
from jaxalign.prompts import extract
from jaxalign.train import log


class Task(NamedTuple):
    pool: list[dict]  # {"prompt", "hint", "answer", "kind"}: problems to be learnt from
    rows: list[dict]  # and those that are held out
    formats: list[tuple[str, str]]  # of prompts and completions


def read_rows(source: str, count: int, *, seed: int) -> list[dict]:
    """That many rows of a generated world, or of a file, in an order drawn by the seed."""
    if source in common.GENERATED:
        return common.read_rows(source, count, seed=seed)
    found = common.read_rows(source, 0, seed=seed)
    return [found[n] for n in np.random.default_rng(np.random.SeedSequence(seed)).permutation(len(found))[: count or None]]


def task_of(*, pool, pool_count, rows, count, prompt, hint, answer, direct, seed: int) -> Task:
    """The task of a config.

    Args: prompt, hint, answer: templates, of a row's columns; direct: of the {prompt}, to ask for the answer alone; "" for none.
    """

    def some(source, count):
        asked = {"prompt": prompt, "hint": hint, "answer": answer}
        made = [
            {name: text.fill(x, row) for name, x in asked.items()} | {"kind": row.get("kind", "all")}
            for row in read_rows(source, count, seed=seed)
        ]
        return [row | {"answer": extract.number(row["answer"])} for row in made]

    formats = [("{prompt}", "{completion}")] + ([(direct, "{answer}")] if direct else [])
    return Task(some(pool, pool_count), some(rows, count), formats)


class Asker(NamedTuple):
    """Who draws and scores, for models of one architecture; what was drawn is kept in a file of records."""

    task: Task
    tokenizer: Any
    generate: Any  # (temperature) -> engine.generator's
    score: Any
    chat: bool
    path: Path
    about: tuple  # what a draw depends on beside model, prompt, number and temperature
    key: Any

    def prompts(self, asked: list[str]) -> list:
        return [common.document(self.tokenizer, prompt, None, chat=self.chat) for prompt in asked]

    def draw(self, loaded, name: str, asked: list[str], many: int, temperature: float) -> list[dict]:
        """{"texts", "answers", "tokens"} of each prompt: lists [many]. A text without an end has no answer."""
        documents, how = self.prompts(asked), (many, temperature, *self.about)
        about = {"task": name, "model": loaded.digest}
        wanted = [about | {"id": n, "prompt": records.fingerprint(prompt, *how)} for n, prompt in enumerate(asked)]

        def write(numbers, tell):
            row_keys = keys.of_rows(self.key, numbers)
            self.generate(temperature)(loaded.params, row_keys, [documents[n // many] for n in numbers], (), tell)

        def judge(_, written):
            texts = [each.text.strip() for each in written]
            # one that was cut is never learnt: it would teach to end there
            answers = [extract.number(said) if each.ended else None for said, each in zip(texts, written, strict=True)]
            return {"texts": texts, "answers": answers, "tokens": [each.tokens for each in written]}

        return records.collect(self.path, wanted, [many] * len(asked), write, judge)

    def drawn(self, loaded, name: str, numbers, column: str, many: int, temperature: float) -> list[Drawn]:
        """What is said of problems of the pool by number, asked by this column."""
        rows = [self.task.pool[n] for n in numbers]
        found = self.draw(loaded, name, [row[column] for row in rows], many, temperature)
        return [
            Drawn(row["prompt"], x["texts"], x["answers"], [float(said == row["answer"]) for said in x["answers"]])
            for row, x in zip(rows, found, strict=True)
        ]

    def measure(self, loaded, base, *, samples: int, k: int) -> tuple[dict, np.ndarray]:
        """-> ({name: number}, whether each sample is right: f32 [held-out problems, samples])

        "sampled", "greedy", "majority" and "pass" (pass@k) are shares of held-out problems, the first and the third by kind, too.
        "kl": of the model from the base, nats a response.
        """
        rows = self.task.rows
        asked, kinds = [row["prompt"] for row in rows], np.array([row["kind"] for row in rows])
        greedy, drawn = (self.draw(loaded, "held out", asked, *how) for how in ((1, 0.0), (samples, 1.0)))
        right = np.array([[said == row["answer"] for said in x["answers"]] for row, x in zip(rows, drawn, strict=True)], np.float32)
        voted = [vote(x["answers"]).majority == row["answer"] for row, x in zip(rows, drawn, strict=True)]
        by_row = {"sampled": right.mean(1), "majority": np.array(voted, np.float32)}
        found = {name: float(x.mean()) for name, x in by_row.items()}
        found["greedy"] = float(np.mean([x["answers"][0] == row["answer"] for row, x in zip(rows, greedy, strict=True)]))
        found["pass"] = best_of(right, k)
        for kind in sorted({*kinds}) if len({*kinds}) > 1 else ():
            found |= {f"{name}/{kind}": float(x[kinds == kind].mean()) for name, x in by_row.items()}
        prompts, vocab = self.prompts(asked), len(self.tokenizer)
        both = [(prompt.tokens.tolist(), tokens) for prompt, x in zip(prompts, drawn, strict=True) for tokens in x["tokens"]]
        said = [text.of_ids(prompt, tokens, vocab=vocab) for prompt, tokens in both]
        own, its = (self.score(params, said) for params in (loaded.params, base.params))
        return found | {"kl": float(np.mean([a.logp - b.logp for a, b in zip(own, its, strict=True)]))}, right


def best_of(right, n: int) -> float:
    """The share of problems that the best of n samples solves: pass@n, unbiased. Args: right [problems, samples]."""
    return float(best_of_n.expected_max(right, n).mean())


def rounds(method, ask: Asker, base, train, load, *, count: int, samples: int, temperature: float):
    """Yields, of each round, (the model then, samples drawn so far, rows that it learnt)."""
    loaded, source, draws, everyone = base, None, 0, range(len(ask.task.pool))
    for _ in range(count if method.repeats else 1):
        found = ask.drawn(loaded, "pool", everyone, "prompt", 1 if method.one else samples, temperature)
        draws += sum(len(each.texts) for each in found)
        if method.rationalises:
            numbers = self_improvement.failed(found, method.select)
            again = ask.drawn(loaded, "pool, hinted", numbers, "hint", 1, temperature) if numbers else []
            draws += len(again)
            rows = self_improvement.rationalised(found, dict(zip(numbers, again, strict=True)), method.select)
        else:
            rows = self_improvement.kept(found, method.select)
        rows = self_improvement.in_formats(rows, ask.task.formats if method.mixes else ask.task.formats[:1])
        source = train(source if method.goes_on else None, rows)
        loaded = load(source)
        yield loaded, draws, len(rows)


def of_seed(config, folder: Path, engines: dict) -> dict:
    """{"base", or method and round: {name: number}}, and "best of n": [(n, share of held-out problems)] of the base."""
    mesh, improve = shard.make_mesh(**config.mesh), config.improve
    folder.mkdir(parents=True, exist_ok=True)
    template = config.stages[improve.source.removeprefix("stage:")]
    first = launch.Stages(folder, config.stages, {"base": sft.run}).path(config.model.source)
    load = partial(common.load, settings=config.model, mesh=mesh, seed=config.seed)
    base, task = load(first), task_of(**config.task, seed=config.seed)
    length, chat = engine.longest(base.model, config.length), template.data.chat
    how = {"batch": config.batch, "context": length, "length": config.written}

    def generate(temperature):
        if temperature not in engines:
            engines[temperature] = engine.generator(base.model, mesh, base.tokenizer, **how, temperature=temperature)
        return engines[temperature]

    score = engines.setdefault("score", engine.scorer(base.model, mesh, batch=config.batch, length=length))
    about = (config.seed, config.written, length, chat)
    key = keys.key(config.seed, "sample")
    ask = Asker(task, base.tokenizer, generate, score, chat, folder / "records.jsonl", about, key)

    def train(source, rows):
        if not rows:
            raise ValueError("no sample is kept, so there is nothing to learn: draw more (improve.samples), or from more problems")
        name = f"sft_{records.fingerprint(source and Path(source).name, rows)}"
        launch.write_rows(folder / f"{name}.jsonl", rows)
        settings = copy.deepcopy(template)
        settings.model.source, settings.data.source = source or first, str(folder / f"{name}.jsonl")
        return launch.Stages(folder, {name: settings}, {name: sft.run}).path(f"stage:{name}")

    measure = partial(ask.measure, base=base, samples=improve.measured, k=improve.samples)
    found, right = measure(base)
    ns = sorted({improve.samples, *(2**i for i in range(improve.measured.bit_length()))})
    said = {"base": found, "best of n": [(n, best_of(right, n)) for n in ns]}
    settings = {"count": improve.rounds, "samples": improve.samples, "temperature": improve.temperature}
    for name in improve.methods:
        for number, (loaded, draws, learnt) in enumerate(rounds(METHODS[name], ask, base, train, load, **settings), 1):
            told = {"draws": draws / len(task.pool), "learnt": learnt / len(task.pool)}
            said[f"{name}/{number}"] = measure(loaded)[0] | told
            log.say(f"seed {config.seed}, {name}, round {number}: {said[f'{name}/{number}']}")
    return said


def findings(found: dict, last: dict[str, str], *, samples: int) -> list[str]:
    """What the numbers say.

    Args: found: of `of_seed`, but each number a list, one a seed; last: {method: the name of its last round}; samples: k of pass@k.
    """
    base, said = found["base"], []
    for name, round_ in last.items():
        x = found[round_]
        more = {part: study.compared(x[part], base[part]) for part in ("sampled", "greedy", "pass")}
        said.append(
            f"{name}: {_mean(x['sampled']):.2f} of samples solve held-out problems, of the base's {_mean(base['sampled']):.2f}, "
            f"{more['sampled']}; for {_mean(x['draws']):.1f} samples drawn a problem and a KL of {_mean(x['kl']):.2f} nats. "
            f"Greedy: {more['greedy']}. pass@{samples}: {more['pass']}."
        )
    order = sorted(last, key=lambda name: -_mean(found[last[name]]["sampled"]))
    if len(order) > 1:
        best, second = (found[last[name]]["sampled"] for name in order[:2])
        said.append(f"Most are solved by {order[0]}; compared with {order[1]}, the next: {study.compared(best, second)}.")
    for kind in [name.partition("/")[2] for name in base if name.startswith("majority/")] if "LMSI" in last else ():
        x, solved = found[last["LMSI"]], _mean(base[f"majority/{kind}"])
        more = [study.compared(x[f"{part}/{kind}"], base[f"{part}/{kind}"]) for part in ("sampled", "majority")]
        said.append(
            f"LMSI, which knows no answer, on {kind} problems, of which the base's majority solves {solved:.2f}: samples that are "
            f"right, {more[0]}; majorities, {more[1]}."
        )
    for name, one in (("expert iteration", "rejection"), ("RAFT", "best of n")):
        if name in last and one in last and last[name] != f"{name}/1":
            more = study.compared(found[last[name]]["sampled"], found[last[one]]["sampled"])
            said.append(f"{name} beside {one}, which is its first round: {more}.")
    if "best of n" in last:
        x, n = found[last["best of n"]], samples
        limit, kl = dict(found["best of n"])[n], float(best_of_n.kl(float(n)))
        said.append(
            f"The best of {n} of the base solves {_mean(limit):.2f} at a KL of at most {kl:.2f} nats; the model that learnt it: "
            f"{study.compared(x['sampled'], limit)}, at {_mean(x['kl']):.2f} nats."
        )
    return said


def _mean(values) -> float:
    return float(np.mean(values))


def figures(found: dict, last: dict[str, str]) -> dict:
    """Shares of held-out problems that a sample solves: against samples drawn, of all and of each kind; and against KL."""

    def point(x, y):
        return [_mean(x), *study.over_seeds("y", y).values()]

    made = {}
    for name in [name for name in found["base"] if name.partition("/")[0] == "sampled"]:
        curves = {}
        for method, end in last.items():
            taken = [f"{method}/{n}" for n in range(1, int(end.rpartition("/")[2]) + 1)]
            curves[method] = [point([0], found["base"][name])] + [point(found[each]["draws"], found[each][name]) for each in taken]
        kind = name.partition("/")[2]
        title = f"Held-out problems{' of kind ' * bool(kind)}{kind} that a sample solves"
        made[title] = {"x": "samples drawn a problem of the pool", "curves": curves}
    curves = {"best of n of the base": [point([float(best_of_n.kl(float(n)))], values) for n, values in found["best of n"]]}
    curves |= {method: [point(found[end]["kl"], found[end]["sampled"])] for method, end in last.items()}
    return made | {"The same against KL from the base": {"x": "nats a response", "curves": curves, "points": [*last]}}


def run(config, workdir: Path):
    by_seed, engines = [], {}
    for seed in range(config.seed, config.seed + config.improve.seeds):
        own = config.copy_and_resolve_references()
        own.seed = seed
        for stage in own.stages.values():
            stage.seed = seed
        by_seed.append(of_seed(own, workdir / f"seed_{seed}", engines))
    names = [name for name in by_seed[0] if name != "best of n"]
    found = {name: {part: [said[name][part] for said in by_seed] for part in by_seed[0][name]} for name in names}
    found["best of n"] = [(n, [said["best of n"][i][1] for said in by_seed]) for i, (n, _) in enumerate(by_seed[0]["best of n"])]
    last = {name.rpartition("/")[0]: name for name in names if name != "base"}  # a later round replaces an earlier one
    summary = {}
    for name in names:
        for part, values in found[name].items():
            summary |= study.over_seeds(f"{name}/{part}", values)
    study.leave(workdir, config, summary, figures(found, last), findings(found, last, samples=config.improve.samples))


if __name__ == "__main__":
    launch.main(run, "self_improve")
