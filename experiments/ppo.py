"""RLHF with PPO: python -m experiments.ppo --config=configs/ppo.py

From prompts to an aligned model, top to bottom. Read on in jaxalign/rollout.py (rewards and advantages),
jaxalign/objectives/online.py (the loss) and jaxalign/train/step.py (the update). Another algorithm is another `Algorithm` for
`run`, in a file such as experiments/grpo.py.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common, compare, ensemble, environment, launch, reward, sft
from experiments.evaluate import hook
from jaxalign import keys, rewards, rollout, shard
from jaxalign.data import tables
from jaxalign.objectives.online import ppo
from jaxalign.ops import advantages
from jaxalign.train import log, loop, optim
from jaxalign.train.step import make_step


def rows_together(config) -> int:
    """Of the rows of a micro-batch how many, one behind the other, answer one prompt."""
    group, accumulate = config.run.group, config.run.accumulate
    return group // accumulate if group % accumulate == 0 else 1  # rows are dealt to micro-batches in turn


class Algorithm(NamedTuple):
    """What tells one algorithm from another, each by the config: code is chosen here, values there."""

    objective: Any  # (config, model) -> (params, data) -> (sum, sums)
    assemble: Any  # (config) -> (batch, logp, ref_logp, value, scores, beta) -> Rollout
    critic: Any = lambda config: "none"  # or "shared", a head on the policy's trunk; or "own", which starts as the reward model
    greedy: Any = lambda config: False  # whether the score of the likeliest response is its prompt's value
    data: Any = lambda config, model: lambda rollout: rollout  # (Rollout of whole groups, ...) -> what the objective learns from
    environment: Any = None  # one's own, where `environment.name` names none of the library's
    together: Any = rows_together  # (config) -> so many rows in the objective's every batch begin with one prompt, read once
    beside: Any = lambda config, policy, mesh: None  # or (i) -> what `data` is given for update i, beside the rollout


PPO = Algorithm(
    objective=lambda config, model: partial(ppo, model=model, temperature=config.sample.temperature, **config.objective),
    assemble=lambda config: partial(rollout.assemble, **config.advantage),
    critic=lambda config: config.run.critic,
)


class Job(NamedTuple):
    """What does not change within a run. Every function is pure, compiled, and takes parameters as arguments."""

    config: Any
    mesh: Any
    vocab: int
    reference: Any  # parameters
    judge: list  # parameters of the reward models
    prompts: list  # or, in an environment, environment.Starts
    held_out: list  # that are not among those
    play: Any  # None, or (draw, params, keys, starts, group) -> (Batch, f32 [B], logp): an environment in the place of the judge
    draw: Any  # (params, keys, prompts, group=1) -> (Batch, logp)
    greedy: Any  # None, or the same without chance
    judged: Any  # (judge, batch) -> f32 [B]
    ended: Any  # (batch) -> f32 [B], 1 where the response has its EOS
    said: Any  # (params, batch, group=1) -> (logp, entropy, value)
    valued: Any  # (params, batch, group=1) -> value alone
    assemble: Any  # (batch, logp, ref_logp, value, scores, beta) -> Rollout
    describe: Any  # (rollout, entropy) -> metrics
    corrected: Any  # (rollout, drawn_logp) -> both, for responses that an earlier policy drew
    beside: Any  # None, or (i) -> what update i learns from beside the rollout
    take: Any  # (rollout, numbers of rows, ...) -> the objective's data
    update: Any  # (state, data) -> (state, metrics)


def updates_of(run) -> int:
    """Updates that learn from one rollout."""
    return run.epochs * run.minibatches


def step(job: Job, state, i: int):
    """Update i of the run: on a new rollout where the one before has been used up, E epochs of M updates. -> (state, metrics)"""
    iteration, update = divmod(i, updates_of(job.config.run))
    said = {}
    if update == 0:
        state, said = collect(job, state, iteration)
    run = job.config.run
    epoch, part = divmod(update, run.minibatches)
    order = jax.random.permutation(keys.key(job.config.seed, "shuffle", iteration, epoch), run.batch // run.group)
    groups = jnp.split(order, run.minibatches)[part]  # the samples of a prompt stay together
    rows = (groups[:, None] * run.group + jnp.arange(run.group)[None]).ravel()
    more = [job.beside(i)] if job.beside else []
    state, metrics = job.update(state, job.take(state.loop["rollout"], rows, *more))
    return state, metrics | said  # policy/entropy is that of the rollout, where there is a new one


def collect(job: Job, state, iteration: int):
    """Sample, score, and a new price of KL for the next time. -> (the state, which holds the rollout; metrics)

    `run.group` responses to each prompt; they serve `run.reuse` iterations, each of which scores them by the policy as it is then.
    """
    config, run, clock = job.config, job.config.run, [time.perf_counter()]
    fresh, times_used = divmod(iteration, run.reuse)
    numbers = np.repeat(tables.order(len(job.prompts), run.batch // run.group, seed=config.seed, step=fresh), run.group)
    params = state.model_params
    if times_used:
        batch, scores, drawn_logp = state.loop["rollout"].batch, state.loop["rollout"].score, state.loop["drawn_logp"]
    else:
        batch, scores, drawn_logp = jax.block_until_ready(
            respond(job, params, job.prompts, numbers, "sample", iteration, run.group)
        )
    clock.append(time.perf_counter())

    if run.rescore or times_used:
        logp, entropy, value = job.said(params, batch, run.group)
    else:
        logp, entropy, value = drawn_logp, None, job.valued(params, batch, run.group)
    ref_logp, _, _ = job.said(job.reference, batch, run.group)
    if job.greedy:  # ReMax (Li et al. 2024): as a value of every token it is a baseline
        greedy = job._replace(draw=job.greedy)
        _, likeliest, _ = respond(greedy, params, job.prompts, numbers, "sample", iteration, run.group)
        value = jnp.broadcast_to(jnp.nan_to_num(likeliest)[:, None], logp.shape)
    beta = state.loop["beta"]
    rollout = job.assemble(batch, logp, ref_logp, value, scores, beta)
    kept = {}
    if run.reuse > 1:
        rollout, kept["drawn_logp"] = job.corrected(rollout, drawn_logp if times_used else logp)
    metrics = jax.block_until_ready(job.describe(rollout, entropy))
    if metrics["reward/abstained"] > run.most_abstained:
        raise ValueError(
            f"the reward abstained from {float(metrics['reward/abstained']):.0%} of the responses of iteration {iteration}, and "
            f"run.most_abstained = {run.most_abstained:g}: it is broken, or raise that limit"
        )
    clock.append(time.perf_counter())

    times = dict(zip(("time/sample_s", "time/score_s"), np.diff(clock).tolist(), strict=True))
    metrics |= {"policy/beta": jnp.copy(beta), **times}  # a copy, for the update takes the state away
    kl = {name: config.kl[name] for name in ("target", "horizon", "limit")}
    if not times_used:  # only of its own samples is the log-ratio the policy's KL
        beta = rewards.update_beta(beta, metrics["policy/kl"], run.batch, **kl)
    return state.replace(loop={"beta": beta, "rollout": rollout, **kept}), metrics


def respond(job: Job, params, documents, numbers, role: str, step: int, group: int = 1):
    """Responses to these prompts, their scores by the reward model or the environment, and what the sampler said of each token.

    -> (Batch, f32 [B], logp f32 [B,T], None of episodes of several turns)
    Args: group: of so many numbers, one behind the other, all are the same.
    """
    row_keys = keys.of_rows(keys.key(job.config.seed, role, step), numbers)
    if job.config.environment.name:
        batch, scores, logp = job.play(job.draw, params, row_keys, [documents[n] for n in numbers], group)
    else:
        prompts = common.rows_of(documents, numbers, job.config.prompts.length, job.mesh, job.vocab)
        batch, logp = job.draw(params, row_keys, prompts, group)
        scores = job.judged(job.judge, batch)
    return batch, advantages.without_eos(scores, job.ended(batch) > 0, **job.config.unended), logp


def evaluate(job: Job, tokenizer, gold, params):
    """Held-out prompts, always answered by the same draws. -> ({"proxy": f32 [n], "kl": nats [n], "gold": f32 [n]}, samples)"""
    found, samples = [], []
    for numbers, count in common.parts(list(range(len(job.held_out))), job.config.run.batch):
        batch, scores, _ = respond(job, params, job.held_out, numbers, "evaluate", 0)
        gap = job.said(params, batch, 1)[0] - job.said(job.reference, batch, 1)[0]
        of_rows = {"proxy": shard.fetch(scores), "kl": shard.fetch((gap * batch.targets).sum(axis=1))}
        texts = (environment.dialogues if job.play else common.texts)(tokenizer, batch)
        if gold:
            of_rows["gold"] = gold([response for _, response in texts])
        found.append({name: x[:count] for name, x in of_rows.items()})
        for r, (prompt, response) in enumerate(texts[:count]):
            samples.append({"prompt": prompt, "response": response} | {name: float(x[r]) for name, x in of_rows.items()})
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}, samples[: job.config.evaluate.samples]


def prepare(config, mesh, policy, judges, judged, algorithm=PPO):
    """-> (Job, the state before the first iteration). Args: judges, judged: as ensemble.load gives them."""
    run, temperature, eos = config.run, config.sample.temperature, policy.tokenizer.eos_token_id
    if temperature <= 0:
        raise ValueError(
            f"sample.temperature = {temperature}: a policy that is to learn from its samples draws them, so it is above 0"
        )
    several = bool(config.environment.name) and config.environment.turns > 1
    if several and not run.rescore:
        raise ValueError("run.rescore = False: an episode has several samples, whose log-probabilities are not kept")
    if run.batch % run.minibatches:
        raise ValueError(f"run.batch = {run.batch} does not divide into run.minibatches = {run.minibatches}")
    tx = optim.adam(steps=run.iterations * updates_of(run), **config.optim)
    found, columns, play = environment.openings(config, policy, mesh, algorithm.environment)
    blank = rollout.blank(run.batch, *columns)
    carried = {"rollout": blank} | ({"drawn_logp": blank.logp} if run.reuse > 1 else {})
    state, where = common.new_state(policy, tx, mesh, beta=jnp.float32(config.kl.beta), **shard.declare_rows(carried))
    hold = {"policy/approx_kl": run.stop_kl}

    def sharing(group):
        """The policy for rows that answer the same prompts; episodes of several turns are padded otherwise."""
        first, _ = common.prompt_columns(policy.model, config.prompts.length)
        alone = several or group == 1 or shard.crowded(mesh)
        return policy.model if alone else policy.model.sharing(group, first)

    update = make_step(
        algorithm.objective(config, sharing(algorithm.together(config))),
        tx,
        accumulate=run.accumulate,
        hold_above=hold,
        **config.guard,
    )
    learnt = algorithm.data(config, policy.model)
    _, held_out = common.split(found, config.evaluate.prompts, "evaluate.prompts")
    known = {document.ids for document in held_out}
    prompts = [document for document in found if document.ids not in known]
    if not prompts:
        raise ValueError(f"no prompt is left to train on beside the {len(known)} different ones held out; lower evaluate.prompts")

    def compiled(function, out=None, **settings):
        return shard.on_mesh(jax.jit(partial(function, **settings), out_shardings=out), mesh)

    def said(params, batch, group=1):
        return rollout.said(sharing(group), params, batch, temperature=temperature)

    def corrected(rolled, drawn_logp):
        return rollout.corrected(rolled, drawn_logp, cap=run.importance_cap), jnp.copy(drawn_logp)

    def take(rolled, rows, *more):
        return jax.tree.map(shard.constrain_rows, learnt(jax.tree.map(lambda x: x[rows], rolled), *more))

    job = Job(
        config,
        mesh,
        policy.model.config.vocab,
        reference=policy.reference,
        judge=judges,
        prompts=prompts,
        held_out=held_out,
        play=play,
        draw=common.sampler(policy.model, mesh, eos, config.sample),
        greedy=common.sampler(policy.model, mesh, eos, {**config.sample, "temperature": 0.0}) if algorithm.greedy(config) else None,
        judged=judged and compiled(judged),
        ended=compiled(rollout.ended, eos=eos),
        said=shard.on_mesh(jax.jit(said, static_argnums=2), mesh),
        valued=shard.on_mesh(jax.jit(lambda *args: said(*args)[2], static_argnums=2), mesh),
        assemble=compiled(algorithm.assemble(config), where.loop["rollout"]),
        describe=compiled(rollout.describe, eos=eos, group=run.group),
        corrected=compiled(corrected, (where.loop["rollout"], where.loop.get("drawn_logp"))),
        beside=algorithm.beside(config, policy, mesh),
        take=compiled(take),
        update=shard.compile_step(update, mesh, where),
    )
    return job, state


def run(config, workdir: Path, stages: launch.Stages | None = None, algorithm: Algorithm = PPO):
    """Make the stages that are missing, then raise the reward of the policy's samples, held near the reference by a price of KL."""
    critic, mesh = algorithm.critic(config), shard.make_mesh(**config.mesh)
    gold = common.gold_reward(config.gold.lexicon) if config.gold.lexicon else None
    stages = stages or launch.Stages(workdir, config.stages, {"sft": sft.run, "compare": compare.run, "reward": reward.run})
    policy_source = stages.path(config.model.source)
    judge_source = "" if config.environment.name else stages.path(config.reward_model.source)
    began = time.monotonic()
    head = "value" if critic == "shared" else None
    policy = common.load(policy_source, config.model, mesh, seed=config.seed, head=head, adapter=config.adapter)
    judge, judges, judged, told = None, [], None, {}
    if judge_source:
        settings = config.reward_model
        judge, judges, judged = ensemble.load(judge_source, settings, mesh, seed=config.seed, doubt=settings.doubt)
        told = log.read_json(Path(judge_source) / "summary.json")  # of the reward stage, where the reward model is one's own
    if judge and policy.tokenizer_digest != judge.tokenizer_digest:
        raise ValueError(f"the policy ({policy_source}) and its reward model ({judge_source}) have different tokenizers")
    if critic == "own":
        model = rollout.with_critic(policy.model, judge.model)
        policy = policy._replace(model=model, params={"policy": policy.params, "critic": judge.params})
    job, state = prepare(config, mesh, policy, judges, judged, algorithm)
    measure, seen = partial(evaluate, job, policy.tokenizer, gold), {}  # what was seen of held-out prompts, by step
    every, stop = (n * updates_of(config.run) for n in (config.evaluate.every, config.run.iterations))

    def held_out(done, state):
        """What the policy does on held-out prompts, every `evaluate.every` iterations and at the end; 0: never."""
        if not every or (done % every and done < stop):
            return {}
        seen[done], samples = measure(state.model_params)
        return {f"{name}/held_out": float(np.nanmean(x)) for name, x in seen[done].items()} | {"samples": samples}

    launch.begin(workdir, policy)
    around = time.monotonic() - began
    state = loop.fit(
        partial(step, job),
        state,
        lambda i: i,
        workdir=workdir,
        stop=stop,
        hooks=[held_out, hook(policy, mesh, workdir, tasks=config.evaluate.tasks, every=every, count=config.evaluate.count)],
        config=config,
        identity={"reference": policy.digest, "tokenizer": policy.tokenizer_digest}
        | ({"reward model": judge.digest} if judge else {"environment": config.environment.name}),
        **config.loop,
    )
    ended = time.monotonic()
    before, after = seen.get(0) or measure(policy.params)[0], seen.get(stop) or measure(state.model_params)[0]
    summary = {}
    for name, when, found in [(name, *side) for name in ("gold", "proxy") for side in (("before", before), ("after", after))]:
        if name in found:
            summary[f"{name}/{when}"] = np.nanmean(found[name])
            summary[f"{name}/{when}_stderr"] = np.nanstd(found[name]) / len(found[name]) ** 0.5
    summary |= {"kl/final": after["kl"].mean(), "kl/target": config.kl.target, "kl/beta": state.loop["beta"]}
    summary |= {name: x for name, x in told.items() if name.startswith("reward_model/acc")}
    summary["seconds"] = stages.seconds() + around + launch.looped(workdir) + time.monotonic() - ended
    plain = policy.model._replace(config=replace(policy.model.config, scalar=None))
    params = state.model_params["policy"] if critic == "own" else state.model_params
    aligned = {name: leaf for name, leaf in params.items() if name != "scalar"}  # the critic stays in the checkpoints
    launch.finish(workdir, policy._replace(model=plain), aligned, summary)


if __name__ == "__main__":
    launch.main(run, "ppo")
