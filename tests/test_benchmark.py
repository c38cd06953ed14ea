"""The benchmark counts as the peers' does, and times steps that are compiled once."""

import io
import json

import jax
import pytest
from rich.console import Console

from experiments import benchmark, workloads


@pytest.mark.parametrize(
    "shape, gflop", [("S", (80.53, 54.76, 107.37, 10.47, 419.85, 248.04)), ("M", (440.3, 353.3, 587.1, 61.45, 2521, 5553))]
)
def test_work_is_counted_as_for_the_peers(shape, gflop):
    tasks = ("sft", "rm", "dpo", "gen", "ppo", "grpo")
    assert [workloads.flops_of(task, shape) / 1e9 for task in tasks] == pytest.approx(gflop, rel=3e-4)
    tokens = {"S": [2048, 2048, 2048, 512, 4096, 4096], "M": [512, 512, 512, 128, 1024, 4096]}[shape]
    assert [workloads.tokens_of(task, shape) for task in tasks] == tokens


def test_an_iteration_is_measured_after_all_is_compiled(monkeypatch):
    programs, compiled, laps = [], [], benchmark.laps
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: programs.append(name == benchmark.COMPILED))

    def watched(*args):
        before, seconds = sum(programs), laps(*args)
        compiled.append(sum(programs) - before)
        return seconds

    monkeypatch.setattr(benchmark, "laps", watched)
    line = benchmark.measure("grpo", "tiny")
    assert compiled == [line["compiles"], 0]
    assert set(line["spans"]) == {"sample", "score", "reward", "update"}
    assert line["min_s"] <= line["median_s"] <= line["max_s"] and line["peak_rss_mib"] > 50


def test_a_peers_results_stand_beside_ours(tmp_path):
    ours = {"task": "gen", "shape": "S", "median_s": 0.2, "min_s": 0.1, "max_s": 0.3, "tokens_per_s": 1.0, "gflops": 20.0}
    ours |= {"compile_s": 1.0, "compiles": 2, "peak_rss_mib": 300.0, "decode_gb_s": 3.0}
    limits = {"task": "limits", "device": "abacus", "gflops": 100.0, "read_gb_s": 30.0, "in_place_gb_s": 40.0}
    peers = [{"peer": "slow", "task": "gen", "shape": "S", "median_s": 0.5, "peak_rss_mib": 600.0}]
    peers += [
        {"peer": "slow", "task": "gen", "shape": "M", "median_s": 9.0, "peak_rss_mib": 1.0},
        {"peer": "broken", "failed": "1"},
    ]
    (tmp_path / "peers.jsonl").write_text("\n".join(map(json.dumps, peers)))
    console = Console(file=io.StringIO(), width=250)
    console.print(benchmark.table([limits, ours], benchmark.read(tmp_path / "peers.jsonl")))
    shown = console.file.getvalue()
    assert "20%, reading 10%" in shown and "2.50 x speed, 0.50 x memory" in shown and "broken" not in shown
