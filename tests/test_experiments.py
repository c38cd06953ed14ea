"""The programs, from flags to what they leave: a small PPO run with all its stages, stopped, resumed, and on eight devices."""

import contextlib
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors import safe_open

from configs import evaluate as evaluate_config
from configs import new_objective as new_objective_config
from configs import ppo as ppo_config
from configs import reward as reward_config
from configs import sample as sample_config
from experiments import common, compare, evaluate, launch, new_objective, ppo, reward, sample, sft
from jaxalign import rewards, score, shard
from jaxalign.data import reviews, tables, text
from jaxalign.models import checkpoints, decoder, files
from jaxalign.ops.masked import masked_sum
from jaxalign.rewards import sentiment
from jaxalign.train import log, loop
from jaxalign.types import TrainState

ROOT = Path(__file__).parents[1]
STAGES = ("sft", "compare", "reward")
CHANGED = {
    "stages.sft.scratch.architecture.kv_heads": 2,  # so that heads divide over the mesh of eight devices
    "optim.learning_rate": 0.02,  # so that two iterations change what is said
}


def settings():
    config = ppo_config.get_config("tiny")
    config.update_from_flattened_dict(CHANGED)
    return config


def run(function, *args, devices=1):
    """function(*args) as the program has it, on so many of the devices. -> what it printed"""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[:devices]))
        function(*args)
    return out.getvalue()


@pytest.fixture(scope="session")
def finished(once) -> Path:
    """The folder of a run of configs/ppo.py:tiny, on one device."""
    with once("finished") as (folder, made):
        if not made:
            programs, listener = [], logging.Handler()
            listener.emit = lambda record: programs.append(record.getMessage())
            logger = logging.getLogger("jax._src.interpreters.pxla")
            logger.addHandler(listener)
            with jax.log_compiles():
                said = run(ppo.run, settings(), folder)
            logger.removeHandler(listener)
            (folder.parent / "finished.txt").write_text(said)
            (folder.parent / "compiled.txt").write_text("\n".join(programs))
    return folder


@pytest.fixture(scope="session")
def stopped(once, finished) -> tuple[Path, Path]:
    """The same run, told to stop within its second iteration: its folder as it was then, and after the same command again."""
    with once("stopped") as (folder, made):
        then = folder.with_name("unfinished")
        if not made:
            for stage in STAGES:
                shutil.copytree(finished / stage, folder / stage)
            step = ppo.step

            def told_to_stop(job, state, i):
                if i == 11:
                    os.kill(os.getpid(), signal.SIGTERM)
                return step(job, state, i)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ppo, "step", told_to_stop)
                with pytest.raises(SystemExit) as ended:
                    run(ppo.run, settings(), folder)
            assert ended.value.code == 143
            shutil.copytree(folder, then, ignore=shutil.ignore_patterns(*STAGES))
            (folder.parent / "resumed.txt").write_text(run(ppo.run, settings(), folder))
    return then, folder


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def metrics_of(folder):
    """The metrics of every step, without what may differ between equal runs."""
    return [{k: x for k, x in line.items() if not k.startswith("time/")} for line in log.read_lines(folder / "metrics.jsonl")]


@pytest.mark.slow
def test_a_run_says_what_came_out(finished):
    summary = summary_of(finished)
    wanted = {"gold/before", "gold/after", "proxy/before", "proxy/after", "kl/final", "kl/target", "seconds"}
    wanted |= {f"{name}/{when}_stderr" for name in ("gold", "proxy") for when in ("before", "after")}
    assert wanted | {"reward_model/accuracy", "reward_model/accuracy_ceiling"} <= summary.keys()
    assert all(math.isfinite(x) for x in summary.values())
    assert summary["kl/target"] == settings().kl.target and summary["kl/final"] > 0 and summary["seconds"] > 0
    assert 0 <= summary["reward_model/accuracy"] <= 1 and 0.5 < summary["reward_model/accuracy_ceiling"] < 1
    assert summary["proxy/before"] != summary["proxy/after"]
    took = sum(summary_of(finished / stage)["seconds"] for stage in STAGES)
    assert summary["seconds"] > took + log.read_lines(finished / "metrics.jsonl")[-1]["time/elapsed_s"] > took > 0


@pytest.mark.slow
def test_a_run_leaves_its_record(finished):
    assert {"report.html", "config.json", "samples.jsonl", "model", "tokenizer", "checkpoints", *STAGES} <= {
        path.name for path in finished.iterdir()
    }
    assert json.loads((finished / "config.json").read_text()) == log.plain(settings())
    lines = metrics_of(finished)
    assert [line["step"] for line in lines] == list(range(17))  # 2 iterations of 4 epochs of 2 minibatches
    assert [line["step"] for line in lines if "policy/kl" in line] == [1, 9]
    assert all(x is not None for line in lines for x in line.values())
    samples = log.read_lines(finished / "samples.jsonl")
    assert [line["step"] for line in samples] == [0] * 16 + [8] * 16 + [16] * 16
    prompts = [line["prompt"] for line in samples]
    assert prompts[:16] == prompts[16:32] == prompts[32:] and len(set(prompts)) > 8
    assert summary_of(finished)["gold/after"] == pytest.approx(np.mean([line["gold"] for line in samples[32:]]), abs=1e-6)
    assert all(line["gold"] == pytest.approx(sentiment(line["response"], reviews.VALENCES), abs=1e-5) for line in samples)
    page = (finished / "report.html").read_text()
    assert [line["response"] for line in samples if line["prompt"] == prompts[0]][-1][:20] in page and "gold/after" in page


@pytest.mark.slow
def test_the_policy_starts_as_its_reference(finished):
    start, *lines = metrics_of(finished)
    first, second = lines[0], lines[8]
    assert [first[name] for name in ("policy/kl", "policy/kl_k2", "policy/kl_k3")] == [0, 0, 0] and start["kl/held_out"] == 0
    assert first["reward/total"] == pytest.approx(first["reward/score"], rel=1e-5)
    assert first["policy/approx_kl"] < 1e-12 and second["policy/approx_kl"] < 1e-12 < lines[1]["policy/approx_kl"]
    assert second["policy/kl"] != 0 and lines[7]["kl/held_out"] > 0


@pytest.mark.slow
def test_the_price_of_kl_is_the_controllers(finished):
    config = settings()
    beta = config.kl.beta
    for line in (line for line in metrics_of(finished) if "policy/kl" in line):
        assert line["policy/beta"] == pytest.approx(beta, rel=1e-6)
        told = config.kl.to_dict() | {"beta": beta}
        beta = float(rewards.update_beta(kl=line["policy/kl"], episodes=config.run.batch, **told))
    assert summary_of(finished)["kl/beta"] == pytest.approx(beta, rel=1e-6) != config.kl.beta


@pytest.mark.slow
def test_comparisons_say_what_the_annotator_saw(finished):
    rows, temperature = log.read_lines(finished / "compare" / "comparisons.jsonl"), settings().stages.compare.annotator.temperature
    tokenizer = checkpoints.tokenizer(finished / "sft")
    assert 100 < len(rows) <= 128
    for row in rows:
        gaps = []
        for side in ("chosen", "rejected"):
            assert tokenizer.decode(row[f"{side}_ids"], skip_special_tokens=True) == row[side]
            assert row[f"gold_{side}"] == pytest.approx(sentiment(row[side], reviews.VALENCES), abs=1e-5)
            gaps.append(row[f"gold_{side}"])
        assert tokenizer.decode(row["prompt_ids"]) == row["prompt"]
        assert row["chosen_ids"] != row["rejected_ids"]
        assert row["ceiling"] == pytest.approx(1 / (1 + math.exp(-abs(gaps[0] - gaps[1]) / temperature)), abs=1e-5)
    summary = summary_of(finished / "compare")
    assert abs(summary["agreement/annotator"] - summary["agreement/ceiling"]) < 4 * (0.25 / len(rows)) ** 0.5
    assert len({row["prompt"] for row in rows}) > 40


@pytest.mark.slow
def test_the_reward_model_that_is_left_scores_0_on_average_with_variance_1(finished):
    config, loaded = checkpoints.load(finished / "reward")
    model, data = decoder.build(config), settings().stages.reward.data.to_dict()
    found = data | {"source": str(finished / "compare" / "comparisons.jsonl")}
    _, held_out = reward.comparisons(tokenizer := checkpoints.tokenizer(finished / "reward"), len(tokenizer), **found)
    assert len(held_out) == data["held_out"]
    sides = [tables.pad([pair[side] for pair in held_out], data["length"]) for side in (0, 1)]
    measure = jax.jit(partial(score.last_scalar, model))
    chosen, rejected = (np.asarray(measure(loaded, side)) for side in sides)
    both = np.concatenate([chosen, rejected])
    assert both.mean() == pytest.approx(0, abs=1e-5) and both.std() == pytest.approx(1, abs=1e-5)
    right = (chosen > rejected) + 0.5 * (chosen == rejected)
    summary = summary_of(finished / "reward")
    assert summary["reward_model/accuracy"] == pytest.approx(right.mean())
    assert summary["comparisons/trained"] + len(held_out) == summary_of(finished / "compare")["comparisons"]


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_the_one_that_was_not(finished, stopped):
    unfinished, resumed = stopped
    assert not (unfinished / "model").exists() and metrics_of(unfinished)[-1]["step"] == 12
    said = (resumed.parent / "resumed.txt").read_text()
    assert "resuming at step 12 of 16" in said
    for name in ("metrics", "samples"):
        assert len((resumed / f"{name}.jsonl").read_text().splitlines()) == len(
            (finished / f"{name}.jsonl").read_text().splitlines()
        )
    assert metrics_of(resumed) == metrics_of(finished)
    assert (resumed / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()
    assert summary_of(resumed) | {"seconds": 0} == summary_of(finished) | {"seconds": 0}
    assert (resumed / "model" / "model.safetensors").read_bytes() == (finished / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_stages_are_made_once_and_their_reuse_is_said(finished, stopped):
    first, again = ((finished.parent / f"{name}.txt").read_text() for name in ("finished", "resumed"))
    for stage in STAGES:
        assert first.count(f"stage {stage}: making {finished / stage}") == 1
    assert again.count("making") == 0 and again.count("stage sft: reusing") == 1 and again.count("stage reward: reusing") == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage, setting", [("sft", "run.steps"), ("reward", "seed")])
def test_a_stage_of_other_settings_is_not_reused(finished, stage, setting):
    config = settings()
    part = config.stages[stage]
    part.update_from_flattened_dict({setting: 99})
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    was = log.flat(log.plain(settings().stages[stage]))[setting]
    with pytest.raises(ValueError, match=rf"stage {stage} in .*: {setting}: {was} -> 99. Delete that folder"):
        run(ppo.run, config, finished)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_eight_devices_are_one(finished, tmp_path):
    for stage in STAGES:
        shutil.copytree(finished / stage, tmp_path / stage)
    config = settings()
    config.mesh.update(data=2, fsdp=2, tensor=2)  # that of the stages too, which does not make them others
    run(ppo.run, config, tmp_path, devices=8)
    here, there = (log.read_lines(folder / "samples.jsonl") for folder in (finished, tmp_path))
    assert [(line["prompt"], line["response"]) for line in here] == [(line["prompt"], line["response"]) for line in there]
    for one, eight in zip(metrics_of(finished), metrics_of(tmp_path), strict=True):
        assert one == pytest.approx(eight, rel=1e-4, abs=1e-4)
    assert metrics_of(tmp_path)[1]["policy/kl"] == 0
    assert summary_of(finished) | {"seconds": 0} == pytest.approx(summary_of(tmp_path) | {"seconds": 0}, rel=1e-4, abs=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        *(checkpoints.load(folder)[1] for folder in (finished, tmp_path)),
    )


def answers(tmp_path, source, **changed):
    """The lines that experiments.sample writes, of two prompts of different length. -> [dict]"""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"asked": asked}) + "\n" for asked in ("the film was", "i thought the plot was not")))
    config = sample_config.get_config()
    config.model.source = str(source)
    config.prompts.update(source=str(prompts), template="{asked}")
    config.update(output=str(tmp_path / "out.jsonl"), batch=4)
    config.sample.length = 12
    config.update_from_flattened_dict(changed)
    said = run(sample.run, config)
    lines = log.read_lines(tmp_path / "out.jsonl")
    assert all(line["text"] in said for line in lines)
    return lines


@pytest.mark.slow
def test_the_model_that_is_left_answers_as_the_last_checkpoint_does(finished, tmp_path):
    """And a folder without a model, as a run that goes on has it, answers from its newest checkpoint."""
    going_on = tmp_path / "going_on"
    shutil.copytree(finished, going_on, ignore=shutil.ignore_patterns("model", *STAGES))
    exported, kept = answers(tmp_path, finished), answers(tmp_path, going_on)
    assert exported == kept
    config, params = checkpoints.load(finished)
    model = decoder.build(config)
    tokenizer = checkpoints.tokenizer(finished)

    @jax.jit
    def hidden(tokens):
        states, _ = model.apply(params, tokens, (tokens >= 0).astype(int))
        return model.unembed(params, states[0])

    for line in exported:
        ids = tokenizer(line["prompt"]).input_ids
        start = len(ids)
        whole = np.zeros((1, 32), np.int32)  # what is behind does not matter
        whole[0, : start + len(line["tokens"])] = ids + line["tokens"]
        logits = np.asarray(hidden(whole))[start - 1 : start - 1 + len(line["tokens"])]
        assert logits.argmax(axis=1).tolist() == line["tokens"]
        logp = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        np.testing.assert_allclose(np.take_along_axis(logp, np.array(line["tokens"])[:, None], 1)[:, 0], line["logp"], atol=1e-4)


@pytest.mark.slow
def test_a_run_that_was_stopped_can_be_asked(stopped, finished, tmp_path):
    early, late = answers(tmp_path, stopped[0]), answers(tmp_path, finished)
    assert [line["prompt"] for line in early] == [line["prompt"] for line in late]
    assert [line["logp"] for line in early] != [line["logp"] for line in late]


@pytest.mark.slow
def test_what_a_line_of_output_has(finished, tmp_path):
    tokenizer = checkpoints.tokenizer(finished)
    plain = answers(tmp_path, finished, **{"sample.temperature": 1.0, "draws": 3})
    cut = answers(tmp_path, finished, **{"sample.temperature": 1.0, "draws": 3, "sample.top_k": 5, "sample.top_p": 0.9})
    greedy = answers(tmp_path, finished, **{"sample.top_k": 5})
    assert len(plain) == len(cut) == 6 and len(greedy) == 2  # more rows than a batch holds, and fewer
    fields = {"prompt", "text", "tokens", "logp", "total"}
    assert all(line.keys() == fields for line in plain + greedy)
    assert all(line.keys() == fields | {"drawn_logp"} for line in cut)
    for line in plain + cut + greedy:
        assert tokenizer.decode(line["tokens"], skip_special_tokens=True) == line["text"]
        assert len(line["tokens"]) == len(line["logp"]) > 0 and line["total"] == pytest.approx(sum(line["logp"]))
    for line in cut:  # what a cut leaves is likelier than before, and of 5 tokens one is not rare
        assert all(drawn >= logp - 1e-5 for drawn, logp in zip(line["drawn_logp"], line["logp"], strict=True))
        assert min(line["drawn_logp"]) > math.log(0.05) > min(line["logp"])
    assert len({tuple(line["tokens"]) for line in plain}) == 6  # draws of one prompt differ


@pytest.mark.slow
def test_a_completion_is_scored_as_training_scores_it(finished, tmp_path):
    lines = answers(tmp_path, finished, completion="very good . i liked it")
    config, params = checkpoints.load(finished)
    model, tokenizer = decoder.build(config), checkpoints.tokenizer(finished)
    found = [text.prompt_completion(tokenizer, line["prompt"], "very good . i liked it", eos=False) for line in lines]
    batch = tables.pad(found, 24)
    said, _ = jax.jit(partial(score.evaluate, model))(params, batch)
    for line, total in zip(lines, masked_sum(said.logp, batch.weights, axis=1), strict=True):
        assert line["text"] == "very good . i liked it" and line.keys() == {"prompt", "text", "tokens", "logp", "total"}
        assert line["total"] == pytest.approx(float(total), abs=1e-4) and len(line["logp"]) == 6


@pytest.mark.slow
def test_an_objective_of_ones_own_trains(tmp_path, monkeypatch):
    config = new_objective_config.get_config("tiny")
    config.run.steps = 3
    config.loop.log_every = 1
    config.objective.floor = -4.35  # the mean is log 82 = 4.41 nats a token: a part of the targets stays
    config.loop.sinks = ("tensorboard",)
    drawn = []
    monkeypatch.setitem(log.SINKS, "tensorboard", lambda *_: (lambda n, values: drawn.append((n, values)), lambda: None))
    run(partial(sft.run, objective=new_objective.trusting_sft), config, tmp_path)
    assert [n for n, _ in drawn] == [1, 2, 3] and all("loss/nll" in values for _, values in drawn)
    weights = [line["train/weight"] for line in metrics_of(tmp_path)]
    rows = summary_of(tmp_path)["rows"]
    assert len(weights) == 3 and all(0 < weight < config.run.batch * config.data.length for weight in weights) and rows > 16
    assert all(line["loss/nll"] < 4.35 for line in metrics_of(tmp_path))


@pytest.mark.slow
def test_a_finished_run_that_is_repeated_stays_as_it_is(finished, tmp_path):
    """Its seconds, too, are those of the steps, which it does not take again."""
    shutil.copytree(finished / "sft", tmp_path / "sft")
    lines = log.read_lines(tmp_path / "sft" / "metrics.jsonl")
    lines[-1]["time/elapsed_s"] += 3600  # had they been slow
    (tmp_path / "sft" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = run(sft.run, settings().stages.sft, tmp_path / "sft")
    assert "nothing is left to do" in said
    first, again = summary_of(finished / "sft"), summary_of(tmp_path / "sft")
    assert first | {"seconds": 0} == again | {"seconds": 0} and 3600 < again["seconds"] < 3700
    models = [(folder / "sft" / "model" / "model.safetensors").read_bytes() for folder in (finished, tmp_path)]
    assert models[0] == models[1] and metrics_of(tmp_path / "sft") == metrics_of(finished / "sft")


def test_no_two_iterations_draw_alike():
    """Nor do evaluation and training, nor two rows of one prompt; the held-out prompts are always drawn alike."""
    tokenizer, seen = reviews.tokenizer(), []

    def draw(params, row_keys, batch, group=1):
        seen.append([tuple(row) for row in jax.random.key_data(row_keys).tolist()])
        return batch, None

    job = SimpleNamespace(
        config=settings(),
        mesh=shard.make_mesh(devices=jax.devices()[:1]),
        vocab=len(tokenizer),
        draw=draw,
        judge=None,
        judged=lambda judge, batch: np.zeros(3, np.float32),
        ended=lambda batch: np.ones(3, np.float32),
    )
    documents = common.openings(tokenizer, source="openings", count=9, template="{text}", length=8, chat=False, seed=0)
    for role, step in (("sample", 0), ("sample", 1), ("evaluate", 0), ("evaluate", 0)):
        ppo.respond(job, None, documents, [4, 2, 4], role, step)
    assert seen.pop() == seen[-1] and len({key for keys in seen for key in keys}) == 9


def test_comparisons_of_text_are_those_of_ids(tmp_path):
    tokenizer, rows = reviews.tokenizer(), []
    for opening, good, bad in zip(reviews.openings(6, seed=0), reviews.reviews(6, seed=1), reviews.reviews(6, seed=2), strict=True):
        rows.append({"prompt": opening, "chosen": good, "rejected": bad, "by": len(rows) / 4})
    as_ids = [
        row | {"prompt_ids": tokenizer(row["prompt"]).input_ids}
        | {f"{side}_ids": [*tokenizer(row[side]).input_ids, tokenizer.eos_token_id] for side in ("chosen", "rejected")}
        for row in rows
    ]  # fmt: skip
    made = []
    for name, kept in (("text", rows), ("ids", as_ids)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        made.append(
            reward.comparisons(
                tokenizer, len(tokenizer), source=str(tmp_path / f"{name}.jsonl"), count=5, held_out=2, length=99,
                prompt="{prompt}", chosen="{chosen}", rejected="{rejected}", margin="{by}", chat=False, source_length=0,
            )
        )  # fmt: skip
    for train, held_out in made:
        assert [row for _, _, row in train + held_out] == [
            row | {"margin": row["by"]} for row in (as_ids, rows)[train is made[0][0]][:5]
        ]
        assert len(train) == 3 and len(held_out) == 2
    for of_text, of_ids in zip(made[0][0] + made[0][1], made[1][0] + made[1][1], strict=True):
        jax.tree.map(np.testing.assert_array_equal, of_text[:2], of_ids[:2])


def test_parts_lose_and_repeat_nothing_that_counts():
    for many in (1, 3, 4, 9):
        seen = []
        for part, count in common.parts(list(range(many)), 4):
            assert len(part) == 4
            seen += part[:count]
        assert seen == list(range(many))


# ---- what a run reads


def test_comparisons_of_another_tokenizer_are_refused(tmp_path):
    row = {"prompt": "the film was", "chosen": "good .", "rejected": "bad .", "prompt_ids": [4], "rejected_ids": [5]}
    (tmp_path / "theirs.jsonl").write_text(json.dumps(row | {"chosen_ids": [30, 40, 50]}) + "\n")
    data = reward_config.get_config("tiny").data.to_dict() | {"source": str(tmp_path / "theirs.jsonl"), "held_out": 1}
    with pytest.raises(ValueError, match="theirs.jsonl, row 0: chosen_ids are not the tokens of 'chosen': another tokenizer"):
        reward.comparisons(reviews.tokenizer(), len(reviews.tokenizer()), **data)


@pytest.mark.parametrize("held_out", [0, -1, 3, 4])
def test_a_split_leaves_something_on_both_sides(held_out):
    assert common.split([1, 2, 3], 1, "data.held_out") == ([1, 2], [3])
    with pytest.raises(ValueError, match=f"data.held_out = {held_out} of 3: at least one must be on each side"):
        common.split([1, 2, 3], held_out, "data.held_out")


@pytest.fixture
def chatting():
    """A tokenizer with a chat template; it has no tokens of "user" and "assistant"."""
    tokenizer = reviews.tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.role + ' ' + turn.content + ' </s> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    return tokenizer


def test_a_document_is_two_turns_or_one_text(chatting):
    def written(document):
        return chatting.decode(document.tokens), chatting.decode(document.tokens[document.weights > 0])

    make = partial(common.document, chatting, "the film was")
    for eos in (True, False):  # a turn always has its end
        assert written(make("very good", chat=True, eos=eos)) == ("<unk> the film was </s> <unk> very good </s>", "very good </s>")
        assert written(make(None, chat=True, eos=eos)) == ("<unk> the film was </s> <unk>", "")
        assert written(make(None, chat=False, eos=eos)) == ("the film was", "")
    assert written(make("very good", chat=False)) == ("the film was very good </s>", "very good </s>")
    assert written(make("very good", chat=False, eos=False)) == ("the film was very good", "very good")


def test_prompts_that_are_too_long_keep_what_leads_to_the_answer(chatting):
    say = {"source": "openings", "count": 20, "template": "we saw it and {text}", "seed": 0}
    plain, chat = (common.openings(chatting, length=6, chat=chat, **say) for chat in (False, True))
    assert all(chatting.decode(document.tokens).startswith("we saw it and ") for document in plain)  # the first tokens
    assert all(chatting.decode(document.tokens).endswith(" </s> <unk>") for document in chat)  # the generation prompt
    assert {len(document.tokens) for document in plain + chat} == {6}


@pytest.fixture
def prepared(tiny, monkeypatch):
    """(config) -> the Job of a PPO run; its models are never called."""
    monkeypatch.setattr(common, "new_state", lambda *_, **__: (None, TrainState(None, None, None, {"rollout": None}, None)))
    loaded = common.Loaded(tiny.model, tiny.params, reviews.tokenizer(), "", "")
    return lambda config: ppo.prepare(config, shard.make_mesh(devices=jax.devices()[:1]), loaded, [], max)[0]


def test_no_prompt_that_is_held_out_is_trained_on(prepared):
    config = settings()
    asked = reviews.openings(config.prompts.count, seed=config.seed)
    job, tokenizer = prepared(config), reviews.tokenizer()
    train, held_out = ([tokenizer.decode(document.tokens) for document in side] for side in (job.prompts, job.held_out))
    assert held_out == asked[-16:] and train == [prompt for prompt in asked[:-16] if prompt not in held_out]
    assert 16 < len(train) < 48  # for some came on both sides


def test_prompts_that_are_all_held_out_are_too_few(prepared, tmp_path):
    (tmp_path / "same.jsonl").write_text('{"text": "the film was"}\n' * 9)
    config = settings()
    config.prompts.source = str(tmp_path / "same.jsonl")
    config.evaluate.prompts = 2
    with pytest.raises(
        ValueError, match="no prompt is left to train on beside the 1 different ones held out; lower evaluate.prompts"
    ):
        prepared(config)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"sample.temperature": 0.0}, "sample.temperature = 0.0: a policy that is to learn"),
        ({"run.batch": 15}, "run.batch = 15 does not divide into run.minibatches = 2"),
        ({"evaluate.prompts": 64}, "evaluate.prompts = 64 of 64: at least one must be on each side"),
    ],
)
def test_settings_that_cannot_be_run_are_refused_before_the_first_iteration(prepared, changed, says):
    config = settings()
    config.update_from_flattened_dict(changed)
    with pytest.raises(ValueError, match=says):
        prepared(config)


@pytest.fixture
def again(finished, tmp_path):
    """(changed) -> the folder of the finished run's PPO with other settings."""
    for stage in STAGES:
        shutil.copytree(finished / stage, tmp_path / stage)

    def made(**changed):
        config = settings()
        config.run.update(iterations=1)
        config.update_from_flattened_dict(changed)
        run(ppo.run, config, tmp_path)
        return tmp_path

    return made


def test_each_program_of_a_run_is_compiled_once(finished):
    """The updates of three stages, the samplers of two, and the functions of PPO, however many steps there are."""
    compiled = Counter(re.findall(r"Compiling jit\((\w+)\)", (finished.parent / "compiled.txt").read_text()))
    expected = {"apart": 3, "draw": 2, "said": 1, "score_of_all": 1, "assemble": 1, "describe": 1, "take": 1}
    assert {name: compiled[name] for name in expected} == expected


@pytest.mark.slow
def test_updates_far_from_the_policy_that_sampled_are_held_back(again):
    lines = metrics_of(again(**{"run.stop_kl": 1e-5}))[1:]
    held = [line["train/held"] for line in lines]
    assert held[0] == 0 and 0 < sum(held) < 8
    assert all(line["policy/approx_kl"] > 1e-5 for line, was in zip(lines, held) if was)
    assert all(line["policy/approx_kl"] <= 1e-5 for line, was in zip(lines, held) if not was)


@pytest.mark.slow
def test_a_reward_that_fails_too_often_ends_the_run(again, monkeypatch):
    """Here from every second response; a share below run.most_abstained is counted, and learns from the rest."""
    respond = ppo.respond

    def failing(*args):
        batch, scores, logp = respond(*args)
        return batch, np.where(np.arange(len(scores)) % 2, np.nan, scores), logp

    monkeypatch.setattr(ppo, "respond", failing)
    with pytest.raises(ValueError, match="the reward abstained from 50% of the responses of iteration 0, and run.most_abstained"):
        again()
    folder = again(**{"run.most_abstained": 0.5, "evaluate.every": 0})
    first = metrics_of(folder)[0]
    assert first["reward/abstained"] == 0.5 and math.isfinite(first["reward/score"]) and math.isfinite(first["loss/total"])


@pytest.mark.slow
def test_of_an_ensemble_of_reward_models_the_worst_score_counts_where_there_is_doubt(finished, tmp_path):
    made, scores = finished, []
    for doubt, stages in ((0.0, ("sft", "compare")), (math.inf, STAGES)):
        folder = tmp_path / str(doubt)
        for stage in stages:
            shutil.copytree(made / stage, folder / stage)
        config, made = settings(), folder
        config.update_from_flattened_dict({"run.iterations": 1, "evaluate.every": 0, "stages.reward.run.members": 2})
        config.reward_model.doubt = doubt
        run(ppo.run, config, folder)
        scores.append(metrics_of(folder)[0]["reward/score"])  # of the same samples
    assert scores[1] < scores[0] - 1e-3


def test_comparisons_that_were_changed_are_refused(tmp_path):
    path = tmp_path / "comparisons.jsonl"
    path.write_text('{"prompt": "a"}\n')
    assert compare.rows_in(str(path)) == str(path) == compare.rows_in(str(tmp_path))
    (tmp_path / "summary.json").write_text(json.dumps({"sha256": files.sha256(path)}))
    assert compare.rows_in(str(tmp_path)) == str(path)
    path.write_text('{"prompt": "b"}\n')
    with pytest.raises(ValueError, match="comparisons.jsonl is not as it was written"):
        compare.rows_in(str(tmp_path))


# ---- where a run comes from


@pytest.mark.slow
def test_a_stage_is_reused_only_with_the_stages_it_was_made_from(finished, tmp_path):
    for stage in STAGES:
        shutil.copytree(finished / stage, tmp_path / stage)
    config, runs = settings(), {"sft": sft.run, "compare": compare.run, "reward": reward.run}
    shutil.rmtree(tmp_path / "sft")
    for stage, happens in (("sft", "making"), ("compare", "reusing"), ("reward", "reusing")):  # the same settings, the same stage
        assert f"stage {stage}: {happens}" in run(launch.Stages(tmp_path, config.stages, runs).path, f"stage:{stage}")
    shutil.rmtree(tmp_path / "sft")
    config.stages.sft.run.steps = 3
    otherwise = r"was made otherwise: .*sft.nll/after: (\S+) -> (?!\1;)\S+. Delete that folder"
    for stage in ("compare", "reward"):  # the earlier first
        with pytest.raises(ValueError, match=f"stage {stage} in {tmp_path / stage} {otherwise}"):
            run(ppo.run, config, tmp_path)
        shutil.rmtree(tmp_path / stage)
    assert not (tmp_path / "reward").exists()


@pytest.mark.slow
def test_a_language_model_is_no_reward_model(finished, tmp_path):
    """Neither one that was fine-tuned nor a policy that PPO left, whose critic is no part of it."""
    mesh, config = shard.make_mesh(devices=jax.devices()[:1]), settings()
    with pytest.raises(ValueError, match=r"sft has no scalar head \(score.weight\): experiments.reward makes"):
        common.load(str(finished / "sft"), config.reward_model, mesh, seed=0, head="reward", draw_head=False)
    config.model.source = str(finished / "sft")
    config.reward_model.source = str(finished)
    with pytest.raises(ValueError, match=f"{finished} has no scalar head"):
        run(ppo.run, config, tmp_path)
    kept = json.loads((finished / "model" / "config.json").read_text())
    assert kept["architectures"] == ["LlamaForCausalLM"]
    with safe_open(finished / "model" / "model.safetensors", "numpy") as file:
        assert "model.norm.weight" in file.keys() and not [name for name in file.keys() if name.startswith("score")]  # noqa: SIM118
    assert json.loads((finished / "reward" / "model" / "config.json").read_text())["architectures"] != kept["architectures"]


@pytest.mark.slow
def test_margins_reach_the_loss_and_scores_have_the_spread_asked_for(finished, tmp_path, monkeypatch):
    rows = [row | {"by": n / 8} for n, row in enumerate(log.read_lines(finished / "compare" / "comparisons.jsonl"))]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = reward_config.get_config("tiny")
    config.model.source = str(finished / "sft")
    config.data.update(source=str(tmp_path / "rated.jsonl"), margin="{by}")
    config.normalise.update(before=0.05, after=2.0)
    config.run.steps = 2
    fit, began = loop.fit, {}

    def watched(step, state, data_at, **settings):
        began.update(params=jax.device_get(state.params), pairs=jax.device_get(data_at(0)))
        return fit(step, state, data_at, **settings)

    monkeypatch.setattr(loop, "fit", watched)
    run(reward.run, config, tmp_path / "run")

    architecture, left = checkpoints.load(tmp_path / "run")
    measure = jax.jit(partial(score.last_scalar, decoder.build(architecture)))
    _, held_out = reward.comparisons(tokenizer := checkpoints.tokenizer(tmp_path / "run"), len(tokenizer), **config.data)
    both = tables.pad([pair[side] for pair in held_out for side in (0, 1)], config.data.length)
    for params, std in ((began["params"], 0.05), (left, 2.0)):
        scores = np.asarray(measure(params, both))
        assert scores.mean() == pytest.approx(0, abs=1e-5) and scores.std() == pytest.approx(std, rel=1e-4)

    pairs = began["pairs"]
    by = {tuple(row["prompt_ids"] + row["chosen_ids"]): row["by"] for row in rows}
    of_rows = [tuple(ids[real > 0].tolist()) for ids, real in zip(pairs.chosen.tokens, pairs.chosen.segments, strict=True)]
    assert pairs.margin.tolist() == [by[ids] for ids in of_rows] and pairs.margin.std() > 1
    gap = np.asarray(measure(began["params"], pairs.chosen)) - np.asarray(measure(began["params"], pairs.rejected))
    assert metrics_of(tmp_path / "run")[0]["loss/total"] == pytest.approx(np.logaddexp(0, pairs.margin - gap).mean(), rel=1e-4)


# ---- on several processes


def on_two_processes(folder, program, *flags):
    """Run a program on both, from the flags on. -> what they said"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}/2"
    command = [sys.executable, "-m", f"experiments.{program}", f"--workdir={folder / 'run'}", "--debug", *flags]
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    with contextlib.ExitStack() as ends:
        started = []
        for number in range(2):
            said = ends.enter_context(open(folder / f"{number}.txt", "w"))
            one = subprocess.Popen(
                [*command, f"--distributed={place}/{number}"], cwd=ROOT, env=os.environ | devices | cache, stdout=said, stderr=said
            )
            ends.callback(one.wait)
            ends.callback(one.kill)
            started.append(one)
        codes = [one.wait(timeout=300) for one in started]
    told = [(folder / f"{number}.txt").read_text() for number in range(2)]
    assert codes == [0, 0], told[0][-3000:] + told[1][-3000:]
    return told


@pytest.mark.slow
def test_two_processes_are_one(finished, tmp_path):
    """All stages included."""
    settings = [f"--config.{name}={value}" for name, value in CHANGED.items()]
    _, second = on_two_processes(tmp_path, "ppo", "--config=configs/ppo.py:tiny", *settings)
    assert "summary" not in second and "step 16/16" not in second
    here, there = (log.read_lines(folder / "samples.jsonl") for folder in (finished, tmp_path / "run"))
    assert [(line["prompt"], line["response"]) for line in here] == [(line["prompt"], line["response"]) for line in there]
    for one, two in zip(metrics_of(finished), metrics_of(tmp_path / "run"), strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-4)
    summaries = [summary_of(folder) | {"seconds": 0} for folder in (finished, tmp_path / "run")]
    assert summaries[0] == pytest.approx(summaries[1], rel=1e-4, abs=1e-4)
    left = [{path.name for path in folder.iterdir()} - {".lock", "command.txt"} for folder in (finished, tmp_path / "run")]
    assert left[0] == left[1]


@pytest.mark.slow
def test_two_processes_evaluate_as_one(shared, tmp_path):
    source, count = shared / "data" / "models" / "stories260k", 6
    settings = [f"--config.model.source={source}", f"--config.data.count={count}"]
    on_two_processes(tmp_path, "evaluate", "--config=configs/evaluate.py:sentiment", *settings)
    config = evaluate_config.get_config("sentiment")
    config.model.source, config.data.count = str(source), count
    evaluate.run(config, tmp_path / "one")
    one, two = ({line["id"]: line for line in log.read_lines(tmp_path / name / "records.jsonl")} for name in ("one", "run"))
    assert len(one) == count and one.keys() == two.keys()
    for number, line in one.items():
        assert [x for _, x, _ in line["scores"]] == pytest.approx([x for _, x, _ in two[number]["scores"]], abs=1e-4)
        assert line["asked"] == two[number]["asked"]
