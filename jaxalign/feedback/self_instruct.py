"""Self-Instruct (Wang et al. 2022, section 3): from some tasks that people wrote, many that a model writes, with examples to learn.

    grow       the model goes on with lists of instructions; what is fit and new joins the pool of which the next lists are made
    kinds      it says of each whether its answer is one of a few labels
    examples   it writes examples: input first or, where the answer is a label, output first
    card       what became of all that was written

A task is {"instruction", "instances": [{"input", "output"}, ...], "is_classification"}. The model is an argument, so these are
functions of data: write(name, prompts, until) -> [(text, whether it ended by itself)], one a prompt. All else is a function of the
seed, and no order is that of a set. The heuristics are those of the authors' bootstrap_instructions.py and
prepare_instance_for_finetuning.py; the words of the prompts are this project's.
"""

import re
import string
from collections import Counter
from dataclasses import replace

import numpy as np

from jaxalign.evaluation.rouge import rouge_l
from jaxalign.prompts.answers import calibrated, of_labels
from jaxalign.prompts.template import Prompt, Template, render, target, words

LEARNT = ("instruction", "input", "output")
NOT_TEXT = ("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot", "go to")
MORE = Template(
    text="Write {count} tasks for somebody who can only read and write, each of another kind than the others.[Z]",
    answer="\n{tasks}",
    slots={"tasks": "{number}. {entry}"},
)
KIND = Template(
    text="Task: {instruction}\nIs the answer always one of a few labels?[Z]",
    answer=" {is_classification}",
    slots={"is_classification": {"true": "yes", "false": "no"}},
)
INPUT_FIRST = Template(
    instruction="Give examples of each task: an input, and the output that fulfils the task. Some tasks need no input.",
    text="Task: {instruction}[Z]",
    answer="\n{instances}",
    slots={"instances": "Example {number}\nInput: {input}\nOutput: {output}"},
    system=False,
)
OUTPUT_FIRST = replace(
    INPUT_FIRST,
    instruction="Give examples of each task: one of its labels, and then an input for which that label is right.",
    slots={"instances": "Class label: {output}\nInput: {input}"},
)
FORMS = {  # by whether the answer is a label: how examples are asked for, and where one is in what is written then
    False: (
        INPUT_FIRST,
        re.compile(r"(?:Input:(?P<input>.*?)\n)?Output:(?P<output>.*?)(?=\n(?:Example \d|Input:|Output:)|\Z)", re.S),
    ),
    True: (OUTPUT_FIRST, re.compile(r"Class label:(?P<output>[^\n]*)(?:\nInput:)?(?P<input>.*?)(?=\nClass label:|\Z)", re.S)),
}
LABELS = re.compile(r"^(?:(?:Input|Output|Class label):|Example \d)", re.M)  # of the lines of both forms
NEXT = "\n\nTask:"  # ends examples, in which there may be empty lines


# --------------------------------------------------------- instructions


def instructions(text: str, *, finished: bool = True) -> list[str]:
    """The instructions in a continuation of a numbered list, but for those with a `fault`.

    Args: finished: whether the text ended by itself; one that was cut gives none.
    """
    return [each for each in listed(text) if not fault(each)] if finished else []


def listed(text: str) -> list[str]:
    found = (re.sub(r"\s+", " ", part).strip().capitalize() for part in re.split(r"\n\d+\s?\. ", text))
    return [each for each in found if each]


def fault(instruction: str) -> str:
    """Why a language model is not for it, "" where it is."""
    size = len(instruction.split())
    if not 3 < size <= 150:
        return "up to 3 words" if size <= 3 else "over 150 words"
    if instruction.startswith("Write a program"):
        return "asks for a program"
    if instruction[0] in string.punctuation or not instruction[0].isascii():
        return "begins with no letter of ASCII"
    return "about what is no text" if any(re.search(rf"\b{word}\b", instruction, re.IGNORECASE) for word in NOT_TEXT) else ""


def novel(candidates, pool, *, most: float = 0.7) -> list[tuple[str, float, bool]]:
    """(instruction, its largest ROUGE-L with what is there, whether it is kept) of each; those that are kept join the pool.

    Kept at exactly `most`, as in the code; the paper says less. An empty pool keeps the first. Raises as `rouge_l`.
    """
    pool, told = list(pool), []
    for candidate in candidates:
        likeness = rouge_l(candidate, pool, stem=False) if pool else 0.0
        told.append((candidate, likeness, likeness <= most))
        pool += [candidate] * (likeness <= most)
    return told


def lists(humans: list[str], own: list[str], *, human: int, model: int, count: int, random) -> Prompt:
    """A prompt for `count` instructions, behind lists of so many: `human` of people's and `model` of its own, mixed.

    While there are too few of its own there are more of people's.
    """
    some = _some(random, own, model)
    some = _some(random, some + _some(random, humans, human + model - len(some)))
    rows = [{"count": count, "tasks": some[start : start + count]} for start in range(0, len(some), count)]
    return render(MORE, {"count": count}, rows)


def grow(write, tasks, *, rounds: int, requests: int, human: int, model: int, count: int, most: float, seed: int):
    """-> ([{"instruction", "likeness": with all before it, "round"}], {what: how many instructions}).

    Args: requests: of each round, whose prompts are made of what the rounds before it left; others: of `lists` and `novel`.
    """
    humans, made, funnel = [task["instruction"] for task in tasks], [], Counter()
    for i in range(rounds):
        own, found = [each["instruction"] for each in made], []
        how = {"human": human, "model": model, "count": count}
        prompts = [lists(humans, own, **how, random=_random(seed, 0, i, n)) for n in range(requests)]
        for text, finished in write(f"instructions, round {i}", prompts, ("\n\n",)):
            text = f"\n{text.strip()}"  # its first number, too, stands behind a line break
            why = [fault(part) if finished else "in a list that was cut" for part in listed(text)]
            funnel.update(["written"] * len(why) + [each for each in why if each])
            found += instructions(text, finished=finished)
        for instruction, likeness, kept in novel(found, humans + own, most=most):
            funnel["kept" if kept else "there already" if likeness == 1 else "too like another"] += 1
            made += [{"instruction": instruction, "likeness": likeness, "round": i}] * kept
    return made, _ordered(funnel)


# --------------------------------------------------------- examples


def kinds(score, instructions: list[str], tasks, *, shots: int, seed: int) -> list[bool]:
    """Whether the answer to each is one of a few labels, by the likelier of two words behind the same `shots` tasks of either kind.

    Calibrated by what is said of other tasks of people, as many of either kind: a small model says one word nearly always.
    Args: score: (name, prompts, words) -> log-probabilities of the words behind each prompt [N,2].
    """
    random, said = _random(seed, 1), words(KIND)
    both = [_some(random, _of(label, tasks)) for label in FORMS]
    shown = _some(random, [task for each in both for task in each[:shots]])
    known = [task for pair in zip(*(each[shots:] for each in both), strict=False) for task in pair]
    asked = [*known, *({"instruction": instruction} for instruction in instructions)]
    logp = of_labels(score("kinds", [render(KIND, row, shown) for row in asked], list(said.values())), np.arange(len(said)))
    return [list(said)[k] == "true" for k in calibrated(logp[len(known) :], logp[: len(known)]).argmax(-1)]


def examples(write, instructions: list[str], labels: list[bool], tasks, *, shots: int, most: int, seed: int):
    """-> (rows {"instruction", "is_classification", "input", "output"}, at most `most` an instruction; {what: how many examples})

    Args: labels: of `kinds`, which say whether the output comes first; shots: tasks of that kind that are shown.
    """
    rows, funnel, prompts = [], Counter(), []
    for n, (instruction, label) in enumerate(zip(instructions, labels, strict=True)):
        known = _some(_random(seed, 2, n), _of(label, tasks), shots)
        prompts.append(render(FORMS[label][0], {"instruction": instruction}, known))
    written = write("examples", prompts, (NEXT, f"\nExample {most + 1}"))
    for instruction, label, (text, finished) in zip(instructions, labels, written, strict=True):
        found = pairs(text, label)
        cut = int(bool(found) and not finished)  # the last one
        kept, why = sound(found[: len(found) - cut])
        why |= {"cut": cut, f"beyond {most} of a task": len(kept[most:])}
        funnel.update({"written": len(found), **why, "kept": len(kept[:most])})
        about = {"instruction": instruction, "is_classification": label}
        rows += [about | {"input": given, "output": wanted} for given, wanted in kept[:most]]
    return rows, _ordered(funnel)


def pairs(text: str, label: bool) -> list[tuple[str, str]]:
    """(input, output) of each example in what was written, output first where it is a label; "" where there is no input."""
    return [((each["input"] or "").strip(), each["output"].strip()) for each in FORMS[label][1].finditer(text)]


def sound(found: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], dict]:
    """Those (input, output) that can be learnt, each once, and {why: how many} of the others.

    None is, where one input that is not empty has two outputs.
    """
    why = Counter()
    kept = []
    for given, wanted in found:
        if given == wanted or not wanted:
            why["output is input" if wanted else "no output"] += 1
        elif given.endswith(":") or wanted.endswith(":"):
            why["ends in a colon"] += 1
        elif LABELS.search(given) or LABELS.search(wanted):
            why["another example inside"] += 1
        else:
            kept.append((given, wanted))
    once = list(dict.fromkeys(kept))
    why["twice"] = len(kept) - len(once)
    given = [each for each, _ in once if each]
    if len({*given}) < len(given):
        why["one input, two outputs"], once = len(once), []
    return once, dict(why)


def of_people(tasks) -> list[dict]:
    """The rows to learn from that tasks are, as those of `examples`."""
    return [
        {"instruction": task["instruction"], "is_classification": task["is_classification"], **each}
        for task in tasks
        for each in task["instances"]
    ]


def lessons(tasks, *, human: int, count: int, shots: int, seed: int, size: int) -> list[dict]:
    """`size` rows {"prompt", "answer"}: what is asked here of a model, answered by people's tasks, for one that cannot yet."""
    rows = []
    for n in range(size):
        drawn = _some(_random(seed, 3, n), tasks)
        names, (task, *others) = [each["instruction"] for each in drawn], drawn
        label = task["is_classification"]
        if n % 2:
            form, row = FORMS[label][0], task
            prompt = render(form, row, _of(label, others)[:shots])
        else:
            form, row = MORE, {"tasks": names[:count]}
            prompt = lists(names[count:], [], human=human, model=0, count=count, random=_random(seed, 4, n))
        rows.append({"prompt": prompt.text, "answer": target(form, row)})
    return rows


def _ordered(funnel: Counter) -> dict:
    """What was written, what became of it, the most first, and what was kept."""
    lost = {name: times for name, times in funnel.most_common() if times and name not in ("written", "kept")}
    return {"written": funnel["written"], **lost, "kept": funnel["kept"]}


def _of(label: bool, tasks) -> list[dict]:
    return [task for task in tasks if task["is_classification"] == label]


def _random(*counters: int):
    return np.random.default_rng(np.random.SeedSequence(counters))


def _some(random, items: list, count: int | None = None) -> list:
    """`count` of them (None: all) in an order that is drawn."""
    return [items[k] for k in random.permutation(len(items))[:count]]


# --------------------------------------------------------- the data card


def card(made: list[dict], rows: list[dict], tasks, funnels: dict, *, rounds: int) -> dict:
    """What is in a set: {name: number, or {what: how many}}.

    Args: made, rows, funnels: of `grow` and `examples`; tasks: of people, the seeds.
    """
    humans, labels = [task["instruction"] for task in tasks], {row["instruction"]: row["is_classification"] for row in rows}
    nearest = [rouge_l(each["instruction"], humans, stem=False) for each in made]
    said = {
        "seed tasks": len(tasks),
        "instructions": len(labels),
        "instructions without an example": len(made) - len(labels),
        "examples": len(rows),
        "share of classification": _mean(labels.values()),
        "share of examples without input": _mean(not row["input"] for row in rows),
        "ROUGE-L with the nearest seed": _mean(nearest),
        **{f"words of an {name}": _mean(len(row[name].split()) for row in rows if row[name]) for name in LEARNT},
    }
    first = Counter(instruction.split()[0].lower().strip(string.punctuation) for instruction in labels)
    tenths = Counter(min(int(10 * x), 9) for x in nearest)
    return said | {
        "first words": dict(first.most_common(20)),
        "nearest seed": {f"{k / 10:.1f}": tenths[k] for k in range(10)},
        "new in a round": {i + 1: sum(each["round"] == i for each in made) for i in range(rounds)},
        **funnels,
    }


def card_text(said: dict, title: str) -> str:
    """A card in Markdown."""
    plain = [
        f"- {name}: {x:.3g}" if isinstance(x, float) else f"- {name}: {x}" for name, x in said.items() if not isinstance(x, dict)
    ]
    tables = [
        f"\n## {name.capitalize()}\n\n| what | how many |\n| --- | ---: |\n" + "\n".join(f"| {k} | {n} |" for k, n in x.items())
        for name, x in said.items()
        if isinstance(x, dict)
    ]
    return "\n".join([f"# {title}", "", *plain, *tables, ""])


def _mean(x) -> float:
    found = list(x)
    return sum(found) / len(found) if found else 0.0
