"""Tasks of lm-eval: every metric through the aggregation that its task prescribes, with an interval."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings

import numpy as np

from pipelines.evaluation.figures import TIMES, Items, drawn, draws_of, ratio

SLOW = ("bleu", "chrf", "chrf++", "ter")  # metrics of a whole corpus that take long: fewer resamples, as in lm-eval
FEW, FEWER = 500, 100


def task_values(model, tokenizer, settings) -> dict[str, list]:
    """One value for each question and metric of every task of lm-eval, "TASK/METRIC", and the figures of its groups."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Tasks(TaskManager):
        """Keeps what it has loaded: the results do not say how a task aggregates."""

        def load(self, *args, **kwargs):
            self.loaded = super().load(*args, **kwargs)
            return self.loaded

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Reading the index of all its tasks takes seconds; a path needs none of it.
    known = Tasks(include_defaults=any(not task.endswith(".yaml") for task in settings.tasks))
    with contextlib.redirect_stdout(io.StringIO()):
        results = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size),
            tasks=settings.tasks,
            num_fewshot=settings.shots,
            limit=settings.limit,
            bootstrap_iters=0,
            task_manager=known,
        )
    found: dict[str, list] = {}
    for task, samples in results["samples"].items():
        how = known.loaded["tasks"][task].aggregation()
        for way in dict.fromkeys(sample["filter"] for sample in samples):  # ways to read the answer, usually one
            some = [sample for sample in samples if sample["filter"] == way]
            for metric in dict.fromkeys(metric for sample in some for metric in sample["metrics"]):
                items = [sample[metric] for sample in some if metric in sample]
                if metric != "bypass":
                    found[_key(task, metric, way)] = aggregated(items, how.get(metric), metric)
    for name, group in known.loaded["groups"].items():
        if name in results["results"]:
            found |= group_values(name, group, results["results"], found)
    return found


def _key(task: str, metric: str, way: str) -> str:
    return f"{task}/{metric}" if way == "none" else f"{task}/{metric},{way}"


def aggregated(items: list, function, metric: str) -> list:
    """The items of a metric with the figure that `function` makes of them; a plain list where that is the mean."""
    from lm_eval.api import metrics

    numbers = all(isinstance(item, (int, float)) for item in items)
    if function in (None, metrics.mean) and numbers:
        return [float(item) for item in items]
    if function is metrics.perplexity and numbers:
        return ratio([-item for item in items], [1] * len(items), np.exp)
    if function in (metrics.weighted_perplexity, metrics.bits_per_byte):  # items are (log-likelihood, words or bytes)
        last = np.exp if function is metrics.weighted_perplexity else (lambda nats: nats / math.log(2))
        return ratio([-item[0] for item in items], [item[1] for item in items], last)

    def figure(indexes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scikit-learn, for resamples in which a class does not occur
            return np.array([float(function([items[i] for i in one])) for one in indexes])

    return Items(items, drawn(figure, len(items), FEWER if metric in SLOW else FEW))


def group_values(name: str, group, results: dict, found: dict[str, list]) -> dict[str, Items]:
    """The figures of a group of tasks: lm-eval's own mean of theirs, weighted or not, with its interval."""
    out = {}
    leaves = [task.task_name for task in group.get_all_tasks()]
    for wanted in group.aggregate_metric_list or []:
        for key in results[name]:
            metric, _, way = key.partition(",")
            tasks = [task for task in leaves if key in results.get(task, {})]
            if metric != wanted.metric or not tasks:
                continue
            weights = [results[task]["sample_len"] if wanted.weight_by_size else 1 for task in tasks]
            draws = [draws_of(found[_key(task, metric, way)]) for task in tasks]
            shortest = min(len(some) for some in [*draws, np.empty(TIMES + 1)])
            mean = np.average([some[:shortest] for some in draws], axis=0, weights=weights)
            out[_key(name, metric, way)] = Items([float(some[0]) for some in draws], mean)
    return out
