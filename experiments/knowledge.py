"""The boundary of knowledge: python -m experiments.knowledge --config=configs/knowledge.py

After Schulman's talk, "Reinforcement learning from human feedback" (2023). A small model reads what a generated world says
(jaxalign/data/facts.py); what it knows of it is measured by sampling. Then SFT, on facts that it knows, on others that it does
not, on both, and on both with "i do not know" for the latter; and RL whose reward is a table of five outcomes
(jaxalign/ops/truthfulness.py). All is judged by facts of people whom neither SFT nor RL was about. What is found of a seed is
kept in records.jsonl, and not made again.

With --config=configs/knowledge.py:smollm2 a model that is there is asked: known_unknowns, TruthfulQA, and facts, which it may
leave unanswered by its own probability.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import knowledge_real, launch, study
from experiments.knowledge_real import derived, title_of
from jaxalign import keys, models, rollout, shard
from jaxalign.data import facts, tables, text
from jaxalign.evaluation import records, selective
from jaxalign.models import adapters
from jaxalign.objectives import online, supervised
from jaxalign.ops import advantages, truthfulness
from jaxalign.sample import sample
from jaxalign.train import log, optim
from jaxalign.train.step import make_step
from jaxalign.types import TrainState

ASKED, WRITTEN = 8, 5  # most tokens of a question, and of an answer with its end
READS_OUT = "head|norm"  # what RL trains, by name of leaf: with all weights the model learns the asked facts by heart
GRID = np.linspace(0.05, 1, 20)  # coverages of the curve by the model's own probability


class Heard(NamedTuple):
    """Answers to F questions, each [F,...]."""

    correct: Any  # bool: of an answer without a hedge, or behind one
    hedged: Any  # bool
    informative: Any  # bool: anything but "i do not know"
    value: Any  # i32, the token of the answer


class Programs(NamedTuple):
    """What is compiled, of one model. Parameters are arguments."""

    init: Any  # (key) -> params
    pretrain: Any  # (params, Batch [looks,steps,B,T]) -> params [looks,...], after each look's steps
    sft: Any  # the same
    ask: Any  # (params, keys [F x draws], prompts [F,P], truth [F], greedy) -> Heard [F x draws]
    reinforce: Any  # (params, key, prompts, truth, numbers [steps,n], table) -> params


def programs(config, tokenizer) -> Programs:
    architecture = {"vocab": len(tokenizer), **config.scratch.architecture}
    model, eos = models.build(models.config_of(architecture)), tokenizer.eos_token_id
    draw, heard = partial(sample, model, length=WRITTEN, eos=eos), partial(outcome, tokenizer=tokenizer)

    def adam(section):
        return optim.adam(**{**config.optim, "learning_rate": section.learning_rate}, steps=section.steps)

    def learn(section, params, data):
        tx = adam(section)
        step = make_step(partial(supervised.sft, model=model), tx)

        def look(state, part):
            state, _ = jax.lax.scan(step, state, part)
            return state, state.params

        return jax.lax.scan(look, TrainState(jnp.int32(0), params, tx.init(params)), data)[1]

    def ask(params, row_keys, prompts, truth, greedy):
        batch, _, _ = draw(params, row_keys, prompts, temperature=0.0 if greedy else 1.0)
        return heard(batch.tokens[:, ASKED:], jnp.repeat(truth, len(row_keys) // len(truth)))

    def reinforce(params, key, prompts, truth, numbers, table):
        tx, group = adam(config.rl), config.rl.group
        step = make_step(partial(online.grpo, model=model), tx)

        def update(state, given):
            i, rows = given
            row_keys = jax.random.split(jax.random.fold_in(key, i), len(rows) * group)
            batch, logp, _ = draw(state.model_params, row_keys, jax.tree.map(lambda x: x[rows], prompts))
            said = heard(batch.tokens[:, ASKED:], jnp.repeat(truth[rows], group))
            scores = truthfulness.reward(said.correct, said.hedged, said.informative, table)
            given = {"group": group, "estimator": advantages.rloo}  # to divide by the std of a group would undo the table's scale
            return step(state, rollout.assemble_groups(batch, logp, logp, jnp.zeros_like(logp), scores, 0.0, **given))[0], None

        frozen, trained = adapters.split(params, READS_OUT)
        state = TrainState(jnp.int32(0), trained, tx.init(trained), frozen=frozen)
        return jax.lax.scan(update, state, (jnp.arange(len(numbers)), numbers))[0].model_params

    return Programs(
        init=jax.jit(lambda key: shard.unbox(model.init(key))),
        pretrain=jax.jit(partial(learn, config.pretrain)),
        sft=jax.jit(partial(learn, config.sft)),
        ask=jax.jit(ask, static_argnums=4),
        reinforce=jax.jit(reinforce),
    )


def outcome(tokens, truth, *, tokenizer) -> Heard:
    """What answers say, tokens i32 [B,WRITTEN], beside the right values, i32 [B]."""
    eos, hedge = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(facts.HEDGE)
    silence = jnp.array([*tokenizer.convert_tokens_to_ids(facts.ABSTAIN.split()), eos])
    hedged = tokens[:, 0] == hedge
    value, end = (jnp.where(hedged, tokens[:, n + 1], tokens[:, n]) for n in (0, 1))
    return Heard((value == truth) & (end == eos), hedged, (tokens != silence[None]).any(1), value)


# --------------------------------------------------------- one seed


def batches(tokenizer, rows: list[dict], section, *, looks: int, seed: int):
    """Rows {"prompt", "completion"} as they are learnt: Batch [looks, steps/looks, B, T]. ValueError where steps do not divide."""
    if section.steps % looks:
        raise ValueError(f"steps = {section.steps}: they divide into looks = {looks}")
    made = tables.pad([text.prompt_completion(tokenizer, row["prompt"], row["completion"]) for row in rows], ASKED + WRITTEN)
    order = [tables.order(len(rows), section.batch, seed=seed, step=step) for step in range(section.steps)]
    order = np.reshape(order, (looks, -1, section.batch))
    return jax.tree.map(lambda x: x[order], made)


def courses(known: list[dict], unknown: list[dict], count: int) -> dict:
    """{name: `count` rows for SFT}: facts that are known, ones that are not, both; both, the latter with "i do not know".

    Raises ValueError where there are too few.
    """
    if min(len(known), len(unknown)) < count:
        there = f"{len(known)} facts that it knows and {len(unknown)} that it does not"
        raise ValueError(f"sft.facts = {count}, and there are {there}: take more people, or fewer facts")

    def rows(found, count, **said):
        return [{"prompt": fact["question"], "completion": fact["answer"]} | said for fact in found[:count]]

    half = count // 2
    return {
        "known facts": rows(known, count),
        "half and half": rows(known, count - half) + rows(unknown, half),
        "unknown facts": rows(unknown, count),
        'half, and "i do not know"': rows(known, count - half) + rows(unknown, half, completion=facts.ABSTAIN),
    }


def of_table(said: Heard, sure, right, rewards) -> dict:
    """What a policy comes to by a table, beside answering always, and by its thresholds of a probability. -> {name: number}

    Args: sure [F]: the probability that the model's likeliest answer is right, before RL; right, bool [F]: whether it is.
    """
    table, (above, speaks) = _table(rewards), derived(rewards)
    return {
        "coverage": said.informative.mean(),
        "accuracy": said.correct.sum() / max(1, said.informative.sum()),
        "hedged": said.hedged.mean(),
        "reward": truthfulness.reward(*said[:3], table).mean(),
        "reward/rule": truthfulness.reward(right, sure < above, sure > speaks, table).mean(),
        "reward/always": truthfulness.reward(right, False, True, table).mean(),
        "answers above": selective.cut(sure, said.informative & ~said.hedged),
        "speaks above": selective.cut(sure, said.informative),
    }


def _table(rewards) -> truthfulness.Table:
    return truthfulness.Table(*map(jnp.float32, rewards))


def of_seed(config, made: Programs, tokenizer, seed: int) -> dict:
    """All that is found of one world: {"base": {name: number}, "sft": {course: {name: at each look}}, "rl": of each table, "own":
    accuracy by the model's own probability at the coverages of GRID}."""
    world = facts.facts(config.world.people, seed=seed)
    text_of = partial(batches, tokenizer, seed=seed)
    read = text_of(facts.corpus(world, seed=seed), config.pretrain, looks=1)
    base = jax.tree.map(lambda x: x[-1], made.pretrain(made.init(keys.key(seed, "init")), read))

    asked = [fact for fact in world if fact["kind"] != "asked"]
    start = next(n for n, fact in enumerate(asked) if fact["name"] == world[len(world) * 3 // 4]["name"])
    train, held_out = slice(0, start), slice(start, None)  # other people
    prompts = tables.pad([text.prompt_completion(tokenizer, fact["question"], "", eos=False) for fact in asked], ASKED, side="left")
    truth = np.array(tokenizer.convert_tokens_to_ids([fact["answer"] for fact in asked]), np.int32)

    def say(params, side=slice(None), draws=1, greedy=True) -> Heard:
        here = jax.tree.map(lambda x: x[side], prompts)
        row_keys = jax.random.split(keys.key(seed, "evaluate"), draws * len(here.tokens))
        found = made.ask(params, row_keys, here, truth[side], greedy)
        return Heard(*(np.asarray(x).reshape(-1, draws) if draws > 1 else np.asarray(x) for x in found))

    drawn = say(base, draws=config.draws, greedy=False)
    answer, share = selective.confidence(drawn.value, drawn.informative)
    right, p = (answer == truth), drawn.correct.mean(1)
    known, unknown = p >= config.known, p <= config.unknown
    sure = selective.calibrated(share[train], right[train])(share)[held_out]
    right = right[held_out]

    def of_sft(params):
        said = say(params, held_out)
        plain = said.informative & ~said.hedged
        found = {"right": said.correct[known[held_out]], "withheld": ~said.informative[known[held_out]]}
        found |= {"made up": (plain & ~said.correct)[unknown[held_out]], "abstained": ~said.informative[unknown[held_out]]}
        return {name: float(x.mean()) for name, x in found.items()}

    sft = {"": {name: [x] for name, x in of_sft(base).items()}}
    learnable = [[fact for fact, this in zip(asked[train], which[train], strict=True) if this] for which in (known, unknown)]
    for name, rows in courses(*learnable, config.sft.facts).items():
        trained = made.sft(base, text_of(rows, config.sft, looks=config.sft.looks))
        looks = [of_sft(jax.tree.map(lambda x, k=k: x[k], trained)) for k in range(config.sft.looks)]
        sft[name] = {key: sft[""][key] + [look[key] for look in looks] for key in looks[0]}

    rl = []
    steps, many = config.rl.steps, config.rl.prompts
    numbers = np.array([tables.order(start, many, seed=seed, step=step) for step in range(steps)])
    for n, rewards in enumerate(config.tables):
        said = say(made.reinforce(base, keys.key(seed, "sample", n), prompts, truth, numbers, _table(rewards)), held_out)
        rl.append({name: float(x) for name, x in of_table(said, sure, right, rewards).items()})
    by_kind = {kind: [fact["kind"] == kind for fact in asked] for kind in facts.KINDS if kind != "asked"}
    base_said = {"right": float(right.mean()), "known": float(known.mean()), "unknown": float(unknown.mean())}
    base_said |= {f"right/{kind}": float(p[which].mean()) for kind, which in by_kind.items()}
    base_said["calibration"] = float(np.mean(sure) - np.mean(right))
    curve = np.interp(GRID, *selective.accuracies(sure, right))
    return {"base": base_said, "sft": sft, "rl": rl, "own": curve.tolist()}


# --------------------------------------------------------- what is left of it


def summarise(found: list[dict], rewards) -> dict:
    """Means over seeds and their errors, of what `of_seed` found of each."""
    told = {name: [one["base"][name] for one in found] for name in found[0]["base"]}
    for course, measured in found[0]["sft"].items():
        for name in measured:
            told[f"{course or 'before SFT'}/{name}"] = [one["sft"][course][name][-1] for one in found]
    for n, table in enumerate(rewards):
        for name in found[0]["rl"][n]:
            told[f"{title_of(table)}/{name}"] = [one["rl"][n][name] for one in found]
    summary = {}
    for name, values in told.items():
        summary |= study.over_seeds(name, values)
    for table in rewards:
        summary |= {
            f"{title_of(table)}/derived, {what}": at for what, at in zip(("answers", "speaks"), derived(table), strict=True)
        }
    return summary


def figures_of(found: list[dict], rewards, steps: int) -> dict:
    def point(x, values):
        return [float(x), *study.over_seeds("", values).values()]

    figures = {}
    for name, title in (
        ("right", "Held-out facts that it knew, and still answers rightly"),
        ("made up", "Held-out facts that it does not know, and makes up"),
    ):
        curves = {}
        for course in [course for course in found[0]["sft"] if course]:
            looks = np.array([one["sft"][course][name] for one in found]).T
            curves[course] = [point(x, values) for x, values in zip(np.linspace(0, steps, len(looks)), looks, strict=True)]
        figures[title] = {"x": "updates of SFT", "curves": curves}
    own = [point(x, values) for x, values in zip(GRID, np.transpose([one["own"] for one in found]), strict=True)]
    trained, answers, speaks = [], [], []
    for n, table in enumerate(rewards):
        of_seeds = {name: [one["rl"][n][name] for one in found] for name in found[0]["rl"][n]}
        at_all = [n for n, coverage in enumerate(of_seeds["coverage"]) if coverage]
        if at_all:
            trained.append(point(np.mean(of_seeds["coverage"]), [of_seeds["accuracy"][n] for n in at_all]))
        answers.append(point(derived(table)[0], of_seeds["answers above"]))
        speaks.append(point(derived(table)[1], of_seeds["speaks above"]))
    curves = {"own probability above a threshold": own, "trained, one dot a table": trained}
    figures["Accuracy of what is answered, hedged or not"] = {"x": "coverage", "curves": curves, "points": list(curves)[1:]}
    curves = {"as derived": [[0, 0], [1, 1]], "it answers": answers, "it answers or hedges": speaks}
    figures["Probability of being right above which it does"] = {
        "x": "threshold derived from the table",
        "curves": curves,
        "points": list(curves)[1:],
    }
    return figures


def findings(found: list[dict], rewards) -> list[str]:
    """What the numbers of all seeds say."""

    def more(a, b):
        return f"{np.mean(a):.2f}, {study.compared(a, b)}"

    def sft(name, course, other=""):
        return more(*([one["sft"][which][name][-1] for one in found] for which in (course, other)))

    silent = 'half, and "i do not know"'
    said = [
        "Held-out facts that the model knew, answered rightly after SFT on other facts that it knows: "
        f"{sft('right', 'known facts')} than before. After SFT on as many that it does not know: "
        f"{sft('right', 'unknown facts', 'known facts')} than that (Gekhman et al. 2024: less).",
        "Held-out facts that it does not know, answered plainly and wrongly after SFT on known facts: "
        f"{sft('made up', 'known facts')} than before. After SFT on unknown facts: {sft('made up', 'unknown facts')} than before.",
        'The same where SFT has "i do not know" in the place of the answers to unknown facts, half of all: '
        f"{sft('made up', silent, 'half and half')} than with those answers. Of what it knew it withholds "
        f"{sft('withheld', silent, 'half and half')}.",
    ]
    rl = [{name: [one["rl"][n][name] for one in found] for name in found[0]["rl"][n]} for n in range(len(rewards))]
    for table, of in zip(rewards, rl, strict=True):
        answers, speaks = ([at] * len(found) for at in derived(table))
        said.append(
            f"RL by {title_of(table)}: to answer is best above a probability of {answers[0]:.2f}, to say anything above "
            f"{speaks[0]:.2f}. The model answers above {more(of['answers above'], answers)}, and says anything above "
            f"{more(of['speaks above'], speaks)}. "
            f"Its reward: {more(of['reward'], of['reward/always'])} than by answering always, and "
            f"{study.compared(of['reward'], of['reward/rule'])} than by these thresholds of the probability that it had before RL."
        )
    mild, *_, strict = sorted(range(len(rewards)), key=lambda n: derived(rewards[n]))
    said.append(
        f"Questions that it says something to, by the strictest table: {more(rl[strict]['coverage'], rl[mild]['coverage'])} than "
        f"by the mildest. Of that is right: {more(rl[strict]['accuracy'], rl[mild]['accuracy'])}."
    )
    return said


def run(config, workdir: Path):
    """The study of the generated world, or of a model that is there."""
    if "model" in config:
        return knowledge_real.run(config, workdir)
    tokenizer = facts.tokenizer()
    made = programs(config, tokenizer)
    seeds = range(config.seed, config.seed + config.seeds)
    settings = {name: x for name, x in log.plain(config).items() if name not in ("seed", "seeds")}
    about = {"task": "knowledge", "prompt": records.fingerprint(settings), "model": "scratch"}

    def ask(numbers, tell):
        for k, n in enumerate(numbers):
            log.say(f"seed {seeds[n]}")
            tell(k, of_seed(config, made, tokenizer, seeds[n]))

    wanted = [about | {"id": seed} for seed in seeds]
    found = records.collect(workdir / "records.jsonl", wanted, [1] * len(seeds), ask, lambda n, answers: answers[0])
    figures = figures_of(found, config.tables, config.sft.steps)
    study.leave(workdir, config, summarise(found, config.tables), figures, findings(found, config.tables))


if __name__ == "__main__":
    launch.main(run, "knowledge")
