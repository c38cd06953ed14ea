"""Episodes: who said what, what is trained on, and that a policy learns in them."""

import os
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from configs import environment as environment_config
from experiments import common, environment, ppo
from experiments.settings import check
from jaxalign import keys, rollout, shard
from jaxalign.data import arithmetic, reviews, tables, text
from jaxalign.data.text import Document
from jaxalign.feedback import environments
from jaxalign.feedback.environments import guess, last_number, play
from jaxalign.models import decoder
from jaxalign.objectives import online
from jaxalign.ops import advantages
from jaxalign.sample import sample
from jaxalign.train import log, optim
from jaxalign.train.step import make_step
from jaxalign.types import Batch, TrainState

EOS = 1


def prompt(*ids):
    return Document(np.array(ids, np.int32), np.zeros(len(ids), np.float32))


def decode(ids):
    return " ".join(map(str, ids))


def encode(text):
    return [int(word) for word in text.split()]


def countdown(state, text):
    """Says what it has heard, rewards its length, and ends at 0."""
    return state - 1, f"9 {state}", float(len(text.split())), state == 0


def scripted(script, length=50):
    def draw(documents, turn):
        assert all(0 < len(document.tokens) <= length for document in documents)  # there is room for what is to be drawn
        return [script[turn][row] for row in range(len(documents))]

    return draw


def test_an_episode_is_all_that_was_said_and_only_the_policys_words_have_weight():
    script = [[[5, EOS], [6, 6, EOS]], [[7], [EOS]], [[8], [8]]]
    one, two = play(
        countdown, [1, 9], [prompt(3), prompt(3, 4)], scripted(script), encode=encode, decode=decode, turns=3, length=50
    )
    assert one.document.tokens.tolist() == [3, 5, EOS, 9, 1, 7]  # it ended in the second turn: no observation, nothing drawn
    assert one.document.weights.tolist() == [0, 1, 1, 0, 0, 1]
    assert (one.reward, one.turns, one.done, one.state) == (3.0, 2, True, -1)
    assert two.document.tokens.tolist() == [3, 4, 6, 6, EOS, 9, 9, EOS, 9, 8, 8]  # the last turn has no answer
    assert two.document.weights.tolist() == [0, 0, 1, 1, 1, 0, 0, 1, 0, 0, 1]
    assert (two.reward, two.turns, two.done) == (5.0, 3, False)
    batch = tables.check(tables.pad([one.document, two.document], 12, side="left"), 14)
    assert batch.targets.sum() == 8


def test_an_observation_that_leaves_no_room_ends_the_episode():
    script = [[[5, EOS]], [[6]]]
    for length, turns in ((5, 2), (4, 1)):
        draw = scripted([[said, [5] * 9] for (said,) in script], length)  # another one that is over at once, and long
        episode, other = play(countdown, [9, 0], [prompt(3), prompt(3)], draw, encode=encode, decode=decode, turns=2, length=length)
        assert episode.turns == turns and not episode.done and other.turns == 1 and len(other.document.tokens) == 10
    assert episode.document.tokens.tolist() == [3, 5, EOS]
    for bad in (prompt(), prompt(1, 2, 3), prompt(3)._replace(source=np.array([1]))):
        with pytest.raises(ValueError, match="prompt 0: . tokens; it has 1 to length = 2, and no source"):
            play(countdown, [9], [bad], scripted(script), encode=encode, decode=decode, turns=2, length=2)


def test_an_environment_that_fails_abstains():
    def broken(state, text):
        if state:
            raise RuntimeError("no answer")
        return state, "", 1.0, True

    with pytest.warns(UserWarning, match="the environment failed, RuntimeError: no answer, in turn 0 of row 1"):
        episodes = play(broken, [0, 1], [prompt(3)] * 2, scripted([[[5], [6]]]), encode=encode, decode=decode, turns=1, length=9)
    assert episodes[0].reward == 1 and np.isnan(episodes[1].reward)
    batch = jax.tree.map(jnp.asarray, tables.pad([episode.document for episode in episodes], 3))
    zeros = jnp.zeros((2, 3))
    found = rollout.assemble(batch, zeros, zeros, zeros, jnp.array([1, jnp.nan]), 0.0, whiten_advantages=False)
    assert found.advantage.tolist() == [[0, 1, 0], [0, 0, 0]]


# --------------------------------------------------------- two turns, in each of which the wanted token is told


ROWS, GROUP, WIDTH = 64, 4, 8
SMALL = {"vocab": 12, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "width": 16, "mlp": 32, "context": 32, "tied": True}


def echo(state, text):
    """state = (tokens that will be wanted); the next one is told."""
    return state[1:], f"2 {state[1]}" if len(state) > 1 else "", float(text == str(state[0])), len(state) == 1


@pytest.mark.slow
def test_a_policy_learns_to_do_what_its_environment_says():
    model = decoder.build(decoder.DecoderConfig(**SMALL, scalar=None))
    params = jax.jit(lambda key: shard.unbox(model.init(key)))(keys.key(0, "init"))
    tx = optim.adam(learning_rate=2e-2, steps=99, decay="constant")
    state = TrainState(jnp.int32(0), params, tx.init(params))
    update = jax.jit(make_step(partial(online.grpo, model=model), tx))
    answer = jax.jit(partial(sample, model, length=1, eos=EOS))
    said = jax.jit(partial(rollout.said, model, temperature=1.0))
    assemble = jax.jit(partial(rollout.assemble_groups, group=GROUP, estimator=advantages.grpo))
    scores = []
    for i in range(40):
        wanted = np.repeat(np.random.default_rng(i).integers(3, 7, (ROWS // GROUP, 2)), GROUP, axis=0)
        drawn_logp = []

        def draw(documents, turn, i=i, params=state.params, drawn_logp=drawn_logp):
            row_keys = keys.of_rows(keys.key(0, "sample", i, turn), np.arange(ROWS))
            prompts = tables.pad(documents, WIDTH - 1, side="left")
            batch, logp, _ = answer(params, row_keys, prompts.replace(weights=0 * prompts.weights))
            drawn_logp.append(np.asarray(logp[:, -1]))
            return np.asarray(batch.tokens[:, -1:]).tolist()

        prompts = [prompt(2, w) for w in wanted[:, 0]]
        states = [tuple(row) for row in wanted.tolist()]
        episodes = play(echo, states, prompts, draw, encode=encode, decode=decode, turns=2, length=WIDTH - 1)
        assert all(episode.done and episode.turns == 2 for episode in episodes)
        batch = jax.tree.map(jnp.asarray, tables.pad([episode.document for episode in episodes], WIDTH))
        logp, _, value = said(state.params, batch)
        np.testing.assert_allclose(logp[:, jnp.array([2, 5])].T, drawn_logp, atol=1e-4)  # what was drawn, turn by turn
        rewards = jnp.array([episode.reward for episode in episodes], jnp.float32)
        data = assemble(batch, logp, logp, value, rewards, 0.0)
        state, metrics = update(state, data)
        assert metrics["train/weight"] == ROWS and metrics["policy/ratio"] == pytest.approx(1, abs=1e-5)
        scores.append(float(rewards.mean()))
    assert np.mean(scores[:3]) < 0.5 and np.mean(scores[-3:]) > 1.4, scores  # of 2


# --------------------------------------------------------- a run


def test_a_reward_is_an_environment_of_one_turn():
    rows = [{"answer": "-1204"}, {"answer": 7}, {"answer": 7}]
    said, ids = ["so -1,204 .", "7 or 8", "none"], [[0], [1], [2]]
    known = {"encode": encode, "decode": lambda ids: said[ids[0]], "turns": 4, "length": 9}
    episodes = play(last_number, rows, [prompt(3)] * 3, scripted([ids]), **known)
    assert [(episode.reward, episode.turns, episode.done) for episode in episodes] == [(1, 1, True), (0, 1, True), (0, 1, True)]


@pytest.mark.parametrize("said, worth", [("Positive.\n", 1), (" positive \nnegative", 1), ("very positive", 0), ("", 0)])
def test_an_exact_answer_is_one_line(said, worth):
    assert environments.exact({"answer": " positive"}, said) == worth


def test_a_query_finds_a_passage_and_the_answer_is_worth_its_words(shared):
    """By the config: real questions, in the turns of a run."""
    config = environment_config.get_config("search")
    folder = shared / "data" / "retrieval"
    config.environment.passages, config.prompts.source = (str(folder / f"squad_{x}.jsonl") for x in ("passages", "questions"))
    words = AutoTokenizer.from_pretrained(shared / "data" / "models" / "smollm2_135m_instruct")
    model = decoder.build(decoder.DecoderConfig(**SMALL | {"vocab": len(words)}))
    mesh = shard.make_mesh(devices=jax.devices()[:1])
    starts, (width, _), play_one = environment.openings(config, SimpleNamespace(model=model, tokenizer=words), mesh)
    normandy, nothing = starts[0], next(start for start in starts if start.state["is_impossible"])
    said = [["Norse raiders in Normandy", "Normandy", "", "Normans"], ["[1] In France", "Germany", "unanswerable", "unanswerable."]]

    def draw(params, row_keys, prompts):
        """Each turn's texts, behind what stands there."""
        turn = int(np.asarray(prompts.segments)[0].sum() > 150)
        ids = [[*words(text).input_ids, words.eos_token_id] for text in said[turn]]
        empty = jnp.zeros((4, config.sample.length), jnp.int32)
        tokens = jnp.stack([row.at[: len(wrote)].set(jnp.array(wrote)) for row, wrote in zip(empty, ids)])
        wrote = jnp.stack([jnp.arange(config.sample.length) < len(wrote) for wrote in ids]).astype(jnp.int32)
        rows = [(prompts.tokens, tokens), (prompts.segments, wrote), (0.0 * prompts.weights, wrote.astype(jnp.float32))]
        return Batch(*(jnp.concatenate(pair, axis=1) for pair in rows)), None

    row_keys = keys.of_rows(keys.key(0, "sample"), np.arange(4))
    batch, rewards, logp = play_one(draw, None, row_keys, [normandy, normandy, normandy, nothing], 1)
    assert logp is None
    np.testing.assert_allclose(rewards, [2 / 3, 0, 0, 1])  # "in" is a word too many
    shown = words.decode(np.asarray(batch.tokens)[0][np.asarray(batch.segments)[0] > 0])
    assert "<|im_start|>user\n[1] Normans: The Normans (Norman" in shown and batch.tokens.shape == (4, width)
    config.environment.passages = ""
    with pytest.raises(ValueError, match="environment.passages names the file"):
        environment.openings(config, None, mesh)


def test_of_one_turn_a_prompt_is_read_once_for_all_its_responses_and_the_sampler_says_how_likely_they_were():
    config = environment_config.get_config("tiny")
    config.environment.update(name="exact", turns=1)
    config.prompts.update(source="secrets", length=4)
    words = arithmetic.tokenizer()
    model, mesh = decoder.build(decoder.DecoderConfig(**SMALL | {"vocab": len(words)})), shard.make_mesh(devices=jax.devices()[:1])
    params, _ = shard.create(model.init, mesh, jax.random.key(0))
    policy, seen = SimpleNamespace(model=model, tokenizer=words), []

    def reward(state, said):
        seen.append(said)
        return float(len(said))

    starts, columns, play_one = environment.openings(config, policy, mesh, reward)
    draw = common.sampler(model, mesh, words.eos_token_id, config.sample)
    batch, rewards, logp = play_one(draw, params, keys.of_rows(keys.key(0, "sample"), np.arange(6)), [starts[0]] * 6, 3)
    assert batch.tokens.shape == logp.shape == (6, columns[0]) == (6, 4 + config.sample.length)
    np.testing.assert_array_equal(batch.segments[:, 3], 1)  # prompts end in one column
    np.testing.assert_array_equal(rewards, [len(said) for said in seen])
    written = np.asarray(batch.weights) > 0
    assert seen == [words.decode(row[at], skip_special_tokens=True) for row, at in zip(np.asarray(batch.tokens), written)]
    shared = rollout.said(model.sharing(3, 4), params, batch, temperature=1.0)[0]
    np.testing.assert_allclose(np.where(written, shared, 0), np.where(written, logp, 0), atol=1e-5)


def test_a_game_of_the_world_is_one_that_the_environment_would_have_played():
    words = arithmetic.tokenizer()
    for game in arithmetic.games(40, seed=3):
        first, *turns = game["text"].split(" </s> ")
        guesses = [first.split()[1], *(turn.split()[1] for turn in turns)]
        fitting = [
            secret
            for secret in range(arithmetic.NUMBERS)
            if [guess({"secret": secret}, x)[1] for x in guesses[:-1]] == [turn.split()[0] for turn in turns]
        ]
        assert fitting and words.unk_token_id not in words(game["text"]).input_ids
    assert guess({"secret": 3}, " 3") == ({"secret": 3}, "", 1.0, True) and guess({"secret": 3}, "higher")[1:] == ("what", 0, False)


def test_what_is_observed_in_a_chat_is_a_turn_of_the_user():
    words = reviews.tokenizer()
    turn = "{{ m['role'] }} {{ m['content'] }} </s> "
    words.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}assistant {{% endif %}}"
    asked, answer, seen = ({"role": "user", "content": "the film"}, {"role": "assistant", "content": "was good"}, "very")
    whole = text.chat(words, [asked, answer, {"role": "user", "content": seen}], generate=True).tokens
    begun = text.chat(words, [asked, answer]).tokens
    assert [*begun, *environment.observed(words, seen, chat=True)] == whole.tolist()


def test_a_setting_names_an_environment_of_the_library_and_no_code():
    config = environment_config.get_config("tiny")
    for name in ("gues", "os:system"):
        config.environment.name = name
        with pytest.raises(ValueError, match=f"environment.name = '{name}': there are guess, last_number"):
            environment.openings(config, None, None)
    config.environment.name = ""
    with pytest.raises(ValueError, match="environment.name is empty"):
        environment.openings(config, None, None, guess)  # it would never be asked


@pytest.mark.slow
def test_a_run_that_was_stopped_within_a_rollout_of_episodes_ends_as_if_it_was_not(tmp_path, monkeypatch):
    """By PPO, with a critic, on games of three turns; what is left shows the whole dialogue."""
    config = environment_config.get_config("ppo")
    config.update_from_flattened_dict(
        {"prompts.count": 64, "evaluate.prompts": 16, "evaluate.every": 1, "run.iterations": 1, "run.batch": 16, "run.epochs": 2}
    )
    config.stages.sft.update_from_flattened_dict({"data.count": 256, "data.held_out": 32, "run.steps": 8, "run.batch": 16})
    config.stages.sft.scratch.architecture.update(width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=32)
    config.loop.log_every = config.stages.sft.loop.log_every = 1
    check(config)
    step, whole, stopped = ppo.step, tmp_path / "whole", tmp_path / "stopped"
    monkeypatch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[:1]))
    ppo.run(config, whole)
    shutil.copytree(whole / "sft", stopped / "sft")

    def told_to_stop(job, state, i):
        if i == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(job, state, i)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ppo, "step", told_to_stop)
        ppo.run(config, stopped)
    ppo.run(config, stopped, algorithm=ppo.PPO._replace(environment=guess))  # the same by its owner
    lines, again = (
        [{name: x for name, x in line.items() if not name.startswith("time/")} for line in log.read_lines(folder / "metrics.jsonl")]
        for folder in (whole, stopped)
    )
    assert lines == again and lines[1]["policy/kl"] == 0 and lines[1]["policy/ratio"] == pytest.approx(1, abs=1e-6)
    shown = [line for line in log.read_lines(whole / "samples.jsonl") if not line["proxy"]]
    assert shown and all(line["prompt"] == "guess" and line["response"].count("[") == 2 for line in shown)
    assert not (whole / "reward").exists()
