"""The curves, histograms, matrices and other figures of a stage in the report."""

from __future__ import annotations

from html import escape

from pipelines.report import charts
from pipelines.report.charts import Series, number
from pipelines.report.html import html_table, titled
from pipelines.report.run_folder import Seen

# What is charted, in this order: (title, unit, keys in the log). Two keys are two lines; what is not here goes below
# "more curves".
CURVES = [
    ("loss", "nats per token or pair", ("loss", "eval_loss")),
    ("perplexity", "exp(loss)", ("eval_perplexity",)),
    ("pseudo-perplexity of hidden words", "exp(loss)", ("eval_pseudo_perplexity",)),
    ("accuracy", "share", ("accuracy", "eval_accuracy")),
    ("macro F1", "0 to 1", ("eval_f1_macro",)),
    ("margin between better and worse", "score", ("margin", "eval_margin")),
    ("BLEU", "0 to 100", ("eval_bleu",)),
    ("chrF", "0 to 100", ("eval_chrf",)),
    ("ROUGE-L", "0 to 1", ("eval_rougeL",)),
    ("reward", "score", ("objective/scores", "eval_score")),
    ("KL to the reference", "nats per answer", ("objective/kl", "kl", "eval_kl")),
    ("length of answers", "tokens", ("response_length", "eval_length")),
    ("answers that end with EOS", "share", ("eos_rate", "eval_eos_rate")),
    ("entropy of the policy", "nats per token", ("policy/entropy_avg",)),
    ("explained variance of the critic", "share, 1 is perfect", ("val/explained_variance",)),
    ("prompts whose answers score alike", "share", ("objective/scores_alike",)),
    ("policy clipped", "share of tokens", ("policy/clipfrac_avg",)),
]
SHARES = ("accuracy", "eos_rate")  # their axis goes from 0 to 1
NO_CURVE = ("epoch", "step", "episode", "total_flos", "num_tokens", "eval_num_tokens", "optimizer_steps")


def curves(s: Seen) -> tuple[list[str], list[str]]:
    """The charts of `CURVES`, and those of everything else that was logged."""
    points: dict[str, list] = {}
    for entry in s.history:
        for key, value in entry.items():
            if isinstance(value, (int, float)) and "step" in entry:
                points.setdefault(key, []).append((entry["step"], value))
    main, used = [], set(NO_CURVE)
    for title, unit, keys in CURVES:
        used |= set(keys)
        bounds = {"low": 0, "high": 1} if any(key in SHARES for key in keys) else {}
        lines = [_line(key, points[key]) for key in keys if key in points]
        main.append(titled(title, charts.chart(lines, "step", unit, **bounds)))
    more = []
    for key in points:
        trained = key.removeprefix("eval_")
        if key in used or trained in used or key.startswith("train_") or key.endswith(("_runtime", "_per_second")):
            continue
        used |= {trained, f"eval_{trained}"}
        both = [k for k in (trained, f"eval_{trained}") if k in points]
        more.append(titled(trained, charts.chart([_line(k, points[k]) for k in both], "step", trained)))
    return [c for c in main if c], more


def _line(key: str, points: list) -> Series:
    held_out = key.startswith("eval_")
    return Series("held out", points, "both", 1) if held_out else Series("training", points)


def special_figures(s: Seen) -> list[str]:
    """Charts that only some kinds have: score distributions, calibration, reward against KL, the confusion matrix."""
    out, metrics = [], s.metrics
    if "histogram" in metrics:
        edges = metrics["histogram"]["edges"]
        bars = [
            Series(side, list(zip(edges, [*metrics["histogram"][side], 0], strict=True)), "steps", color)
            for color, side in enumerate(("chosen", "rejected"))
        ]
        out.append(titled("scores of held-out answers", charts.chart(bars, "score", "answers, one per pair", low=0)))
    if "calibration" in metrics:
        table = metrics["calibration"]
        lines = [
            Series("people agreed", [(t["confidence"], t["accuracy"]) for t in table], "both"),
            Series("perfect", [(0.5, 0.5), (1.0, 1.0)], "dashed", 1),
        ]
        drawn = charts.chart(lines, "confidence of the reward model", "share of pairs", low=0.4, high=1)
        out.append(titled("calibration", drawn))
    pairs = {
        name: [(e[kl], e[score]) for e in s.history if kl in e and score in e]
        for name, kl, score in (("training", "objective/kl", "objective/scores"), ("held out", "eval_kl", "eval_score"))
    }
    if any(pairs.values()):
        lines = [_line("eval_" if name == "held out" else "", points) for name, points in pairs.items()]
        drawn = charts.chart(lines, "KL to the reference, nats per answer", "mean score")
        out.append(titled("reward against KL", drawn))
    scored = [r for r in s.samples if "score" in r and "step" in r]
    if scored:
        train, held_out = (
            [(r["step"], r["score"]) for r in scored if (r["split"] == "train") == side] for side in (True, False)
        )
        lines = [Series("training", train, "dots"), Series("held out", held_out, "dots", 1)]
        out.append(
            titled(
                "scores of the sample answers", charts.chart(lines, "step (1: before any update)", "score of an answer")
            )
        )
    if "confusion_matrix" in metrics:
        out.append(titled("confusion matrix, rows", _matrix(metrics["confusion_matrix"], metrics.get("labels"))))
    for model, of in metrics.get("confusion_matrices", {}).items():
        out.append(titled(f"confusion matrix of {model}, rows", _matrix(of["counts"], of["labels"])))
    scores = {model: of["score"] for model, of in s.values.items() if of.get("score")}
    if scores:
        lines = _histogram(scores)
        out.append(titled("scores of the models' answers", charts.chart(lines, "score", "share of answers", low=0)))
    for model, of in metrics.get("best_of", {}).items():
        names = {"score": "judge", "oracle": "second judge"}
        lines = [
            Series(names[measure], [(point["n"], point["value"]) for point in points], "both", color)
            for color, (measure, points) in enumerate(of.items())
        ]
        furthest = max(point["kl_bound"] for points in of.values() for point in points)
        drawn = charts.chart(lines, "n, answers to choose from", "mean score of the one chosen")
        out.append(titled(f"{model}: best of n (KL to the model at most {number(furthest)} nats)", drawn))
    if "figures" in metrics:
        rows = [
            [name, number(f["value"]), f"{number(f['low'])} to {number(f['high'])}"]
            for name, f in metrics["figures"].items()
        ]
        out.append(titled("figures", html_table(["", "value", "95 % interval"], rows, 1)))
    out.append(titled("tags", _tags(metrics)))
    out.append(titled("judges", _judges(metrics.get("judges", {}))))
    agreement = [
        [
            " and ".join(p["labellers"]),
            p["prompts"],
            *("–" if p[k] is None else number(p[k]) for k in ("tau", "same_order")),
        ]
        for p in metrics.get("agreement", {}).get("pairs", [])
    ]
    head = ["labellers", "prompts", "Kendall's τ", "same order"]
    out.append(titled("agreement", html_table(head, agreement, 1) if agreement else ""))
    return [c for c in out if c]


def _histogram(scores: dict[str, list[float]], bins: int = 20) -> list[Series]:
    """An outline per name (four at most): the share of its scores in each of `bins` equal steps from least to
    largest.
    """
    every = [v for values in scores.values() for v in values]
    low, wide = min(every), (max(every) - min(every)) / bins or 1.0
    out = []
    for color, (name, values) in enumerate(list(scores.items())[:4]):
        counts = [0] * (bins + 1)  # the last one closes the outline
        for v in values:
            counts[min(int((v - low) / wide), bins - 1)] += 1
        out.append(Series(name, [(low + i * wide, n / len(values)) for i, n in enumerate(counts)], "steps", color))
    return out


def _tags(metrics: dict) -> str:
    """How often people gave each tag (`tagged_NAME`), and how well a reward model tells it (`tag_NAME_MEASURE`)."""
    given = {k.removeprefix("tagged_"): v for k, v in metrics.items() if k.startswith("tagged_")}
    told: dict[str, dict] = {}
    for key, value in metrics.items():
        if key.startswith("tag_"):
            name, _, measure = key.removeprefix("tag_").rpartition("_")
            told.setdefault(name, {})[measure] = value
    measures = list(dict.fromkeys(m for of in told.values() for m in of))
    rows = [[name, given[name]] for name in given] if given else []
    rows += [[name, *(number(of[m]) if m in of else "–" for m in measures)] for name, of in told.items()]
    return html_table(["tag", *(["given"] if given else measures)], rows, 1) if rows else ""


def _judges(judges: dict[str, dict]) -> str:
    """What each judge did not rank, and how much the order of showing decided."""
    measures = list(dict.fromkeys(m for of in judges.values() for m in of))
    rows = [[name, *(number(of[m]) if m in of else "–" for m in measures)] for name, of in judges.items()]
    return html_table(["judge", *(m.replace("_", " ") for m in measures)], rows, 1) if rows else ""


def _matrix(counts: list[list[int]], labels: list[str] | None) -> str:
    """Rows are the true classes, columns the predicted ones; the shade is the share of the row."""
    names = labels or [str(i) for i in range(len(counts))]
    head = "".join(f'<th class="n">{escape(str(n))}</th>' for n in names)
    body = ""
    for name, row in zip(names, counts, strict=True):
        cells = "".join(
            f'<td style="background: color-mix(in srgb, var(--c0) {60 * n / max(1, sum(row)):.0f}%, '
            f'transparent)">{n}</td>'
            for n in row
        )
        body += f"<tr><th>{escape(str(name))}</th>{cells}</tr>"
    return f'<div class="scroll"><table class="matrix"><tr><th>true ↓ predicted →</th>{head}</tr>{body}</table></div>'
