"""Rows of a data set, as dictionaries. Errors name the file and the line; rows are counted from 0, lines and columns from 1."""

import codecs
import difflib
import gzip
import json
import math
import os
import zlib
from pathlib import Path

import numpy as np

SUFFIXES = (".jsonl", ".jsonl.gz", ".json")
LARGEST = float(np.finfo(np.float32).max)
LONGEST = 64 * 2**20  # bytes of a line; a longer one is no row but a file of another kind


def read(source: str, *, split: str = "train") -> list[dict]:
    """The rows of `source`:

        path.jsonl, path.jsonl.gz   one JSON object a line; a byte order mark, CRLF and blank lines are harmless
        path.json                   one list of objects
        hub:owner/name[:config]     a Hugging Face data set and its `split`; code that comes with a data set is never run

    What JSON leaves open is refused: NaN and infinite numbers, a name twice in one object, half of a surrogate pair.
    Raises FileNotFoundError, with names that come near; ValueError for anything else that is wrong with the source.
    """
    if source.startswith("hub:"):
        return _hub(source, split)
    if "://" in source:
        raise ValueError(f"{source} is not on this machine, and only hub:owner/name is read from afar: copy the file here first")
    path = Path(os.path.expanduser(source))
    if split != "train":
        raise ValueError(f"{source}: a file has no splits, and split = {split!r} was asked of it; name the file of that split")
    if not path.is_file():
        raise FileNotFoundError(_missing(path))
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{source}: the name of a data file ends in {', '.join(SUFFIXES)}")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{source}: not whole as a gzip file ({error}); was it copied or downloaded in part?") from error
    data = data.removeprefix(codecs.BOM_UTF8)
    rows = _list(data, source) if path.suffix == ".json" else _lines(data, source)
    if not rows:
        raise ValueError(f"{source}: holds no rows")
    return rows


def require(rows: list[dict], columns, source: str, *, numbers=()):
    """ValueError, naming the row and the columns it has, where one of `columns` is missing or null, or of `numbers` not finite."""
    for number, row in enumerate(rows):
        for column in columns:
            value = row.get(column)
            if value is None:
                wrong = "is null" if column in row else "is missing"
                raise ValueError(f"{source}, row {number}: column '{column}' {wrong}; the columns are: {names(row)}")
            if column in numbers and not is_number(value):
                raise ValueError(f"{source}, row {number}: column '{column}' is {brief(value)}, not a finite number")


def is_number(value) -> bool:
    """A number that float32 holds, and not a bool, which Python takes for one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def brief(value) -> str:
    """A value for an error message: one line, and not all of a long one."""
    if isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text)} characters)"


def names(row) -> str:
    """The columns of a row for an error message, in one line."""
    known = [repr(str(name))[1:-1] for name in row]
    return ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")


def _missing(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    what = "is a folder, not a file" if path.is_dir() else "no such file"
    names = sorted(entry.name for entry in (path if path.is_dir() else folder).iterdir())
    if folder != path.parent:
        return f"{path}: no such file; there is no folder {path.parent}, and {folder} holds: {', '.join(names[:8]) or 'nothing'}"
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"{path}: {what}; " + (f"near it: {', '.join(near)}" if near else f"{folder} holds: {', '.join(names[:8]) or 'nothing'}")


def _lines(data: bytes, source: str) -> list[dict]:
    lines = data.split(b"\n")  # not str.splitlines, which also cuts at U+2028 and its like, inside strings
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{source}, line {number}"
            if len(line) > LONGEST:
                raise ValueError(f"{where}: {len(line)} bytes in one line; a .jsonl file has one object a line")
            cut = "; the file ends inside this line: was it copied or downloaded in part?" if number == len(lines) else ""
            rows.append(_object(_parse(line, where, cut), where))
    return rows


def _list(data: bytes, source: str) -> list[dict]:
    if not data.strip():
        return []
    rows = _parse(data, source, "; a file of one object a line is named .jsonl")
    if not isinstance(rows, list):
        raise ValueError(f"{source}: a .json file of data holds one list of objects, this one a {type(rows).__name__}")
    return [_object(row, f"{source}, row {number}") for number, row in enumerate(rows)]


def _parse(data: bytes, where: str, hint: str):
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {data[error.start]:#04x} at column {error.start + 1}"
        raise ValueError(f"{where}: {byte} is not UTF-8; save the file as UTF-8") from error
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no character: no tokenizer takes it
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: a \\u escape that is half of a pair, which is no character") from error
    except RecursionError as error:
        raise ValueError(f"{where}: lists or objects nested too deep to be read") from error
    except json.JSONDecodeError as error:
        if b"\0" in data:
            hint = "; it holds NUL bytes: was the machine stopped while it was written?"
        place = f"column {error.colno}" if "\n" not in text else f"line {error.lineno} column {error.colno}"
        raise ValueError(f"{where}: not JSON: {error.msg} at {place}{hint}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return value


def _unique(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        known = [name for name, _ in pairs]
        raise ValueError(f"the name {brief(next(name for name in known if known.count(name) > 1))} is twice in one object")
    return found


def _no_number(constant: str):
    raise ValueError(f"not JSON: {constant} is no number of JSON; leave the row out, or write null")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"the number {digits:.20} is larger than any float")
    return value


def _object(value, where: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a row is an object {{column: value, ...}}, this is a {type(value).__name__}")
    return value


def _hub(source: str, split: str) -> list[dict]:
    from datasets import load_dataset  # here, for it takes seconds and most runs read files

    _, name, *config = source.split(":")
    if not name or len(config) > 1:
        raise ValueError(f"{source}: a data set of the hub is hub:owner/name or hub:owner/name:config")
    try:
        rows = list(load_dataset(name, *config, split=split))
    except Exception as error:  # whatever the network, the hub or a builder raises
        said = " ".join(str(error).split())
        raise ValueError(
            f"{source}, split {split!r}, could not be read from the Hugging Face hub: {type(error).__name__}: {said}. Look at the "
            "spelling of owner/name, configuration and split; a private or gated set needs a login; data sets that need their own "
            "code to load are not run. Without a network, write it to a file where there is one, "
            f"load_dataset({name!r}, split={split!r}).to_json('rows.jsonl'), and give the path of that file instead."
        ) from error
    if not rows:
        raise ValueError(f"{source}, split {split!r}: holds no rows")
    return rows
