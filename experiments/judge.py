"""Which of two models' answers is better, by a judge: python -m experiments.judge --config=configs/judge.py

Both orders are judged, for a judge may like what stands first. The answers are two .jsonl files, such as experiments.sample and
experiments.evaluate leave; rows of one id, or else of one prompt, are a pair. Leaves records.jsonl, a line for each pair, and
summary.json; the same command goes on behind the records that are there.
"""

import time
from pathlib import Path

import jax
import numpy as np

from experiments import common, ensemble, launch
from jaxalign import shard
from jaxalign.data import sources, tables, text
from jaxalign.evaluation import engine, judges, records, statistics
from jaxalign.prompts import template
from jaxalign.train import log


def pairs(ours: str, theirs: str, *, key: str, prompt: str, answer: str) -> list[dict]:
    """Rows {"id", "question", "ours", "theirs"} of what both files have. ValueError for an id twice, and where they share none.

    Args: key: the column that tells which rows are a pair; prompt, answer: filled by each row's columns.
    """

    def read(source):
        rows = common.read_rows(source, 0, seed=0)
        sources.require(rows, (key,), source)
        found = {str(row[key]): row for row in rows}
        if len(found) < len(rows):
            raise ValueError(f"{source}: {len(rows) - len(found)} rows have the '{key}' of another one: which are a pair?")
        try:
            made = template.each(lambda row: (text.fill(prompt, row), text.fill(answer, row).strip()), rows)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return dict(zip(found, made, strict=True))

    one, other = read(ours), read(theirs)
    both = [name for name in one if name in other]
    if not both:
        raise ValueError(f"{ours} and {theirs} have no '{key}' in common")
    if len(both) < max(len(one), len(other)):
        log.say(f"{len(both)} pairs; {len(one) - len(both)} rows of {ours} and {len(other) - len(both)} of {theirs} are of none")
    return [{"id": name, "question": one[name][0], "ours": one[name][1], "theirs": other[name][1]} for name in both]


def outcome(first: float, second: float) -> float:
    """1 where the first is more, 0.5 where both are equal, else 0."""
    return float((np.sign(first - second) + 1) / 2)


def letters(score, loaded, prompts, *, chat: bool):
    """-> ask(numbers, tell), for records.collect: request 2n is the log-probability of (A) behind prompts[n], and 2n + 1 of (B).

    Args: score: engine.scorer of the loaded model.
    """
    how = {"chat": chat, "eos": False, "start": common.start_of(loaded.model)}

    def both(prompt):
        return judges.apart(*(template.document(loaded.tokenizer, prompt, letter, **how) for letter in judges.LETTERS))

    def ask(numbers, tell):
        asked = {n: both(prompts[n]) for n in dict.fromkeys(k // 2 for k in numbers)}
        score(loaded.params, [asked[k // 2][k % 2] for k in numbers], tell)

    return ask


def by_prompt(config, loaded, mesh, rows):
    """A judge who reads both answers and says (A) or (B). -> (how it is asked, requests a pair, ask, judge), for records.collect"""
    form, length = template.load(config.template), engine.longest(loaded.model, config.length)
    prompts = [prompt for row in rows for prompt in judges.in_both_orders(form, row, row["ours"], row["theirs"])]

    def judge(n, said):
        logp = np.reshape([one.logp for one in said], (2, 2))  # (A) is ours in the first order, theirs in the second
        won = [outcome(*logp[0]), outcome(*logp[1][::-1])]
        return {"p_first": judges.first_better(logp).tolist(), "won": won, "cut": any(one.cut for one in said)}

    score = engine.scorer(loaded.model, mesh, batch=config.batch, length=length)
    ask = letters(score, loaded, prompts, chat=config.chat)
    return [template.fingerprint(form), config.chat, length], 4, ask, judge


def by_reward(config, loaded, mesh, rows):
    """A reward model, which reads each answer alone, so that there is no order. Arguments and results as of `by_prompt`."""
    first, judges, scores = loaded
    tokenizer, start = first.tokenizer, common.start_of(first.model)
    length = engine.longest(first.model, config.length)
    work = shard.on_mesh(jax.jit(scores), mesh)

    def document(n):
        row = rows[n // 2]
        found = common.document(tokenizer, row["question"], row[("ours", "theirs")[n % 2]], chat=config.chat, start=start)
        return text.fit(found, length, keep="end", source_length=length)

    def ask(numbers, tell):
        order = sorted(range(len(numbers)), key=lambda k: -len(document(numbers[k]).tokens))
        for part, count in common.parts(order, config.batch):
            found = [document(numbers[k]) for k in part]
            longest = [max(0 if x is None else len(x) for x in of) for of in ([d.tokens for d in found], [d.source for d in found])]
            batch = tables.pad(found, engine.columns(longest[0]), source_length=longest[1] and engine.columns(longest[1]))
            said = shard.fetch(work(judges, shard.place(tables.check(batch, first.model.config.vocab), mesh)))
            for k, x in list(zip(part, said))[:count]:
                tell(k, float(x))

    def judge(n, said):
        return {"scores": said, "won": [outcome(*said)] * 2, "cut": False}

    return ["reward", config.chat, length], 2, ask, judge


def run(config, workdir: Path):
    """Judge all pairs, write the records, and say how often ours won."""
    began, mesh = time.monotonic(), shard.make_mesh(**config.mesh)
    rows = pairs(config.ours, config.theirs, **config.pairs)
    if config.reward:
        loaded = ensemble.load(config.model.source, config.model, mesh, seed=config.seed, doubt=0.0)
        first, made = loaded[0], by_reward(config, loaded, mesh, rows)
    else:
        first = loaded = common.load(config.model.source, config.model, mesh, seed=config.seed)
        made = by_prompt(config, loaded, mesh, rows)
    how, count, ask, judge = made
    model = records.fingerprint(first.digest, first.tokenizer_digest, config.model.dtype)
    wanted = [{"task": "judge", "id": row["id"], "prompt": records.fingerprint(row, how), "model": model} for row in rows]
    found = records.collect(workdir / "records.jsonl", wanted, [count] * len(rows), ask, lambda n, said: rows[n] | judge(n, said))
    won = np.array([record["won"] for record in found])
    longer = [len(row["ours"]) - len(row["theirs"]) for row in rows]
    told = {f"win/{name}": x for name, x in statistics.win_rate(won).items()}
    told["win/error"] = statistics.mean(won.mean(1)).error
    told["win/length_controlled"], told["win/length_controlled_error"] = statistics.length_controlled(won.mean(1), longer)
    told |= {"longer_by": float(np.mean(longer)), "cut": sum(record["cut"] for record in found), "judge": model}
    log.write_json(workdir / "config.json", log.plain(config))
    log.write_json(workdir / "summary.json", told | {"seconds": time.monotonic() - began})
    for name, x in told.items():
        log.say(f"{name:32} {x if isinstance(x, str) else round(x, 3)}")


if __name__ == "__main__":
    launch.main(run, "judge")
