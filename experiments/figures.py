"""Figures, by matplotlib."""


def pyplot():
    """matplotlib.pyplot, which draws into files. Raises ImportError that says what to install."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('this draws figures, which wants matplotlib: pip install -e ".[report]"') from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def band(axis, x, curves, **how):
    """The mean of curves [N,T], and one std on either side of it. -> its colour"""
    mean, std = curves.mean(0), curves.std(0)
    (line,) = axis.plot(x, mean, **how)
    axis.fill_between(x, mean - std, mean + std, alpha=0.25, color=line.get_color(), linewidth=0)
    return line.get_color()


def reliability(axis, bins: dict):
    """How often answers of each confidence are right (evaluation.statistics.reliability), and how often they should be.

    The areas of the dots are counts.
    """
    axis.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
    axis.plot(bins["confidence"], bins["accuracy"], color="C0")
    axis.scatter(bins["confidence"], bins["accuracy"], s=200 * bins["count"] / bins["count"].max(), color="C0")
    axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
