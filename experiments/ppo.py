"""RLHF with PPO: python -m experiments.ppo --config=configs/ppo.py

From prompts to an aligned model, top to bottom. Read on in jaxalign/rollout.py (rewards and advantages),
jaxalign/objectives/online.py (the loss) and jaxalign/train/step.py (the update).
"""

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common, compare, launch, reward, sft
from jaxalign import keys, rewards, rollout, score, shard
from jaxalign.data import tables
from jaxalign.objectives.online import ppo
from jaxalign.ops import advantages
from jaxalign.train import loop, optim
from jaxalign.train.step import make_step


class Job(NamedTuple):
    """What does not change within a run. Every function is pure, compiled, and takes parameters as arguments."""

    config: Any
    mesh: Any
    vocab: int
    reference: Any  # parameters
    judge: Any  # parameters of the reward model
    prompts: list
    held_out: list  # prompts that are not among those
    draw: Any  # (params, keys, prompts) -> Batch
    judged: Any  # (judge, batch) -> f32 [B]
    ended: Any  # (batch) -> f32 [B], 1 where the response has its EOS
    said: Any  # (params, batch) -> (logp, entropy, value)
    assemble: Any  # (batch, logp, ref_logp, value, scores, beta) -> Rollout
    describe: Any  # (rollout, entropy) -> metrics
    take: Any  # (rollout, numbers of rows) -> Rollout
    update: Any  # (state, rollout) -> (state, metrics)


def respond(job: Job, params, documents, numbers, role: str, step: int):
    """Responses to these prompts, and their scores by the reward model. -> (Batch, f32 [B])"""
    row_keys = keys.of_rows(keys.key(job.config.seed, role, step), numbers)
    batch = job.draw(params, row_keys, common.rows_of(documents, numbers, job.config.prompts.length, job.mesh, job.vocab))
    scores = job.judged(job.judge, batch)
    return batch, advantages.without_eos(scores, job.ended(batch) > 0, **job.config.unended)


def iteration(job: Job, state, i: int):
    """Sample, score, E epochs of M updates each in a fresh order, and a new price of KL. -> (state, metrics)"""
    run, clock = job.config.run, [time.perf_counter()]
    numbers = tables.order(len(job.prompts), run.batch, seed=job.config.seed, step=i)
    batch, scores = jax.block_until_ready(respond(job, state.params, job.prompts, numbers, "sample", i))
    clock.append(time.perf_counter())

    logp, entropy, value = job.said(state.params, batch)
    ref_logp, _, _ = job.said(job.reference, batch)
    beta = jnp.copy(state.loop["beta"])  # for the updates below take the state away
    data = job.assemble(batch, logp, ref_logp, value, scores, beta)
    metrics = jax.block_until_ready(job.describe(data, entropy)) | {"policy/beta": beta}
    clock.append(time.perf_counter())

    updates = []
    for epoch in range(run.epochs):
        order = jax.random.permutation(keys.key(job.config.seed, "shuffle", i, epoch), run.batch)
        for rows in jnp.split(order, run.minibatches):
            state, of_update = job.update(state, job.take(data, rows))
            updates.append(of_update)
    metrics = jax.tree.map(lambda *x: jnp.stack(x).mean(), *updates) | metrics  # policy/entropy is that of the rollout
    metrics["policy/approx_kl_first"] = updates[0]["policy/approx_kl"]  # 0 but for rounding, or sampling and training disagree
    beta = rewards.update_beta(
        beta,
        metrics["policy/kl"],
        run.batch,
        target=job.config.kl.target,
        horizon=job.config.kl.horizon,
        limit=job.config.kl.limit,
    )
    state = jax.block_until_ready(state.replace(loop={"beta": beta}))
    clock.append(time.perf_counter())
    times = dict(zip(("time/sample_s", "time/score_s", "time/update_s"), np.diff(clock).tolist(), strict=True))
    return state, metrics | times


def evaluate(job: Job, tokenizer, gold, params):
    """Held-out prompts, always answered by the same draws. -> ({"proxy": f32 [n], "kl": nats [n], "gold": f32 [n]}, samples)"""
    found, samples = [], []
    for numbers, count in common.parts(list(range(len(job.held_out))), job.config.run.batch):
        batch, scores = respond(job, params, job.held_out, numbers, "evaluate", 0)
        gap = job.said(params, batch)[0] - job.said(job.reference, batch)[0]
        of_rows = {"proxy": shard.fetch(scores), "kl": shard.fetch((gap * batch.targets).sum(axis=1))}
        texts = common.texts(tokenizer, batch)
        if gold:
            of_rows["gold"] = gold([response for _, response in texts])
        found.append({name: x[:count] for name, x in of_rows.items()})
        for r, (prompt, response) in enumerate(texts[:count]):
            samples.append({"prompt": prompt, "response": response} | {name: float(x[r]) for name, x in of_rows.items()})
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}, samples[: job.config.evaluate.samples]


def prepare(config, mesh, policy, judge):
    """-> (Job, the state before the first iteration)"""
    temperature, eos = config.sample.temperature, policy.tokenizer.eos_token_id
    if temperature <= 0:
        raise ValueError(
            f"sample.temperature = {temperature}: a policy that is to learn from its samples draws them, so it is above 0"
        )
    if config.run.batch % config.run.minibatches:
        raise ValueError(f"run.batch = {config.run.batch} does not divide into run.minibatches = {config.run.minibatches}")
    tx = optim.adam(steps=config.run.iterations * config.run.epochs * config.run.minibatches, **config.optim)
    state, where = common.new_state(policy, tx, mesh, beta=config.kl.beta)
    objective = partial(ppo, model=policy.model, temperature=temperature, **config.objective)
    found = common.openings(policy.tokenizer, seed=config.seed, **config.prompts)
    _, held_out = common.split(found, config.evaluate.prompts, "evaluate.prompts")
    known = {document.tokens.tobytes() for document in held_out}
    prompts = [document for document in found if document.tokens.tobytes() not in known]
    if not prompts:
        raise ValueError(f"no prompt is left to train on beside the {len(known)} different ones held out; lower evaluate.prompts")

    def compiled(function, **settings):
        return shard.on_mesh(jax.jit(partial(function, **settings)), mesh)

    job = Job(
        config,
        mesh,
        policy.model.config.vocab,
        reference=policy.params,
        judge=judge.params,
        prompts=prompts,
        held_out=held_out,
        draw=common.sampler(policy.model, mesh, eos, config.sample),
        judged=compiled(partial(score.last_scalar, judge.model)),
        ended=compiled(rollout.ended, eos=eos),
        said=compiled(partial(rollout.said, policy.model), temperature=temperature),
        assemble=compiled(rollout.assemble, **config.advantage),
        describe=compiled(rollout.describe, eos=eos),
        take=compiled(lambda data, rows: jax.tree.map(lambda x: shard.constrain_rows(x[rows]), data)),
        update=shard.compile_step(make_step(objective, tx, accumulate=config.run.accumulate), mesh, where),
    )
    return job, state


def run(config, workdir: Path, stages: launch.Stages | None = None):
    """Make the stages that are missing, then raise the reward of the policy's samples, held near the reference by a price of KL."""
    mesh = shard.make_mesh(**config.mesh)
    stages = stages or launch.Stages(workdir, config.stages, {"sft": sft.run, "compare": compare.run, "reward": reward.run})
    policy_source, judge_source = stages.path(config.model.source), stages.path(config.reward_model.source)
    began = time.monotonic()
    policy = common.load(policy_source, config.model, mesh, seed=config.seed, head="value")
    judge = common.load(judge_source, config.reward_model, mesh, seed=config.seed, head="reward", draw_head=False)
    if policy.tokenizer_digest != judge.tokenizer_digest:
        raise ValueError(f"the policy ({policy_source}) and its reward model ({judge_source}) have different tokenizers")
    job, state = prepare(config, mesh, policy, judge)
    gold = common.gold_reward(config.gold.lexicon) if config.gold.lexicon else None
    measure = partial(evaluate, job, policy.tokenizer, gold)

    def watched(state, i):
        """An iteration, and before every `evaluate.every`-th what the policy does on held-out prompts."""
        if i % config.evaluate.every:
            return iteration(job, state, i)
        found, samples = measure(state.params)
        state, metrics = iteration(job, state, i)
        return state, metrics | {f"{name}/held_out": float(x.mean()) for name, x in found.items()} | {"samples": samples}

    launch.begin(workdir, policy)
    around = time.monotonic() - began
    state = loop.fit(
        watched,
        state,
        lambda i: i,
        workdir=workdir,
        stop=config.run.iterations,
        config=config,
        identity={"reference": policy.digest, "reward model": judge.digest, "tokenizer": policy.tokenizer_digest},
        **config.loop,
    )
    ended = time.monotonic()
    (before, _), (after, samples) = measure(job.reference), measure(state.params)
    launch.append(workdir / "samples.jsonl", [{"step": config.run.iterations, **sample} for sample in samples])
    summary = {}
    for name, when, found in [(name, *side) for name in ("gold", "proxy") for side in (("before", before), ("after", after))]:
        if name in found:
            summary[f"{name}/{when}"] = found[name].mean()
            summary[f"{name}/{when}_stderr"] = found[name].std() / len(found[name]) ** 0.5
    summary |= {"kl/final": after["kl"].mean(), "kl/target": config.kl.target, "kl/beta": state.loop["beta"]}
    told = Path(judge_source) / "summary.json"  # of the reward stage, where the reward model is one's own
    if told.exists():
        summary |= {name: x for name, x in json.loads(told.read_text()).items() if name.startswith("reward_model/acc")}
    summary["seconds"] = stages.seconds() + around + launch.looped(workdir) + time.monotonic() - ended
    plain = policy.model._replace(config=replace(policy.model.config, scalar=None))
    aligned = {name: leaf for name, leaf in state.params.items() if name != "scalar"}  # the critic stays in the checkpoints
    launch.finish(workdir, policy._replace(model=plain), aligned, summary)


if __name__ == "__main__":
    launch.main(run, "ppo")
