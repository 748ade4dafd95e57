"""Rollouts: the policy answers prompts, and every answer gets its log-probs, values and rewards.

`RolloutMaker` shares the answers of a batch out over the processes and gathers what came of them, so that all processes
hold the same `Rollouts`. It knows nothing of the optimizer, of steps or of logs: `PPOTrainer` holds it, and gives it
the wrapped model each time.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl.import_utils import is_vllm_available
from trl.models import unwrap_model_for_generation

from pipelines.errors import SetupError
from pipelines.generation import decode, with_vllm
from pipelines.generation.implicit_reward import ImplicitReward
from pipelines.generation.logprobs import collate, make_ready, sequence_scores, token_logprobs, within
from pipelines.models import loading, thoughts
from pipelines.models.chat_template import encode_answer, encode_prompt, naming
from pipelines.models.scorers import Classifier, continues
from pipelines.ppo import algorithm, checks
from pipelines.ppo.config import PPOConfig, has_critic
from pipelines.ppo.policy_and_critic import PolicyAndCritic, ValueHead, place_frozen, runs_on_fsdp
from pipelines.ppo.rewards import combined, disagreement, read_anew

logger = logging.getLogger(__name__)


@dataclass
class Rollouts:
    """B answers of the global batch, the same on every process. Tensors are (B, T) right-padded, or (B,)."""

    rows: list[int]  # of the dataset
    prompts: list[list[int]]
    responses: list[list[int]]
    mask: Tensor  # (B, T) True on real tokens
    logprobs: Tensor  # (B, T) when sampled
    ref_logprobs: Tensor  # (B, T)
    values: Tensor | None  # (B, T) when sampled; None: there is no critic
    rewards: Tensor  # (B, reward functions) as they came, NaN where one does not apply
    applies: Tensor  # (B, reward functions) False where a function gave None for an answer
    scores: Tensor  # (B,) their weighted sum
    ended: Tensor  # (B,) True where the answer ends with EOS
    seconds: dict[str, float]  # per phase, on this process
    # (B, T) log-probs under what sampled, where that was not the policy itself but vLLM; NaN where it gave none
    sampler_logprobs: Tensor | None = None
    disagreement: Tensor | None = None  # (B,) of the reward models, where they are combined

    def places(self, answers: list[int]) -> Tensor:
        """Where the real tokens of `answers`, one answer after the other, are in a flattened (B, T): int64 (N,).

        As `mask[answers]` says it, from lengths that the host knows: a mask would have to be waited for.
        """
        width = self.mask.shape[1]
        places = torch.cat([torch.arange(i * width, i * width + len(self.responses[i])) for i in answers])
        return places.to(self.mask.device)

    def importance(self, args: PPOConfig) -> Tensor | None:
        """Weights (B, T) of the tokens where vLLM sampled them (`vllm_importance_sampling_…`), else None."""
        if self.sampler_logprobs is None or not args.vllm_importance_sampling_correction:
            return None
        bounds = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        mode = args.vllm_importance_sampling_mode
        return algorithm.importance(self.logprobs, self.sampler_logprobs, self.mask, mode, *bounds)


class RewardScorer:
    """The reward functions of a run, and what each of them gives an answer.

    Args:
        functions: sequence-classification models with one label, and callables (see `PPOTrainer`). Models are frozen
        and
            placed, in place.
        weights: of each function in the score.
        tokenizers: of each function, None where it reads the policy's own ids.
        processing_class: the policy's tokenizer.
        eos_token_ids: what ends an answer of the policy.
        batch_size: answers that a model scores at once.
        keep_thoughts: whether what the policy thinks before an answer (`<think>`) is scored as part of it.
        group: answers to each prompt, one after the other.
        combine: how the models' weighted scores become one, see `rewards.combined`; "sum": by adding them up.
        uncertainty_coef: of combine="uncertainty".
    """

    def __init__(
        self,
        functions: list,
        weights: list[float],
        tokenizers: list,
        processing_class,
        eos_token_ids: list[int],
        batch_size: int,
        accelerator: Accelerator,
        keep_thoughts: bool = False,
        group: int = 1,
        combine: str = "sum",
        uncertainty_coef: float = 0.0,
    ):
        self.combine, self.uncertainty_coef = combine, uncertainty_coef
        self.keep_thoughts, self.group = keep_thoughts, group
        self.names = unique([checks.name_of(f) for f in functions])
        self.packed = [isinstance(f, nn.Module) and hasattr(f, "score") and make_ready(f) for f in functions]
        self.functions = [self._placed(f, accelerator) if isinstance(f, nn.Module) else f for f in functions]
        self.tokenizers = [None if t is None or checks.same_tokenizer(t, processing_class) else t for t in tokenizers]
        self.weights, self.processing_class, self.eos_token_ids = weights, processing_class, eos_token_ids
        self.batch_size, self.accelerator = batch_size, accelerator

    @staticmethod
    def _placed(model: nn.Module, accelerator: Accelerator) -> nn.Module:
        if isinstance(model, ImplicitReward):  # two models: each where the launcher wants it
            model.place(lambda part: place_frozen(part, accelerator))
            return model
        return place_frozen(model, accelerator)

    def __call__(
        self, dataset, rows: list[int], answers: list[tuple[list[int], list[int]]]
    ) -> list[tuple[float | None, ...]]:
        """What each function gives each of `answers` (prompt ids, response ids) to `rows` of the dataset.

        None where a function says that it does not apply to an answer, as in TRL.
        """
        responses = [response for _, response in answers]
        columns = dataset[rows]
        prompts, tools = columns.pop("prompt"), columns.get("tools") or [None] * len(rows)
        if self.keep_thoughts:
            completions = self.processing_class.batch_decode(responses, skip_special_tokens=True)
        else:
            completions, thought = thoughts.split(self.processing_class, responses)
            answers = list(answers)
            for i in range(len(rows)):
                if thought[i]:  # reward models read the answer as if it had been given without it
                    ends = responses[i][-1] in self.eos_token_ids
                    prompt, answer = encode_answer(self.processing_class, prompts[i], completions[i], tools[i])
                    answers[i] = prompt, answer if ends else answer[:-1]
        out = []
        for i, function in enumerate(self.functions):
            if isinstance(function, nn.Module):
                out.append(self._model_scores(i, answers, prompts, completions, tools).tolist())
                continue
            scores = function(prompts=prompts, completions=completions, completion_ids=responses, **columns)
            out.append(checks.read_scores(self.names[i], scores, len(rows), columns.get("where")))
        return list(zip(*out, strict=True))

    def total(self, rewards: Tensor, applies: Tensor) -> Tensor:
        """Scores (B,) of `rewards` (B, functions): the weighted sum of those that apply, models combined before."""
        given, weights = torch.where(applies, rewards, 0.0), torch.tensor(self.weights, device=rewards.device)
        if self.combine == "sum":
            return given @ weights
        members = self._members()
        others = [i for i in range(len(self.functions)) if i not in members]
        one = combined((given * weights)[:, members], self.combine, self.uncertainty_coef)
        return one + given[:, others] @ weights[others]

    def disagreement(self, rewards: Tensor) -> Tensor | None:
        """How far the models that are combined are apart (B,); None where scores are only added up."""
        if self.combine == "sum":
            return None
        weights = torch.tensor(self.weights, device=rewards.device)
        return disagreement((rewards * weights)[:, self._members()])

    def _members(self) -> list[int]:
        """The reward models that count."""
        return [i for i, f in enumerate(self.functions) if isinstance(f, nn.Module) and self.weights[i] != 0]

    def _model_scores(self, i: int, answers: list, prompts: list, completions: list[str], tools: list) -> Tensor:
        """Scores (answers,) of reward model number `i`, of the ids as they are or under its own tokenizer."""
        model, tokenizer, packed = self.functions[i], self.tokenizers[i], self.packed[i]
        if isinstance(model, Classifier):
            features = model.features(prompts, completions, continues(self.processing_class))
            sequences = [feature["input_ids"] for feature in features]
        else:
            pairs = read_anew(tokenizer, answers, prompts, completions, self.eos_token_ids, tools)
            sequences = [prompt + answer for prompt, answer in pairs]
            checks.check_lengths(sequences, model, self.names[i])
        scores = torch.empty(len(sequences))
        for chunk in chunks(_by_length([(ids,) for ids in sequences], self.group), self.batch_size):
            with self.accelerator.autocast():
                if isinstance(model, Classifier):
                    found = within(model, Classifier.forward, [features[j] for j in chunk])
                elif isinstance(model, ImplicitReward):
                    found = model([pairs[j] for j in chunk]).float()
                else:
                    ids = [sequences[j] for j in chunk]
                    found = within(model, sequence_scores, ids, packed, self.accelerator.device, self.group)
            scores[chunk] = found.cpu()
        return scores


class RolloutMaker:
    """Samples answers and measures them: see `make`.

    Args:
        args: `PPOConfig`.
        accelerator: of the trainer.
        policy: the policy as it was given, not wrapped. Under FSDP it is copied here, before it is cut up.
        ref_model: frozen and placed already; None: the policy with its adapters off.
        scorer: gives the rewards.
        eos_token_ids: what ends an answer.
        packed: whether sequences are laid end to end in one row, or padded.
        share: whether answers may stand behind one copy of their prompt, as `collate` takes it.
        vllm: an engine with `sync_weights()` and `generate(prompts, None, 1)` that samples instead; or None.
    """

    def __init__(
        self,
        args: PPOConfig,
        accelerator: Accelerator,
        policy: nn.Module,
        ref_model: nn.Module | None,
        scorer: RewardScorer,
        eos_token_ids: list[int],
        packed: bool,
        share: int = 0,
        vllm=None,
    ):
        self.args, self.accelerator, self.policy, self.ref_model = args, accelerator, policy, ref_model
        self.scorer, self.eos_token_ids, self.vllm = scorer, eos_token_ids, vllm
        self.packed, self.share = packed, share
        if vllm is None and accelerator.device.type == "cuda" and is_vllm_available():
            logger.info("vLLM is installed here: with args.use_vllm: true it would sample the answers, faster")
        self.decoder = None
        if runs_on_fsdp(accelerator):  # see `_whole_policy`; its weights come with each rollout, its buffers are there
            self.decoder = copy.deepcopy(policy).eval()
            for module in self.decoder.modules():
                module._buffers |= {k: b if b is None else b.to(accelerator.device) for k, b in module._buffers.items()}

    @torch.no_grad()
    def make(self, model: nn.Module, dataset, prompts: list[list[int]], rows: list[int], seeds: list) -> Rollouts:
        """Sample and score an answer to each of `rows` of the dataset: each process its share.

        Args:
            model: the `PolicyAndCritic`, wrapped as it is trained. It is in training mode afterwards.
            prompts: token ids of the prompt of every row of the dataset.
            seeds: for each of `rows` what `numpy.random.default_rng` takes.
        """
        args, device = self.args, self.accelerator.device
        share = len(rows) // self.accelerator.num_processes
        assert share * self.accelerator.num_processes == len(rows)
        mine = slice(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)
        my_rows, my_prompts = rows[mine], [prompts[row] for row in rows[mine]]
        seconds = {}
        model.eval()

        began = time.perf_counter()
        responses, logprobs = self._sample(model, my_prompts, seeds[mine])
        seconds["generate"] = time.perf_counter() - began

        began = time.perf_counter()
        answers = list(zip(my_prompts, responses, strict=True))
        per_token: list = [None] * share  # (2 to 4, length): log-probs of policy, reference; values; vLLM's log-probs
        group = args.num_generations if self.share else 1
        for chunk in chunks(_by_length(answers, group), args.local_rollout_forward_batch_size):
            batch = collate([answers[i] for i in chunk], self.packed, device, self.share)
            found, of_vllm = torch.cat([logprobs[i] for i in chunk]).to(device), None
            if self.vllm is not None:
                of_vllm = found
                sampled, _, values = model(batch, temperature=args.temperature)
            else:
                sampled = found
                values = model(batch, values_only=True) if has_critic(args.advantage) else None
            with self.accelerator.autocast():
                ref_logprobs = self._reference_logprobs(model, batch)
            columns = torch.stack([x for x in (sampled, ref_logprobs, values, of_vllm) if x is not None]).cpu()
            for i, part in zip(chunk, columns.split([len(responses[i]) for i in chunk], dim=1), strict=True):
                per_token[i] = part
        rewards = self.scorer(dataset, my_rows, answers)  # (share, functions)
        seconds["score"] = time.perf_counter() - began
        model.train()

        gathered = gather_object(list(zip(responses, per_token, rewards, strict=True)))
        responses, per_token, rewards = map(list, zip(*gathered, strict=True))
        lengths = torch.tensor([len(r) for r in responses], device=device)
        padded = nn.utils.rnn.pad_sequence([p.T for p in per_token], batch_first=True).to(device)  # (B, T, 2 to 4)
        applies = torch.tensor([[value is not None for value in row] for row in rewards], device=device)
        rewards = torch.tensor([[math.nan if v is None else v for v in row] for row in rewards], device=device)
        return Rollouts(
            rows=rows,
            prompts=[prompts[row] for row in rows],
            responses=responses,
            mask=torch.arange(padded.shape[1], device=device) < lengths[:, None],
            logprobs=padded[..., 0],
            ref_logprobs=padded[..., 1],
            values=padded[..., 2] if has_critic(args.advantage) else None,
            rewards=rewards,
            applies=applies,
            scores=self.scorer.total(rewards, applies),
            ended=torch.tensor([r[-1] in self.eos_token_ids for r in responses], device=device),
            seconds=seconds,
            sampler_logprobs=None if self.vllm is None else padded[..., -1],
            disagreement=self.scorer.disagreement(rewards),
        )

    def _sample(self, model: nn.Module, prompts: list[list[int]], seeds: list) -> tuple[list[list[int]], list[Tensor]]:
        """An answer to each prompt, and the log-probs of its tokens under what sampled it (vLLM: NaN where unknown)."""
        args = self.args
        if self.vllm is not None:
            self.vllm.sync_weights()
            _, responses, logprobs, _ = self.vllm.generate(prompts, None, 1)
            logprobs = logprobs or [[[None]] * len(ids) for ids in responses]
            known = [[math.nan if first is None else first for first, *_ in tokens] for tokens in logprobs]
            return [list(ids) for ids in responses], [torch.tensor(values) for values in known]
        with self._whole_policy(model) as policy, self.accelerator.autocast():
            return decode.generate(
                policy,
                prompts,
                max_new_tokens=args.response_length,
                eos_token_ids=self.eos_token_ids,
                seeds=seeds,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                batch_size=args.local_rollout_forward_batch_size,
            )

    @contextlib.contextmanager
    def _whole_policy(self, model: nn.Module):
        """The policy with all its weights on this process, for decoding: processes decode for different times."""
        if self.decoder is None:
            with unwrap_model_for_generation(model, self.accelerator) as unwrapped:
                yield unwrapped.policy
            return
        weights = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in self.policy.state_dict().items()}
        # with CPU offload the shards are on the host: decoding is done on the device all the same
        weights = {name: weight.to(self.accelerator.device) for name, weight in weights.items()}
        self.decoder.load_state_dict(weights, assign=True)
        del weights
        yield self.decoder
        for weight in self.decoder.parameters():
            weight.data = weight.new_empty(1).expand_as(weight)  # its shape, without its memory

    def _reference_logprobs(self, model: nn.Module, batch: dict) -> Tensor:
        """Log-probs (N,) of the answer tokens under the model that the policy is held to."""
        if self.ref_model is not None:
            return within(self.ref_model, token_logprobs, batch, self.args.temperature)[0]
        with self.policy.disable_adapter():
            logprobs = model(batch, logprobs_only=True, temperature=self.args.temperature)
            if self.decoder is not None:  # FSDP: else what is whole now would be trained again, and not the shards
                model.reshard()
        return logprobs


def prompt_limit(context: int | None, longest: int | None, response_length: int) -> int | None:
    """The most tokens of a prompt: what an answer leaves of the context, or `longest`; None where nothing bounds it."""
    limits = [longest, None if context is None else context - response_length]
    return min((x for x in limits if x is not None), default=None)


def encode_prompts(
    dataset, name: str, tokenizer, model: PolicyAndCritic, ref_model, args: PPOConfig
) -> list[list[int]]:
    """Token ids of every prompt of `dataset`, called `name`; all that are empty or too long are reported at once."""
    if "prompt" not in dataset.column_names:
        raise SetupError(f"{name} has no column `prompt`, but {', '.join(dataset.column_names)}")
    tools = dataset["tools"] if "tools" in dataset.column_names else [None] * len(dataset)
    where = dataset["where"] if "where" in dataset.column_names else [f"{name}, row {i}" for i in range(len(dataset))]
    prompts = []
    for prompt, its_tools, at in zip(dataset["prompt"], tools, where, strict=True):
        with naming({"where": at}):
            prompts.append(encode_prompt(tokenizer, prompt, its_tools))
    readers = [m for m in (model.policy, model.critic, ref_model) if m is not None and not isinstance(m, ValueHead)]
    context = min((c for c in map(loading.positions, readers) if c is not None), default=None)
    limit = prompt_limit(context, args.max_prompt_length, args.response_length)
    long = [i for i, ids in enumerate(prompts) if limit is not None and len(ids) > limit]
    empty = [i for i, ids in enumerate(prompts) if not ids]
    if long or empty:
        found = ((long, f"longer than {limit} tokens"), (empty, "without a single token"))
        found = "; ".join(f"{len(rows)} prompt(s) {what}, first rows {rows[:5]}" for rows, what in found if rows)
        raise SetupError(
            f"{name}: {found}. Drop or shorten them (response_length {args.response_length}, context {context})"
        )
    return prompts


def vllm_engine(policy, tokenizer, accelerator: Accelerator, args: PPOConfig, longest: int, eos_token_ids: list[int]):
    """vLLM around the policy: `sync_weights()` and `generate(prompts, None, 1)`.

    `longest` is the length of the longest prompt in tokens.
    """
    share = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return with_vllm.start(
        policy,
        tokenizer,
        accelerator,
        longest=longest,
        eos_token_ids=eos_token_ids,
        mode=args.vllm_mode,
        server_base_url=args.vllm_server_base_url,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        max_num_seqs=share * args.vllm_tensor_parallel_size,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_completion_length=args.response_length,
        logprobs=0 if args.vllm_importance_sampling_correction else None,  # of the sampled tokens alone
    )


def chunks(items: list, size: int) -> list[list]:
    """`items` in lists of `size`, the last one perhaps shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def _by_length(items: list[tuple], group: int = 1) -> list[int]:
    """Indices of `items` (tuples of token lists), shortest first; each `group` of neighbours stays together."""
    size = [sum(map(len, item)) for item in items]
    longest = [max(size[start : start + group]) for start in range(0, len(items), group)]
    return sorted(range(len(items)), key=lambda i: (longest[i // group], i))


def unique(names: list[str]) -> list[str]:
    """The names of reward functions in logs: those that occur more than once are numbered."""
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
