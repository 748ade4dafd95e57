"""`evaluate --labelled` against a plain padded loop: the same classifier, the same texts, the same batch size.

    python benchmarks/evaluate_speed.py MODEL FILE [ROWS]       a classifier, and rows of text and label

The loop takes the rows as they come and pads each batch to its longest text. Prints seconds, CPU seconds (to compare on
a machine that does other work) and whether both give the same classes.
"""

from __future__ import annotations

import sys
import time

import torch

from pipelines.data import mixing
from pipelines.evaluation.classes import class_values
from pipelines.generation.answers import load
from pipelines.launch import start
from pipelines.models import loading
from pipelines.recipe.sections import EvaluateSection

BATCH = 16


def plain(model, tokenizer, texts: list[str]) -> list[str]:
    """The class of each text, by the loop."""
    found, length = [], loading.context_length(model)
    with torch.no_grad():
        for i in range(0, len(texts), BATCH):
            batch = tokenizer(
                texts[i : i + BATCH], truncation=True, max_length=length, padding=True, return_tensors="pt"
            )
            found += model(**batch.to(model.device)).logits.argmax(-1).tolist()
    return [model.config.id2label[i] for i in found]


def clocked(work):
    """`(result, seconds, CPU seconds)`."""
    wall, cpu = time.perf_counter(), time.process_time()
    return work(), time.perf_counter() - wall, time.process_time() - cpu


def main(path: str, file: str, rows: str = "200") -> None:
    """Both, one after the other, twice."""
    start()
    model, tokenizer = load(path, "AutoModelForSequenceClassification")
    source = {"path": file, "rows": int(rows)}
    texts = [row["text"] for row in mixing.stream({"train": source}, "train", "labelled", 0)]
    settings = EvaluateSection(labelled=source, batch_size=BATCH)
    for _ in range(2):
        by_loop, wall, cpu = clocked(lambda: plain(model, tokenizer, texts))
        ours, our_wall, our_cpu = clocked(lambda: class_values("model", path, model, tokenizer, settings, 0))
        same = sum(a == b for a, b in zip(by_loop, ours["labelled/guess"], strict=True))
        print(
            f"loop {wall:.1f} s, {cpu:.1f} CPU s; evaluate {our_wall:.1f} s, {our_cpu:.1f} CPU s: {cpu / our_cpu:.2f} "
            "x; "
            f"{same} of {len(texts)} classes the same"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
