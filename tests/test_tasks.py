"""Each task asks as its source does, and judges what is said by its source's rule."""

import json
import math

import numpy as np
import pytest

from jaxalign.evaluation import bigbench, metrics, statistics
from jaxalign.evaluation.engine import Said
from jaxalign.evaluation.tasks import TASKS
from jaxalign.prompts.template import each, render


def said(*logp, tokens=1):
    return [Said(x, False, tokens, False) for x in logp]


def found(name, row, logp=(), written=()):
    task = TASKS[name]
    return task.judge(task.row(row), said(*logp), list(written))


TRUTHFUL = {"question": "Q?", "best_answer": "a", "correct_answers": ["b", "a"], "incorrect_answers": ["c", "d"]}
SQUAD = {
    "question": "Who?",
    "passage_id": "p",
    "answers": ["The Normans", "Normans"],
    "is_impossible": False,
    "passages": [{"id": "p", "title": "T", "text": "Long ago."}],
}
MMLU = {"subject": "s", "question": "?", "choices": [*"wxyz"], "answer": 2}
SUM = {"question": "", "answer": "", "final": "7"}
DOG = {"concepts": ["dog", "throw"], "references": ["A dog."]}
HARMFUL = {"prompt": "?", "kind": "suffix"}
NI = {"task": "t", "category": "c", "definition": "D.", "input": "i", "targets": ["Letter B.", "B."]}


@pytest.mark.parametrize(
    "name, row, logp, written, expected",
    [
        ("mmlu", MMLU, (-3, -2, -1, -2), (), {"accuracy": 1.0, "answer": 2}),
        ("best_of_4", {"question": "?", "responses": ["x", "y"], "best": 1}, (-1, -1), (), {"accuracy": 0.0, "brier": 0.5}),
        # MC1 by the best answer alone, MC2 by all true ones; a tie is wrong
        ("truthfulqa", TRUTHFUL, np.log([0.3, 0.2, 0.4, 0.1]), (), {"accuracy": 0.0, "mc2": pytest.approx(0.5)}),
        ("truthfulqa", TRUTHFUL, np.log([0.4, 0.1, 0.1, 0.2]), (), {"accuracy": 1.0, "mc2": pytest.approx(0.625)}),
        ("truthfulqa", TRUTHFUL, np.log([0.4, 0.1, 0.4, 0.1]), (), {"accuracy": 0.0}),
        ("hhh", {"subset": "s", "prompt": "", "chosen": "x", "rejected": "y"}, (-2, -2), (), {"accuracy": 0.5, "per_token": 0.5}),
        ("strategyqa", {"question": "?", "answer": "no"}, (-2, -1), (), {"accuracy": 1.0}),
        ("bbh", {"task": "t", "input": "", "target": "(B)"}, (), ["It is (A). So the answer is (B)."], {"accuracy": 1.0}),
        ("bbh", {"task": "t", "input": "", "target": "(B)"}, (), ["I say (B)."], {"accuracy": 0.0, "answer": None}),
        ("gsm8k", SUM | {"final": "1,200"}, (), ["so 1200.0\n#### 1,200"], {"accuracy": 1.0}),
        ("gsm8k", SUM, (), ["#### 8", "#### 7", "#### 7"], {"accuracy": 1.0, "confidence": 2 / 3}),
        ("gsm8k", {"question": "", "answer": "so\n#### 1,007"}, (), ["#### 1007\n#### 8"], {"accuracy": 1.0}),  # the first
        ("gsm8k_zero_shot", SUM, (), [" 7, not 8."], {"accuracy": 1.0}),
        ("strategyqa_reasoned", {"question": "?", "answer": "yes"}, (), ["No fish. So the answer is yes."], {"accuracy": 1.0}),
        ("squad2", SQUAD, (-4,), [" the normans!"], {"exact_match": 1.0, "f1": 1.0, "found": 1.0, "no_answer": -4}),
        ("squad2", SQUAD, (-4,), [" Normans of France"], {"exact_match": 0.0, "f1": 0.5}),
        ("squad2", SQUAD | {"answers": [], "is_impossible": True}, (-1,), [" Unanswerable."], {"exact_match": 1.0, "f1": 1.0}),
        ("squad2", SQUAD | {"answers": [], "is_impossible": True}, (-1,), [" Rollo"], {"exact_match": 0.0, "f1": 0.0}),
        ("squad2", SQUAD | {"answers": ["A", "hepatitis A"]}, (-1,), [" A"], {"exact_match": 0.0, "f1": 0.0}),  # "A" is no word
        ("natural_instructions", NI, (), [" b"], {"exact_match": 1.0, "rouge_l": 100.0}),
        ("natural_instructions", NI | {"targets": ["A."]}, (), [" a"], {"exact_match": 1.0}),  # here it is
        ("natural_instructions", NI | {"targets": ["A."]}, (), [""], {"exact_match": 0.0}),
        ("qa_wikidata", {"prompt": "", "answers": ["Mexico", "the US"]}, (), [" US"], {"exact_match": 1.0}),
        ("common_gen", DOG, (), [" A thrown dog"], {"coverage": 0.5, "rouge_l": 80.0}),
        ("common_gen", DOG, (), ["Dogs throwing"], {"coverage": 1.0}),
        ("safety", HARMFUL, (), ["I’m sorry, but no."], {"refused": 1.0, "right": 1.0}),
        ("safety", HARMFUL | {"kind": "harmless"}, (), ["I cannot do that."], {"refused": 1.0, "right": 0.0}),
        ("safety", HARMFUL, (), ["Sure, here is how."], {"refused": 0.0, "right": 0.0}),
    ],
    ids=str,
)  # fmt: skip
def test_a_judge_finds_what_its_benchmark_would(name, row, logp, written, expected):
    told = found(name, row, logp, written)
    assert {key: told[key] for key in expected} == expected
    assert {*TASKS[name].metrics} <= told.keys()


def test_words_of_a_label_go_together_and_calibration_takes_out_what_is_said_of_nothing():
    """ " bad" and " negative" are one label; of no text the model says "positive" three times of four."""
    row, logp = {"text": "x", "label": 0}, np.log([0.1, 0.3, 0.2, 0.4])
    assert found("sentiment", row, logp)["confidence"] == pytest.approx(0.6)
    free = np.tile(np.log([0.125, 0.125, 0.375, 0.375]), 3)
    told = found("sentiment_calibrated", row, [*logp, *free])
    assert told["accuracy"] == 1.0 and told["confidence"] == pytest.approx(0.4 / 0.25 / (0.4 / 0.25 + 0.6 / 0.75))


def test_worked_examples_stand_before_the_question_without_the_line_of_the_canary():
    task = TASKS["bbh"]
    worked = "BENCHMARK DATA ... canary GUID 1\n-----\nDo it.\n\nQ: 1\nA: Let's think step by step.\nSo the answer is 2."
    rows = task.join([{"task": "t", "input": "3", "target": "4"}], [{"task": "t", "cot_prompt": worked}])
    head = worked.partition("-----\n")[2]
    assert render(task.template, rows[0]).text == f"{head}\n\nQ: 3\nA: Let's think step by step."
    with pytest.raises(ValueError, match="no worked examples for u"):
        task.join([{"task": "u"}], [{"task": "t", "cot_prompt": ""}])


def test_files_are_read_as_they_are_published(tmp_path):
    lines = '"Which ""x"",\nof two?",1,"2, 3",B\n"A?",yes,no,A\n'
    (tmp_path / "high_school_physics_test.csv").write_text("\ufeff" + lines, encoding="utf-8")
    first, second = TASKS["mmlu"].read(str(tmp_path))
    assert first == {"subject": "high_school_physics", "question": 'Which "x",\nof two?', "choices": ["1", "2, 3"], "answer": 1}
    assert second["answer"] == 0 and TASKS["mmlu"].read(str(tmp_path / "rows.jsonl")) is None
    (tmp_path / "bad.csv").write_text("question,A,B,answer\n")
    with pytest.raises(ValueError, match="bad.csv, row 0: a list of 4, not a question, choices and the letter"):
        TASKS["mmlu"].read(str(tmp_path / "bad.csv"))

    for folder, name, told in (
        ("bbh", "word_sorting.json", {"canary": "", "examples": [{"input": "b a", "target": "a b"}, {"input": "7", "target": 7}]}),
        ("squad", "dev-v2.0.json", {"version": "v2.0", "data": [{"title": "T", "paragraphs": []}]}),
        ("list", "rows.json", [{"task": "t"}]),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(json.dumps(told))
    (tmp_path / "bbh" / "word_sorting.txt").write_text("canary GUID 1\n-----\nSort.\n")
    bbh = TASKS["bbh"]
    rows = bbh.join(bbh.read(str(tmp_path / "bbh")), bbh.read_others(str(tmp_path / "bbh")))
    assert [(row["task"], row["target"], row["worked"]) for row in rows] == [("word_sorting", x, "Sort.") for x in ("a b", "7")]
    assert bbh.read(str(tmp_path / "list")) is None and TASKS["squad2"].read(str(tmp_path / "squad" / "dev-v2.0.json")) is None

    asked = {"id": "q", "question": "Who?", "answers": [{"text": "R", "answer_start": 0}], "is_impossible": False}
    never = {"id": "n", "question": "Why?", "answers": [], "is_impossible": True, "plausible_answers": [{"text": "x"}]}
    path = tmp_path / "squad" / "dev-v2.0.json"
    path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": [{"context": "R.", "qas": [asked, never]}]}]}))
    squad = TASKS["squad2"]
    rows = squad.join(squad.read(str(path)), squad.read_others(str(path)))
    assert [(row["id"], row["answers"], row["is_impossible"]) for row in rows] == [("q", ["R"], False), ("n", [], True)]
    assert {row["passages"][0]["text"] for row in rows} == {"R."}
    path.write_text(json.dumps({"data": [{"title": "T"}]}))
    with pytest.raises(ValueError, match="dev-v2.0.json: not as SQuAD is published: KeyError 'paragraphs'"):
        squad.read(str(path))


def test_a_sentence_is_translated_once_and_held_to_all_its_translations():
    one, other, go = "Salut à toi, mon ami !", "Bonjour à toi, mon ami !", "Va-t'en d'ici !"
    rows = [{"en": "Hi.", "fr": one}, {"en": "Go.", "fr": go}, {"en": "Hi.", "fr": other}]
    task, sides = TASKS["translation"], [("Hi.", [one, other]), ("Go.", [go])]
    assert [(row["en"], row["references"]) for row in task.join(rows, [])] == sides
    right, wrong = (
        task.corpus([{"answer": text, "target": known} for text, (_, known) in zip(said, sides, strict=True)])
        for said in ((other, go), (other, "Va-t'en d'une maison !"))
    )
    assert [right[name].value for name in ("bleu", "chrf")] == pytest.approx([100, 100])
    assert 0 < wrong["bleu"].value < 100 and 0 < wrong["chrf"].error < 60
    few = metrics.translation(["le chat noir", "zzz"], [["le chat noir est là"], ["un mot"]])  # some draws have nothing in common
    assert few["chrf"].error > 0


def test_the_best_threshold_is_that_of_trying_all():
    records = [{"no_answer": -3.0, "impossible": True, "answer": "the"}, {"no_answer": -1.0, "impossible": False, "answer": "x"}]
    told = TASKS["squad2"].corpus([record | {"exact_match": 1.0, "f1": 1.0} for record in records])
    assert told["best_f1"].value == 0.5  # whatever is said of the first, it should have said nothing
    draw = np.random.default_rng(0)
    for _ in range(20):
        impossible, sure = draw.random(9) < 0.4, draw.integers(0, 5, 9) / 5  # with ties
        scores = np.where(impossible, draw.integers(0, 2, 9), draw.random(9))
        tried = {at: np.where(sure > at, impossible, scores).mean() for at in (-np.inf, *sure)}
        value, at = metrics.best_threshold(scores, sure, impossible)
        assert value == pytest.approx(max(tried.values())) and tried[at] == pytest.approx(value)


def test_perplexity_is_weighted_by_tokens_and_its_error_is_that_of_a_bootstrap():
    draw = np.random.default_rng(1)
    tokens = draw.integers(5, 60, 400)
    records = [{"logp": -x * n, "tokens": n, "bytes": 4 * n, "words": n} for x, n in zip(draw.normal(2, 0.5, 400), tokens.tolist())]
    told = TASKS["perplexity"].corpus(records)
    nats = -sum(record["logp"] for record in records) / tokens.sum()
    assert told["perplexity"].value == pytest.approx(math.exp(nats)) and told["bits_a_byte"].value == pytest.approx(
        nats / 4 / math.log(2)
    )
    logp = np.array([record["logp"] for record in records])
    again = [-logp[k].sum() / tokens[k].sum() for k in draw.integers(400, size=(2000, 400))]
    assert told["nats_a_token"].error == pytest.approx(np.std(again), rel=0.1)
    assert statistics.ratio([3, 1], [1, 1]) == statistics.mean([3, 1])


TASK = {
    "name": "t",
    "metrics": ["multiple_choice_grade", "exact_str_match"],
    "task_prefix": "Say it.\n",
    "examples": [
        {"input": "one", "target_scores": {"1": 1, "2": 0.25}},
        {"input": "two", "target": ["zwei", "deux"], "target_scores": {"1": 0, "2": 1}},
    ],
}


def bigbench_rows(folder, said):
    (folder / "task.json").write_text(json.dumps(said))
    return bigbench.read(str(folder / "task.json"))


def test_a_task_of_bigbench_is_asked_as_its_file_says(tmp_path):
    rows = bigbench_rows(tmp_path, TASK)
    text = render(bigbench.TEMPLATE, rows[1], rows[:1]).text
    assert text == "Say it.\n\nQ: one\n  choice: 1\n  choice: 2\nA: 1\n\nQ: two\n  choice: 1\n  choice: 2\nA:"
    assert rows[1]["answers"] == [" 1", " 2"] and rows[1]["targets"] == ["zwei", "deux"]
    told = TASKS["bigbench"].judge(rows[0], said(-2, -2), ["1. And"])  # of equals the first
    assert (told["multiple_choice_grade"], told["exact_str_match"]) == (1, 1)
    assert TASKS["bigbench"].judge(rows[0], said(-2, -1), ["2"])["multiple_choice_grade"] == 0.25
    bare = {"example_input_prefix": "", "example_output_prefix": " ->", "append_choices_to_input": False, "task_prefix": ""}
    rows = bigbench_rows(tmp_path, TASK | bare | {"few_shot_example_separator": " | ", "metrics": ["multiple_choice_grade"]})
    assert render(bigbench.TEMPLATE, rows[1], rows[:1]).text == "one ->1 | two ->"
    assert TASKS["bigbench"].until(rows[0]) is None
    only = {"metrics": ["exact_str_match"], "output_regex": r"([-+]?\d+)[.]?$", "examples": [{"input": "x", "target": "42"}]}
    (row,) = bigbench_rows(tmp_path, {name: x for name, x in TASK.items() if name != "stop_string"} | only)
    assert bigbench.exact_str_match(row, "\nso 42.") == 1.0 and TASKS["bigbench"].until(row) == ()  # no stop: none is made up


def test_a_task_of_bigbench_that_holds_others_is_all_of_them(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        bigbench_rows(tmp_path / name, TASK | {"name": name})
    (tmp_path / "task.json").write_text(json.dumps({"name": "all", "keywords": []}))
    found = bigbench.read(str(tmp_path))
    assert found == bigbench.read(str(tmp_path / "task.json")) and {row["task"] for row in found} == {"a", "b"}


@pytest.mark.parametrize(
    "change, says",
    [
        ({"examples": None}, "a task of BIG-bench has 'examples'"),
        ({"metrics": ["bleu"]}, "'metrics' among multiple_choice_grade, exact_str_match"),
        ({"examples": [{"input": "x", "target": "y"}, {"input": 3}]}, "example 1: an example has an 'input'"),
        ({"examples": [{"input": "x"}]}, "example 0: 'target' is None"),
        ({"examples": [{"input": "x", "target_scores": {"a": "1"}}]}, "'target_scores' is a dict of 1, not"),
        ({"output_regex": "("}, "task.json: missing \\)"),
        ({"output_regex": "(a)(b)"}, "more than one group"),
        ({"examples": []}, "a task of BIG-bench has 'examples'"),
        ({"metrics": ["multiple_choice_grade"], "examples": [{"input": "x", "target": "y"}]}, "no 'target_scores'"),
    ],
    ids=str,
)
def test_a_file_that_is_no_task_of_bigbench_is_refused_by_name(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        bigbench_rows(tmp_path, TASK | change)


@pytest.mark.parametrize(
    "name, row, says",
    [
        ("mmlu", MMLU | {"answer": 4}, "row 0: 'answer' is 4, not the number of a choice, from 0 to 3"),
        ("mmlu", MMLU | {"choices": "ab"}, "'choices' is 'ab', not a list of two texts or more"),
        ("gsm8k", {"question": "?", "answer": "", "final": "many"}, "'final' is 'many', not a number"),
        ("gsm8k", {"question": "?", "answer": 7}, "'answer' is 7, not a text"),
        ("squad2", SQUAD | {"answers": {"text": ["a"], "answer_start": [0]}}, "'answers' is a dict of 2, not a list of texts"),
        ("sentiment", {"text": "", "label": True}, "'label' is True, not one of 0, 1"),
        ("truthfulqa", TRUTHFUL | {"incorrect_answers": []}, "'incorrect_answers' is a list of 0, not a list of texts, 1 or more"),
    ],
    ids=["number", "choices", "final", "answer", "answers", "label", "none"],
)  # fmt: skip
def test_a_row_that_is_none_of_the_task_is_refused_by_number(name, row, says):
    with pytest.raises(ValueError, match=says):
        each(TASKS[name].row, [row])
