"""The values that a number may have, by the name of its key: one table for every section of every kind of stage.

A key with another range in one section stands as `section.key`. `tests/recipe/test_wrong_recipes.py` holds that no
numeric key of any section is missing here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, either end left out by `over` or `under`, and `also` single ones with a meaning."""

    low: float = -math.inf
    high: float = math.inf
    over: bool = False
    under: bool = False
    also: tuple = ()
    share: bool = False  # below 1 it is a share of all steps, else a whole number of them

    def __contains__(self, value: float) -> bool:
        if value in self.also:
            return True
        if not math.isfinite(value) or (self.share and value > 1 and value != int(value)):
            return False
        above = value > self.low if self.over else value >= self.low
        return above and (value < self.high if self.under else value <= self.high)

    def __str__(self) -> str:
        parts = [] if self.low == -math.inf else [f"{'above' if self.over else 'at least'} {self.low:g}"]
        parts += [] if self.high == math.inf else [f"{'below' if self.under else 'at most'} {self.high:g}"]
        words = " and ".join(parts) or "a finite number"
        words += "".join(f", or {value}" for value in self.also)
        return words + (", and a whole number where it is above 1" if self.share else "")


ANY = Range()
COUNT, FROM_ZERO, POSITIVE = Range(1), Range(0), Range(0, over=True)
SHARE, PROBABILITY, DROPOUT = Range(0, 1, over=True), Range(0, 1), Range(0, 1, under=True)
STEPS = Range(0, over=True, share=True)
SEED = Range(0, 2**32 - 1)  # what NumPy takes

RANGES: dict[str, Range] = {
    # of every training
    "learning_rate": SHARE,
    "weight_decay": Range(0, 10),
    "adam_beta1": DROPOUT,
    "adam_beta2": DROPOUT,
    "adam_epsilon": SHARE,
    "max_grad_norm": FROM_ZERO,
    "label_smoothing_factor": DROPOUT,
    "neftune_noise_alpha": FROM_ZERO,
    "num_train_epochs": POSITIVE,
    "max_steps": Range(1, also=(-1,)),
    "warmup_steps": Range(0, share=True),
    "logging_steps": STEPS,
    "eval_steps": STEPS,
    "save_steps": STEPS,
    "eval_delay": FROM_ZERO,
    "save_total_limit": COUNT,
    "early_stopping_patience": COUNT,
    "global_batch_size": COUNT,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "dataloader_num_workers": FROM_ZERO,
    "dataloader_prefetch_factor": COUNT,
    "dataset_num_proc": COUNT,
    "ddp_timeout": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "torch_empty_cache_steps": COUNT,
    "seed": SEED,
    "data_seed": SEED,
    "pad_to_multiple_of": COUNT,
    "router_aux_loss_coef": FROM_ZERO,
    # lengths, in tokens
    "max_length": Range(2),
    "max_source_length": Range(2),
    "max_target_length": Range(2),
    "max_prompt_length": COUNT,
    "response_length": COUNT,
    "ptx_length": Range(2),
    "generation_max_length": COUNT,
    "generation_num_beams": COUNT,
    # mlm, reward
    "mlm_probability": Range(0, 1, over=True, under=True),
    "rank_margin": FROM_ZERO,
    "center_rewards_coefficient": FROM_ZERO,
    # dpo, kto
    "beta": POSITIVE,
    "desirable_weight": FROM_ZERO,
    "undesirable_weight": FROM_ZERO,
    "label_smoothing": Range(0, 0.5, under=True),  # the share of flipped labels
    "loss_weights": FROM_ZERO,
    # writing answers
    "temperature": POSITIVE,
    "evaluate.temperature": FROM_ZERO,
    "top_k": FROM_ZERO,
    "top_p": SHARE,
    "completions": Range(2),
    "samples": COUNT,
    "best_of": Range(1, 10_000),
    "batch_size": COUNT,
    "limit": COUNT,
    "shots": FROM_ZERO,
    # rank.judge
    "requests_per_minute": POSITIVE,
    "concurrency": Range(1, 256),
    "timeout": POSITIVE,
    # ppo
    "num_generations": COUNT,
    "total_episodes": COUNT,
    "num_ppo_epochs": COUNT,
    "num_mini_batches": COUNT,
    "local_rollout_forward_batch_size": COUNT,
    "num_sample_generations": FROM_ZERO,
    "critic_warmup_steps": FROM_ZERO,
    "cliprange": SHARE,
    "cliprange_value": POSITIVE,
    "gamma": PROBABILITY,
    "lam": PROBABILITY,
    "vf_coef": FROM_ZERO,
    "entropy_coef": FROM_ZERO,
    "kl_coef": FROM_ZERO,
    "kl_target": POSITIVE,
    "kl_horizon": COUNT,
    "max_approx_kl": POSITIVE,
    "best_kl_cap": POSITIVE,
    "missing_eos_penalty": POSITIVE,
    "score_clip": POSITIVE,
    "ptx_coef": FROM_ZERO,
    "ptx_batch_size": COUNT,
    "vllm_gpu_memory_utilization": SHARE,
    "vllm_tensor_parallel_size": COUNT,
    "vllm_importance_sampling_clip_max": POSITIVE,
    "vllm_importance_sampling_clip_min": FROM_ZERO,
    "min_accuracy": PROBABILITY,
    "tag_penalties": POSITIVE,
    "weights": ANY,
    "uncertainty_coef": FROM_ZERO,
    # model, tokenizer, data
    "lora_r": COUNT,
    "lora_alpha": COUNT,
    "lora_dropout": DROPOUT,
    "vocab_size": Range(200),
    "max_documents": COUNT,
    "buffer_size": COUNT,
    "weight": Range(0, 1000, over=True),
    "rows": COUNT,
}

# Keys of a new model's config, which differ from architecture to architecture, by what their names tell.
OF_CONFIG: tuple[tuple[str, Range], ...] = (
    (r"pdrop|dropout|_prob$|layerdrop", DROPOUT),
    (r"eps$|epsilon$|initializer_range|init_std|rope_theta|initializer_factor", POSITIVE),
    (
        r"^n_|^num_|_size$|_dim$|_rank$|_positions$|_position_embeddings$|_layers$|_heads$|^d_(model|ff|kv)$|_ffn_dim$",
        COUNT,
    ),
)


def of_config(key: str) -> Range:
    """The range of a key of a model's config."""
    return next((known for pattern, known in OF_CONFIG if re.search(pattern, key)), ANY)


def problems(values: dict, section: str = "", table=None) -> Iterator[tuple[str, str, object]]:
    """`(key, message, value)` of each number in `values` that is out of its range; values may be lists or mappings.

    `table(key)` gives the range of a key (default: the one in `RANGES`); a number without one must be finite.
    """
    for key, value in values.items():
        known = table(key) if table else RANGES.get(f"{section}.{key}") or RANGES.get(key, ANY)
        items = [(key, value)]
        if isinstance(value, dict) and not table:
            items = [(f"{key}.{name}", inner) for name, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            items = [(f"{key}[{i}]", inner) for i, inner in enumerate(value)]
        for at, number in items:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                if math.inf > abs(number) >= 2**63:
                    yield at, "is larger than computers count: give a number below 2^63", number
                elif number not in known:
                    yield at, f"must be {known}", number
