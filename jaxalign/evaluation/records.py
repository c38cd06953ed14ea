"""What an evaluation leaves: a line of a .jsonl file for each example, from which all figures are made again.

A record is {"task": ..., "id": ..., "prompt": fingerprint, "model": fingerprint, and what was found}. The first four tell it from
others, so an evaluation that was interrupted goes on behind the records that are there.
"""

import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np

from jaxalign import shard
from jaxalign.evaluation import statistics
from jaxalign.train import log

KEY = ("task", "id", "prompt", "model")


def fingerprint(*what) -> str:
    """Of values that JSON can say: equal for equal ones."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def collect(path, wanted: list[dict], counts: list[int], ask, judge) -> list[dict]:
    """The records of examples: those that the file has, and those that are found now, which are written as they come.

    Args:
        wanted: of each example what KEY names.
        counts: how many requests each example makes; requests are numbered through all examples.
        ask: (numbers, tell) answers the requests of these numbers, and calls tell(k, answer) for numbers[k], in any order.
        judge: (n, answers) -> {name: value}, what is found of example n.
    """
    have = {_key(record): record for record in log.read_lines(path)}
    shard.together("read records")
    ends = np.cumsum([0, *counts])
    missing = [n for n, about in enumerate(wanted) if _key(about) not in have]
    owners = [(n, request) for n in missing for request in range(ends[n], ends[n + 1])]
    answers = {n: {} for n in missing}
    with open(_writable(path), "a", encoding="utf-8", buffering=1) as file:

        def tell(k, answer):
            n, request = owners[k]
            answers[n][request] = answer
            if len(answers[n]) == counts[n]:
                found = judge(n, [answers[n][request] for request in sorted(answers[n])])
                record = {name: wanted[n][name] for name in KEY} | found
                have[_key(record)] = record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

        if owners:
            ask([request for _, request in owners], tell)
    return [have[_key(about)] for about in wanted]


def summary(records: list[dict], names, *, clusters=None, seed: int = 0) -> dict:
    """Of each task, and of all: "count", and for each name its mean and standard error, "accuracy" and "accuracy_error".

    Of all there are two: "micro", over examples, its error clustered; "macro", over tasks, its error by bootstrap.
    Args: clusters: of each record, what hangs together; None: tasks.
    """
    tasks = [record["task"] for record in records]
    clusters = tasks if clusters is None else clusters
    whole = {task: {"count": tasks.count(task)} for task in dict.fromkeys(tasks)} | {"micro": {"count": len(records)}}
    whole["macro"] = {"count": len(set(tasks))}
    for name in names:
        x = np.array([record[name] for record in records], np.float64)
        found = {task: statistics.mean(x[[other == task for other in tasks]]) for task in dict.fromkeys(tasks)}
        found |= {
            "micro": statistics.clustered(x, clusters),
            "macro": statistics.macro(x, tasks, seed=seed),
        }
        for part, (value, error) in found.items():
            whole[part] |= {name: value, f"{name}_error": error}
    return whole


def difference(before: list[dict], after: list[dict], name: str) -> dict:
    """Of two models, or two ways to ask one: what `after` has more of, on the examples that both have, and its standard error.

    Paired: what makes an example easy or hard for both is no noise. Raises ValueError where they share no example.
    """
    known = {(record["task"], record["id"]): record[name] for record in before}
    pairs = [(known[found], record[name]) for record in after if (found := (record["task"], record["id"])) in known]
    if not pairs:
        raise ValueError(f"these {len(before)} and {len(after)} records are of no example in common")
    old, new = np.array(pairs, np.float64).T
    value, error = statistics.mean(new - old)
    return {"count": len(pairs), "before": old.mean(), "after": new.mean(), "difference": value, "error": error}


def _key(record: dict) -> tuple:
    return tuple(record[name] for name in KEY)


def _writable(path) -> Path:
    """Where this process may add lines: process 0 to the file, behind its last whole line, and the others nowhere."""
    if jax.process_index():
        return Path(os.devnull)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with open(path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    return path
