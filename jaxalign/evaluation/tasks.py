"""Tasks as values: how a row of data is asked, and how what a model says of it is judged. Pure: no model, and no file.

    template, row, join      rows to prompts (prompts.template, prompts.demonstrations)
    answers, until, reads    what is asked of the model: log-probabilities of answers at [Z]; to write there; to read a text
    judge, metrics, corpus   what is found of a row, which of it has a mean, and figures that are no means

`TASKS` has them by name. Each says where its numbers differ from those that its source publishes.
"""

import re
from collections.abc import Callable
from string import ascii_uppercase
from typing import NamedTuple

from jaxalign.data.sources import brief
from jaxalign.evaluation import bigbench, judges, mmlu, published
from jaxalign.prompts import extract, retrieval
from jaxalign.prompts.answers import by_word
from jaxalign.prompts.reasoning import THEREFORE
from jaxalign.prompts.template import Template

QUESTION = "Question: {question}\nAnswer:[Z]"
CANARY = re.compile(r"\A[^\n]*canary[^\n]*\n(-+\n)?", re.IGNORECASE)  # the line that BIG-bench puts before its files
CALCULATOR = re.compile(r"<<[^<>\n]*>>")  # of GSM8K's solutions
PASSAGES = 3  # that are retrieved
VERBALISER = {"negative": (" negative", " bad"), "positive": (" positive", " good")}
OPINIONS, OWNER = by_word(VERBALISER)


class Task(NamedTuple):
    """How rows are asked and judged."""

    template: Template
    columns: tuple[str, ...]  # that a row must have
    judge: Callable  # (row, [engine.Said] of the answers, texts written: one a draw) -> {name: value}, what a record is to hold
    metrics: tuple[str, ...]  # of those, what is averaged; where all records have it
    row: Callable = lambda row: row  # (row) -> it, with what the template and the judge read beside. ValueError for a wrong one
    join: Callable = lambda rows, others: rows  # (rows, those of another file) -> rows, of both
    others: tuple[str, ...] = ()  # columns that the other file's rows must have; none: there is no such file
    answers: Callable = lambda row: ()  # (row) -> texts at [Z], whose log-probabilities are asked for
    until: Callable = lambda row: None  # (row) -> strings that end what is written; None: nothing is
    reads: bool = False  # ask for the log-probability of the whole prompt
    free: tuple[str, ...] = ()  # columns that are left out of three prompts more (answers.content_free)
    therefore: str = ""  # ask for a chain of thought, and then, by this, for the answer (prompts.reasoning)
    group: Callable = lambda row: ""  # (row) -> what "macro" is the mean over: subject, task
    alike: Callable = lambda row: ""  # (row) -> what its demonstrations have in common with it
    cluster: Callable = lambda row: None  # (row) -> which rows hang together, for errors; None: each stands alone
    corpus: Callable | None = None  # (records) -> {name: Estimate}: what is no mean over records
    one_token: bool = False  # answers are meant to be one token each
    read: Callable = lambda source: None  # (source) -> rows of files that are no rows; None: they are
    read_others: Callable = lambda source: None  # of the other file


# --------------------------------------------------------- rows


def _indexed(row: dict, choices: str, answer: str) -> dict:
    """The row, if its answer is the number of a choice, and the "chosen" one."""
    listed, right = row[choices], row[answer]
    if not isinstance(listed, list) or len(listed) < 2 or not all(isinstance(choice, str) for choice in listed):
        raise ValueError(f"'{choices}' is {brief(listed)}, not a list of two texts or more")
    if type(right) is not int or not 0 <= right < len(listed):
        raise ValueError(f"'{answer}' is {brief(right)}, not the number of a choice, from 0 to {len(listed) - 1}")
    return row | {"chosen": listed[right]}


def _texts(row: dict, *columns: str, least: int = 1) -> dict:
    """The row, if these columns are lists of texts."""
    for column in columns:
        if not isinstance(x := row[column], list) or len(x) < least or not all(isinstance(text, str) for text in x):
            raise ValueError(f"'{column}' is {brief(x)}, not a list of texts" + (f", {least} or more" if least else ""))
    return row


def _among(row: dict, column: str, known: tuple) -> dict:
    if row[column] not in known or isinstance(row[column], bool):
        raise ValueError(f"'{column}' is {brief(row[column])}, not one of {', '.join(map(str, known))}")
    return row


def _mmlu(row):
    return _indexed(row, "choices", "answer") | {"topic": mmlu.topic(str(row["subject"]))}


def _gsm8k(row):
    if not isinstance(row["answer"], str):
        raise ValueError(f"'answer' is {brief(row['answer'])}, not a text")
    said = row["final"] if row.get("final") is not None else row["answer"].partition("####")[2]  # as in the file that they publish
    if (final := extract.number(f"#### {said}")) is None:
        raise ValueError(f"'final' is {brief(said)}, not a number")
    return row | {"answer": CALCULATOR.sub("", row["answer"]), "final": final}


def _questions(row):
    true = dict.fromkeys([row["best_answer"], *_texts(row, "correct_answers", "incorrect_answers")["correct_answers"]])
    return row | {"true": list(true), "answer": row["best_answer"]}


def _worked(rows, prompts):
    known = {one["task"]: CANARY.sub("", one["cot_prompt"]).strip() for one in prompts}
    if missing := {row["task"] for row in rows} - known.keys():
        raise ValueError(f"no worked examples for {', '.join(sorted(missing))}")
    return [row | {"worked": known[row["task"]], "target": str(row["target"])} for row in rows]


def _given(rows, passages):
    known = {one["id"]: one for one in passages}
    if missing := [row["passage_id"] for row in rows if row["passage_id"] not in known]:
        raise ValueError(f"there is no passage {missing[0]!r}, which a question is about")
    return [row | {"passages": [known[row["passage_id"]]]} for row in rows]


def _retrieved(rows, passages):
    scores = retrieval.bm25([f"{one['title']} {one['text']}" for one in passages])([row["question"] for row in rows])
    return [row | {"passages": retrieval.search(passages, x, k=PASSAGES)} for row, x in zip(rows, scores, strict=True)]


def _squad_row(row):
    _texts(row, "answers", least=0)
    shown = {"shown": [one["id"] for one in row["passages"]], "answer": row["answers"][0] if row["answers"] else judges.ABSTAINED}
    return row | shown


def _pairs(rows, _):
    """A sentence once, with all of its translations."""
    known = {}
    for row in rows:
        known.setdefault(row["en"], []).append(row["fr"])
    return list({row["en"]: row | {"references": known[row["en"]]} for row in rows}.values())


# --------------------------------------------------------- the table


def _line(row):
    return ("\n",)


_CHOSEN = ("accuracy", "brier")

_GSM8K = Task(
    Template(text=QUESTION),
    columns=("question", "answer"),
    row=_gsm8k,
    until=lambda row: ("\nQuestion:", "\n\n"),
    judge=judges.voted(extract.number, lambda row: row["final"]),
    metrics=("accuracy",),
)
_SQUAD = Task(
    Template(
        instruction="Answer each question in a few words of the text above it. Where the text does not say it, write: unanswerable",
        text="{passages}\n\nQuestion: {question}\nAnswer:[Z]",
        slots={"passages": "{title}: {text}"},
    ),
    columns=("question", "passage_id", "answers", "is_impossible"),
    row=_squad_row,
    join=_given,
    others=("id", "title", "text"),
    read=published.questions,
    read_others=published.passages,
    answers=lambda row: (f" {judges.ABSTAINED}",),
    until=_line,
    judge=judges.squad,
    metrics=("exact_match", "f1"),
    group=lambda row: "no answer" if row["is_impossible"] else "has answer",
    cluster=lambda row: row["passage_id"],
    corpus=judges.thresholds,
)
_SENTIMENT = Task(
    Template(
        instruction="Say of each sentence from a film review whether its writer speaks well or badly of the film.",
        text="Sentence: {text}\nOpinion:[Z]",
        answer=" {label}",
        slots={"label": {str(n): label for n, label in enumerate(VERBALISER)}},
    ),
    columns=("text", "label"),
    row=lambda row: _among(row, "label", (0, 1)),
    answers=lambda row: OPINIONS,
    judge=judges.calibrated(OWNER, "label"),
    metrics=_CHOSEN,
)
_STRATEGYQA = Task(
    Template(text=QUESTION, instruction="Answer yes or no.", slots={"answer": {"yes": "yes", "no": "no"}}),
    columns=("question", "answer"),
    row=lambda row: _among(row, "answer", ("yes", "no")) | {"right": ("yes", "no").index(row["answer"])},
    answers=lambda row: (" yes", " no"),
    judge=judges.by_index("right"),
    metrics=_CHOSEN,
)

TASKS = {
    # Hendrycks et al. 2021. "micro" is what they report
    "mmlu": Task(
        mmlu.TEMPLATE,
        columns=("subject", "question", "choices", "answer"),
        row=_mmlu,
        read=published.mmlu,
        answers=lambda row: [f" {letter}" for letter in ascii_uppercase[: len(row["choices"])]],
        judge=judges.by_index("answer"),
        metrics=_CHOSEN,
        group=lambda row: row["subject"],
        alike=lambda row: row["subject"],
        one_token=True,
    ),
    "bigbench": Task(
        bigbench.TEMPLATE,
        columns=(),
        answers=lambda row: row["answers"],
        until=lambda row: row["until"] if row["targets"] else None,
        judge=judges.of_bigbench,
        metrics=bigbench.METRICS,
        group=lambda row: row["task"],
        alike=lambda row: row["task"],
        read=bigbench.read,
    ),
    # Suzgun et al. 2022, by their worked examples; so demonstrations are in the prompt already. "macro" is what they report
    "bbh": Task(
        Template(instruction="{worked}", text="Q: {input}\nA: Let's think step by step.[Z]", answer="\nSo the answer is {target}."),
        columns=("task", "input", "target"),
        join=_worked,
        others=("task", "cot_prompt"),
        read=published.bbh,
        read_others=published.worked,
        until=lambda row: ("\n\nQ:",),
        judge=judges.voted(extract.after, lambda row: row["target"]),
        metrics=("accuracy",),
        group=lambda row: row["task"],
    ),
    # Cobbe et al. 2021; demonstrations are their solutions, without calls of a calculator. Numbers that their script does not read
    # count, too (extract.number): "#### $18", "18.00", and the last one where there is no "####"
    "gsm8k": _GSM8K,
    # Kojima et al. 2022: no demonstrations, and two stages
    "gsm8k_zero_shot": _GSM8K._replace(
        until=lambda row: ("\nQuestion:",),  # a chain of thought may have empty lines, and begin with one
        therefore=THEREFORE["number"],
        judge=judges.voted(lambda text: extract.number(f"#### {text}"), lambda row: row["final"]),  # the first number
    ),
    # Lin et al. 2021. Their six demonstrations stand in configs/evaluate/truthfulqa.jsonl
    "truthfulqa": Task(
        Template(text="Q: {question}\nA:[Z]"),
        columns=("question", "best_answer", "correct_answers", "incorrect_answers"),
        row=_questions,
        answers=lambda row: [f" {answer}" for answer in (*row["true"], *row["incorrect_answers"])],
        judge=judges.truthful,
        metrics=(*_CHOSEN, "mc2"),
    ),
    "best_of_4": Task(
        Template(text="Q: {question}\nA:[Z]", answer=" {chosen}"),
        columns=("question", "responses", "best"),
        row=lambda row: _indexed(row, "responses", "best"),
        answers=lambda row: [f" {answer}" for answer in row["responses"]],
        judge=judges.by_index("best"),
        metrics=_CHOSEN,
    ),
    # Geva et al. 2021
    "strategyqa": _STRATEGYQA,
    "strategyqa_reasoned": _STRATEGYQA._replace(
        template=Template(text=QUESTION, rationale=" {rationale}\nSo the answer is", answer=" {answer}."),
        columns=("question", "answer", "rationale"),
        answers=lambda row: (),
        until=lambda row: ("\nQuestion:", "\n\n"),
        judge=judges.voted(extract.yes_no, lambda row: row["answer"]),
        metrics=("accuracy",),
    ),
    # Rajpurkar et al. 2018
    "squad2": _SQUAD,
    "squad2_retrieved": _SQUAD._replace(join=_retrieved, metrics=("exact_match", "f1", "found")),
    # Lin et al. 2020
    "common_gen": Task(
        Template(text="Write one sentence with all of these words: {words}\nSentence:[Z]", answer=" {references[0]}"),
        columns=("concepts", "references"),
        row=lambda row: _texts(row, "concepts", "references") | {"words": ", ".join(row["concepts"])},
        until=_line,
        judge=judges.sentence,
        metrics=("rouge_l", "coverage"),
    ),
    # Mishra et al. 2022, Wang et al. 2022: ROUGE-L by category; of "classification" the exact match
    "natural_instructions": Task(
        Template(instruction="{definition}", text="Input: {input}\nOutput:[Z]", answer=" {references[0]}"),
        columns=("task", "category", "definition", "input", "targets"),
        row=lambda row: row | {"references": _texts(row, "targets")["targets"]},
        until=lambda row: ("\n\n", "\nInput:"),
        judge=judges.generated,
        metrics=("rouge_l", "exact_match"),
        group=lambda row: row["category"],
        alike=lambda row: row["task"],
    ),
    "translation": Task(
        Template(text="English: {en}\nFrench:[Z]", answer=" {fr}"),
        columns=("en", "fr"),
        join=_pairs,
        until=_line,
        judge=judges.translated,
        metrics=("sentence_chrf",),
        corpus=judges.translations,
    ),
    "sentiment": _SENTIMENT,
    # Zhao et al. 2021
    "sentiment_calibrated": _SENTIMENT._replace(free=("text",)),
    "qa_wikidata": Task(
        Template(text="{prompt}[Z]", answer=" {answers[0]}"),
        columns=("prompt", "answers"),
        row=lambda row: _texts(row, "answers"),
        until=lambda row: ("\n", "."),
        judge=judges.recalled,
        metrics=("exact_match",),
    ),
    "known_unknowns": Task(
        Template(text="Q: {question}\nA:[Z]", answer=" {chosen}"),
        columns=("question", "choices", "answer"),
        row=lambda row: _indexed(row, "choices", "answer"),
        answers=lambda row: [f" {choice}" for choice in row["choices"]],
        judge=judges.by_index("answer"),
        metrics=_CHOSEN,
        group=lambda row: "unknown" if row["choices"][row["answer"]] == "Unknown" else "known",
    ),
    # Askell et al. 2021: the pair by log-probability, ties half
    "hhh": Task(
        Template(text="{prompt}[Z]", answer=" {chosen}"),
        columns=("subset", "prompt", "chosen", "rejected"),
        answers=lambda row: (f" {row['chosen']}", f" {row['rejected']}"),
        judge=judges.preferred,
        metrics=(*_CHOSEN, "per_token"),
        group=lambda row: row["subset"],
    ),
    "perplexity": Task(
        Template(text="{text}[Z]"),
        columns=("text",),
        reads=True,
        judge=judges.length,
        metrics=(),
        corpus=judges.perplexity,
    ),
    # refusals are found by phrases; right: to refuse what is harmful, with a suffix or without, and nothing else
    "safety": Task(
        Template(text="{prompt}[Z]"),
        columns=("prompt", "kind"),
        row=lambda row: _among(row, "kind", ("harmful", "harmless", "suffix")),
        until=lambda row: (),
        judge=judges.refusal,
        metrics=("refused", "right"),
        group=lambda row: row["kind"],
    ),
}
