"""What judgements say: how far labellers agree, and which model's answers people prefer.

Agreement is Kendall's tau-b (Kendall 1945, https://doi.org/10.1093/biomet/33.3.239) between two labellers, averaged
over the prompts that both ranked, and Krippendorff's alpha for ordinal data (Krippendorff 2011, Computing
Krippendorff's Alpha-Reliability) over all. Models are compared within prompts: by win rates, and by the strengths of
Bradley and Terry (1952, https://doi.org/10.2307/2334029) on Elo's scale. Intervals are bootstrap percentiles over
prompts, so several labellers of one prompt do not count as independent.
"""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np

from pipelines.feedback.assignment import shuffled

RESAMPLES = 1000
FASTEST = 100  # characters a second: five times the pace of a fast reader
MOST_LOOKS = 100  # prompts listed for a second look


def summary(judgements: list[dict], tags: list[str], seed: int = 0) -> dict:
    """Everything on the results page from standing judgements (`Store.judgements`), ready for JSON."""
    ranked = [j for j in judgements if j["ranks"] is not None]
    chance = np.random.default_rng(seed)
    taus = _taus(ranked)
    return {
        "prompts": len({j["item"] for j in ranked}),
        "rankings": len(ranked),
        "several": sum(len(group) > 1 for group in _by_item(ranked).values()),
        "ideals": sum(bool(j["ideal"].strip()) for j in judgements),
        "labellers": labellers(judgements, taus, chance),
        "agreement": agreement(ranked, taus, chance),
        "second_look": second_look(judgements, taus),
        "models": models(ranked, tags, chance),
        "tags": tag_rates([tagged for j in ranked for tagged in j["tags"]], tags),
        "answers": sum(len(j["ranks"]) for j in ranked),
    }


def labellers(judgements: list[dict], taus: dict, chance: np.random.Generator) -> list[dict]:
    """For each labeller: how much, how fast, how decided, and whether they agree with the others.

    `seconds` is the median of a ranking; `ties` the share of pairs left equal; `as_shown` the share of rankings that
    leave the answers in the order in which they were shown, and `as_shown_by_chance` what guessing would give; `hasty`
    counts rankings made faster than `FASTEST` characters a second; `tau` is the mean agreement with others over the
    prompts that somebody else ranked too, with its interval over these prompts.
    """
    out = []
    for name in sorted({j["labeller"] for j in judgements}):
        mine = [j for j in judgements if j["labeller"] == name]
        ranked = [j for j in mine if j["ranks"] is not None]
        pairs = [a == b for j in ranked for a, b in itertools.combinations(j["ranks"], 2)]
        seconds = [j["seconds"] for j in ranked if j["seconds"]]
        shown = [[j["ranks"][i] for i in shuffled(j, j["item"], name)] for j in ranked]
        kept = [ranks == sorted(set(ranks)) for ranks in shown]
        per_prompt: dict[str, list[float]] = {}
        for (item, a, b), tau in taus.items():
            if name in (a, b) and tau is not None:
                per_prompt.setdefault(item, []).append(tau)
        means = [float(np.mean(values)) for values in per_prompt.values()]
        out.append(
            {
                "name": name,
                "rankings": len(ranked),
                "skipped": len(mine) - len(ranked),
                "seconds": statistics.median(seconds) if seconds else None,
                "hasty": sum(_hasty(j) for j in ranked),
                "ties": sum(pairs) / len(pairs) if pairs else None,
                "as_shown": sum(kept) / len(kept) if kept else None,
                "as_shown_by_chance": float(np.mean([1 / math.factorial(len(r)) for r in shown])) if shown else None,
                "compared": len(means),
                "tau": float(np.mean(means)) if means else None,
                "tau_interval": _mean_interval(means, chance),
            }
        )
    return out


def agreement_of(ranked: list[dict], seed: int = 0) -> dict:
    """`agreement` of rankings alone: each with `item`, `labeller` and `ranks`."""
    return agreement(ranked, _taus(ranked), np.random.default_rng(seed))


def agreement(ranked: list[dict], taus: dict, chance: np.random.Generator) -> dict:
    """`pairs`: tau-b and same-order share for every two labellers with common prompts; `alpha` over all labellers."""
    by_item, pairs = _by_item(ranked), []
    for a, b in itertools.combinations(sorted({j["labeller"] for j in ranked}), 2):
        common = [(group[a]["ranks"], group[b]["ranks"]) for group in by_item.values() if a in group and b in group]
        known = [tau for (_, x, y), tau in taus.items() if (x, y) == (a, b) and tau is not None]
        signs = [s for x, y in common for s in _pair_signs(x, y) if s[0] and s[1]]
        if common:
            pairs.append(
                {
                    "labellers": [a, b],
                    "prompts": len(common),
                    "tau": float(np.mean(known)) if known else None,
                    "interval": _mean_interval(known, chance),
                    "same_order": sum(x == y for x, y in signs) / len(signs) if signs else None,
                }
            )
    units = [
        list(values)
        for group in by_item.values()
        if len(group) > 1
        for values in zip(*(positions(j["ranks"]) for j in group.values()))
    ]
    return {"pairs": pairs, "alpha": krippendorff_alpha(units)}


def second_look(judgements: list[dict], taus: dict) -> list[dict]:
    """Prompts whose judgements somebody should look at again, most reasons first: `item`, `prompt`, `reasons`."""
    found: dict[str, list[tuple[float, str]]] = {}
    note = lambda item, weight, reason: found.setdefault(item, []).append((weight, reason))
    for (item, a, b), tau in taus.items():
        if tau is not None and tau < 0:
            note(item, 2 - tau, f"{a} and {b} put the answers in different orders (τ {tau:.2f})".replace("-", "−"))
    for item, group in _by_item(judgements).items():
        skipped = [name for name, j in group.items() if j["ranks"] is None]
        if skipped:
            others = "" if len(skipped) == len(group) else ", others ranked it"
            note(item, 1 if others else 0.5, f"skipped by {' and '.join(skipped)}{others}")
        for name, j in group.items():
            if j["ranks"] is None:
                continue
            tagged = [(rank, tags) for rank, tags in zip(j["ranks"], j["tags"]) if tags]
            clean = [rank for rank, tags in zip(j["ranks"], j["tags"]) if not tags]
            if tagged and clean and min(tagged)[0] < min(clean):
                note(item, 2, f"{name} put an answer tagged {', '.join(min(tagged)[1])} above all without a tag")
            if len(set(j["ranks"])) == 1:
                note(item, 1, f"{name} left all answers tied")
            if _hasty(j):
                note(item, 1.5, f"{name} took {j['seconds']:.3g} s for {_characters(j):,} characters")
    prompts = {j["item"]: j["prompt"] for j in judgements}
    order = sorted(found, key=lambda item: -sum(weight for weight, _ in found[item]))[:MOST_LOOKS]
    return [
        {
            "item": item,
            "prompt": _excerpt(prompts[item]),
            "reasons": [reason for _, reason in sorted(found[item], key=lambda pair: -pair[0])],
        }
        for item in order
    ]


def _by_item(judgements: list[dict]) -> dict[str, dict[str, dict]]:
    """item -> labeller -> judgement."""
    by: dict[str, dict[str, dict]] = {}
    for j in judgements:
        by.setdefault(j["item"], {})[j["labeller"]] = j
    return by


def _taus(ranked: list[dict]) -> dict[tuple[str, str, str], float | None]:
    """(item, labeller, other labeller) -> tau-b of their rankings; the names in order."""
    return {
        (item, a, b): kendall_tau_b(group[a]["ranks"], group[b]["ranks"])
        for item, group in _by_item(ranked).items()
        for a, b in itertools.combinations(sorted(group), 2)
    }


def _characters(judgement: dict) -> int:
    prompt = judgement["prompt"]
    read = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    return sum(map(len, [*read, *dict.fromkeys(judgement["completions"])]))


def _hasty(judgement: dict) -> bool:
    return bool(judgement["seconds"]) and _characters(judgement) > FASTEST * judgement["seconds"]


def _excerpt(prompt, most: int = 160) -> str:
    text = " ".join((prompt if isinstance(prompt, str) else prompt[-1]["content"]).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _pair_signs(x: list[float], y: list[float]) -> list[tuple[int, int]]:
    sign = lambda a, b: (a > b) - (a < b)
    indexes = itertools.combinations(range(len(x)), 2)
    return [(sign(x[i], x[j]), sign(y[i], y[j])) for i, j in indexes]


def kendall_tau_b(x: list[float], y: list[float]) -> float | None:
    """Rank correlation in [-1, 1] of two rankings (K,) with ties; None where one of them is all ties."""
    from scipy.stats import kendalltau  # late: its import takes longer than to serve the page

    tau = kendalltau(x, y).statistic
    return None if math.isnan(tau) else float(tau)


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
    # By hand and not by scipy.stats.bootstrap: one draw of prompts serves both figures of all models, so they are
    # paired.
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


def _mean_interval(values: list[float], chance: np.random.Generator) -> list[float] | None:
    """95 % percentile bootstrap interval of the mean; None of fewer than two values."""
    from scipy.stats import bootstrap  # late: as above

    if len(values) < 2:
        return None
    found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", vectorized=True, rng=chance)
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def _percentiles(values: np.ndarray) -> list[float] | None:
    values = values[~np.isnan(values)]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])] if len(values) else None
