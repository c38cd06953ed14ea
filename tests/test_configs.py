"""Every configuration is complete and read: its sections are the arguments of the functions that they are for."""

import inspect
import json
import math
import re
import runpy
from functools import partial
from pathlib import Path

import jax
import pytest

from configs import LOOP, annotators, hypergradient, knowledge, label, overoptimization, ppo, sweep
from experiments import (
    classify,
    common,
    constitutional,
    evaluate,
    instruct,
    judge,
    named,
    new_objective,
    prompt,
    reward,
    self_improve,
    self_instruct,
    sft,
)
from experiments.settings import RULES, check
from jaxalign import rewards, rollout, sample, shard
from jaxalign.feedback import self_instruct as feedback_self_instruct
from jaxalign.models.decoder import DecoderConfig
from jaxalign.models.encdec import EncDecConfig
from jaxalign.models.parts import Adapter
from jaxalign.objectives import distill as distill_objectives
from jaxalign.objectives import online, supervised
from jaxalign.objectives import preference as preference_objectives
from jaxalign.objectives import reward as reward_objectives
from jaxalign.ops import advantages
from jaxalign.train import log, loop, optim, step

ROOT = Path(__file__).parents[1]
OTHERS = (
    "annotators",
    "hypergradient",
    "knowledge",
    "label",
    "overoptimization",
    "sweep",
)  # no model and no loop; other tests have them
FILES = {path.stem: path for path in sorted((ROOT / "configs").glob("[a-z]*.py")) if path.stem not in OTHERS}
BUILT = [(name, variant) for name, path in FILES.items() for variant in (None, *runpy.run_path(str(path)).get("VARIANTS", ()))]

# section: (the function that it is splatted into, the arguments that are not for a config to say: the driver's, and tests')
MESH = {"mesh": (shard.make_mesh, ("devices",))}
SAMPLE = {"sample": (sample.sample, ("model", "params", "keys", "prompts", "eos", "allowed", "until"))}
TRAINING = {
    "optim": (optim.adam, ("steps",)),
    "guard": (step.make_step, ("objective", "tx", "accumulate", "hold_above")),
    "loop": (
        loop.fit,
        ("step", "state", "data_at", "workdir", "stop", "config", "identity", "hooks", "tokens_per_step"),
    ),
}
ADAPTER = {"adapter": (Adapter, ())}
PROMPTS = {"prompts": (common.openings, ("tokenizer", "seed", "start"))}
FINE_TUNING = {
    **MESH,
    **TRAINING,
    **ADAPTER,
    "data": (sft.documents, ("tokenizer", "seed", "start")),
    "scratch.architecture": (DecoderConfig, ("vocab", "dtype", "remat")),
    "evaluate": (evaluate.hook, ("loaded", "mesh", "workdir")),
}
CONSTITUTION = {"constitution": (constitutional.read, ())}
ASKED = {"task": (prompt.task_of, ("seed",))}
GIVEN = ("batch", "logp", "ref_logp", "value", "scores", "beta")
EARNED = (*GIVEN, "earned")
SPLATTED = {
    "sample": {**MESH, **SAMPLE},
    "harness": MESH,
    "prompt": {
        **MESH,
        **ASKED,
        "curve": (prompt.curves, ("ask", "task")),
        **{f"beside.{name}": (prompt.Pupil, ()) for name in ("sft", "grpo", "sft_grpo", "sft_thought")},
    },
    "prompt_search": {**MESH, **ASKED},
    "evaluate": {**MESH, **SAMPLE},
    "judge": {**MESH, "pairs": (judge.pairs, ("ours", "theirs"))},
    "sft": {**FINE_TUNING, "objective": (supervised.sft, ("params", "data", "model"))},
    "new_objective": {**FINE_TUNING, "objective": (new_objective.trusting_sft, ("params", "data", "model"))},
    "compare": {**MESH, **SAMPLE, **PROMPTS},
    "reward": {
        **MESH,
        **TRAINING,
        **ADAPTER,
        "data": (reward.comparisons, ("tokenizer", "vocab", "start")),
    },
    "preference": {**MESH, **SAMPLE, **TRAINING, **ADAPTER, "data": (reward.comparisons, ("tokenizer", "vocab", "start"))},
    "ppo": {
        **MESH,
        **SAMPLE,
        **TRAINING,
        **PROMPTS,
        **ADAPTER,
        "unended": (advantages.without_eos, ("score", "has_eos")),
        "advantage": (rollout.assemble, EARNED),
        "objective": (online.ppo, ("params", "data", "model", "temperature")),
    },
}
SAMPLED = {name: found for name, found in SPLATTED["ppo"].items() if name not in ("advantage", "objective")}
OF_GROUPS = {**SAMPLED, "advantage": (rollout.assemble_groups, (*GIVEN, "group", "longest"))}
SPLATTED |= {
    **{
        name: {**OF_GROUPS, "objective": (getattr(online, name), ("params", "data", "model", "temperature"))}
        for name in ("grpo", "gspo", "cispo", "rloo")
    },
    "reinforce": {**SAMPLED, "objective": (online.reinforce, ("params", "data", "model", "temperature"))},
    "online_dpo": {**SAMPLED, "objective": (preference_objectives.dpo, ("params", "data", "model"))},
    "ppo_ptx": SPLATTED["ppo"],
    "sft_grpo": {**OF_GROUPS, "objective": (online.grpo, ("params", "data", "model", "temperature"))},
    "classify": {
        **MESH,
        **TRAINING,
        **ADAPTER,
        "data": (classify.examples, ("tokenizer", "seed")),
        "evaluate": FINE_TUNING["evaluate"],
        "objective": (supervised.classify, ("params", "data", "model")),
    },
    "distill": {**MESH, **SAMPLE, **TRAINING, **ADAPTER, **{name: SPLATTED["sft"][name] for name in ("data", "evaluate")}},
    "self_instruct": {
        **MESH,
        **SAMPLE,
        "grow": (feedback_self_instruct.grow, ("write", "tasks", "seed")),
        "examples": (feedback_self_instruct.examples, ("write", "instructions", "labels", "tasks", "seed")),
        "evaluate": (self_instruct.examiner, ("loaded", "mesh", "path", "batch", "length", "chat", "seed")),
    },
    "instruct": {**MESH, "course": (instruct.courses, ("numbers", "seed"))},
    **dict.fromkeys(("decoder", "encoder_decoder"), SPLATTED["sft"]),
    "self_improve": {**MESH, "task": (self_improve.task_of, ("seed",))},
    **dict.fromkeys(("student", "seeds", "own", "writer", "base", "sft_thought"), SPLATTED["sft"]),
    **dict.fromkeys(("constitutional", "critique", "label"), {**MESH, **SAMPLE, **CONSTITUTION}),
    "environment": {**OF_GROUPS, "objective": (online.grpo, ("params", "data", "model", "temperature"))},
}
SAME_STAGES = {"grpo", "gspo", "cispo", "rloo", "reinforce", "online_dpo", "ppo_ptx"}  # as ppo
FOLLOWS = {"new_objective": "sft", "ppo_ptx": "ppo", **dict.fromkeys(("gspo", "cispo", "rloo"), "grpo")}  # another's driver
# whose section `objective` names its function
BY_NAME = {"reward": reward_objectives, "preference": preference_objectives, "distill": distill_objectives}
SPARSE = {"scratch.architecture"}  # says what differs from the plainest Llama; any other section has every argument


def built(name, variant):
    make = runpy.run_path(str(FILES[name]))["get_config"]
    return make(variant) if variant else make()


def every(config, name):
    """The config and those of its stages. Yields (the name of its file, config)"""
    yield "ppo" if name == "environment" and "critic" in config.run else name, config
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
            if kind == "reward" and path == "data":
                function = reward.READ[named.resolve(reward_objectives, config.objective)[1]]
            settings = section(config, path).to_dict()
            taken = inspect.signature(EncDecConfig if "encoder_layers" in settings else function)
            assert not settings.keys() & set(given), f"{kind}: the driver gives these beside {path}"
            taken.bind(**settings, **dict.fromkeys(given))
            if path not in SPARSE:
                assert settings.keys() | set(given) == taken.parameters.keys(), f"{kind}.{path}"


@pytest.mark.parametrize("name, variant", BUILT)
def test_the_section_of_a_named_objective_is_what_it_takes(name, variant):
    for kind, config in every(built(name, variant), name):
        if kind in BY_NAME:
            named.resolve(BY_NAME[kind], config.objective)


@pytest.mark.parametrize("kind", BY_NAME)
def test_configs_list_all_objectives_of_a_module_and_their_defaults(kind):
    listed, known = runpy.run_path(str(FILES[kind]))["OBJECTIVES"], named.objectives(BY_NAME[kind])
    assert listed.keys() == known.keys()
    for name, settings in listed.items():
        taken = named.hyperparameters(known[name])
        assert settings.keys() == taken.keys()
        assert all(settings[key] == x for key, x in taken.items() if x is not inspect.Parameter.empty), name


@pytest.mark.parametrize("variant", ppo.VARIANTS)
def test_the_price_of_kl_has_every_setting_of_its_controller(variant):
    settings = ppo.get_config(variant).kl.to_dict()
    assert settings.keys() | {"kl", "episodes"} == inspect.signature(rewards.update_beta).parameters.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_driver_splats_no_other_section(name):
    driver = ROOT / "experiments" / f"{FOLLOWS.get(name, name)}.py"
    found = re.findall(r"\*\*(?:job\.)?config\.([\w.]+)", driver.read_text())
    assert found and set(found) <= SPLATTED[name].keys()


@pytest.mark.parametrize("name, variant", BUILT)
def test_every_other_setting_is_named_in_a_driver(name, variant):
    drivers = "".join(path.read_text() for path in (ROOT / "experiments").glob("*.py") if path.stem != "settings")
    for kind, config in every(built(name, variant), name):
        for path in [path for path in log.flat(json.loads(config.to_json_best_effort())) if not path.startswith("stages")]:
            passed_on = [*SPLATTED[kind], *(["objective"] if kind in BY_NAME else [])]
            if not any(path.startswith(f"{splatted}.") for splatted in passed_on):
                parent, _, key = f"config.{path}".rpartition(".")
                names = parent.rpartition(".")[2] + ("|settings" if parent.endswith("model") else "")
                read = rf'\b({names})(\.{key}\b|\[name\] for name in \([^)]*"{key}")'
                assert re.search(read, drivers), f"{kind}: nothing reads {path}"


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
        assert found["seed"] == 7 and found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1}
        assert (found["model"] == config.model.to_dict()) == (kind in same), kind


@pytest.mark.parametrize("setting", ["norm", "activation", "positions", "remat", "attention"])
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


OWN = {"objective.floor"}  # of the worked example: an objective of one's own needs no rule
WRONG = (None, True, "", "x", -1, 0, 0.5, 1e300, 2**40, math.nan, math.inf, -math.inf, (), ("x",), [1])
RIGHT = {  # of those, what a setting may be, beside what its config says
    "seed": (0, 2**32 - 1),
    "mesh.data": (-1, 8),
    "optim.learning_rate": (0, 0.5, 1),
    "optim.warmup": (0,),
    "optim.clip_norm": (0, 0.0),
    "kl.horizon": (math.inf, 1000),
    "kl.beta": (0.0,),
    "normalise.after": (None, 2.0),
    "unended.replace": (None, 0.0, -1.0),
    "objective.dual_clip": (None, 3.0),
    "loop.save_seconds": (math.inf, 0.1),
    "loop.sinks": ((), ("tensorboard", "wandb")),
    "data.count": (0,),
    "data.margin": ("", "{margin}", "{scores[0]}"),
    "sample.top_k": (0,),
    "shots": (None,),
    "sample.slots": (0,),
    "sample.top_p": (1, 0.1),
    "evaluate.samples": (0,),
    "run.stop_kl": (None, 0.1),
    "adapter.kind": ("none", "lora", "head"),
    "adapter.targets": ("attention\\.[qv]$", "mlp"),
}
REFUSED = {  # what ml_collections lets through, or a number that float32 has not
    "seed": (-1, 2**32, True, 1.0, None),
    "mesh.data": (0, -2, True),
    "model.dtype": ("float64", "int8", ""),
    "model.source": ("", " ", None, "\udcff"),
    "optim.learning_rate": (-1, -1e-9, math.nan, math.inf, 1e39, None, "0.1"),
    "optim.b2": (1.0, 1 - 1e-9, -0.1),
    "optim.eps": (0, 1e-50),
    "optim.decay": ("step", None),
    "sample.top_p": (0, 1.5),
    "sample.length": (0, 2**31),
    "kl.target": (0.0, -1),
    "kl.horizon": (0, -1, math.nan),
    "annotator.temperature": (0, -1),
    "advantage.gamma": (1.01, -0.1),
    "advantage.whiten_advantages": (0, 1, None),
    "objective.dual_clip": (1.0, 0),
    "unended.replace": (math.nan, math.inf),
    "run.batch": (0, -4, 2.0, None),
    "loop.save_every": (0,),
    "loop.keep": (0,),
    "loop.sinks": ("tensorboard", ("tensorbored",), ([],), None),
    "data.completion": ("", "plain", "{text", "{", "}", None),
    "data.margin": ("5", "{a}{b}", "{a} points", "{a"),
    "data.held_out": (0, -1),
    "data.length": (0, 1),
    "scratch.architecture.width": (0, -8, True),
    "adapter.kind": ("qlora", "", None),
    "adapter.targets": ("", "(", "[a"),
    "adapter.rank": (0, -1, 2.0),
    "adapter.alpha": (0, -1.0, math.inf),
    "run.group": (0, -1, 2.0),
    "run.reuse": (0,),
    "run.importance_cap": (0.5, math.inf),
    "run.critic": ("none", "", None),
    "gold.lexicon": (None, 3),
    "evaluate.prompts": (-1,),
}


def test_every_setting_has_a_rule_and_every_rule_a_setting():
    known = set()
    for name, variant in BUILT:
        for _, config in every(built(name, variant), name):
            known |= {path for path in log.flat(config.to_dict()) if not path.startswith("stages.")}
    others = (annotators, hypergradient, knowledge, label, overoptimization)
    for config in (*map(sweep.get_config, sweep.VARIANTS), *(x.get_config() for x in others)):
        known |= {path for path in log.flat(config.to_dict()) if not path.startswith(("stages.", "sweep."))}
    assert known - OWN == RULES.keys()


@pytest.mark.parametrize("name, variant", BUILT)
def test_what_the_configs_say_is_right(name, variant, monkeypatch):
    config = built(name, variant)
    monkeypatch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[: config.mesh.tensor]))
    check(config)


def put(config, path, value):
    """The config with one value changed, whatever ml_collections thinks of it."""
    *parents, key = path.split(".")
    for parent in parents:
        config = config[parent]
    with config.ignore_type():
        config[key] = value


@pytest.mark.parametrize("path, value", [(path, value) for path, values in REFUSED.items() for value in values], ids=str)
def test_what_a_setting_may_not_be_is_refused_by_name(path, value):
    if path == "data.margin":
        config = built("reward", "tiny")
    else:
        config = next(
            c for c in (built("ppo", "tiny"), built("sft", "tiny"), built("compare", "tiny")) if path in log.flat(c.to_dict())
        )
    put(config, path, value)
    with pytest.raises(ValueError, match=rf"^{re.escape(path)} = .*: .+") as raised:
        check(config)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("path, value", [(path, value) for path, values in RIGHT.items() for value in values], ids=str)
def test_what_a_setting_may_be_is_accepted(path, value):
    """Zeros that mean something among them."""
    assert RULES[path].holds(value)


@pytest.mark.parametrize("name, variant", BUILT)
def test_a_value_of_another_kind_is_refused_for_every_setting_and_stage(name, variant, monkeypatch):
    config = built(name, variant)
    monkeypatch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[: config.mesh.tensor]))
    for path, right in log.flat(config.to_dict()).items():
        if path.startswith("stages.") and name in SAME_STAGES:
            continue
        key = re.sub(r"^stages\.\w+\.", "", path)
        kinds = (int, float) if isinstance(right, float) else type(right)
        wrong = [value for value in WRONG if type(value) is bool or not isinstance(value, kinds)]
        for value in wrong if key not in OWN and right is not None else ():
            if (isinstance(value, bool) and isinstance(right, bool | float)) or value in RIGHT.get(key, ()):
                continue  # right, or made a number of by ml_collections
            put(config, path, value)
            with pytest.raises(ValueError, match=rf"^{re.escape(path)} = "):
                check(config)
        put(config, path, None)  # or ml_collections would make of `right` what the wrong value was
        put(config, path, right)


def test_a_stage_is_checked_by_its_path():
    config = built("ppo", "tiny")
    config.stages.sft.optim.learning_rate = -1.0
    with pytest.raises(ValueError, match=r"^stages\.sft\.optim\.learning_rate = -1\.0: it is a number from 0$"):
        check(config)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"run.batch": 20}, r"run.batch = 20: it is a multiple of mesh.data 8 x mesh.fsdp 1 = 8, such as 24"),
        ({"run.minibatches": 3}, r"run.batch = 16: it is a multiple of run.minibatches 3 x run.accumulate 1 = 3, such as 18"),
        ({"run.minibatches": 8, "run.accumulate": 4}, r"run.minibatches 8 x run.accumulate 4 = 32, such as 32"),
        (
            {"run.group": 3},
            r"run.batch = 16: it is a multiple of run.minibatches 2 x run.accumulate 1 x run.group 3 = 6, such as 18",
        ),
        ({"mesh.data": 3}, r"mesh data=3, fsdp=1, tensor=1, sequence=1 needs 3 devices, here are 8; -1 fills one axis"),
        ({"mesh.data": 4, "mesh.tensor": 4}, r"needs 16 devices, here are 8"),
        ({"mesh.sequence": 2}, r"^model.attention = xla: with mesh.sequence > 1 it is ring$"),
        ({"stages.compare.run.batch": 4}, r"stages\.compare\.run\.batch = 4: it is a multiple of mesh.data 8"),
        ({"stages.sft.scratch.architecture.kv_heads": 3}, r"stages.sft.scratch.architecture.kv_heads = 3: it divides heads = 2"),
        ({"stages.sft.adapter.kind": "lora"}, r"stages.sft.adapter.kind = lora: a model from scratch has nothing to adapt"),
        ({"adapter.source": "there"}, r"adapter.source = there: adapter.kind says which it is, to train it on"),
        ({"stages.sft.scratch.architecture.head_dim": 5}, r"stages.sft.scratch.architecture.head_dim = 5: it is even"),
        (
            {"kl.horizon": 3.0},
            r"kl.horizon = 3: it is above kl.limit x run.batch = 3.2, or one step could take the price of KL below 0",
        ),
        ({"sample.temperature": 0.0}, r"sample.temperature = 0: a policy that learns from its samples draws them"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_settings_that_do_not_go_together_are_refused(changed, says):
    config = built("ppo", "tiny")
    config.update_from_flattened_dict(changed)
    with pytest.raises(ValueError, match=says):
        check(config)


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "rloo", "reinforce"])
def test_samples_that_are_compared_are_two_or_more(name):
    config = built(name, "tiny")
    config.run.group = 1
    with pytest.raises(ValueError, match="run.group = 1: samples of a prompt are compared, so they are two or more"):
        check(config)


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
