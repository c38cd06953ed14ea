"""What a run writes."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxalign.train import log


def write(workdir, start, stop, **kwargs):
    with log.Log(workdir, start=start, stop=stop, config={}, **kwargs) as lines:
        for n in range(start + 1, stop + 1):
            lines.write(n, {"loss/total": 1 / n, "count": n}, [{"prompt": f"é{n}", "score": float("nan")}] if n % 2 else ())


def test_lines_are_cut_to_what_an_uninterrupted_run_has(tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    for folder in (once, twice):
        folder.mkdir()
    write(once, 0, 6)
    write(twice, 0, 5)
    with open(twice / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss/to')  # killed in the middle of a line
    assert [line["step"] for line in log.read_lines(twice / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    write(twice, 3, 6)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (twice / name).read_bytes() == (once / name).read_bytes()


def test_a_damaged_line_is_dropped_with_a_word_and_the_others_stay(tmp_path, capsys):
    write(tmp_path, 0, 6)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1], lines[3] = lines[1].replace(b"{", b"\xfb"), b"[1]\n"
    path.write_bytes(b"".join(lines))
    write(tmp_path, 5, 6)
    assert "WARNING: 2 lines of" in capsys.readouterr().out
    assert [line["step"] for line in log.read_lines(path)] == [1, 3, 5, 6]


def test_a_json_file_that_is_none_is_named(tmp_path):
    assert log.read_json(tmp_path / "config.json") == {}
    (tmp_path / "config.json").write_bytes(b'{"seed": 0\xff}')
    with pytest.raises(ValueError, match=r"config.json is not JSON \(.*\), though it was written whole"):
        log.read_json(tmp_path / "config.json")


def test_a_line_is_strict_json_in_the_order_given(tmp_path):
    write(tmp_path, 0, 4)
    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[3]
    assert line == '{"step": 4, "loss/total": 0.25, "count": 4}'
    sample = (tmp_path / "samples.jsonl").read_text().splitlines()[1]
    assert sample == '{"step": 3, "prompt": "é3", "score": null}'


@pytest.mark.parametrize("x", [0.1, -3e-9, 16777217.0, 1 / 3, float("inf")])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_metric_is_written_exactly(x, dtype):
    x = jnp.asarray(x, dtype)
    assert np.asarray(log.value_of("x", x)).astype(dtype) == x


def test_a_metric_is_one_number():
    assert log.value_of("x", 3) == 3
    assert log.value_of("x", jnp.int32(3)) == 3
    assert log.value_of("x", np.float64(1 / 3)) == 1 / 3
    assert repr(log.value_of("x", jnp.float32(0.1))) == "0.1"
    with pytest.raises(ValueError, match=r"metric lengths has shape \(2,\)"):
        log.value_of("lengths", jnp.zeros(2))


def test_what_changed_in_a_config():
    old = ConfigDict({"seed": 0, "optim": {"rate": 1e-3, "warmup": (1, 2)}, "gone": None})
    new = ConfigDict({"seed": 0, "optim": {"rate": 3e-4, "warmup": (1, 2), "clip": float("inf")}})
    assert log.difference(log.plain(old), json.loads(json.dumps(log.plain(new)))) == [
        "gone: null -> absent",
        "optim.clip: absent -> Infinity",
        "optim.rate: 0.001 -> 0.0003",
    ]
    assert log.difference(log.plain(new), log.plain({"seed": 0, "optim": dict(new.optim)})) == []


def test_a_json_file_is_replaced_whole(tmp_path):
    log.write_json(tmp_path / "summary.json", {"a": 1})
    log.write_json(tmp_path / "summary.json", {"b": tmp_path})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"b": str(tmp_path)}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_sees_few_plain_lines_and_a_terminal_one_live_line(tmp_path, capsys, monkeypatch):
    write(tmp_path, 0, 50)
    assert capsys.readouterr().out.splitlines() == ["step 1/50  loss 1", "step 50/50  loss 0.02"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    write(tmp_path, 0, 50)
    first, *states = capsys.readouterr().out.split("\r\x1b[2K")  # the line is erased and written again
    assert "step 1/50  loss 1" in first and "\n" not in first
    assert states[-1].startswith("step 50/50  loss 0.02\n")


@pytest.mark.parametrize("value, text", [(0.042123, "0.04212"), (12345, "12.3k"), (2.5e6, "2.5M"), (-7.0, "-7"), (9999, "9999")])
def test_short_numbers(value, text):
    assert log.short(value) == text


@pytest.mark.parametrize("seconds, text", [(0.2, "0:00"), (59.6, "1:00"), (185, "3:05"), (7620, "2:07:00")])
def test_durations(seconds, text):
    assert log.duration(seconds) == text


def test_a_run_outlives_whoever_reads_what_it_prints(tmp_path):
    """As `tee`, which Ctrl-C ends, too."""
    program = f"""
from jaxalign.train import log
with log.Log({str(tmp_path)!r}, start=0, stop=3, config={{}}) as metrics:
    for step in range(3):
        log.say("x" * 9)
        metrics.write(step + 1, {{"loss/total": 1.0}})
"""
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert ended.returncode == 0 and "Error" not in ended.stderr, ended.stderr
    assert len(log.read_lines(tmp_path / "metrics.jsonl")) == 3


def test_tensorboard_gets_every_line(tmp_path, monkeypatch):
    seen = []

    class Writer:
        def __init__(self, folder, purge_step):
            seen.append((folder, purge_step))

        def add_scalar(self, *args):
            seen.append(args)

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer))
    write(tmp_path, 1, 2, sinks=("tensorboard",))
    assert seen == [(str(tmp_path / "tensorboard"), 2), ("loss/total", 0.5, 2), ("count", 2, 2), "closed"]


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    seen = []

    def init(**kwargs):
        seen.append(kwargs["id"])
        return SimpleNamespace(id="abc", log=lambda values, step: seen.append((values, step)), finish=lambda: seen.append("closed"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    write(tmp_path, 0, 1, sinks=("wandb",))
    write(tmp_path, 1, 2, sinks=("wandb",))
    first, second = ({"loss/total": 1 / n, "count": n} for n in (1, 2))
    assert seen == [None, (first, 1), "closed", "abc", (second, 2), "closed"]


@pytest.mark.parametrize("sink, module", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_sink_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch, sink, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"sink '{sink}' needs {module}: pip install {module}"):
        write(tmp_path, 0, 1, sinks=(sink,))
    with pytest.raises(ValueError, match="sinks: tensorboad; there are tensorboard, wandb"):
        write(tmp_path, 0, 1, sinks=("tensorboad",))
