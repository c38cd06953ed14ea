"""Rows of a data set, as dictionaries. Errors name the file and the line; rows are counted from 0, lines from 1."""

import codecs
import difflib
import gzip
import json
import zlib
from pathlib import Path

SUFFIXES = (".jsonl", ".jsonl.gz", ".json")


def read(source: str, *, split: str = "train") -> list[dict]:
    """The rows of `source`:

        path.jsonl, path.jsonl.gz   one JSON object a line; a byte order mark, CRLF and blank lines are harmless
        path.json                   one list of objects
        hub:owner/name[:config]     a Hugging Face data set and its `split`; code that comes with a data set is never run

    Raises FileNotFoundError, with names that come near; ValueError for anything else that is wrong with the source.
    """
    if source.startswith("hub:"):
        return _hub(source, split)
    path = Path(source).expanduser()
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


def require(rows: list[dict], columns, source: str):
    """ValueError, naming the row and the columns it has, where one of `columns` is missing or null."""
    for number, row in enumerate(rows):
        for column in columns:
            if row.get(column) is None:
                wrong = "is null" if column in row else "is missing"
                raise ValueError(f"{source}, row {number}: column '{column}' {wrong}; the columns are: {', '.join(row)}")


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
            cut = "; the file ends inside this line: was it copied or downloaded in part?" if number == len(lines) else ""
            rows.append(_object(_parse(line, f"{source}, line {number}", cut), f"{source}, line {number}"))
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
        raise ValueError(
            f"{where}: byte {data[error.start]:#04x} at column {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from error
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no character: no tokenizer takes it
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: a \\u escape that is half of a pair, which is no character") from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}{hint}") from error
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
        raise ValueError(
            f"{source}, split {split!r}, could not be read from the Hugging Face hub: {type(error).__name__}: {error}. Look at the "
            "spelling of owner/name, configuration and split; a private or gated set needs a login; data sets that need their own "
            "code to load are not run. Without a network, write it to a file where there is one, "
            f"load_dataset({name!r}, split={split!r}).to_json('rows.jsonl'), and give the path of that file instead."
        ) from error
    if not rows:
        raise ValueError(f"{source}, split {split!r}: holds no rows")
    return rows
