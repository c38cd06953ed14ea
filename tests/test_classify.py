"""Classifiers by GPT-1's transformations: how texts are laid out, what cannot matter, what a run trains and leaves."""

import json
from functools import partial

import jax
import numpy as np
import optax
import pytest

from configs import classify as classify_config
from experiments import classify, common, launch
from jaxalign import models, shard
from jaxalign.data import opinions, reviews, transformations
from jaxalign.data.reviews import VALENCES
from jaxalign.models import checkpoints
from jaxalign.objectives import supervised
from jaxalign.rewards import sentiment

ONE = shard.make_mesh(devices=jax.devices()[:1])
WORDS = reviews.tokenizer()
WORDS.add_tokens(list(transformations.TOKENS), special_tokens=True)


def said(documents):
    return [WORDS.decode(document.tokens).replace("<|", "<").replace("|>", ">") for document in documents]


def test_texts_stand_between_the_new_tokens():
    one, other = "the film was good", "i liked it"
    laid = {name: partial(task, WORDS, length=32) for name, task in classify.TASKS.items()}
    assert said(laid["classification"](one)) == ["<start> the film was good <classify>"]
    pair = "<start> the film was good <delimiter> i liked it <classify>"
    assert said(laid["entailment"](one, other)) == [pair]
    assert said(laid["similarity"](one, other)) == [pair, "<start> i liked it <delimiter> the film was good <classify>"]
    assert said(laid["choice"](one, [other, "it"])) == [pair, "<start> the film was good <delimiter> it <classify>"]
    (document,) = laid["entailment"](one, other)
    assert document.weights.tolist() == [0] + [1] * 9  # the language model learns all that something comes before


def test_of_texts_too_long_the_longest_is_cut_and_the_last_token_stays():
    cut = transformations.entailment(WORDS, "the film was very good", "i liked it", length=8)
    assert said(cut) == ["<start> the film <delimiter> i liked it <classify>"]
    with pytest.raises(ValueError, match="length = 4: no room for text beside 3 special tokens"):
        transformations.entailment(WORDS, "a", "b", length=4)
    with pytest.raises(ValueError, match=r"this tokenizer has no <\|start\|>, "):
        transformations.classification(reviews.tokenizer(), "good", length=8)


def test_the_labels_of_the_generated_world_are_right():
    def good(text):
        return {sentiment(part, VALENCES) > 0 for part in text.split(" .") if part}

    for row in opinions.entailment(60, seed=1):
        hypothesis = good(row["hypothesis"]) if "film" in row["hypothesis"] else None
        assert row["label"] == (1 if hypothesis is None else 2 * (hypothesis == good(row["premise"])))
    for row in opinions.similarity(60, seed=1):
        assert row["label"] == (good(row["first"]) == good(row["second"]))
    for row in opinions.choice(60, seed=1):
        assert [good(answer) == good(row["context"]) for answer in row["answers"]].index(True) == row["label"]
    for row in opinions.sentiment(60, seed=1):
        assert row["label"] == (sentiment(row["text"], VALENCES) > 0)


# ---- rows


def written(folder, *rows, **changed):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"count": 0, "held_out": 1, "first": "{a}", "second": "", "label": "{y}", "classes": ("no", "yes"), "length": 16}
    return {"source": str(folder / "rows.jsonl"), "task": "classification"} | settings | changed


def test_a_label_is_a_name_or_a_number(tmp_path):
    rows = [{"a": "good", "y": y} for y in ("yes", "no", 1, False)]
    train, held_out = classify.examples(WORDS, seed=0, **written(tmp_path, *rows))
    assert [label for _, label in train + held_out] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "row, changed, says",
    [
        ({"y": 2}, {}, "row 1: 'y' is 2: it is one of no, yes, or a number from 0 to 1"),
        ({"y": "maybe"}, {}, "row 1: 'y' is 'maybe'"),
        ({}, {}, "row 1: 'y' is None"),
        ({"y": 0, "b": "good"}, {"task": "choice", "second": "{b}", "classes": ()}, "row 1: 'b' is 'good', not a list"),
        ({"y": 2}, {"task": "choice", "second": "{b}", "classes": ()}, "row 1: 'y' is 2: it is a number from 0 to 1"),
        ({}, {"task": "entailment"}, "data.task = entailment, data.second = ''"),
        ({}, {"task": "choice", "second": "{b}"}, "data.task = choice, .* all but choice have classes"),
    ],
    ids=["number", "name", "missing", "no list", "no answer", "no second", "classes"],
)
def test_rows_and_settings_that_do_not_fit_the_task_are_refused(tmp_path, row, changed, says):
    fine = {"a": "good", "b": ["it", "bad"], "y": 1}
    with pytest.raises(ValueError, match=says):
        broken = {name: x for name, x in fine.items() if name != "y"} | row
        classify.examples(WORDS, seed=0, **written(tmp_path, fine, broken, fine, **changed))


# ---- runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    sizes = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 32, "context": 128}
    tokenizer = reviews.tokenizer()
    config = models.DecoderConfig(vocab=len(tokenizer), **sizes)  # with a head of its own
    params = jax.jit(lambda key: shard.unbox(models.build(config).init(key)))(jax.random.key(0))
    return str(checkpoints.export(tmp_path_factory.mktemp("base") / "base", config, params, tokenizer=tokenizer))


def settings(base, variant, **changed):
    config = getattr(classify_config, variant)(classify_config.get_config("tiny"))
    config.update_from_flattened_dict(
        {"model.source": base, "data.count": 64, "run.steps": 4, "optim.learning_rate": 0.03} | changed
    )
    return config


def run(config, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "make_mesh", lambda **_: ONE)
        classify.run(config, folder)
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def similar(base, tmp_path_factory):
    """A run that learned similarity, and was asked about sentiment on its way: its settings, folder and summary."""
    config, folder = settings(base, "similarity"), tmp_path_factory.mktemp("similar")
    config.evaluate.update(every=2, tasks="sentiment_calibrated")
    asked = launch.config_of("evaluate", "sentiment_calibrated")
    asked.data.source, asked.shots = written(folder, {"text": "good", "label": 1}, {"text": "bad", "label": 0})["source"], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "config_of", lambda *_: asked)
        return config, folder, run(config, folder)


def loaded(config, source):
    model = classify.load(config, str(source), ONE)
    train, _ = classify.examples(model.tokenizer, seed=0, **config.data)
    made = partial(classify.data_of, length=config.data.length, vocab=model.model.config.vocab, most=len(train[0][0]))
    return model, train[:16], made, jax.jit(partial(classify.log_probabilities, model=model.model))


def test_a_pair_is_as_similar_the_other_way_round_and_is_scored_as_it_was_trained(similar):
    config, folder, summary = similar
    model, rows, made, logp = loaded(config, folder)
    data = made(rows)
    there, back = (logp(model.params, made([(texts[::way], label) for texts, label in rows]).texts) for way in (1, -1))
    np.testing.assert_allclose(there, back, atol=1e-5)
    assert np.ptp(there) > 1e-3
    loss, _ = jax.jit(partial(supervised.classify, model=model.model, lm_weight=0.0))(model.params, data)
    assert -there[np.arange(16), data.label].sum() == pytest.approx(float(loss), rel=1e-5)
    assert {"accuracy", "accuracy_stderr", "ece", "chance", "accuracy/other", "accuracy/same"} < summary.keys()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert ["sentiment_calibrated/accuracy" in line for line in lines if "accuracy/held_out" in line] == [True] * 3


def test_new_tokens_are_trained_and_left_with_the_model(similar, base):
    config, folder, _ = similar
    before, after = classify.load(config, base, ONE), checkpoints.load(folder)[1]
    new = WORDS.convert_tokens_to_ids(list(transformations.TOKENS))
    for part, name in (("embed", "tokens"), ("head", "kernel")):
        rows = [np.asarray(params[part][name]) for params in (before.params, after)]
        assert len(rows[1]) == len(WORDS) == new[-1] + 1
        assert (np.abs(rows[0] - rows[1])[new] > 1e-3).any(axis=1).all()
        plain = checkpoints.load(base)[1][part][name]
        np.testing.assert_array_equal(rows[0][: new[0]], plain)  # words keep their rows, and new ones lie among them
        assert np.abs(rows[0][new]).max() < 2 * np.abs(plain).max()
    assert WORDS("good <|delimiter|>")["input_ids"] == checkpoints.tokenizer(folder)("good <|delimiter|>")["input_ids"]


def test_a_run_goes_on_from_the_head_that_another_left(similar):
    config, folder, _ = similar
    kept = json.loads((folder / "classes.json").read_text())
    np.testing.assert_array_equal(classify.load(config, str(folder), ONE).params["classes"]["kernel"], np.float32(kept["kernel"]))
    other = config.copy_and_resolve_references()
    other.data.classes = ("same", "other")
    with pytest.raises(ValueError, match="was trained on the classes other, same, not on same, other"):
        classify.load(other, str(folder), ONE)


def test_a_linear_probe_trains_the_head_alone(base):
    model = classify.load(settings(base, "sentiment", **{"adapter.kind": "head"}), base, ONE)
    state, _ = common.new_state(model, optax.sgd(0.1), ONE)
    assert state.params.keys() == {"classes"} and "classes" not in state.frozen
    assert jax.tree.structure(state.model_params) == jax.tree.structure(model.params)


def test_a_choice_follows_its_answers_and_is_scored_as_it_was_trained(base):
    model, rows, made, logp = loaded(settings(base, "choice"), base)
    data, order = made(rows), [2, 0, 3, 1]
    there = logp(model.params, data.texts)
    moved = logp(model.params, made([(tuple(texts[k] for k in order), 0) for texts, _ in rows]).texts)
    np.testing.assert_allclose(moved, there[:, order], atol=1e-5)
    fewer = logp(model.params, made([(texts[:2], 0) for texts, _ in rows]).texts)  # answers that are not there
    np.testing.assert_allclose(np.exp(fewer[:, :2]).sum(1), 1, atol=1e-5)
    loss, _ = jax.jit(partial(supervised.choose, model=model.model, lm_weight=0.0))(model.params, data)
    assert -there[np.arange(16), data.label].sum() == pytest.approx(float(loss), rel=1e-5)


def test_virtual_tokens_are_refused_before_training(base):
    with pytest.raises(ValueError, match="virtual tokens, .*adapter.kind = prefix"):
        classify.load(settings(base, "sentiment", **{"adapter.kind": "prefix"}), base, ONE)
