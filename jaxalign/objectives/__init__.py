"""Objectives: (params, data, *, model, **hyper) -> (sum, {"weight": n, ...sums}).

Sums, not means: the step divides once, by the weight of the whole batch, so that padding, packing, accumulation and the number of
devices cannot change a loss. A new objective is one such function in any file.
"""
