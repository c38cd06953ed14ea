"""A student learns a frozen teacher's distributions over the next token: python -m experiments.distill --config=configs/distill.py

Each update is on given text or, with probability `run.on_policy`, on what the student itself says to the text's prompts (GKD,
Agarwal et al. 2024, algorithm 1). `objective.name` is a function of jaxalign/objectives/distill.py.
"""

import time
from functools import partial
from pathlib import Path

import jax

from experiments import common, evaluate, launch, named, sft
from jaxalign import keys, shard
from jaxalign.data import tables
from jaxalign.objectives import distill
from jaxalign.objectives.supervised import sft as likelihood
from jaxalign.train import log, loop


def on_policy(config, i: int) -> bool:
    """Whether update i is on the student's samples."""
    return bool(jax.random.uniform(keys.key(config.seed, "shuffle", i)) < config.run.on_policy)


def learn_from(config, student, teacher, mesh, train):
    """-> (data_at, taught): data_at(i), what update i is on: text, or prompts and a key for each; taught(params, teacher's params,
    that) -> Taught, of the samples of `params` where they are prompts."""
    vocab, lengths = student.model.config.vocab, {"length": config.data.length, "source_length": config.data.source_length}
    prompts = [tables.prompt_of(document) for document in train]
    longest = max(len(prompt.tokens if prompt.source is None else prompt.source) for prompt in prompts)
    draw = common.sampler(student.model, mesh, student.tokenizer.eos_token_id, config.sample)
    told = {"k": config.teacher_model.k or vocab, "temperature": config.objective.temperature}
    teach = shard.on_mesh(jax.jit(partial(distill.taught, model=teacher.model, **told)), mesh)

    def data_at(i):
        numbers = tables.order(len(train), config.run.batch, seed=config.seed, step=i)
        if on_policy(config, i):
            row_keys = keys.of_rows(keys.key(config.seed, "sample", i), numbers)
            return row_keys, common.rows_of(prompts, numbers, longest, mesh, vocab)
        return (shard.place(tables.check(tables.pad([train[n] for n in numbers], **lengths), vocab), mesh),)

    def taught(params, teacher_params, data):
        return teach(teacher_params, data[0] if len(data) == 1 else draw(params, *data)[0])

    return data_at, taught


def gaps(both, batch, *, student, teacher, k: int):
    """Of (student's, teacher's parameters), at temperature 1: sums over targets of the KL(teacher || student), of the reverse, of
    both -log p, in nats, and of how often both find the same token the likeliest."""
    data = distill.taught(both[1], batch, model=teacher, k=k)
    reverse, _ = distill.reverse_kl(both[0], data, model=student)
    forward, sums = distill.forward_kl(both[0], data, model=student)
    own, _ = likelihood(both[1], batch, model=teacher)
    about = {"forward_kl": forward, "reverse_kl": reverse, "nll": sums["loss/nll"], "teacher_nll": own}
    return forward, about | {"agreed": sums["teacher/agreed"], "weight": sums["weight"]}


def run(config, workdir: Path, stages: launch.Stages | None = None, objective=None):
    """Train the student. summary.json: means of `gaps` over the targets of held-out text, before and after.

    Args: objective: one's own, (params, data: Taught, *, model, ...) -> (sum, sums).
    """
    objective, _ = named.resolve(distill, config.objective, objective)
    mesh = shard.make_mesh(**config.mesh)
    stages = stages or launch.Stages(workdir, config.stages, {"sft": sft.run, "student": sft.run})
    source, teacher_source = stages.path(config.model.source), stages.path(config.teacher_model.source)
    began = time.monotonic()
    student = common.load(source, config.model, mesh, seed=config.seed, adapter=config.adapter)
    teacher = common.load(teacher_source, config.teacher_model, mesh, seed=config.seed)
    vocab = student.model.config.vocab
    if student.tokenizer_digest != teacher.tokenizer_digest or vocab != teacher.model.config.vocab:
        raise ValueError(f"the student ({source}) and its teacher ({teacher_source}) have different tokenizers or vocabularies")
    if config.teacher_model.k > vocab:
        raise ValueError(f"teacher_model.k = {config.teacher_model.k}: the vocabulary has {vocab} tokens; 0 is all")
    train, held_out = sft.documents(student.tokenizer, seed=config.seed, start=common.start_of(student.model), **config.data)
    step, state = sft.prepare(config, mesh, student, lambda params, data, *, model, **_: objective(params, data, model=model))
    data_at, taught = learn_from(config, student, teacher, mesh, train)
    measure = partial(gaps, student=student.model, teacher=teacher.model, k=config.teacher_model.k or vocab)
    lengths = {"length": config.data.length, "source_length": config.data.source_length}
    means = common.held_out_means(measure, mesh, held_out, config.run.batch, **lengths)

    def update(state, data):
        state, metrics = step(state, taught(state.model_params, teacher.params, data))
        return state, metrics | {"data/on_policy": float(len(data) > 1)}

    def watched(done, state):
        if not config.evaluate.every or done % config.evaluate.every:
            return {}
        return {f"{name}/held_out": x for name, x in means((state.model_params, teacher.params)).items()}

    log.say(tables.preview(student.tokenizer, tables.pad(train[:1], **lengths), rows=1))
    launch.begin(workdir, student)
    around = time.monotonic() - began
    state = loop.fit(
        update,
        state,
        data_at,
        workdir=workdir,
        stop=config.run.steps,
        hooks=[watched, evaluate.hook(student, mesh, workdir, **config.evaluate)],
        config=config,
        identity={
            "teacher": teacher.digest,
            "student": student.digest,
            "tokenizer": student.tokenizer_digest,
            "data": common.digest([(x.tokens, x.source) for x in train]),
        },
        **config.loop,
    )
    ended = time.monotonic()
    summary = {}
    for when, params in (("before", student.params), ("after", state.model_params)):
        summary |= {f"{name}/{when}": x for name, x in means((params, teacher.params)).items()}
    summary["nll/teacher"] = summary.pop("teacher_nll/before")
    del summary["teacher_nll/after"]
    summary["seconds"] = stages.seconds() + around + launch.looped(workdir) + time.monotonic() - ended
    launch.finish(workdir, student, state.model_params, summary)


if __name__ == "__main__":
    launch.main(run, "distill")
