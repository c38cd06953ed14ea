"""lm-evaluation-harness asks a model here, and hears what its own back end for transformers says of the same weights.

tests/golden/harness/stories260k.json holds what that said (tests/golden/make_harness.py).
"""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import MODEL
from configs import harness as settings
from experiments import common
from jaxalign import shard
from jaxalign.evaluation import engine

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "harness" / "stories260k.json").read_text())
REQUESTS = GOLDEN["requests"]
LENGTH = 48  # tokens that the reference let the model read


@pytest.fixture(scope="module")
def mesh():
    return shard.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def stories(shared, mesh):
    source = str(shared / "data" / "models" / "stories260k")
    return common.load(source, ConfigDict({"source": source, **MODEL}), mesh, seed=0)


def test_the_engine_says_what_the_reference_says(stories, mesh):
    score = engine.scorer(stories.model, mesh, batch=4, length=LENGTH)
    said = score(stories.params, [engine.whole(stories.tokenizer, *asked) for *asked, _ in REQUESTS["loglikelihood"]])
    logp, greedy = zip(*(answer for *_, answer in REQUESTS["loglikelihood"]))
    np.testing.assert_allclose([one.logp for one in said], logp, rtol=1e-5)
    assert [one.greedy for one in said] == list(greedy) and {True, False} == set(greedy)
    assert [one.cut for one in said] == [False] * 15 + [True]
    texts, logp = zip(*REQUESTS["loglikelihood_rolling"])
    ids = [engine.encoded(stories.tokenizer, string) for string in texts]
    prefix = engine.prefix_of(stories.tokenizer)
    found = engine.rolling(score, stories.params, ids, length=LENGTH, prefix=prefix)
    np.testing.assert_allclose([one.logp for one in found], logp, rtol=1e-5)
    assert found[1].tokens > LENGTH


@pytest.fixture
def harness():
    pytest.importorskip("lm_eval", reason='lm-evaluation-harness is not installed: pip install -e ".[eval]"')
    from experiments import harness

    return harness


def asked(harness, lm, kind, requests, hook=None):
    """What the adapter answers. Args: hook: of the harness, which keeps each answer."""
    if hook is not None:
        lm.set_cache_hook(SimpleNamespace(add_partial=lambda *kept: hook.append(kept)))
    return getattr(lm, kind)([SimpleNamespace(args=tuple(one)) for one in requests])


def test_the_adapter_generates_what_the_reference_generates(harness, stories, mesh):
    lm, kept = harness.Harness(stories, mesh, batch=4, length=LENGTH), []
    requests = [request[:2] for request in REQUESTS["generate_until"]]
    wanted = [answer for *_, answer in REQUESTS["generate_until"]]
    assert asked(harness, lm, "generate_until", requests, kept) == wanted
    assert {(tuple(args)[0], answer) for _, args, answer in kept} == {(one[0], answer) for one, answer in zip(requests, wanted)}
    assert lm.cut == 1


def test_samples_are_keyed_by_the_prompt_and_its_repeats(harness, stories, mesh):
    lm = harness.Harness(stories, mesh, batch=4, length=LENGTH, seed=3)
    sampled = {"until": [], "max_gen_toks": 24, "do_sample": True, "temperature": 1.0}
    one, other, again = asked(harness, lm, "generate_until", [("One day", sampled), ("The end", sampled), ("One day", sampled)])
    assert one != again
    assert asked(harness, lm, "generate_until", [("The end", sampled), ("One day", sampled)]) == [other, one]


def test_a_way_to_generate_that_nothing_here_knows_is_refused(harness):
    with pytest.raises(ValueError, match="num_beams is read by nothing here"):
        harness._settings({"until": ["."], "num_beams": 4})


def test_chats_are_rendered_by_the_tokenizer(harness, stories, mesh):
    tokenizer = stories.tokenizer
    template = "{% for m in messages %}<{{m.role}}>{{m.content}}</{{m.role}}>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    lm = harness.Harness(stories, mesh, batch=4)
    assert lm.chat_template(True) is None
    tokenizer.chat_template = template
    try:
        turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is"}]
        assert lm.apply_chat_template(turns[:1]) == "<user>2+2?</user>\n<assistant>"
        assert lm.apply_chat_template(turns, add_generation_prompt=False) == "<user>2+2?</user>\n<assistant>It is"
        assert lm.chat_template(True) == template and lm.chat_template(False) is None
    finally:
        tokenizer.chat_template = None


def test_a_run_finds_what_the_reference_found_and_goes_on_where_it_stopped(harness, shared, tmp_path, monkeypatch):
    from lm_eval.api.model import CacheHook

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[:1]))
    tasks, config = GOLDEN["tasks"], settings.get_config()
    config.model.source = str(shared / "data" / "models" / "stories260k")
    config.update(limit=tasks["limit"], batch=2)
    keep, score, kept, asked = CacheHook.add_partial, harness.Harness.loglikelihood, [], []

    def keep_three(self, *answer):
        keep(self, *answer)
        kept.append(answer)
        if len(kept) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as first, pytest.raises(KeyboardInterrupt):
        first.setattr(CacheHook, "add_partial", keep_three)
        harness.run(config, tmp_path)
    monkeypatch.setattr(
        harness.Harness, "loglikelihood", lambda self, requests: asked.append(len(requests)) or score(self, requests)
    )
    harness.run(config, tmp_path)
    assert asked == [4 * tasks["limit"] - 3]

    results = json.loads((tmp_path / "results.json").read_text())["results"]
    for task, scores in tasks["scores"].items():
        for name, value in scores.items():
            assert results[task][name] == pytest.approx(value, rel=1e-5)
    found = {task: [] for task in tasks["answers"]}
    for line in (tmp_path / "records.jsonl").read_text().splitlines():
        found[json.loads(line)["task"]].append(json.loads(line)["answers"])
    assert found.pop("local_gsm8k") == tasks["answers"]["local_gsm8k"]
    for task, answers in found.items():
        for mine, wanted in zip(answers, tasks["answers"][task], strict=True):
            np.testing.assert_allclose(*([np.ravel(answer)[0] for answer in part] for part in (mine, wanted)), rtol=1e-5)
