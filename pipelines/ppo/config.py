"""Settings of PPO training: `TrainingArguments` plus PPO's own, each with the effect of raising it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from transformers import TrainingArguments

from pipelines import ranges
from pipelines.errors import SetupError

# What a setting that is left out means for each `advantage`, and (None) the settings that this one does not have.
_NO_CRITIC = {"num_ppo_epochs": 1, "vf_coef": None, "cliprange_value": None, "lam": None, "critic_warmup_steps": None}
_OF_TOKENS = {"kl_estimator": "k1", "kl_placement": "reward", "scale_rewards": None, "loss_type": None}
_OF_ANSWERS = {"gamma": None, "whiten_rewards": None}
METHODS: dict[str, dict] = {
    "gae": {"num_generations": 1, "num_ppo_epochs": 4, **_OF_TOKENS, "normalize_advantages": None},
    "reinforce": {"num_generations": 1, **_NO_CRITIC, **_OF_TOKENS, "normalize_advantages": None},
    "rloo": {"num_generations": 2, **_NO_CRITIC, **_OF_TOKENS, **_OF_ANSWERS},
    "grpo": {
        **{"num_generations": 8, "kl_estimator": "k3", "kl_placement": "loss"},
        **{"scale_rewards": "group", "loss_type": "dapo", "normalize_advantages": None},
        **_NO_CRITIC,
        **_OF_ANSWERS,
    },
}


def has_critic(advantage: str | None) -> bool:
    """Whether this `advantage` (None: the default) trains a critic."""
    return advantage in (None, "gae")


@dataclass
class PPOConfig(TrainingArguments):
    """Names are those of TRL 1.12's `PPOConfig` where it had the setting, of its RLOO and GRPO configs for the rest.

    One *update* (one `global_step`: what `logging_steps`, `save_steps`, `eval_steps`, `max_steps` and the
    learning rate schedule count) samples `batch_size` = `per_device_train_batch_size` × `gradient_accumulation_steps` ×
    processes answers, `num_generations` to each prompt, and takes `num_ppo_epochs` × `num_mini_batches` optimizer steps
    on them. `per_device_train_batch_size` bounds the rows of one forward and backward and, like gradient accumulation,
    changes memory and speed but never the loss.

    Defaults that differ from `TrainingArguments`: `learning_rate` 3e-6 (right at 1B parameters; 1e-5 and more
    for tiny models), `adam_epsilon` 1e-5 (N+ details, 2403.17031), `logging_steps` 1. Training is in fp32
    unless `bf16` is set.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "Higher learns faster and runs away sooner."})
    adam_epsilon: float = field(
        default=1e-5, metadata={"help": "Higher damps the steps of weights with tiny gradients."}
    )
    logging_steps: float = field(
        default=1, metadata={"help": "Updates between two log lines (fraction of all if < 1)."}
    )

    # The method
    advantage: Literal["gae", "rloo", "grpo", "reinforce"] = field(
        default="gae",
        metadata={
            "help": "What an answer is compared with. 'gae': PPO, with the values of a critic; the others have none. "
            "'rloo': with the other answers to its prompt; 'grpo': with all of them, in deviations; 'reinforce': with "
            "all answers of the batch."
        },
    )
    num_generations: int | None = field(
        default=None,
        metadata={
            "help": "Answers to each prompt in a batch. More compares each with more others, on fewer prompts. None: "
            "1, with rloo 2, with grpo 8."
        },
    )
    scale_rewards: Literal["group", "batch", "none"] | None = field(
        default=None,
        metadata={
            "help": "grpo: advantages are divided by the deviation of the scores over the answers to the prompt "
            "('group', the default) or over the batch, or not at all."
        },
    )
    loss_type: Literal["dapo", "bnpo", "grpo", "dr_grpo"] | None = field(
        default=None,
        metadata={
            "help": "grpo: what the loss is a mean over. 'dapo' (the default): all tokens of the batch; 'bnpo': those "
            "of the minibatch; 'grpo': answers, of the mean over each one's tokens; 'dr_grpo': as if every answer had "
            "response_length tokens."
        },
    )
    normalize_advantages: bool = field(
        default=False, metadata={"help": "rloo: bring the advantages of a batch to mean 0 and deviation 1."}
    )

    # How much to train
    total_episodes: int | None = field(
        default=None,
        metadata={
            "help": "Answers sampled in all, rounded up to whole updates. None: `num_train_epochs` times "
            "the prompts (times num_generations). `max_steps`, where given, wins."
        },
    )
    num_ppo_epochs: int | None = field(
        default=None,
        metadata={
            "help": "Passes over each batch of answers. More uses them better but moves further off-policy. None: 4 "
            "with gae, else 1."
        },
    )
    num_mini_batches: int = field(
        default=1,
        metadata={"help": "Optimizer steps per pass. More steps, each from fewer answers, hence noisier."},
    )

    # Rollouts
    response_length: int = field(
        default=53,
        metadata={"help": "Longest answer in tokens. Higher costs time and memory; too low cuts answers before EOS."},
    )
    keep_thoughts: bool = field(
        default=False,
        metadata={"help": "Whether what the policy thinks before an answer (`<think>`) is scored as part of it."},
    )
    temperature: float = field(
        default=0.7,
        metadata={
            "help": "Divides the logits when sampling, and in every log-prob of policy and reference. "
            "Higher explores more."
        },
    )
    top_k: int = field(
        default=0,
        metadata={
            "help": "Sample among the k likeliest tokens, 0: all. With k > 0 the sampled distribution is no "
            "longer the one whose log-probs PPO uses: keep 0 unless the model is weak enough to "
            "derail."
        },
    )
    top_p: float = field(
        default=1.0,
        metadata={"help": "Sample among the likeliest tokens that hold this much probability; see top_k. 1: all."},
    )
    local_rollout_forward_batch_size: int = field(
        default=64,
        metadata={"help": "Rows per process decoded or scored at once (no gradients). Higher is faster, takes memory."},
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Prompts with more tokens than this are an error before training (never cut). None: "
            "what the model's context leaves beside response_length."
        },
    )

    use_vllm: bool = field(
        default=False,
        metadata={
            "help": "Sample with vLLM (NVIDIA GPUs; `pip install trl[vllm]`). Log-probs are computed anew, by the "
            "policy. vLLM's random streams are its own: a resumed run goes on, but not with the same answers."
        },
    )
    vllm_mode: Literal["colocate", "server"] = field(
        default="colocate",
        metadata={"help": "'colocate': on the training GPUs. 'server': on others, where `vllm serve` runs."},
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "Where that server listens, e.g. http://localhost:8000 (only with 'server')."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3,
        metadata={
            "help": "Share of GPU memory for vLLM with 'colocate'. Higher samples faster and leaves less to train."
        },
    )
    vllm_tensor_parallel_size: int = field(
        default=1,
        metadata={"help": "Processes that hold one copy of vLLM's model together ('colocate'). Higher: larger models."},
    )
    vllm_enable_sleep_mode: bool = field(
        default=False,
        metadata={"help": "vLLM gives its memory back while training ('colocate'); waking it up costs time."},
    )
    vllm_importance_sampling_correction: bool = field(
        default=True,
        metadata={
            "help": "Weigh the policy's loss by the ratio of its own probability to vLLM's, which rounds otherwise."
        },
    )
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        field(
            default="sequence_mask",
            metadata={
                "help": "That ratio is of each token or of a whole answer (sequence); where it is out of bounds it is "
                "cut to them (truncate), or the token or answer does not count (mask)."
            },
        )
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=3.0, metadata={"help": "Its upper bound. Higher lets answers that vLLM likes too little weigh more."}
    )
    vllm_importance_sampling_clip_min: float | None = field(
        default=None, metadata={"help": "Its lower bound. Higher: what vLLM likes too much weighs more, or is masked."}
    )

    # Reward
    kl_coef: float = field(
        default=0.05,
        metadata={"help": "Weight of the KL penalty. Higher stays nearer to the reference and gains less reward."},
    )
    kl_estimator: Literal["k1", "k2", "k3"] | None = field(
        default=None,
        metadata={
            "help": "Per-token KL estimator: k1 unbiased and noisy, k3 unbiased and never negative, k2 "
            "biased and smooth (http://joschu.net/blog/kl-approx.html). None: k1, with grpo k3."
        },
    )
    kl_placement: Literal["reward", "loss"] | None = field(
        default=None,
        metadata={
            "help": "'reward': the KL is subtracted from each token's reward (InstructGPT), with rloo and grpo from "
            "the answer's score. 'loss': it is a term of the loss instead (there k2 has the right gradient; k1's is 0 "
            "on average). None: reward, with grpo loss."
        },
    )
    kl_target: float | None = field(
        default=None,
        metadata={
            "help": "Adapt kl_coef so that the KL per answer (nats) goes to this (Ziegler 2019). Higher "
            "allows to go further from the reference. None: kl_coef is fixed."
        },
    )
    kl_horizon: int = field(
        default=10_000,
        metadata={"help": "Episodes over which kl_coef adapts. Higher adapts more slowly. Only with kl_target."},
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Taken from the score of an answer that does not end. Higher makes answers end sooner."},
    )
    normalize_scores: bool = field(
        default=False,
        metadata={
            "help": "Bring scores to mean 0 and deviation 1 by the running moments of all of them (kept in "
            "checkpoints)."
        },
    )
    score_clip: float | None = field(
        default=None,
        metadata={"help": "Clip scores to ± this, after normalising. Higher lets outliers weigh more. None: never."},
    )
    whiten_rewards: bool = field(
        default=False,
        metadata={"help": "Scale the per-token rewards of a batch to deviation 1 (their mean is kept)."},
    )

    # The losses
    cliprange: float = field(
        default=0.2,
        metadata={"help": "How far a token's probability ratio may move from 1 in one update. Higher: bolder steps."},
    )
    vf_coef: float = field(
        default=0.1, metadata={"help": "Weight of the critic's loss. Higher: the critic learns faster."}
    )
    cliprange_value: float = field(
        default=0.2,
        metadata={"help": "How far a value may move in one update. Raise it when scores are large."},
    )
    gamma: float = field(
        default=1.0,
        metadata={"help": "Discount per token. Lower makes the score at the end count less early on."},
    )
    lam: float = field(
        default=0.95,
        metadata={"help": "GAE's λ. Higher trusts the critic less: less bias, more variance of the advantages."},
    )
    entropy_coef: float = field(
        default=0.0, metadata={"help": "Weight of an entropy bonus. Higher keeps the policy more random."}
    )
    max_approx_kl: float | None = field(
        default=None,
        metadata={
            "help": "Skip the rest of an update when a minibatch has moved further than this (½·log-ratio² "
            "per token, e.g. 0.02). Higher stops later. None: never."
        },
    )
    critic_warmup_steps: int = field(
        default=0,
        metadata={"help": "Updates that train the critic alone. More gives a useless critic time to become one."},
    )
    ptx_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a language-modelling loss on pretraining text, mixed into every step (PPO-ptx, "
            "InstructGPT 2203.02155). Higher keeps more of what the model knew. 0: none."
        },
    )
    ptx_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows of pretraining text per optimizer step. More costs time. None: as many as answers."},
    )

    # Watching, and the gates before training
    diagnosis: Literal["warn", "stop", "off"] = field(
        default="warn",
        metadata={
            "help": "When a known pathology shows (pipelines/ppo/diagnosis.py): say so, or save and stop; "
            "the same command then goes on, `diagnosis: warn` without stopping again."
        },
    )
    num_sample_generations: int = field(
        default=10,
        metadata={"help": "How often in the whole training sample answers are written to samples.jsonl. 0: never."},
    )
    best_kl_cap: float | None = field(
        default=None,
        metadata={
            "help": "With load_best_model_at_end: a checkpoint whose eval_kl (nats per answer) is above "
            "this is never the best. Higher allows stronger and stranger policies."
        },
    )
    allow_constant_scores: bool = field(
        default=False,
        metadata={"help": "Train although all answers to the first prompts get the same score."},
    )
    allow_no_eos: bool = field(
        default=False,
        metadata={"help": "Train although the policy never ends an answer within response_length."},
    )

    def __post_init__(self):
        given = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in METHODS.get(self.advantage, {}).items():
            if name not in given:
                setattr(self, name, value)
        problems = self._problems()
        if problems:
            raise SetupError("PPOConfig:\n" + "\n".join(f"  - {p}" for p in problems))
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trainable weight is used in every forward
        super().__post_init__()

    def _problems(self) -> list[str]:
        """Everything wrong with PPO's own settings, all at once."""
        out = []

        def need(ok: bool, text: str) -> None:
            if not ok:
                out.append(text)

        theirs = {field.name for field in fields(TrainingArguments)}
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in theirs}
        out += [f"{key} {message}, is {value}" for key, message, value in ranges.problems(own)]
        defaults = {field.name: field.default for field in fields(self)}
        need(
            self.advantage in METHODS,
            f"advantage must be one of {', '.join(METHODS)}, is {self.advantage!r}",
        )
        for name in (name for name, value in METHODS.get(self.advantage, {}).items() if value is None):
            others = [method for method, its in METHODS.items() if its.get(name, "the default") is not None]
            need(
                getattr(self, name) == defaults[name],
                f"{name} is for advantage: {' or '.join(others)}, with {self.advantage} it has no effect: leave it out",
            )
        need(
            self.advantage not in ("rloo", "grpo") or (self.num_generations or 0) >= 2,
            f"num_generations must be at least 2 with advantage: {self.advantage}, which compares the answers to a "
            f"prompt with each other, is {self.num_generations}",
        )
        for name, known in (
            ("scale_rewards", ("group", "batch", "none")),
            ("loss_type", ("dapo", "bnpo", "grpo", "dr_grpo")),
        ):
            value = getattr(self, name)
            need(value is None or value in known, f"{name} must be one of {', '.join(known)}, is {value!r}")
        need(
            self.kl_estimator in ("k1", "k2", "k3"),
            f"kl_estimator must be k1, k2 or k3, is {self.kl_estimator!r}",
        )
        need(
            self.kl_placement in ("reward", "loss"),
            f"kl_placement must be reward or loss, is {self.kl_placement!r}",
        )
        need(
            self.diagnosis in ("warn", "stop", "off"),
            f"diagnosis must be warn, stop or off, is {self.diagnosis!r}",
        )
        need(
            self.vllm_mode in ("colocate", "server"),
            f"vllm_mode must be colocate or server, is {self.vllm_mode!r}",
        )
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        of_vllm = sorted(name for name in given if name.startswith("vllm_"))
        need(self.use_vllm or not of_vllm, f"{', '.join(of_vllm)} needs use_vllm: true, or leave it out")
        need(
            not self.use_vllm or self.vllm_server_base_url is None or self.vllm_mode == "server",
            "vllm_server_base_url is used only with vllm_mode: server",
        )
        for name in ("gpu_memory_utilization", "tensor_parallel_size", "enable_sleep_mode"):
            need(
                self.vllm_mode == "colocate" or f"vllm_{name}" not in given,
                f"vllm_{name} is for vllm_mode: colocate; with server it is set where the server is started",
            )
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        mode = self.vllm_importance_sampling_mode
        modes = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
        need(mode in modes, f"vllm_importance_sampling_mode must be one of {', '.join(modes)}, is {mode!r}")
        need(
            self.advantage != "rloo" or not self.use_vllm or "sequence" in str(mode),
            f"vllm_importance_sampling_mode {mode} weighs tokens, and rloo's loss is of whole answers: take sequence_…",
        )
        need(
            low is None or high is None or low < high,
            f"vllm_importance_sampling_clip_min {low} must be below vllm_importance_sampling_clip_max {high}",
        )
        need(
            (low, high) != (None, None) or "mask" in str(mode),
            f"vllm_importance_sampling_mode {mode} needs vllm_importance_sampling_clip_min or _clip_max",
        )
        need(
            self.kl_target is None or self.kl_coef > 0,
            "kl_target multiplies kl_coef up and down, which does nothing while kl_coef is 0",
        )
        unused = {
            "auto_find_batch_size": False,
            "label_smoothing_factor": 0.0,
            "neftune_noise_alpha": None,
            "torch_compile": False,
            "use_liger_kernel": False,
        }
        for name, off in unused.items():
            need(getattr(self, name) == off, f"{name} has no effect in PPO: leave it out")
        return out
