"""Tasks of BIG-bench as JSON files. Srivastava et al. 2022, and the fields of their docs/doc.md.

A row has "asked" and "prefix", which its prompt is made of; "answers" with their "scores", where it is multiple choice; "targets"
where it is to be written; and how what is written is cut: "until", "regex". Choices are shown in the order of the file. BIG-bench
draws it, and the demonstrations; and it passes over a stop string that a text begins with, which here ends the text.
"""

import json
import re
from pathlib import Path

from jaxalign.data.sources import brief, names
from jaxalign.models.files import read_json
from jaxalign.prompts.template import Template, each

TEMPLATE = Template(text="{asked}[Z]", answer="{answer}{separator}", instruction="{prefix}", separator="")
METRICS = ("multiple_choice_grade", "exact_str_match")
UP_TO_A_STOP = r"[^\.\?\!\;\n]+"  # what is read of an answer where the file says nothing else


def read(source: str) -> list[dict]:
    """The rows of a task.json, of those in the folders beside one that has no examples, or of all .json files in a folder.

    Raises ValueError, naming the file, for what is none.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.json")) or sorted(path.glob("*/task.json"))
        if not files:
            raise ValueError(f"{path}: no .json files, and no folders with a task.json")
        return [row for file in files for row in read(str(file))]
    said = read_json(path)
    if "examples" not in said and (parts := sorted(path.parent.glob("*/task.json"))):
        return [row for file in parts for row in read(str(file))]
    examples, metrics = said.get("examples"), said.get("metrics")
    if not isinstance(examples, list) or not examples or not isinstance(metrics, list) or not {*METRICS} & {*metrics}:
        raise ValueError(f"{path}: a task of BIG-bench has 'examples', and 'metrics' among {', '.join(METRICS)}: {names(said)}")
    try:
        if re.compile(said.get("output_regex") or "").groups > 1:
            raise ValueError("'output_regex' has more than one group: write (?:...)")
        unique = list({json.dumps(example): example for example in examples}.values())  # a file may say one twice
        return each(lambda example: _row(said, {*metrics}, example, path), unique, "example")
    except (ValueError, re.error) as error:
        raise ValueError(f"{path}: {error}") from error


def exact_str_match(row: dict, written: str) -> float:
    """Whether what is written, up to the stop string and as the expression reads it, is a target."""
    found = re.search(row["regex"], written) if row["regex"] else None
    return float(((found[found.re.groups] or "") if found else "" if row["regex"] else written).strip() in row["targets"])


def _row(said: dict, metrics: set, example: dict, path: Path) -> dict:
    if not isinstance(example, dict) or not isinstance(example.get("input"), str):
        raise ValueError(f"an example has an 'input', this is {brief(example)}")
    scores, targets = example.get("target_scores"), example.get("target")
    if scores is not None and not (isinstance(scores, dict) and scores and all(type(x) in (int, float) for x in scores.values())):
        raise ValueError(f"'target_scores' is {brief(scores)}, not {{choice: number}}")
    if targets is None and scores:
        targets = [choice for choice in scores if scores[choice] == max(scores.values())]
    targets = [targets] if isinstance(targets, str) else targets
    if not scores and METRICS[1] not in metrics:
        raise ValueError(f"there are no 'target_scores', which {METRICS[0]} wants")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"'target' is {brief(targets)}, no text or list of texts, and there are no 'target_scores'")
    asked = said.get("example_input_prefix", "\nQ: ") + example["input"]
    if scores and said.get("append_choices_to_input", True):
        asked += "".join(said.get("choice_prefix", "\n  choice: ") + choice for choice in scores)
    asked += said.get("example_output_prefix", "\nA: ")
    space = asked[len(asked.rstrip(" ")) :]  # which belongs to the answer
    stop, expression = said.get("stop_string"), said.get("output_regex")
    return {
        "task": said.get("name") or path.stem,
        "asked": asked.rstrip(" "),
        "answer": space + targets[0],
        "prefix": said.get("task_prefix", ""),
        "separator": said.get("few_shot_example_separator", "\n"),
        "answers": [space + choice for choice in scores] if scores and METRICS[0] in metrics else [],
        "scores": list(scores.values()) if scores else [],
        "targets": [target.strip() for target in targets] if METRICS[1] in metrics else [],
        "until": (stop,) if stop else (),
        "regex": expression or ("" if stop else UP_TO_A_STOP),
    }
