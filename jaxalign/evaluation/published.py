"""Benchmarks in the files that their authors publish, as rows: (source) -> rows, or None where it is a file of another kind.

    mmlu                   SUBJECT_test.csv or SUBJECT_dev.csv, or a folder of them
    bbh, worked            TASK.json, and TASK.txt of cot-prompts, or folders of them
    questions, passages    both of SQuAD's dev-v2.0.json

Raises ValueError, naming the file, for what is not as they publish it.
"""

import csv
import os
import re
from pathlib import Path
from string import ascii_uppercase

from jaxalign.data.sources import brief
from jaxalign.models.files import read_json


def mmlu(source: str) -> list[dict] | None:
    """Lines of a question, its choices and the letter of the right one; no header. Hendrycks et al. 2021."""
    rows = []
    for file in _files(source, ".csv"):
        subject = re.sub("_(test|dev|val)$", "", file.stem)
        with open(file, newline="", encoding="utf-8-sig") as lines:
            for number, cells in enumerate(csv.reader(lines)):
                if len(cells) < 4 or cells[-1] not in [*ascii_uppercase[: len(cells) - 2]]:
                    raise ValueError(f"{file}, row {number}: {brief(cells)}, not a question, choices and the letter of one of them")
                question, *choices, letter = cells
                rows.append({"subject": subject, "question": question, "choices": choices, "answer": ascii_uppercase.index(letter)})
    return rows or None


def bbh(source: str) -> list[dict] | None:
    """{"examples": [{"input", "target"}]} of a task. Suzgun et al. 2022."""
    found = [{"task": file.stem} | example for file, said in _objects(source, "examples") for example in said["examples"]]
    return found or None


def worked(source: str) -> list[dict] | None:
    """Worked examples, before the first question."""
    return [{"task": file.stem, "cot_prompt": file.read_text(encoding="utf-8")} for file in _files(source, ".txt")] or None


def questions(source: str) -> list[dict] | None:
    """Rajpurkar et al. 2018. Of files of 2016, whose questions all have answers, too."""

    def of(here, paragraph):
        for asked in paragraph["qas"]:
            told = {"question": asked["question"], "is_impossible": asked.get("is_impossible", False)}
            yield here | told | {"id": asked["id"], "answers": [answer["text"] for answer in asked["answers"]]}

    return _squad(source, of)


def passages(source: str) -> list[dict] | None:
    """What the questions are about."""

    def of(here, paragraph):
        return [{"id": here["passage_id"], "title": here["title"], "text": paragraph["context"]}]

    return _squad(source, of)


def _squad(source: str, of) -> list[dict] | None:
    """Args: of: ({"title", "passage_id"}, paragraph) -> rows."""
    rows = []
    for file, said in _objects(source, "data"):
        try:
            for article in said["data"]:
                title = article["title"]
                for number, paragraph in enumerate(article["paragraphs"]):
                    rows += of({"title": title, "passage_id": f"{title}-{number:03d}"}, paragraph)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file}: not as SQuAD is published: {type(error).__name__} {error}") from error
    return rows or None


def _objects(source: str, key: str) -> list[tuple]:
    """(file, object) of those files that hold an object with a list by this name."""
    found = []
    for file in _files(source, ".json"):
        try:
            said = read_json(file)
        except ValueError:  # a list, which is rows; or nothing, which who reads rows says better
            continue
        found += [(file, said)] if isinstance(said.get(key), list) else []
    return found


def _files(source: str, suffix: str) -> list[Path]:
    """The file, or those of the folder, where they have this suffix."""
    path = Path(os.path.expanduser(source))
    return sorted(path.glob(f"*{suffix}")) if path.is_dir() else [path] if path.suffix == suffix and path.is_file() else []
