"""PPO: the policy writes answers, reward models and functions score them, and it learns to write better ones.

    policy:
      kind: ppo
      model: {model_name_or_path: stage:sft}                       # the policy, and a frozen copy as reference
      reward: {models: [stage:reward]}                             # and / or functions: [my_rewards:length_penalty]
      data: {train: prompts.jsonl, validation: heldout.jsonl}
      args: {global_batch_size: 64, total_episodes: 20000, response_length: 64, learning_rate: 1e-5, kl_coef: 0.05}

The critic starts from the first reward model. The folder holds the policy, and `critic/` beside it. The trainer is
`pipelines/ppo/trainer.py`, the mathematics `pipelines/ppo/algorithm.py`.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

SECTIONS = {
    "model": "pipelines.sections:ModelSection",
    "reward": "pipelines.sections:RewardSection",
    "data": "pipelines.sections:DataSection",
    "args": "pipelines.sections:PPOArguments",
}
ROWS = "prompts"
DEFAULTS = {"missing_eos_penalty": 1.0}


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""
    model, reward = stage.sections.get("model", {}), stage.sections.get("reward", {})
    if not model.get("model_name_or_path"):
        yield "model.model_name_or_path", "the policy starts from a model: stage:NAME, a folder or a hub id", None
    functions, models = reward.get("functions") or [], reward.get("models") or []
    if not models and not functions:
        yield "reward", "what is an answer worth? Give `models: [stage:NAME]` and/or `functions: [module:name]`", None
    for i, name in enumerate(models):
        kind = kinds.get(name.removeprefix("stage:")) if name.startswith("stage:") else "reward"
        if kind not in (None, "reward"):
            yield f"reward.models[{i}]", f"must be a reward stage, this one is of kind {kind}", name
    for i, name in enumerate(functions):
        if ":" not in name:
            yield f"reward.functions[{i}]", "is written package.module:function", name
    weights = reward.get("weights")
    if weights is not None and len(weights) != len(models) + len(functions):
        yield "reward.weights", f"needs {len(models) + len(functions)} numbers: models first, then functions", weights


def run(stage) -> dict:
    """Train, evaluate, save; returns the metrics."""
    from datasets import Dataset
    from transformers import set_seed

    from pipelines import data, models, training
    from pipelines.ppo.trainer import PPOTrainer

    class Trainer_(training.ChainTrainer, PPOTrainer):
        """The PPO trainer with the chain's checkpoints."""

    set_seed(stage.seed)
    section, reward = stage.section("model"), stage.section("reward")
    args = training.build_args(stage, **DEFAULTS)
    tokenizer = models.load_tokenizer(section)
    policy = models.load_model(section, "AutoModelForCausalLM")
    added = _template(policy, tokenizer, section)

    funcs, tokenizers = [], []
    for path in reward.models or []:
        _gate(path, reward.min_accuracy)
        funcs.append(scorer(path, section))
        tokenizers.append(models.load_tokenizer(_of(section, path)))
    for name in reward.functions or []:
        module, _, function = name.partition(":")
        funcs.append(getattr(importlib.import_module(module), function))
        tokenizers.append(None)
    start = reward.critic or (reward.models or [None])[0]
    critic = scorer(start, section) if start else scorer(section.model_name_or_path, section, new_head=True)

    policy = models.adapt(policy, section, "CAUSAL_LM", tokenizer.convert_tokens_to_ids(added))
    critic = models.adapt(critic, section, "SEQ_CLS")

    train, validation = data.load(stage.sections["data"], ROWS, stage.seed)
    stage.report["prompts"] = {"train": len(train), "validation": len(validation)}
    trainer = Trainer_(
        model=policy,
        args=args,
        reward_funcs=funcs,
        reward_weights=reward.weights,
        reward_processing_classes=tokenizers,
        value_model=critic,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(validation) if validation else None,
        processing_class=tokenizer,
    )
    training.fit(stage, trainer)
    metrics = training.final_metrics(trainer)
    training.save(trainer, stage.folder, tokenizer)
    _keep_samples(stage)
    return metrics


def scorer(path: str, section, new_head: bool = False):
    """A sequence classifier with one score from `path`; a missing (random) score head is an error."""
    from pipelines import models

    return models.load_model(_of(section, path), "AutoModelForSequenceClassification", new_head=new_head, num_labels=1)


def _of(section, path: str):
    """The `model:` section with another model: same dtype, attention and quantization, nothing that is the policy's own."""
    import dataclasses

    revision = section.model_revision if path == section.model_name_or_path else "main"
    return dataclasses.replace(
        section, model_name_or_path=path, model_revision=revision, config=None, tokenizer_name_or_path=None
    )


def _template(policy, tokenizer, section) -> list[str]:
    """The policy answers under the template it was tuned with; one must be there or be named. Returns tokens added."""
    from pipelines import chat

    if tokenizer.chat_template is None and section.chat_template is None:
        raise chat.TemplateError(
            f"the tokenizer of {section.model_name_or_path!r} has no chat template. Start from an sft stage, or set "
            "model.chat_template: plain (the policy continues the prompt as text) or chatml."
        )
    return chat.install_template(policy, tokenizer, section.chat_template)


def _gate(path: str, minimum: float) -> None:
    """A reward model that cannot tell held-out answers apart teaches noise: say so instead of training on it."""
    from pipelines import artifact
    from pipelines.models import ModelError

    finished = artifact.read_json(Path(path) / artifact.FINISHED)
    accuracy = ((finished or {}).get("metrics") or {}).get("accuracy")
    if accuracy is None:
        logger.warning("%s has no held-out accuracy on record: its judgement was not checked", path)
        return
    logger.info("reward model %s: held-out accuracy %.3f (at least %.2f asked)", path, accuracy, minimum)
    if accuracy < minimum:
        raise ModelError(
            f"the reward model in {path} has a held-out accuracy of {accuracy:.3f}, below reward.min_accuracy {minimum}. "
            "Train it longer or on more data, or lower reward.min_accuracy if you know why."
        )


def _keep_samples(stage) -> None:
    """The sample answers written during training belong to the result, not to what is only needed to resume."""
    from accelerate import PartialState

    source = stage.checkpoints / "samples.jsonl"
    if PartialState().is_main_process and source.is_file():
        source.replace(stage.folder / "samples.jsonl")
