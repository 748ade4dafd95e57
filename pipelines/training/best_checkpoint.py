"""Keeping the best model of a run and stopping early: settings that fit together, and a stop that a kill cannot undo.

Transformers loads the best model at the end only if it was saved at the very step at which it was evaluated; settings
that do not line up are an error late in the start, or silently keep another model. Here saving follows evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import EarlyStoppingCallback

from pipelines import errors

LOWER_IS_BETTER = ("loss", "mse", "perplexity")


def wanted(args: dict) -> bool:
    """Whether `args:` of a stage ask for the best model instead of the last."""
    patience, metric = args.get("early_stopping_patience"), args.get("metric_for_best_model")
    return bool(args.get("load_best_model_at_end", patience is not None or metric is not None))


def defaults(args: dict) -> dict:
    """Defaults for `training.build_args`: evaluate and save at the same steps; the loss decides where nothing is named."""
    if not wanted(args):
        return {}
    metric = args.get("metric_for_best_model") or "loss"
    strategy = args.get("eval_strategy") or args.get("save_strategy") or "steps"
    steps = args.get("eval_steps") or args.get("save_steps") or 0.1
    return {
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": not metric.endswith(LOWER_IS_BETTER),
        "eval_strategy": "steps" if strategy == "best" else strategy,
        "save_strategy": strategy,
        "eval_steps": steps,
        "save_steps": steps,
        "restore_callback_states_from_checkpoint": True,  # a resumed run goes on counting, it does not start again
    }


def problems(args: dict, has_validation: bool, metrics: tuple[str, ...]) -> Iterator[tuple[str, str, object]]:
    """`(key path, message, value)` of evaluation settings that cannot work; `metrics` are the names to choose from."""
    keys = ("early_stopping_patience", "load_best_model_at_end", "metric_for_best_model", "eval_strategy")
    for key in keys:
        if not has_validation and args.get(key) not in (None, False, "no"):
            yield f"args.{key}", "needs held-out rows: set data.validation", args[key]
    name = args.get("metric_for_best_model")
    known = ("loss", *metrics)
    if name is not None and name.removeprefix("eval_") not in known:
        yield "args.metric_for_best_model", f"must be one of {', '.join(known)}{errors.meant(name, known)}", name
    patience = args.get("early_stopping_patience")
    if patience is not None and patience < 1:
        yield "args.early_stopping_patience", "must be at least 1 (or null: never stop early)", patience
    if not (wanted(args) or patience is not None):
        return
    for key in ("eval_strategy", "save_strategy"):
        if args.get(key) == "no":
            yield f"args.{key}", "the best model is found by evaluating and saving: use steps or epoch", "no"
    evaluate, save = args.get("eval_strategy"), args.get("save_strategy")
    if evaluate and save and save not in (evaluate, "best"):
        yield (
            "args.save_strategy",
            f"the best model must be saved when it is evaluated ({evaluate}); drop this key",
            save,
        )
    if args.get("eval_steps") and args.get("save_steps") and args["eval_steps"] != args["save_steps"]:
        at = args["eval_steps"]
        yield (
            "args.save_steps",
            f"the best model must be saved when it is evaluated (every {at}); drop this key",
            args["save_steps"],
        )


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
