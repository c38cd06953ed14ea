"""Imports flow one way, and libraries stay in their rooms."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("jaxalign", "experiments", "configs")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
ROOMS = [  # of jaxalign; each may import those before it, and itself
    *(
        "types",
        "keys",
        "ops",
        "shard",
        "models",
        "score",
        "sample",
        "objectives",
        "train.step",
        "train.optim",
        "rewards",
        "rollout",
    ),
    *("data", "prompts", "train.checkpoint", "train.log", "train.chart", "train.report", "train.watch", "train.loop"),
    *("evaluation", "feedback"),
    *("oracle", "contract"),
]
ONLY_IN = {  # a library: where it may be imported
    "flax.linen": ("jaxalign.models",),
    "orbax": ("jaxalign.train.checkpoint",),
    "transformers": ("jaxalign.data", "jaxalign.models.checkpoints", "jaxalign.models.names"),
    "datasets": ("jaxalign.data", "jaxalign.models.checkpoints", "jaxalign.models.names"),
    "absl": ("experiments",),
    "experiments": ("experiments",),
    "configs": ("configs",),
}
NOWHERE = ("flax.nnx", "torch")  # what may run a stranger's code: tests/test_security.py


def inside(module, places) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


def imported(tree):
    """The modules and names that a file imports, anywhere in it: "flax.linen" for `from flax import linen`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room_of(module):
    """Its place in ROOMS. ValueError for a module of no room."""
    name = module.removeprefix("jaxalign.")
    for place, room in enumerate(ROOMS):
        if inside(name, [room]):
            return place
    raise ValueError(f"jaxalign.{name} is in no room: say in ROOMS what it may import")


def faults(module, source) -> list[str]:
    tree, found = ast.parse(source), []
    for name in imported(tree):
        found += [
            f"{name} outside of {places}"
            for library, places in ONLY_IN.items()
            if inside(name, [library]) and not inside(module, places)
        ]
        found += [f"imports {name}" for library in NOWHERE if inside(name, [library])]
        if inside(module, ["configs"]) and not inside(name, ["ml_collections", "configs"]):
            found.append(f"a config imports {name}")
        if not inside(module, ["jaxalign"]) or not inside(name, ["jaxalign"]):
            continue
        target = name if name in FILES else name.rpartition(".")[0]
        if target not in ("jaxalign", module) and room_of(target) > room_of(module):
            found.append(f"{module} imports {target}, which comes after it")
        if module == "jaxalign.train.step" and inside(target, ["jaxalign.objectives"]):
            found.append(f"{module} imports {target}: a step knows no objective")
    return found


@pytest.mark.parametrize("module", list(FILES))
def test_a_module_stays_in_its_room(module):
    assert not faults(module, FILES[module].read_text())


@pytest.mark.parametrize(
    "module, source",
    [
        ("jaxalign.ops.masked", "from jaxalign import score"),
        ("jaxalign.score", "def f():\n    from jaxalign.objectives.online import ppo"),
        ("jaxalign.train.step", "from jaxalign.objectives import online"),
        ("jaxalign.objectives.online", "import jaxalign.train.step"),
        ("jaxalign.rewards", "from jaxalign.train import log"),
        ("jaxalign.train.loop", "from jaxalign import feedback"),
        ("jaxalign.shard", "import flax.linen as nn"),
        ("jaxalign.models.decoder", "from flax import nnx"),
        ("jaxalign.train.loop", "import orbax.checkpoint"),
        ("jaxalign.models.decoder", "import transformers"),
        ("jaxalign.sample", "from datasets import load_dataset"),
        ("jaxalign.train.log", "from absl import flags"),
        ("jaxalign.types", "import experiments.common"),
        ("configs.ppo", "from jaxalign import types"),
        ("experiments.ppo", "import torch"),
    ],
)
def test_what_leaves_its_room_is_seen(module, source):
    assert faults(module, source)


def test_a_module_without_a_room_is_an_error():
    with pytest.raises(ValueError, match="no room"):
        faults("jaxalign.attic", "import jaxalign.types")
