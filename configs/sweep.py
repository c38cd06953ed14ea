"""Any objective in the tiny world, over seeds, learning rates and its own numbers: one compiled program.

python -m experiments.sweep --config=configs/sweep.py:dpo
python -m experiments.sweep --config=configs/sweep.py:dpo --config.sweep.beta="(0.03, 0.1, 0.3)"

A variant for every objective; OBJECTIVES.md has what comes of each.
"""

from ml_collections import ConfigDict

from configs import cispo, grpo, gspo, online_dpo, ppo, ppo_ptx, preference, reinforce, reward, rloo

OFFLINE = {  # method: the numbers that it takes
    "supervised.sft": {"label_smoothing": 0.0, "z_loss": 0.0},
    "supervised.semantic_sft": {"distance_weight": 1.0, "cosine": False},
    "supervised.classify": {"lm_weight": 0.5},
    "supervised.choose": {"lm_weight": 0.5},
    "distill.forward_kl": {"temperature": 1.0, "nll_weight": 0.0},
    "distill.reverse_kl": {"temperature": 1.0, "nll_weight": 0.0},
    "distill.jsd": {"beta": 0.5, "temperature": 1.0, "nll_weight": 0.0},
    **{f"reward.{name}": hyper for name, hyper in reward.OBJECTIVES.items() if name != "process"},  # there are no steps
    **{f"preference.{name}": hyper for name, hyper in preference.OBJECTIVES.items()},
}
ONLINE = {  # name: the method, its program's config
    "reinforce": ("reinforce", reinforce.get_config()),
    "remax": ("reinforce", reinforce.get_config("remax")),
    "ppo": ("ppo", ppo.get_config()),
    "ppo_ptx": ("ppo_ptx", ppo_ptx.get_config()),
    "grpo": ("grpo", grpo.get_config()),
    "dr_grpo": ("grpo", grpo.get_config("dr_grpo")),
    "dapo": ("grpo", grpo.get_config("dapo")),
    "gspo": ("gspo", gspo.get_config()),
    "rloo": ("rloo", rloo.get_config()),
    "cispo": ("cispo", cispo.get_config()),
    "online_dpo": ("online_dpo", online_dpo.get_config()),
}
VARIANTS = {method.partition(".")[2]: method for method in OFFLINE} | {name: method for name, (method, _) in ONLINE.items()}


def get_config(variant: str = "dpo") -> ConfigDict:
    config = ConfigDict()
    config.method = VARIANTS[variant]  # MODULE.FUNCTION of jaxalign/objectives, or a program of ONLINE
    judges = config.method.startswith("reward.") or variant in ("classify", "choose")
    config.learns = "judge" if judges else "policy"  # whether a reward is learnt, which is then judged by its best policy
    config.world = {"temperature": 0.7, "beta": 0.5}  # of the annotators, in std of gold; price of a nat to the demonstrators
    config.optim = {
        "learning_rate": 3e-3,
        "warmup": 0,
        "decay": "linear",
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "eps_placement": "pytorch",
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    # looks: at what held-out prompts come to, beside that before
    config.run = {"updates": 240, "batch": 64, "looks": 10}
    if variant in ONLINE:
        online(config, ONLINE[variant][1])
    else:
        config.objective = OFFLINE[config.method]
        config.run.examples = 2048  # in the data set
    numbers = [name for name, x in config.objective.items() if isinstance(x, float)]
    config.sweep = {"seed": (0, 1, 2, 3, 4), **{name: () for name in ("learning_rate", *numbers)}}  # (): that which is said above
    if variant in ONLINE:
        config.sweep.kl_beta = ()
    return config


def online(config, program):
    """What the program's config says of the algorithm, on responses of three tokens."""
    for section in ("advantage", "objective"):
        if section in program:
            config[section] = program[section]
    config.sample = {"length": 3, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "slots": 0}
    config.kl = {"beta": program.kl.beta}  # price of a nat; it stays
    names = ("group", "epochs", "minibatches", "stop_kl", "critic", "baseline", "dynamic_sampling")
    config.run.update({name: program.run[name] for name in names if name in program.run})
    if config.get("advantage", {}).get("overlong"):
        config.advantage.overlong = 1
    if "pretraining" in program:
        config.pretraining = {"weight": program.pretraining.weight}  # of demonstrations
