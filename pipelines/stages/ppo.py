"""PPO: the policy writes answers, reward models and functions score them, and it learns to write better ones.

    policy:
      kind: ppo
      model: {model_name_or_path: stage:sft}                       # the policy, and a frozen copy as reference
      reward: {models: [stage:reward]}              # and / or functions: [pipelines.ppo.rewards:length_penalty]
      data: {train: prompts.jsonl, validation: heldout.jsonl}
      args: {global_batch_size: 64, total_episodes: 20000, response_length: 64, learning_rate: 1e-5, kl_coef: 0.05}

The critic starts from the first reward model (`reward.critic` names another, or `shared`). The folder holds the policy,
and `critic/` beside it. `args.advantage: rloo`, `grpo` or `reinforce` train without a critic. The trainer is
`pipelines/ppo/trainer.py`, the mathematics `pipelines/ppo/algorithm.py`, what goes wrong is named by
`pipelines/ppo/diagnosis.py`; docs/ppo.md explains all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import peft
import torch
from accelerate import PartialState
from transformers import set_seed

from pipelines import IGNORE_INDEX, errors, files, functions, launch
from pipelines.data import fingerprint, mixing, plain_text, token_file
from pipelines.data.sources import sources
from pipelines.errors import DataError, ModelError, SetupError
from pipelines.generation import with_vllm
from pipelines.generation.implicit_reward import load_reward
from pipelines.kinds import CLASSIFIER, of_kind
from pipelines.models import adapters, chat_template, loading, scorers, tag_heads, tokenizer_setup
from pipelines.ppo.checks import check_batch, check_combine, check_rows
from pipelines.ppo.config import has_critic
from pipelines.ppo.rewards import from_adapter, log_odds
from pipelines.ppo.rollouts import prompt_limit, unique
from pipelines.ppo.trainer import PPOTrainer
from pipelines.recipe import data_checks
from pipelines.recipe.model_checks import named_models, of_model
from pipelines.recipe.stage import label_problems, resolve
from pipelines.training import arguments, loop, saving
from pipelines.training.trainer import ChainTrainer

logger = logging.getLogger(__name__)

DEFAULTS = {"missing_eos_penalty": 1.0}


def reported(stage) -> tuple[str, ...]:
    """What an evaluation reports; the first decides about the best model where the recipe names none."""
    reward = stage.sections.get("reward", {})
    names = [name.rpartition("/")[2].removeprefix("stage:") for name in reward.get("models") or []]
    names += [name.rpartition(":")[2] for name in reward.get("functions") or []]
    return ("score", "kl", "ref_perplexity", "length", "eos_rate", *(f"reward/{name}" for name in unique(names)))


def problems(stage, kinds) -> Iterator[tuple[str, str, object]]:
    """What is wrong with the stage as a whole: `(key path, message, value)`."""
    model, reward = stage.sections.get("model", {}), stage.sections.get("reward", {})
    if not model.get("model_name_or_path"):
        yield "model.model_name_or_path", "the policy starts from a model: stage:NAME, a folder or a hub id", None
    if reward.get("share_base") and reward.get("tag_penalties"):
        yield (
            "reward.tag_penalties",
            "cannot be used with reward.share_base: drop one of the two",
            reward["tag_penalties"],
        )
    named, models = reward.get("functions") or [], reward.get("models") or []
    if not models and not named:
        yield "reward", "what is an answer worth? Give `models: [stage:NAME]` and/or `functions: [module:name]`", None
    implicit = of_kind(implicit_reward=True)
    scoring = (("reward", "classify", *implicit), f"reward (or classify, {', '.join(implicit)}) stage")
    yield from named_models(stage, kinds, "reward.models", models, *scoring)
    for i, name in enumerate(models):
        if (Path(resolve(name, Path())) / files.FINISHED).is_file() and not name.startswith("stage:"):
            try:
                _gate(resolve(name, Path()), reward.get("min_accuracy", 0.55))
            except ModelError as error:
                yield f"reward.models[{i}]", str(error), name
    critic, advantage = reward.get("critic"), stage.sections.get("args", {}).get("advantage")
    if has_critic(advantage) and critic == "none":
        message = "args.advantage: gae (the default) trains a critic: choose rloo, grpo or reinforce, or drop this key"
        yield "reward.critic", message, critic
    if not has_critic(advantage) and critic not in (None, "none"):
        yield "reward.critic", f"args.advantage: {advantage} has no critic: drop this key, or choose gae", critic
    if critic is not None and critic.endswith("/critic"):
        yield from of_model(stage, kinds, "reward.critic", critic, CLASSIFIER)
    elif critic not in (None, "none", "shared", model.get("model_name_or_path")):
        scoring = (("reward", "classify"), "reward (or classify) stage")
        yield from named_models(stage, kinds, "reward.critic", critic, *scoring)
    for name in models:
        kind = kinds.get(name.removeprefix("stage:")) if name.startswith("stage:") else "reward"
        if kind == "classify":
            for message, value in label_problems(stage, name, reward.get("label")):
                yield "reward.label", message, value
    for i, name in enumerate(named):
        columns, more = _columns(stage)
        if wrong := functions.problem(name, columns=columns, more=more):
            hint = ". A column is renamed with `columns: {OURS: THEIRS}`" if "missing a required" in wrong else ""
            yield f"reward.functions[{i}]", wrong + hint, name
    for tag, penalty in (reward.get("tag_penalties") or {}).items():
        for name in models:
            judge = stage.earlier.get(name.removeprefix("stage:")) if name.startswith("stage:") else None
            known = judge and (judge.sections.get("args", {}).get("tags") or [])
            if known is not None and tag not in known:
                yield (
                    f"reward.tag_penalties.{tag}",
                    f"{name} does not learn this tag: name it in its args.tags",
                    penalty,
                )
    if reward.get("tag_penalties") and not models:
        yield "reward.tag_penalties", "reward models tell tags: give reward.models", reward["tag_penalties"]
    weights = reward.get("weights")
    if weights is not None and len(weights) != len(models) + len(named):
        yield "reward.weights", f"needs {len(models) + len(named)} numbers: models first, then functions", weights
    elif weights and not (any(weights) and all(map(math.isfinite, weights))):
        yield "reward.weights", "must be numbers, one of them other than 0: else nothing is rewarded", weights
    else:
        try:
            check_combine(reward.get("combine", "sum"), (weights or [1.0] * len(models))[: len(models)])
        except SetupError as error:
            yield "reward.combine", str(error), reward.get("combine")
    if "uncertainty_coef" in reward and reward.get("combine") != "uncertainty":
        yield "reward.uncertainty_coef", "goes with combine: uncertainty; drop this key", reward["uncertainty_coef"]
    if reward.get("share_base"):
        yield from _unshared(stage, model, models, critic if has_critic(advantage) else "none")
    if reward.get("label") and not models:
        yield "reward.label", "is for a classifier in reward.models: drop this key", reward["label"]
    args, ptx = stage.sections.get("args", {}), stage.sections.get("data", {}).get("ptx")
    if bool(args.get("ptx_coef")) != bool(ptx):
        missing = "args.ptx_coef" if ptx else "data.ptx"
        yield missing, "PPO-ptx needs both data.ptx (pretraining text) and args.ptx_coef above 0", None
    for key, message, value in with_vllm.problems(args):
        yield f"args.{key}", message, value
    known = arguments.problems(stage, hardware := arguments.expected_hardware())[0]
    if known:
        if hardware.processes % known.vllm_tensor_parallel_size:
            message = f"must divide the number of processes, {hardware.processes}: each holds a part of vLLM's model"
            yield "args.vllm_tensor_parallel_size", message, known.vllm_tensor_parallel_size
        batch = known.per_device_train_batch_size * known.gradient_accumulation_steps * hardware.processes
        try:
            check_batch(batch, known.num_mini_batches, hardware.processes, known.num_generations)
        except SetupError as error:
            key = "num_generations" if batch % known.num_generations else "num_mini_batches"
            yield f"args.{key}", str(error), getattr(known, key)
    if args.get("use_vllm") and (bits := next((k for k in ("load_in_4bit", "load_in_8bit") if model.get(k)), None)):
        yield f"model.{bits}", "cannot be used with args.use_vllm (it is given whole weights): drop one of them", True
    for key in ("ptx_length", "ptx_batch_size"):
        if args.get(key) and not ptx:
            yield f"args.{key}", "is used only with data.ptx: drop this key", args[key]


def row_problems(stage) -> Iterator[tuple[str, str]]:
    """`(key path, what is wrong)` where a reward function cannot read the rows, as far as they are at hand."""
    reward, (columns, more) = stage.sections.get("reward", {}), _columns(stage)
    named, models, weights = (reward.get(key) or [] for key in ("functions", "models", "weights"))
    wrong = any(functions.problem(name, columns=columns, more=more) for name in named)
    if wrong or not _at_hand(stage) or len(weights) not in (0, len(models) + len(named)):
        return
    funcs = [functions.load(name) for name in named]
    if any(hasattr(function, "try_rows") for function in funcs):
        try:
            for rows in mixing.load(stage.data, stage.spec.rows, stage.seed):
                check_rows(funcs, rows, weights or None, len(models))
        except SetupError as error:
            yield "data", str(error)


def _columns(stage) -> tuple[list[str], bool]:
    """`(what a reward function is called with, whether there may be more)`, by the first row of each local source."""
    section, columns, more = stage.sections.get("data", {}), [], True
    if not list(data_checks.problems(section, stage.spec.rows, None, False)):
        with contextlib.suppress(DataError):  # a row that is wrong is named by the check of the rows
            columns = mixing.columns(section, stage.spec.rows)
            more = not _at_hand(stage)
    columns = ["prompts", "completions", "completion_ids", *(c for c in columns if c != "prompt")]
    return list(dict.fromkeys(columns)), more


def _at_hand(stage) -> bool:
    """Whether all prompts are in local files that are there already."""
    section = stage.sections.get("data", {})
    return all(data_checks.at_hand(s) for side in ("train", "validation") for s in sources(section, side))


def _unshared(stage, model: dict, models: list[str], critic: str | None) -> Iterator[tuple[str, str, object]]:
    """What keeps reward models or critic from being adapters on the policy's base, as far as the recipe tells."""
    base = model.get("model_name_or_path")
    if not model.get("use_peft") or not (models or critic not in ("shared", "none")):
        yield "reward.share_base", "needs model.use_peft, and reward models or a critic to be adapters too", True
    for key, name in [*((f"reward.models[{i}]", name) for i, name in enumerate(models)), ("reward.critic", critic)]:
        earlier = stage.earlier.get((name or "").removeprefix("stage:"))
        if earlier is None or name == base:
            continue
        theirs = earlier.sections.get("model", {})
        if not (earlier.kind == "reward" and theirs.get("use_peft") and theirs.get("model_name_or_path") == base):
            yield key, f"with reward.share_base: a reward stage with model.use_peft on the policy's own {base}", name


class Rows(torch.utils.data.Dataset):
    """The rows as they were read, as the trainer takes them: a table would put null under keys that other rows have,
    and take it from under those that had it, so that prompts and tools would not be what the template is to be given.
    """

    def __init__(self, rows: list[dict]):
        self.rows, self.column_names = rows, list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, asked: int | str | list[int]):
        """A row, a column, or some rows as columns."""
        if isinstance(asked, str):
            return [row[asked] for row in self.rows]
        if isinstance(asked, list):
            return {name: [self.rows[i][name] for i in asked] for name in self.column_names}
        return self.rows[asked]


class ChainPPOTrainer(ChainTrainer, PPOTrainer):
    """The PPO trainer with the chain's checkpoints."""


def run(stage) -> dict:
    """Train, evaluate, save; returns the metrics."""

    set_seed(stage.seed)
    section, reward = stage.section("model"), stage.section("reward")
    args = arguments.build_args(stage)
    tokenizer = loading.load_tokenizer(section)
    policy = loading.load_model(section, "AutoModelForCausalLM")
    added = _template(policy, tokenizer, section)
    policy = adapters.adapt(policy, section, "CAUSAL_LM", tokenizer.convert_tokens_to_ids(added))

    if reward.share_base and launch.sharded():
        raise SetupError(
            "reward.share_base: a reward model's adapter reads the policy's base outside of the policy's own forward, "
            "where shards are not whole. Drop share_base, or use plain data parallelism (ddp.yaml)."
        )

    funcs, tokenizers = [], []
    for path in reward.models or []:
        stage.report.setdefault("reward_accuracy", {})[path] = _gate(path, reward.min_accuracy)
        if reward.share_base:
            funcs.append(_on_base(path, section, policy).get_base_model())
        else:
            funcs.append(load_reward(_of(section, path), reward.label)[0])
        if reward.tag_penalties:
            funcs[-1].tag_penalty = tag_heads.TagPenalty(path, reward.tag_penalties)
        tokenizers.append(loading.load_tokenizer(_of(section, path)))
        if not reward.allow_other_template and not isinstance(funcs[-1], scorers.Classifier):
            _same_template(tokenizer, tokenizers[-1], path)
    if reward.label and not any(reward.label in f.config.id2label.values() for f in funcs):
        raise SetupError(f"reward.label: none of reward.models is a classifier with the label {reward.label!r}")
    if has_critic(args.advantage):
        start = reward.critic or _critic_start(funcs, tokenizers, reward.models or [], tokenizer, section)
    else:
        start = "none"
    for name in reward.functions or []:
        funcs.append(functions.load(name))
        tokenizers.append(None)
    critic = _critic(start, section, reward, policy, tokenizer)

    train, validation = mixing.load(stage.data, stage.spec.rows, stage.seed, report=stage.report)
    for rows in (train, validation):
        check_rows(funcs, rows, reward.weights)
    stage.report["prompts"] = {"train": len(train), "validation": len(validation)}
    for side, rows in (("train", train), ("validation", validation)):
        plain_text.report(stage.report, side, rows, partial(chat_template.holds_control_text, tokenizer))
    trainer = ChainPPOTrainer(
        model=policy,
        args=args,
        reward_funcs=funcs,
        reward_weights=reward.weights,
        reward_processing_classes=tokenizers,
        reward_combine=reward.combine,
        uncertainty_coef=reward.uncertainty_coef,
        value_model=critic,
        train_dataset=Rows(train),
        eval_dataset=Rows(validation) if validation else None,
        ptx_dataset=_pretraining_text(stage, tokenizer, loading.context_length(policy, args.ptx_length)),
        processing_class=tokenizer,
    )
    loop.fit(stage, trainer)
    metrics = saving.final_metrics(trainer)
    metrics["diagnosis"] = trainer.monitor.watch.said
    saving.save(trainer, stage.folder, tokenizer)
    _keep_samples(stage)
    return metrics


def _critic_start(funcs: list, tokenizers: list, paths: list[str], tokenizer, section) -> str:
    """What the critic starts from where the recipe does not say: the first reward model, if it can be one.

    A critic reads the policy's token ids and has a head over each position: an encoder has none, and a model with
    another vocabulary would read the ids as other words. Then it starts from the policy's own model, and that is
    logged.
    """
    own = section.model_name_or_path
    if not paths:
        return own
    model = getattr(funcs[0], "model", funcs[0])
    if not hasattr(model, "score"):
        why = f"a {type(model).__name__} has no score of each position"
    elif isinstance(funcs[0], scorers.Classifier) and model.config.num_labels > 2:
        why = f"it tells {model.config.num_labels} labels apart, a critic has one value"
    elif not _knows(tokenizers[0], tokenizer):
        why = "its vocabulary is not the policy's"
    else:
        return paths[0]
    logger.warning("the critic starts from the policy's own model, not from %s: %s", paths[0], why)
    return own


def _knows(theirs, tokenizer) -> bool:
    """Whether every token of the policy's `tokenizer` has the same id in `theirs`."""
    ids = theirs.get_vocab()
    return all(ids.get(token) == i for token, i in tokenizer.get_vocab().items())


def _critic(start: str, section, reward, policy, tokenizer):
    """The critic that starts from `start`: "shared", a reward model, or the policy's own model under a new head; None
    of "none".
    """

    if start in ("shared", "none"):
        return None if start == "none" else start
    if start == section.model_name_or_path:
        critic = adapters.on_base_of(policy) if reward.share_base else one_score(start, section, new_head=True)
    elif reward.share_base:
        return _on_base(start, section, policy)
    elif not _knows(loading.load_tokenizer(_of(section, start)), tokenizer):
        raise ModelError(
            f"reward.critic: the vocabulary of {start} is not the policy's, so it would read the policy's token ids as "
            "other words. Leave reward.critic out (the critic then starts from the policy's model), or set it to "
            "`shared`."
        )
    else:
        critic = one_score(start, section, reward.label)
    return adapters.adapt(critic, section, "SEQ_CLS")


def one_score(path: str, section, label: str | None = None, new_head: bool = False):
    """A sequence classifier with one score of each position from `path`, for a critic; a missing (random) head is an
    error.

    Of a classifier of two labels the score is the log-odds of `label`.
    """
    one, kind = _of(section, path), "AutoModelForSequenceClassification"
    if new_head or scorers.outputs(one) == 1:
        return loading.load_model(one, kind, new_head=new_head, num_labels=1)
    return log_odds(loading.load_model(one, kind), label)


def _on_base(path: str, section, policy):
    """The reward stage at `path` as an adapter on the policy's base, which must be what it was trained from."""

    folder = Path(path) / "adapter"
    base = peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path if folder.is_dir() else None
    base = os.path.normpath(folder / base) if base and base.startswith("../") else base
    if base is None or files.portable(base) != files.portable(section.model_name_or_path):
        raise ModelError(
            f"reward.share_base: {path} was trained {'from ' + base if base else 'without adapters'}, not as an "
            "adapter "
            f"on the policy's {section.model_name_or_path}. Train it so (model.use_peft), or drop reward.share_base."
        )
    return from_adapter(policy, folder)


def _pretraining_text(stage, tokenizer, context: int):
    """Windows of `context` tokens of data.ptx, an EOS after each text, as the pretrain stage makes them; or None."""

    section = stage.sections["data"]
    if not section.get("ptx"):
        return None
    folder = stage.folder.parent / ".tokens" / stage.name / "ptx"
    key = {"data": fingerprint.content({"ptx": section["ptx"]}), "sources": section["ptx"]}
    with PartialState().main_process_first():
        texts = (row["text"] for row in mixing.stream(section, "ptx", "text", stage.seed))
        token_file.tokenize_corpus(texts, tokenizer, folder, separator_id=tokenizer.eos_token_id, key=key)
    windows = token_file.Windows(folder, context)
    stage.report["ptx"] = {"tokens": windows.index["tokens"], "windows": len(windows), "context": context}
    return windows


def _of(section, path: str):
    """The `model:` section with another model: same dtype, attention and quantization, nothing that is the policy's
    own.
    """

    revision = section.model_revision if path == section.model_name_or_path else "main"
    return dataclasses.replace(
        section, model_name_or_path=path, model_revision=revision, config=None, tokenizer_name_or_path=None
    )


def ready(stage, tokenizer):
    """The policy's tokenizer as the stage uses it."""
    section = stage.section("model")
    _needs_template(tokenizer, section)
    tokenizer_setup.dress(tokenizer, section.chat_template, section.chat_template_kwargs)
    return tokenizer


def shown(stage, tokenizer, model) -> Iterator[dict]:
    """The prompts as the policy is given them, for `pipelines show`; what is too long for an answer is counted."""
    args, of = stage.sections.get("args", {}), stage.section_class("args")
    longest, response = (args.get(key, getattr(of, key)) for key in ("max_prompt_length", "response_length"))
    limit = prompt_limit(loading.positions(model), longest, response)
    sides = mixing.load(stage.data, stage.spec.rows, stage.seed, report=stage.report)
    for side, rows in zip(("train", "validation"), sides):
        if not rows:
            continue
        encoded = [chat_template.encode_prompt(tokenizer, row["prompt"]) for row in rows]
        long = [ids for ids in encoded if limit is not None and len(ids) > limit]
        stage.report[side] = {"rows": len(rows), "used": len(rows), "longer_than_the_limit": len(long), "limit": limit}
        for row, ids in zip(rows, encoded, strict=True):
            yield {"side": side, "where": row["where"], "input_ids": ids, "labels": [IGNORE_INDEX] * len(ids)}


def _template(policy, tokenizer, section) -> list[str]:
    """The policy answers under the template it was tuned with. Returns tokens added."""
    _needs_template(tokenizer, section)
    return tokenizer_setup.install_template(policy, tokenizer, section.chat_template, section.chat_template_kwargs)


def _needs_template(tokenizer, section) -> None:
    """Raises `TemplateError` where the tokenizer has no chat template and none is named."""
    if tokenizer.chat_template is None and section.chat_template is None:
        raise errors.TemplateError(
            f"the tokenizer of {section.model_name_or_path!r} has no chat template. Start from an sft stage, or set "
            "model.chat_template: plain (the policy continues the prompt as text) or chatml."
        )


def _same_template(tokenizer, theirs, path: str) -> None:
    """A reward model reads a dialogue as the policy does, unless its tokens are others altogether."""

    if (
        theirs.chat_template is None
        and tokenizer.chat_template != (chat_template.TEMPLATES / "plain.jinja").read_text()
    ):
        raise errors.TemplateError(
            f"the reward model {path} has no chat template: it would read dialogues as plain text, the policy under "
            "its "
            "template. Add the template it was trained with to its tokenizer, or set reward.allow_other_template: true."
        )
    if theirs.get_vocab() == tokenizer.get_vocab():
        ours_, theirs_ = (
            sum(chat_template.encode_answer(t, "a question", "an answer"), []) for t in (tokenizer, theirs)
        )
        if ours_ != theirs_:
            raise errors.TemplateError(
                f"the policy reads {tokenizer.decode(ours_)!r} where the reward model {path} reads "
                f"{theirs.decode(theirs_)!r}: it would judge what it was not trained on. Give both the same template "
                "(model.chat_template), or set reward.allow_other_template: true."
            )


def _gate(path: str, minimum: float) -> float | None:
    """The held-out accuracy of a reward model that is on record (None: none is); one below `minimum` is an error.

    A reward model that cannot tell held-out answers apart teaches noise: say so instead of training on it.
    """

    finished = files.read_json(Path(path) / files.FINISHED)
    metrics = (finished or {}).get("metrics") or {}
    accuracy = metrics.get("accuracy", metrics.get("eval_accuracy"))  # of a reward stage, of a classify stage
    if accuracy is None:
        logger.warning("reward model %s: no held-out accuracy on record, so its judgement was not checked", path)
        return None
    logger.info("reward model %s: held-out accuracy %.3f (at least %.2f asked)", path, accuracy, minimum)
    if accuracy < minimum:
        raise ModelError(
            f"the reward model in {path} has a held-out accuracy of {accuracy:.3f}, below reward.min_accuracy "
            f"{minimum}. "
            "Train it longer or on more data, or lower reward.min_accuracy if you know why."
        )
    return accuracy


def _keep_samples(stage) -> None:
    """The sample answers written during training belong to the result, not to what is only needed to resume."""

    source = stage.checkpoints / "samples.jsonl"
    if PartialState().is_main_process and source.is_file():
        source.replace(stage.folder / "samples.jsonl")
