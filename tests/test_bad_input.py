"""Input as it comes: what a file, a template or a command line holds is read, or refused in a line that leads there."""

import errno
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import compare as compare_config
from configs import reward as reward_config
from configs import sample as sample_config
from configs import sft as sft_config
from experiments import common, compare, launch, reward, sample, sft
from jaxalign import keys, shard
from jaxalign.data import reviews, sources, tables, text
from jaxalign.models import checkpoints, decoder

FUZZ = settings(deadline=None, max_examples=80)


def one_line(error) -> str:
    """What the user sees of it. Fails where that is nothing, or more than a line, or a line without end."""
    said = str(error)
    assert said.strip() and said.isprintable() and len(said) < 1500, repr(said)
    return said


# files, templates and rows of any kind -------------------------------------------------------------------------------------------

VALID = b'{"text": "the film was good .", "n": [1, 2.5, {"a": null}]}\n{"text": "caf\xc3\xa9 \\ud83d\\ude00", "n": -1e3}\n'
SPICE = [
    b"NaN",
    b"1e999",
    b"\\ud800",
    b"\xff",
    b"\0",
    b"\r\n",
    b"\xef\xbb\xbf",
    b"[" * 3000,
    b'"text":',
    b"9" * 5000,
    b"\xe2\x80\xa8",
]


@st.composite
def mutated(draw):
    """VALID with a few bytes changed, taken out or put in."""
    data = bytearray(VALID)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 8)))
        data[start:end] = draw(st.one_of(st.sampled_from(SPICE), st.binary(max_size=3)))
    return bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@FUZZ
@given(data=st.one_of(st.binary(max_size=200), mutated()), name=st.sampled_from(["x.jsonl", "x.json", "x.jsonl.gz"]))
def test_any_bytes_are_rows_or_an_error_that_names_the_file(folder, data, name):
    path = folder / name
    path.write_bytes(data)
    try:
        rows = sources.read(str(path))
    except ValueError as error:
        assert str(path) in one_line(error)
    else:
        assert rows and all(isinstance(row, dict) for row in rows)
        json.dumps(rows, allow_nan=False, ensure_ascii=False).encode()  # as JSON has it, and as UTF-8 has it


@FUZZ
@given(source=st.text(max_size=30).filter(lambda name: "\0" not in name and not name.startswith("hub:")))
def test_any_name_of_a_file_is_an_error_that_says_what_is_there(folder, source):
    with pytest.raises((ValueError, OSError)) as raised:
        sources.read(str(folder / "no") + source)
    assert str(raised.value)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
any_rows = st.dictionaries(st.sampled_from(["a", "b", "two\nlines", "\ud800"]), json_values, max_size=4)
any_template = st.one_of(
    st.text(alphabet="{}[]ab01!:. \n\ud800", max_size=12),
    st.lists(st.sampled_from(["{a}", "{b[0]}", "{a[b]}", "{{", "}}", "{", "text", "{a[-1]}", "{a[9999999999999999999]}"])).map(
        "".join
    ),
)


@FUZZ
@given(template=any_template, row=any_rows)
def test_any_template_is_filled_or_refused(template, row):
    for take, made in ((text.fill, str), (text.number, float)):
        try:
            found = take(template, row)
        except ValueError as error:
            one_line(error)
        else:
            assert isinstance(found, made)
            assert np.isfinite(found) if made is float else isinstance(found.encode(), bytes)


WORDS = reviews.tokenizer()


@FUZZ
@given(rows=st.lists(any_rows, max_size=4), template=any_template, length=st.integers(1, 6))
def test_any_rows_become_documents_or_an_error_that_names_the_source(rows, template, length):
    def make(row):
        return text.prompt_completion(WORDS, text.fill(template, row), text.fill("{a}", row))

    try:
        table = tables.collect(rows, make, length=length, source="x.jsonl")
    except ValueError as error:
        assert "x.jsonl" in one_line(error)
    else:
        tables.check(tables.pad(table.documents, length), len(WORDS))


any_ids = st.one_of(json_values, st.lists(st.one_of(st.integers(-3, 12), st.floats(), st.booleans()), max_size=4))


@FUZZ
@given(prompt=any_ids, completion=any_ids)
def test_ids_of_a_file_are_in_the_vocabulary_or_refused(prompt, completion):
    try:
        document = text.of_ids(prompt, completion, vocab=10)
    except ValueError as error:
        one_line(error)
    else:
        assert document.tokens.tolist() == prompt + completion and document.tokens.dtype == np.int32
        assert all(type(x) is int and 0 <= x < 10 for x in prompt + completion)


@pytest.mark.parametrize(
    "ids, says",
    [
        ([1, -1], "id 1 of the completion is -1, no token of a vocabulary of 10"),
        ([10], "id 0 of the completion is 10, no token"),
        ([1.0], r"id 0 of the completion is 1\.0, no token"),
        ([True], "id 0 of the completion is True, no token"),
        ([2**40], "is 1099511627776, no token"),
        (["7"], "id 0 of the completion is '7', no token"),
        ("7", "the ids of the completion are '7', not a list"),
        (None, "the ids of the completion are None, not a list"),
    ],
)
def test_what_is_no_token_id_is_named(ids, says):
    with pytest.raises(ValueError, match=says):
        text.of_ids([1, 2], ids, vocab=10)


@pytest.mark.parametrize(
    "value, says",
    [
        ("3", "'{margin}' of the template is '3', not a finite number"),
        (True, "is True, not a finite number"),
        (float("nan"), "is nan, not a finite number"),
        (float("inf"), "is inf, not a finite number"),
        (10**400, r"is 1000.*\(401 characters\), not a finite number"),
        (1e39, r"is 1e\+39, not a finite number"),  # float32 has no such number
        (None, "is None, not a finite number"),
        ([1.0], "is a list of 1, not a finite number"),
    ],
)
def test_what_is_no_number_is_named(value, says):
    with pytest.raises(ValueError, match=says):
        text.number("{margin}", {"margin": value})


@pytest.mark.parametrize("template", ["", "5", "{margin} points", "{margin}{margin}", "{margin:>3}"])
def test_a_number_is_one_column_and_nothing_else(template):
    with pytest.raises(ValueError, match="a number is one column and nothing around it"):
        text.number(template, {"margin": 1.0})
    assert text.number("{m[1]}", {"m": [1, 2]}) == 2.0


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_a_seed_that_would_be_cut_to_another_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed = {seed}: it is a whole number from 0 to 4294967295"):
        keys.key(seed, "sample")


# drivers -------------------------------------------------------------------------------------------------------------------------

GOOD = '{"text": "the film was good ."}\n'


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(shard, "make_mesh", partial(shard.make_mesh, devices=jax.devices()[:1]))


@pytest.mark.parametrize(
    "data, changed, says",
    [
        ("", {}, "mine.jsonl: holds no rows"),
        (GOOD * 2 + '{"text": "the fi', {}, "mine.jsonl, line 3: not JSON: .*the file ends inside this line"),
        (GOOD + '{"txt": "a"}\n', {}, "mine.jsonl, row 1: '{text}' of the template is not a column; the columns are: txt"),
        (GOOD + '{"text": null}\n', {}, "mine.jsonl, row 1: '{text}' of the template is no text but None"),
        (GOOD + '{"text": ["a"]}\n', {}, "mine.jsonl, row 1: .* no text but a list of 1"),
        (GOOD + '{"text": "a", "text": "b"}\n', {}, "mine.jsonl, line 2: the name 'text' is twice in one object"),
        (GOOD + '{"text": "\\ud800"}\n', {}, "mine.jsonl, line 2: .*half of a pair"),
        (GOOD, {}, "data.held_out = 1 of 1: at least one must be on each side"),
        (GOOD * 4, {"held_out": 4}, "data.held_out = 4 of 4: at least one"),
        ('{"text": ""}\n' * 4, {}, "nothing to learn from is left of 4 rows: 4 have no target within 64 tokens"),
        (GOOD * 4, {"source": "gs://bucket/mine.jsonl"}, "gs://bucket/mine.jsonl is not on this machine"),
        (GOOD * 4, {"source": "mine.csv"}, "mine.csv: no such file"),
    ],
)
def test_bad_rows_are_refused(tmp_path, data, changed, says):
    settings = sft_config.get_config("tiny").data.to_dict()
    settings |= {"source": str(tmp_path / "mine.jsonl"), "count": 0, "held_out": 1} | changed
    (tmp_path / "mine.jsonl").write_text(data)
    with pytest.raises((ValueError, OSError), match=says) as raised:
        sft.documents(WORDS, seed=0, **settings)
    one_line(raised.value)


PAIR = {"prompt": "the film was", "chosen": "good .", "rejected": "bad ."}
IDS = {**PAIR, "prompt_ids": [5, 6], "chosen_ids": WORDS("good .")["input_ids"], "rejected_ids": WORDS("bad .")["input_ids"]}


@pytest.mark.parametrize(
    "row, changed, says",
    [
        (IDS | {"chosen_ids": [*IDS["chosen_ids"], 99999]}, {}, "row 2: id 2 of the completion is 99999, no token of a vocabulary"),
        (IDS | {"prompt_ids": [5, -1]}, {}, "row 2: id 1 of the prompt is -1, no token"),
        (IDS | {"prompt_ids": [5.7]}, {}, r"row 2: id 0 of the prompt is 5\.7, no token"),
        (IDS | {"rejected_ids": "bad"}, {}, "row 2: the ids of the completion are 'bad', not a list"),
        ({name: x for name, x in IDS.items() if name != "prompt_ids"}, {}, "row 2: the ids of the prompt are None, not a list"),
        (IDS | {"chosen": "bad ."}, {}, "row 2: chosen_ids are not the tokens of 'chosen': another tokenizer"),
        (PAIR | {"margin": "much"}, {"margin": "{margin}"}, "row 2: '{margin}' of the template is 'much', not a finite number"),
        (PAIR | {"margin": True}, {"margin": "{margin}"}, "row 2: '{margin}' of the template is True, not a finite number"),
        (PAIR, {"margin": "{margin}"}, "row 2: '{margin}' of the template is not a column"),
        (PAIR | {"rejected": None}, {}, "row 2: '{rejected}' of the template is no text but None"),
    ],
)
def test_bad_comparisons_are_refused(tmp_path, row, changed, says):
    rows = [PAIR | {"margin": 1}, IDS | {"margin": 0.5}, row]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    settings = reward_config.get_config("tiny").data.to_dict() | {"source": str(tmp_path / "mine.jsonl"), "held_out": 1} | changed
    with pytest.raises(ValueError, match=f"mine.jsonl, {says}") as raised:
        reward.comparisons(WORDS, len(WORDS), **settings)
    one_line(raised.value)


def test_a_lexicon_has_numbers(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"token": "good", "valence": "1"}\n')
    with pytest.raises(ValueError, match="mine.jsonl, row 0: column 'valence' is '1', not a finite number"):
        common.gold_reward(str(tmp_path / "mine.jsonl"))


def test_a_sampler_without_an_end_is_refused():
    with pytest.raises(ValueError, match="this tokenizer has no EOS token, so no response would ever end"):
        common.sampler(None, None, None, {})


def test_bad_rows_end_a_run_before_it_writes(tmp_path, one_device):
    config = sft_config.get_config("tiny")
    config.data.source = str(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such file"):
        sft.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model of the generated world's words."""
    config = decoder.DecoderConfig(vocab=len(WORDS), width=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp=8, context=64)
    shapes = shard.unbox(jax.eval_shape(decoder.build(config).init, jax.random.key(0)))
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.normal(0, 0.6, leaf.shape).astype(leaf.dtype), shapes)
    return checkpoints.export(tmp_path_factory.mktemp("model") / "model", config, params, tokenizer=WORDS)


def ask(model, output, **changed):
    config = sample_config.get_config()
    config.update_from_flattened_dict(
        {"model.source": str(model), "output": str(output), "prompt": "the film was", "completion": "good ."} | changed
    )
    sample.run(config)


def test_answers_take_the_place_of_others_when_all_are_there(tmp_path, model, one_device):
    (tmp_path / "mine.jsonl").write_text(GOOD + '{"txt": "a"}\n')
    output = tmp_path / "answers.jsonl"
    output.write_text("of last week\n")
    for changed in ({"prompts.source": str(tmp_path / "mine.jsonl")}, {"prompt": ""}, {"model.source": str(tmp_path / "none")}):
        with pytest.raises((ValueError, OSError)) as raised:
            ask(model, output, **changed)
        one_line(raised.value)
        assert output.read_text() == "of last week\n" and len(list(tmp_path.iterdir())) == 2
    ask(model, output)
    assert json.loads(output.read_text())["prompt"] == "the film was" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "output, says",
    [("", "is a folder, not a file"), ("gs://bucket/x.jsonl", "is not on this machine"), ("file/x.jsonl", "[Ff]ile|[Dd]irectory")],
)
def test_answers_that_cannot_be_written_are_not_made(tmp_path, one_device, output, says):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=says):
        ask("none", output if ":" in output else tmp_path / output)


def test_comparisons_do_not_take_the_place_of_a_training_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds a training run, whose settings and summary would be lost: give another --workdir"):
        compare.run(compare_config.get_config("tiny"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_what_the_gold_score_fails_on_is_counted_and_not_compared(tmp_path, model, monkeypatch, one_device):
    """A failed score is NaN (rewards.score_texts): no annotator saw it."""
    config = compare_config.get_config("tiny")
    config.update_from_flattened_dict({"model.source": str(model), "prompts.count": 64, "sample.length": 3, "stages": {}})
    failed = []

    def gold(texts):
        scores = np.arange(len(texts), dtype=np.float32)
        scores[: len(failed) or 3] = np.nan
        return scores

    monkeypatch.setattr(compare.common, "gold_reward", lambda lexicon: gold)
    compare.run(config, tmp_path)
    rows = sources.read(str(tmp_path / "comparisons.jsonl"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["unscored"] == 3 and len(rows) + summary["equal"] == 61 and np.isfinite(summary["agreement/ceiling"])
    failed.extend(range(64))
    with pytest.raises(ValueError, match="nothing to compare: of 64 prompts .* 64 one that the gold score fails on"):
        compare.run(config, tmp_path)
    assert sources.read(str(tmp_path / "comparisons.jsonl")) == rows  # of the time before


# folders -------------------------------------------------------------------------------------------------------------------------

HOLD = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); f.write('process 7 on host'); f.flush()"


def test_one_process_at_a_time_writes_in_a_folder(tmp_path):
    code = f"{HOLD}; print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / ".lock"], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    try:
        with pytest.raises(OSError, match="process 7 on host is writing in .*: wait for its end, stop it, or give another"):
            launch.writing(tmp_path).__enter__()
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    for _ in range(2):  # a lock goes with its process, and with its context
        with launch.writing(tmp_path) as folder, pytest.raises(OSError, match=f"process {os.getpid()} on .* is writing in"):
            assert folder == tmp_path
            launch.writing(tmp_path).__enter__()


def test_a_stage_that_another_process_makes_is_waited_for_by_its_user(tmp_path):
    settings = compare_config.get_config("tiny").stages
    stages = launch.Stages(tmp_path, settings, {"sft": lambda *_: pytest.fail("made twice")})
    with launch.writing(tmp_path / "sft"), pytest.raises(OSError, match=f"is writing in {tmp_path / 'sft'}: wait"):
        stages.path("stage:sft")


def test_a_folder_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(launch.fcntl, "flock", none)
    with launch.writing(tmp_path / "run") as folder:
        assert folder.is_dir()
    assert "cannot be locked (No locks available): see to it that nothing else writes there" in capsys.readouterr().out


@pytest.mark.parametrize(
    "folder, says",
    [
        ("file", "file cannot be the folder of a run: File exists. Give another one"),
        ("file/run", "file/run cannot be the folder of a run: Not a directory"),
        ("/proc/run", "/proc/run cannot be the folder of a run: "),  # nobody can write there
        ("gs://bucket/run", "gs://bucket/run is not on this machine. Give a local path"),
        ("s3://bucket/run", "s3://bucket/run is not on this machine"),
    ],
)
def test_what_cannot_be_the_folder_of_a_run_is_said_at_once(tmp_path, monkeypatch, folder, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match=says):
        launch.writing(folder).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_a_run_of_another_model_does_not_lose_what_the_first_one_left(tmp_path, tiny):
    class Named:
        def __init__(self, name):
            self.name = name

        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)
            (folder / "name").write_text(self.name)

    class Loaded:
        def __init__(self, name):
            self.model, self.tokenizer, self.base = tiny.model, Named(name), None

    launch.begin(tmp_path, Loaded("one"))
    launch.begin(tmp_path, Loaded("two"))  # nothing was saved yet
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    kept = (tmp_path / launch.ARCHITECTURE).read_text()
    launch.begin(tmp_path, Loaded("three"))
    assert (tmp_path / "tokenizer" / "name").read_text() == "two" and (tmp_path / launch.ARCHITECTURE).read_text() == kept


# command lines -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch, capsys):
    """(*arguments) -> what experiments.sft says as it ends with exit code 1; what it would run is a failure."""
    monkeypatch.chdir(Path(launch.__file__).parents[1])
    before = set(flags.FLAGS)

    def clear():
        flags.FLAGS.unparse_flags()
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)

    def call(*arguments):
        clear()
        monkeypatch.setattr(sys, "argv", ["experiments/sft.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            launch.main(lambda *_: pytest.fail("it ran"), "sft")
        code, said = ended.value.code, capsys.readouterr().err
        assert isinstance(code, str) or code == 1, code
        return said if code == 1 else code

    yield call
    clear()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (
            ["--config.optim.learning_rate=-1"],
            "ValueError: optim.learning_rate = -1.0: it is a number from 0\n(--debug shows where)",
        ),
        (["--config.optim.learning_rate=nan"], "optim.learning_rate = nan: it is a number"),
        (["--config.loop.save_every=0"], "loop.save_every = 0: it is a whole number from 1"),
        (["--config.data.completion="], "data.completion = '': it is a text with at least one {column}"),
        (["--config.data.completion={text"], "data.completion = '{text': template '{text': expected '}' before end of string"),
        (["--config.loop.sinks=tensorbored"], "loop.sinks = a tuple of 1: it is a tuple of tensorboard, wandb"),
        (
            ["--config.run.batch=12", "--config.run.accumulate=5"],
            "run.batch = 12: it is a multiple of run.accumulate 5 = 5, such as 15",
        ),
        (["--config.run.batch=12"], "run.batch = 12: it is a multiple of mesh.data 8 x mesh.fsdp 1 = 8, such as 16"),
        (["--config.mesh.data=3"], "mesh data=3, fsdp=1, tensor=1, sequence=1 needs 3 devices, here are 8"),
        (["--config.data.source=\udcff"], "data.source = '\\udcff': "),
        (["--config.seed=1", "--config.seed=2"], "--config.seed is given twice: 1 and 2"),
        (
            ["--config=configs/sft.py:tiny", "--config=configs/sft.py"],
            "--config is given twice: configs/sft.py:tiny and configs/sft.py",
        ),
        (["--config", "configs/sft.py"], "--config wants its file behind a '=': --config=configs/sft.py"),
        (["--workdir=gs://bucket/run"], "OSError: gs://bucket/run is not on this machine"),
        (["--workdir=README.md"], "OSError: README.md cannot be the folder of a run: File exists"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_mistake_on_the_command_line_ends_in_a_line(program, arguments, says):
    said = program(*arguments)
    assert said.startswith(says) or says in said.splitlines()[0], said
    assert all(line.isprintable() for line in said.splitlines()) and len(said.splitlines()) <= 2
