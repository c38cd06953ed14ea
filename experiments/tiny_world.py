"""A world so small that everything is known of it: 36 prompts of two words, 259 responses to each, of up to three tokens.

Language, gold reward and annotators are drawn from a seed, by pure functions. So an experiment in it is one as well: `vmap` runs
it for many settings at once (experiments/sweep.py), and it has derivatives (experiments/hypergradient.py). Gold reward and KL
are sums over all responses, without sampling error, and what the best policy could have is known (`frontier`).

P prompts, the last HELD_OUT of which no objective learns from; S responses; B rows of an update.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import keys, models, oracle, score, shard
from jaxalign.objectives import distill, preference, reward, supervised
from jaxalign.ops import divergences
from jaxalign.ops.masked import masked_sum
from jaxalign.train import optim
from jaxalign.train.step import make_step
from jaxalign.types import Array, Batch, Pairs, TrainState

VOCAB, EOS, LENGTH, ANNOTATORS = 7, 0, 3, 3
MODEL = models.build(
    models.DecoderConfig(VOCAB, layers=1, width=32, heads=2, kv_heads=2, head_dim=16, mlp=64, context=8, tied=False, scalar=0.0)
)
WORDS = range(1, VOCAB)
PROMPTS = sorted(((a, b) for a in WORDS for b in WORDS), key=lambda prompt: sum(prompt) % 3 == 0)
HELD_OUT = sum(sum(prompt) % 3 == 0 for prompt in PROMPTS)  # of words that are all seen in other prompts
ROWS = jax.tree.map(  # Batch of [P,S,T]
    lambda *x: np.stack(x), *(oracle.responses(prompt, vocab=VOCAB, length=LENGTH, eos=EOS) for prompt in PROMPTS)
)
PROMPT_NUMBER = np.zeros((VOCAB, VOCAB), np.int32)
PROMPT_NUMBER[tuple(np.array(PROMPTS).T)] = np.arange(len(PROMPTS))
PLACES = VOCAB ** np.arange(LENGTH)[::-1]
RESPONSE_NUMBER = np.zeros(VOCAB**LENGTH, np.int32)
RESPONSE_NUMBER[ROWS.tokens[0, :, -LENGTH:] @ PLACES] = np.arange(ROWS.tokens.shape[1])


class World(NamedTuple):
    seed: Any
    temperature: Any  # of the annotators, in units of gold
    ref: Any  # parameters of MODEL, which has learnt the language
    ref_logp: Array  # f32 [P,S] nats
    gold: Array  # f32 [P,S]; of the reference's responses the mean is 0, and the std 1
    best_logp: Array  # f32 [P,S] nats, of ref exp(gold/beta)/Z: who writes demonstrations, and the teacher
    reward: Array  # f32 [P,S], what online methods learn from: gold, or a proxy of it


def make(seed, *, temperature: float, beta: float, habit: float = 1.0, fluency: float = 0.0) -> World:
    """The world of a seed.

    Args: temperature, of Bradley and Terry's annotators; beta, the demonstrators' price of a nat; habit, std of the language's
    log-odds of words; fluency, how much of gold is log p of the reference, in std beside the std of all else.
    """
    everything = all_rows()
    tokens, targets = everything.tokens, everything.weights
    before = score.shift(tokens.reshape(-1, tokens.shape[-1])).reshape(tokens.shape)
    habits, mood, taste = jax.random.normal(keys.key(seed, "init", 0), (3, VOCAB, VOCAB))
    language = jax.nn.log_softmax((targets * habit * habits[before, tokens]).sum(-1))
    words = targets * (tokens != EOS)
    gold = (words * (mood[tokens[..., :1], tokens] + taste[before, tokens])).sum(-1)

    tx = optim.adam(learning_rate=1e-2, steps=200)
    step = make_step(partial(supervised.sft, model=MODEL), tx)

    def learn(state, i):
        prompts_key, key = jax.random.split(keys.key(seed, "init", 1, i))
        prompts = jax.random.randint(prompts_key, (128,), 0, len(PROMPTS))
        return step(state, rows(prompts, jax.random.categorical(key, language[prompts])))[0], None

    params = shard.unbox(MODEL.init(keys.key(seed, "init", 2)))
    ref = jax.lax.scan(learn, TrainState(jnp.int32(0), params, tx.init(params)), jnp.arange(200))[0].params
    ref_logp = log_probs(ref, everything)
    p = jnp.exp(ref_logp) / len(PROMPTS)
    gold = standard(standard(gold, p) + fluency * standard(ref_logp, p), p)
    return World(seed, temperature, ref, ref_logp, gold, oracle.optimum(ref_logp, gold, beta)[0], gold)


def standard(x, p):
    """x - mean, over its std, by a law p of the same shape."""
    off = x - (p * x).sum()
    return off / jnp.sqrt((p * off**2).sum())


def of_seeds(seeds, **settings) -> World:
    """The worlds of these seeds, by one program. -> World of leaves [N,...]. Args: settings: of `make`."""
    return jax.jit(jax.vmap(partial(make, **settings)))(jnp.asarray(seeds, jnp.uint32))


def rows(prompts, responses) -> Batch:
    """The responses of these numbers to the prompts of these. -> Batch [...,T]"""
    return jax.tree.map(lambda x: x[prompts, responses], all_rows())


def all_rows() -> Batch:
    """ROWS, as arrays that the compiler takes for data: it would spend seconds on computing with constants."""
    return jax.lax.optimization_barrier(jax.tree.map(jnp.asarray, ROWS))


def log_probs(params, batch: Batch):
    """log p of every response: f32 [...] of a Batch [...,T]"""
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
    return oracle.log_probs(MODEL, params, flat).reshape(batch.tokens.shape[:-1])


def reward_of(world: World, batch: Batch):
    """The reward of rows that were sampled. -> f32 [B]"""
    start = batch.tokens.shape[1] - LENGTH
    prompts = jnp.asarray(PROMPT_NUMBER)[batch.tokens[:, start - 2], batch.tokens[:, start - 1]]
    return world.reward[prompts, jnp.asarray(RESPONSE_NUMBER)[batch.tokens[:, start:] @ PLACES]]


# --------------------------------------------------------- what objectives learn from


class Examples(NamedTuple):
    prompts: Array  # i32 [B]
    responses: Array  # i32 [B,K]
    opinions: Array  # f32 [B,ANNOTATORS,K]: gold and Gumbel noise, whose order is Bradley and Terry's, and Plackett and Luce's


def examples(world: World, numbers, many: int, logp=None) -> Examples:
    """K responses to a prompt, of the reference or of these log-probabilities, and what annotators think of them.

    All of it is a function of (seed, number of the example), so that a data set is a range of numbers.
    """
    logp = world.ref_logp if logp is None else logp

    def one(number):
        prompt = number % (len(PROMPTS) - HELD_OUT)
        responses = jax.random.categorical(keys.key(world.seed, "compare", number), logp[prompt], shape=(many,))
        noise = jax.random.gumbel(keys.key(world.seed, "annotate", number), (ANNOTATORS, many))
        return Examples(prompt, responses, world.gold[prompt, responses][None] + world.temperature * noise)

    return jax.vmap(one)(numbers)


def demonstrations(world: World, params, numbers) -> Batch:
    found = examples(world, numbers, 1, world.best_logp)
    return rows(found.prompts, found.responses[:, 0])


def taught(world: World, params, numbers) -> distill.Taught:
    """Demonstrations, and the best policy's distribution of every token: how likely all responses are that go on with it."""
    found = examples(world, numbers, 1, world.best_logp)
    batch = rows(found.prompts, found.responses[:, 0])
    answers = batch.tokens[:, -LENGTH:]
    same = (answers[:, None] == ROWS.tokens[0, None, :, -LENGTH:]).astype(jnp.int32)  # [B,S,LENGTH]
    reached = jnp.cumprod(jnp.pad(same[:, :, :-1], ((0, 0), (0, 0), (1, 0)), constant_values=1), axis=-1) > 0
    token = jax.nn.one_hot(ROWS.tokens[0, :, -LENGTH:], VOCAB)  # [S,LENGTH,V]
    law = jnp.where(reached, world.best_logp[found.prompts][:, :, None], -jnp.inf)
    logp = jax.nn.logsumexp(jnp.where(token[None] > 0, law[..., None], -1e30), axis=1)
    logp = jnp.pad(jax.nn.log_softmax(logp), ((0, 0), (batch.tokens.shape[1] - LENGTH, 0), (0, 0)))
    ids = jnp.argsort(-logp, axis=-1)
    return distill.Taught(batch, ids, jnp.take_along_axis(logp, ids, axis=-1))


def classified(world: World, params, numbers) -> supervised.Classified:
    """Whether an annotator finds a response better than the reference's usual ones."""
    found = examples(world, numbers, 1)
    return supervised.Classified((rows(found.prompts, found.responses[:, 0]),), _liked(world, found).astype(jnp.int32))


def _liked(world: World, found: Examples):
    return found.opinions[:, 0, 0] > world.temperature * np.euler_gamma  # the mean of the noise


def choices(world: World, params, numbers) -> supervised.Classified:
    found = examples(world, numbers, 4)
    texts = tuple(rows(found.prompts, found.responses[:, k]) for k in range(4))
    return supervised.Classified(texts, found.opinions[:, 0].argmax(1))


def pairs(world: World, params, numbers, *, graded: bool = False) -> Pairs:
    """Args: graded: the annotator says by how much."""
    found = examples(world, numbers, 2)
    opinion = found.opinions[:, 0]
    first = opinion[:, 0] > opinion[:, 1]
    chosen, rejected = (jnp.where(which, *found.responses.T) for which in (first, ~first))
    margin = jnp.abs(opinion[:, 0] - opinion[:, 1]) * graded
    ref = (world.ref_logp[found.prompts, side] for side in (chosen, rejected))
    return Pairs(rows(found.prompts, chosen), rows(found.prompts, rejected), margin, *ref)


def judged(world: World, params, numbers) -> reward.Judged:
    found = examples(world, numbers, 2)
    ahead = (found.opinions[..., 0] - found.opinions[..., 1]) / world.temperature
    tied = jnp.abs(ahead) < 0.4  # log 1.5, of which the objective of ties is told
    sides = (rows(found.prompts, side) for side in found.responses.T)
    return reward.Judged(*sides, ((ahead > 0) & ~tied).mean(1), tied.mean(1))


def ranked(world: World, params, numbers) -> reward.Ranked:
    found = examples(world, numbers, 4)
    rank = jnp.argsort(jnp.argsort(-found.opinions[:, 0], axis=1), axis=1)
    return reward.Ranked(tuple(rows(found.prompts, found.responses[:, k]) for k in range(4)), rank)


def rated(world: World, params, numbers) -> reward.Rated:
    found = examples(world, numbers, 1)
    return reward.Rated(rows(found.prompts, found.responses[:, 0]), found.opinions[:, 0, 0])


def labelled(world: World, params, numbers) -> preference.Labelled:
    """Which responses somebody found good, and KTO's z0 by the policy as it is now."""
    found = examples(world, numbers, 1)
    batch = rows(found.prompts, found.responses[:, 0])
    z0 = preference.kto_baseline(params, world.ref, preference.mismatch(batch, length=batch.tokens.shape[1]), model=MODEL)
    ref_logp = world.ref_logp[found.prompts, found.responses[:, 0]]
    return preference.Labelled(batch, _liked(world, found), ref_logp, jnp.broadcast_to(z0, ref_logp.shape))


BY_TYPE = {
    Batch: demonstrations,
    distill.Taught: taught,
    supervised.Classified: classified,
    Pairs: pairs,
    reward.Judged: judged,
    reward.Ranked: ranked,
    reward.Rated: rated,
    preference.Labelled: labelled,
}
BY_NAME = {"choose": choices, "difference": partial(pairs, graded=True)}  # objectives that want another kind of their type


# --------------------------------------------------------- what came of it, on held-out prompts


def class_head() -> dict:
    """What `classify` reads beside the model, of two classes."""
    return shard.unbox(supervised.class_head(jax.random.key(0), MODEL.config.width, 2))


def of_policy(world: World, params) -> dict:
    """Expected gold reward, in std of the reference's; KL from the reference, nats a response."""
    return _outcome(world, log_probs(params, _held_out()))


def of_judge(world: World, params) -> dict:
    """What the policy has that is best by this judge, at the KL of the demonstrators; and how often the judge is right."""
    return of_scores(world, scores_of(params, _held_out()))


def of_scores(world: World, scores) -> dict:
    """The same of anybody's scores, f32 [HELD_OUT,S]."""
    return _outcome(world, best_by(world, scores)) | {"judge/accuracy": accuracy(world, scores)}


def scores_of(params, batch: Batch):
    """A judge's scores, f32 [...] of a Batch [...,T]: params["classes"], where it has it, else the scalar head."""
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
    if "classes" in params:
        hidden, _ = MODEL.read(params, flat)
        scores = score.last_of(hidden, flat.segments) @ (params["classes"]["kernel"] @ jnp.array([-1.0, 1.0]))
    else:
        scores = score.last_scalar(MODEL, params, flat)
    return scores.reshape(batch.tokens.shape[:-1])


def best_by(world: World, scores):
    """log p [HELD_OUT,S] of the policy that is best by these scores: ref exp(score/beta)/Z at the KL of the demonstrators."""
    ref_logp = world.ref_logp[-HELD_OUT:]
    wanted = divergences.kl(world.best_logp[-HELD_OUT:], ref_logp).mean()

    def closer(_, bounds):  # KL falls with beta: bisection of log beta
        middle = bounds.mean()
        kl = divergences.kl(oracle.optimum(ref_logp, scores, jnp.exp(middle))[0], ref_logp).mean()
        return jnp.where(kl > wanted, jnp.stack([middle, bounds[1]]), jnp.stack([bounds[0], middle]))

    bounds = jax.lax.fori_loop(0, 40, closer, jnp.log(jnp.array([1e-4, 1e4])))
    return oracle.optimum(ref_logp, scores, jnp.exp(bounds.mean()))[0]


def accuracy(world: World, scores):
    """How often scores [HELD_OUT,S] are right about two of the reference's responses; a tie counts half. -> f32 []"""
    ref_logp, gold = world.ref_logp[-HELD_OUT:], world.gold[-HELD_OUT:]
    either = jnp.exp(ref_logp[:, :, None] + ref_logp[:, None, :])
    ahead, truly = (jnp.sign(x[:, :, None] - x[:, None, :]) for x in (scores, gold))
    return (either * (truly != 0) * 0.5 * (1 + ahead * truly)).sum() / (either * (truly != 0)).sum()


def _held_out() -> Batch:
    return jax.tree.map(lambda x: x[-HELD_OUT:], all_rows())


def _outcome(world: World, logp) -> dict:
    gold = masked_sum(world.gold[-HELD_OUT:], jnp.exp(logp), -1).mean()
    return {"gold/held_out": gold, "kl/held_out": divergences.kl(logp, world.ref_logp[-HELD_OUT:]).mean()}


def frontier(world: World, betas) -> dict:
    """The outcome of the best policy for each price of KL: no policy has more gold at its KL. -> f32 [N] each"""
    laws = [x[-HELD_OUT:] for x in (world.ref_logp, world.gold)]
    return jax.vmap(lambda beta: _outcome(world, oracle.optimum(*laws, beta)[0]))(betas)
