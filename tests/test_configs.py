"""Every configuration is complete and read: its sections are the arguments of the functions that they are for."""

import inspect
import json
import re
import runpy
from pathlib import Path

import pytest

from experiments import common, new_objective, reward, sft
from jaxalign import rollout, sample, shard
from jaxalign.models.decoder import DecoderConfig
from jaxalign.objectives import online, supervised
from jaxalign.objectives import reward as reward_objectives
from jaxalign.ops import advantages
from jaxalign.train import log, optim

ROOT = Path(__file__).parents[1]
FILES = {path.stem: path for path in sorted((ROOT / "configs").glob("[a-z]*.py"))}
BUILT = [(name, variant) for name, path in FILES.items() for variant in (None, *runpy.run_path(str(path)).get("VARIANTS", ()))]

# section: (the function that it is splatted into, the arguments that the driver gives beside it)
MESH = {"mesh": (shard.make_mesh, ())}
SAMPLE = {"sample": (sample.sample, ("model", "params", "keys", "prompts", "eos"))}
OPTIM = {"optim": (optim.adam, ("steps",))}
PROMPTS = {"prompts": (common.openings, ("tokenizer", "seed"))}
FINE_TUNING = {
    **MESH,
    **OPTIM,
    "data": (sft.documents, ("tokenizer", "seed")),
    "scratch.architecture": (DecoderConfig, ("vocab", "dtype", "remat")),
}
SPLATTED = {
    "sample": {**MESH, **SAMPLE},
    "sft": {**FINE_TUNING, "objective": (supervised.sft, ("params", "data", "model"))},
    "new_objective": {**FINE_TUNING, "objective": (new_objective.trusting_sft, ("params", "data", "model"))},
    "compare": {**MESH, **SAMPLE, **PROMPTS},
    "reward": {
        **MESH,
        **OPTIM,
        "data": (reward.comparisons, ("tokenizer",)),
        "objective": (reward_objectives.pairwise, ("params", "data", "model")),
    },
    "ppo": {
        **MESH,
        **SAMPLE,
        **OPTIM,
        **PROMPTS,
        "unended": (advantages.without_eos, ("score", "has_eos")),
        "advantage": (rollout.assemble, ("batch", "logp", "ref_logp", "value", "scores", "beta")),
        "objective": (online.ppo, ("params", "data", "model", "temperature")),
    },
}


def built(name, variant):
    make = runpy.run_path(str(FILES[name]))["get_config"]
    return make(variant) if variant else make()


def every(config, name):
    """The config and those of its stages. Yields (the name of its file, config)"""
    yield name, config
    yield from config.get("stages", {}).items()


def section(config, path):
    for part in path.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("name, variant", BUILT)
def test_a_section_is_what_its_function_takes(name, variant):
    """Neither an argument that the function does not know nor, without a default of its own, one that is missing."""
    for kind, config in every(built(name, variant), name):
        for path, (function, given) in SPLATTED[kind].items():
            settings = section(config, path).to_dict()
            assert not settings.keys() & set(given), f"{kind}: the driver gives these beside {path}"
            inspect.signature(function).bind(**settings, **dict.fromkeys(given))


@pytest.mark.parametrize("name", FILES)
def test_a_driver_splats_no_other_section(name):
    driver = "sft" if name == "new_objective" else name
    found = re.findall(r"\*\*(?:job\.)?config\.([\w.]+)", (ROOT / "experiments" / f"{driver}.py").read_text())
    assert found and set(found) <= SPLATTED[name].keys()


@pytest.mark.parametrize("name, variant", BUILT)
def test_every_other_setting_is_named_in_a_driver(name, variant):
    drivers = "".join(path.read_text() for path in (ROOT / "experiments").glob("*.py"))
    for kind, config in every(built(name, variant), name):
        for path in [path for path in log.flat(json.loads(config.to_json_best_effort())) if not path.startswith("stages")]:
            if not any(path.startswith(f"{splatted}.") for splatted in SPLATTED[kind]):
                parent, _, key = f"config.{path}".rpartition(".")
                names = parent.rpartition(".")[2] + ("|settings" if parent.endswith("model") else "")
                assert re.search(rf"\b({names})\.{key}\b", drivers), f"{kind}: nothing reads {path}"


@pytest.mark.parametrize("name, variant", BUILT)
def test_a_config_is_json_and_the_same_each_time(name, variant):
    config = built(name, variant)
    assert json.loads(json.dumps(log.plain(config), allow_nan=False)) == log.plain(config) == log.plain(built(name, variant))


@pytest.mark.parametrize("name, variant", BUILT)
def test_one_seed_is_the_seed_of_every_stage(name, variant):
    config = built(name, variant)
    config.seed = 7
    assert {kind: settings.copy_and_resolve_references().seed for kind, settings in every(config, name)} == {
        kind: 7 for kind, _ in every(config, name)
    }


@pytest.mark.parametrize("name, variant", BUILT)
def test_a_stage_that_is_named_is_there_and_no_other(name, variant):
    """stage:NAME in a source means config.stages.NAME; a stage that nothing names would be settings without a meaning."""
    config = built(name, variant)
    sources = [
        value for _, part in every(config, name) for key, value in log.flat(part.to_dict()).items() if key.endswith("source")
    ]
    named = {value.removeprefix("stage:") for value in sources if value.startswith("stage:")}
    assert named == set(config.get("stages", ()))


def test_the_commands_of_the_docstrings_name_variants_that_exist():
    for path in FILES.values():
        for file, variant in re.findall(r"--config=(configs/\w+\.py):?(\w*)", path.read_text()):
            assert not variant or variant in runpy.run_path(str(ROOT / file))["VARIANTS"], f"{path}: {file}:{variant}"


@pytest.mark.parametrize("name", FILES)
def test_a_setting_that_does_not_exist_cannot_be_set(name):
    config = built(name, None).lock()
    with pytest.raises(AttributeError):
        config.sed = 1
    with pytest.raises((TypeError, ValueError)):
        config.seed = "one"
