"""Reward models as programs: what rows say, how scores agree with it, ensembles, and one run of each kind of objective."""

import contextlib
import io
import json
import math
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import reward as reward_config
from experiments import agreement, ensemble, launch, reward
from jaxalign import models, rewards, score, shard
from jaxalign.data import reviews, tables
from jaxalign.data.text import Document
from jaxalign.models import checkpoints
from jaxalign.objectives import reward as objectives
from jaxalign.train import log

WORDS = reviews.tokenizer()
TEXTS = {"source_length": 0, "chat": False, "count": 0, "held_out": 1, "length": 32}


def written(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": str(folder / "rows.jsonl")} | TEXTS


# ---- what rows say


PAIR = {"prompt": "the film was", "chosen": " good .", "rejected": " bad ."}
TWO = {"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "{rejected}"}


def test_words_for_how_much_better_become_llama_2s_margins(tmp_path):
    rows = [PAIR | {"by": by} for by in ("slightly better", "significantly better", "negligibly better")]
    for margins, want in (("small", [1 / 3, 1.0, 0.0]), ("large", [1.0, 3.0, 0.0])):
        found = reward.comparisons(WORDS, len(WORDS), margin="{by}", margins=margins, **TWO, **written(tmp_path, rows))
        assert [row["margin"] for part in found for *_, row in part] == want
    with pytest.raises(
        ValueError, match="rows.jsonl, row 1: '{by}' of the template is 'much better'; the margins are of significantly"
    ):
        reward.comparisons(
            WORDS, len(WORDS), margin="{by}", margins="small", **TWO, **written(tmp_path, [rows[0], PAIR | {"by": "much better"}])
        )


def test_votes_say_which_is_better_and_how_sure(tmp_path):
    rows = [PAIR | {"w": w, "t": t} for w, t in ((0.8, 0.0), (0.1, 0.2), (0.4, 0.2))]
    train, held_out = reward.votes(WORDS, len(WORDS), won="{w}", tied="{t}", **TWO, **written(tmp_path, rows))
    better, worse = agreement.ordered([row["rank"] for *_, row in train + held_out])
    assert better.tolist() == [0, 3] and worse.tolist() == [1, 2]  # of the last nobody knows
    data = reward.data_of(objectives.Judged, train, len(WORDS), length=32)
    np.testing.assert_allclose((data.won, data.tied), [[0.8, 0.1], [0.0, 0.2]], rtol=1e-6)
    with pytest.raises(ValueError, match="row 0: won 0.8.* and tied 0.5 are shares of votes"):
        tables.judged([train[0][0]], [train[0][1]], [0.8], [0.5], 32)


MANY = {"prompt": "the film was", "answers": ["good .", "bad .", "fine ."]}


@pytest.mark.parametrize("said, ranks", [(2, [1, 1, 0]), ([5, 9, 5], [5, 9, 5])], ids=["the best", "an order"])
def test_a_ranking_is_the_best_one_or_all_in_order(tmp_path, said, ranks):
    few = MANY | {"answers": ["cold .", "warm ."], "order": 0}
    settings = {"prompt": "{prompt}", "responses": " {answers}", "rank": "{order}"}
    (first, second), (last,) = reward.rankings(
        WORDS, len(WORDS), **settings, **written(tmp_path, [MANY | {"order": said}, few, few])
    )
    assert [WORDS.decode(document.tokens[3:], skip_special_tokens=True) for document in first[:-1]] == MANY["answers"]
    assert first[-1]["rank"] == ranks and second[-1]["rank"] == [0, 1] and len(last) == 3
    data = reward.data_of(objectives.Ranked, [second, first], len(WORDS), most=3, length=32)
    assert data.rank.tolist() == [[0, 1, 0], ranks]
    there = np.array([(one.segments > 0).any(1) for one in data.responses]).T
    assert there.tolist() == [[True, True, False], [True] * 3]


@pytest.mark.parametrize(
    "row, says",
    [
        (MANY | {"order": 3}, "'order' is 3: it is the number of one of 3 responses, from 0, or a rank of each"),
        (MANY | {"order": [0, 1]}, "'order' is a list of 2: it is the number of one of 3 responses"),
        (MANY | {"order": True}, "'order' is True"),
        (MANY | {"answers": "good .", "order": 0}, "'answers' is 'good .', not a list"),
    ],
)
def test_a_bad_ranking_is_refused_by_row(tmp_path, row, says):
    settings = {"prompt": "{prompt}", "responses": " {answers}", "rank": "{order}"}
    with pytest.raises(ValueError, match=f"rows.jsonl, row 1: {says}"):
        reward.rankings(WORDS, len(WORDS), **settings, **written(tmp_path, [MANY | {"order": 0}, row]))


def test_counts_of_responses_and_ranks_must_agree():
    document = Document(np.int32([1, 2]), np.float32([0, 1]))
    with pytest.raises(ValueError, match="row 1: 2 responses and 1 ranks, where there are at most 2"):
        tables.ranked([[document] * 2] * 2, [[0, 1], [0]], 2, 4)


# ---- how scores agree


def test_scores_that_are_the_order_agree_with_it_and_lengths_tell():
    better, worse = agreement.ordered([range(2), [1, 0, 1], (), [4]])
    assert list(zip(better, worse, strict=True)) == [(0, 1), (3, 2), (3, 4)]
    scores, lengths = np.float32([2, 1, 0, 5, 0, 7]), np.array([4, 9, 1, 6, 8, 2])
    summary, figures = agreement.of_scores(scores, better, worse, lengths)
    assert (
        summary["reward_model/accuracy"] == summary["reward_model/longer_accuracy"] == summary["reward_model/shorter_accuracy"] == 1
    )
    sure = 1 / (1 + np.exp([-1.0, -5.0, -5.0]))
    assert summary["reward_model/ece"] == pytest.approx((1 - sure[0] + abs(2 - sure[1:].sum())) / 3, abs=1e-6)
    assert summary["reward_model/length_correlation"] == pytest.approx(np.corrcoef(scores, lengths)[0, 1])
    (figure,) = figures.values()
    np.testing.assert_allclose(next(iter(figure["curves"].values())), np.stack([sure, np.ones(3)], 1), rtol=1e-5)


def test_a_judge_of_length_alone_is_found_out():
    draw = np.random.default_rng(2)
    lengths = draw.integers(1, 40, 400)
    better, worse = np.arange(0, 400, 2), np.arange(1, 400, 2)
    summary, _ = agreement.of_scores(lengths.astype(np.float32), better, worse, lengths)
    assert summary["reward_model/length_correlation"] == pytest.approx(1)
    assert summary["reward_model/longer_accuracy"] == 1 and summary["reward_model/shorter_accuracy"] == 0
    assert summary["reward_model/accuracy"] == pytest.approx(0.5, abs=0.1) and summary["reward_model/ece"] > 0.4


def test_the_surest_quarter_is_the_most_often_right():
    draw = np.random.default_rng(3)
    true = draw.normal(0, 1.5, 8000).astype(np.float32)
    first, second = np.arange(0, 8000, 2), np.arange(1, 8000, 2)
    won = draw.uniform(size=4000) < 1 / (1 + np.exp(true[second] - true[first]))
    summary, _ = agreement.of_scores(true, np.where(won, first, second), np.where(won, second, first), np.ones(8000))
    quarters = [summary[f"reward_model/quarter_{n}_accuracy"] for n in (1, 2, 3, 4)]
    assert quarters == sorted(quarters) and quarters[3] - quarters[0] > 0.3
    assert summary["reward_model/ece"] < 0.03 and "reward_model/length_correlation" not in summary


# ---- runs


def run(config, folder):
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[:1]))
        reward.run(config, folder)
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="session")
def two(once) -> Path:
    """The folder of a tiny ensemble of two, its stages made."""
    with once("ensemble") as (folder, made):
        if not made:
            config = reward_config.get_config("tiny")
            config.run.members = 2
            run(config, folder)
    return folder


@pytest.mark.slow
def test_an_ensemble_is_of_different_models_that_score_together(two):
    sources = ensemble.folders(two)
    assert sources == [str(two), str(two / "members" / "1")] and ensemble.folders(two / "sft") == [str(two / "sft")]
    configs = [log.read_json(Path(source) / "config.json") for source in sources]
    assert log.difference(*configs) == ["run.members: 2 -> 1", "seed: 0 -> 1"]
    rows = log.read_lines(two / "compare" / "comparisons.jsonl")[-32:]
    documents = [
        Document(np.int32(row["prompt_ids"] + row[f"{side}_ids"]), None) for row in rows for side in ("chosen", "rejected")
    ]
    batch = tables.pad([document._replace(weights=np.ones(len(document.tokens), np.float32)) for document in documents], 40)
    scores = []
    for source in sources:
        architecture, params = checkpoints.load(source)
        scores.append(np.asarray(jax.jit(partial(score.last_scalar, models.build(architecture)))(params, batch)))
    scores = np.stack(scores)
    np.testing.assert_allclose((scores.mean(1), scores.std(1)), [[0, 0], [1, 1]], atol=1e-4)
    summary = json.loads((two / "summary.json").read_text())
    assert summary["ensemble/disagreement"] == pytest.approx(scores.std(0).mean(), rel=1e-4) and scores.std(0).mean() > 0.01
    for name, combine in (("mean", rewards.mean_score), ("worst", rewards.worst_score)):
        of_all = np.asarray(combine(scores))
        assert summary[f"ensemble/{name}_accuracy"] == pytest.approx((of_all[::2] > of_all[1::2]).mean(), abs=1e-6)
    alone = json.loads((two / "members" / "1" / "summary.json").read_text())
    assert summary["seconds"] > alone["seconds"] and not any(name.startswith("ensemble/") for name in alone)
    assert "Reliability" in (two / "report.html").read_text()

    mesh, settings = shard.make_mesh(devices=jax.devices()[:1]), reward_config.get_config("tiny").model
    for doubt, want in ((0.0, scores.mean(0)), (0.5, scores.mean(0) - 0.5 * scores.var(0)), (math.inf, scores.min(0))):
        _, params, judged = ensemble.load(two, settings, mesh, seed=0, doubt=doubt)
        np.testing.assert_allclose(jax.jit(judged)(params, batch), want, rtol=1e-4, atol=1e-4)


def of_kind(name, source, two):
    """A tiny config of this objective, on rows of a file, from the model that the comparisons are of."""
    config = reward_config.get_config("tiny")
    theirs = reward_config.get_config(name)
    config.objective, config.stages = theirs.objective, {}
    config.model.source = str(two / "sft")
    data = theirs.data.to_dict() | {"source": str(source), "held_out": 16, "length": 40, "prompt": "{prompt}"}
    config.data = data
    config.optim.learning_rate = 0.01
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, columns",
    [
        ("noisy_pairwise", {}),
        ("difference", {"margin": "{points}"}),
        ("soft_pairwise", {"won": "{won}"}),
        ("pairwise_with_ties", {"won": "{won}", "tied": "{tied}"}),
        ("best_of_k", {"responses": " {answers}", "rank": "{best}"}),
        ("k_wise", {"responses": " {answers}", "rank": "{order}"}),
        ("rating", {"response": " {chosen}", "rating": "{points}"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_each_kind_of_label_makes_a_reward_model(name, columns, two, tmp_path):
    prompts, texts = reviews.openings(64, seed=3), reviews.reviews(192, seed=4)
    rows = []
    for n, prompt in enumerate(prompts):
        answers = [f" {text}" for text in texts[3 * n : 3 * n + 3]][: 2 + n % 2]  # two or three
        points = [rewards.sentiment(answer, reviews.VALENCES) for answer in answers]
        order = [sorted(points, reverse=True).index(x) for x in points]
        row = {
            "prompt": prompt,
            "rank": "of theirs",
            "ceiling": 0,
            "answers": answers,
            "order": order,
            "best": order.index(0),
            "points": points[0],
        }
        rows.append(row | {"chosen": answers[0], "rejected": answers[1], "won": 0.5 if n % 4 else 0.9, "tied": 0.1})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = of_kind(name, tmp_path / "rows.jsonl", two)
    config.data.update(columns)
    launch.check(config)
    summary = run(config, tmp_path / "run")
    assert all(math.isfinite(x) for x in summary.values()) and summary["comparisons/trained"] == 48
    assert ("reward_model/rating_correlation" in summary) == (name == "rating") != ("reward_model/accuracy" in summary)
    lines = log.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["train/weight"] for line in lines] == [16] * 4 and lines[0]["loss/total"] != lines[-1]["loss/total"]
    architecture, params = checkpoints.load(tmp_path / "run")
    assert architecture.scalar and params["scalar"]["kernel"].any()
