"""A small model learns what a larger one would say next: distillation, on given text or on its own (GKD, Agarwal et al. 2024).

python -m experiments.distill --config=configs/distill.py             forward KL, on generated reviews
python -m experiments.distill --config=configs/distill.py:on_policy   half of the updates on the student's own samples

Results, on 2 CPU cores, seed 0, of 512 held-out reviews: a student of one layer and width 32, which had learned the same text by
itself, goes from a KL(teacher || student) of 0.0684 nats a token to 0.0030 by forward_kl, to 0.0042 by on_policy; its loss from
1.368 to 1.285 by both (teacher 1.285); the two agree on the likeliest token at 0.739 of the places before, at 0.905 and 0.898
after. A run took 284 s (its student's own stage among them) and 152 s, beside much other work.
"""

from configs import MODEL, follow, sft

OBJECTIVES = {  # the functions of jaxalign/objectives/distill.py, and all of their arguments
    "forward_kl": {"temperature": 1.0, "nll_weight": 0.0},
    "reverse_kl": {"temperature": 1.0, "nll_weight": 0.0},
    "jsd": {"beta": 0.5, "temperature": 1.0, "nll_weight": 0.0},
}


def get_config(variant: str = "forward_kl"):
    size = "tiny" if variant == "tiny" else "reviews"
    teacher, student = sft.get_config(size), sft.get_config(size)
    config = teacher.copy_and_resolve_references()
    del config.scratch
    config.model.source = "stage:student"  # the student, as it begins
    # k: how many of its likeliest tokens the teacher gives at each place, the rest as one; 0: all
    config.teacher_model = {"source": "stage:sft", **MODEL, "k": 0}
    config.sample = {"length": 40, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "slots": 0}  # the student's, to its prompts
    # name: a function of jaxalign/objectives/distill.py; the rest: all of its arguments. The variant of a name has them.
    config.objective = {"name": "forward_kl", **OBJECTIVES["forward_kl"]}
    config.run.on_policy = 0.0  # how likely an update is on the student's samples; else it is on the text
    smaller = {"mlp": 16} if size == "tiny" else {"width": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 88}
    student.scratch.architecture.update(smaller)
    config.stages = {"sft": teacher, "student": student}
    for stage in config.stages.values():
        follow(config, stage, "data")
    return VARIANTS[variant](config)


def forward_kl(config):
    return config


def tiny(config):
    """Seconds: to see that everything runs, text and samples."""
    config.sample.length = 16
    config.run.on_policy = 0.5
    return config


def on_policy(config):
    """The teacher judges what the student says: half of the updates, by the divergence between both directions of the KL."""
    config.run.on_policy = 0.5
    return choose("jsd")(config)


def choose(name):
    """Another divergence on the same text."""

    def variant(config):
        config.objective = {"name": name, **OBJECTIVES[name]}
        return config

    return variant


VARIANTS = {
    "forward_kl": forward_kl,
    "tiny": tiny,
    "reverse_kl": choose("reverse_kl"),
    "jsd": choose("jsd"),
    "on_policy": on_policy,
}
