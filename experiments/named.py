"""Objectives that a config names: {"name": "dpo", "beta": 0.1, ...} is a public function of one module and all of its arguments."""

import inspect
from functools import partial


def objectives(module) -> dict:
    """{name: function} of a module's own objectives: (params, data, *, model, ...), nothing said of what is returned."""

    def is_one(name, x):
        if name.startswith("_") or not inspect.isfunction(x) or x.__module__ != module.__name__:
            return False
        taken = inspect.signature(x)
        return [*taken.parameters][:2] == ["params", "data"] and taken.return_annotation is taken.empty

    return {name: x for name, x in vars(module).items() if is_one(name, x)}


def hyperparameters(objective) -> dict:
    """{name: its default, or inspect.Parameter.empty} of all that a config says of an objective."""
    taken = inspect.signature(objective).parameters
    return {name: x.default for name, x in taken.items() if x.kind is x.KEYWORD_ONLY and name != "model"}


def resolve(module, settings, own=None):
    """-> (the objective with its hyperparameters bound, the type that it says for its `data`)

    Args:
        settings: the config's section; its name is looked for among `objectives` of this one module, and nowhere else.
        own: one's own objective, whatever the name; the rest of the section is its.
    Raises ValueError where there is no such objective, or where the rest of the section is not what it takes.
    """
    hyper = dict(settings)
    name, known = hyper.pop("name", ""), objectives(module)
    if own is not None:
        name, known = own.__name__, {own.__name__: own}
    if name not in known:
        raise ValueError(f"objective.name = {name!r}: the objectives of {module.__name__} are {', '.join(known)}")
    taken = hyperparameters(known[name])
    unknown, missing = (", ".join(sorted(found)) for found in (hyper.keys() - taken.keys(), taken.keys() - hyper.keys()))
    if unknown or missing:
        wrong = "; ".join(f"{found} {verb}" for found, verb in ((unknown, "is not of these"), (missing, "is missing")) if found)
        all_of = ", ".join(taken) or "nothing beside its name"
        raise ValueError(
            f"objective: {name} takes {all_of}; {wrong}. Take the config's variant of that name, or set all of the section"
        )
    return partial(known[name], **hyper), inspect.signature(known[name]).parameters["data"].annotation
