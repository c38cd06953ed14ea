"""Collections of tasks with instructions, as rows; which tasks are held out; and how much of each task a model learns from.

A row: {"id", "task", "category", "definition", "input", "targets": list of right answers}, and, where the source has them,
"positive" and "negative": lists of {"input", "output", "explanation"}, which are right and wrong, and told why.
"""

from pathlib import Path

import numpy as np

from jaxalign.data import sources, tables
from jaxalign.data.sources import brief
from jaxalign.models.files import read_json

COLUMNS = ("task", "category", "definition", "input", "targets")


def read(source: str, *, examples: int = 2) -> list[dict]:
    """The rows of `source`:

        folder, or path.json    tasks as Natural Instructions and Super-NaturalInstructions have them (Mishra et al. 2022, Wang et
                                al. 2022), a file each: "Definition", "Positive Examples", "Negative Examples", "Instances"
        path.jsonl, or .gz      rows, or tasks as Self-Instruct's seeds are: {"id", "name", "instruction", "instances"}

    Args: examples: at most so many positive and so many negative ones of a task. Raises as `sources.read`, naming file and task.
    """
    path = Path(source)
    if path.is_dir() or path.suffix == ".json":
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        rows = [row for file in files for row in natural_instructions(read_json(file), file.stem, examples=examples)]
        if not rows:
            raise ValueError(f"{source}: holds no instances; a task is a .json file")
        return rows
    rows = sources.read(source)
    if "instances" in rows[0]:
        sources.require(rows, ("id", "name", "instruction", "instances"), source)
        return [row for task in rows for row in _seed(task)]
    sources.require(rows, COLUMNS, source)
    return rows


def natural_instructions(task: dict, name: str, *, examples: int = 2) -> list[dict]:
    """The rows of one task. "Definition" and "output" are a text or a list of them. ValueError where something is missing."""
    if missing := [key for key in ("Definition", "Instances") if not task.get(key)]:
        raise ValueError(f"task {name} has no {' and no '.join(map(repr, missing))}: is it a file of Natural Instructions?")
    about = {
        "task": name,
        "category": _texts(task.get("Categories") or name)[0],
        "definition": _texts(task["Definition"])[0].strip(),
        "positive": task.get("Positive Examples", [])[:examples],
        "negative": task.get("Negative Examples", [])[:examples],
    }
    rows = []
    for n, instance in enumerate(task["Instances"]):
        targets = _texts(instance.get("output"))
        if not targets or not isinstance(given := instance.get("input"), str):
            raise ValueError(f"task {name}, instance {n}: an instance is {{'input': text, 'output': texts}}, not {brief(instance)}")
        rows.append({"id": instance.get("id", f"{name}-{n}"), **about, "input": given.strip(), "targets": targets})
    return rows


def _texts(x) -> list[str]:
    return [x] if isinstance(x, str) else [each for each in x or [] if isinstance(each, str)]


def _seed(task: dict) -> list[dict]:
    about = {"task": task["id"], "category": task["name"], "definition": task["instruction"]}
    return [
        {"id": f"{task['id']}-{n}", **about, "input": each["input"], "targets": [each["output"]]}
        for n, each in enumerate(task["instances"])
    ]


def hold_out(rows: list[dict], names) -> tuple[list[dict], list[dict]]:
    """(rows of the other tasks, rows of the tasks or categories of these names), in their order.

    A task that goes by a held-out one's definition is held out with it. ValueError for a name that is none, and for an empty side.
    """
    known = {row[key] for row in rows for key in ("task", "category")}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"no task and no category is named {', '.join(map(repr, unknown))}; there are {', '.join(sorted(known))}")
    told = {row["definition"] for row in rows if row["task"] in names or row["category"] in names}
    sides = [row for row in rows if row["definition"] not in told], [row for row in rows if row["definition"] in told]
    if not all(sides):
        raise ValueError(f"{len(set(names))} names are held out of {len(known)}: at least one task must be on each side")
    return sides


def rates(sizes, *, cap: float, temperature: float = 1.0) -> np.ndarray:
    """The share of each task in a mixture: r_m = min(e_m, cap) / sum_n min(e_n, cap), then r_m^(1/T), normalised. -> f64 [tasks]

    Raffel et al. 2020 section 3.5.2: in proportion to examples e_m, up to a cap (FLAN, Wei et al. 2022: 3000), so no large task
    drowns others. T = inf: all alike. ValueError for a size or cap below 1, and a temperature that is not above 0.
    """
    sizes = np.asarray(sizes, np.float64)
    if not (len(sizes) and sizes.min() >= 1 and cap >= 1 and temperature > 0):
        raise ValueError(f"sizes = {sizes.tolist()}, cap = {cap}, temperature = {temperature}: from 1, from 1, and above 0")
    share = np.minimum(sizes, cap)
    share = (share / share.sum()) ** (1 / temperature)
    return share / share.sum()


def mixture(rows: list[dict], count: int, *, cap: float, temperature: float = 1.0, seed: int) -> list[dict]:
    """`count` rows, of each task its share by `rates`, to less than one row (largest remainder).

    A task's rows come in an order drawn by the seed, all of them once before any comes again. Which share a task has, and which of
    its rows come first, does not depend on the order of the tasks; the result goes by tasks, so shuffle it.
    """
    tasks = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    tasks = dict(sorted(tasks.items()))
    wanted = count * rates([*map(len, tasks.values())], cap=cap, temperature=temperature)
    counts = np.floor(wanted + 1e-9).astype(int)
    counts[np.argsort(counts - wanted, kind="stable")[: count - counts.sum()]] += 1
    return [
        own[k]
        for own, many in zip(tasks.values(), counts, strict=True)
        if many
        for k in tables.order(len(own), many, seed=seed, step=0)
    ]
