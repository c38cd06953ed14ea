"""A classifier, or a chooser of answers, as GPT-1 was fine-tuned: python -m experiments.classify --config=configs/classify.py

Texts are laid out as jaxalign/data/transformations.py says; its three tokens are new rows of the model's embedding. What is left:
`model/`, with these rows and tokens, and classes.json, the head: logits = h_last kernel + bias, h_last the state at a text's last
token (of two texts, the sum). A chooser's head is the scalar head of `model/`, which then is a reward model.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common, evaluate, launch, sft
from jaxalign import keys, models, shard
from jaxalign.data import tables, text, transformations
from jaxalign.models import adapters
from jaxalign.models.parts import Adapter
from jaxalign.objectives.supervised import Classified, choice_logits, choose, class_head, class_logits, classify
from jaxalign.ops import calibration
from jaxalign.train import log, loop

TASKS = {
    f.__name__: f
    for f in (transformations.classification, transformations.entailment, transformations.similarity, transformations.choice)
}
HEAD = "classes.json"


def examples(tokenizer, *, source, count, held_out, task, first, second, label, classes, length, seed):
    """-> (training rows, held-out rows), each (texts, the number of its class or of its answer).

    Args:
        task: a function of data.transformations; first, second: what it is given. Of a choice, `second` is filled with each entry
            of its one column, a list.
        classes: names; a row's label is one of them or its number, from 0. (): of a choice, whose label is the number of an answer.
    """
    if (task == "classification") != (second == "") or (task == "choice") != (len(classes) == 0):
        raise ValueError(
            f"data.task = {task}, data.second = {second!r}, data.classes = {classes}: all but classification have a second text, "
            f"and all but choice have classes"
        )

    def example(row):
        given = [text.fill(first, row)]
        if task == "choice":
            given.append(common.fill_each(second, row))
        elif second:
            given.append(text.fill(second, row))
        texts = TASKS[task](tokenizer, *given, length=length)
        (column,) = text.fields(label)
        said, most = row.get(column), len(classes) or len(texts)
        number = classes.index(said) if said in classes else said
        if not isinstance(number, int) or not 0 <= number < most:
            known = f"one of {', '.join(classes)}, or " if classes else ""
            raise ValueError(f"'{column}' is {text.brief(said)}: it is {known}a number from 0 to {most - 1}")
        return texts, int(number)

    found = []
    for n, row in enumerate(common.read_rows(source, count, seed=seed)):
        try:
            found.append(example(row))
        except ValueError as error:
            raise ValueError(f"{source}, row {n}: {error}") from error
    full = sum(len(one.tokens) == length for texts, _ in found for one in texts)
    log.say(f"{source}: {len(found)} rows; {full} of their texts fill all {length} tokens, to which longer ones were cut")
    return common.split(found, held_out, "data.held_out")


def load(config, source: str, mesh):
    """The model, with the new tokens, and a head for the task: drawn, or that of a run before, where it was of the same classes."""
    classes, seed = list(config.data.classes), config.seed
    # an adapter's leaves are told apart before there are classes, which are all that `head` trains
    probe = classes and config.adapter.kind == "head"
    adapter, head = None if probe else config.adapter, None if classes else "reward"
    loaded = common.load(source, config.model, mesh, seed=seed, head=head, adapter=adapter, tokens=transformations.TOKENS)
    if common.start_of(loaded.model) is not None or loaded.model.config.virtual:
        raise ValueError(
            f"{source} is an encoder-decoder, or has virtual tokens, which no `model/` could hold (adapter.kind = "
            f"{config.adapter.kind}): classify trains a decoder, and leaves it with its new tokens"
        )
    if not classes:
        return loaded
    model = models.build(replace(loaded.model.config, adapter=Adapter(**config.adapter))) if probe else loaded.model
    drawn = partial(class_head, width=model.config.width, classes=len(classes))
    head, where = shard.create(drawn, mesh, jax.random.fold_in(keys.key(seed, "init"), 4))
    if found := log.read_json(Path(source) / HEAD):
        if found["classes"] != classes:
            raise ValueError(f"{source} was trained on the classes {', '.join(found['classes'])}, not on {', '.join(classes)}")
        head = shard.put({name: np.float32(found[name]) for name in head}, where)
    grown = model._replace(init=lambda key: model.init(key) | {"classes": drawn(key)})
    return loaded._replace(model=grown, params=loaded.params | {"classes": head})


def data_of(rows, length: int, vocab: int, most: int) -> Classified:
    """Args: most: texts a row; those that a row lacks have no token."""
    texts = tuple(tables.pack_rows([list(found[k : k + 1]) for found, _ in rows], length) for k in range(most))
    return Classified(tuple(tables.check(one, vocab, targets=False) for one in texts), np.array([y for _, y in rows], np.int32))


def log_probabilities(params, texts, *, model):
    """log softmax of what `classify` learns, or, of a model that has no classes, of what `choose` does. -> f32 [B,C] nats"""
    logits, _ = (class_logits if "classes" in params else choice_logits)(params, texts, model=model)
    return jax.nn.log_softmax(logits)


def run(config, workdir: Path, stages: launch.Stages | None = None):
    """Train a classifier, or a chooser. What summary.json says is in `summary_of`."""
    stages, mesh = stages or launch.Stages(workdir, config.stages, {"sft": sft.run}), shard.make_mesh(**config.mesh)
    source = stages.path(config.model.source)
    began = time.monotonic()
    loaded = load(config, source, mesh)
    rows, held_out = examples(loaded.tokenizer, seed=config.seed, **config.data)
    step, state = sft.prepare(config, mesh, loaded, classify if config.data.classes else choose)
    most = max(len(texts) for texts, _ in rows + held_out)
    data = partial(data_of, length=config.data.length, vocab=loaded.model.config.vocab, most=most)
    said = shard.on_mesh(jax.jit(partial(log_probabilities, model=loaded.model)), mesh)

    def data_at(i):
        numbers = tables.order(len(rows), config.run.batch, seed=config.seed, step=i)
        return shard.place(data([rows[n] for n in numbers]), mesh)

    def measured(params):
        found = [
            shard.fetch(said(params, shard.place(data(part), mesh).texts))[:count]
            for part, count in common.parts(held_out, config.run.batch)
        ]
        return summary_of(np.concatenate(found), np.array([label for _, label in held_out]), config.data.classes)

    def watched(done, state):
        every = config.evaluate.every
        return {"accuracy/held_out": measured(state.model_params)["accuracy"]} if every and done % every == 0 else {}

    launch.begin(workdir, loaded)
    texts = common.digest([([one.tokens for one in texts], np.int32(label)) for texts, label in rows])
    around = time.monotonic() - began
    state = loop.fit(
        step,
        state,
        data_at,
        workdir=workdir,
        stop=config.run.steps,
        hooks=[watched, evaluate.hook(loaded, mesh, workdir, **config.evaluate)],
        config=config,
        identity={"model": loaded.digest, "tokenizer": loaded.tokenizer_digest, "data": texts},
        tokens_per_step=most * config.run.batch * config.data.length,
        **config.loop,
    )
    ended = time.monotonic()
    summary = measured(state.model_params) | {"rows/trained": len(rows), "rows/held_out": len(held_out)}
    params = dict(state.model_params)
    if head := shard.fetch(params.pop("classes", {})):
        log.write_json(workdir / HEAD, {"classes": list(config.data.classes)} | {name: x.tolist() for name, x in head.items()})
    plain, params = adapters.merge(loaded.model.config, params)  # an adapter alone would have no new tokens
    summary["seconds"] = stages.seconds() + around + launch.looped(workdir) + time.monotonic() - ended
    launch.finish(workdir, loaded._replace(model=loaded.model._replace(config=plain)), params, summary)


def summary_of(logp, labels, classes) -> dict:
    """Of held-out rows: accuracy, with its standard error; nll, nats a row; ece, of the probability of what is answered, in 10
    bins; chance, the accuracy of always saying the commonest label here; accuracy/NAME, of the rows of each class.

    Args: logp f32 [N,C] nats, labels [N].
    """
    right = (logp.argmax(1) == labels).astype(np.float32)
    summary = {
        "accuracy": right.mean(),
        "accuracy_stderr": right.std() / len(right) ** 0.5,
        "nll": -logp[np.arange(len(labels)), labels].mean(),
        "ece": calibration.ece(jnp.exp(logp.max(1)), jnp.asarray(right)),
        "chance": np.bincount(labels).max() / len(labels),
    }
    return summary | {f"accuracy/{name}": right[labels == k].mean() for k, name in enumerate(classes) if (labels == k).any()}


if __name__ == "__main__":
    launch.main(run, "classify")
