"""A plan compiles the programs that a run calls, and what it says of them is counted right."""

from importlib import util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import grpo, ppo, reinforce, sft
from experiments import compiled, plan
from experiments import ppo as ppo_run
from experiments.settings import check
from jaxalign import shard
from jaxalign.models import decoder
from jaxalign.objectives import supervised
from jaxalign.types import Batch

WIDTH, MLP, LAYERS, VOCAB = 64, 256, 6, 82  # of the model in `small`: its weights are larger than its activations
PRESETS = {  # variant: (make, driver, slices that it is for, billions of the policy's parameters)
    "llama3_8b": (ppo.get_config, "ppo", ("v5e:16x16", "v5p:4x4x4"), 8.030),
    "ppo_70b": (ppo.get_config, "ppo", ("v5p:8x8x8",), 70.554),
    "qwen2_7b": (grpo.get_config, "grpo", ("v6e:16x16",), 7.616),
    "t5_xxl": (sft.get_config, "sft", ("v5e:8x8",), 11.135),
}


def small(variant, make):
    config = make(variant)
    config.mesh.update(data=1, fsdp=4, tensor=2)
    sizes = {"width": WIDTH, "mlp": MLP, "layers": LAYERS, "heads": 4, "kv_heads": 2, "head_dim": 16}
    config.stages.sft.scratch.architecture.update(sizes)
    config.model.remat = "full"
    config.prompts.length = config.sample.length = 4
    config.run.update(batch=8, minibatches=1)
    return config


@pytest.fixture(scope="module")
def planned():
    config = small("tiny", ppo.get_config)
    check(config)
    return plan.programs("ppo", config, jax.devices())


def test_no_program_gathers_more_than_one_layer_or_the_vocabulary(planned):
    """Weights that fsdp splits are gathered where they are used, a layer at a time."""
    assert planned.keys() == {"init", "sample", "reward", "ended", "score", "assemble", "describe", "take", "update"}
    layer = 3 * WIDTH * MLP + WIDTH * 16 * (4 + 2 * 2 + 4)
    assert planned["update"]["largest"]["all-gather"] > 0
    for name, program in planned.items():
        largest = program["largest"].get("all-gather", 0)
        assert largest <= 4 * max(layer, VOCAB * WIDTH), f"{name} gathers {largest} bytes at once, and a layer is {4 * layer}"


def test_a_token_is_decoded_where_the_weights_are(planned):
    """Prefill gathers the layers once; 4 tokens would do so again each time, if activations did not move instead."""
    layers = 4 * LAYERS * (3 * WIDTH * MLP + WIDTH * 16 * 12) / 2  # bytes, of a half of the heads and columns
    assert sum(size for _, size in planned["sample"]["collectives"].values()) < 2 * layers


def test_what_a_run_holds_counts_beside_what_a_program_takes(planned):
    """While rewards are computed, the reference and Adam's state are in memory, though no argument."""
    parameters = LAYERS * (3 * WIDTH * MLP + WIDTH * 16 * 12) * 4 / 8  # split over all eight
    assert planned["reward"]["arguments"] < 2 * parameters < 5 * parameters < planned["reward"]["in_memory"]


def test_what_does_not_fit_is_refused_with_what_would_help(planned):
    plan.fits(planned, "v5e:16x16")
    large = planned | {"update": planned["update"] | {"in_memory": 17 * plan.GIB}}
    with pytest.raises(ValueError, match=r"^update does not fit: 17.0 GiB of 16 a chip. .*mesh.fsdp.*model.remat = full"):
        plan.fits(large, "v5e:16x16")
    plan.fits(large, "v6e:16x16")


@pytest.mark.parametrize("variant, make, reuse", [("tiny", ppo.get_config, 2), ("remax", reinforce.get_config, 1)])
def test_every_compiled_function_of_a_run_is_planned(variant, make, reuse, monkeypatch):
    """All that jax compiles of a Job, and beside it what makes the first state."""
    jobs, functions = [], {}
    prepare = ppo_run.prepare

    def kept(*args, **given):
        jobs.append(prepare(*args, **given))
        return jobs[-1]

    def lowered(name, function, *args):
        functions[name] = function
        return function.lower(*args).out_info

    monkeypatch.setattr(ppo_run, "prepare", kept)
    config = make(variant)
    config.run.reuse, config.run.rescore = reuse, reuse > 1
    mesh, name = shard.make_mesh(**config.mesh), "ppo" if reuse > 1 else "reinforce"
    plan.online_run(config, mesh, plan.ALGORITHMS[name], lowered, [])
    job = jobs[0][0]
    unused = {job.corrected if reuse == 1 else job.valued}
    assert {f for f in job if hasattr(f, "lower")} - unused == set(functions.values()) - {functions["init"]}


def layers_of_products(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0].sum()


def work_of(function, *args, mesh, **settings):
    return compiled.work(shard.on_mesh(jax.jit(function, **settings), mesh).lower(*args).compile().as_text())


def test_loops_count_as_often_as_they_run():
    """Of a device: 5 layers of [B/4,D] x [D,D/2], and twice as many products backwards; of kernels one layer at a time."""
    mesh, b, d = shard.make_mesh(data=1, fsdp=4, tensor=2), 64, 32
    x = jax.ShapeDtypeStruct((b, d), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    kernels = jax.ShapeDtypeStruct((5, d, d), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp", "tensor")))
    found = work_of(jax.grad(layers_of_products, 1), x, kernels, mesh=mesh, out_shardings=kernels.sharding)
    assert found.flops == 3 * 5 * 2 * b * d * d / 8
    assert found.largest["all-gather"] <= 4 * d * d
    whole = work_of(lambda kernels: kernels * 1, kernels, mesh=mesh, out_shardings=NamedSharding(mesh, P()))
    assert whole.largest["all-gather"] == 4 * 5 * d * d

    def until(end, carry):
        return jax.lax.while_loop(lambda c: (c[0] < end) & (c[1].sum() > 0), lambda c: (c[0] + 1, c[1] @ c[1]), carry)

    one = jax.ShapeDtypeStruct((d, d), jnp.float32)
    assert work_of(lambda x: until(12, until(7, (3, x))), one, mesh=mesh).flops == (12 - 3) * 2 * d**3


TPU_TEXT = """
%fused_start (param_0: bf16[8,16]) -> bf16[8,64] {
  %param_0 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[8,64]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=10, dimensions={1}
}

%body (arg: (u32[], bf16[8,16])) -> (u32[], bf16[8,16]) {
  %two = u32[]{:T(128)} constant(2)
  %arg = (u32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %at = u32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%arg), index=1
  %next = u32[]{:T(128)} add(%at, %two)
  %fusion.2 = bf16[8,64]{1,0} fusion(%x), kind=kCustom, calls=%fused_start, backend_config={"estimated_cycles":"100"}
  %moved = bf16[8,16]{1,0} collective-permute(%x), channel_id=11, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (u32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%next, %moved)
}

%condition (arg.1: (u32[], bf16[8,16])) -> pred[] {
  %limit = u32[]{:T(128)} constant(16)
  %arg.1 = (u32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %at.1 = u32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%at.1, %limit), direction=LT
}

ENTRY %main (p: bf16[8,16], q: f32[3,4,5], r: f32[3,5,6]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %q = f32[3,4,5]{2,1,0} parameter(1)
  %r = f32[3,5,6]{2,1,0} parameter(2)
  %zero = u32[]{:T(128)} constant(0)
  %fusion.1 = bf16[8,64]{1,0} fusion(%p), kind=kCustom, calls=%fused_start, backend_config={"estimated_cycles":"30"}
  %product = f32[3,4,6]{2,1,0} convolution(%q, %r), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf
  %start = (u32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%zero, %p)
  %while.1 = (u32[]{:T(128)}, bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %done = bf16[8,16]{1,0} get-tuple-element(%while.1), index=1
}
"""


def test_a_text_of_the_tpu_compiler_is_read():
    """A loop that goes up by 2 to 16 runs 8 times; a gather that is still under way in it is one; axis 0 is of a batch."""
    found = compiled.work(TPU_TEXT)
    assert found.flops == 2 * 3 * 4 * 5 * 6
    assert found.cycles == 30 + 8 * 100
    assert found.collectives == {"all-gather": (1, 2 * 8 * 64), "collective-permute": (8, 8 * 2 * 8 * 16)}


@pytest.mark.parametrize("variant", PRESETS)
def test_a_preset_is_of_the_model_that_it_names(variant):
    make, _, _, billions = PRESETS[variant]
    config = make(variant)
    model = plan.model_of(config, "model")
    leaves = jax.tree.leaves(shard.unbox(jax.eval_shape(model.init, jax.random.key(0))))
    assert sum(x.size for x in leaves) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_a_plan_is_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "devices_of", lambda topology: jax.devices())
    monkeypatch.setattr(plan.importlib.metadata, "version", lambda name: "1")
    program = dict.fromkeys(("in_memory", "arguments", "temporaries", "output", "flops", "cycles"), 3 * plan.GIB)
    made = iter([{"update": program | {"collectives": {"all-gather": (2, plan.GIB)}}}])
    monkeypatch.setattr(plan, "programs", lambda *_: next(made))
    config = sft.get_config("tiny")
    plan.run(config, "sft", "v5e:2x4")
    plan.run(config, "sft", "v5e:2x4")
    assert capsys.readouterr().out.count("all-gather 1.000 GiB") == 2
    config.run.batch = 32
    with pytest.raises(StopIteration):
        plan.run(config, "sft", "v5e:2x4")


def test_without_the_compiler_or_such_a_slice_the_plan_ends_in_a_line(monkeypatch):
    monkeypatch.setattr(plan.importlib.metadata, "distributions", lambda name: [])
    with pytest.raises(ImportError, match=r'libtpu.*pip install -e "\.\[pods\]"'):
        plan.devices_of("v5e:16x16")
    monkeypatch.setattr(plan.importlib.metadata, "distributions", lambda name: [name])
    with pytest.raises(ValueError, match="--topology=v9:2x2: chips are v5e, v5p, v6e"):
        plan.devices_of("v9:2x2")
    with pytest.raises(ValueError, match="runs/sft is not known here, and there is no runs/sft/config.json"):
        plan.architecture("runs/sft", ppo.get_config("tiny").model, {})


def test_a_pass_moves_the_head_once_however_many_chunks_of_logits_it_has():
    config = decoder.DecoderConfig(
        vocab=512, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=32, context=512, remat="full"
    )
    model, mesh = decoder.build(config), shard.make_mesh(data=1, fsdp=8)
    made = jax.eval_shape(model.init, jax.random.key(0))
    params, moved = plan.shaped(shard.unbox(made), shard.shardings(made, mesh)), []
    for length in (128, 512):
        ints, floats = (jax.ShapeDtypeStruct((8, length), kind) for kind in (jnp.int32, jnp.float32))
        batch = plan.rows(Batch(ints, ints, floats), mesh)
        found = work_of(jax.grad(lambda *args: supervised.sft(*args, model=model)[0]), params, batch, mesh=mesh)
        moved.append(sum(size for _, size in found.collectives.values()))
    head = 4 * 512 * 16  # 2 chunks, and 8: what else grows is that of looking up more embeddings
    assert 2 * head < moved[0] and moved[1] - moved[0] < 2 * head


compiles_for_tpus = pytest.mark.skipif(util.find_spec("libtpu") is None, reason='no libtpu: pip install -e ".[pods]"')


@compiles_for_tpus
@pytest.mark.parametrize("topology, tensor", [("v5e:16x16", 8), ("v5p:4x4x4", 8), ("v6e:16x16", 4), ("v5e:8x8", 8)])
def test_the_mesh_of_each_preset_is_laid_over_its_slice(topology, tensor):
    """Also where an axis of the mesh is a part of an axis of the slice."""
    devices = plan.devices_of(topology)
    mesh = shard.make_mesh(data=1, fsdp=-1, tensor=tensor, devices=devices)
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices) and mesh.shape["tensor"] == tensor


@compiles_for_tpus
@pytest.mark.slow
def test_the_tpu_compiler_takes_the_smallest_preset(monkeypatch):
    """With two layers a side, which compile as slowly as all; on a chip, which has an eighth of each layer's heads and columns."""
    published = plan.PUBLISHED["google/t5-v1_1-xxl"] | {"num_layers": 2, "num_decoder_layers": 2}
    monkeypatch.setitem(plan.PUBLISHED, "google/t5-v1_1-xxl", published)
    found = plan.programs("sft", sft.get_config("t5_xxl"), plan.devices_of("v5e:8x8"))
    plan.fits(found, "v5e:8x8")
    layer = 4 * (8 * 4096 * 4096 + 3 * 4096 * 10240) // 8  # bytes of a decoder's
    assert found["update"]["largest"]["all-gather"] <= layer
    assert found["update"]["cycles"] > 0
