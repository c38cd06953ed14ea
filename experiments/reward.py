"""A reward model from comparisons: python -m experiments.reward --config=configs/reward.py"""

import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from experiments import agreement, common, compare, ensemble, launch, named, sft
from jaxalign import rewards, score, shard
from jaxalign.data import tables, text
from jaxalign.data.sources import is_number
from jaxalign.objectives import reward as objectives
from jaxalign.objectives.reward import Judged, Ranked, Rated, Stepwise
from jaxalign.ops.preference import MARGINS_LARGE, MARGINS_SMALL
from jaxalign.train import log, loop, optim
from jaxalign.train.step import make_step
from jaxalign.types import Batch, Pairs

MARGINS = {"small": MARGINS_SMALL, "large": MARGINS_LARGE}


def read(make, told, *, source, count, held_out, length, source_length):
    """-> (training rows, held-out rows), each (*documents, row): the documents of make(row), and the row | told(row)."""

    def both(row):
        documents = make(row)
        told(row)  # here, where an error gets the row's number
        return documents

    rows = common.read_rows(source, count, seed=0)
    table = common.collect(rows, both, length=length, source=source, keep="end", source_length=source_length)
    found = [(*documents, rows[n] | told(rows[n])) for documents, n in zip(table.documents, table.rows, strict=True)]
    return common.split(found, held_out, "data.held_out")


def two(tokenizer, vocab, row, *, prompt, chosen, rejected, chat, start):
    """Both responses of a comparison. Of a row that experiments.compare made, by the ids that the model wrote."""
    if "chosen_ids" not in row:
        asked = text.fill(prompt, row)
        return tuple(common.document(tokenizer, asked, text.fill(x, row), chat=chat, start=start) for x in (chosen, rejected))
    wrote, known = [row.get(side) for side in ("chosen_ids", "rejected_ids")], {"vocab": vocab, "start": start}
    pair = tuple(text.of_ids(row.get("prompt_ids"), ids, **known) for ids in wrote)
    if tokenizer.decode(row["chosen_ids"], skip_special_tokens=True) != row.get("chosen"):
        raise ValueError("chosen_ids are not the tokens of 'chosen': another tokenizer wrote these comparisons")
    return pair


def comparisons(
    tokenizer,
    vocab,
    *,
    source,
    count,
    held_out,
    prompt,
    chosen,
    rejected,
    margin,
    chat,
    length,
    source_length,
    margins="",
    start=None,
):
    """Pairs: -> (training pairs, held-out pairs), each (chosen, rejected, row), two Documents and what the source says of them.

    Args:
        margins: "" where `margin` is a column of numbers; "small" or "large" where it is one of Llama 2's words, and so which table
            says what they are (ops.preference).
        start: of common.start_of.
    """

    def told(row):
        if not margin or not margins:
            return {"margin": text.number(margin, row) if margin else 0.0}
        word = text.fill(margin, row)
        if word not in MARGINS[margins]:
            raise ValueError(f"'{margin}' of the template is {text.brief(word)}; the margins are of {', '.join(MARGINS[margins])}")
        return {"margin": MARGINS[margins][word]}

    made = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "chat": chat, "start": start}
    fitted = {"source": source, "count": count, "held_out": held_out, "length": length, "source_length": source_length}
    return read(lambda row: two(tokenizer, vocab, row, **made), told, **fitted)


def votes(
    tokenizer,
    vocab,
    *,
    source,
    count,
    held_out,
    prompt,
    chosen,
    rejected,
    won,
    tied,
    chat,
    length,
    source_length,
    start=None,
):
    """Judged: as `comparisons`; the row has won, tied, and the rank of both by them.

    Args: won, tied: columns of the share of votes for `chosen`, and for neither; "" for 1 and 0.
    """

    def told(row):
        won_by, tied_by = text.number(won, row) if won else 1.0, text.number(tied, row) if tied else 0.0
        behind = np.sign(won_by + 0.5 * tied_by - 0.5)
        return {"won": won_by, "tied": tied_by, "rank": [0, int(behind)]}

    made = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "chat": chat, "start": start}
    fitted = {"source": source, "count": count, "held_out": held_out, "length": length, "source_length": source_length}
    return read(lambda row: two(tokenizer, vocab, row, **made), told, **fitted)


def rankings(tokenizer, vocab, *, source, count, held_out, prompt, responses, rank, chat, length, source_length, start=None):
    """Ranked: -> (training rows, held-out rows), each (response 1, ..., response K, row); the row has the rank of each.

    Args:
        responses: " {column}" of a list of texts; each is filled in by itself.
        rank: "{column}" of the number of the best response, from 0, or of a list of K numbers, of which the least is the best.
    """
    (column,), (order,) = text.fields(responses), text.fields(rank)

    def make(row):
        asked, answers = text.fill(prompt, row), common.fill_each(responses, row)
        return tuple(common.document(tokenizer, asked, answer, chat=chat, start=start) for answer in answers)

    def told(row):
        many, said = len(row.get(column) or ()), row.get(order)
        if type(said) is int and 0 <= said < many:
            return {"rank": [int(k != said) for k in range(many)]}
        if isinstance(said, list) and len(said) == many and all(type(x) is int for x in said):
            return {"rank": said}
        raise ValueError(f"'{order}' is {text.brief(said)}: it is the number of one of {many} responses, from 0, or a rank of each")

    fitted = {"source": source, "count": count, "held_out": held_out, "length": length, "source_length": source_length}
    return read(make, told, **fitted)


def ratings(tokenizer, vocab, *, source, count, held_out, prompt, response, rating, chat, length, source_length, start=None):
    """Rated: -> (training rows, held-out rows), each (response, row).

    Args: rating: "{column}" of a number, in units of the reward.
    """

    def make(row):
        return (common.document(tokenizer, text.fill(prompt, row), text.fill(response, row), chat=chat, start=start),)

    fitted = {"source": source, "count": count, "held_out": held_out, "length": length, "source_length": source_length}
    return read(make, lambda row: {"rating": text.number(rating, row)}, **fitted)


def solutions(tokenizer, vocab, *, source, count, held_out, prompt, steps, labels, length, source_length, start=None):
    """Stepwise: -> (training rows, held-out rows), each (solution, row); the row has its filled prompt, and labels.

    Args:
        steps: " {column}" of a list of texts; each is filled in by itself.
        labels: "{column}" of a list: for each step 1, 0, a share of votes, or null where nobody said.
    """
    (column,), (judged,) = text.fields(steps), text.fields(labels)
    if start is not None:
        raise ValueError("steps are judged as a decoder reads them: this model is an encoder-decoder")

    def make(row):
        return (text.in_steps(tokenizer, text.fill(prompt, row), common.fill_each(steps, row)),)

    def told(row):
        said, many = row.get(judged), len(row[column])
        shares = [x for x in said if x is not None] if isinstance(said, list) and len(said) == many else []
        if not shares or not all(is_number(x) and 0 <= x <= 1 for x in shares):
            raise ValueError(
                f"'{judged}' is {text.brief(said)}: a number from 0 to 1 for each of {many} steps, or null, but not all"
            )
        return {"prompt": text.fill(prompt, row), "labels": said}

    fitted = {"source": source, "count": count, "held_out": held_out, "length": length, "source_length": source_length}
    return read(make, told, **fitted)


# what an objective learns from: who reads it
READ = {Pairs: comparisons, Judged: votes, Ranked: rankings, Rated: ratings, Stepwise: solutions}


def data_of(kind, rows, vocab: int, *, most: int = 2, **lengths):
    """Rows that READ[kind] gave, as checked data of that kind, on the host. Args: most: responses a prompt, for Ranked."""

    def told(name):
        return [row[-1][name] for row in rows]

    if kind is Ranked:
        data = tables.ranked([row[:-1] for row in rows], told("rank"), most, **lengths)
    elif kind is Stepwise:
        data = tables.stepwise([row[0] for row in rows], told("labels"), **lengths)
    elif kind is Rated:
        data = tables.rated([row[0] for row in rows], told("rating"), **lengths)
    else:
        both = [[row[side] for row in rows] for side in (0, 1)]
        if kind is Pairs:
            data = tables.pairs(*both, told("margin"), **lengths)
        else:
            data = tables.judged(*both, told("won"), told("tied"), **lengths)
    for part in jax.tree.leaves(data, is_leaf=lambda x: isinstance(x, Batch)):
        if isinstance(part, Batch):
            tables.check(part, vocab, targets=kind is not Ranked)  # of which a column may have no response at all
    return data


def together(kind, rows, lengths: dict, model, mesh, own=None):
    """-> (the layout of rows, for `data_of`; the model that reads the prompt of both responses once, where that saves enough)

    Args: own: an objective that is none of the library's; it may read the responses one by one, so nothing is shared.
    """
    alone = own or kind not in (Pairs, Judged) or shard.crowded(mesh)
    prompt, length = (0, 0) if alone else tables.in_common(rows, lengths["length"])
    return ({**lengths, "length": length, "prompt": prompt}, model.sharing(2, prompt)) if prompt else (lengths, model)


def by_document(measure, model, mesh, *, size: int, length: int, source_length: int):
    """measure(params, batch) -> [B], compiled, as (params, documents) -> f32 [n], `size` of them at a time."""
    measure = shard.on_mesh(jax.jit(measure), mesh)

    def found(params, documents):
        parts = []
        for part, count in common.parts(list(documents), size):
            batch = tables.check(tables.pad(part, length, source_length=source_length), model.config.vocab, targets=False)
            parts.append(shard.fetch(measure(params, shard.place(batch, mesh)))[:count])
        return np.concatenate(parts)

    return found


def run(config, workdir: Path, stages: launch.Stages | None = None, objective=None):
    """Train a reward model, or `run.members` of them, an ensemble: the same but for the seed, in the workdir and in members/1, ...

    Before and after, the head takes in the map that gives held-out responses mean 0 and the std wanted.
    summary.json: what experiments/agreement.py says, under reward_model/; of an ensemble also ensemble/mean_accuracy and
    ensemble/worst_accuracy, of rewards.mean_score and worst_score, and ensemble/disagreement, the std of the members' scores of one
    response, on average.
    Args: objective: one's own, (params, data, *, model, ...) -> (sum, sums), whose data is of a type in READ.
    """
    stages = stages or launch.Stages(workdir, config.stages, {"sft": sft.run, "compare": compare.run})
    others = []
    for member in range(1, config.run.members):
        alone = config.copy_and_resolve_references()
        alone.seed, alone.run.members = config.seed + member, 1
        others.append(train(alone, workdir / ensemble.MEMBERS / str(member), stages, [], objective))
    train(config, workdir, stages, others, objective)


def train(config, workdir: Path, stages: launch.Stages, others: list, objective):
    """One reward model. -> (its scores of the held-out responses, f32 [n], seconds). Args: others: the same of other members."""
    learnt, kind = named.resolve(objectives, config.objective, objective)
    mesh = shard.make_mesh(**config.mesh)
    source, found = stages.path(config.model.source), stages.path(config.data.source)
    began = time.monotonic()
    loaded = common.load(source, config.model, mesh, seed=config.seed, head="reward", adapter=config.adapter)
    data, vocab = config.data.to_dict() | {"source": compare.rows_in(found)}, loaded.model.config.vocab
    rows, held_out = READ[kind](loaded.tokenizer, vocab, start=common.start_of(loaded.model), **data)
    responses, told = [document for row in held_out for document in row[:-1]], [row[-1] for row in held_out]
    better, worse = agreement.ordered(
        [row["rank"] if kind in (Judged, Ranked) else range(2 if kind is Pairs else 0) for row in told]
    )
    lengths = {"length": config.data.length, "source_length": config.data.source_length}
    scores = by_document(partial(score.last_scalar, loaded.model), loaded.model, mesh, size=config.run.batch, **lengths)

    def watched(done, state):
        every = config.evaluate.every
        if not every or done % every or not len(better):
            return {}
        found = scores(state.model_params, responses)
        return {"accuracy/held_out": float(agreement.right(found[better] - found[worse]).mean())}

    def normalised(params, std):
        """-> (the model whose scores of the held-out responses have mean 0 and this std, or None: as they are; those scores)"""
        found = scores(params, responses)
        if std is None:
            return params, found
        gain, bias = rewards.normaliser(found, std=std)
        return rewards.fold(params, gain, bias), np.asarray(gain * found + bias)

    loaded = loaded._replace(params=normalised(loaded.params, config.normalise.before)[0])
    tx = optim.adam(steps=config.run.steps, **config.optim)
    state, where = common.new_state(loaded, tx, mesh)
    layout, model = together(kind, rows, lengths, loaded.model, mesh, objective)
    step = make_step(partial(learnt, model=model), tx, accumulate=config.run.accumulate, **config.guard)
    step = shard.compile_step(step, mesh, where)
    most = max(len(row) - 1 for row in rows)  # responses a prompt

    def data_at(i):
        numbers = tables.order(len(rows), config.run.batch, seed=config.seed, step=i)
        return shard.place(data_of(kind, [rows[n] for n in numbers], vocab, most=most, **layout), mesh)

    launch.begin(workdir, loaded)
    around = time.monotonic() - began
    texts = common.digest([(document.tokens, document.source) for row in rows for document in row[:-1]])
    state = loop.fit(
        step,
        state,
        data_at,
        workdir=workdir,
        stop=config.run.steps,
        hooks=[watched],
        config=config,
        identity={"model": loaded.digest, "tokenizer": loaded.tokenizer_digest, "data": texts},
        tokens_per_step=most * config.run.batch * layout["length"],
        **config.loop,
    )
    ended = time.monotonic()
    params, found = normalised(state.model_params, config.normalise.after)
    agreed, figures = agreement.of_scores(found, better, worse, np.array([(document.weights > 0).sum() for document in responses]))
    summary = agreed | {"comparisons/trained": len(rows), "comparisons/held_out": len(held_out)}
    if len(responses) == 2 * len(held_out):
        summary |= agreement.with_gold(told, found)
    if kind is Rated:
        summary["reward_model/rating_correlation"] = np.corrcoef([row["rating"] for row in told], found)[0, 1]
    if kind is Stepwise:
        logits = by_document(partial(score.scalars, loaded.model), loaded.model, mesh, size=config.run.batch, **lengths)
        summary |= agreement.of_steps(
            logits(params, responses), data_of(kind, held_out, vocab, **lengths), [row["prompt"] for row in told]
        )
    if others:
        every = np.stack([found, *(one for one, _ in others)])
        summary["ensemble/disagreement"] = every.std(0).mean()
        for name, of_all in (("mean", rewards.mean_score(every)), ("worst", rewards.worst_score(every))):
            if len(better):
                summary[f"ensemble/{name}_accuracy"] = agreement.right(of_all[better] - of_all[worse]).mean()
    seconds = around + launch.looped(workdir) + time.monotonic() - ended
    summary["seconds"] = seconds + sum(others_took for _, others_took in others)
    log.write_json(workdir / "figures.json", figures)
    launch.finish(workdir, loaded, params, summary)
    return found, seconds


if __name__ == "__main__":
    launch.main(run, "reward")
