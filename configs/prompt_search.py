"""A better instruction for a task, found by the model itself, and virtual tokens beside it.

python -m experiments.prompt_search --config=configs/prompt_search.py     the sentiment of sentences from film reviews

Any task has a template (jaxalign.prompts.template.load) and rows:
--config.task.template=FILE.json --config.task.pool=FILE.jsonl --config.task.rows=FILE.jsonl

Results, seed 0, SmolLM2-135M-Instruct, 13 min on 2 CPU cores beside other work: of 100 held-out rows the first instruction has
0.60 ± 0.05 right, the best of ten 0.77 ± 0.04 (0.17 ± 0.06 more, paired), as many virtual tokens 0.76 ± 0.04 (0.16 ± 0.06 more).
What so small a model proposes is no instruction: the best is a piece of its own system message.
"""

from ml_collections import ConfigDict

from configs import MESH, MODEL, follow, prompt


def get_config(variant: str = "sentiment") -> ConfigDict:
    config = ConfigDict()
    made = prompt.get_config("tiny" if variant == "tiny" else "sentiment")
    config.seed = 0  # also of which rows there are
    config.mesh = MESH
    config.model = {"source": made.model.source, **MODEL}
    config.task = made.task.to_dict()  # its instruction is the first candidate; demonstrations and the dev set are of its pool
    config.search = {
        "induced": 6,  # candidates from demonstrations
        "shown": 6,  # demonstrations for each
        "rephrased": 3,  # of the best in the first round, which join then
        "temperature": 0.8,
        "length": 40,  # most tokens of a candidate
        "dev": 200,  # rows of the pool to choose by
        "rounds": 3,
        "budget": 900,  # rows that are asked in all, of all candidates
    }
    config.length = made.length  # most tokens of a prompt and its answer; 0: all that the model was made for
    config.written = made.written  # most tokens of an answer that is written
    config.batch = made.batch
    config.beside = {"soft_source": "stage:sft"}  # virtual tokens; "" for none
    config.stages = {"sft": made.stages.sft.copy_and_resolve_references()}
    config.stages.sft.adapter.kind = "prompt"  # as many as the best instruction has, which the run says
    config.stages.sft.optim.learning_rate = 0.01
    follow(config, config.stages.sft, "model")
    return VARIANTS[variant](config)


def sentiment(config):
    """The default."""
    return config


def tiny(config):
    """Seconds: to see that everything runs."""
    config.search.update(induced=2, shown=2, rephrased=1, length=8, dev=6, rounds=2, budget=24)
    return config


VARIANTS = {"sentiment": sentiment, "tiny": tiny}
