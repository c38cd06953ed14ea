"""A policy from comparisons, by DPO and its kin: python -m experiments.preference --config=configs/preference.py

No reward model and no samples while training. `objective.name` is a function of jaxalign/objectives/preference.py, and the rest of
that section its arguments. The reference is the model that the run starts from; what it says of every response is computed once.
"""

import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common, compare, evaluate, launch, named, reward, sft
from jaxalign import keys, rollout, shard
from jaxalign.data import tables
from jaxalign.objectives import preference
from jaxalign.train import loop, optim
from jaxalign.train.step import make_step


def new_prompts(train, held_out, count: int) -> list:
    """`count` different prompts of the held-out comparisons that no training comparison has. ValueError where they are fewer."""
    seen = {tables.prompt_of(chosen).ids for chosen, *_ in train}
    found = {prompt.ids: prompt for prompt in (tables.prompt_of(chosen) for chosen, *_ in held_out)}
    new = [prompt for ids, prompt in found.items() if ids not in seen]
    if len(new) < count:
        raise ValueError(
            f"evaluate.prompts = {count}: of {len(held_out)} held-out comparisons {len(new)} have a prompt that is not trained on; "
            f"lower it, or raise data.held_out"
        )
    return new[:count]


def answers(config, loaded, mesh, prompts, gold):
    """-> (params) -> ({"kl": nats [n], "length": tokens [n], "gold": f32 [n]}, samples), always by the same draws.

    "kl" is log pi/ref of the answer, both tempered as the sampler is; its mean estimates the KL from the reference.
    """
    draw = common.sampler(loaded.model, mesh, loaded.tokenizer.eos_token_id, config.sample)
    said = shard.on_mesh(jax.jit(partial(rollout.said, loaded.model, temperature=config.sample.temperature)), mesh)
    reference = loaded.reference
    longest = max((len(prompt.tokens if prompt.source is None else prompt.source) for prompt in prompts), default=0)

    def measure(params):
        found, samples = [], []
        for numbers, count in common.parts(list(range(len(prompts))), config.run.batch):
            row_keys = keys.of_rows(keys.key(config.seed, "evaluate", 0), numbers)
            batch, _ = draw(params, row_keys, common.rows_of(prompts, numbers, longest, mesh, loaded.model.config.vocab))
            gap = said(params, batch)[0] - said(reference, batch)[0]
            of_rows = {"kl": shard.fetch((gap * batch.targets).sum(axis=1)), "length": shard.fetch(batch.targets.sum(axis=1))}
            texts = common.texts(loaded.tokenizer, batch)
            if gold:
                of_rows["gold"] = gold([response for _, response in texts])
            found.append({name: x[:count] for name, x in of_rows.items()})
            for r, (prompt, response) in enumerate(texts[:count]):
                samples.append({"prompt": prompt, "response": response} | {name: float(x[r]) for name, x in of_rows.items()})
        names = found[0] if found else ()  # no prompts: nothing
        return {name: np.concatenate([part[name] for part in found]) for name in names}, samples[: config.evaluate.samples]

    return measure


def against_reference(logp, loaded, held_out):
    """-> (params) -> of held-out comparisons, f32 [n] each: logp_chosen, logp_rejected, margin (nats) and accuracy.

    margin: by how much more log pi/ref is for the chosen response; accuracy: 1 where it is above 0, 1/2 where it is 0.
    """

    def both(params):
        return [logp(params, [pair[side] for pair in held_out]) for side in (0, 1)]

    reference = both(loaded.reference)

    def measure(params):
        chosen, rejected = both(params)
        margin = (chosen - reference[0]) - (rejected - reference[1])
        return {"logp_chosen": chosen, "logp_rejected": rejected, "margin": margin, "accuracy": 0.5 * (1 + np.sign(margin))}

    return measure


def learn_from(kind, config, loaded, mesh, train, logp, layout=None):
    """-> (data_at, ready): what a step trains on, of the kind that the objective takes.

    ready(params, data) -> data: puts in what depends on the policy as it is before the update, which is KTO's z0.
    Args: logp: (params, documents) -> nats [n]; layout: of the rows of pairs, where it is another than the config's.
    """
    lengths = {"length": config.data.length, "source_length": config.data.source_length}
    vocab, reference = loaded.model.config.vocab, loaded.reference
    ref = np.stack([logp(reference, [pair[side] for pair in train]) for side in (0, 1)])  # nats [2,n]

    def pairs_at(i):
        numbers = tables.order(len(train), config.run.batch, seed=config.seed, step=i)
        pairs = reward.data_of(kind, [train[n] for n in numbers], vocab, **(layout or lengths))
        return shard.place(pairs.replace(ref_chosen=ref[0, numbers], ref_rejected=ref[1, numbers]), mesh)

    def labelled_at(i):
        """Chosen and rejected responses, each by itself."""
        pair, side = np.divmod(tables.order(2 * len(train), config.run.batch, seed=config.seed, step=i), 2)
        batch = tables.pad([train[n][s] for n, s in zip(pair, side, strict=True)], **lengths)
        z0 = np.zeros(len(pair), np.float32)
        return shard.place(preference.Labelled(tables.check(batch, vocab), side == 0, ref[side, pair], z0), mesh)

    def with_baseline(params, reference, data):
        mismatched = preference.mismatch(data.responses, length=config.data.length)
        z0 = preference.kto_baseline(params, reference, mismatched, model=loaded.model)
        return data.replace(z0=shard.constrain_rows(jnp.full_like(data.z0, z0)))

    if kind is preference.Labelled:
        ready = shard.on_mesh(jax.jit(with_baseline), mesh)
        return labelled_at, lambda params, data: ready(params, reference, data)
    return pairs_at, lambda params, data: data


def run(config, workdir: Path, stages: launch.Stages | None = None, objective=None):
    """Train on comparisons. What summary.json says is in `summary_of`.

    Args: objective: one's own, (params, data: Pairs or Labelled, *, model, ...) -> (sum, sums).
    """
    learnt, kind = named.resolve(preference, config.objective, objective)
    if config.sample.temperature <= 0:
        raise ValueError(f"sample.temperature = {config.sample.temperature}: KL is that of drawn answers, so it is above 0")
    mesh = shard.make_mesh(**config.mesh)
    gold = common.gold_reward(config.gold.lexicon) if config.gold.lexicon else None
    stages = stages or launch.Stages(workdir, config.stages, {"sft": sft.run, "compare": compare.run})
    source, found = stages.path(config.model.source), stages.path(config.data.source)
    began = time.monotonic()
    loaded = common.load(source, config.model, mesh, seed=config.seed, adapter=config.adapter)
    data = config.data.to_dict() | {"source": compare.rows_in(found)}
    train, held_out = reward.comparisons(loaded.tokenizer, loaded.model.config.vocab, start=common.start_of(loaded.model), **data)
    prompts = new_prompts(train, held_out, config.evaluate.prompts)

    def said(params, batch):
        return preference.summed_logp(params, batch, model=loaded.model)[0]

    lengths = {"length": config.data.length, "source_length": config.data.source_length}
    logp = reward.by_document(said, loaded.model, mesh, size=config.run.batch, **lengths)
    layout, model = reward.together(kind, train, lengths, loaded.model, mesh, objective)
    data_at, ready = learn_from(kind, config, loaded, mesh, train, logp, layout)
    tx = optim.adam(steps=config.run.steps, **config.optim)
    state, where = common.new_state(loaded, tx, mesh)
    update = make_step(partial(learnt, model=model), tx, accumulate=config.run.accumulate, **config.guard)
    update = shard.compile_step(update, mesh, where)
    compared, answered = against_reference(logp, loaded, held_out), answers(config, loaded, mesh, prompts, gold)

    looks = {name: config.evaluate[name] for name in ("tasks", "every", "count")}
    asked = evaluate.hook(loaded, mesh, workdir, **looks)

    def watched(done, state):
        """Every `evaluate.every` updates and at the end; 0: never."""
        every = config.evaluate.every
        if not every or (done % every and done < config.run.steps):
            return {}
        found, samples = answered(state.model_params)
        means = {f"{name}/held_out": float(np.nanmean(x)) for name, x in (compared(state.model_params) | found).items()}
        return means | {"samples": samples}

    launch.begin(workdir, loaded)
    around = time.monotonic() - began
    state = loop.fit(
        lambda state, data: update(state, ready(state.model_params, data)),
        state,
        data_at,
        workdir=workdir,
        stop=config.run.steps,
        hooks=[watched, asked],
        config=config,
        identity={
            "reference": loaded.digest,
            "tokenizer": loaded.tokenizer_digest,
            "data": common.digest([(document.tokens, document.source) for row in train for document in row[:-1]]),
        },
        tokens_per_step=(1 if kind is preference.Labelled else 2) * config.run.batch * layout["length"],
        **config.loop,
    )
    ended = time.monotonic()
    summary = summary_of([(compared(params), answered(params)[0]) for params in (loaded.params, state.model_params)])
    if all("ceiling" in row for _, _, row in held_out):
        summary["preference/accuracy_ceiling"] = np.mean([row["ceiling"] for _, _, row in held_out])
    summary |= {"comparisons/trained": len(train), "comparisons/held_out": len(held_out)}
    summary["seconds"] = stages.seconds() + around + launch.looped(workdir) + time.monotonic() - ended
    launch.finish(workdir, loaded, state.model_params, summary)


def summary_of(found) -> dict:
    """What became of the policy, of (comparisons, answers) measured before and after.

    Of answers to prompts that were not trained on: gold/before, gold/after, length/before and length/after (tokens), with standard
    errors, and kl/final (nats a response). Of held-out comparisons: logp_chosen/before, ... logp_rejected/after (nats a response,
    for both may fall while their difference grows); preference/margin and preference/accuracy, as `against_reference` has them.
    """
    (pairs_before, before), (pairs, after) = found
    summary = {}
    for name in [name for name in ("gold", "length") if name in after]:
        for when, x in (("before", before[name]), ("after", after[name])):
            summary |= {f"{name}/{when}": np.nanmean(x), f"{name}/{when}_stderr": np.nanstd(x) / len(x) ** 0.5}
    if "kl" in after:  # not where evaluate.prompts is 0
        summary["kl/final"] = after["kl"].mean()
    for name in ("logp_chosen", "logp_rejected"):
        summary |= {f"{name}/before": pairs_before[name].mean(), f"{name}/after": pairs[name].mean()}
    right = pairs["accuracy"]
    summary |= {"preference/margin": pairs["margin"].mean(), "preference/accuracy": right.mean()}
    return summary | {"preference/accuracy_stderr": right.std() / len(right) ** 0.5}


if __name__ == "__main__":
    launch.main(run, "preference")
