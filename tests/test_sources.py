"""Reading: what is harmless is accepted, what is not is refused with the file and the line."""

import gzip
import json

import datasets
import pytest

from jaxalign.data import sources
from jaxalign.data.sources import read, require


def written(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": 1}\n{"a": 2}\n',
        b'{"a": 1}\n{"a": 2}',
        b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n',
        b'{"a": 1}\r\n{"a": 2}\r\n',
        b'\n{"a": 1}\n\n{"a": 2}\n\n',
    ],
    ids=["plain", "no last line break", "byte order mark", "CRLF", "blank lines"],
)
def test_harmless_forms_read_alike(tmp_path, data):
    assert read(written(tmp_path, "x.jsonl", data)) == [{"a": 1}, {"a": 2}]
    assert read(written(tmp_path, "x.jsonl.gz", gzip.compress(data))) == [{"a": 1}, {"a": 2}]


def test_json_lists(tmp_path):
    assert read(written(tmp_path, "x.json", b'\xef\xbb\xbf[{"a": "\\ud83d\\ude00"}]')) == [{"a": "\U0001f600"}]


def test_line_separators_inside_strings_do_not_cut_rows(tmp_path):
    rows = [{"text": "one\u2028two\x85three\x0bfour"}, {"text": "b"}]
    data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).replace("\x0b", "\\u000b")
    assert read(written(tmp_path, "x.jsonl", data.encode())) == rows


GOOD = b'{"a": 1}\n'


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("x.jsonl", b"", "x.jsonl: holds no rows"),
        ("x.json", b"", "x.json: holds no rows"),
        ("x.json", b"[]", "x.json: holds no rows"),
        ("x.jsonl", b"\xef\xbb\xbf\r\n", "x.jsonl: holds no rows"),
        ("x.jsonl", GOOD + b'{"a": "tr', "x.jsonl, line 2: not JSON: .*the file ends inside this line"),
        ("x.jsonl", GOOD + b"{'a': 1}\n" + GOOD, "x.jsonl, line 2: not JSON: .*double quotes"),
        ("x.jsonl", GOOD + b"\n[1]\n", "x.jsonl, line 3: a row is an object .* this is a list"),
        ("x.jsonl", GOOD + b'{"a": "\xe9"}\n', "x.jsonl, line 2: byte 0xe9 at column 8 is not UTF-8"),
        ("x.jsonl", '{"a": 1}'.encode("utf-16"), "x.jsonl, line 1: byte 0xff at column 1 is not UTF-8"),
        ("x.jsonl", GOOD + b'{"a": "\\ud83d"}\n', "x.jsonl, line 2: .*half of a pair"),
        ("x.jsonl", GOOD + b'{"a": ' + b"9" * 5000 + b"}\n", "x.jsonl, line 2: .*value has 5000 digits"),
        ("x.jsonl", GOOD + b'{"a": NaN}\n', "x.jsonl, line 2: not JSON: NaN is no number of JSON"),
        ("x.jsonl", GOOD + b'{"a": [-Infinity]}\n', "x.jsonl, line 2: not JSON: -Infinity is no number"),
        ("x.jsonl", GOOD + b'{"a": 1e999}\n', "x.jsonl, line 2: the number 1e999 is larger than any float"),
        ("x.jsonl", GOOD + b'{"a": {"b": 1, "c": 2, "b": 3}}\n', "x.jsonl, line 2: the name 'b' is twice in one object"),
        ("x.jsonl", GOOD + b"\0\0\0\n" + GOOD, "x.jsonl, line 2: not JSON: .*; it holds NUL bytes: was the machine stopped"),
        ("x.jsonl", GOOD + b"[" * 10**5 + b"\n", "x.jsonl, line 2: lists or objects nested too deep"),
        ("x.json", b'[{"a": 1},\n {"a": }]', "x.json: not JSON: Expecting value at line 2 column 8"),
        ("x.json", GOOD + GOOD, "x.json: not JSON: .*is named .jsonl"),
        ("x.json", GOOD, "x.json: a .json file of data holds one list of objects, this one a dict"),
        ("x.json", b'[{"a": 1}, 2]', "x.json, row 1: a row is an object"),
        ("x.csv", b"a,b\n", r"ends in \.jsonl, \.jsonl\.gz, \.json"),
        ("x.jsonl.gz", GOOD, "x.jsonl.gz: not whole as a gzip file"),
        ("x.jsonl.gz", gzip.compress(GOOD * 50, mtime=0)[:-12], "x.jsonl.gz: not whole as a gzip file"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path, name, data, says):
    with pytest.raises(ValueError, match=says):
        read(written(tmp_path, name, data))


def test_a_line_that_no_row_has_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST", 100)
    with pytest.raises(ValueError, match="x.jsonl, line 2: 111 bytes in one line; a .jsonl file has one object a line"):
        read(written(tmp_path, "x.jsonl", GOOD + b'{"a": "' + b"b" * 102 + b'"}\n'))


@pytest.mark.parametrize("source", ["gs://bucket/x.jsonl", "https://host/x.jsonl"])
def test_what_lies_elsewhere_is_not_looked_for_here(source):
    with pytest.raises(ValueError, match=f"{source} is not on this machine, and only hub:owner/name is read from afar: copy"):
        read(source)


def test_a_home_that_nobody_has_is_a_missing_file():
    with pytest.raises(FileNotFoundError, match="~nobody-has-this-name/x.jsonl: no such file"):
        read("~nobody-has-this-name/x.jsonl")


def test_a_missing_file_suggests_near_names(tmp_path):
    written(tmp_path, "reviews_train.jsonl.gz", b"")
    with pytest.raises(FileNotFoundError, match="near it: reviews_train.jsonl.gz"):
        read(str(tmp_path / "reviews_train.jsonl"))
    with pytest.raises(FileNotFoundError, match="holds: reviews_train.jsonl.gz"):
        read(str(tmp_path / "zzz.jsonl"))
    with pytest.raises(FileNotFoundError, match="there is no folder .*deep.*er, and .* holds: reviews_train"):
        read(str(tmp_path / "deep" / "er" / "x.jsonl"))
    with pytest.raises(FileNotFoundError, match="is a folder, not a file"):
        read(str(tmp_path))


def test_a_split_asked_of_a_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="a file has no splits"):
        read(written(tmp_path, "x.jsonl", GOOD), split="test")


def test_the_hub_is_read_by_name_configuration_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or [{"a": 1}])
    assert read("hub:owner/name") == [{"a": 1}]
    assert read("hub:owner/name:config", split="test[:10]") == [{"a": 1}]
    assert asked == [(("owner/name",), {"split": "train"}), (("owner/name", "config"), {"split": "test[:10]"})]
    with pytest.raises(ValueError, match="is hub:owner/name or"):
        read("hub:")


def test_an_unreachable_hub_says_what_to_try(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"hub:owner/name, split 'test', .*Couldn't reach.*spelling.*to_json\('rows.jsonl'\)"):
        read("hub:owner/name", split="test")


def test_require_names_the_row_and_the_columns_it_has():
    rows = [{"prompt": "a", "answer": ""}, {"prompt": "b", "answer": None}]
    require(rows, ["prompt"], "x.jsonl")
    with pytest.raises(ValueError, match="x.jsonl, row 1: column 'answer' is null; the columns are: prompt, answer"):
        require(rows, ["prompt", "answer"], "x.jsonl")
    with pytest.raises(ValueError, match="x.jsonl, row 0: column 'response' is missing"):
        require(rows, ["response"], "x.jsonl")


@pytest.mark.parametrize("value", ["0.5", True, float("nan"), 10**400, [1]], ids=["text", "bool", "NaN", "huge", "list"])
def test_a_column_of_numbers_has_finite_ones(value):
    rows = [{"token": "a", "valence": 1}, {"token": "b", "valence": value}]
    with pytest.raises(ValueError, match="x.jsonl, row 1: column 'valence' is .*, not a finite number"):
        require(rows, ("token", "valence"), "x.jsonl", numbers=("valence",))
    require(rows[:1], ("token", "valence"), "x.jsonl", numbers=("valence",))


def test_an_error_shows_columns_in_one_line_and_not_all_of_many():
    with pytest.raises(ValueError, match=r"columns are: two\\nlines, c0, .*c18 and 11 more$"):
        require([{"two\nlines": 1} | {f"c{n}": 1 for n in range(30)}], ("a",), "x.jsonl")


@pytest.mark.parametrize(
    "name, count, columns",
    [
        ("instruction/natural_instructions_train.jsonl.gz", 2532, ["definition", "input", "targets"]),
        ("preferences/hh_harmless_train.jsonl.gz", 1300, ["prompt", "chosen", "rejected"]),
        ("sentiment/sentences_train.jsonl.gz", 8500, ["text", "label"]),
    ],
)
def test_real_files(shared, name, count, columns):
    rows = read(str(shared / "data" / name))
    assert len(rows) == count
    require(rows, columns, name)
