"""Constitutional AI (Bai et al. 2022): python -m experiments.constitutional --config=configs/constitutional.py

A model is made harmless by principles in words, and no person says which answer is better. Its stages, each a folder with a report:

    critique   it answers prompts that ask for harm, criticises each answer by a principle, and revises it; others it just answers
    sft        it learns its last revisions, and its helpful answers
    label      what came out answers each prompt twice; the first model says, as a probability, which answer is better
    reward     a reward model learns these
    ppo        raises that reward

Then, by prompts that none of them saw: what the first model says of the answers of all three, how often they refuse, and how far
such labels agree with people. Leaves report.html, findings.txt and records.jsonl; what is there is not asked again.
"""

import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import common, judge, launch, ppo, reward, sft, study
from experiments import constitutional_measure as measured
from jaxalign import keys, shard
from jaxalign.data import sources
from jaxalign.data.tables import order
from jaxalign.evaluation import engine, judges, metrics, records
from jaxalign.feedback import constitutional
from jaxalign.models import files
from jaxalign.prompts import reasoning, template
from jaxalign.train import log, report


class Constitution(NamedTuple):
    principles: list[dict]
    examples: list[dict]  # of criticism, {turn: text}
    form: template.Template  # asks which of two answers is better
    prompts: list[dict]  # "prompt", and "kind": red_team or helpful
    held_out: list[dict]


def read(*, principles, examples, preference, red_team, helpful, count, held_out) -> Constitution:
    """The files of a config. Args: count: prompts of each kind, 0 for all; held_out: of these, off the end."""

    def rows(source, *columns):
        found = common.read_rows(source, 0, seed=0)
        sources.require(found, columns, source)
        return found

    kinds = {"red_team": rows(red_team, "prompt"), "helpful": rows(helpful, "prompt")}
    parts = [
        common.split([row | {"kind": kind} for row in found[: count or None]], held_out, "constitution.held_out")
        for kind, found in kinds.items()
    ]
    prompts, kept = (sum(part, []) for part in zip(*parts, strict=True))
    known = rows(principles, "id", "critique", "revision", "preference"), rows(examples, *constitutional.TURNS)
    return Constitution(*known, template.load(preference), prompts, kept)


class Asker(NamedTuple):
    """A model that writes and chooses. What it said is kept in a file of records. `_replace(loaded=...)`: another of its kind."""

    loaded: common.Loaded
    score: Any
    generate: Any
    path: Path
    config: Any  # of a stage: chat, length, sample and seed are read

    def write(self, name: str, prompts, until=constitutional.STOPS) -> list[dict]:
        """Records of what it says to prompts: "asked", "text", and "ids" as they were drawn."""
        config, until = self.config, () if self.config.chat else until  # a turn of a chat has its end
        base = keys.key(config.seed, "sample", zlib.crc32(name.encode()) >> 1)

        def ask(numbers, tell):
            documents = [self.document(prompts[n]) for n in numbers]
            self.generate(self.loaded.params, keys.of_rows(base, numbers), documents, until, tell)

        def told(n, said):
            return {"asked": prompts[n].text, "text": said[0].text, "ids": said[0].tokens}

        wanted = self._wanted(name, prompts, config.seed, config.sample.to_dict(), until)
        return records.collect(self.path, wanted, [1] * len(prompts), ask, told)

    def texts(self, name: str, prompts) -> list[str]:
        return [record["text"].strip() for record in self.write(name, prompts)]

    def choose(self, name: str, prompts, thought: bool = False) -> np.ndarray:
        """P(A) of each, f64 [N]. Args: thought: behind a chain of thought."""
        if thought:
            asked = [reasoning.think(prompt) for prompt in prompts]
            said = self.write(f"{name}, thought", asked)
            end = reasoning.THEREFORE["choice"]
            prompts = [reasoning.conclude(one, record["text"], end) for one, record in zip(asked, said, strict=True)]

        def told(n, said):
            return {"asked": prompts[n].text, "p": float(judges.first_better([one.logp for one in said])), "cut": said[0].cut}

        ask = judge.letters(self.score, self.loaded, prompts, chat=self.config.chat)
        found = records.collect(self.path, self._wanted(name, prompts), [2] * len(prompts), ask, told)
        return np.array([record["p"] for record in found])

    def document(self, prompt):
        return template.document(self.loaded.tokenizer, prompt, chat=self.config.chat, eos=False)

    def _wanted(self, name, prompts, *settings):
        marks = [records.fingerprint(prompt.text, self.config.chat, self.config.length, *settings) for prompt in prompts]
        return [{"task": name, "id": n, "prompt": mark, "model": self.loaded.digest} for n, mark in enumerate(marks)]


def asker(config, loaded, mesh, path) -> Asker:
    model, length, batch = loaded.model, engine.longest(loaded.model, config.length), config.batch
    score = engine.scorer(model, mesh, batch=batch, length=length)
    generate = engine.generator(model, mesh, loaded.tokenizer, batch=batch, context=length, **config.sample)
    return Asker(loaded, score, generate, path, config)


# --------------------------------------------------------- stages


def critique(config, workdir: Path, stages: launch.Stages | None = None):
    """Leaves revisions.jsonl: prompts with all that was said to them, and the "response" to learn."""
    began, mesh, known = time.monotonic(), shard.make_mesh(**config.mesh), read(**config.constitution)
    ask = asker(config, common.load(config.model.source, config.model, mesh, seed=config.seed), mesh, workdir / "records.jsonl")
    red, helpful = ([row for row in known.prompts if row["kind"] == kind] for kind in ("red_team", "helpful"))
    settings = {"principles": known.principles, "examples": known.examples, "seed": config.seed}
    rows = constitutional.revise(red, write=ask.texts, rounds=config.rounds, **settings)
    said = [(row["responses"][0], row["response"]) for row in rows]
    rows += constitutional.revise(helpful, write=lambda name, *x: ask.texts(f"helpful {name}", *x), rounds=0, **settings)
    kept = [rows[n] for n in order(len(rows), len(rows), seed=config.seed, step=0) if rows[n]["response"]]
    launch.write_rows(workdir / "revisions.jsonl", kept)
    _show(workdir, [(k, row["prompt"], text, _by(row, k)) for row in rows for k, text in enumerate(row["responses"])])
    summary = {"rows": len(kept), "empty": len(rows) - len(kept), "changed": np.mean([a != b for a, b in said])}
    for k, name in enumerate(("first", "last")):
        summary[f"refused/{name}"] = np.mean([metrics.refused(both[k]) for both in said])
        summary[f"words/{name}"] = np.mean([len(both[k].split()) for both in said])
    _end(config, workdir, summary | {"seconds": time.monotonic() - began})


def _by(row, k: int) -> dict:
    """By what revision k came to be."""
    return {"principle": row["principles"][k - 1], "critique": row["critiques"][k - 1]} if k else {}


def label(config, workdir: Path, stages: launch.Stages):
    """Leaves comparisons.jsonl for experiments.reward: two answers, and "won", the probability that the first is better."""
    source = stages.path(config.model.source)
    began, mesh, known = time.monotonic(), shard.make_mesh(**config.mesh), read(**config.constitution)
    load = partial(common.load, mesh=mesh, seed=config.seed)
    path = workdir / "records.jsonl"
    ask = asker(config, load(source, config.model), mesh, path)
    prompts = [constitutional.asked([row["prompt"]]) for row in known.prompts]
    said = ask.write("answer", [x for x in prompts for _ in range(2 * config.label.draws)], ())
    pairs = []
    for n, (one, other) in enumerate(zip(said[::2], said[1::2], strict=True)):
        if one["ids"] != other["ids"]:
            row, prompt = known.prompts[n // config.label.draws], prompts[n // config.label.draws]
            ids = ask.document(prompt).tokens.tolist()
            pairs.append({"row": row, "prompt": prompt.text, "first": one["text"], "second": other["text"]})
            pairs[-1] |= {"prompt_ids": ids, "chosen_ids": one["ids"], "rejected_ids": other["ids"]}
    feedback = asker(config, load(config.feedback_model.source, config.feedback_model), mesh, path)
    choose = partial(feedback.choose, thought=config.label.thought)
    settings = {"count": config.label.principles, "orders": config.label.orders, "seed": config.seed}
    p = constitutional.opinions("label", pairs, known.principles, known.form, choose, **settings)
    won = constitutional.preference(p, clamp=config.label.clamp if config.label.thought else (0.0, 1.0)).tolist()
    with launch.replacing(workdir / "comparisons.jsonl") as write:
        for pair, x in zip(pairs, won, strict=True):
            ids = {name: pair[name] for name in pair if name.endswith("ids")}
            write({"prompt": pair["row"]["prompt"], "chosen": pair["first"], "rejected": pair["second"], "won": x} | ids)
    sides = [("first", 0), ("second", 1)]
    _show(workdir, [(k, y["row"]["prompt"], y[side], {"won": abs(k - x)}) for y, x in zip(pairs, won) for side, k in sides])
    summary = {"comparisons": len(pairs), "equal": len(said) // 2 - len(pairs), **taste(p)}
    summary["sure"] = 2 * np.abs(np.array(won) - 0.5).mean()  # 0: every label is 1/2
    summary |= {"sha256": files.sha256(workdir / "comparisons.jsonl"), "seconds": time.monotonic() - began}
    _end(config, workdir, summary)


def taste(p) -> dict:
    """How much it matters which answer is shown first: the mean P(A), and how often both orders have one winner."""
    told = {"position/first": p.mean()}
    return told | ({"position/consistent": ((p[..., 0] > 0.5) != (p[..., 1] > 0.5)).mean()} if p.shape[-1] == 2 else {})


def _show(workdir, samples):
    rows = [{"step": step, "prompt": prompt, "response": response} | more for step, prompt, response, more in samples]
    launch.write_rows(workdir / "samples.jsonl", rows)


def _end(config, workdir, summary):
    log.write_json(workdir / "config.json", log.plain(config))
    log.write_json(workdir / "summary.json", {name: x if isinstance(x, str) else float(x) for name, x in summary.items()})
    report.write(workdir)


def run(config, workdir: Path):
    mesh, known = shard.make_mesh(**config.mesh), read(**config.constitution)
    stages = launch.Stages(
        workdir, config.stages, {"critique": critique, "sft": sft.run, "label": label, "reward": reward.run, "ppo": ppo.run}
    )
    launch.write_rows(workdir / "prompts.jsonl", known.prompts + known.held_out)  # of PPO, which holds out the same
    revised = str(Path(stages.path(config.stages.sft.data.source)) / "revisions.jsonl")
    config.stages.sft.data.source, config.stages.ppo.prompts.source = revised, str(workdir / "prompts.jsonl")
    config.stages.ppo.evaluate.prompts = len(known.held_out)
    sources_of = {"first": config.model.source, "SL": config.measure.sl_source, "RL": config.measure.rl_source}
    loaded = {name: common.load(stages.path(x), config.model, mesh, seed=config.seed) for name, x in sources_of.items()}
    ask = asker(config, loaded["first"], mesh, workdir / "records.jsonl")
    askers = {name: ask._replace(loaded=loaded[name]) for name in loaded}
    values, samples = measured.of_models(config, askers, mesh, known, sources.read(revised), workdir)
    values |= measured.with_people(config, ask, known)
    _show(workdir, samples)
    summary = {}
    for name, x in values.items():
        summary |= study.over_seeds(name, x)
    study.leave(workdir, config, summary, measured.figures(values), measured.findings(values))


if __name__ == "__main__":
    launch.main(run, "constitutional")
