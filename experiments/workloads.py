"""What experiments.benchmark measures: tasks on models of random weights, and what each needs at least.

Model FLOPs are the least that a task needs: 2 x weights x tokens forward, 3 x that for an update, attention in full, nothing
twice. Everything is float32, on one device, every length fixed.
"""

import itertools
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import keys, rollout, score, shard
from jaxalign.data import tables, text
from jaxalign.models import decoder
from jaxalign.objectives import online, preference, reward, supervised
from jaxalign.ops import advantages
from jaxalign.sample import sample
from jaxalign.train import optim
from jaxalign.train.step import make_step
from jaxalign.types import Batch, Pairs, Rollout, TrainState

SHAPES = {  # S: small; M: SmolLM2-135M's; tiny: shows in seconds that all runs
    "tiny": {"layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 32, "vocab": 64, "tied": True},
    "S": {"layers": 4, "width": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "mlp": 1024, "vocab": 8192, "tied": False},
    "M": {"layers": 30, "width": 576, "heads": 9, "kv_heads": 3, "head_dim": 64, "mlp": 1536, "vocab": 49152, "tied": True},
}
SIZES = {  # rows or pairs, tokens before the first target, tokens from there on; GRPO's rows are groups of 4 samples
    "tiny": {
        "sft": (2, 0, 8),
        "ragged": (1, 0, 512),
        "rm": (1, 4, 4),
        "dpo": (1, 4, 4),
        "gen": (2, 4, 4),
        "ppo": (4, 4, 4),
        "grpo": (4, 4, 4),
    },
    "S": {
        "sft": (8, 0, 256),
        "ragged": (4, 0, 512),
        "rm": (4, 128, 128),
        "dpo": (4, 128, 128),
        "gen": (8, 64, 64),
        "ppo": (32, 64, 64),
        "grpo": (32, 64, 64),
    },
    "M": {
        "sft": (2, 0, 256),
        "ragged": (1, 0, 512),
        "rm": (1, 128, 128),
        "dpo": (1, 128, 128),
        "gen": (4, 32, 32),
        "ppo": (8, 64, 64),
        "grpo": (32, 64, 64),
    },
}
LIKE = {"score": "ppo", "update": "ppo"}  # parts of a PPO iteration alone: log-probabilities, and the update of policy and critic
GROUP = 4


# --------------------------------------------------------- what a task needs


def size_of(task: str, shape: str):
    return SIZES[shape][LIKE.get(task, task)]


def forward_flops(shape: str, rows: int, tokens: int, *, head_tokens: int | None = None) -> float:
    """2 x weights x tokens, and attention of each token to every one. Args: head_tokens: that logits are computed of; None: all."""
    s = SHAPES[shape]
    q, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    body = s["layers"] * s["width"] * (2 * q + 2 * kv + 3 * s["mlp"])
    head = s["vocab"] * s["width"] * (tokens if head_tokens is None else head_tokens)
    return rows * (2 * body * tokens + 2 * head + s["layers"] * 4 * q * tokens**2)


def decode_work(shape: str, rows: int, prompt: int, new: int) -> tuple[float, float]:
    """FLOPs of prefill and decoding; bytes that decoding reads at least: weights and what is filled of the cache, once a step."""
    s = SHAPES[shape]
    weights = forward_flops(shape, 1, 1) / 2 - s["layers"] * 2 * s["heads"] * s["head_dim"]
    filled = [prompt + i for i in range(1, new)]
    flops = forward_flops(shape, rows, prompt, head_tokens=1)
    flops += sum(rows * (2 * weights + s["layers"] * 4 * s["heads"] * s["head_dim"] * n) for n in filled)
    read = sum(4 * (weights + rows * 2 * s["layers"] * s["kv_heads"] * s["head_dim"] * n) for n in filled)
    return flops, read


def flops_of(task: str, shape: str) -> float:
    """Of one step. A whole iteration samples, scores by the reference (PPO: and by critic and reward model), and updates."""
    rows, prompt, new = size_of(task, shape)
    rows *= 2 if task in ("rm", "dpo") else 1
    lm = forward_flops(shape, rows, prompt + new)
    scalar = forward_flops(shape, rows, prompt + new, head_tokens=0)
    drawn = decode_work(shape, rows, prompt, new)[0]
    return {
        "sft": 3 * lm,
        "ragged": 3 * scalar,  # few of its tokens have logits
        "rm": 3 * scalar,
        "dpo": 4 * lm,  # with the reference's
        "update": 3 * (lm + scalar),
        "score": lm,
        "gen": drawn,
        "ppo": drawn + 4 * lm + 5 * scalar,
        "grpo": drawn + 4 * lm,
    }[task]


def tokens_of(task: str, shape: str) -> int:
    """Tokens that a step learns from or scores, of `gen` those that it draws."""
    rows, prompt, new = size_of(task, shape)
    return rows * {"gen": new, "rm": 2 * (prompt + new), "dpo": 2 * (prompt + new)}.get(task, prompt + new)


# --------------------------------------------------------- the tasks


class Bench:
    """Each method that a task names makes what it needs, and returns () -> arrays to wait for: one step.

    spans: seconds of the parts of the last whole iteration; targets: tokens a step that are learned, where it is not all.
    """

    def __init__(self, shape: str, size, documents: list[dict] = ()):
        """Args: documents: of `ragged`: prompt and completion, lists of ids."""
        self.mesh = shard.make_mesh(devices=jax.devices()[:1])
        self.vocab, self.draws = SHAPES[shape]["vocab"], np.random.default_rng(0)
        self.config = partial(decoder.DecoderConfig, **SHAPES[shape], context=512)
        self.rows, self.prompt, self.new = size
        self.plain, self.scalar = decoder.build(self.config()), decoder.build(self.config(scalar=0.02))
        self.spans, self.drawn, self.targets, self.documents = {}, 0, None, documents

    def params(self, model, seed: int = 0):
        return shard.create(model.init, self.mesh, jax.random.key(seed))[0]

    def compiled(self, function):
        return shard.on_mesh(jax.jit(function), self.mesh)

    def batch(self):
        length = self.prompt + self.new
        tokens = self.draws.integers(3, self.vocab, (self.rows, length)).astype(np.int32)
        weights = np.broadcast_to(np.arange(length) >= self.prompt, tokens.shape).astype(np.float32)
        return shard.place(Batch(tokens, np.ones_like(tokens), weights), self.mesh)

    def updates(self, objective, model):
        """-> (data) -> metrics of one update more."""
        tx = optim.adam(learning_rate=1e-5, steps=10**6, decay="constant", clip_norm=0.0)

        def make(key):
            params = model.init(key)
            return TrainState(jnp.int32(0), params, tx.init(params))

        state, where = shard.create(make, self.mesh, jax.random.key(0))
        self.state, step = state, shard.compile_step(make_step(partial(objective, model=model), tx), self.mesh, where)

        def update(data):
            self.state, metrics = step(self.state, data)
            return self.state, metrics

        return update

    def sft(self):
        return partial(self.updates(supervised.sft, self.plain), self.batch())

    def ragged(self):
        """SFT on documents, prompts masked, whole ones packed in rows: each step on others."""
        kept = [one for one in self.documents if len(one["prompt"] + one["completion"]) <= self.new]
        ids = [{side: [n % self.vocab for n in one[side]] for side in ("prompt", "completion")} for one in kept]
        rows = tables.pack([text.of_ids(**one, vocab=self.vocab) for one in ids], self.new)
        batches = []
        for step in range(len(rows) // self.rows):
            numbers = tables.order(len(rows), self.rows, seed=0, step=step)
            batches.append(tables.pack_rows([rows[n] for n in numbers], self.new))
        self.targets = float(np.mean([(batch.weights > 0).sum() for batch in batches]))
        update, turn = self.updates(supervised.sft, self.plain), itertools.cycle(batches)
        return lambda: update(shard.place(next(turn), self.mesh))

    def pairs(self):
        return Pairs(self.batch(), self.batch(), *shard.place([np.zeros(self.rows, np.float32)] * 3, self.mesh))

    def rm(self):
        return partial(self.updates(reward.pairwise, self.scalar), self.pairs())

    def dpo(self):
        """The reference's log-probabilities, and the update."""
        params, pairs = self.params(self.plain), self.pairs()
        refer = self.compiled(partial(preference.with_reference, model=self.plain))
        update = self.updates(preference.dpo, self.plain)
        return lambda: update(refer(params, pairs))

    def update(self):
        """Of a policy and a critic of the same shape, in one backward pass."""
        batch = self.batch()
        floats = [shard.place(self.draws.normal(size=batch.tokens.shape).astype(np.float32), self.mesh) for _ in range(6)]
        update = self.updates(online.ppo, rollout.with_critic(self.plain, self.scalar))
        return partial(update, Rollout(batch, *floats, score=shard.place(np.zeros(self.rows, np.float32), self.mesh)))

    def score(self):
        params, batch = self.params(self.plain), self.batch()
        say = self.compiled(lambda params, batch: score.evaluate(self.plain, params, batch)[0].logp)
        return lambda: say(params, batch)

    def sampler(self, model, group: int = 1):
        """-> (params) -> (Batch, logp, drawn_logp), other draws each time, of the same prompts, `group` of each."""
        draw = self.compiled(partial(sample, model, length=self.new, eos=-1))
        asked = self.draws.integers(3, self.vocab, (self.rows // group, self.prompt)).astype(np.int32)
        prompts = shard.place(Batch(asked, np.ones_like(asked), np.zeros(asked.shape, np.float32)), self.mesh)

        def run(params):
            self.drawn += 1
            return draw(params, keys.of_rows(keys.key(0, "sample", self.drawn), np.arange(self.rows)), prompts)

        return run

    def gen(self):
        params, draw = self.params(self.plain), self.sampler(self.plain)
        return lambda: draw(params)

    def timed(self, name, out):
        """`out`, there: and how long it took since the last part."""
        jax.block_until_ready(out)
        now = time.perf_counter()
        self.spans[name], self.since = now - self.since, now
        return out

    def ppo(self):
        """Sampling, whose log-probabilities are the old ones; reference, values and rewards; one update of policy and critic."""
        model = rollout.with_critic(self.plain, self.scalar)
        update, draw = self.updates(online.ppo, model), self.sampler(model)
        reference, judge = self.params(self.plain), self.params(self.scalar, 1)

        @self.compiled
        def assess(critic, reference, judge, batch, logp):
            ref_logp = score.evaluate(self.plain, reference, batch)[0].logp
            value = score.evaluate(self.scalar, critic, batch)[1]
            scores = score.last_scalar(self.scalar, judge, batch)
            return rollout.assemble(batch, logp, ref_logp, value, scores, 0.05)

        def iteration():
            self.since = time.perf_counter()
            batch, logp, _ = self.timed("sample", draw(self.state.params))
            rolled = self.timed("score", assess(self.state.params["critic"], reference, judge, batch, logp))
            return self.timed("update", update(rolled))

        return iteration

    def grpo(self):
        """Groups of 4, rewards by a function of Python, a KL to the reference of weight 0.04 in the loss. A prompt is read once."""
        model = self.plain.sharing(GROUP, self.prompt)
        update = self.updates(partial(online.grpo, kl_weight=0.04), model)
        draw, reference = self.sampler(self.plain, GROUP), self.params(self.plain)

        @self.compiled
        def refer(reference, batch):
            return score.evaluate(model, reference, batch)[0].logp

        @self.compiled
        def assemble(batch, logp, ref_logp, scores):
            value = jnp.zeros_like(logp)
            return rollout.assemble_groups(batch, logp, ref_logp, value, scores, 0.0, group=GROUP, estimator=advantages.grpo)

        def iteration():
            self.since = time.perf_counter()
            batch, logp, _ = self.timed("sample", draw(self.state.params))
            ref_logp = self.timed("score", refer(reference, batch))
            scores = np.array([len(set(row.tolist())) for row in shard.fetch(batch.tokens)], np.float32)
            rolled = self.timed("reward", assemble(batch, logp, ref_logp, shard.place(scores, self.mesh)))
            return self.timed("update", update(rolled))

        return iteration
