"""What people say of pairs of responses: a log that only grows, and the comparisons that come of it.

A line of the log, which `label` makes, is {"id": of the pair, "annotator", "prefers": one of SAYS, "margin": one of Llama 2's
words, "swapped": `second` stood in place 1, "seconds"}. The last line of an annotator about a pair is the one that counts.
"""

import json
import os
from collections import Counter, defaultdict

import numpy as np

from jaxalign.evaluation import records, statistics
from jaxalign.ops.preference import MARGINS_SMALL

SAYS = ("first", "second", "tie", "skip", "undo")  # skip: cannot say; undo: as if it had not been asked
PLACES = ("1", "2")
NONE = min(MARGINS_SMALL, key=MARGINS_SMALL.get)


def swapped(seed: int, annotator: str, name: str) -> bool:
    """Whether this annotator sees the `second` response of this pair in place 1: for half of all, by a hash."""
    return int(records.fingerprint(seed, annotator, name), 16) % 2 == 1


def label(pairs: dict, said: dict, *, seed: int, annotator: str) -> dict:
    """The line of the log for what a page says: {"id", "choice": "1", "2", or one of SAYS, "margin", "seconds"}.

    Args: pairs: {id: {"prompt", "first", "second"}}. ValueError for what is none of these.
    """
    name, choice, margin, seconds = (said.get(key) for key in ("id", "choice", "margin", "seconds"))
    if name not in pairs:
        raise ValueError(f"there is no pair {name!r}")
    turned = swapped(seed, annotator, name)
    if choice in PLACES:
        prefers = ("first", "second")[(choice == "2") != turned]
    elif choice in SAYS[2:]:
        prefers, margin = choice, NONE
    else:
        raise ValueError(f"choice {choice!r}: it is 1, 2, tie, skip or undo")
    if margin not in MARGINS_SMALL:
        raise ValueError(f"margin {margin!r}: it is one of {', '.join(MARGINS_SMALL)}")
    if type(seconds) not in (int, float) or not 0 <= seconds < 1e9:
        raise ValueError(f"seconds {seconds!r}: it is a number from 0, below 1e9")
    about = {"id": name, "annotator": annotator, "prefers": prefers, "margin": margin}
    return about | {"swapped": turned, "seconds": round(seconds, 2)}


def append(path, line: dict):
    """Add a line to the log, so that it is on the disk when this returns. A last line that was torn off stays, and is no line."""
    with open(path, "ab+") as file:
        torn = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * bool(torn) + json.dumps(line, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def standing(lines) -> list[dict]:
    """Of the lines of a log, in their order, those that count: neither replaced nor undone."""
    found = {}
    for line in lines:
        found.pop(key := (line["annotator"], line["id"]), None)
        if line["prefers"] != "undo":
            found[key] = line
    return list(found.values())


def votes(pairs: dict, labels: list[dict]) -> list[dict]:
    """A row for each pair that somebody judged, in the order of `pairs`, as experiments.reward reads it.

    "chosen" has more votes than "rejected", or as many, and is then `first`. won, lost, tied: shares of the votes; margin: how much
    better, of MARGINS_SMALL, is said on average, where against it counts below 0, but at least 0; how_much: the word next to that.
    Args:
        pairs: {id: {"prompt", "first", "second", and maybe of each the ids, as "prompt_ids"}}.
        labels: as of `standing`; those of other pairs are left out.
    """
    rows, said = [], _by_pair(labels)
    for name, pair in pairs.items():
        if not (found := said.get(name)):
            continue
        count = Counter(label["prefers"] for label in found)
        chosen, rejected = sorted(("first", "second"), key=lambda side: -count[side])
        sign = {chosen: 1, rejected: -1, "tie": 0}
        margin = max(0.0, sum(sign[label["prefers"]] * MARGINS_SMALL[label["margin"]] for label in found) / len(found))
        sides = {"prompt": "prompt", "chosen": chosen, "rejected": rejected}
        row = {"id": name} | {side: pair[of] for side, of in sides.items()}
        row |= {f"{side}_ids": pair[f"{of}_ids"] for side, of in sides.items() if f"{of}_ids" in pair}
        shares = {"won": chosen, "lost": rejected, "tied": "tie"}
        row |= {share: count[of] / len(found) for share, of in shares.items()} | {"votes": len(found), "margin": margin}
        rows.append(row | {"how_much": min(MARGINS_SMALL, key=lambda word: abs(MARGINS_SMALL[word] - margin))})
    return rows


def agreement(units) -> dict:
    """Whether those who labelled the same things agree. Args: units: of each thing, its labels.

    -> {"share": of all pairs of labels of one thing, how many are equal; "alpha": 1 - observed / expected disagreement, nan where
    all labels are equal: Krippendorff 2011, nominal, for any number of annotators and with gaps; of two it is near Cohen's kappa}.
    Empty where nothing has two labels.
    """
    counts = [Counter(unit) for unit in units if len(unit) > 1]
    if not counts:
        return {}

    def unequal(count):  # ordered pairs of labels that differ
        return count.total() ** 2 - sum(n * n for n in count.values())

    together = sum(counts, Counter())
    observed = sum(unequal(count) / (count.total() - 1) for count in counts)
    expected = unequal(together) / (together.total() - 1)
    share = 1 - sum(map(unequal, counts)) / sum(count.total() * (count.total() - 1) for count in counts)
    return {"share": share, "alpha": 1 - observed / expected if expected else float("nan")}


def summary(pairs: dict, labels: list[dict], rows: list[dict]) -> dict:
    """How many labels there are, and what they say of those who gave them. Figures of nothing are left out.

    place_1/rate: how often the response in place 1 was preferred, of all labels but ties, 0.5 for one who does not mind.
    first/rate: how often `first` of the source was, a tie as half. agreement/...: of `agreement`. seconds_a_label: the median.
    Args: labels: as of `standing`; rows: of `votes`.
    """
    labels = [label for label in labels if label["id"] in pairs]
    said = _by_pair(labels)
    judged = [label for part in said.values() for label in part]
    told = {"pairs": len(pairs), "judged": len(said), "comparisons": sum(row["won"] > row["lost"] for row in rows)}
    told |= {"labels": len(judged), "skipped": len(labels) - len(judged)}
    told["annotators"] = len({label["annotator"] for label in judged})
    in_place_1 = [(label["prefers"] == "first") != label["swapped"] for label in judged if label["prefers"] != "tie"]
    points = {"first": 1.0, "tie": 0.5, "second": 0.0}
    won = [sum(points[label["prefers"]] for label in part) / len(part) for part in said.values()]
    for name, x in (("place_1", in_place_1), ("first", won)):
        if len(x) > 1:
            rate, error = statistics.mean(x)
            told |= {f"{name}/rate": rate, f"{name}/error": error}
    agreed = agreement([[label["prefers"] for label in part] for part in said.values()])
    told |= {f"agreement/{name}": x for name, x in agreed.items() if x == x}
    return told | ({"seconds_a_label": float(np.median([label["seconds"] for label in judged]))} if judged else {})


def _by_pair(labels) -> dict[str, list]:
    found = defaultdict(list)
    for label in labels:
        if label["prefers"] != "skip":
            found[label["id"]].append(label)
    return dict(found)
