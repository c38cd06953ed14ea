"""Comparisons by people: a page on this machine with two responses to a prompt, of which one is preferred by a key.

python -m experiments.label --config=configs/label.py         the pairs of experiments.compare, instead of its simulated annotator
python -m experiments.label --config=configs/label.py:hh      the answers of Anthropic's harmless-base
python -m experiments.label --config=configs/label.py:judge   two models' answers, those that experiments.judge has put together

Keys: 1 or left, 2 or right, 0 or space for a tie; with shift, or behind +, "significantly better", behind - "slightly better"; s
skips, u takes the last label back. A reward model learns from what it leaves, here also from by how much:

python -m experiments.reward --config=configs/reward.py --config.data.source=runs/label --config.data.held_out=8 \
    --config.data.margin="{how_much}" --config.data.margins=small

Result: 30 pairs of compare:tiny, preferred by their gold scores in a scripted browser, in 3.5 s: 0.87 ± 0.06 as the simulated
annotator says, 0.50 ± 0.09 in place 1.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "compare") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of which response stands in place 1, for each annotator and pair
    config.pairs = {
        "source": "runs/compare",  # a folder that experiments.compare left, or rows of a prompt and two responses
        "count": 0,  # rows; 0: all
        "prompt": "{prompt}",
        "first": "{chosen}",
        "second": "{rejected}",
    }
    config.annotator = "me"  # who labels now; each sees all pairs
    config.port = 0  # of the address; 0: any that is free
    return VARIANTS[variant](config)


def compare(config):
    return config


def hh(config):
    config.pairs.source = "../shared/data/preferences/hh_harmless_dev.jsonl"
    return config


def judge(config):
    config.pairs.update(source="runs/judge/records.jsonl", prompt="{question}", first="{ours}", second="{theirs}")
    return config


VARIANTS = {"compare": compare, "hh": hh, "judge": judge}
