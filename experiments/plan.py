"""A run on a pod, without the pod: python -m experiments.plan --config=configs/ppo.py:llama3_8b --topology=v5e:16x16

Every program of the run is compiled for those chips by the TPU compiler in libtpu (pip install -e ".[pods]"), on any Linux machine.
No parameter is made and no data is read: shapes take their place. What does not fit ends in the settings that would help.
SCALING.md has what came out.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import math
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.sharding import NamedSharding
from ml_collections import config_flags

from experiments import common, compiled, ensemble, grpo, launch, ppo, reinforce, sft
from experiments.settings import check
from jaxalign import models, rollout, shard
from jaxalign.data import reviews
from jaxalign.models import adapters, checkpoints, files, layout
from jaxalign.models.parts import Adapter
from jaxalign.objectives import online
from jaxalign.train import log

GIB = 2**30
CHIPS = {"v5e": (16, 1.5e9), "v5p": (95, 1.75e9), "v6e": (32, 1.75e9)}  # GiB of memory; cycles a second, from peak FLOP/s
ALGORITHMS = {"ppo": ppo.PPO, "reinforce": reinforce.REINFORCE}
ALGORITHMS |= {name: grpo.of_groups(getattr(online, name)) for name in ("grpo", "gspo", "cispo", "rloo")}
LLAMA_3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
PUBLISHED = {  # config.json of models that a plan may be asked for where no hub is within reach
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_3
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "meta-llama/Meta-Llama-3-70B-Instruct": LLAMA_3
    | {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
    "Qwen/Qwen2-7B-Instruct": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "google/t5-v1_1-xxl": {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": 64,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    },
}
HELP = {  # the settings that a program's own memory depends on
    "sample": "run.batch or sample.length down",
    "update": "model.remat = full, or run.accumulate up",
}


def devices_of(topology: str):
    """The chips of a slice such as "v5e:16x16". ImportError where libtpu is not there, ValueError where there is no such slice."""
    if not list(importlib.metadata.distributions(name="libtpu")):
        raise ImportError('libtpu, which compiles for TPUs, is not here: pip install -e ".[pods]"')
    jax.config.update("jax_platforms", "cpu")  # no chip of this machine is looked for
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}  # nor a machine beside it
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several plans at a time: none has a chip to itself
    if topology.partition(":")[0] not in CHIPS:
        raise ValueError(f"--topology={topology}: chips are {', '.join(CHIPS)}, and a slice is such as v5e:16x16")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology={topology}: {error}") from error


def architecture(source: str, settings, stages, scratch=None):
    """What a source's config.json says, found without its weights: of PUBLISHED, of a folder, or of the stage that will make it.

    Args: settings: a config's model section; scratch: the section beside it.
    """
    form = common.form_of(settings)
    if source.startswith("stage:"):
        stage = stages[source.removeprefix("stage:")]
        return architecture(stage.model.source, settings, stages, stage.get("scratch"))
    if source == "scratch":
        tokenizer = common.TOKENIZERS.get(scratch.tokenizer) or partial(checkpoints.tokenizer, scratch.tokenizer)
        return models.config_of({"vocab": len(tokenizer()), **scratch.architecture, **form})
    file = Path(source) / "config.json"
    if source not in PUBLISHED and not file.exists():
        raise ValueError(f"{source} is not known here, and there is no {file}: a plan wants that file alone, without the weights")
    return layout.read_config(PUBLISHED.get(source) or files.read_json(file), file, **form)[1]


def model_of(config, section: str, *, head: str | None = None, adapter=None, scratch=None):
    """As common.load would build it from that section of the config."""
    found = architecture(config[section].source, config[section], config.get("stages", {}), scratch)
    trained = Adapter(**adapter) if adapter and adapter.kind != "none" else None
    return models.build(replace(found, scalar=common.HEADS[head](found.width) if head else None, adapter=trained))


def shaped(tree, where):
    """Shapes with their shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)


def rows(tree, mesh):
    """Shapes that are split as shard.place does it."""
    return shaped(tree, jax.tree.map(lambda x: NamedSharding(mesh, shard.split_of(x.shape, mesh)), tree))


def bytes_of(tree) -> dict[int, int]:
    """{a leaf's id: its bytes on one device}; one array in two places counts once."""

    def one(x):
        return math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * x.dtype.itemsize

    return {id(x): one(x) for x in jax.tree.leaves(tree) if hasattr(x, "sharding")}  # others are static


def compiler(found: dict, held: list):
    """-> compile(name, function, *args), which measures function.lower(*args).compile() into found[name], in bytes on one chip, and
    gives what comes out, as shapes with the shardings that the compiler chose.

    Args: held: arrays that stay in memory while a program runs, whether it takes them or not.
    """

    def compile_one(name: str, function, *args):
        began, lowered = time.monotonic(), function.lower(*args)
        try:
            built = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(f"{name} does not fit: {str(error).splitlines()[0]}. {help_with(name)}") from error
        memory, work, kept = built.memory_analysis(), compiled.work(built.as_text()), bytes_of(held)
        output = memory.output_size_in_bytes - memory.alias_size_in_bytes  # what takes the place of an argument is no more
        given = sum(size for key, size in bytes_of(args).items() if key not in kept)
        found[name] = {
            "in_memory": sum(kept.values()) + given + memory.temp_size_in_bytes + output,
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "output": output,
            **work._asdict(),
            "compile_s": round(time.monotonic() - began, 1),
        }
        log.say(f"{name}: compiled in {found[name]['compile_s']} s")
        return shaped(lowered.out_info, built.output_shardings)

    return compile_one


def parameters(model, mesh):
    """Their shapes. No program makes those that are read from files: each chip is given its part."""
    made = jax.eval_shape(model.init, jax.random.key(0))
    return shaped(shard.unbox(made), shard.shardings(made, mesh))


def begin(prepare, policy, params, mesh, compile_one, held):
    """Compile what makes a run's first state. -> the run's own functions, as `prepare` made them, and the state's shapes.

    Args: prepare: (common.Loaded) -> (functions, state).
    """
    made = []

    def start(params):
        with contextlib.redirect_stdout(io.StringIO()):  # of what became of prompts that are no run's
            functions, state = prepare(policy._replace(params=params))
        made.append(functions)
        return state

    state = compile_one("init", shard.on_mesh(jax.jit(start), mesh), params)
    leaves = adapters.trained_leaves(policy.model.config)
    state = state.replace(frozen=adapters.split(params, leaves)[0])  # the same arrays
    held.append(state)
    return made[0], state


def online_run(config, mesh, algorithm, compile_one, held):
    """A run of experiments/ppo.py, in the order of its `collect` and `step`."""
    run, critic = config.run, algorithm.critic(config)
    if config.environment.name:
        raise ValueError(f"environment.name = {config.environment.name}: a plan is for runs with a reward model")
    model = model_of(config, "model", head="value" if critic == "shared" else None, adapter=config.adapter)
    judge = model_of(config, "reward_model", head="reward")
    stage = config.stages.get(config.reward_model.source.removeprefix("stage:"))
    judges = [parameters(judge, mesh) for _ in range(stage.run.members if stage else 1)]
    model = rollout.with_critic(model, judge) if critic == "own" else model
    params = parameters(model, mesh)
    held += [params, judges]

    small = config.copy_and_resolve_references()  # any prompts do, and any tokenizer: their lengths are the config's
    small.prompts.update(source="openings", count=64, template="{text}", chat=False)
    small.evaluate.prompts = 1
    policy = common.Loaded(model, None, reviews.tokenizer(), "", "")
    judged = partial(ensemble.score_of_all, model=judge, doubt=config.reward_model.doubt)
    prepare = partial(ppo.prepare, small, mesh, judges=judges, judged=judged, algorithm=algorithm)
    job, state = begin(prepare, policy, params, mesh, compile_one, held)

    columns, source = common.prompt_columns(model, config.prompts.length)
    prompts = rows(jax.eval_shape(lambda: rollout.blank(run.batch, columns, source).batch), mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), run.batch))
    batch, _ = compile_one("sample", job.draw, state.model_params, keys, prompts)
    if job.greedy:
        compile_one("greedy", job.greedy, state.model_params, keys, prompts)
    scores = compile_one("reward", job.judged, judges, batch)
    compile_one("ended", job.ended, batch)
    logp, entropy, value = compile_one("score", job.said, state.model_params, batch, config.run.group)
    if not run.rescore:
        value, entropy = compile_one("value", job.valued, state.model_params, batch, run.group), None
    rolled = compile_one("assemble", job.assemble, batch, logp, logp, value, scores, state.loop["beta"])
    if run.reuse > 1:
        rolled, _ = compile_one("correct", job.corrected, rolled, logp)
    compile_one("describe", job.describe, rolled, entropy)
    numbers = jax.ShapeDtypeStruct((run.batch // run.minibatches,), jnp.int32)
    more = [params] if job.beside else []  # the reference, for an exact KL
    data = compile_one("take", job.take, rolled, numbers, *more)
    compile_one("update", job.update, state, data)


def supervised_run(config, mesh, compile_one, held):
    """A run of experiments/sft.py, whose held-out loss is the first part of an update."""
    model = model_of(config, "model", adapter=config.adapter, scratch=config.scratch)
    params = parameters(model, mesh)
    if config.model.source == "scratch":
        make = jax.jit(lambda key: shard.unbox(model.init(key)), out_shardings=jax.tree.map(lambda x: x.sharding, params))
        compile_one("draw", shard.on_mesh(make, mesh), jax.eval_shape(lambda: jax.random.key(0)))
    held.append(params)
    policy = common.Loaded(model, None, None, "", "")
    step, state = begin(partial(sft.prepare, config, mesh), policy, params, mesh, compile_one, held)
    source = 0 if common.start_of(model) is None else config.data.source_length or config.data.length
    batch = rows(jax.eval_shape(lambda: rollout.blank(config.run.batch, config.data.length, source).batch), mesh)
    compile_one("update", step, state, batch)


def programs(name: str, config, devices) -> dict:
    """Every program of the run that experiments/NAME.py makes of this config: what `compiler` measured, by its name."""
    found, held, mesh = {}, [], shard.make_mesh(**config.mesh, devices=devices)
    compile_one = compiler(found, held)
    if name == "sft":
        supervised_run(config, mesh, compile_one, held)
    elif name in ALGORITHMS:
        online_run(config, mesh, ALGORITHMS[name], compile_one, held)
    else:
        raise ValueError(f"a plan is for configs/sft.py and configs/{', '.join(ALGORITHMS)}.py, not for configs/{name}.py")
    return found


def help_with(name: str) -> str:
    """What to change where a program does not fit."""
    knob = HELP.get(name, "run.batch down")
    return f"More chips by mesh.fsdp or mesh.tensor; {knob}; model.dtype = bfloat16; or adapter.kind = lora"


def table(found: dict, topology: str, mesh: dict) -> str:
    """One line a program. In memory: what the run holds, and the program's own."""
    memory, clock = CHIPS[topology.partition(":")[0]]
    lines = [
        f"{topology}: {', '.join(f'{axis} {size}' for axis, size in mesh.items())}; {memory} GiB a chip. Of one chip:",
        f"{'program':18}{'in memory':>10}{'arguments':>10}{'temporary':>10}{'output':>8} GiB{'TFLOP':>8}{'seconds':>9}  moved",
    ]
    for name, one in found.items():
        sizes = [f"{one[key] / GIB:.3f}" for key in ("in_memory", "arguments", "temporaries", "output")]
        moved = ", ".join(f"{kind} {size / GIB:.3f} GiB" for kind, (_, size) in sorted(one["collectives"].items()))
        line = f"{name:18}{sizes[0]:>10}{sizes[1]:>10}{sizes[2]:>10}{sizes[3]:>8}    "
        lines.append(f"{line}{one['flops'] / 1e12:8.2f}{one['cycles'] / clock:9.3f}  {moved}")
    lines.append("seconds: the compiler's own estimate of computing and of memory, without collectives")
    return "\n".join(lines)


def fits(found: dict, topology: str):
    """Raises ValueError, with what to change, where a program and what the run holds beside it are more than a chip's memory."""
    memory, _ = CHIPS[topology.partition(":")[0]]
    for name, one in found.items():
        if one["in_memory"] > memory * GIB:
            raise ValueError(f"{name} does not fit: {one['in_memory'] / GIB:.1f} GiB of {memory} a chip. {help_with(name)}")


def digest(*what) -> str:
    """Of these and all that a plan depends on beside them: the versions of the compilers, the sources."""
    total = hashlib.sha256(
        json.dumps([*what, *(importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu"))]).encode()
    )
    root = Path(__file__).parents[1]
    for path in sorted([*(root / "jaxalign").rglob("*.py"), *(root / "experiments").glob("*.py")]):
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def run(config, name: str, topology: str):
    """Plan, print, and refuse what does not fit. What was compiled once is read from runs/plan."""
    devices = devices_of(topology)
    kept = Path("runs/plan") / f"{digest(log.plain(config), name, topology)}.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        log.write_json(kept, programs(name, config, devices))
    found = log.read_json(kept)
    log.say(table(found, topology, shard.make_mesh(**config.mesh, devices=devices).shape))
    fits(found, topology)
    log.say(f"it fits; {kept}")


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for chips that are not here cannot be read back
    flags.DEFINE_string("topology", "v5e:16x16", "A slice of TPUs: v5e:16x16, v5p:4x4x4, v6e:16x16.")
    launch.main(
        lambda config: run(config, Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem, flags.FLAGS.topology),
        "ppo",
        folder=False,
        check=lambda config: check(config, devices=devices_of(flags.FLAGS.topology)),
    )
