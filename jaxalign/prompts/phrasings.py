"""Many ways to put one task, as FLAN has them: templates by task, one of which is drawn for each row. Wei et al. 2022."""

from pathlib import Path

import numpy as np

from jaxalign.models.files import read_json
from jaxalign.prompts.template import Template

OTHERS = "*"  # the name of those for tasks, and categories, that have none of their own


def load(path) -> dict[str, list[Template]]:
    """{task, category or "*": templates} of a .json file, {name: [fields of `Template`, ...]}. ValueError names the place."""
    found = {}
    for name, said in read_json(Path(path)).items():
        if not isinstance(said, list) or not said:
            raise ValueError(f"{path}, {name}: a list of templates, one or more")
        for number, fields in enumerate(said):
            try:
                found.setdefault(name, []).append(Template(**fields))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, {name}, template {number}: {error}") from error
    return found


def drawn(rows: list[dict], known: dict[str, list[Template]], *, seed: int) -> list[Template]:
    """The template of each row: one of its task's, else of its category's, else of "*", by (seed, its number).

    ValueError where there is none.
    """
    bits = np.random.Philox(key=np.array([seed, 0], np.uint64)).random_raw(len(rows))
    found = []
    for row, draw in zip(rows, bits.tolist(), strict=True):
        name = next((name for name in (row["task"], row["category"], OTHERS) if name in known), None)
        if name is None:
            raise ValueError(f"no template for task {row['task']!r}, its category {row['category']!r}, or {OTHERS!r}")
        found.append(known[name][draw % len(known[name])])
    return found
