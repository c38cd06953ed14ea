"""A better instruction, found by the model itself: python -m experiments.prompt_search --config=configs/prompt_search.py

It is shown demonstrations and says what the instruction was, and it says the best of these in other words (APE, Zhou et al. 2022).
Successive halving (Jamieson and Talwalkar 2016) on rows of the pool chooses. The winner is then asked rows that nothing was chosen
by, beside the first instruction, and beside its twin by gradients: as many virtual tokens, trained on the same pool (Lester et al.
2021). Leaves report.html and summary.json with all candidates, and records.jsonl; what is there is not asked again.
"""

from dataclasses import replace
from functools import partial

import numpy as np

from experiments import common, launch, sft
from experiments.prompt import Asker, accuracy, asker, task_of, write_rows
from jaxalign import keys, shard
from jaxalign.evaluation import engine, records
from jaxalign.prompts import demonstrations, template
from jaxalign.train import log, report

INDUCE = "Somebody was given an instruction, and followed it in each of these examples:\n\n{shown}\n\nWhat was the instruction?"
REPHRASE = "Say this instruction in other words, and keep its meaning:\n\n{shown}"
ONE = " Write one sentence, and nothing else."


def proposer(ask: Asker, mesh, *, batch: int, seed: int, length: int, temperature: float):
    """-> propose(name, questions) -> instructions that the model writes, one a question; those that are empty left out."""
    loaded = ask.loaded
    how = {"batch": batch, "context": ask.length, "length": length, "temperature": temperature}
    generate, chat = engine.generator(loaded.model, mesh, loaded.tokenizer, **how), bool(loaded.tokenizer.chat_template)

    def propose(name, questions):
        prompts = [template.Prompt(f"{x}\nInstruction:", "", [{"role": "user", "content": x + ONE}]) for x in questions]
        documents = [template.document(loaded.tokenizer, prompt, chat=chat, eos=False) for prompt in prompts]
        about = {"task": name, "model": loaded.digest}
        wanted = [about | {"id": n, "prompt": records.fingerprint(x, seed, how)} for n, x in enumerate(questions)]

        def write(numbers, tell):
            row_keys = keys.of_rows(keys.key(seed, "sample"), numbers)
            generate(loaded.params, row_keys, [documents[n] for n in numbers], ("\n\n",), tell)

        def judge(n, written):
            said = written[0].text.strip().partition("\n")[0]
            return {"asked": questions[n], "instruction": said.removeprefix("Instruction:").strip(' "*')}

        found = records.collect(ask.path, wanted, [1] * len(questions), write, judge)
        return [record["instruction"] for record in found if record["instruction"]]

    return propose


def examples(task, number: int, *, count: int, seed: int) -> str:
    """Rows of the pool with their answers, drawn by (seed, number)."""
    rows = [task.pool[n] for n in demonstrations.at_random(seed)(number, np.arange(len(task.pool)))[:count]]
    asked = [template.question(task.template, row) for row in rows]
    said = [template.target(task.template, row) for row in rows]
    return task.template.separator.join(before + answer + after for (before, after), answer in zip(asked, said, strict=True))


def halved(first: list[str], score, more, *, dev: int, budget: int, rounds: int) -> tuple[str, dict]:
    """The best candidate, and {each: its last score}. Of those that are asked in a round, the better half goes on.

    Args:
        score: (candidate, n) -> its score on the first n rows; more: (the best of the first round) -> candidates that join then.
        dev: rows that there are; budget: of (candidate, row) in all, the same in every round.
    Raises ValueError where the budget gives a candidate no row.
    """
    alive, scores = list(dict.fromkeys(first)), {}
    for i in range(rounds):
        if not (count := min(dev, budget // rounds // len(alive))):
            raise ValueError(
                f"search.budget = {budget}: {rounds} rounds, the first of {len(alive)} candidates, leave no row for one"
            )
        found = {candidate: score(candidate, count) for candidate in alive}
        scores |= found
        alive = sorted(alive, key=found.get, reverse=True)  # of equals the first
        best = alive[0]
        alive = alive[: -(-len(alive) // 2)]
        if i == 0:
            alive += [candidate for candidate in dict.fromkeys(more(best)) if candidate not in scores]
    return best, scores


def run(config, workdir):
    mesh, search = shard.make_mesh(**config.mesh), config.search
    task = task_of(**config.task, seed=config.seed)
    settings = {"seed": config.seed, "batch": config.batch, "length": config.length, "written": config.written}
    load = partial(common.load, settings=config.model, mesh=mesh, seed=config.seed)
    log.write_json(workdir / "config.json", log.plain(config))
    ask = asker(load(config.model.source), mesh, workdir / "records.jsonl", **settings)
    how = {"length": search.length, "temperature": search.temperature}
    propose = proposer(ask, mesh, batch=config.batch, seed=config.seed, **how)

    def instructed(instruction):
        plain = instruction.replace("{", "{{").replace("}", "}}")
        return task._replace(template=replace(task.direct, instruction=plain))

    def asked(name, instruction, rows, ask=ask):
        told = instructed(instruction)
        prompts = ask.prompts(told, told.template, rows, demonstrations.in_order, k=0)
        return [record | {"instruction": instruction} for record in ask.ask(name, told, prompts, rows=rows)]

    tried = {}

    def score(instruction, count):
        value, error = accuracy(asked("dev", instruction, task.pool[:count]))
        tried[instruction] = {"rows": count, "accuracy": value, "error": error}
        log.say(f"{value:.3f} ± {error:.3f} of {count}: {instruction}")
        return value

    shown = [examples(task, n, count=search.shown, seed=config.seed) for n in range(search.induced)]
    first = task.template.instruction
    candidates = [first, *propose("induce", [INDUCE.format(shown=each) for each in shown])]
    best, _ = halved(
        candidates,
        score,
        lambda best: propose("rephrase", [REPHRASE.format(shown=best)] * search.rephrased),
        dev=min(search.dev, len(task.pool)),
        budget=search.budget,
        rounds=search.rounds,
    )

    found = {"first": asked("held out", first, task.rows), "best": asked("held out", best, task.rows)}
    if config.beside.soft_source:
        bare = instructed("")
        prompts = ask.prompts(bare, bare.direct, bare.pool, demonstrations.in_order, k=0)
        write_rows(workdir / "train.jsonl", bare, bare.direct, prompts)
        config.stages.sft.data.source = str(workdir / "train.jsonl")
        config.stages.sft.adapter.length = len(ask.loaded.tokenizer(best, add_special_tokens=False)["input_ids"])
        source = launch.Stages(workdir, config.stages, {"sft": sft.run}).path(config.beside.soft_source)
        soft = asker(load(source), mesh, workdir / "records.jsonl", **settings)
        found["soft"] = asked("held out", "", task.rows, soft)
    summary = {"instruction/first": first, "instruction/best": best}
    for name, each in found.items():
        value, error = accuracy(each)
        summary |= {f"held_out/{name}": value, f"held_out/{name}_error": error}
        if name != "first":
            paired = records.difference(found["first"], each, "right")
            summary |= {f"held_out/{name}_more": paired["difference"], f"held_out/{name}_more_error": paired["error"]}
    for name, value in summary.items():
        log.say(f"{name}: {value}")
    log.write_json(workdir / "summary.json", summary | {"candidates": tried})
    report.write(workdir)
    log.say(f"report in {workdir / 'report.html'}")


if __name__ == "__main__":
    launch.main(run, "prompt_search")
