"""A model on a benchmark: python -m experiments.evaluate --config=configs/evaluate.py:mmlu --config.model.source=runs/sft

Leaves records.jsonl, a line for each example: what was asked, what was said of each answer or written, and how it was judged; and
summary.json, the figures with their standard errors. The same command goes on behind the records that are there. The tasks
are in jaxalign/evaluation/tasks.py. `hook` does the same every so many steps of a training run.
"""

import json
import math
import time
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments import common, figures, launch
from jaxalign import keys, shard
from jaxalign.data import sources
from jaxalign.evaluation import engine, records, statistics
from jaxalign.evaluation.tasks import TASKS
from jaxalign.models import files
from jaxalign.ops.calibration import ece
from jaxalign.prompts import answers, demonstrations, reasoning, template
from jaxalign.prompts.template import Prompt
from jaxalign.train import log

CHUNK = 8  # batches of requests that take two stages, or several windows, before their records are written


class Example(NamedTuple):
    row: dict
    prompts: list  # its own, and those without content that it is calibrated by
    offered: list  # answers to score behind each
    until: tuple | None  # what ends a text that is written behind the first; None: nothing is written


class Request(NamedTuple):
    example: int
    prompt: Prompt
    answer: str | None = None  # to score
    until: tuple | None = None  # what ends a text to write; None, and no answer: to read the prompt
    draw: int = 0


def rows_of(task, source: str, count: int, beside: str) -> list[dict]:
    """Rows of a task, checked and joined: `count` of them, spread evenly over the file (0: all).

    Raises ValueError, naming file and row, for those that are none of it.
    """
    if bool(beside) != bool(task.others):
        told = f"a file of {', '.join(task.others)}" if task.others else "no other file, so it is ''"
        raise ValueError(f"data.beside = {beside!r}: beside its rows this task reads {told}")
    rows = task.read(source) or common.read_rows(source, 0, seed=0)
    others = (task.read_others(beside) or common.read_rows(beside, 0, seed=0)) if beside else []
    for found, columns, name in ((rows, task.columns, source), (others, task.others, beside)):
        sources.require(found, columns, name)
    rows = [row | {"id": row.get("id", number)} for number, row in enumerate(rows)]
    try:
        rows = template.each(task.row, task.join(rows, others))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    take = min(count or len(rows), len(rows))
    return [rows[n * len(rows) // take] for n in range(take)]


def prompts_of(task, form, groups, pool, size, *, shots, rank, best_last, length, answer, seed) -> list[Prompt]:
    """The prompts of groups of rows, flat; those of a group have the same demonstrations.

    Args: size: (Prompt) -> tokens; length, answer: as of demonstrations.within.
    """
    owners, rows = zip(*((n, row) for n, group in enumerate(groups) for row in group))
    if not shots:
        asked = template.each(lambda group: [template.render(form, row) for row in group], groups)
        return [prompt for group in asked for prompt in group]
    firsts = [group[0] for group in groups]
    ranking = demonstrations.by_name(rank, form, firsts, pool, seed=seed)
    ranking = demonstrations.alike([*map(task.alike, firsts)], [*map(task.alike, pool)], ranking)
    within = demonstrations.within(size, length=length, answer=answer)
    return demonstrations.few_shot(
        form,
        list(rows),
        pool,
        lambda n, others: ranking(owners[n], others),
        k=shots,
        best_last=best_last,
        fits=lambda prompt: not prompt.shots or within(prompt),  # one that is too long alone will lose its start
    )


def examples_of(config, task, document, length: int, count: int) -> list[Example]:
    """The examples of a task, with as many demonstrations as there is room for. Args: document: (Prompt, answer) -> Document."""

    def size(prompt: Prompt, answer=None) -> int:
        found = document(prompt, answer)
        return len(found.tokens if found.source is None else found.source)

    data, form = config.data, template.load(config.template) if config.template else task.template
    if config.shots and not data.pool:
        raise ValueError(f"shots = {config.shots}: data.pool says which rows they are taken from")
    rows = rows_of(task, data.source, count, data.beside)
    pool = rows_of(task, data.pool, 0, data.beside) if config.shots else []
    groups = [[row, *(answers.content_free(row, task.free) if task.free else ())] for row in rows]
    offered, until = [[*task.answers(row)] for row in rows], [task.until(row) for row in rows]
    for number, (row, each) in enumerate(zip(rows, offered, strict=True)):
        if config.template and form.answer and each and (own := template.target(form, row)) not in each:
            raise ValueError(
                f"{config.template}: it answers row {number} by {own!r}, and this task scores {', '.join(map(repr, each))}"
            )
    blank = template.render(template.Template("-[Z]"), {})
    sizes = [size(blank, answer) - size(blank) for answer in {answer for each in offered for answer in each}]
    if task.one_token and max(sizes) > 1:
        log.say("WARNING: not all answers are one token each; log-probabilities of their tokens are summed")
    writes = any(x is not None for x in until)
    room = {"length": length, "answer": config.sample.length} if writes else {"length": length + 1, "answer": max(sizes, default=0)}
    settings = {"shots": config.shots or 0, "rank": config.rank, "best_last": config.best_last, "seed": config.seed}
    try:
        prompts = iter(prompts_of(task, form, groups, pool, size, **settings, **room))
    except ValueError as error:
        raise ValueError(f"{' or '.join(filter(None, (data.source, data.pool)))}: {error}") from error
    return [Example(group[0], [next(prompts) for _ in group], *how) for group, *how in zip(groups, offered, until, strict=True)]


def asker(config, task, requests: list[Request], keyed, document, loaded, mesh, length: int):
    """-> ask(params, numbers of requests, tell), of records.collect: Said of what is scored or read, (Written, reasoning) of texts.

    Args: keyed: (numbers, stage) -> random keys.
    """
    score = engine.scorer(loaded.model, mesh, batch=config.batch, length=length)
    tokenizer, chunk = loaded.tokenizer, CHUNK * config.batch
    if any(request.until is not None for request in requests):
        write = engine.generator(loaded.model, mesh, tokenizer, batch=config.batch, context=length, **config.sample)

    def in_two_stages(params, numbers, until):
        def stage(prompts, which):
            return write(params, keyed(numbers, which), [document(prompt) for prompt in prompts], until)

        said = reasoning.zero_shot([requests[n].prompt for n in numbers], stage, task.therefore)
        return [(answer, thought.text) for answer, thought in said]

    def ask(params, numbers, tell):
        scored, reads, writes = [], [], {}
        for k, n in enumerate(numbers):
            _, prompt, answer, until, _ = requests[n]
            if answer is not None:
                scored.append((k, document(prompt, answer)))
            elif until is None:
                reads.append(k)
            else:
                writes.setdefault(until, []).append(k)
        if scored:
            score(params, [one for _, one in scored], lambda which, said: tell(scored[which][0], said))
        for part in _chunks(reads, chunk):
            texts = [engine.encoded(tokenizer, requests[numbers[k]].prompt.text) for k in part]
            found = engine.rolling(score, params, texts, length=length, prefix=engine.prefix_of(tokenizer))
            for k, said in zip(part, found, strict=True):
                tell(k, said)
        for until, ks in writes.items():
            for part in _chunks(ks, chunk if task.therefore else len(ks)):
                asked = [numbers[k] for k in part]
                if task.therefore:
                    for k, said in zip(part, in_two_stages(params, asked, until), strict=True):
                        tell(k, said)
                else:
                    prompts = [document(requests[n].prompt) for n in asked]
                    write(params, keyed(asked, 0), prompts, until, lambda which, x, part=part: tell(part[which], (x, "")))

    return ask


def prepare(config, loaded, mesh, count: int):
    """-> measure(params, digest, path) -> (records, summary) of `count` examples (0: all), for any parameters of this model.

    Raises ValueError where task, settings and data do not fit.
    """
    if config.task not in TASKS:
        raise ValueError(f"task = {config.task!r}; there are {', '.join(TASKS)}")
    task, tokenizer, start, seed = TASKS[config.task], loaded.tokenizer, common.start_of(loaded.model), config.seed
    length = engine.longest(loaded.model, config.length)
    if task.reads and start is not None:
        raise ValueError("an encoder-decoder has no log-probability of a text without a source")
    if config.draws > 1 and not config.sample.temperature:
        raise ValueError(f"draws = {config.draws}: with sample.temperature = 0 all would be alike")

    def document(prompt: Prompt, answer=None):
        return template.document(tokenizer, prompt, answer, chat=config.chat, eos=False, start=start)

    examples = examples_of(config, task, document, length, count)
    requests = [request for n, example in enumerate(examples) for request in _requests(task, n, example, config.draws)]
    how = [task.therefore, config.chat and tokenizer.chat_template, length]
    if any(example.until is not None for example in examples):
        how += [config.sample.to_dict(), config.draws, seed]
    marks, names = [records.fingerprint(example, how) for example in examples], [task.group(example.row) for example in examples]
    tasks = [f"{config.task}/{name}" if name else config.task for name in names]
    wanted = [{"task": of, "id": one.row["id"], "prompt": mark} for of, one, mark in zip(tasks, examples, marks, strict=True)]
    counts = np.bincount([request.example for request in requests]).tolist()
    about_model = (loaded.tokenizer_digest, str(loaded.model.config.dtype))

    def keyed(numbers, stage: int):
        drawn = [f"{marks[requests[n].example]} {requests[n].draw} {stage}" for n in numbers]
        return keys.of_rows(keys.key(seed, "evaluate"), [zlib.crc32(name.encode()) >> 1 for name in drawn])

    ask = asker(config, task, requests, keyed, document, loaded, mesh, length)

    def judge(n, found):
        example, own = examples[n], examples[n].prompts[0]
        said, texts = ([x for x in found if isinstance(x, engine.Said) == scored] for scored in (True, False))
        about = {"asked": own.text} | ({"messages": own.messages} if config.chat else {})
        about["cut"] = any(x.cut for x in (*said, *(written for written, _ in texts)))
        if said:
            about["scores"] = [[answer, x.logp, x.tokens] for answer, x in zip(example.offered or [""], said)]
        if texts:
            about["written"] = [f"{thought}\n{task.therefore}{x.text}" if thought else x.text for x, thought in texts]
        return about | task.judge(example.row, said, [x.text for x, _ in texts])

    def measure(params, digest: str, path):
        model = records.fingerprint(digest, *about_model)
        found = records.collect(path, [one | {"model": model} for one in wanted], counts, partial(ask, params), judge)
        told = {"task": config.task, "prompt": records.fingerprint(marks), "model": model, "shots": config.shots or 0}
        told |= {"dropped": sum(example.prompts[0].dropped for example in examples), "cut": sum(record["cut"] for record in found)}
        return found, told | {"figures": summarise(task, [example.row for example in examples], found, seed=seed)}

    return measure


def _requests(task, n: int, example: Example, draws: int):
    own, *_ = example.prompts
    yield from (Request(n, prompt, answer) for prompt in example.prompts for answer in example.offered)
    if task.reads:
        yield Request(n, own)
    if example.until is not None:
        yield from (Request(n, own, None, example.until, draw) for draw in range(draws))


def _chunks(items: list, most: int):
    return (items[first : first + most] for first in range(0, len(items), most))


def summarise(task, rows, found: list[dict], *, seed: int) -> dict:
    """Figures of the groups, of all examples ("micro") and over groups ("macro"), each with its standard error."""
    names = [name for name in task.metrics if all(name in record for record in found)]
    clusters = [n if (cluster := task.cluster(row)) is None else cluster for n, row in enumerate(rows)]
    told = records.summary(found, names, clusters=clusters, seed=seed)
    corpus = task.corpus(found) if task.corpus else {}
    if all("confidence" in record for record in found):
        sure, right = (np.array([record[name] for record in found], np.float32) for name in ("confidence", "accuracy"))
        drawn = np.random.Generator(np.random.Philox(seed)).integers(len(found), size=(200, len(found)))
        errors = np.asarray(jax.vmap(ece)(sure[drawn], right[drawn]))
        corpus = corpus | {"ece": statistics.Estimate(float(ece(jax.numpy.asarray(sure), right)), float(errors.std(ddof=1)))}
    for name, (value, error) in corpus.items():
        told["micro"] |= {name: value, f"{name}_error": error}
    if len(told) == 3:  # one group
        told = {"micro": told["micro"]}
    return {part: {name: x if math.isfinite(x) else None for name, x in of.items()} for part, of in told.items()}


def table(told: dict) -> str:
    """Figures as lines of text, a group a line."""
    names = [name for name in told["micro"] if name != "count" and not name.endswith("_error")]
    width = max(map(len, told))
    lines = ["  ".join([" " * width, " count", *(f"{name:>17}" for name in names)])]
    for part, of in told.items():
        cells = []
        for name in names:
            value, error = of.get(name), of.get(f"{name}_error")
            cells.append("" if value is None else f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else ""))
        lines.append("  ".join([f"{part:{width}}", f"{of['count']:6}", *(f"{cell:>17}" for cell in cells)]))
    return "\n".join(lines)


def hook(loaded, mesh, workdir: Path, *, tasks: str, every: int, count: int):
    """-> (step, state) -> {"mmlu/accuracy": ..., ...}, every so many steps, for train.loop.fit; records in workdir/evaluations.

    It reads the state, and nothing else of the run: no random state of training is touched.
    Args:
        tasks: variants of configs/evaluate.py, with commas between; "": none.
        every: steps; 0: never. count: of examples of each; 0: as its config says.
    Raises ValueError where there is no such variant.
    """
    measures = {}
    for variant in tasks.split(",") if tasks and every else ():
        config = launch.config_of("evaluate", variant)
        measures[config.task] = prepare(config, loaded._replace(params=None), mesh, count or config.data.count)

    def watched(done: int, state) -> dict:
        if not measures or done % every:
            return {}
        digest, seen = files.digest(state.model_params), {}
        for name, measure in measures.items():
            _, told = measure(state.model_params, digest, workdir / "evaluations" / f"{name}.jsonl")
            of_all = told["figures"]["micro"].items()
            seen |= {f"{name}/{metric}": x for metric, x in of_all if x is not None and metric != "count"}
        return seen

    return watched


def run(config, workdir: Path):
    """Ask all, write the records, and print the figures."""
    began = time.monotonic()
    mesh = shard.make_mesh(**config.mesh)
    loaded = common.load(config.model.source, config.model, mesh, seed=config.seed)
    found, told = prepare(config, loaded, mesh, config.data.count)(loaded.params, loaded.digest, workdir / "records.jsonl")
    log.write_json(workdir / "config.json", log.plain(config))
    log.write_json(workdir / "summary.json", told | {"seconds": time.monotonic() - began})
    if "ece" in told["figures"]["micro"] and jax.process_index() == 0:
        _draw(found, workdir / "reliability.png")
    log.say(table(told["figures"]))
    log.say(json.dumps({name: x for name, x in told.items() if name != "figures"}))


def _draw(found, path):
    try:
        plot = figures.pyplot()
    except ImportError as error:
        log.say(f"no {path.name}: {error}")
        return
    sure, right = ([record[name] for record in found] for name in ("confidence", "accuracy"))
    figure, axis = plot.subplots(figsize=(4, 4))
    figures.reliability(axis, statistics.reliability(sure, right))
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plot.close(figure)


if __name__ == "__main__":
    launch.main(run, "evaluate")
