"""What labels are worth whose annotators err: five kinds of fault, and what is said to help, in the tiny world.

python -m experiments.annotators --config=configs/annotators.py

Results, seed 0, 10 min on 2 CPU cores beside much other work; accuracy by gold, on held-out prompts, of a judge that learns from
512 labels, paired over 12 worlds. Ratings are worth as much as comparisons on equal scales, and 0.07 ± 0.02 less where scales
differ and drift by 2 std of gold (0.04 ± 0.01 less, each annotator's mean taken off). An annotator whose taste is their own costs
0.06 ± 0.01 against nine who take turns. Nine to each of as many pairs gain 0.02 ± 0.01 (clear) to 0.06 ± 0.01 (divided, unsure);
at as many labels they lose 0.03 to 0.08: new pairs are worth more than second opinions. Margins, ties, smoothing and the robust
loss: of 16 differences two are beyond two errors, by 0.01. Comparisons chosen by disagreement are no different from random ones;
twice as many gain 0.02 to 0.04, still so at 1024. Annotators who like length make the best policy's responses longer by 0.1 to 0.2
words of 3; pairs of equal length make the judge 0.04 ± 0.01 more accurate then, and the best policy no better.
"""

from ml_collections import ConfigDict

from configs import sweep


def get_config(variant: str = "crowd") -> ConfigDict:
    made = sweep.get_config("soft_pairwise")
    config = ConfigDict()
    config.seed = 0  # the first of run.seeds worlds
    config.world = made.world  # its temperature is that of annotators who have no other fault
    config.optim = made.optim
    # labels: comparisons, or ratings, that a judge learns from where nothing else is said; examples: pairs that there are
    config.run = {"seeds": 12, "updates": 320, "batch": 32, "labels": 512, "examples": 2048}
    # annotators: of the crowd, who take turns; levels: of their scale for ratings, a std of gold each
    config.crowd = {"annotators": 9, "levels": 7}
    config.scales = {"spread": (0.0, 0.5, 1.0, 2.0)}  # of zero points between annotators, and of each in a hundred labels
    config.tastes = {"disagreement": (0.0, 1.0, 2.0)}  # std of what an annotator likes beside gold
    config.noises = {  # of whom `help` is asked; temperature and disagreement in std of gold, sloppiness: share without a look
        "clear": {"temperature": 0.35, "sloppiness": 0.0, "disagreement": 0.0},
        "unsure": {"temperature": 1.4, "sloppiness": 0.0, "disagreement": 0.0},
        "sloppy": {"temperature": 0.35, "sloppiness": 0.5, "disagreement": 0.0},
        "divided": {"temperature": 0.35, "sloppiness": 0.0, "disagreement": 1.5},
    }
    # smoothing: of labels; noise: share of wrong ones that the robust loss is told; theta: of ties; cuts: differences, in
    # temperatures, above which one is slightly better, better, significantly better; several: annotators a pair
    config.help = {"smoothing": 0.1, "noise": 0.1, "theta": 2.0, "cuts": (0.5, 1.5, 3.0), "several": (3, 9)}
    config.active = {"counts": (32, 64, 128, 256, 512, 1024), "members": 3}  # after each round; judges that disagree
    config.length = {"bias": (0.0, 0.5, 1.0, 2.0)}  # what a word more is worth to the annotators, in std of gold
    return VARIANTS[variant](config)


def crowd(config):
    """The default."""
    return config


def fast(config):
    """The same in small."""
    config.run.update(seeds=2, updates=40, batch=32, labels=90, examples=256)
    config.scales.spread = (0.0, 2.0)
    config.tastes.disagreement = (0.0, 2.0)
    config.active.update(counts=(16, 64), members=2)
    config.length.bias = (0.0, 2.0)
    return config


VARIANTS = {"crowd": crowd, "fast": fast}
