"""What settings may be: one table, looked at before anything is read, written or trained."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxalign import shard
from jaxalign.data import text
from jaxalign.data.sources import LARGEST
from jaxalign.feedback.self_improvement import METHODS
from jaxalign.models.attention import ATTENTION
from jaxalign.models.parts import ACTIVATIONS, ADAPTERS, REMAT
from jaxalign.train import log


class Rule(NamedTuple):
    holds: Callable[[Any], bool]
    says: str  # "it is ..."


def whole(least: int, most: int = 2**31 - 1) -> Rule:
    return Rule(lambda x: type(x) is int and least <= x <= most, f"a whole number from {least} to {most}")


def number(holds, says: str, *, endless: bool = False) -> Rule:
    """A number for which holds(x) is true in float32, where it will be used. endless: it may be inf."""

    def sound(x):
        known = type(x) in (int, float) and (abs(x) <= LARGEST or (endless and x == math.inf))
        return known and bool(holds(np.float32(x)))

    return Rule(sound, says)


def one_of(*values) -> Rule:
    return Rule(lambda x: isinstance(x, str) and x in values, f"one of {', '.join(values)}")


def maybe(rule: Rule) -> Rule:
    return Rule(lambda x: x is None or rule.holds(x), f"None, or {rule.says}")


def template(least: int, says: str) -> Rule:
    """Text with at least so many {columns}. ValueError, with the reason, for one that cannot be read."""
    return Rule(lambda x: TEXT.holds(x) and len(text.fields(x)) >= least, says)


def expression(x) -> bool:
    """Whether it is a regular expression with something in it. ValueError, with the reason, for one that cannot be read."""
    try:
        return NAMED.holds(x) and re.compile(x) is not None
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from error


def several(rule: Rule) -> Rule:
    return Rule(lambda x: isinstance(x, tuple) and all(map(rule.holds, x)), f"a tuple of which each is {rule.says}, or ()")


def bounds(x) -> bool:
    return many(x) and len(x) == 2 and 0 <= x[0] <= x[1] <= 1


def many(x) -> bool:
    return isinstance(x, tuple) and bool(x) and all(FINITE.holds(value) for value in x)


POSITIVE = number(lambda x: x > 0, "a number above 0")
ENDLESS = number(lambda x: x > 0, "a number above 0, or inf", endless=True)
NOT_NEGATIVE = number(lambda x: x >= 0, "a number from 0")
SHARE = number(lambda x: 0 <= x <= 1, "a number from 0 to 1")
BELOW_1 = number(lambda x: 0 <= x < 1, "a number from 0, and below 1 in float32")
FINITE = number(lambda x: True, "a finite number")
FLAG = Rule(lambda x: type(x) is bool, "True or False")
TEXT = Rule(lambda x: isinstance(x, str) and x.encode() is not None, "a text")  # encode: a shell may pass what is no UTF-8
NAMED = Rule(lambda x: TEXT.holds(x) and x.strip() != "", "a text that is not empty")
COUNT, ANY_COUNT = whole(1), whole(0)


def falling(x) -> bool:
    """Whether these are rewards of ops.truthfulness.Table."""
    return many(x) and len(x) == 5 and all(a > b for a, b in zip(x, x[1:]))


WIDTH = Rule(lambda x: COUNT.holds(x) and x % 4 == 0, "a multiple of 4")
AXIS = Rule(lambda x: type(x) is int and (x == -1 or x >= 1), "a number of devices from 1, or -1 for those that are left")
COLUMN = Rule(lambda x: isinstance(x, str) and x == f"{{{''.join(text.fields(x))}}}" != "{}", "one {column}")
FREE = template(0, "a text with {columns}")
FILLED = template(1, "a text with at least one {column} of a row, or every row would be alike")

RULES = {
    "seed": whole(0, 2**32 - 1),  # a larger one would be cut to its last 32 bits, and be the seed of another run
    **{f"mesh.{axis}": AXIS for axis in shard.AXES},
    **{
        f"{section}.{key}": rule
        for section in ("model", "reward_model", "teacher_model", "feedback_model")
        for key, rule in {
            "source": NAMED,
            "tokenizer": TEXT,
            "dtype": one_of("float32", "bfloat16", "float16"),
            "remat": one_of(*REMAT),
            "attention": one_of(*ATTENTION),
        }.items()
    },
    "reward_model.doubt": number(lambda x: x >= 0, "a number from 0, or inf", endless=True),
    "teacher_model.k": ANY_COUNT,
    "adapter.kind": one_of("none", *ADAPTERS),
    "adapter.source": TEXT,
    "adapter.targets": Rule(expression, "a regular expression that is not empty"),
    **dict.fromkeys(("adapter.rank", "adapter.length", "adapter.layers"), COUNT),
    "adapter.alpha": POSITIVE,
    "adapter.rank_stabilised": FLAG,
    "scratch.tokenizer": NAMED,
    **{
        f"scratch.architecture.{size}": COUNT
        for size in ("width", "layers", "heads", "kv_heads", "head_dim", "mlp", "context", "encoder_layers")
    },
    "scratch.architecture.tied": FLAG,
    "scratch.architecture.gated": FLAG,
    "scratch.architecture.activation": one_of(*ACTIVATIONS),
    "data.source": NAMED,
    "data.count": ANY_COUNT,
    "data.held_out": COUNT,
    "data.prompt": FREE,
    **dict.fromkeys(("data.completion", "data.chosen", "data.rejected", "data.response"), FILLED),
    **dict.fromkeys(("data.margin", "data.won", "data.tied"), Rule(lambda x: x == "" or COLUMN.holds(x), '"", or one {column}')),
    "data.margins": one_of("", "small", "large"),
    "data.task": one_of("classification", "entailment", "similarity", "choice"),
    "data.first": FILLED,
    "data.second": FREE,
    "data.label": COLUMN,
    "data.classes": Rule(
        lambda x: isinstance(x, tuple) and all(map(NAMED.holds, x)) and len({*x}) == len(x) != 1,
        "a tuple of two different names or more, or () for none",
    ),
    **dict.fromkeys(("data.rank", "data.rating", "data.labels"), COLUMN),
    **dict.fromkeys(
        ("data.responses", "data.steps"),
        Rule(lambda x: TEXT.holds(x) and len(text.fields(x)) == 1, "a text with one {column}, of a list"),
    ),
    "data.chat": FLAG,
    "data.length": whole(2),  # the first token is predicted by nothing
    "data.source_length": ANY_COUNT,
    "prompts.source": TEXT,
    "prompts.count": ANY_COUNT,
    "prompts.template": FREE,
    "prompts.chat": FLAG,
    "prompts.length": COUNT,
    "prompt": TEXT,
    "chat": FLAG,
    "completion": TEXT,
    "draws": COUNT,
    **dict.fromkeys(("task.template", "task.pool", "task.rows"), NAMED),
    **dict.fromkeys(("task.pool_count", "task.count"), ANY_COUNT),
    "task.read": one_of("", "after", "number", "letter", "yes_no"),
    **dict.fromkeys(
        ("curve.shots", "curve.numbers"),
        Rule(lambda x: isinstance(x, tuple) and bool(x) and all(map(ANY_COUNT.holds, x)), "a tuple of whole numbers"),
    ),
    "curve.seeds": COUNT,
    "curve.rankings": Rule(
        lambda x: isinstance(x, tuple) and bool(x) and {*x} <= {"random", "balanced", "nearest"},
        "a tuple of random, balanced, nearest",
    ),
    "written": COUNT,
    **{f"beside.{made}_source": TEXT for made in ("soft", "seeds", "own")},
    **{
        f"beside.{made}.{key}": rule
        for made in ("sft", "grpo", "sft_grpo", "sft_thought")
        for key, rule in {"source": TEXT, "shots": ANY_COUNT, "thought": FLAG}.items()
    },
    **{f"search.{size}": COUNT for size in ("induced", "shown", "rephrased", "length", "dev", "rounds", "budget")},
    "search.temperature": NOT_NEGATIVE,
    **dict.fromkeys(("grow.rounds", "grow.requests", "grow.human", "grow.count", "examples.shots", "examples.most"), COUNT),
    "grow.model": ANY_COUNT,
    "grow.most": SHARE,
    **{"evaluate.source": NAMED, "evaluate.template": TEXT, "evaluate.written": COUNT},
    **{f"improve.{size}": COUNT for size in ("seeds", "rounds", "samples", "measured")},
    "improve.source": NAMED,
    "improve.temperature": NOT_NEGATIVE,
    "improve.methods": Rule(
        lambda x: isinstance(x, tuple) and bool(x) and {*x} <= METHODS.keys(), f"a tuple of {', '.join(METHODS)}"
    ),
    **dict.fromkeys(("task.prompt", "task.hint", "task.answer"), FILLED),
    "task.direct": FREE,
    **dict.fromkeys(("course.source", "course.asked", "templates"), NAMED),
    **{f"learners.{kind}_source": TEXT for kind in ("decoder", "encoder_decoder")},
    **{f"course.{size}": COUNT for size in ("count", "words", "held_out", "examples", "questions", "cap")},
    "course.temperature": ENDLESS,
    "measure": one_of("exact_match", "rouge_l"),
    "tasks": NAMED,
    "task": NAMED,
    **dict.fromkeys(("template", "data.pool", "data.beside", "evaluate.tasks"), TEXT),
    "evaluate.count": ANY_COUNT,
    **dict.fromkeys(("ours", "theirs", "pairs.key"), NAMED),
    **dict.fromkeys(("pairs.prompt", "pairs.answer", "pairs.first", "pairs.second"), FILLED),
    **dict.fromkeys(("pairs.source", "annotator"), NAMED),
    "pairs.count": ANY_COUNT,
    "port": whole(0, 65535),
    "reward": FLAG,
    "rank": one_of("in_order", "random", "balanced", "nearest"),
    "best_last": FLAG,
    "folder": TEXT,
    "limit": ANY_COUNT,
    "shots": maybe(ANY_COUNT),
    "length": ANY_COUNT,
    "batch": COUNT,
    "constraint.regex": TEXT,
    "constraint.answers": Rule(
        lambda x: isinstance(x, tuple) and all(map(NAMED.holds, x)), "a tuple of texts that are not empty, or () for none"
    ),
    "output": TEXT,
    "sample.length": COUNT,
    "sample.temperature": NOT_NEGATIVE,
    "sample.top_k": ANY_COUNT,
    "sample.slots": ANY_COUNT,
    "sample.top_p": number(lambda x: 0 < x <= 1, "a number above 0, up to 1 for all"),
    "gold.lexicon": TEXT,
    "annotator.temperature": POSITIVE,
    "normalise.before": POSITIVE,
    "normalise.after": maybe(POSITIVE),
    "environment.name": TEXT,
    "environment.turns": COUNT,
    "environment.passages": TEXT,
    "environment.length": COUNT,
    "unended.replace": maybe(FINITE),
    "unended.penalty": NOT_NEGATIVE,
    "advantage.gamma": SHARE,
    "advantage.lam": SHARE,
    "advantage.whiten_advantages": FLAG,
    "advantage.estimator": one_of("grpo", "dr_grpo", "rloo", "grpo_over_batch"),
    "advantage.overlong": ANY_COUNT,
    "kl.beta": NOT_NEGATIVE,
    "kl.target": POSITIVE,
    "kl.horizon": ENDLESS,
    "kl.limit": NOT_NEGATIVE,
    "objective.name": NAMED,
    "objective.beta": POSITIVE,
    "objective.noise": number(lambda x: 0 <= x < 0.5, "a number from 0, below 1/2"),
    "objective.theta": number(lambda x: x > 1, "a number above 1"),
    "objective.alpha": FINITE,
    "objective.gamma": FINITE,
    "objective.per_token": FLAG,
    **{f"objective.{which}_weight": NOT_NEGATIVE for which in ("nll", "lm", "odds", "desirable", "undesirable")},
    "objective.temperature": POSITIVE,
    "objective.label_smoothing": BELOW_1,
    "objective.z_loss": NOT_NEGATIVE,
    "objective.centring": NOT_NEGATIVE,
    "objective.clip_low": number(lambda x: 0 < x <= 1, "a number above 0, up to 1"),
    "objective.clip_high": POSITIVE,
    "objective.dual_clip": maybe(number(lambda x: x > 1, "a number above 1")),
    "objective.value_clip": POSITIVE,
    "objective.value_weight": NOT_NEGATIVE,
    "objective.entropy_weight": FINITE,
    "objective.aggregation": one_of("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_sum_const"),
    "objective.kl": one_of("k2", "k3", "exact"),
    "objective.kl_weight": NOT_NEGATIVE,
    "optim.learning_rate": NOT_NEGATIVE,
    "optim.warmup": ANY_COUNT,
    "optim.decay": one_of("linear", "cosine", "constant"),
    "optim.b1": BELOW_1,
    "optim.b2": BELOW_1,
    "optim.eps": POSITIVE,
    "optim.eps_placement": one_of("pytorch", "tensorflow"),
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.clip_norm": NOT_NEGATIVE,
    **{f"run.{size}": COUNT for size in ("steps", "iterations", "batch", "epochs", "minibatches", "accumulate", "members")},
    "run.on_policy": SHARE,
    "run.stop_kl": maybe(POSITIVE),
    "run.most_abstained": SHARE,
    **{f"run.{size}": COUNT for size in ("group", "reuse")},
    "run.rescore": FLAG,
    "run.importance_cap": number(lambda x: x >= 1, "a number from 1"),
    "run.critic": one_of("shared", "own"),
    "run.baseline": one_of("none", "mean", "leave_one_out", "greedy", "learned"),
    "run.dynamic_sampling": FLAG,
    "pretraining.source": NAMED,
    "pretraining.count": ANY_COUNT,
    "pretraining.template": FILLED,
    "pretraining.length": whole(2),
    "pretraining.weight": NOT_NEGATIVE,
    "guard.sigmas": NOT_NEGATIVE,
    "guard.window": COUNT,
    **{f"loop.{size}": COUNT for size in ("log_every", "save_every", "keep", "patience")},
    "loop.save_seconds": ENDLESS,
    "loop.keep_every": ANY_COUNT,
    "loop.best": TEXT,
    "loop.verify": FLAG,
    "loop.stuck_seconds": ENDLESS,
    "loop.sinks": Rule(
        lambda x: isinstance(x, tuple) and all(s in list(log.SINKS) for s in x), f"a tuple of {', '.join(log.SINKS)}"
    ),
    "evaluate.prompts": ANY_COUNT,
    "evaluate.every": ANY_COUNT,
    "evaluate.samples": ANY_COUNT,
    **{f"constitution.{file}": NAMED for file in ("principles", "examples", "preference", "red_team", "helpful")},
    "constitution.count": ANY_COUNT,
    **dict.fromkeys(("constitution.held_out", "rounds", "label.draws", "label.principles", "measure.principles"), COUNT),
    "label.orders": whole(1, 2),
    "label.thought": FLAG,
    **dict.fromkeys(("label.clamp", "agreement.clamp"), Rule(bounds, "a tuple of two numbers from 0 to 1, the lower one first")),
    **dict.fromkeys(("measure.sl_source", "measure.rl_source"), NAMED),
    "measure.safety": ANY_COUNT,
    "agreement.files": Rule(
        lambda x: isinstance(x, tuple) and bool(x) and all(map(NAMED.holds, x)), "a tuple of texts that are not empty"
    ),
    **dict.fromkeys(("agreement.count", "agreement.tokens", "agreement.thought"), COUNT),
    "method": NAMED,
    "learns": one_of("policy", "judge"),
    "world.temperature": POSITIVE,
    **dict.fromkeys(
        (
            "world.people",
            "sft.facts",
            "sft.looks",
            "rl.prompts",
            "rl.steps",
            *(f"{s}.{x}" for s in ("pretrain", "sft") for x in ("steps", "batch")),
        ),
        COUNT,
    ),
    **{f"{stage}.learning_rate": NOT_NEGATIVE for stage in ("pretrain", "sft", "rl")},
    "rl.group": whole(2),
    **dict.fromkeys(("known", "unknown"), SHARE),
    "tables": Rule(
        lambda x: isinstance(x, tuple) and len(x) > 1 and all(map(falling, x)),
        "a tuple of two tables or more, of five falling rewards",
    ),
    "world.beta": POSITIVE,
    "world.habit": POSITIVE,
    "world.fluency": NOT_NEGATIVE,
    **dict.fromkeys(("seeds", "compared.members"), whole(2)),
    **{f"proxy.{size}": COUNT for size in ("comparisons", "layers", "updates", "batch")},
    "proxy.width": WIDTH,
    "varied.width": several(WIDTH),
    "varied.comparisons": several(COUNT),
    **dict.fromkeys(("varied.temperature", "compared.penalties"), several(POSITIVE)),
    "compared.doubt": NOT_NEGATIVE,
    "compared.rounds": COUNT,
    "objective.distance_weight": NOT_NEGATIVE,
    "objective.cosine": FLAG,
    **{f"run.{size}": COUNT for size in ("updates", "looks", "examples")},
    **{f"tuned.{size}": COUNT for size in ("steps", "seeds", "points")},
    **dict.fromkeys(("tuned.rate", "tuned.most"), POSITIVE),
    **dict.fromkeys(("tuned.start", "tuned.range"), Rule(lambda x: many(x) and min(x) > 0, "a tuple of numbers above 0")),
    "tuned.name": NAMED,
    **dict.fromkeys(("run.labels", "crowd.annotators", "active.members"), COUNT),
    "run.seeds": whole(2),  # of one nothing says what chance does
    "crowd.levels": whole(2),
    **dict.fromkeys(("scales.spread", "tastes.disagreement"), Rule(lambda x: many(x) and min(x) >= 0, "a tuple of numbers from 0")),
    "length.bias": Rule(many, "a tuple of numbers"),
    **{
        f"noises.{noise}.{fault}": rule
        for noise in ("clear", "unsure", "sloppy", "divided")
        for fault, rule in (("temperature", POSITIVE), ("sloppiness", SHARE), ("disagreement", NOT_NEGATIVE))
    },
    **dict.fromkeys(("help.smoothing", "help.noise"), number(lambda x: 0 <= x < 0.5, "a number from 0, below 1/2")),
    "help.theta": number(lambda x: x > 1, "a number above 1"),
    "help.cuts": Rule(lambda x: many(x) and len(x) == 3 and sorted(x) == [*x], "a tuple of three numbers, the least first"),
    **dict.fromkeys(
        ("help.several", "active.counts"),
        Rule(lambda x: isinstance(x, tuple) and bool(x) and all(map(COUNT.holds, x)), "a tuple of whole numbers from 1"),
    ),
}
SWEPT = Rule(lambda x: x == () or many(x), "a tuple of numbers, or () for the one that is said elsewhere")


def check(config, **given):
    """Raises ValueError, naming the setting, its value and what it may be; the stages before the run included.

    A setting without a rule is for the function that takes it to check: an objective of one's own has its own.
    Args: given: devices, where the run is not for those of this machine.
    """
    stages = config.get("stages", {})
    for prefix, part in (("", config), *((f"stages.{name}.", stages[name]) for name in stages)):
        found = {name: x for name, x in log.flat(part.to_dict()).items() if not name.startswith("stages.")}
        for name, value in found.items():
            if name in RULES:
                _apply(RULES[name], prefix + name, value)
            elif name.startswith("sweep."):
                _swept(name.removeprefix("sweep."), value)
        if "model.source" in found:
            _together(found, prefix, **given)


def _apply(rule: Rule, name: str, value):
    try:
        wrong = "" if rule.holds(value) else f"it is {rule.says}"
    except ValueError as error:
        wrong = str(error)
    if wrong:
        raise ValueError(f"{name} = {text.brief(value)}: {wrong}")


def _swept(name: str, values):
    """Each number of a sweep is held to the rule of the setting that it stands for."""
    _apply(SWEPT, f"sweep.{name}", values)
    place = {"learning_rate": "optim.learning_rate", "kl_beta": "kl.beta", "seed": "seed"}.get(name, f"objective.{name}")
    for value in values:
        if place in RULES:
            _apply(RULES[place], f"sweep.{name}", value)


def _together(found: dict, prefix: str, **given):
    """What settings may be beside each other."""
    mesh = shard.make_mesh(**{axis: found[f"mesh.{axis}"] for axis in shard.AXES}, **given).shape
    name = "run.batch" if "run.batch" in found else "batch"
    batch = found[name]
    updates = {key: found[key] for key in ("run.minibatches", "run.accumulate") if key in found}
    if found.get("run.group", 1) > 1:
        updates["run.group"] = found["run.group"]
    for parts in (updates, {f"mesh.{axis}": mesh[axis] for axis in shard.ROWS}):
        if batch % (share := math.prod(parts.values())):
            told = " x ".join(f"{part} {size}" for part, size in parts.items())
            more = -(-batch // share) * share
            raise ValueError(f"{prefix}{name} = {batch}: it is a multiple of {told} = {share}, such as {more}")
    for section in ("model", "reward_model", "teacher_model", "feedback_model"):
        if mesh["sequence"] > 1 and found.get(f"{section}.attention", "ring") != "ring":
            raise ValueError(f"{prefix}{section}.attention = {found[f'{section}.attention']}: with mesh.sequence > 1 it is ring")
    if found["model.source"] == "scratch" and found.get("adapter.kind", "none") != "none":
        raise ValueError(f"{prefix}adapter.kind = {found['adapter.kind']}: a model from scratch has nothing to adapt")
    if found.get("adapter.source") and found["adapter.kind"] == "none":
        raise ValueError(f"{prefix}adapter.source = {found['adapter.source']}: adapter.kind says which it is, to train it on")
    if found["model.source"] == "scratch" and "scratch.architecture.kv_heads" in found:  # a decoder's
        heads, kv_heads, head_dim = (found[f"scratch.architecture.{size}"] for size in ("heads", "kv_heads", "head_dim"))
        if heads % kv_heads:
            raise ValueError(f"{prefix}scratch.architecture.kv_heads = {kv_heads}: it divides heads = {heads}")
        if head_dim % 2:
            raise ValueError(f"{prefix}scratch.architecture.head_dim = {head_dim}: it is even")
    if "kl.limit" in found and found["kl.limit"] * batch >= found["kl.horizon"]:
        raise ValueError(
            f"{prefix}kl.horizon = {found['kl.horizon']:g}: it is above kl.limit x {name} = {found['kl.limit'] * batch:g}, or one "
            f"step could take the price of KL below 0"
        )
    compares = "advantage.estimator" in found or found.get("run.baseline") == "leave_one_out"
    if compares and found["run.group"] < 2:
        raise ValueError(f"{prefix}run.group = {found['run.group']}: samples of a prompt are compared, so they are two or more")
    if found.get("run.critic") == "own" and found["adapter.kind"] != "none":
        kind = found["adapter.kind"]
        raise ValueError(f"{prefix}run.critic = own trains a whole model, and adapter.kind = {kind} a part of one: take shared")
    if found.get("run.critic") == "own" and found["environment.name"]:
        raise ValueError(f"{prefix}run.critic = own starts as the reward model, which an environment has not: take shared")
    if found.get("objective.name") == "jsd" and found["objective.beta"] >= 1:
        raise ValueError(f"{prefix}objective.beta = {found['objective.beta']:g}: of jsd it is a share, above 0 and below 1")
    if "kl.limit" in found and not found["sample.temperature"]:
        raise ValueError(f"{prefix}sample.temperature = 0: a policy that learns from its samples draws them, so it is above 0")
