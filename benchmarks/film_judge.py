"""A judge of film reviews that shares neither data nor model with what is trained: naive Bayes on Rotten Tomatoes.

    python benchmarks/film_judge.py --data FOLDER         # how often it is right, also on IMDB reviews

FOLDER holds classification/rotten_tomatoes_{train,validation}.jsonl.gz and imdb_test.jsonl.gz (text, label). As a
reward of weight 0 (`judged_positive`, in ppo_imdb.yaml) it is only watched: it tells whether a policy writes what is
positive to others too, or only what its own reward model likes. Binary naive Bayes on words and pairs of words (Wang
and Manning 2012); FOLDER is then the environment variable REAL_DATA, which real_data.py sets.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
from collections import Counter
from functools import cache
from pathlib import Path


def judged_positive(prompts, completions, **columns) -> list[float]:
    """1 for each answer that reads as positive by itself, without its prompt, else 0: the mean is a share."""
    weights = fitted(os.environ["REAL_DATA"])
    return [float(log_odds(weights, text) > 0) for text in completions]


def features(text: str) -> set[str]:
    """The words of a text and the pairs of neighbours among them."""
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("<br />", " "))
    return {*words, *map(" ".join, zip(words, words[1:]))}


@cache
def fitted(folder: str) -> dict[str, float]:
    """Log-odds that each feature adds, from the 8,528 training sentences, smoothed by one."""
    counts = [Counter(), Counter()]
    for row in rows(folder, "rotten_tomatoes_train"):
        counts[row["label"]].update(features(row["text"]))
    known = counts[0].keys() | counts[1].keys()
    total = [sum(c.values()) + len(known) for c in counts]
    return {f: math.log((counts[1][f] + 1) / total[1]) - math.log((counts[0][f] + 1) / total[0]) for f in known}


def log_odds(weights: dict[str, float], text: str) -> float:
    return sum(weights.get(feature, 0.0) for feature in features(text))


def rows(folder: str, name: str):
    with gzip.open(Path(folder) / f"classification/{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    folder = parser.parse_args().data
    weights = fitted(folder)
    for name, words in (("rotten_tomatoes_validation", None), ("imdb_test", 32), ("imdb_test", None)):
        right = [
            (log_odds(weights, " ".join(row["text"].split()[:words])) > 0) == row["label"] for row in rows(folder, name)
        ]
        print(f"{name}, {f'first {words}' if words else 'all'} words: {sum(right) / len(right):.1%} of {len(right)}")


if __name__ == "__main__":
    main()
