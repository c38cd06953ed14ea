"""Templates: a row of data as a prompt, plain or as a conversation."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

import numpy as np

from jaxalign.data import text
from jaxalign.data.sources import brief, is_number
from jaxalign.models.files import read_json

SLOT = "[Z]"


@dataclass(frozen=True)
class Template:
    """How rows are asked and answered. Its texts take columns from a row, as `data.text.fill` has them: "{question}".

    A plain prompt is the instruction, demonstrations and the question, the separator between each two. A demonstration is `text`
    of another row, with its rationale and its answer at [Z].

    A column in `slots` is of one of these types; any other is a text or a number, as it stands.
        "number"                              a finite number
        "{letter}. {entry}"                   a list, each of its entries on such a line: lettered from A, {number}ed from 1
        "[{number}] {title}: {text}"          the same of a list of objects, by their columns: passages to be cited
        {"0": "negative", "1": "positive"}    a word for each value, which is written as in JSON
    Raises ValueError for a text without one [Z], for braces that do not fit, for a space in front of [Z] (it belongs to the answer:
    `text.prompt_completion`), and for a type that is none or that no text uses.
    """

    text: str  # the question, and [Z] where its answer goes: at the end (prefix), or inside (cloze: what follows it is scored too)
    answer: str = " {answer}"  # at [Z]
    rationale: str = ""  # at [Z], in front of the answer: a chain of thought. Wei et al. 2022
    instruction: str = ""  # before all, filled by the row that is asked
    separator: str = "\n\n"
    slots: dict = field(default_factory=dict)
    system: bool = True  # in a conversation the instruction is the system's message, or else the start of the user's first turn
    turns: bool = True  # ... and demonstrations are turns, or else inside the user's one turn

    def __post_init__(self):
        for each in fields(self):
            if not isinstance(value := getattr(self, each.name), each.type):
                raise ValueError(f"'{each.name}' of a template is {brief(value)}, not a {each.type.__name__}")
        if self.text.count(SLOT) != 1:
            raise ValueError(f"template {brief(self.text)}: {SLOT} is there {self.text.count(SLOT)} times, not once")
        before, after = self.text.split(SLOT)
        if before.endswith(" "):
            raise ValueError(f"template {brief(self.text)}: a space in front of {SLOT}: write it at the start of 'answer' instead")
        used = [slot for part in (before, after, self.answer, self.rationale, self.instruction) for slot in text.fields(part)]
        for column, kind in self.slots.items():
            if column not in used or any(slot.startswith(f"{column}[") for slot in used):
                raise ValueError(f"'{column}' has a type, so it is used whole: '{{{column}}}'; the slots are: {', '.join(used)}")
            words = isinstance(kind, dict) and kind and all(isinstance(word, str) for word in kind.values())
            if not (words or kind == "number" or (isinstance(kind, str) and text.fields(kind))):
                raise ValueError(f"'{column}': {brief(kind)} is no type: 'number', '{{letter}}. {{entry}}' or its like, or words")


class Prompt(NamedTuple):
    """What a model is asked, in two forms."""

    text: str  # plain, up to the answer
    after: str  # what follows the answer of a cloze
    messages: list[dict]  # the same as a conversation, where the assistant comes next
    shots: int = 0  # demonstrations in it
    dropped: int = 0  # for which there was no room, or which are the row itself


def load(path) -> Template:
    """The template in a .json file, an object of the fields of `Template`. ValueError, naming the file, for what is none."""
    said, known = read_json(Path(path)), [each.name for each in fields(Template)]
    if unknown := sorted(said.keys() - known):
        raise ValueError(f"{path}: a template has no {', '.join(map(repr, unknown))}; it has {', '.join(known)}")
    try:
        return Template(**said)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def render(template: Template, row: dict, shots=()) -> Prompt:
    """The prompt that asks a row, behind demonstrations, which are rows too. ValueError for a missing column, by name."""
    asked = [question(template, each) for each in (*shots, row)]
    said = [target(template, shot) + after for shot, (_, after) in zip(shots, asked)]
    users, instruction = [before for before, _ in asked], _fill(template, template.instruction, row)
    behind = [*map("".join, zip(users, said)), users[-1]]
    plain = template.separator.join([instruction] * bool(instruction) + behind)
    if not template.turns:
        users, said = [template.separator.join(behind)], []
    if instruction and not template.system:
        users[0] = instruction + template.separator + users[0]
    messages = [_says("system", instruction)] if instruction and template.system else []
    for user, assistant in zip(users, said):
        messages += [_says("user", user), _says("assistant", assistant.strip())]
    return Prompt(plain, asked[-1][1], [*messages, _says("user", users[-1])], len(shots))


def question(template: Template, row: dict) -> tuple[str, ...]:
    """A row's own text: what is before [Z], and what is after it."""
    return tuple(_fill(template, part, row) for part in template.text.split(SLOT))


def target(template: Template, row: dict) -> str:
    """What should stand at [Z]: rationale and answer of a row. What SFT learns."""
    return _fill(template, template.rationale, row) + _fill(template, template.answer, row)


def words(template: Template) -> dict[str, str]:
    """Of a template whose answer is one column with a word for each value: {value: its answer}, to search among.

    ValueError for another template.
    """
    columns = text.fields(template.answer)
    if len(columns) != 1 or not isinstance(known := template.slots.get(columns[0]), dict):
        raise ValueError(f"answer {template.answer!r}: no one column with a word for each value; 'slots' may say the words")
    return {value: text.fill(template.answer, {columns[0]: word}) for value, word in known.items()}


def document(tokenizer, prompt: Prompt, answer: str | None = None, *, chat: bool, eos: bool = True, start: int | None = None):
    """A prompt as a `text.Document`, and its answer as the targets (None: to be sampled, and a prefix of that with an answer).

    Args:
        eos: end a plain answer with EOS; an assistant's turn always has its end.
        start: of an encoder-decoder, the token that decoding starts with. ValueError where it is a chat.
    """
    said = None if answer is None else answer + prompt.after
    if start is not None:
        if chat:
            raise ValueError("chat = True is for decoders, whose turns stand one behind the other; this is an encoder-decoder")
        return text.source_target(tokenizer, prompt.text, said or "", start=start, eos=eos and said is not None)
    if chat:
        asked = text.chat(tokenizer, prompt.messages, generate=True)
        if said is None:
            return asked
        whole = text.chat(tokenizer, [*prompt.messages, _says("assistant", said.strip())])
        here = np.arange(len(whole.tokens)) >= len(asked.tokens)  # not what the assistant says in demonstrations
        return whole._replace(weights=whole.weights * here)
    return text.prompt_completion(tokenizer, prompt.text, said or "", eos=eos and said is not None)


def fingerprint(*parts) -> str:
    """Sixteen hexadecimal digits of a sha256 that tell what prompts are made of from others: templates, rows, names, settings."""
    plain = [asdict(part) if isinstance(part, Template) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def each(make, rows, name: str = "row") -> list:
    """make(row) of each; a ValueError names the row by its number."""
    made = []
    for number, row in enumerate(rows):
        try:
            made.append(make(row))
        except ValueError as error:
            raise ValueError(f"{name} {number}: {error}") from error
    return made


def _says(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _fill(template: Template, part: str, row: dict) -> str:
    typed = [column for column in text.fields(part) if column in template.slots and column in row]
    return text.fill(part, row | {column: _typed(column, template.slots[column], row[column]) for column in typed})


def _typed(column: str, kind, value):
    """A value as its type writes it."""
    if isinstance(kind, dict):
        if (key := value if isinstance(value, str) else json.dumps(value)) not in kind:
            raise ValueError(f"column '{column}' is {brief(value)}; there are words for {', '.join(kind)}")
        return kind[key]
    if kind == "number":
        if not is_number(value):
            raise ValueError(f"column '{column}' is {brief(value)}, not a finite number")
        return value
    if not isinstance(value, list):
        raise ValueError(f"column '{column}' is {brief(value)}, not a list")
    entries = [entry if isinstance(entry, dict) else {"entry": entry} for entry in value]
    counted = [{"number": n + 1, "letter": ascii_uppercase[n : n + 1] or None} for n in range(len(entries))]
    return "\n".join(text.fill(kind, count | entry) for count, entry in zip(counted, entries, strict=True))
