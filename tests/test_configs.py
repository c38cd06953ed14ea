"""Every configuration is complete and read: its sections are the arguments of the functions that they are for."""

import inspect
import json
import re
import runpy
from pathlib import Path

import pytest

from configs import LOOP, ppo
from experiments import common, new_objective, reward, sft
from jaxalign import rewards, rollout, sample, shard
from jaxalign.models.decoder import DecoderConfig
from jaxalign.objectives import online, supervised
from jaxalign.objectives import reward as reward_objectives
from jaxalign.ops import advantages
from jaxalign.train import log, loop, optim

ROOT = Path(__file__).parents[1]
FILES = {path.stem: path for path in sorted((ROOT / "configs").glob("[a-z]*.py"))}
BUILT = [(name, variant) for name, path in FILES.items() for variant in (None, *runpy.run_path(str(path)).get("VARIANTS", ()))]

# section: (the function that it is splatted into, the arguments that are not for a config to say: the driver's, and tests')
MESH = {"mesh": (shard.make_mesh, ("devices",))}
SAMPLE = {"sample": (sample.sample, ("model", "params", "keys", "prompts", "eos"))}
TRAINING = {
    "optim": (optim.adam, ("steps",)),
    "loop": (
        loop.fit,
        ("step", "state", "data_at", "workdir", "stop", "config", "identity", "hooks", "tokens_per_step"),
    ),
}
PROMPTS = {"prompts": (common.openings, ("tokenizer", "seed"))}
FINE_TUNING = {
    **MESH,
    **TRAINING,
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
        **TRAINING,
        "data": (reward.comparisons, ("tokenizer",)),
        "objective": (reward_objectives.pairwise, ("params", "data", "model")),
    },
    "ppo": {
        **MESH,
        **SAMPLE,
        **TRAINING,
        **PROMPTS,
        "unended": (advantages.without_eos, ("score", "has_eos")),
        "advantage": (rollout.assemble, ("batch", "logp", "ref_logp", "value", "scores", "beta")),
        "objective": (online.ppo, ("params", "data", "model", "temperature")),
    },
}
SPARSE = {"scratch.architecture"}  # says what differs from the plainest Llama; any other section has every argument


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
    """No argument that the function does not know, and none that it has is missing: a config file is complete."""
    for kind, config in every(built(name, variant), name):
        for path, (function, given) in SPLATTED[kind].items():
            settings, taken = section(config, path).to_dict(), inspect.signature(function)
            assert not settings.keys() & set(given), f"{kind}: the driver gives these beside {path}"
            taken.bind(**settings, **dict.fromkeys(given))
            if path not in SPARSE:
                assert settings.keys() | set(given) == taken.parameters.keys(), f"{kind}.{path}"


@pytest.mark.parametrize("variant", ppo.VARIANTS)
def test_the_price_of_kl_has_every_setting_of_its_controller(variant):
    settings = ppo.get_config(variant).kl.to_dict()
    assert settings.keys() | {"kl", "episodes"} == inspect.signature(rewards.update_beta).parameters.keys()


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
def test_what_is_said_once_holds_for_every_stage(name, variant):
    """The seed and the mesh for all; the model for those that start from the same one as the config itself."""
    config = built(name, variant)
    same = {kind for kind, settings in every(config, name) if settings.model.source == config.model.source}
    config.seed = 7
    config.mesh.update(data=1, fsdp=4, tensor=2)
    config.model.update(source="there", tokenizer="its", dtype="bfloat16", remat="full")
    for kind, settings in every(config, name):
        found = log.plain(settings.copy_and_resolve_references())
        assert found["seed"] == 7 and found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
        assert (found["model"] == config.model.to_dict()) == (kind in same), kind


@pytest.mark.parametrize("setting", ["norm", "activation", "positions", "remat"])
def test_an_architecture_of_an_unknown_kind_is_refused(setting):
    settings = built("sft", "tiny").scratch.architecture.to_dict()
    with pytest.raises(ValueError, match=f"{setting} = 'swish'; there are "):
        DecoderConfig(vocab=9, **(settings | {setting: "swish"}))


def test_no_variant_changes_what_the_configs_share():
    before = dict(LOOP)
    for name, variant in BUILT:
        for _, config in every(built(name, variant), name):
            if "loop" in config:
                config.loop.update(log_every=999, sinks=("tensorboard",))
    assert before == LOOP


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


def test_a_stage_can_be_changed_alone():
    config = built("ppo", "tiny")
    config.stages.compare.model.dtype = "bfloat16"
    assert config.model.dtype == config.stages.reward.model.dtype == "float32"
