"""Policies from comparisons, as programs: objectives by name, the reference, KTO's baseline, and what a run leaves."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import preference as preference_config
from experiments import common, named, preference, reward
from jaxalign import shard
from jaxalign.data import tables
from jaxalign.data.text import Document
from jaxalign.models import checkpoints
from jaxalign.objectives import preference as objectives
from jaxalign.objectives import reward as reward_objectives
from jaxalign.train import log
from jaxalign.types import Pairs

# ---- an objective is named


def test_a_name_finds_its_function_and_what_it_learns_from():
    objective, kind = named.resolve(objectives, {"name": "ipo", "beta": 0.3, "per_token": True})
    assert objective.func is objectives.ipo and objective.keywords == {"beta": 0.3, "per_token": True} and kind is Pairs
    assert named.resolve(objectives, preference_config.get_config("kto").objective)[1] is objectives.Labelled
    assert named.resolve(reward_objectives, {"name": "k_wise"})[1] is reward_objectives.Ranked


def test_an_objective_of_ones_own_needs_no_name():
    def positive(params, data: Pairs, *, model, beta: float):
        return objectives.dpo(params, data, model=model, beta=beta)

    objective, kind = named.resolve(objectives, {"name": "dpo", "beta": 0.3}, positive)
    assert objective.func is positive and objective.keywords == {"beta": 0.3} and kind is Pairs
    with pytest.raises(ValueError, match="positive|beta; nll_weight is not of these"):
        named.resolve(objectives, {"beta": 0.3, "nll_weight": 0.0}, positive)


@pytest.mark.parametrize(
    "name",
    [
        "dop",
        "",
        "with_reference",
        "summed_logp",
        "kto_baseline",
        "mismatch",
        "stack",
        "masked",
        "Labelled",
        "_sums",
        "__doc__",
        "jax",
    ],
)
def test_nothing_but_an_objective_of_the_module_can_be_named(name):
    with pytest.raises(
        ValueError, match=rf"^objective.name = '{name}': the objectives of jaxalign.objectives.preference are dpo, "
    ):
        named.resolve(objectives, {"name": name, "beta": 0.1})


@pytest.mark.parametrize(
    "section, says",
    [
        (
            {"name": "ipo", "beta": 0.1, "nll_weight": 0.0},
            "ipo takes beta, per_token; nll_weight is not of these; per_token is missing",
        ),
        ({"name": "dpo"}, "dpo takes beta, nll_weight; beta, nll_weight is missing"),
        ({"name": "dpo", "beta": 0.1, "nll_weight": 0.0, "model": 1}, "dpo takes beta, nll_weight; model is not of these"),
    ],
)
def test_a_section_that_is_not_what_the_objective_takes_is_refused_in_a_line(section, says):
    with pytest.raises(ValueError, match=f"^objective: {says}. Take the config's variant of that name") as raised:
        named.resolve(objectives, section)
    assert str(raised.value).isprintable()


def test_a_wrong_name_is_said_before_anything_is_made(tmp_path):
    config = preference_config.get_config("tiny")
    config.objective.name = "ppo"
    with pytest.raises(ValueError, match="objective.name = 'ppo'"):
        preference.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- prompts to look at


def pair(prompt, *responses):
    documents = [
        Document(np.array([*prompt, *said], np.int32), np.float32([0] * len(prompt) + [1] * len(said))) for said in responses
    ]
    return (*documents, {})


def test_answers_are_asked_for_by_prompts_that_were_not_trained_on():
    train = [pair([1, 2], [3], [4]), pair([5], [6], [7])]
    held_out = [pair([5], [3], [9]), pair([8, 8], [3], [4]), pair([8, 8], [1], [2]), pair([1], [2, 3], [4])]
    found = preference.new_prompts(train, held_out, 2)
    assert [prompt.tokens.tolist() for prompt in found] == [[8, 8], [1]] and not any(prompt.weights.any() for prompt in found)
    with pytest.raises(ValueError, match="evaluate.prompts = 3: of 4 held-out comparisons 2 have a prompt that is not trained on"):
        preference.new_prompts(train, held_out, 3)


def test_a_document_that_is_all_targets_has_no_prompt():
    with pytest.raises(ValueError, match="no prompt"):
        tables.prompt_of(Document(np.int32([1, 2]), np.float32([1, 1])))


# ---- runs


def settings(name="dpo", **changed):
    config = preference_config.get_config("tiny")
    config.stages.sft.scratch.architecture.kv_heads = 2  # so that heads divide over a mesh
    config.optim.update(learning_rate=0.02, warmup=0)  # so that four updates change what is said
    config.objective = {"name": name, **preference_config.OBJECTIVES[name]}
    config.update_from_flattened_dict(changed)
    return config


def run(config, folder, devices=1):
    """experiments.preference on so many of the devices. -> what it printed"""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[:devices]))
        preference.run(config, folder)
    return out.getvalue()


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def metrics_of(folder):
    return [{k: x for k, x in line.items() if not k.startswith("time/")} for line in log.read_lines(folder / "metrics.jsonl")]


@pytest.fixture(scope="session")
def dpo(once) -> Path:
    """The folder of a tiny run of DPO, its stages made."""
    with once("preference-dpo") as (folder, made):
        if not made:
            run(settings(), folder)
    return folder


@pytest.fixture(scope="session")
def kto(once, dpo) -> Path:
    """That of KTO, on the same stages."""
    with once("preference-kto") as (folder, made):
        if not made:
            run(settings("kto"), with_stages(dpo, folder))
    return folder


def with_stages(made, folder):
    for stage in ("sft", "compare"):
        shutil.copytree(made / stage, folder / stage)
    return folder


@pytest.mark.slow
def test_a_run_says_what_became_of_the_policy(dpo, kto):
    for folder in (dpo, kto):
        summary = summary_of(folder)
        wanted = {f"{name}/{when}" for name in ("gold", "length", "logp_chosen", "logp_rejected") for when in ("before", "after")}
        wanted |= {"kl/final", "preference/margin", "preference/accuracy", "preference/accuracy_stderr", "gold/after_stderr"}
        wanted |= {"preference/accuracy_ceiling", "comparisons/trained", "comparisons/held_out", "seconds"}
        assert wanted <= summary.keys() and all(math.isfinite(x) for x in summary.values())
        margin = (summary["logp_chosen/after"] - summary["logp_chosen/before"]) - (
            summary["logp_rejected/after"] - summary["logp_rejected/before"]
        )
        assert summary["preference/margin"] == pytest.approx(margin, abs=1e-3) and summary["kl/final"] != 0
        assert summary["comparisons/held_out"] == settings().data.held_out
        last = metrics_of(folder)[-1]
        for name, of_line in (("gold/after", "gold"), ("kl/final", "kl"), ("logp_chosen/after", "logp_chosen")):
            assert summary[name] == pytest.approx(last[f"{of_line}/held_out"], rel=1e-4, abs=1e-4)
        samples = log.read_lines(folder / "samples.jsonl")
        assert [line["step"] for line in samples] == [0] * 16 + [2] * 16 + [4] * 16
        page = (folder / "report.html").read_text()
        assert "preference/accuracy_ceiling" in page and samples[-16]["response"][:20] in page
        architecture, params = checkpoints.load(folder)
        assert architecture.scalar is None and "scalar" not in params


@pytest.mark.slow
def test_the_policy_starts_as_its_reference(dpo, kto):
    for folder, loss in ((dpo, math.log(2)), (kto, 0.5)):
        start, first, *_ = metrics_of(folder)
        assert start["kl/held_out"] == start["margin/held_out"] == 0 and start["accuracy/held_out"] == 0.5
        assert first["loss/total"] == pytest.approx(loss, abs=1e-5)
    assert metrics_of(dpo)[1]["reward/difference"] == pytest.approx(0, abs=1e-5)
    assert metrics_of(kto)[1]["policy/z0"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_what_trains_is_the_training_rows_with_the_references_numbers(dpo):
    config, mesh = settings(), shard.make_mesh(devices=jax.devices()[:1])
    loaded = common.load(str(dpo / "sft"), config.model, mesh, seed=0)
    data = config.data.to_dict() | {"source": str(dpo / "compare" / "comparisons.jsonl")}
    train, held_out = reward.comparisons(loaded.tokenizer, loaded.model.config.vocab, **data)
    say = jax.jit(lambda params, batch: objectives.summed_logp(params, batch, model=loaded.model)[0])
    lengths = {"length": config.data.length, "source_length": 0}
    logp = reward.by_document(say, loaded.model, mesh, size=16, **lengths)
    said = {document.ids: x for side in (0, 1) for document, x in
            ((row[side], float(say(loaded.params, tables.pad([row[side]], **lengths))[0])) for row in train[:8])}  # fmt: skip

    def ids(batch):
        return [tokens[real > 0].tobytes() for tokens, real in zip(batch.tokens, batch.segments, strict=True)]

    known = {row[side].ids: side for row in train for side in (0, 1)}
    assert not known.keys() & {row[side].ids for row in held_out for side in (0, 1)}
    pairs_at, _ = preference.learn_from(Pairs, config, loaded, mesh, train, logp)
    labelled_at, ready = preference.learn_from(objectives.Labelled, config, loaded, mesh, train, logp)
    seen = 0
    for step in range(3):
        pairs, labelled = (jax.device_get(at(step)) for at in (pairs_at, labelled_at))
        sides = [(pairs.chosen, pairs.ref_chosen), (pairs.rejected, pairs.ref_rejected), (labelled.responses, labelled.ref_logp)]
        for batch, ref in sides:
            for row, number in zip(ids(batch), ref, strict=True):
                seen += row in said
                assert number == pytest.approx(said.get(row, number), abs=1e-3)
        assert [known[row] for row in ids(labelled.responses)] == [0 if good else 1 for good in labelled.desirable]
        assert labelled.desirable.any() and not labelled.desirable.all()
    assert seen > 5
    moved = jax.tree.map(lambda x: 0.5 * x, loaded.params)
    z0 = jax.device_get(ready(moved, labelled_at(0)).z0)
    mismatched = objectives.mismatch(labelled_at(0).responses, length=config.data.length)
    want = objectives.kto_baseline(moved, loaded.params, mismatched, model=loaded.model)
    assert z0 == pytest.approx(np.full(16, want), rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_the_one_that_was_not(kto, tmp_path):
    folder, step = with_stages(kto, tmp_path / "run"), shard.compile_step

    def told_to_stop(*args, **how):
        compiled, calls = step(*args, **how), []

        def one(state, data):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return compiled(state, data)

        return one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "compile_step", told_to_stop)
        with pytest.raises(SystemExit):
            run(settings("kto"), folder)
    assert not (folder / "model").exists()
    assert "resuming at step 3 of 4" in run(settings("kto"), folder)
    assert metrics_of(folder) == metrics_of(kto)
    assert summary_of(folder) | {"seconds": 0} == summary_of(kto) | {"seconds": 0}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_eight_devices_are_one(name, request, dpo, tmp_path):
    """KTO's baseline among it, which is of the whole global batch."""
    one = request.getfixturevalue(name)
    config = settings(name)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    run(config, with_stages(dpo, tmp_path / "run"), devices=8)
    for here, there in zip(metrics_of(one), metrics_of(tmp_path / "run"), strict=True):
        for name_of in ("reward/accuracy", "accuracy/held_out"):  # near the reference rounding has a sign, too
            here.pop(name_of, None), there.pop(name_of, None)
        assert here == pytest.approx(there, rel=2e-3, abs=2e-3)


@pytest.mark.slow
def test_the_reference_is_the_model_below_an_adapter(dpo, tmp_path):
    folder = with_stages(dpo, tmp_path / "run")
    run(settings(**{"adapter.kind": "lora", "adapter.rank": 2}), folder)
    start, first, *_, last = metrics_of(folder)
    assert start["kl/held_out"] == start["margin/held_out"] == 0 and first["loss/total"] == pytest.approx(math.log(2), abs=1e-5)
    assert last["kl/held_out"] != 0 and last["logp_chosen/held_out"] != start["logp_chosen/held_out"]
    assert start["logp_chosen/held_out"] == pytest.approx(metrics_of(dpo)[0]["logp_chosen/held_out"], rel=1e-5)
    checkpoints.load(folder)
    run(settings(**{"adapter.kind": "lora", "adapter.source": str(folder)}), with_stages(dpo, tmp_path / "more"))
    again = metrics_of(tmp_path / "more")[0]  # which goes on where that ended, held to the same model
    assert [again[f"{name}/held_out"] for name in ("margin", "kl")] == pytest.approx(
        [last[f"{name}/held_out"] for name in ("margin", "kl")], rel=1e-3, abs=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simpo", "ipo"])
def test_another_objective_learns_from_the_same_comparisons(name, dpo, tmp_path):
    run(settings(name, **{"evaluate.every": 0}), with_stages(dpo, tmp_path / "run"))
    assert summary_of(tmp_path / "run")["preference/margin"] != summary_of(dpo)["preference/margin"]
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]  # without looks at held-out rows


def test_greedy_answers_have_no_kl_to_measure(tmp_path):
    with pytest.raises(ValueError, match="sample.temperature = 0.0: KL is that of drawn answers"):
        preference.run(settings(**{"sample.temperature": 0.0}), tmp_path)


@pytest.mark.slow
def test_dpo_raises_the_gold_score_of_answers_to_new_prompts(tmp_path):
    """The default world, model and seed; fewer updates and comparisons."""
    config = preference_config.get_config()
    config.update_from_flattened_dict(
        {"stages.sft.run.steps": 100, "stages.sft.data.count": 4096, "stages.compare.prompts.count": 2048}
    )
    config.data.held_out, config.evaluate.prompts, config.evaluate.every = 256, 96, 0
    config.optim.learning_rate, config.run.steps = 1e-3, 56  # two epochs
    run(config, tmp_path)
    found = summary_of(tmp_path)
    assert found["gold/after"] - found["gold/before"] > 4 * math.hypot(found["gold/after_stderr"], found["gold/before_stderr"])
    assert found["kl/final"] > 1 and found["preference/accuracy"] > 0.5 + 2 * found["preference/accuracy_stderr"]
