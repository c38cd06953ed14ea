"""How programs start and what runs before them: flags that lead to the right one, stages that know what they were made from."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict

from experiments import launch
from jaxalign.train import log

ROOT = Path(__file__).parents[1]
STAGES = ("sft", "compare", "reward")


@pytest.fixture
def command(monkeypatch):
    """(name, *arguments) -> the arguments of a program, in the repository's root, with no flags defined yet but absl's own."""
    monkeypatch.chdir(ROOT)
    before = set(flags.FLAGS)

    def clear():
        flags.FLAGS.unparse_flags()
        for flag in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, flag)

    def call(name, *arguments):
        clear()
        argv = [f"experiments/{name}.py", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # ml_collections looks there
        return argv

    yield call
    clear()


@pytest.fixture
def parse(command):
    """(name, *arguments) -> the flags of a program, as it reads them."""

    def call(name, *arguments, folder=True):
        launch._parse(name, folder, command(name, *arguments))
        return flags.FLAGS

    return call


def test_flags_change_single_settings(parse):
    given = parse("ppo", "--config=configs/ppo.py:tiny", "--config.seed=5", "--config.kl.horizon=inf", "--workdir=here")
    assert given.workdir == "here" and given.config.kl.horizon == math.inf and given.config.run.iterations == 2
    assert [given.config.stages[stage].copy_and_resolve_references().seed for stage in STAGES] == [5, 5, 5]
    given = parse("ppo", "--config.stages.sft.run.steps=7", "--config.unended.replace=-1.5", "--config.mesh.data=4")
    assert given.workdir == "runs/ppo" and given.config.stages.sft.run.steps == 7 and given.config.mesh.data == 4
    assert given.config.unended.replace == -1.5 and given.config.objective.dual_clip is None
    assert parse("sft", "--config.loop.sinks=('tensorboard','wandb')").config.loop.sinks == ("tensorboard", "wandb")
    assert parse("sample", "--config.prompt=a b", folder=False).config.prompt == "a b"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--config=configs/pop.py"], ["no file configs/pop.py", "configs/ppo.py", "configs/sft.py"]),
        (["--config=configs/ppo.py:tidy"], ["no variant 'tidy'", "reviews, tiny, t5, smollm2"]),
        (["--config.run.iteration=3"], ["iteration", "Did you mean", "iterations", "configs/ppo.py"]),
        (["--config.optim.learning_rate=fast"], ["--config.optim.learning_rate=fast", "could not convert string to float"]),
        (["--config.run.iterations=2.5"], ["--config.run.iterations=2.5", "int()"]),
    ],
)
def test_a_wrong_flag_leads_to_the_right_one(parse, capsys, arguments, says):
    with pytest.raises(SystemExit) as ended:
        parse("ppo", *arguments)
    told = f"{ended.value.code} {capsys.readouterr().err}"
    assert all(part in told for part in says), told
    assert ended.value.code != 0 and "Traceback" not in told


@pytest.mark.slow
def test_what_a_user_can_mend_ends_in_a_paragraph(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"text": "the film was good ."}\n{"text": ["a", "list"]}\n')
    command = [sys.executable, "-m", "experiments.sft", "--config=configs/sft.py:tiny", f"--workdir={tmp_path / 'run'}"]
    ended = subprocess.run(
        [*command, f"--config.data.source={tmp_path / 'mine.jsonl'}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "row 1: '{text}' of the template is no text but a list" in ended.stderr and "--debug" in ended.stderr


def interrupted(*_):
    raise KeyboardInterrupt


def refused(*_):
    raise ValueError("nothing here to read")


@pytest.mark.parametrize(
    "run, arguments, code, says",
    [
        (interrupted, [], 130, "stopped; the same command goes on from what is done"),
        (refused, [], 1, "ValueError: nothing here to read\n(--debug shows where)"),
        (refused, ["--distributed=nonsense"], 1, "--distributed=nonsense: it is 'auto' or ADDRESS:PORT/PROCESSES/NUMBER"),
        (refused, ["--distributed=10.0.0.1/2/0"], 1, "--distributed=10.0.0.1/2/0: it is 'auto' or"),
        (refused, ["seed=3"], 1, "what is 'seed=3'? A setting is given as --config.section.key=value"),
    ],
)
def test_a_program_that_ends_early_says_why_in_a_line(command, capsys, run, arguments, code, says):
    """Also where it is stopped outside of the loop, which has its own way."""
    command("sft", *arguments)
    with pytest.raises(SystemExit) as ended:
        launch.main(run, "sft")
    told = f"{ended.value.code}{capsys.readouterr().err}"  # a text as the code is printed, and the code then 1
    assert ended.value.code == code or (code == 1 and isinstance(ended.value.code, str))
    assert says in told and "Traceback" not in told


def test_a_config_of_another_program_is_known_by_what_it_lacks(command, capsys):
    command("sft")
    with pytest.raises(SystemExit) as ended:
        launch.main(lambda config, workdir: config.kl.beta, "sft")
    assert ended.value.code == 1 and "the config has no setting 'kl', which experiments.sft reads" in capsys.readouterr().err
    command("sft")
    with pytest.raises(AttributeError, match="'dict' object"):  # any other is a fault of the program
        launch.main(lambda config, workdir: {}.beta, "sft")


def test_debug_shows_where(command):
    command("sft", "--debug")
    with pytest.raises(ValueError, match="nothing here to read"):
        launch.main(refused, "sft")


@pytest.fixture
def staged(tmp_path):
    """-> (settings of the stages draft, notes and book, where notes read draft, and book notes; a call that makes book.

    The call gives the names of the stages that ran for it.)
    """
    settings = ConfigDict()
    for name, source in (("draft", ""), ("notes", "stage:draft"), ("book", "stage:notes")):
        settings[name] = {"source": source, "words": 3, "mesh": {"data": -1}, "loop": {"log_every": 10}}
    ran = []

    def stage(name):
        def run(config, folder, stages):
            stages.path(config.source)
            ran.append(name)
            folder.mkdir(exist_ok=True)
            log.write_json(folder / "config.json", log.plain(config))
            log.write_json(folder / "summary.json", {"written": len(name) * config.words, "seconds": len(ran)})

        return run

    def make():
        ran.clear()
        stages = launch.Stages(tmp_path, settings, {name: stage(name) for name in settings})
        assert stages.path("stage:book") == str(tmp_path / "book")
        return list(ran)

    return settings, make


def test_a_stage_is_made_once_after_those_it_reads(staged):
    _, make = staged
    assert make() == ["draft", "notes", "book"] and make() == []


def test_how_a_stage_is_made_makes_it_no_other(staged):
    settings, make = staged
    make()
    settings.draft.mesh.data, settings.notes.loop.log_every = 4, 1
    assert make() == []


@pytest.mark.parametrize("stage", ["draft", "notes", "book"])
def test_a_change_of_any_stage_before_is_seen(staged, tmp_path, stage):
    settings, make = staged
    make()
    settings[stage].words = 4
    later = ["draft", "notes", "book"][["draft", "notes", "book"].index(stage) :]
    says = "words: 3 -> 4"
    for name in later:  # each in turn has to go, for it was made from the one before
        with pytest.raises(ValueError, match=f"stage {name} in {tmp_path / name} was made otherwise: {says}. Delete that folder"):
            make()
        shutil.rmtree(tmp_path / name)
        if name != "book":
            says = rf"{name}.written: \d+ -> \w+"
    assert make() == later


def test_a_change_of_the_rows_that_a_stage_read_is_seen(staged, tmp_path):
    settings, make = staged
    settings.draft.source = str(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    assert make() == ["draft", "notes", "book"] and make() == []
    (tmp_path / "rows.jsonl").write_text('{"a": 2}\n')
    with pytest.raises(
        ValueError, match=f'stage draft in {tmp_path / "draft"} was made otherwise: source: "\\w+" -> "\\w+". Delete'
    ):
        make()


def test_a_stage_that_is_made_again_alike_changes_nothing(staged, tmp_path):
    _, make = staged
    make()
    stages = launch.Stages(tmp_path, staged[0], {})
    assert stages.seconds() == 1 + 2 + 3
    summary = tmp_path / "notes" / "summary.json"
    summary.write_text(summary.read_text().replace('"seconds": 2', '"seconds": 9'))
    assert make() == [] and stages.seconds() == 1 + 9 + 3


def test_a_stage_that_was_stopped_at_its_very_end_is_made_on(staged, tmp_path):
    """Between its summary and the note of what it was made from, which would else be missed for ever."""
    _, make = staged
    make()
    (tmp_path / "book" / launch.MADE_FROM).unlink()
    assert make() == ["book"] and make() == []


def test_a_file_of_a_stage_that_cannot_be_read_is_named(staged, tmp_path):
    _, make = staged
    make()
    (tmp_path / "draft" / "config.json").write_text('{"sour')
    with pytest.raises(ValueError, match=r"draft/config\.json is not JSON .*Make what is in its folder again"):
        make()


def test_a_source_is_a_path_or_a_stage_that_exists(tmp_path):
    runs = dict.fromkeys(STAGES, refused)
    assert launch.Stages(tmp_path, ConfigDict(), runs).path("runs/mine") == "runs/mine"
    for settings, known in (({"sft": {}, "compare": {}}, "sft, compare"), ({}, "none")):
        with pytest.raises(ValueError, match=f"^stage:reward: the stages are {known}$"):
            launch.Stages(tmp_path, ConfigDict(settings), runs).path("stage:reward")
    with pytest.raises(ValueError, match="^stage:stf: the stages are sft$"):
        launch.Stages(tmp_path, ConfigDict({"sft": {}}), runs).path("stage:stf")
