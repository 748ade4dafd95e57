"""Best of n: what the best of n answers by a judge's score is worth, by that judge and by another one.

The plainest way to use a reward model, and the yardstick for every other: nothing is trained, n answers are written for
one. How far it goes from the model is bounded by KL <= log n - (n - 1)/n (Stiennon et al. 2020, appendix G; Beirami et
al. 2024, https://arxiv.org/abs/2401.01879). From N >= n answers to a prompt the mean over all choices of n of them is
computed, not one choice (Nakano et al. 2021, https://arxiv.org/abs/2112.09332, appendix I; Gao et al. 2022,
https://arxiv.org/abs/2210.10760, appendix C): unbiased, and of less variance.
"""

from __future__ import annotations

import math

import numpy as np

NAME = "best_of_"


def sizes(n: int) -> list[int]:
    """1, 2, 4, 8, … and `n` itself."""
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})


def kl_bound(n: int) -> float:
    """The most nats by which the best of n differs from the model that wrote the answers."""
    return math.log(n) - (n - 1) / n


def chances(scores: list[float], n: int) -> np.ndarray:
    """How likely each of N answers (N,) is the best of n that are drawn from them without replacement.

    Of equal scores each is as likely.
    """
    total, order = len(scores), np.argsort(scores, kind="stable")
    by_place = np.array([math.comb(place, n - 1) / math.comb(total, n) for place in range(total)])
    _, group = np.unique(np.asarray(scores, float)[order], return_inverse=True)
    shared = (np.bincount(group, by_place) / np.bincount(group))[group]
    found = np.empty(total)
    found[order] = shared
    return found


def values(n: int, scores: list[list[float]], second: list[list[float]] | None = None) -> dict[str, list[float]]:
    """For each of `sizes(n)` the expected score of the best answer to each prompt, `best_of_4/score`, and what the
    second judge gives the same answers, `best_of_4/oracle`. `scores` and `second`: of each answer to each prompt.
    """
    found = {}
    for k in sizes(n):
        weights = [chances(group, k) for group in scores]
        for name, by_prompt in (("score", scores), ("oracle", second)):
            if by_prompt is not None:
                means = [float(w @ np.asarray(group)) for w, group in zip(weights, by_prompt, strict=True)]
                found[f"{NAME}{k}/{name}"] = means
    return found


def curves(figures: dict[str, tuple[float, float, float]]) -> dict[str, dict[str, list[dict]]]:
    """Of figures by name those of best of n: model -> `score` or `oracle` -> points with n, its bound of the KL, value,
    low and high.
    """
    found: dict[str, dict[str, list]] = {}
    for name, (value, low, high) in figures.items():
        model, _, rest = name.rpartition(f"/{NAME}")
        n, _, measure = rest.partition("/")
        if model and " over " not in model:
            point = {"n": int(n), "kl_bound": kl_bound(int(n)), "value": value, "low": low, "high": high}
            found.setdefault(model, {}).setdefault(measure, []).append(point)
    return found


def table(figures: dict[str, tuple[float, float, float]]) -> str:
    """The curves for people; empty without any."""
    lines = []
    for model, measures in curves(figures).items():
        lines += [f"  {model}: the best of n answers by the judge's score, and how far that is from the model at most"]
        lines += [f"  {'n':>4}  {'KL <=':>6}" + "".join(f"  {name:<24}" for name in measures)]
        for points in zip(*measures.values(), strict=True):
            cells = [f"{of['value']:.3f} [{of['low']:.3f}, {of['high']:.3f}]" for of in points]
            row = f"  {points[0]['n']:>4}  {points[0]['kl_bound']:6.3f}" + "".join(f"  {cell:<24}" for cell in cells)
            lines.append(row.rstrip())
        lines.append("")
    return "\n".join(lines)
