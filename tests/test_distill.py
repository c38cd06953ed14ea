"""Distillation as a program: what it trains on, what it measures, what it refuses, and that a stopped run goes on."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest

from configs import distill as distill_config
from experiments import common, distill, sft
from experiments.settings import check
from jaxalign import models, shard
from jaxalign.data import reviews, tables
from jaxalign.models import checkpoints
from jaxalign.train import log

ONE = shard.make_mesh(devices=jax.devices()[:1])


def made(folder, mlp, tokenizer):
    sizes = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": mlp, "context": 128}
    config = models.DecoderConfig(vocab=len(tokenizer), tied=True, **sizes)
    params = jax.jit(lambda key: shard.unbox(models.build(config).init(key)))(jax.random.key(mlp))
    return str(checkpoints.export(folder, config, jax.tree.map(lambda x: 3 * x, params), tokenizer=tokenizer))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of a student and of a teacher."""
    folder = tmp_path_factory.mktemp("models")
    return [made(folder / str(mlp), mlp, reviews.tokenizer()) for mlp in (16, 32)]


def settings(sources, **changed):
    config = distill_config.get_config("tiny")
    student, teacher = sources
    given = {
        "model.source": student,
        "teacher_model.source": teacher,
        "data.count": 64,
        "run.steps": 4,
        "optim.learning_rate": 0.03,
    }
    config.update_from_flattened_dict(given | {"loop.log_every": 1, "evaluate.every": 4} | changed)
    return config


def test_updates_are_on_the_students_own_samples_or_on_the_text_as_the_share_says(sources):
    config = settings(sources, **{"run.on_policy": 1.0})
    student, teacher = (common.load(source, config.model, ONE, seed=0) for source in sources)
    train, _ = sft.documents(student.tokenizer, seed=0, **config.data)
    other = jax.tree.map(lambda x: -x, student.params)
    expected = [tables.pad([train[n] for n in tables.order(len(train), 16, seed=0, step=i)], 64) for i in range(3)]

    data_at, taught = distill.learn_from(config, student, teacher, ONE, train)

    def seen(params=student.params):
        return [jax.device_get(taught(params, teacher.params, data_at(i))).batch for i in range(3)]

    own, others = seen(), seen(other)
    for batch, moved, text in zip(own, others, expected, strict=True):
        np.testing.assert_array_equal(batch.tokens[:, 0], text.tokens[:, 0])  # a review's prompt is its first word
        assert (batch.targets[:, 1] == 1).all() and (batch.tokens[:, 1:9] != text.tokens[:, 1:9]).any(1).all()
        assert (batch.tokens != moved.tokens).any()  # said by the parameters as they are
    assert (own[0].tokens[:, :2] != own[1].tokens[:, :2]).any()
    config.run.on_policy = 0.0
    for batch, text in zip(seen(), expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, text)
    config.run.on_policy = 0.25
    assert 30 < sum(distill.on_policy(config, i) for i in range(200)) < 70


def test_a_student_that_is_its_teacher_has_nothing_to_learn(sources):
    config = settings(sources)
    student, teacher = (common.load(source, config.model, ONE, seed=0) for source in sources)
    _, held_out = sft.documents(student.tokenizer, seed=0, **config.data)
    found = []
    for one, other in ((student, student), (student, teacher)):
        measure = partial(distill.gaps, student=one.model, teacher=other.model, k=one.model.config.vocab)
        means = common.held_out_means(measure, ONE, held_out[:20], 16, length=64)  # the last part is filled up
        found.append(means((one.params, other.params)))
    same, apart = found
    assert (
        same["forward_kl"] == pytest.approx(0, abs=1e-6)
        and same["reverse_kl"] == pytest.approx(0, abs=1e-6)
        and same["agreed"] == 1
    )
    assert same["nll"] == pytest.approx(same["teacher_nll"], rel=1e-6) and same["nll"] == pytest.approx(apart["nll"], rel=1e-6)
    assert apart["forward_kl"] > 0.1 and apart["reverse_kl"] > 0.1 and apart["agreed"] < 0.9


def run(config, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "make_mesh", lambda **_: ONE)
        distill.run(config, folder)


def record(folder):
    """Metrics and summary, without times."""
    lines = [{k: x for k, x in line.items() if not k.startswith("time/")} for line in log.read_lines(folder / "metrics.jsonl")]
    return lines, json.loads((folder / "summary.json").read_text()) | {"seconds": 0}


def test_a_run_goes_on_from_any_step_to_the_same_numbers(sources, tmp_path):
    """Updates on text and on samples, and a student that comes nearer to its teacher."""
    config = settings(sources, **{"loop.save_every": 2})
    run(config, tmp_path)
    lines, summary = record(tmp_path)
    assert {line["data/on_policy"] for line in lines if "data/on_policy" in line} == {0.0, 1.0}
    assert summary["forward_kl/after"] < summary["forward_kl/before"] and summary["nll/teacher"] > 0
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    run(config, tmp_path)
    assert record(tmp_path) == (lines, summary)


def test_a_share_of_jsd_is_below_1():
    config = distill_config.get_config("jsd")
    check(config)
    config.objective.beta = 1.0
    with pytest.raises(ValueError, match="objective.beta = 1: of jsd it is a share"):
        check(config)


def test_a_teacher_of_another_tokenizer_is_refused(sources, tmp_path):
    other = made(tmp_path / "other", 8, reviews.words_tokenizer({"good", "bad"}))
    with pytest.raises(ValueError, match="have different tokenizers or vocabularies"):
        run(settings((sources[0], other)), tmp_path / "run")
    with pytest.raises(ValueError, match="teacher_model.k = 500: the vocabulary has 82 tokens; 0 is all"):
        run(settings(sources, **{"teacher_model.k": 500}), tmp_path / "run")
