"""Prompts: the same one in every form, demonstrations that fit, answers that are read, searched, mapped and constrained."""

import dataclasses
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxalign.data import opinions, sources
from jaxalign.evaluation import mmlu
from jaxalign.prompts import answers, constrain, extract, reasoning
from jaxalign.prompts.demonstrations import alike, at_random, balanced, few_shot, in_order, nearest, within
from jaxalign.prompts.template import Template, document, fingerprint, load, render, target, words

LIBRARY = Path(__file__).parents[1] / "configs" / "prompts"
SUMS = Template("Q: {x}\nA:[Z]", instruction="Add.", rationale=" {why} So", separator="\n")
ROWS = [{"x": f"{n}+{n}", "why": f"{n} twice.", "answer": 2 * n, "even": n % 2} for n in range(6)]


@pytest.fixture(scope="module")
def smollm2(shared):
    return AutoTokenizer.from_pretrained(shared / "data" / "models" / "smollm2_135m_instruct")


@pytest.fixture(scope="module")
def gsm8k(shared):
    return sources.read(str(shared / "data" / "reasoning" / "gsm8k_dev.jsonl"))


# --------------------------------------------------------- templates


def test_a_template_writes_the_prompt_of_mmlu_to_the_letter(shared):
    rows = sources.read(str(shared / "data" / "knowledge" / "mmlu_dev.jsonl"))[:5]
    template = Template(
        "{question}\n{choices}\nAnswer:[Z]",
        instruction="The following are multiple choice questions (with answers) about  {subject}.",
        slots={"choices": "{letter}. {entry}", "answer": dict(zip("0123", "ABCD", strict=True))},
    )
    rows = [row | {"subject": row["subject"].replace("_", " ")} for row in rows]
    shots = [(row["question"], row["choices"], "ABCD"[row["answer"]]) for row in rows[:4]]
    expected = mmlu.prompt(rows[4]["subject"], shots, rows[4]["question"], rows[4]["choices"])
    assert render(template, rows[4], rows[:4]).text == expected
    assert words(template) == {"0": " A", "1": " B", "2": " C", "3": " D"}


def test_conversations_hold_what_the_plain_prompt_holds():
    def said(**form):
        return [tuple(each.values()) for each in render(dataclasses.replace(SUMS, **form), ROWS[2], ROWS[:1]).messages]

    plain = "Add.\nQ: 0+0\nA: 0 twice. So 0\nQ: 2+2\nA:"
    shot = [("user", "Q: 0+0\nA:"), ("assistant", "0 twice. So 0")]
    assert render(SUMS, ROWS[2], ROWS[:1]).text == plain
    assert said() == [("system", "Add."), *shot, ("user", "Q: 2+2\nA:")]
    assert said(system=False) == [("user", "Add.\nQ: 0+0\nA:"), shot[1], ("user", "Q: 2+2\nA:")]
    assert said(turns=False) == [("system", "Add."), ("user", plain.removeprefix("Add.\n"))]
    assert said(turns=False, system=False) == [("user", plain)]


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_sampled_from_is_a_prefix_of_what_is_trained_on(smollm2, chat):
    template = load(LIBRARY / "arithmetic.json")
    rows = [{"question": f"{n} + {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(3)]
    prompt, answer = render(template, rows[2], rows[:2]), target(template, rows[2])
    asked, whole = (document(smollm2, prompt, said, chat=chat) for said in (None, answer))
    assert not asked.weights.any()
    assert (whole.tokens[: len(asked.tokens)] == asked.tokens).all()
    assert (whole.weights == (np.arange(len(whole.tokens)) >= len(asked.tokens))).all()
    learned = smollm2.decode(whole.tokens[len(asked.tokens) :], skip_special_tokens=True)
    assert learned == (answer.strip() if chat else answer)


def test_an_encoder_reads_the_prompt_and_a_decoder_writes_the_answer(smollm2):
    prompt = render(SUMS, ROWS[2])
    made = document(smollm2, prompt, " 4", chat=False, start=7)
    assert smollm2.decode(made.source, skip_special_tokens=True) == prompt.text and made.tokens[0] == 7
    with pytest.raises(ValueError, match="is for decoders"):
        document(smollm2, prompt, " 4", chat=True, start=7)


def test_what_follows_the_answer_of_a_cloze_is_scored_with_it():
    template = load(LIBRARY / "sentiment_cloze.json")
    rows = [{"text": "dull {sic} .", "label": 0}, {"text": "a gem [Z] .", "label": 1}]
    prompt = render(template, rows[1], rows[:1])
    after = ", as this critic has it."
    assert prompt.text == f'"dull {{sic}} ." In one word, the film was bad{after}\n"a gem [Z] ." In one word, the film was'
    pairs = answers.candidates(prompt, words(template).values())
    assert pairs == [(prompt.text, f" bad{after}"), (prompt.text, f" good{after}")]


def test_the_library_fits_the_data_it_is_for(shared):
    def first(name):
        return sources.read(str(shared / "data" / name))[0]

    squad = first("retrieval/squad_questions.jsonl")
    rows = {
        "sentiment": first("sentiment/sentences_dev.jsonl"),
        "sentiment_cloze": first("sentiment/sentences_dev.jsonl"),
        "passages": squad | {"passages": [first("retrieval/squad_passages.jsonl")] * 2, "answer": squad["answers"][0]},
        "entailment": opinions.entailment(1, seed=0)[0],
        **dict.fromkeys(("arithmetic", "steps"), first("reasoning/gsm8k_dev.jsonl")),
        "yes_no": first("reasoning/strategyqa.jsonl"),
        "choice": first("knowledge/mmlu_dev.jsonl"),
    }
    assert rows.keys() == {path.stem for path in LIBRARY.glob("*.json")}
    ends = {name: target(load(LIBRARY / f"{name}.json"), row).split()[-1] for name, row in rows.items()}
    assert ends == {
        "sentiment": "positive",
        "sentiment_cloze": "good",
        "passages": "France",
        "entailment": ["no", "maybe", "yes"][rows["entailment"]["label"]],
        **dict.fromkeys(("arithmetic", "steps"), "45"),
        "yes_no": "yes.",
        "choice": "ABCD"[rows["choice"]["answer"]],
    }
    shown = render(load(LIBRARY / "passages.json"), rows["passages"]).text
    assert "\n[2] Normans: The Normans (Norman:" in shown
    assert extract.cited("Normandy [2], [1] and [2].") == [2, 1]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"text": "{x}"}, r"\[Z\] is there 0 times"),
        ({"text": "{x}[Z][Z]"}, r"\[Z\] is there 2 times"),
        ({"text": "{x} [Z]"}, "a space in front"),
        ({"text": "{x[Z]}"}, "template .*{x"),
        ({"answer": "{"}, "a brace that is meant is written twice"),
        ({"system": "yes"}, "'system' of a template is 'yes', not a bool"),
        ({"slots": {"y": "number"}}, "'y' has a type, so it is used whole"),
        ({"answer": "{x[0]}", "slots": {"x": "number"}}, "'x' has a type, so it is used whole"),
        ({"slots": {"x": "list"}}, "'x': 'list' is no type"),
        ({"slots": {"x": {"0": 1}}}, "'x': a dict of 1 is no type"),
        ({"shots": 3}, "has no 'shots'; it has text, answer,"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_template_that_cannot_be_meant_is_refused_when_it_is_read(tmp_path, change, says):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"text": "{x}[Z]", **change}))
    with pytest.raises(ValueError, match=f"t.json: .*{says}"):
        load(path)


@pytest.mark.parametrize(
    "kind, value, says",
    [
        ("number", "4", "column 'x' is '4', not a finite number"),
        ("{letter}. {entry}", "no", "column 'x' is 'no', not a list"),
        ("[{number}] {title}", [{"text": ""}], "'{title}' of the template is not a column"),
        ("{letter}. {entry}", list(range(27)), "'{letter}' of the template is no text"),
        ({"0": "bad"}, 1, "column 'x' is 1; there are words for 0"),
    ],
)
def test_a_value_that_is_not_of_its_type_is_named_with_its_row(kind, value, says):
    template = Template("{x}[Z]", answer="", slots={"x": kind})
    good = {"number": 4, "{letter}. {entry}": ["a"], "[{number}] {title}": [{"title": "a"}]}.get(str(kind), 0)
    with pytest.raises(ValueError, match=f"row 1: {re.escape(says)}"):
        few_shot(template, [{"x": good}, {"x": value}], [], in_order, k=0)


def test_a_fingerprint_tells_prompts_apart_by_all_that_makes_them():
    changes = [
        {"text": "{x}[Z]"},
        {"answer": ""},
        {"instruction": ""},
        {"separator": " "},
        {"slots": {"x": "number"}},
        {"system": False},
    ]
    changed = [dataclasses.replace(SUMS, **change) for change in changes]
    marks = {fingerprint(template, ROWS, {"k": 2}) for template in [SUMS, *changed]} | {fingerprint(SUMS, ROWS[1:], {"k": 2})}
    assert len(marks) == len(changes) + 2
    assert fingerprint(dataclasses.replace(SUMS), list(ROWS), {"k": 2}) in marks


# --------------------------------------------------------- demonstrations


def shown(ranking, rows=ROWS, pool=ROWS, **settings):
    """The questions that each row's prompt shows."""
    return [re.findall(r"Q: (\S+)", prompt.text)[:-1] for prompt in few_shot(SUMS, rows, pool, ranking, **settings)]


def test_a_question_is_never_shown_its_own_answer():
    assert shown(in_order, k=2)[:3] == [["1+1", "2+2"], ["0+0", "2+2"], ["0+0", "1+1"]]
    (prompt,) = few_shot(SUMS, ROWS[:1], ROWS, in_order, k=len(ROWS))
    assert (prompt.shots, prompt.dropped) == (len(ROWS) - 1, 1)
    with pytest.raises(ValueError, match="row 0: 5 others to show, where k = 7"):
        shown(in_order, k=7)
    with pytest.raises(ValueError, match="row of the pool 1: '{answer}' of the template is not a column; the columns are: x, why"):
        shown(in_order, pool=[ROWS[0], {"x": "", "why": ""}], k=1)


def test_random_demonstrations_depend_on_seed_and_number_alone():
    many = [ROWS[0]] * 40
    drawn = shown(at_random(0), rows=many, k=2)
    assert drawn[:20] == shown(at_random(0), rows=many[:20], k=2) != shown(at_random(1), rows=many[:20], k=2)
    assert {first for first, _ in drawn} == {"1+1", "2+2", "3+3", "4+4", "5+5"}


def test_balanced_demonstrations_have_as_many_of_each_label():
    ranking = balanced([row["even"] for row in ROWS], at_random(0))
    for asked in shown(ranking, rows=ROWS * 5, k=4):
        assert Counter(int(question[0]) % 2 for question in asked) == {0: 2, 1: 2}


def test_the_nearest_stand_where_they_are_asked_to():
    scores = np.array([[9, 1, 3, 3, 0, 2]] * 6)
    assert shown(nearest(scores), k=4)[0] == ["2+2", "3+3", "5+5", "1+1"]
    assert shown(nearest(scores), k=4, best_last=True)[0] == ["1+1", "5+5", "3+3", "2+2"]
    even = [row["even"] for row in ROWS]
    assert shown(alike(even, even, nearest(scores)), k=2)[:2] == [["2+2", "4+4"], ["3+3", "5+5"]]


@pytest.mark.parametrize("chat", [False, True])
def test_a_budget_of_tokens_is_never_exceeded_nor_left_unused(smollm2, gsm8k, chat):
    template = load(LIBRARY / "arithmetic.json")

    def count(prompt):
        return len(document(smollm2, prompt, chat=chat).tokens)

    rows, settings = gsm8k[:6], {"length": 700, "answer": 150}
    prompts = few_shot(template, rows, gsm8k[100:], in_order, k=4, best_last=True, fits=within(count, **settings))
    for row, prompt in zip(rows, prompts, strict=True):
        assert count(prompt) <= 550 and prompt.shots + prompt.dropped == 4
        assert prompt.text == render(template, row, gsm8k[100 : 100 + prompt.shots][::-1]).text
        assert not prompt.dropped or count(render(template, row, gsm8k[100 : 101 + prompt.shots])) > 550
    assert 0 < sum(prompt.dropped for prompt in prompts) < 24
    with pytest.raises(ValueError, match="row 0: too long even without demonstrations"):
        few_shot(template, rows, gsm8k, in_order, k=1, fits=within(count, length=160, answer=150))


# --------------------------------------------------------- reasoning


@pytest.mark.parametrize(
    "text, value",
    [
        ("so 3 + 4 = 7.", 7),
        ("$1,234.50 in all", 1234.5),
        ("it is -5", -5),
        ("10-5", 5),
        ("at 1,2,3", 3),
        ("a half, .5", 0.5),
        ("4\n#### 1,200 pieces of 8", 1200),
        ("1,200.00", 1200),
        ("12345678901234567891", 12345678901234567891),
        ("none ####", None),
        ("9" * 5000, None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_numbers_are_read(text, value):
    assert extract.number(text) == value


def test_answers_of_real_chains_of_thought_are_read(shared, gsm8k):
    assert all(extract.number(row["answer"]) == float(row["final"]) for row in gsm8k)
    assert all(extract.number(row["answer"].replace("####", "so")) == float(row["final"]) for row in gsm8k)
    chains = {row["task"]: row["cot_prompt"] for row in sources.read(str(shared / "data/reasoning/bbh_cot_prompts.jsonl"))}
    read = {task: [extract.after(chain) for chain in text.split("\n\nQ: ")[1:]] for task, text in chains.items()}
    assert read["boolean_expressions"] == ["False", "False", "True"] and read["dyck_languages"][0] == "] } ]"
    assert all(answer for of_task in read.values() for answer in of_task) and sum(map(len, read.values())) == 63


@pytest.mark.parametrize(
    "text, value",
    [
        ("(A) is wrong, so the answer is (C).", "C"),
        (" B", "B"),
        ("D. because", "D"),
        ("A man left. It is (B), not (A) but (D)", "D"),
        ("A man left.", None),
        ("The answer is\nC", "C"),
        ("E", None),
    ],
)
def test_letters_are_read(text, value):
    assert extract.letter(text) == value


def test_words_are_read():
    assert extract.yes_no("Yes, there is no doubt. The answer is: No.") == "no"
    assert extract.yes_no("YES") == "yes" and extract.yes_no("nothing known, yesterday") is None
    assert extract.matched("x=1 x=2", pattern=r"x=(\d)") == "2" and extract.matched("x=1", pattern=r"x=\d") == "x=1"
    assert extract.matched("", pattern="x") is None and extract.after("The answer is") is None


def test_a_zero_shot_chain_of_thought_has_two_stages():
    thinking = reasoning.think(render(SUMS, ROWS[2]))
    concluding = reasoning.conclude(thinking, " 2 and 2.", reasoning.THEREFORE["number"])
    assert thinking.text == "Add.\nQ: 2+2\nA: Let's think step by step."
    assert concluding.text == f"{thinking.text} 2 and 2.\nTherefore, the answer (arabic numerals) is"
    assert [each["role"] for each in concluding.messages] == ["system", "user", "assistant", "user"]
    assert thinking.messages[-1]["content"] == "Q: 2+2\nA:\nLet's think step by step." and len(thinking.messages) == 2


def test_self_consistency_votes_over_what_can_be_read():
    samples = ["so 4.00", "it is 5", "no idea", "2 + 2 = 4"]
    assert reasoning.self_consistent(samples, extract.number) == (4, 0.5, [0, 3])


def test_least_to_most_answers_the_parts_in_turn():
    says = iter(["1. How many has Ann?\nThen:\n- 3 more are how many?", " 5", " 8", " 8 in all"])
    state, asked = reasoning.LeastToMost("Ann has 5 {apples}. With 3 more?"), []
    while (prompt := reasoning.ask(state)) is not None:
        asked.append(prompt)
        state = reasoning.tell(state, next(says))
    assert state.parts == ("How many has Ann?", "3 more are how many?", reasoning.FINALLY)
    assert asked[2] == "Ann has 5 {apples}. With 3 more?\n\nQ: How many has Ann?\nA: 5\n\nQ: 3 more are how many?\nA:"
    assert state.answers[-1] == "8 in all" and len(asked) == 4


# --------------------------------------------------------- answers by likelihood


def test_each_way_to_search_finds_its_own_answer():
    logp, said = np.array([-4.0, -6.0, -9.0]), [" yes", " no way", " by all means"]
    assert answers.search(logp)[0] == 0
    assert answers.search(logp, lengths=[1, 2, 4])[0] == 2
    best, scores = answers.search(logp, lengths=answers.characters(said))
    assert best == 2 and np.allclose(scores, [-4 / 3, -1, -0.75])
    best, scores = answers.search(logp, unconditional=[-2, -7, -8])
    assert best == 1 and np.allclose(scores, [-2, 1, -1])
    assert answers.search([[-1.0, -1.0], [-2.0, -1.0]])[0].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"answer \[1\] is not finite"):
        answers.search([0.0, np.nan])


def test_a_label_has_the_probability_of_its_words():
    said, owner = answers.by_word({"good": [" good", " great", " fine"], "bad": [" bad"]})
    logp = np.log([[0.1, 0.3, 0.2, 0.25]]) - 800  # of long answers, whose probabilities no float holds
    expected = {"mean": [0.2, 0.25], "sum": [0.6, 0.25], "max": [0.3, 0.25]}
    for combine, p in expected.items():
        assert np.allclose(np.exp(answers.of_labels(logp, owner, combine=combine)), [np.divide(p, sum(p))])
    with pytest.raises(ValueError, match="there are 'mean', 'sum' and 'max'"):
        answers.of_labels(logp, owner, combine="median")
    with pytest.raises(ValueError, match="words of its own"):
        answers.by_word({"good": [" fine"], "bad": [" fine"]})


def test_calibration_takes_out_what_a_prompt_is_biased_to():
    free = np.log([[0.7, 0.3], [0.9, 0.1]])  # p_cf = 0.8, 0.2
    assert np.allclose(np.exp(answers.calibrated(np.log([0.7, 0.3]), free)), np.array([0.875, 1.5]) / 2.375)
    assert np.allclose(np.exp(answers.calibrated(np.log([0.8, 0.2]), free)), 0.5)
    asked = [render(SUMS, row).text for row in answers.content_free(ROWS[1], ["x"])]
    assert asked == [f"Add.\nQ: {nothing}\nA:" for nothing in ("N/A", "", "[MASK]")]


# --------------------------------------------------------- constraints


def allows(table, tokens) -> bool:
    """Whether a sampler may draw these tokens."""
    state = 0
    for token in tokens:
        state = table[state, token]
        if state < 0:
            return False
    return True


@pytest.mark.parametrize("pattern", ["a(b|ab)*", "(a|ba){2}", "b?", "a?.{2}", "ab|a*c"])
def test_a_regular_expression_allows_its_language_and_nothing_else(pattern):
    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "<e>": 2, "ab": 3}, [("a", "b")]))
    bpe.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<e>")
    table = constrain.to_regex(tokenizer, pattern, vocab=5, eos=2)
    assert (table >= 0).any(1).all() and (table[:, 4] == -1).all()
    for size in range(5):
        for tokens in itertools.product([0, 1, 3], repeat=size):
            text = "".join({0: "a", 1: "b", 3: "ab"}[token] for token in tokens)
            assert allows(table, [*tokens, 2]) == bool(re.fullmatch(pattern, text)), text


@pytest.mark.parametrize(
    "stops", [("\n",), ("\n\n", "Question:"), ("Q:", "<|im_end|>", "aab", " b a b"), ("Exercise 1.", "\nOutput:", "\nTask")]
)
def test_a_text_ends_with_the_token_that_completes_a_stop_string(smollm2, stops):
    """Against decoding it all again after each token."""
    table = constrain.until(smollm2, stops, vocab=len(smollm2) + 8)
    written = ["\n\n", "Question:", "Q:", "a b a b", "aaab", "Exercise 1. \nOutput:\nTask", "Question: \n", "<|im_end|>", "é"]
    pieces, draws, ended = [smollm2(text).input_ids for text in written], np.random.default_rng(0), 0
    for _ in range(200):
        tokens = [token for n in draws.integers(len(pieces), size=4) for token in pieces[n][: draws.integers(1, 9)]]
        state, special = 0, smollm2.convert_tokens_to_ids("<|im_end|>")
        for k, token in enumerate(tokens):
            state = table[state, token]
            said = smollm2.decode(tokens[: k + 1], skip_special_tokens=True)
            whole = any(stop in said for stop in stops) or (token == special and "<|im_end|>" in stops)
            assert (state < 0) == whole, said
            if whole:
                ended += 1
                break
    assert 20 < ended < 200
    for none in ((), ("",)):
        with pytest.raises(ValueError, match="stop strings"):
            constrain.until(smollm2, none, vocab=len(smollm2))


def test_a_set_of_answers_is_allowed_in_its_own_tokens(smollm2):
    said = [" positive", " not positive", " not"]
    vocab, eos = len(smollm2) + 8, smollm2.eos_token_id
    table = constrain.to_answers(smollm2, said, vocab=vocab, eos=eos)
    for answer in said:
        assert allows(
            table, document(smollm2, render(SUMS, ROWS[0]), answer, chat=False).tokens[-len(smollm2(answer).input_ids) - 1 :]
        )
    assert not allows(table, [eos]) and not allows(table, smollm2(" not negative").input_ids)
    assert (table >= 0).sum() == 6  # three tokens, three ends
    with pytest.raises(ValueError, match="no answers"):
        constrain.to_answers(smollm2, [], vocab=vocab, eos=eos)


def test_a_regular_expression_in_real_tokens(smollm2):
    eos = smollm2.eos_token_id
    table = constrain.to_regex(smollm2, r" (yes|no)(, [a-zé ]{3})?", vocab=len(smollm2), eos=eos)
    for text, fits in {" yes": True, " no, été": True, "yes": False, " no, été!": False}.items():
        assert allows(table, [*smollm2(text).input_ids, eos]) == fits
    assert allows(table, [*smollm2(" y").input_ids, *smollm2("es").input_ids, eos])
    with pytest.raises(ValueError):
        constrain.to_regex(smollm2, "(", vocab=len(smollm2), eos=eos)
