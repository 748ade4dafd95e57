"""What must hold before PPO starts: models that fit together, answers that end, scores that differ."""

from __future__ import annotations

import reprlib
from pathlib import Path

from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from pipelines import functions
from pipelines.errors import SetupError, meant
from pipelines.generation.implicit_reward import ImplicitReward
from pipelines.generation.logprobs import plain_model
from pipelines.models.chat_template import as_text
from pipelines.models.loading import positions, vocabulary
from pipelines.models.scorers import Classifier
from pipelines.ppo.algorithm import alike
from pipelines.ppo.config import has_critic
from pipelines.ppo.policy_and_critic import ValueHead
from pipelines.ppo.rewards import COMBINE


def check_critic(args, value_model) -> None:
    """Raise SetupError unless there is a critic where `args.advantage` has one, and none where it has not."""
    if has_critic(args.advantage) and value_model is None:
        raise SetupError(
            "value_model is None, but advantage: gae trains a critic: give one ('shared': a head on the policy), or "
            "choose an advantage without: rloo, grpo or reinforce"
        )
    if not has_critic(args.advantage) and value_model is not None:
        raise SetupError(f"advantage: {args.advantage} has no critic: value_model must be None")


def check_models(model, value_model, ref_model, reward_funcs: list, tokenizer) -> None:
    """Raise one ValueError with everything that is wrong with the models given to `PPOTrainer`."""
    problems = []
    if value_model is not None and not hasattr(plain_model(value_model), "score"):
        problems.append(
            f"value_model is a {type(value_model).__name__} without a `score` head over each position: take "
            "an AutoModelForSequenceClassification of a causal model"
        )
    every = [model, value_model, ref_model, *(f for f in reward_funcs if isinstance(f, nn.Module))]
    every = [id(module) for module in every if module is not None]
    if len(set(every)) < len(every):
        problems.append(
            "model, value_model, ref_model and reward models must be separate objects: load each for itself"
        )
    apart = value_model is not None and not isinstance(value_model, ValueHead)
    rows = vocabulary(plain_model(value_model)) if apart else None
    if rows is not None and rows < len(tokenizer):
        problems.append(
            f"value_model knows {rows} tokens and the policy's tokenizer has {len(tokenizer)}: a critic must "
            "read the policy's token ids (start it from the policy, or a reward model with that tokenizer)"
        )
    if hasattr(model, "peft_config"):
        own = model.active_adapter
        trained = ("lora_B" in n and f".{own}." in n and w.detach().any() for n, w in model.named_parameters())
        if ref_model is None and any(trained):
            problems.append(
                "the policy's adapter is already trained, so the policy without it is not what training "
                "starts from: merge the adapter into the model first, or pass a ref_model"
            )
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            problems.append("prompt-learning adapters are not supported: use LoRA")
    for function in reward_funcs:
        if isinstance(function, nn.Module):
            if function.config.num_labels != 1 and not isinstance(function, (Classifier, ImplicitReward)):
                problems.append(
                    f"reward model {name_of(function)} has {function.config.num_labels} labels, not one "
                    "score: wrap it in pipelines.models.scorers.Classifier, whose score are the log-odds of a label"
                )
        elif not callable(function):
            problems.append(f"reward function {function!r} is neither a model nor callable")
    if problems:
        raise SetupError("PPOTrainer:\n" + "\n".join(f"  - {p}" for p in problems))


def check_counts(reward_funcs: list, weights: list, tokenizers: list) -> None:
    """Raise ValueError unless there is one weight and one tokenizer (or None) per reward function."""
    for name, given in (("reward_weights", weights), ("reward_processing_classes", tokenizers)):
        if len(given) != len(reward_funcs):
            raise SetupError(f"{name} has {len(given)} entries for {len(reward_funcs)} reward function(s)")


def check_combine(combine: str, weights: list) -> None:
    """Raise SetupError unless `combine` is known and, of the reward models with these `weights`, at least two count."""
    if combine not in COMBINE:
        raise SetupError(f"combine must be of {', '.join(COMBINE)}{meant(combine, COMBINE)}")
    if combine != "sum" and (count := sum(weight != 0 for weight in weights)) < 2:
        raise SetupError(f"combine: {combine} is for several reward models, and {count} counts: name more, or drop it")


def check_ptx(args, ptx_dataset) -> None:
    """Raise ValueError unless `ptx_coef` and pretraining text are given together, each row with two tokens."""
    if (args.ptx_coef > 0) != (ptx_dataset is not None):
        raise SetupError(
            "ptx_coef is above 0, but there is no pretraining text: give ptx_dataset (data.ptx in a recipe)"
            if ptx_dataset is None
            else "pretraining text (ptx_dataset, data.ptx in a recipe) is used only with ptx_coef above 0"
        )
    if ptx_dataset is not None and (len(ptx_dataset) == 0 or len(ptx_dataset[0].get("input_ids", ())) < 2):
        raise SetupError("ptx_dataset needs rows with `input_ids` of at least two tokens")


def check_vllm(args, model) -> None:
    """Raise SetupError where vLLM cannot be given the policy's weights as they are trained."""
    if args.use_vllm and hasattr(plain_model(model), "full_precision"):
        raise SetupError(
            "use_vllm: the policy's base is loaded in 4 or 8 bits, and vLLM is given whole weights: merging the "
            "adapters "
            "into a quantized base at every rollout would sample from another policy than the one that is trained. "
            "Drop "
            "use_vllm, or load_in_4bit / load_in_8bit"
        )


def check_batch(batch: int, mini_batches: int, world: int, group: int = 1) -> None:
    """Raise ValueError unless `batch` answers divide into minibatches of equal shares for `world` processes, and into
    whole groups of answers to one prompt.
    """
    if batch % group:
        raise SetupError(
            f"num_generations={group} answers to each prompt do not divide a batch of {batch} answers "
            "(per_device_train_batch_size × gradient_accumulation_steps × processes): choose numbers that do"
        )
    if batch % mini_batches or batch // mini_batches % world:
        raise SetupError(
            f"a batch of {batch} answers (per_device_train_batch_size × gradient_accumulation_steps × processes) does "
            f"not divide into num_mini_batches={mini_batches} minibatches of equal shares for {world} process(es): "
            "choose numbers that do"
        )


def check_rows(reward_funcs: list, rows: list[dict], weights: list[float] | None = None, models: int = 0) -> None:
    """Raise SetupError where a reward function cannot read a row, or a row has nothing that rewards an answer to it.

    Functions with an attribute `try_rows` that is true are called once with all rows and empty answers: what they
    refuse, they would refuse in the middle of training. Others are left alone, they may be slow.

    Args:
        reward_funcs: reward models, which are left alone too, and functions; or functions alone.
        rows: of one side, all with the same columns.
        weights: of `models` reward models that are not in `reward_funcs`, then of these. None: all 1.
    """
    if not rows:
        return
    counted = [True] * len(reward_funcs) if weights is None else [weight != 0 for weight in weights[models:]]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    given = {"prompts": [row["prompt"] for row in rows], "completions": [""] * len(rows)}
    given["completion_ids"] = [[] for _ in rows]
    tried = [getattr(function, "try_rows", False) for function in reward_funcs]
    trying = [function for function, yes in zip(reward_funcs, tried, strict=True) if yes]
    found = [
        read_scores(name_of(function), function(**given, **columns), len(rows), columns.get("where"))
        for function in trying
    ]
    other = models > 0 or any(yes and not known for yes, known in zip(counted, tried, strict=True))
    counted = [yes for yes, known in zip(counted, tried, strict=True) if known]
    if other or not found:
        return
    for row, scores in zip(rows, zip(*found, strict=True), strict=True):
        if all(score is None for score, yes in zip(scores, counted, strict=True) if yes):
            names = ", ".join(name_of(function) for function in reward_funcs)
            raise SetupError(f"{row.get('where', 'a row')}: {names} does not apply to this row, so nothing rewards it")


def read_scores(name: str, given, count: int, where: list[str] | None = None) -> list[float | None]:
    """What the reward function `name` returned for `count` answers: numbers, None where it does not apply to one.

    Raises SetupError for anything else, which names the row by `where` if that is known.
    """
    if isinstance(given, (str, bytes, dict)) or not hasattr(given, "__len__"):
        raise SetupError(f"reward function {name} must return one number for each answer, not {reprlib.repr(given)}")
    if len(given) != count:
        raise SetupError(f"reward function {name} returned {len(given)} scores for {count} answers")
    scores: list[float | None] = []
    for i, score in enumerate(given):
        try:
            scores.append(None if score is None else functions.number(score))
        except ValueError as error:
            at = f"{where[i]}: " if where else f"answer {i}: "
            raise SetupError(f"{at}reward function {name} returned {error}: give a number, or None") from None
    return scores


def check_lengths(sequences: list[list[int]], model, name: str) -> None:
    """Raise ValueError where the reward model called `name` cannot read the longest of `sequences`."""
    limit, longest = positions(model), max(map(len, sequences))
    if limit is not None and longest > limit:
        raise SetupError(
            f"reward model {name} reads at most {limit} tokens and was given {longest}: lower response_length or drop "
            "the longest prompts"
        )


def check_rollouts(rollouts, args) -> None:
    """The gate before the first update: raise ValueError unless some answers end and scores differ.

    Args:
        rollouts: `trainer.Rollouts` of the untrained policy.
        args: `PPOConfig`, whose `allow_no_eos` and `allow_constant_scores` open the gate.
    """
    answers, problems = len(rollouts.responses), []
    if not rollouts.ended.any() and not args.allow_no_eos:
        problems.append(
            f"none of {answers} answers ended with EOS within response_length={args.response_length}: the "
            "policy has not learned to stop, or the length is too short (allow_no_eos: true to go on)"
        )
    if rollouts.scores.std() < 1e-6 and not args.allow_constant_scores:
        problems.append(
            f"all of {answers} answers got the score {rollouts.scores[0].item():.4g}: there is nothing to "
            "learn from (allow_constant_scores: true to go on)"
        )
    elif args.advantage in ("rloo", "grpo") and not args.allow_constant_scores:
        if alike(rollouts.scores, args.num_generations) == 1:
            problems.append(
                f"the {args.num_generations} answers to each of {answers // args.num_generations} prompts got the same "
                f"score: advantage: {args.advantage} compares only those, and has nothing to learn from. Raise "
                "num_generations or temperature, take another advantage or a finer reward (allow_constant_scores: true "
                "to go on)"
            )
    if problems:
        raise SetupError("PPO cannot start:\n" + "\n".join(f"  - {p}" for p in problems))


def same_tokenizer(one, other) -> bool:
    """Whether both give the same ids to every prompt and answer."""
    return one is other or (
        one.get_vocab() == other.get_vocab()
        and one.chat_template == other.chat_template
        and one.eos_token_id == other.eos_token_id
    )


def name_of(function) -> str:
    """What a reward function is called in logs: its model's folder, or its own name."""
    if isinstance(function, nn.Module):
        return Path(getattr(function.config, "_name_or_path", "") or "").name or "reward_model"
    return getattr(function, "__name__", type(function).__name__)


def named_answers(what: str, update: int, dataset, rows: list[int], of: list[int], folder: str) -> str:
    """An error text: what, in which update, for which prompts, and what to go back to.

    `rows` are those of the dataset that the answers of a batch belong to, `of` the answers that it is about.
    """
    shown = [rows[i] for i in of[:5]]
    last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    prompts = "; ".join(repr(as_text(dataset[row]["prompt"])[:60]) for row in shown)
    return (
        f"{what} in update {update}, in {len(of)} answer(s), first dataset rows {shown} ({prompts}). "
        f"Last checkpoint: {last or 'none'}"
    )
