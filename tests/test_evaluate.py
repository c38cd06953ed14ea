"""What experiments.evaluate finds of each example is what one finds who asks one at a time, and reads all logits in NumPy."""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import evaluate as settings
from configs import judge as judging
from configs import sft as training
from experiments import common, ensemble, evaluate, judge, launch, sft
from jaxalign import score, shard
from jaxalign.evaluation import engine
from jaxalign.types import Batch

LENGTH = 512  # tokens that stories260k reads


@pytest.fixture(scope="module")
def source(shared):
    return str(shared / "data" / "models" / "stories260k")


@pytest.fixture(scope="module")
def stories(source):
    config = settings.get_config("mmlu")
    return common.load(source, config.model, shard.make_mesh(devices=jax.devices()[:1]), seed=0)


@pytest.fixture(scope="module")
def after(stories):
    """ids -> f64 log-probabilities after each of these tokens, one row without padding before it."""
    rows = jax.jit(
        lambda params, tokens: stories.model.unembed(params, stories.model.apply(params, tokens, jnp.ones_like(tokens))[0])
    )

    def call(ids):
        logits = np.asarray(rows(stories.params, jnp.asarray([[*ids, *[0] * (LENGTH - len(ids))]])), np.float64)[0, : len(ids)]
        return (
            logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
        )

    return call


@pytest.fixture(scope="module")
def logp_of(stories, after):
    """(prompt, answer) -> log-probability of the answer's tokens behind the prompt's."""

    def call(prompt, answer):
        asked, whole = (stories.tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
        assert whole[: len(asked)] == asked
        kept = max(0, len(whole) - LENGTH - 1)  # the start goes
        asked, whole = asked[kept:], whole[kept:]
        found = after(whole[:-1])
        return sum(found[t - 1, whole[t]] for t in range(len(asked), len(whole)))

    return call


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(config, source, folder):
    """-> (records by id, summary) of a run."""
    config.model.source = source
    evaluate.run(config, folder)
    found = read(folder / "records.jsonl")
    assert len({record["id"] for record in found}) == len(found)
    return {record["id"]: record for record in found}, json.loads((folder / "summary.json").read_text())


def test_mmlu_is_what_its_authors_script_would_say(shared, source, stories, logp_of, tmp_path):
    """Of subjects that nobody has seen, with demonstrations dropped from the end where they do not fit.

    " A" is two tokens here, so it is scored as the text that it is.
    """
    rows = [row for row in read(shared / "data" / "knowledge" / "mmlu_dev.jsonl")][:60]
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    named = {subject: f"unseen_subject_{n}" for n, subject in enumerate(subjects)}
    test = [row | {"id": f"new-{n}", "subject": named[row["subject"]]} for n, row in enumerate(rows) if n % 5 == 4]
    dev = [row | {"subject": named[row["subject"]]} for n, row in enumerate(rows) if n % 5 != 4]
    config = settings.get_config("mmlu")
    config.data.update(source=write(tmp_path / "test.jsonl", test), pool=write(tmp_path / "dev.jsonl", dev))
    config.shots = 4
    found, told = asked(config, source, tmp_path)

    def example(row, letter=""):
        return row["question"] + "".join(f"\n{a}. {b}" for a, b in zip("ABCD", row["choices"])) + f"\nAnswer:{letter}"

    right, dropped = {}, 0
    for row in test:
        shots = [example(shot, f" {'ABCD'[shot['answer']]}\n\n") for shot in dev if shot["subject"] == row["subject"]]
        head = f"The following are multiple choice questions (with answers) about  {row['subject'].replace('_', ' ')}.\n\n"
        while (size := len(stories.tokenizer(head + "".join(shots) + example(row) + " A")["input_ids"])) > LENGTH + 1 and shots:
            shots, dropped = shots[:-1], dropped + 1
        scores = np.array([logp_of(head + "".join(shots) + example(row), f" {letter}") for letter in "ABCD"])
        record = found[row["id"]]
        assert record["asked"] == head + "".join(shots) + example(row)
        np.testing.assert_allclose([logp for _, logp, _ in record["scores"]], scores, rtol=1e-4)
        assert record["answer"] == scores.argmax() and record["cut"] == (size > LENGTH + 1)
        right[row["id"]] = float(scores.argmax() == row["answer"])
        assert record["accuracy"] == right[row["id"]]
    assert told["dropped"] == dropped > 0
    micro, macro = told["figures"]["micro"], told["figures"]["macro"]
    assert micro["accuracy"] == pytest.approx(np.mean([*right.values()])) and micro["count"] == len(test)
    assert micro["accuracy_error"] == pytest.approx(np.std([*right.values()]) / len(test) ** 0.5)
    assert macro["accuracy"] == pytest.approx(micro["accuracy"]) and told["figures"]["mmlu/unseen_subject_1"]["count"] == 1
    assert micro["ece"] >= 0 and micro["ece_error"] > 0
    assert (tmp_path / "reliability.png").stat().st_size > 1000


def test_bigbench_is_the_argmax_of_summed_log_probabilities(source, logp_of, tmp_path):
    examples = [
        {"input": "Tom has a", "target_scores": {"big red ball": 1, "cat": 0.5}},
        {"input": "Lily went to the", "target_scores": {"park": 0, "store with her mom": 1, "xyz": 0}},
        {"input": "The dog is", "target_scores": {"happy and sad": 0, "very": 1}},
    ]
    said = {"name": "new", "metrics": ["multiple_choice_grade"], "examples": examples, "append_choices_to_input": False}
    (tmp_path / "task.json").write_text(json.dumps(said))
    config = settings.get_config("bigbench")
    config.data.source = str(tmp_path / "task.json")
    found, told = asked(config, source, tmp_path)
    grades = []
    for n, example in enumerate(examples):
        sums = [logp_of(f"\nQ: {example['input']}\nA:", f" {choice}") for choice in example["target_scores"]]
        np.testing.assert_allclose([logp for _, logp, _ in found[n]["scores"]], sums, rtol=1e-4)
        grades.append([*example["target_scores"].values()][np.argmax(sums)])
        assert found[n]["multiple_choice_grade"] == grades[-1]
    assert told["figures"]["micro"]["multiple_choice_grade"] == pytest.approx(np.mean(grades))


def greedy(stories, after, prompt, count, stop):
    ids, first = stories.tokenizer(prompt)["input_ids"], None
    first = len(ids)
    while len(ids) < first + count and ids[-1] != stories.tokenizer.eos_token_id or len(ids) == first:
        ids.append(int(after(ids)[-1].argmax()))
    return stories.tokenizer.decode(ids[first:], skip_special_tokens=True).partition(stop)[0]


def words(text):
    return re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[^\w\s]", "", text.lower())).split()


def test_squad_is_written_greedily_and_judged_by_words_in_common(source, stories, after, logp_of, tmp_path):
    passages = [
        {"id": f"p{n}", "title": "Tom", "text": text} for n, text in enumerate(("Tom saw a big dog.", "Lily has a red ball."))
    ]
    rows = [
        {
            "id": "a",
            "passage_id": "p0",
            "question": "What did Tom see?",
            "answers": ["a big dog", "Tom saw"],
            "is_impossible": False,
        },
        {"id": "b", "passage_id": "p1", "question": "What is Lily?", "answers": [], "is_impossible": True},
        {"id": "c", "passage_id": "p1", "question": "What has Lily?", "answers": ["She was"], "is_impossible": False},
    ]
    config = settings.get_config("squad2")
    config.data.update(source=write(tmp_path / "q.jsonl", rows), beside=write(tmp_path / "p.jsonl", passages))
    config.sample.length = 12
    found, told = asked(config, source, tmp_path)
    for row in rows:
        text = next(f"{one['title']}: {one['text']}" for one in passages if one["id"] == row["passage_id"])
        head = "Answer each question in a few words of the text above it. Where the text does not say it, write: unanswerable"
        prompt = f"{head}\n\n{text}\n\nQuestion: {row['question']}\nAnswer:"
        record, said = found[row["id"]], words(greedy(stories, after, prompt, 12, "\n"))
        assert record["asked"] == prompt and words(record["written"][0]) == said
        gold = [words(answer) for answer in row["answers"]] or [[]]
        common_words = [sum((Counter(said) & Counter(one)).values()) for one in gold]
        f1 = max(2 * n / (len(said) + len(one)) if said and one else float(said == one) for n, one in zip(common_words, gold))
        assert (record["f1"], record["exact_match"]) == (pytest.approx(f1), float(said in gold))
        assert record["no_answer"] == pytest.approx(logp_of(prompt, " unanswerable"), rel=1e-4)
    figures = told["figures"]
    assert figures["squad2/has answer"]["count"] == 2 and figures["micro"]["best_f1"] >= figures["micro"]["f1"]


ONE = [{"question": f"Tom has {n} cats. How many?", "answer": f"#### {n}", "final": str(n)} for n in range(1, 11)]


OWN = '{"text": "Q: {question}[Z]", "slots": {"answer": {"yes": "right", "no": "wrong"}}}'


def test_chains_of_thought_are_drawn_by_example_and_concluded(source, stories, tmp_path):
    """The same whether all are asked at once or one alone; the vote is of all draws."""
    config = settings.get_config("gsm8k_zero_shot")
    config.update(draws=2)
    config.sample.update(length=8, temperature=1.0)
    config.data.source = write(tmp_path / "rows.jsonl", ONE[:3])
    found, _ = asked(config, source, tmp_path / "all")
    config.data.source = write(tmp_path / "rows.jsonl", [ONE[1] | {"id": 1}])
    (tmp_path / "one").mkdir()
    alone, _ = asked(config, source, tmp_path / "one")
    assert alone[1] == found[1] and len({*found[0]["written"], *found[1]["written"]}) == 4
    assert all("\nTherefore, the answer (arabic numerals) is" in text for text in found[1]["written"])
    assert found[1]["asked"] == f"Question: {ONE[1]['question']}\nAnswer:"


def test_an_evaluation_that_was_killed_goes_on(source, tmp_path, monkeypatch):
    config = settings.get_config("perplexity")
    config.data.source = write(tmp_path / "rows.jsonl", [{"text": f"Tom had {n} big red dogs. " * n} for n in range(1, 20)])
    config.model.source, config.batch, chunk = source, 8, evaluate.CHUNK
    monkeypatch.setattr(evaluate, "CHUNK", 1)
    rolling, read_now = engine.rolling, []

    def interrupted(score, params, texts, **settings):
        read_now.append(len(texts))
        if len(read_now) == 3:
            raise KeyboardInterrupt
        return rolling(score, params, texts, **settings)

    monkeypatch.setattr(engine, "rolling", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config, tmp_path)
    assert len(read(tmp_path / "records.jsonl")) == 16
    monkeypatch.setattr(evaluate, "CHUNK", chunk)
    found, told = asked(config, source, tmp_path)
    assert read_now == [8, 8, 3, 3] and len(found) == 19
    total = {name: sum(record[name] for record in found.values()) for name in ("logp", "tokens", "bytes")}
    micro = told["figures"]["micro"]
    assert micro["perplexity"] == pytest.approx(np.exp(-total["logp"] / total["tokens"])) and micro["perplexity_error"] > 0
    assert micro["bits_a_byte"] == pytest.approx(-total["logp"] / total["bytes"] / np.log(2))


def test_a_hook_leaves_training_as_it_is(tmp_path, monkeypatch):
    """Bit for bit; and what it finds after the last step is what the program finds of the model that is left."""
    rows = write(
        tmp_path / "rows.jsonl", [{"text": text, "label": n % 2} for n, text in enumerate(("a fine film", "it is bad", "so so"))]
    )
    known = launch.config_of

    def of_few(name, variant):
        config = known(name, variant)
        config.data.source, config.shots = rows, 0
        return config

    monkeypatch.setattr(launch, "config_of", of_few)
    left = {}
    for name, tasks in (("without", ""), ("with", "sentiment_calibrated")):
        config = training.get_config("tiny")
        config.data.update(count=64, held_out=8)
        config.run.update(steps=2, batch=8)
        config.evaluate.update(every=tasks and 1 or 0, tasks=tasks, count=2)
        sft.run(config, tmp_path / name)
        left[name] = (tmp_path / name / "model" / "model.safetensors").read_bytes()
    assert left["with"] == left["without"]
    lines = read(tmp_path / "with" / "metrics.jsonl")
    assert all("sentiment_calibrated/accuracy" in line and "sentiment_calibrated/brier_error" in line for line in lines)
    config = settings.get_config("sentiment_calibrated")
    config.data.update(source=rows, count=2)
    config.shots = 0
    _, told = asked(config, str(tmp_path / "with"), tmp_path / "after")
    assert told["figures"]["micro"]["brier"] == pytest.approx(lines[-1]["sentiment_calibrated/brier"], rel=1e-5)
    with pytest.raises(ValueError, match="'mmlv' is no variant of configs/evaluate.py; there are mmlu"):
        evaluate.hook(None, None, tmp_path, tasks="mmlv", every=1, count=0)


@pytest.mark.parametrize(
    "task, change, rows, says",
    [
        ("mmlu", {"shots": 0}, [{"subject": "s"}], "rows.jsonl, row 0: column 'question' is missing; the columns are: subject"),
        ("bbh", {"data.beside": ""}, ONE, "data.beside = '': beside its rows this task reads a file of task, cot_prompt"),
        ("gsm8k", {"data.beside": "x.jsonl"}, ONE, "data.beside = 'x.jsonl': beside its rows this task reads no other file"),
        ("gsm8k", {}, [ONE[0] | {"final": "x"}], "rows.jsonl: row 0: 'final' is 'x', not a number"),
        ("gsm8k", {"data.pool": ""}, ONE, "shots = 4: data.pool says which rows they are taken from"),
        ("gsm8k_zero_shot", {"draws": 2}, ONE, "draws = 2: with sample.temperature = 0 all would be alike"),
        ("gsm8k", {"task": "gsm9k"}, ONE, "task = 'gsm9k'; there are mmlu, "),
        (
            "strategyqa",
            {"template": OWN},
            [{"question": "?", "answer": "yes"}],
            "it answers row 0 by ' right', and this task scores ' yes', ' no'",
        ),
    ],
    ids=["columns", "no file", "file", "row", "pool", "draws", "task", "template"],
)
def test_what_cannot_be_asked_is_said_in_one_line(stories, tmp_path, task, change, rows, says):
    config = settings.get_config(task)
    config.data.update(source=write(tmp_path / "rows.jsonl", rows), pool="")
    if task == "gsm8k":
        config.data.pool = config.data.source
    config.update_from_flattened_dict(change)
    if config.template:
        (tmp_path / "yes.json").write_text(config.template)
        config.template = str(tmp_path / "yes.json")
    with pytest.raises(ValueError, match=f"^[^\n]*{re.escape(says)}[^\n]*$"):
        evaluate.prepare(config, stories, shard.make_mesh(), 0)


@pytest.mark.parametrize("rank", ["balanced", "nearest"])
def test_demonstrations_are_ranked_as_the_config_says(stories, tmp_path, rank):
    pool = [
        {"text": text, "label": n // 3} for n, text in enumerate(("a dog", "a cat", "red ball", "big sun", "old man", "my hat"))
    ]
    config = settings.get_config("sentiment")
    config.data.update(
        source=write(tmp_path / "rows.jsonl", [{"text": "the sun", "label": 0}]), pool=write(tmp_path / "pool.jsonl", pool)
    )
    config.update(rank=rank, shots=2)
    measure = evaluate.prepare(config, stories, shard.make_mesh(devices=jax.devices()[:1]), 0)
    (record,), _ = measure(stories.params, "", tmp_path / "records.jsonl")
    shown = re.findall(r"Opinion: (\w+)", record["asked"])
    assert (
        {*shown} == {"negative", "positive"} if rank == "balanced" else record["asked"].split("Sentence: ")[1].startswith("big sun")
    )


def test_a_judge_hears_both_orders(source, logp_of, tmp_path):
    ours = [
        {"prompt": f"Who is {name}?", "text": text}
        for name, text in (("Tom", "A boy."), ("Lily", "She is a girl."), ("Max", "A dog"))
    ]
    theirs = [{"prompt": row["prompt"], "text": text} for row, text in zip(ours, ("He is a happy boy.", "A cat.", "A dog"))]
    config = judging.get_config()
    config.model.source, config.chat = source, False
    config.ours, config.theirs = (
        write(tmp_path / "a.jsonl", ours),
        write(tmp_path / "b.jsonl", [*theirs, {"prompt": "?", "text": "x"}]),
    )
    judge.run(config, tmp_path / "one")
    form = json.loads(Path(config.template).read_text())
    for record in read(tmp_path / "one" / "records.jsonl"):
        won = []
        for first, second in ((record["ours"], record["theirs"]), (record["theirs"], record["ours"])):
            asked = form["text"].removesuffix("[Z]").format(question=record["question"], first=first, second=second)
            a, b = (logp_of(f"{form['instruction']}\n\n{asked}", f" ({letter}") for letter in "AB")
            won.append(float(a > b) if len(won) == 0 else float(b > a))
        assert record["won"] == won
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert summary["win/count"] == 3 and 0 < summary["win/low"] < summary["win/rate"] < summary["win/high"] < 1
    config.ours, config.theirs = config.theirs, config.ours
    judge.run(config, tmp_path / "two")
    other = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["win/rate"] + other["win/rate"] == pytest.approx(1)
    assert summary["win/length_controlled"] + other["win/length_controlled"] == pytest.approx(1)


def test_a_reward_model_judges_each_answer_alone(source, tmp_path):
    config, mesh = judging.get_config(), shard.make_mesh()
    loaded = common.load(source, config.model, mesh, seed=0, head="reward")
    config.chat, scores = False, partial(ensemble.score_of_all, model=loaded.model, doubt=0.0)
    rows = [{"question": "Who is Tom?", "ours": " A boy.", "theirs": " A small boy who has a big dog."}]
    _, count, ask, decide = judge.by_reward(config, (loaded, [loaded.params], scores), mesh, rows)
    heard = {}
    ask(range(count), heard.__setitem__)
    for n, side in enumerate(("ours", "theirs")):
        ids = [*loaded.tokenizer(rows[0]["question"] + rows[0][side])["input_ids"], loaded.tokenizer.eos_token_id]
        tokens = jnp.asarray([ids])
        one = score.last_scalar(loaded.model, loaded.params, Batch(tokens, jnp.ones_like(tokens), jnp.ones(tokens.shape)))
        assert heard[n] == pytest.approx(float(one[0]), rel=1e-4)
    assert decide(0, [heard[0], heard[1]])["won"] == [float(heard[0] > heard[1])] * 2


def test_pairs_of_answers_are_found_by_their_key(tmp_path):
    known = {"key": "id", "prompt": "{asked}", "answer": "{written[0]}"}
    rows = [{"id": n, "asked": f"q{n}", "written": [f" a{n}"]} for n in range(3)]
    one, other = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:0:-1])
    assert [(row["question"], row["ours"], row["theirs"]) for row in judge.pairs(one, other, **known)] == [
        ("q1", "a1", "a1"),
        ("q2", "a2", "a2"),
    ]
    with pytest.raises(ValueError, match="c.jsonl: 1 rows have the 'id' of another one"):
        judge.pairs(one, write(tmp_path / "c.jsonl", rows[:1] * 2), **known)
    with pytest.raises(ValueError, match="have no 'id' in common"):
        judge.pairs(one, write(tmp_path / "d.jsonl", [rows[0] | {"id": 9}]), **known)
