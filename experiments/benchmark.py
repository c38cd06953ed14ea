"""How fast this machine is, and how near to its limits the library comes: python -m experiments.benchmark [--against=FILE]

First the limits (matrix products, reading, writing), then tasks on models of random weights, each in a process of its own, so that
its peak of memory is its own. A line of --out is one task: seconds a step (median, least, most, of n), tokens/s, model FLOP/s and
their share of the fastest matrix product, seconds and number of compilations, peak MiB; of sampling also bytes/s and their share of
the rate of reading; of a whole iteration, the seconds of its parts.

experiments/workloads.py has the tasks, PERFORMANCE.md what was tried and what came out.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from experiments.workloads import SHAPES, Bench, decode_work, flops_of, size_of, tokens_of
from jaxalign.train.watch import COMPILED, trim_when_compiled

STEPS = {"tiny": (1, 2), "S": (2, 9), "M": (1, 5)}  # not measured, measured
TASKS = ("limits", "sft", "ragged", "rm", "dpo", "update", "score", "gen", "ppo", "grpo")
PRODUCTS = ((512, 576, 1536), (2048, 256, 1024), (1024, 1024, 1024), (2048, 2048, 2048))  # m x k times k x n
BIG = 2**27  # floats to read or to write: 512 MiB, more than any cache


# --------------------------------------------------------- measuring


def laps(run, before: int, count: int) -> list[float]:
    """Seconds of each of `count` calls, the arrays of each waited for."""
    seconds = []
    for _ in range(before + count):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds[before:]


def measure(task: str, shape: str, documents: list[dict] = ()) -> dict:
    """One line of the results: see above."""
    compiled = []

    def count(name, seconds, **_):
        if name == COMPILED:
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(count)
    bench, (before, steps) = Bench(shape, size_of(task, shape), documents), STEPS[shape]
    run, spans = getattr(bench, task)(), []

    def one():
        out = run()
        spans.append(dict(bench.spans))
        return out

    made = len(compiled)
    first = laps(one, 0, 1)[0]
    seconds = laps(one, before, steps)
    median = statistics.median(seconds)
    tokens = bench.targets or tokens_of(task, shape)
    line = {
        **{"peer": "jaxalign", "task": task, "shape": shape, "median_s": median, "min_s": min(seconds), "max_s": max(seconds)},
        **{"n": steps, "tokens": tokens, "tokens_per_s": tokens / median},
        **{"gflops": flops_of(task, shape) / median / 1e9, "first_s": first, "compile_s": sum(compiled[made:])},
        **{"compiles": len(compiled) - made, "peak_rss_mib": peak_mib(), "wall": seconds, "jax": jax.__version__},
    }
    if task == "gen":
        line["decode_gb_s"] = decode_work(shape, *size_of(task, shape))[1] / median / 1e9
    if spans[-1]:
        line["spans"] = {name: statistics.median(span[name] for span in spans[-steps:]) for name in spans[-1]}
    return line


def peak_mib() -> float:
    """The most memory that was in use: of the device where it counts, else of this process."""
    found = jax.devices()[0].memory_stats() or {}
    return found.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20


def limits(products=PRODUCTS, floats: int = BIG) -> dict:
    """GFLOP/s of the fastest of some matrix products, and GB/s of reading and of writing in place, the best of 7 each."""

    def best(run):
        return min(laps(run, 2, 7))

    rates = {}
    for m, k, n in products:
        x, y = (jax.random.normal(jax.random.key(0), size) for size in ((m, k), (k, n)))
        rates[f"{m}x{k}x{n}"] = 2 * m * k * n / best(partial(jax.jit(jnp.matmul), x, y)) / 1e9
    big = [jnp.ones(floats)]
    read = 4 * floats / best(partial(jax.jit(jnp.sum), big[0])) / 1e9
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def in_place():
        big.append(add(big.pop()))
        return big

    written = 8 * floats / best(in_place) / 1e9
    device = jax.devices()[0].device_kind
    return {"task": "limits", "gflops": max(rates.values()), "read_gb_s": read, "in_place_gb_s": written, "products": rates} | {
        "device": device,
        "jax": jax.__version__,
    }


# --------------------------------------------------------- showing


def table(lines: list[dict], peers: list[dict] = ()) -> Table:
    """Results beside the limits, and how many times as fast and as large as each peer they are."""
    bound = next((line for line in lines if line["task"] == "limits"), None)
    names = sorted({peer["peer"] for peer in peers if "median_s" in peer})
    shown = Table(
        "task", "s a step (least to most)", "tokens/s", "GFLOP/s", "of limit", "compile s", "peak MiB", "parts, s", *names
    )
    if bound:
        rates = "{gflops:.0f} GFLOP/s, reads {read_gb_s:.1f} GB/s, writes in place at {in_place_gb_s:.1f}".format(**bound)
        shown.title = f"{bound['device']}: {rates}"
    for line in lines:
        if line["task"] == "limits":
            continue
        share = ""
        if bound:
            share = f"{line['gflops'] / bound['gflops']:.0%}"
            if "decode_gb_s" in line:
                share += f", reading {line['decode_gb_s'] / bound['read_gb_s']:.0%}"
        beside = {}
        for peer in peers:
            if "median_s" in peer and (peer["task"], peer["shape"]) == (line["task"], line["shape"]):
                faster, larger = peer["median_s"] / line["median_s"], line["peak_rss_mib"] / peer["peak_rss_mib"]
                beside[peer["peer"]] = f"{faster:.2f} x speed, {larger:.2f} x memory"
        shown.add_row(
            f"{line['task']} {line['shape']}",
            f"{line['median_s']:.3g} ({line['min_s']:.3g} to {line['max_s']:.3g})",
            f"{line['tokens_per_s']:.0f}",
            f"{line['gflops']:.1f}",
            share,
            f"{line['compile_s']:.1f} ({line['compiles']})",
            f"{line['peak_rss_mib']:.0f}",
            ", ".join(f"{name} {seconds:.3g}" for name, seconds in line.get("spans", {}).items()),
            *(beside.get(name, "") for name in names),
        )
    return shown


def read(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def main(_):
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    if given.one:  # one task, in this process
        jax.config.update("jax_enable_compilation_cache", False)
        trim_when_compiled()
        documents = read(given.documents) if given.documents else []
        print(json.dumps(limits() if given.one == ["limits"] else measure(*given.one, documents)))
        return
    for asked, known in ((given.tasks, TASKS), (given.shapes, SHAPES)):
        if unknown := set(asked) - set(known):
            sys.exit(f"{', '.join(sorted(unknown))}: there are {', '.join(known)}")
    peers, lines = read(given.against) if given.against else [], []
    Path(given.out).parent.mkdir(parents=True, exist_ok=True)
    with open(given.out, "w") as out:
        tasks = [task for task in given.tasks if task != "ragged" or given.documents]
        for one in [[task] if task == "limits" else [task, shape] for shape in given.shapes for task in tasks]:
            if one == ["limits"] and lines:
                continue
            print(" ".join(one), file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "experiments.benchmark", f"--one={','.join(one)}", f"--documents={given.documents}"]
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            out.write(found)
            out.flush()
            lines.append(json.loads(found))
    Console(width=None if sys.stdout.isatty() else 200).print(table(lines, peers))


if __name__ == "__main__":
    flags.DEFINE_list("shapes", ["S", "M"], f"Of {', '.join(SHAPES)}.")
    flags.DEFINE_list("tasks", list(TASKS), "Of these.")
    flags.DEFINE_string("out", "runs/benchmark.jsonl", "Where the results go, a line each.")
    flags.DEFINE_string("against", "", "Results of others on the same machine, lines of the same names, to be compared.")
    flags.DEFINE_string("documents", "", "For `ragged`, which wants them: a .jsonl of prompt and completion, lists of ids.")
    flags.DEFINE_list("one", [], "What the program calls itself with: a task and a shape, to measure in this process.")
    app.run(main)
