"""A classifier by GPT-1's input transformations (Radford et al. 2018): pre-trained on text, then fine-tuned with three new tokens.

python -m experiments.classify --config=configs/classify.py              whether generated reviews are good
python -m experiments.classify --config=configs/classify.py:entailment   whether a statement follows from a review
python -m experiments.classify --config=configs/classify.py:similarity   whether two reviews are both good, or both bad
python -m experiments.classify --config=configs/classify.py:choice       which of four opinions goes on like a review
python -m experiments.classify --config=configs/classify.py:sentences    real film-review sentences (Pang & Lee), by stories260k

Results, on 2 CPU cores, seed 0, of 1,024 held-out rows, after pre-training on other reviews: sentiment 0.871 ± 0.010 (always the
commoner label: 0.540), ECE 0.018, of bad reviews 0.854, of good ones 0.886; both stages take 54 s of CPU time, here 140 s beside
much other work. entailment, similarity and choice, where every row has one right answer: 1.000 each (0.349, 0.626, 0.289).
sentences: 0.709 ± 0.014 (0.502), ECE 0.029, 524 s beside much other work.
"""

from configs import follow, sft


def get_config(variant: str = "sentiment"):
    made = sft.get_config("tiny" if variant == "tiny" else "reviews")
    config = made.copy_and_resolve_references()
    del config.scratch
    config.model.source = "stage:sft"
    config.data = {
        "source": "sentiment",  # a .jsonl file, hub:owner/name[:config][@split], or a generated world: a name of data/opinions.py
        "count": 8192,
        "held_out": 1024,  # rows, off the end, that are never trained on
        "task": "classification",  # or entailment, similarity, choice: a function of data/transformations.py
        "first": "{text}",  # the text; the premise; one of a pair; the context
        "second": "",  # the hypothesis; the other one; the answers, a {column} that is a list
        "label": "{label}",  # the name of its class, or its number, from 0; of a choice the number of the answer
        "classes": ("bad", "good"),  # names; () for a choice
        "length": 56,  # tokens of a text, the three new ones among them
    }
    config.objective = {"lm_weight": 0.5}  # of the language model's loss on the same texts
    config.stages = {"sft": made}
    follow(config, made)
    return VARIANTS[variant](config)


def sentiment(config):
    """Reviews, by the sum of their words' valences."""
    return config


def tiny(config):
    """Seconds: to see that everything runs."""
    config.data.update(count=256, held_out=32)
    return config


def entailment(config):
    data = {"first": "{premise}", "second": "{hypothesis}", "classes": ("contradiction", "neither", "entailment")}
    config.data.update(source="entailment", task="entailment", length=40, **data)
    return config


def similarity(config):
    data = {"first": "{first}", "second": "{second}", "classes": ("other", "same")}
    config.data.update(source="similarity", task="similarity", length=40, **data)
    return config


def choice(config):
    config.data.update(source="choice", task="choice", first="{context}", second="{answers}", classes=(), length=40)
    return config


def sentences(config):
    """Real sentences; the model is a Llama of 260,000 parameters that was trained on TinyStories."""
    config.model.source = "../shared/data/models/stories260k"
    config.data.update(source="../shared/data/sentiment/sentences_train.jsonl.gz", count=0, length=96)
    config.stages = {}
    return config


VARIANTS = {"sentiment": sentiment, "tiny": tiny, "entailment": entailment, "similarity": similarity, "choice": choice}
VARIANTS["sentences"] = sentences
