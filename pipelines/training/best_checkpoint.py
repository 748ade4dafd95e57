"""Keeping the best model of a run and stopping early: settings that fit together, and a stop that a kill cannot undo.

Transformers loads the best model at the end only if it was saved at the very step at which it was evaluated; settings
that do not line up are an error late in the start, or silently keep another model. Here saving follows evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import EarlyStoppingCallback

from pipelines import errors

LOWER = """
    loss train_loss loss_per_token mse kl displacement calibration_error runtime seconds
    perplexity pseudo_perplexity ref_perplexity word_perplexity byte_perplexity bits_per_byte brier_score ter
""".split()
HIGHER = """
    accuracy subset_accuracy accuracy_per_pair accuracy_per_ranking in_order margin f1 f1_macro f1_micro
    matthews mcc pearson spearman score scores raw_scores rlhf_reward oracle win_rate ranked_win_rate eos_rate ended
    sacrebleu bleu chrf chrf++ sentence_chrf rouge1 rouge2 rougeL acc acc_norm acc_mutual_info exact_match
""".split()
WITHOUT = (None, False, "no")  # values that ask for no evaluation
PLATEAU = ("reduce_lr_on_plateau", "greedy")  # schedules that look at held-out rows


def reported(stage) -> tuple[str, ...]:
    """What evaluations of a stage report, without `eval_`; the first decides where the recipe names none."""
    report = getattr(stage.module, "reported", None)  # a kind that reports only its loss has none
    return report(stage) if report else ("loss",)


def lower_is_better(metric: str) -> bool | None:
    """Whether a metric is better when it is lower; None where that depends on what somebody wants (a length) or is not
    known here (what a judge or a task of the user's own gives).

    `metric`: a name as it is logged, with or without `eval_`, or a figure of `evaluate` (MODEL/text/perplexity,
    TASK/acc,none). A reward (`reward/NAME`) is better when it is higher, whatever its function is called.
    """
    name = metric.removeprefix("eval_")
    first, *rest = name.split("/")
    if first == "reward" and len(rest) == 1 and not name.endswith(("_std", "_count")):
        return False
    base = name.rpartition("/")[2].partition(",")[0]
    return True if base in LOWER else False if base in HIGHER else None


def wanted(args: dict) -> bool:
    """Whether `args:` of a stage ask for the best model instead of the last."""
    patience, metric = args.get("early_stopping_patience"), args.get("metric_for_best_model")
    best = patience is not None or metric is not None or args.get("save_strategy") == "best"
    return bool(args.get("load_best_model_at_end", best))


def defaults(args: dict, metrics: tuple[str, ...]) -> dict:
    """Defaults for `arguments.build_args`: evaluate and save at the same steps; `metrics[0]` decides if nothing is
    named.
    """
    metric = args.get("metric_for_best_model") or metrics[0]
    lower = lower_is_better(metric)
    named = {"metric_for_best_model": metric, **({} if lower is None else {"greater_is_better": not lower})}
    if not wanted(args):  # a schedule that waits for a plateau looks at the metric, too
        return named if "metric_for_best_model" in args or args.get("lr_scheduler_type") in PLATEAU else {}
    strategy = args.get("eval_strategy") or args.get("save_strategy") or "steps"
    steps = args.get("eval_steps") or args.get("save_steps") or 0.1
    evaluate = "steps" if strategy == "best" else strategy
    return {
        **named,
        "load_best_model_at_end": True,
        "eval_strategy": evaluate,
        "save_strategy": strategy,
        "eval_steps": steps,
        "save_steps": steps,
        "restore_callback_states_from_checkpoint": True,  # a resumed run goes on counting, it does not start again
    }


def problems(args: dict, has_validation: bool, metrics: tuple[str, ...]) -> Iterator[tuple[str, str, object]]:
    """`(key path, message, value)` of evaluation settings that cannot work; `metrics` are the names to choose from."""
    for key in (
        "early_stopping_patience",
        "load_best_model_at_end",
        "metric_for_best_model",
        "eval_strategy",
        "eval_on_start",
        "do_eval",
        "best_kl_cap",
    ):
        if not has_validation and args.get(key) not in WITHOUT:
            yield f"args.{key}", "needs held-out rows: set data.validation", args[key]
    for key, values in (("save_strategy", ("best",)), ("lr_scheduler_type", PLATEAU)):
        if not has_validation and args.get(key) in values:
            yield f"args.{key}", "needs held-out rows: set data.validation", args[key]
        elif args.get(key) in values and args.get("eval_strategy") == "no":
            yield f"args.{key}", "needs evaluations: set eval_strategy to steps or epoch", args[key]
    name = args.get("metric_for_best_model")
    if name is not None and name.removeprefix("eval_") not in metrics:
        text = f"must be one of {', '.join(metrics)}{errors.meant(name.removeprefix('eval_'), metrics)}"
        yield "args.metric_for_best_model", f"{text}: that is what this stage reports", name
    elif name is not None:
        lower, greater = lower_is_better(name), args.get("greater_is_better")
        if lower is None and greater is None:
            yield "args.greater_is_better", f"say true or false: what is better depends on what {name} is for", None
        elif lower is not None and greater == lower:
            text = f"{name} is better when {'lower' if lower else 'higher'}: drop this key"
            yield "args.greater_is_better", text, greater
    if args.get("best_kl_cap") is not None and not wanted(args):
        yield "args.best_kl_cap", "is used only with load_best_model_at_end: true", args["best_kl_cap"]
    if not (wanted(args) or args.get("early_stopping_patience") is not None):
        return
    for key in ("eval_strategy", "save_strategy"):
        if args.get(key) == "no":
            yield f"args.{key}", "the best model is found by evaluating and saving: use steps or epoch", "no"
    evaluate, save = args.get("eval_strategy"), args.get("save_strategy")
    if evaluate and save and save not in (evaluate, "best"):
        text = f"the best model must be saved when it is evaluated ({evaluate}); drop this key"
        yield "args.save_strategy", text, save
    if args.get("eval_steps") and args.get("save_steps") and args["eval_steps"] != args["save_steps"]:
        text = f"the best model must be saved when it is evaluated (every {args['eval_steps']}); drop this key"
        yield "args.save_steps", text, args["save_steps"]


def callbacks(args) -> list:
    """The callbacks for `args.early_stopping_patience`; none when it is null."""

    class EarlyStopping(EarlyStoppingCallback):
        """Transformers' own, but a run that was killed after it had stopped is still stopped when it is resumed."""

        def on_train_begin(self, args, state, control, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            if self.early_stopping_patience_counter >= self.early_stopping_patience:
                control.should_training_stop = True
                state.max_steps = state.global_step  # `ChainTrainer` takes no further step

    return [EarlyStopping(args.early_stopping_patience)] if args.early_stopping_patience else []
