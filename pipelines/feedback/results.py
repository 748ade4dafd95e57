"""What judgements say: how far labellers agree, and which model's answers people prefer.

Agreement is Kendall's tau-b (Kendall 1945, https://doi.org/10.1093/biomet/33.3.239) between two labellers, averaged over
the prompts that both ranked, and Krippendorff's alpha for ordinal data (Krippendorff 2011, Computing Krippendorff's
Alpha-Reliability) over all. Models are compared within prompts: by win rates, and by the strengths of Bradley and Terry
(1952, https://doi.org/10.2307/2334029) on Elo's scale. Intervals are bootstrap percentiles over prompts, so several
labellers of one prompt do not count as independent.
"""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np

RESAMPLES = 1000


def summary(judgements: list[dict], tags: list[str], seed: int = 0) -> dict:
    """Everything on the results page from standing judgements (`Store.judgements`), ready for JSON."""
    ranked = [j for j in judgements if j["ranks"] is not None]
    chance = np.random.default_rng(seed)
    return {
        "prompts": len({j["item"] for j in ranked}),
        "rankings": len(ranked),
        "ideals": sum(bool(j["ideal"].strip()) for j in judgements),
        "labellers": labellers(judgements),
        "agreement": agreement(ranked, chance),
        "models": models(ranked, tags, chance),
        "tags": tag_rates([tagged for j in ranked for tagged in j["tags"]], tags),
        "answers": sum(len(j["ranks"]) for j in ranked),
    }


def labellers(judgements: list[dict]) -> list[dict]:
    """For each labeller: rankings, skipped prompts, median seconds, and the share of pairs left as ties."""
    out = []
    for name in sorted({j["labeller"] for j in judgements}):
        mine = [j for j in judgements if j["labeller"] == name]
        ranked = [j for j in mine if j["ranks"] is not None]
        pairs = [a == b for j in ranked for a, b in itertools.combinations(j["ranks"], 2)]
        out.append(
            {
                "name": name,
                "rankings": len(ranked),
                "skipped": len(mine) - len(ranked),
                "seconds": statistics.median(j["seconds"] for j in ranked) if ranked else None,
                "ties": sum(pairs) / len(pairs) if pairs else None,
            }
        )
    return out


def agreement(ranked: list[dict], chance: np.random.Generator) -> dict:
    """`pairs`: tau-b and same-order share for every two labellers with common prompts; `alpha` over all labellers."""
    by_item: dict[str, dict[str, list[int]]] = {}
    for j in ranked:
        by_item.setdefault(j["item"], {})[j["labeller"]] = j["ranks"]
    names, pairs = sorted({j["labeller"] for j in ranked}), []
    for a, b in itertools.combinations(names, 2):
        common = [(ranks[a], ranks[b]) for ranks in by_item.values() if a in ranks and b in ranks]
        taus = [tau for x, y in common if (tau := kendall_tau_b(x, y)) is not None]
        signs = [s for x, y in common for s in _pair_signs(x, y) if s[0] and s[1]]
        if common:
            pairs.append(
                {
                    "labellers": [a, b],
                    "prompts": len(common),
                    "tau": float(np.mean(taus)) if taus else None,
                    "interval": _percentiles(_resample(np.array(taus), chance)) if len(taus) > 1 else None,
                    "same_order": sum(x == y for x, y in signs) / len(signs) if signs else None,
                }
            )
    units = [
        list(values)
        for ranks in by_item.values()
        if len(ranks) > 1
        for values in zip(*(positions(r) for r in ranks.values()))
    ]
    return {"pairs": pairs, "alpha": krippendorff_alpha(units)}


def _pair_signs(x: list[float], y: list[float]) -> list[tuple[int, int]]:
    sign = lambda a, b: (a > b) - (a < b)
    indexes = itertools.combinations(range(len(x)), 2)
    return [(sign(x[i], x[j]), sign(y[i], y[j])) for i, j in indexes]


def kendall_tau_b(x: list[float], y: list[float]) -> float | None:
    """Rank correlation in [-1, 1] of two rankings (K,) with ties; None where one of them is all ties."""
    signs = _pair_signs(x, y)
    size = math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))
    return sum(a * b for a, b in signs) / size if size else None


def positions(ranks: list[int]) -> list[float]:
    """Where each of K answers stands between best (0) and worst (1); ties share the mean of the places they fill.

    So that a tie above does not move what is below it, and prompts with different K can be pooled.
    """
    below = [sum(other < rank for other in ranks) for rank in ranks]
    level = [sum(other == rank for other in ranks) for rank in ranks]
    return [(b + (n - 1) / 2) / (len(ranks) - 1) for b, n in zip(below, level)]


def krippendorff_alpha(units: list[list[float]]) -> float | None:
    """Ordinal alpha of units with any number of ratings each: 1 full agreement, 0 chance; None where undefined."""
    units = [unit for unit in units if len(unit) > 1]
    values = sorted({value for unit in units for value in unit})
    if len(values) < 2:
        return None
    place = {value: n for n, value in enumerate(values)}
    pairs = np.zeros((len(values), len(values)))  # coincidences
    for unit in units:
        for a, b in itertools.permutations(unit, 2):
            pairs[place[a], place[b]] += 1 / (len(unit) - 1)
    counts = pairs.sum(0)
    middle = np.cumsum(counts) - counts / 2
    distance = (middle[:, None] - middle[None, :]) ** 2  # the squared number of ratings between two values
    expected = (np.outer(counts, counts) * distance).sum() / (counts.sum() - 1)
    return float(1 - (pairs * distance).sum() / expected)


def models(ranked: list[dict], tags: list[str], chance: np.random.Generator) -> list[dict]:
    """For each model, best first: win rate and Elo with 95 % intervals, mean position, tag rates."""
    ranked = [j for j in ranked if j.get("models")]
    names = sorted({model for j in ranked for model in j["models"]})
    place = {item: n for n, item in enumerate(dict.fromkeys(j["item"] for j in ranked))}
    wins = np.zeros((len(place), len(names), len(names)))  # [prompt, winner, loser], a tie is half a win for both
    answers: dict[str, list] = {name: [] for name in names}
    for j in ranked:
        ids = [names.index(model) for model in j["models"]]
        for (a, x), (b, y) in itertools.permutations(zip(ids, j["ranks"]), 2):
            if a != b:
                wins[place[j["item"]], a, b] += (x < y) + 0.5 * (x == y)
        for model, tagged, position in zip(j["models"], j["tags"], positions(j["ranks"])):
            answers[model].append((tagged, position))
    if not wins.any():
        return [_model(name, answers[name], tags) for name in names]
    drawn = chance.multinomial(len(place), np.full(len(place), 1 / len(place)), RESAMPLES)  # how often each prompt
    total, resampled = wins.sum(0), np.tensordot(drawn, wins, 1)
    elo, rate = elo_scale(bradley_terry(total + TIE)), win_rates(total)
    elos, rates = elo_scale(bradley_terry(resampled + TIE)), win_rates(resampled)
    games = total + total.T
    out = [
        _model(name, answers[name], tags)
        | {
            "elo": float(elo[i]),
            "elo_interval": _percentiles(elos[:, i]),
            "win_rate": None if np.isnan(rate[i]) else float(rate[i]),
            "win_rate_interval": _percentiles(rates[:, i]),
            "against": {other: float(total[i, j] / games[i, j]) for j, other in enumerate(names) if games[i, j]},
        }
        for i, name in enumerate(names)
    ]
    return sorted(out, key=lambda m: -m["elo"])


def _model(name: str, answers: list[tuple[list[str], float]], tags: list[str]) -> dict:
    mean = float(np.mean([position for _, position in answers]))
    return {"name": name, "answers": len(answers), "position": mean, "tags": tag_rates([t for t, _ in answers], tags)}


TIE = 0.5  # half a win each way between all models: one tie that nobody judged keeps strengths finite


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Log strengths (…, M), mean 0, of M models from wins (…, M, M) [winner, loser]: P(a beats b) = sigmoid(s_a - s_b).

    By the MM algorithm of Hunter (2004, https://doi.org/10.1214/aos/1079120141). The diagonal counts for nothing.
    """
    wins = wins * (1 - np.eye(wins.shape[-1]))
    won, games = wins.sum(-1), wins + wins.swapaxes(-1, -2)
    strength = np.ones(won.shape)
    for _ in range(10_000):
        new = won / (games / (strength[..., :, None] + strength[..., None, :])).sum(-1)
        new /= np.exp(np.log(new).mean(-1, keepdims=True))
        done = np.abs(np.log(new / strength)).max() < 1e-9
        strength = new
        if done:
            break
    return np.log(strength)


def elo_scale(strengths: np.ndarray) -> np.ndarray:
    """Log strengths with mean 1000, where 400 points more are odds of 10 to 1."""
    return 1000 + strengths * 400 / math.log(10)


def win_rates(wins: np.ndarray) -> np.ndarray:
    """Share of comparisons with other models that each wins (…, M), ties being half; nan without comparisons."""
    won, lost = wins.sum(-1), wins.sum(-2)
    return np.divide(won, won + lost, out=np.full(won.shape, np.nan), where=won + lost > 0)


def tag_rates(answers: list[list[str]], tags: list[str]) -> dict[str, float]:
    """The share of answers (each the list of its tags) with each tag."""
    return {tag: sum(tag in tagged for tagged in answers) / len(answers) for tag in tags} if answers else {}


def _resample(values: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    return values[chance.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)


def _percentiles(values: np.ndarray) -> list[float] | None:
    values = values[~np.isnan(values)]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])] if len(values) else None
