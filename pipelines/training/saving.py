"""What a finished training leaves: a folder that `from_pretrained` reads, and its metrics."""

from __future__ import annotations

from pathlib import Path

from accelerate import PartialState

from pipelines.models import adapters


def untied(model, weights: dict) -> dict:
    """`weights` without the second names of tied ones, under each of which FSDP and DeepSpeed gather a copy."""
    tied = getattr(model, "all_tied_weights_keys", ())  # PPO's value head is no transformers model
    return {name: weight for name, weight in weights.items() if name not in tied}


def save(trainer, folder: Path, tokenizer) -> None:
    """Write the model as a folder that `from_pretrained` reads, with the tokenizer and chat template beside it.

    Adapters are merged (at full precision, see `adapters.merge`), so that every stage leaves a plain model; as they are
    they lie in the folder `adapter` beside it. From shards the first process gathers the whole model for that.
    """
    model = trainer.model
    if trainer.structure is not None:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # by all processes, for the first
        model = adapters.filled(trainer.structure, weights) if PartialState().is_main_process else trainer.structure
    parts = {"": getattr(model, "policy", model), "critic": getattr(model, "critic", None)}
    if any(hasattr(model, "peft_config") for model in parts.values()):
        if PartialState().is_main_process:
            for name, model in parts.items():
                if hasattr(model, "peft_config"):
                    adapters.save(model, folder / name / "adapter", folder.parent)
                    model = adapters.merge(model, tokenizer)
                if model is not None:
                    model.save_pretrained(folder / name)
                    tokenizer.save_pretrained(folder / name)
    else:
        trainer.save_model(str(folder))
    if PartialState().is_main_process:
        tokenizer.save_pretrained(folder)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and stage.json says the same
    PartialState().wait_for_everyone()


def final_metrics(trainer, evaluate: bool = True, reuse: bool = False) -> dict:
    """Metrics of a finished training for stage.json: a last evaluation where there is validation data, and the log.

    With `reuse` an evaluation of the last step is not done again, where the model still is the one of that step.
    """
    state, metrics = trainer.state, {}
    if evaluate and trainer.eval_dataset is not None:
        known, entries = _last_evaluation(trainer), len(state.log_history)
        metrics = known if known and reuse else trainer.evaluate()
        if known:
            del state.log_history[entries:]  # evaluated for its texts after a resume: the figures are there already
    metrics = {k: v for k, v in metrics.items() if not k.endswith(("epoch", "_runtime", "_per_second"))}
    end = next((e for e in reversed(state.log_history) if "train_runtime" in e), {})
    for key in ("train_loss", "train_samples_per_second"):
        if key in end:
            metrics[key] = end[key]
    return {**metrics, "steps": state.global_step, "history": state.log_history}


def _last_evaluation(trainer) -> dict | None:
    """The metrics that were logged of an evaluation after the last step; None where the model is of another step."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and state.best_global_step not in (None, state.global_step):
        return None
    entries = [e for e in state.log_history if e.get("step") == state.global_step and "eval_loss" in e]
    return {k: v for k, v in entries[-1].items() if k.startswith("eval_")} if entries else None
