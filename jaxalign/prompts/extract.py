"""Answers read out of what a model wrote: (text) -> the answer, or None where none can be read."""

import re

NUMBER = re.compile(r"((?<![\w.)])-)?\$?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def after(text: str, marker: str = "the answer is") -> str | None:
    """What follows the last `marker`, in any case, to the end of its line and without a full stop. So BBH is matched exactly."""
    found = list(re.finditer(re.escape(marker), text, re.IGNORECASE))
    if not found:
        return None
    return text[found[-1].end() :].lstrip(" \n:").partition("\n")[0].strip().removesuffix(".") or None


def number(text: str) -> int | float | None:
    """The number that follows the first "####" (GSM8K); without one, the last number. Commas of thousands and "$" are left out.

    Equal numbers are equal however they are written: 1,200 is 1200.00. A "-" behind a word or a number is no sign.
    """
    before, marked, rest = text.partition("####")
    found = NUMBER.findall(rest if marked else before)
    sign, digits = (found[0] if marked else found[-1]) if found else ("", "")
    if not 0 < len(digits) <= 300:
        return None
    return (float if "." in digits else int)(sign + digits.replace(",", ""))


def letter(text: str, *, letters: str = "ABCD") -> str | None:
    """The letter of a choice: what "the answer is", else what the text begins with ("B.", "(B)"), else the last in brackets.

    An "A" that goes on as a sentence does is none.
    """
    one = f"([{re.escape(letters)}])"
    begins = re.match(rf"\(?{one}\b(?!['’]|\s+[a-z])", after(text) or text.strip())
    found = [begins[1]] if begins else re.findall(rf"\({one}\)", text)
    return found[-1] if found else None


def yes_no(text: str) -> str | None:
    """The first "yes" or "no" behind "the answer is", else the first, in small letters."""
    found = re.search(r"\b(yes|no)\b", after(text) or text, re.IGNORECASE)
    return found[1].lower() if found else None


def matched(text: str, *, pattern: str) -> str | None:
    """The last match of a regular expression: its first group, if it has groups."""
    found = list(re.finditer(pattern, text))
    return found[-1][min(1, found[-1].re.groups)] if found else None


def cited(text: str) -> list[int]:
    """The numbers of the passages that an answer cites, "[2]", each once."""
    return list(dict.fromkeys(int(n) for n in re.findall(r"\[(\d{1,9})\]", text)))
