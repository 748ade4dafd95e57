"""Masked-word training: windows whose masks depend on seed, epoch and row alone, and a loss on the hidden words alone.

The usual collator draws masks from the global random state, so a resumed run, a second process or a prefetched batch
changes them. Here the mask of a window is a function of (seed, epoch, row): the same wherever and whenever it is made.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from accelerate import PartialState
from transformers import DataCollatorForLanguageModeling

from pipelines import IGNORE_INDEX
from pipelines.errors import SetupError


class Masker:
    """`masker(window, epoch, row)` -> `{"input_ids": (context,), "labels": (context,), "row": row}`: [CLS] window [SEP]
    with words hidden.

    Labels are the hidden ids and -100 elsewhere. Of the hidden tokens 80 % become [MASK], 10 % a random token and 10 %
    stay (Devlin et al. 2019, https://arxiv.org/abs/1810.04805); whole words all become [MASK].
    """

    def __init__(self, tokenizer, probability: float, whole_words: bool, seed: int):
        """Raises ValueError where the tokenizer lacks [MASK], [CLS] or [SEP], or its words cannot be told apart."""

        self.begin, self.end = edges(tokenizer)
        self.seed = seed
        self.special = torch.tensor(sorted(tokenizer.all_special_ids))
        self.starts = word_starts(tokenizer) if whole_words else None
        replaced, randomised = (1.0, 0.0) if whole_words else (0.8, 0.1)
        self.collator = DataCollatorForLanguageModeling(
            tokenizer,
            mlm_probability=probability,
            whole_word_mask=whole_words,
            mask_replace_prob=replaced,
            random_replace_prob=randomised,
        )

    def __call__(self, window: torch.Tensor, epoch: int, row: int) -> dict:
        ids = torch.cat([torch.tensor([self.begin]), window, torch.tensor([self.end])])[None]
        special = torch.isin(ids, self.special)
        state = np.random.SeedSequence([self.seed, epoch, row]).generate_state(1, np.uint64)[0]
        self.collator.generator = torch.Generator().manual_seed(int(state >> 1))
        offsets = None if self.starts is None else word_offsets(self.starts[ids])
        ids, labels = self.collator.torch_mask_tokens(ids, special_tokens_mask=special, offset_mapping=offsets)
        return {"input_ids": ids[0], "labels": labels[0], "row": row}


class MaskedWindows(torch.utils.data.Dataset):
    """Item i: what a `Masker` makes of window i, `{"input_ids": (context,), "labels": (context,), "row": i}`."""

    def __init__(self, windows, tokenizer, probability: float, whole_words: bool, seed: int, dynamic: bool = True):
        """`windows` is a `corpus.Windows` of context - 2 tokens. Without `dynamic` every epoch hides the same words.

        Raises ValueError as `Masker`.
        """
        self.masker = Masker(tokenizer, probability, whole_words, seed)
        self.windows, self.dynamic, self.epoch = windows, dynamic, 0

    def __len__(self) -> int:
        return len(self.windows)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the beginning of each epoch, also of a resumed one."""
        if self.dynamic:
            self.epoch = epoch

    def __getitem__(self, i: int) -> dict:
        return self.masker(self.windows[i]["input_ids"], self.epoch, i)


def edges(tokenizer) -> tuple[int, int]:
    """Ids of [CLS] and [SEP] (BOS and EOS where a tokenizer has those instead); ValueError where it cannot do MLM."""
    begin = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    missing = [name for name, i in (("[MASK]", tokenizer.mask_token_id), ("[CLS]", begin), ("[SEP]", end)) if i is None]
    if missing:
        raise SetupError(
            f"the tokenizer has no {', '.join(missing)} token, so it cannot train on masked words: take an encoder's "
            "tokenizer (BERT, RoBERTa, ModernBERT …) or train one with `tokenizer: {train: wordpiece}`"
        )
    return begin, end


def word_starts(tokenizer) -> torch.Tensor:
    """For each id of the vocabulary whether it begins a word: bool (vocabulary,).

    WordPiece marks what continues a word (##); byte-level BPE and SentencePiece mark what follows a space, so that
    punctuation belongs to the word before it.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    if any(t.startswith("##") for t in tokens):
        return torch.tensor([not t.startswith("##") for t in tokens])
    for mark in ("Ġ", "▁"):
        if any(t.startswith(mark) for t in tokens):
            return torch.tensor([t.startswith((mark, "Ċ")) for t in tokens])
    raise SetupError("whole_word_mask: this tokenizer does not mark where words begin; set args.whole_word_mask: false")


def word_offsets(starts: torch.Tensor) -> np.ndarray:
    """Character spans (rows, tokens, 2) such that a token that begins a word leaves a gap to the one before it.

    Transformers' whole-word masking tells words by those gaps; packed ids have no spans of their own.
    """
    begins = np.cumsum(1 + starts.numpy().astype(np.int64), axis=1)
    return np.stack([begins, begins + 1], axis=-1)


def stack(items: list[dict]) -> dict[str, torch.Tensor]:
    """Items -> `{"input_ids", "labels"}` (rows, context), `hidden` (words,), where the labels are, and `row` (rows,):
    int64.
    """
    batch = {key: torch.stack([item[key] for item in items]) for key in ("input_ids", "labels")}
    return {**batch, "hidden": places(batch["labels"]), "row": torch.tensor([item["row"] for item in items])}


def places(labels: torch.Tensor) -> torch.Tensor:
    """Where labels (rows, context), laid end to end, are to be learned: int64 (words,). Of labels on the host."""
    return (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]


class MaskedWordTrainer:
    """Mixin before `ChainTrainer`: loss and evaluation as the mean over the hidden words of the global batch.

    Only hidden words go through the vocabulary (about a seventh of the head's work): a hook in front of the output
    embeddings picks their states. Models' own losses ignore `num_items_in_batch`, which makes gradient accumulation
    and several processes train something else.
    """

    loss_is_scaled_for_ga = True  # divided by the hidden words of the whole step

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._hidden = None
        self.model.get_output_embeddings().register_forward_pre_hook(self._pick)

    def _pick(self, module, inputs):
        return inputs if self._hidden is None else (inputs[0].flatten(0, 1)[self._hidden], *inputs[1:])

    def _logits(self, model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 logits (hidden words, vocabulary) and their labels (hidden words,)."""
        self._hidden = inputs["hidden"]
        try:
            logits = model(**{k: v for k, v in inputs.items() if k not in ("labels", "hidden")}).logits
        finally:
            hidden, self._hidden = self._hidden, None
        if logits.dim() == 3:  # MobileBERT multiplies by the embeddings without calling them: nothing was picked
            logits = logits.flatten(0, 1)[hidden]
        return logits.float(), inputs["labels"].flatten()[hidden]

    def _get_num_items_in_batch(self, batch_samples, device):
        count = sum(batch["labels"].ne(IGNORE_INDEX).sum() for batch in batch_samples)
        return self.accelerator.reduce(torch.as_tensor(count, device=device), "sum").clamp(min=1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, labels = self._logits(model, inputs)
        loss = torch.nn.functional.cross_entropy(
            logits, labels, reduction="sum", label_smoothing=self.args.label_smoothing_factor
        )
        loss = loss / num_items_in_batch * self.accelerator.num_processes  # DDP averages over processes
        return (loss, {"logits": logits}) if return_outputs else loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Over all hidden words, each counted once: `loss`, `accuracy` and `pseudo_perplexity` = exp(loss)."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        state, args = PartialState(), self.args
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        model = self.model_wrapped if sharded else self.model
        was_training = model.training
        model.eval()
        total = torch.zeros(3, dtype=torch.float64, device="cpu" if args.device.type == "mps" else args.device)
        size = args.per_device_eval_batch_size
        # A sharded model needs every process in every forward, so each does as many batches as the first.
        for start in range(0, math.ceil(len(dataset) / state.num_processes), size):
            mine = range(state.process_index + start * state.num_processes, len(dataset), state.num_processes)[:size]
            batch = self.data_collator([dataset[i] for i in mine or [0]])
            if not mine:
                batch["hidden"] = batch["hidden"][:0]
            with torch.no_grad(), self.compute_loss_context_manager():
                logits, labels = self._logits(model, self._prepare_inputs(batch))
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            found = [loss.double(), logits.argmax(-1).eq(labels).sum().double(), torch.tensor(float(len(labels)))]
            total += torch.stack([value.to(total) for value in found])
        if state.num_processes > 1:
            torch.distributed.all_reduce(total)
        model.train(was_training)
        loss, right, words = total.tolist()
        prefix = metric_key_prefix
        metrics = {
            f"{prefix}_loss": loss / words,
            f"{prefix}_accuracy": right / words,
            f"{prefix}_pseudo_perplexity": math.exp(min(loss / words, 700)),
            f"{prefix}_hidden_words": int(words),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics
