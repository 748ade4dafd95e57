"""Every family of models through every stage that it can take, as tiny models of the real architecture.

A family is its architecture and what its public checkpoints bring along: kind of vocabulary, special tokens, chat
template, spare rows. `FAMILIES_TABLE=docs/models.md pytest tests/test_families.py` also writes the table in that file.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from tiny_words import WORDS

from pipelines.chain import chain
from pipelines.generation.decode import can_decode_lean, generate
from pipelines.generation.logprobs import collate, make_ready, token_logprobs
from pipelines.models import chat_template, loading, tokenizer_setup
from pipelines.recipe.recipe import load
from pipelines.speed import fast_model, packed_attention, packing
from pipelines.training import saving

TEXT = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
INST = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
TURNS = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
BASE = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
LLAMA = {**BASE, "num_key_value_heads": 2, "max_position_embeddings": 96}
GPT = {"words": "bpe", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "special": ["<|endoftext|>"]}
QWEN = {
    "words": "bpe",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "template": CHATML,
    "special": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "spare": 50,
}
SENTENCE = {
    "words": "unigram",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "begin": "<s>",
    "special": ["<unk>", "<s>", "</s>"],
    "template": INST,
}
GEMMA = {
    "words": "unigram",
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "begin": "<bos>",
    "template": TURNS,
    "ends": "<end_of_turn>",
    "special": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
}

# What is particular about each family, its config, its tokenizer.
CAUSAL = {
    "gpt2": ("tied, no PAD, no template", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96}, GPT),
    "gpt_neox": (
        "Pythia: untied, spare rows, no PAD, no template",
        {**BASE, "max_position_embeddings": 96, "tie_word_embeddings": False},
        {**GPT, "spare": 50},
    ),
    "opt": (
        "positions from 2, BOS = EOS, begins with it, no template",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 96,
        },
        {
            "words": "bpe",
            "eos_token": "</s>",
            "bos_token": "</s>",
            "pad_token": "<pad>",
            "begin": "</s>",
            "special": ["<s>", "<pad>", "</s>"],
        },
    ),
    "llama": ("untied, SentencePiece, BOS in the template, no PAD", {**LLAMA, "tie_word_embeddings": False}, SENTENCE),
    "smollm": (
        "Llama's architecture, tied, PAD = EOS",
        {**LLAMA, "model_type": "llama", "tie_word_embeddings": True},
        {**QWEN, "pad_token": "<|im_end|>"},
    ),
    "mistral": (
        "sliding window, SentencePiece, no PAD",
        {**LLAMA, "sliding_window": 8, "tie_word_embeddings": False},
        SENTENCE,
    ),
    "qwen2": ("biased projections, spare rows, own PAD and template", {**LLAMA, "tie_word_embeddings": True}, QWEN),
    "qwen3": ("normed queries and keys, spare rows", {**LLAMA, "head_dim": 8, "tie_word_embeddings": True}, QWEN),
    "gemma": ("scaled embeddings, template ends with a token that is not EOS", {**LLAMA, "head_dim": 8}, GEMMA),
    "gemma2": (
        "capped attention and logits, every other layer a sliding window",
        {**LLAMA, "head_dim": 8, "sliding_window": 8},
        GEMMA,
    ),
    "gemma3_text": (
        "two rotary bases, sliding windows",
        {**LLAMA, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        GEMMA,
    ),
    "phi": (
        "parallel blocks, partial rotary, head with a bias, no PAD, no template",
        {**BASE, "max_position_embeddings": 96, "tie_word_embeddings": False},
        GPT,
    ),
    "bloom": (
        "positions by ALiBi: no limit, attention of its own, no template",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        GPT,
    ),
}
WORDPIECE = {
    "words": "wordpiece",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
    "special": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "segments": True,
}
ROBERTA = {
    "words": "bpe",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
    "unk_token": "<unk>",
    "special": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
}
ENCODERS = {
    "bert": ("segments, pooler that masked words do not train", {**BASE, "max_position_embeddings": 64}, WORDPIECE),
    "roberta": (
        "positions from PAD + 1, one segment",
        {**BASE, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
        ROBERTA,
    ),
    "distilbert": (
        "no segments",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
        {**WORDPIECE, "segments": False},
    ),
    "deberta-v2": (
        "v3: relative positions, SentencePiece",
        {
            **BASE,
            "max_position_embeddings": 64,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
        {**WORDPIECE, "words": "unigram"},
    ),
    "modernbert": (
        "rotary, local and global attention, no segments",
        {**BASE, "max_position_embeddings": 64, "local_attention": 8},
        {**WORDPIECE, "words": "bpe", "segments": False},
    ),
    "albert": (
        "layers share weights, factorised embeddings, SentencePiece",
        {**BASE, "embedding_size": 16, "max_position_embeddings": 64},
        {**WORDPIECE, "words": "unigram"},
    ),
}
SEQ2SEQ = {
    "t5": (
        "relative positions, SentencePiece, starts with PAD",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        {
            "words": "unigram",
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "end": "</s>",
            "special": ["<pad>", "</s>", "<unk>"],
        },
    ),
    "bart": (
        "learned positions from 2, starts with EOS",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": 2,
        },
        {**ROBERTA, "begin": "<s>", "end": "</s>"},
    ),
}
QUICK = ("gpt_neox", "gemma", "roberta", "t5")  # the others are slow together


def families(of):
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in of]


def make_tokenizer(words, special, begin=None, end=None, template=None, segments=False, spare=0, ends=None, **names):
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    if words == "bpe":
        tok, trainer = Tokenizer(kinds.BPE()), trainers.BpeTrainer
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        settings = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    elif words == "wordpiece":
        tok, trainer, settings = Tokenizer(kinds.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer, {}
        tok.normalizer, tok.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        tok.decoder = decoders.WordPiece()
    else:
        tok, trainer, settings = Tokenizer(kinds.Unigram()), trainers.UnigramTrainer, {}
        settings = {"unk_token": names["unk_token"], "initial_alphabet": list("abcdefghijklmnopqrstuvwxyz0123456789.?")}
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tok.train_from_iterator(TEXT, trainer(vocab_size=340, special_tokens=special, show_progress=False, **settings))
    ids = {t: tok.token_to_id(t) for t in special}
    if "cls_token" in names:
        a, b = names["cls_token"], names["sep_token"]
        tok.post_processor = processors.TemplateProcessing(
            single=f"{a} $A {b}", pair=f"{a} $A {b} $B:1 {b}:1", special_tokens=[(a, ids[a]), (b, ids[b])]
        )
    elif begin or end:
        marks = [m for m in (begin, end) if m]
        tok.post_processor = processors.TemplateProcessing(
            single=" ".join(x for x in (begin, "$A", end) if x), special_tokens=[(m, ids[m]) for m in marks]
        )
    inputs = ["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        chat_template=template,
        model_input_names=inputs,
        clean_up_tokenization_spaces=False,
        **names,
    )


def make(folder: Path, family, config, words, auto) -> Path:
    """A folder with a tiny model of this family, random weights, no dropout."""
    import transformers

    tokenizer = make_tokenizer(**words)
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    config = {"model_type": family, "vocab_size": len(tokenizer) + words.get("spare", 0), **special, **config}
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    for key in vars(config):
        if "drop" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config)
    if words.get("ends") and model.generation_config is not None:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids([words["eos_token"], words["ends"]])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table():
    """`table(section, row)` notes a row of docs/models.md; the tables are printed when all tests have run."""
    found = {}
    yield lambda section, row: found.setdefault(section, []).append(row)
    text = "\n\n".join(
        "\n".join(
            [f"| {' | '.join(rows[0])} |", f"|{' --- |' * len(rows[0])}"]
            + [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
        )
        for rows in found.values()
    )
    print("\n" + text)
    target = os.environ.get("FAMILIES_TABLE")
    if target and sum(map(len, found.values())) == len(CAUSAL) + len(ENCODERS) + len(SEQ2SEQ):  # all of them passed
        page = Path(target).read_text()
        page = re.sub(r"(<!-- families -->\n).*(<!-- end -->)", lambda m: m[1] + text + "\n" + m[2], page, flags=re.S)
        Path(target).write_text(page)


@pytest.fixture
def kept(monkeypatch):
    """What every stage's model says of a few tokens at the moment it is saved: {folder: outputs}."""

    said, save = {}, saving.save

    def save_(trainer, folder, tokenizer):
        said[Path(folder)] = outputs(getattr(trainer, "policy", trainer.model))
        if hasattr(trainer, "critic"):
            said[Path(folder) / "critic"] = outputs(trainer.critic)
        save(trainer, folder, tokenizer)

    monkeypatch.setattr(saving, "save", save_)
    return said


def outputs(model):
    training, ids = model.training, torch.arange(5, 17).reshape(2, 6)
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits
    model.train(training)
    return out


def same_when_loaded(said, folder, auto):
    import transformers

    loaded, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], folder
    torch.testing.assert_close(outputs(loaded), said[Path(folder)], atol=2e-5, rtol=1e-4)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def moved(before, after) -> float:
    """Share of the weight matrices of `before` that are other ones in `after` (rows that were added left out)."""
    a, b = weights(before), weights(after)
    names = [n for n in a if n in b and a[n].dim() > 1]
    assert names
    return sum(not torch.equal(a[n], b[n][: len(a[n])]) for n in names) / len(names)


def losses(folder):
    return [
        e["loss"] for e in map(json.loads, (Path(folder) / "history.jsonl").read_text().splitlines()) if "loss" in e
    ]


def falling(folder) -> bool:
    found = torch.tensor(losses(folder))
    return bool(found.isfinite().all() and found[-3:].min() < found[0])


ROWS = [
    {"prompt": f"what colour is the {a}", "completion": f"the {a} is {c}"}
    for a, c in (("cat", "red"), ("dog", "green"), ("bird", "blue"), ("fish", "small"))
]
PAIRS = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "the tree sees"} for r in ROWS]
STEPS = {
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "max_steps": 5,
    "logging_steps": 1,
    "save_strategy": "no",
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "report_to": [],
}


LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}


@pytest.mark.parametrize("family", families(CAUSAL))
def test_causal_models_through_sft_reward_and_ppo(family, tmp_path, recipe, write, kept, table):
    about, config, words = CAUSAL[family]
    base = make(tmp_path / "base", family, config, words, "AutoModelForCausalLM")
    packed, fused, added = sft_loss_is_the_models_own(base)
    stages = {
        "sft": {
            "kind": "sft",
            "model": {"model_name_or_path": str(base)},
            "data": {"train": write("a.jsonl", ROWS)},
            "args": {**STEPS, "packing": packed},
        },
        "lora": {
            "kind": "sft",
            "model": {"model_name_or_path": str(base), **LORA},
            "data": {"train": write("a.jsonl", ROWS)},
            "args": STEPS,
        },
        "reward": {
            "kind": "reward",
            "model": {"model_name_or_path": "stage:sft"},
            "data": {"train": write("b.jsonl", PAIRS)},
            "args": STEPS,
        },
        "policy": {
            "kind": "ppo",
            "model": {"model_name_or_path": "stage:sft"},
            "reward": {"models": ["stage:reward"], "min_accuracy": 0},
            "data": {"train": write("c.jsonl", [{"prompt": r["prompt"]} for r in ROWS])},
            "args": {
                **STEPS,
                "max_steps": 2,
                "response_length": 6,
                "num_ppo_epochs": 1,
                "num_mini_batches": 1,
                "allow_no_eos": True,
                "allow_constant_scores": True,
            },
        },
    }
    if packed:
        stages["sft"]["args"]["per_device_train_batch_size"] = 1  # a pack of all four rows
    loaded = load(recipe(stages))
    chain.run(loaded)
    out = loaded.output_dir
    for stage, before in (("sft", base), ("reward", out / "sft"), ("policy", out / "sft")):
        assert moved(before, out / stage) > 0.9, stage
        assert stage == "policy" or falling(out / stage), losses(out / stage)
    assert moved(out / "reward", out / "policy" / "critic") > 0.9
    assert falling(out / "lora") and new_rows_moved(base, out / "lora", added)
    for place in ("sft", "lora", "policy"):
        same_when_loaded(kept, out / place, "AutoModelForCausalLM")
    for place in ("reward", "policy/critic"):
        same_when_loaded(kept, out / place, "AutoModelForSequenceClassification")
    lean = rollouts_have_the_plain_log_probs(out / "policy")
    table(
        "causal",
        {
            "family": f"`{family}`",
            "what is particular": about,
            "tokens added": " ".join(f"`{t}`" for t in added).replace("|", "\\|") or "–",
            "batches": "packed" if packed else "padded",
            "loss": "fused" if fused else "its own",
            "decoding": "lean" if lean else "generate",
        },
    )


def new_rows_moved(base, folder, added) -> bool:
    """Whether each token that the template brought was learned under LoRA: its input row, and an output row of
    its own.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, ids = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    used = [ids.convert_tokens_to_ids(t) for t in added if t.startswith("<|im")]  # PAD is never read
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    start = chat_model(base).get_input_embeddings().weight
    rows = all(not torch.equal(embedding[i], start[i]) for i in used)
    if head.weight is not embedding and head.bias is None:
        before = chat_model(base).get_output_embeddings().weight
        rows &= all(not torch.equal(head.weight[i], before[i]) for i in used)
    return rows


def chat_model(base):
    """The base with its tokens added as a stage of seed 42 adds them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(42)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer_setup.install_template(model, AutoTokenizer.from_pretrained(base), None)
    return model


def sft_loss_is_the_models_own(base) -> tuple[bool, bool, list[str]]:
    """SFT's loss of a batch is transformers' own, row by row; `(packed, fused, tokens added)`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base).eval()
    torch.manual_seed(0)
    added = tokenizer_setup.install_template(model, tokenizer, None)
    rows, total, count = [], 0.0, 0
    for row in ROWS:
        prompt, answer = chat_template.encode_answer(tokenizer, row["prompt"], row["completion"])
        assert answer[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id != tokenizer.pad_token_id
        assert prompt == chat_template.encode_prompt(tokenizer, row["prompt"])
        ids, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * len(answer)
        count += len(answer)
        rows.append({"input_ids": ids[0].tolist(), "labels": labels[0].tolist()})
    fast_model.fast_model(model)
    collator, packs = packing.PackedCollator(), True
    try:
        packed_attention.enable_packed_attention(model)
    except ValueError:
        collator, packs = packing.PaddedCollator(tokenizer.pad_token_id), False
    with torch.no_grad():
        ours = model(**collator(rows), use_cache=False).loss.item()
    assert ours == pytest.approx(total / count, rel=1e-4)
    return packs, model.loss_is_fused, added


def rollouts_have_the_plain_log_probs(folder) -> bool:
    """Sampling and PPO's (packed) scoring give the log-probs of a plain forward; whether decoding is the lean one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain, ready = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    packed = make_ready(ready)
    prompts = [
        chat_template.encode_prompt(tokenizer, text)
        for text in ("what is the cat", "a very very big tree is in the", "a")
    ]
    ends = [tokenizer.eos_token_id]
    answers, sampled = generate(ready, prompts, max_new_tokens=12, eos_token_ids=ends, seeds=[1, 2, 3], temperature=0.7)
    scored, _ = token_logprobs(ready, collate(list(zip(prompts, answers)), packed, "cpu"), 0.7)
    for prompt, answer, own, ours in zip(prompts, answers, sampled, scored.split([len(a) for a in answers])):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.detach(), expected, atol=1e-4, rtol=1e-4)
    return can_decode_lean(ready)


REVIEWS = [
    {"text": f"the {a} {v} the {b}", "label": "yes" if v == "likes" else "no"}
    for a in ("cat", "dog", "bird", "fish")
    for b in ("tree", "cat")
    for v in ("likes", "sees")
]
LONG = {"text": " ".join(WORDS * 3), "label": "no"}


@pytest.mark.parametrize("family", families(ENCODERS))
def test_encoders_through_masked_words_and_classification(family, tmp_path, recipe, write, kept, table):
    about, config, words = ENCODERS[family]
    base = make(tmp_path / "base", family, config, words, "AutoModel")  # without any head, as many are published
    texts = write("t.jsonl", [{"text": t} for t in TEXT * 2])
    stages = {
        "words": {"kind": "mlm", "model": {"model_name_or_path": str(base)}, "data": {"train": texts}, "args": STEPS},
        "labels": {
            "kind": "classify",
            "model": {"model_name_or_path": "stage:words"},
            "data": {"train": write("r.jsonl", [*REVIEWS, LONG]), "validation": write("v.jsonl", [*REVIEWS, LONG])},
            "args": {
                **STEPS,
                "per_device_train_batch_size": 17,
                "max_steps": 8,
                "eval_strategy": "no",
                "learning_rate": 3e-4,
            },
        },
        "lora": {
            "kind": "classify",
            "model": {"model_name_or_path": "stage:words", **LORA},
            "data": {"train": write("l.jsonl", REVIEWS)},
            "args": {**STEPS, "per_device_train_batch_size": 16, "max_steps": 8, "learning_rate": 1e-3},
        },
        "reward": {
            "kind": "reward",
            "model": {"model_name_or_path": "stage:words"},
            "data": {"train": write("p.jsonl", [{k: v[:12] for k, v in row.items()} for row in PAIRS])},
            "args": {**STEPS, "max_length": 64},
        },
    }
    loaded = load(recipe(stages))
    chain.run(loaded)
    out = loaded.output_dir
    assert moved(out / "words", out / "labels") > 0.8
    tables = {n for n in weights(out / "words") if "embeddings" in n}
    same = {n for n, w in weights(out / "lora").items() if n in tables and torch.equal(w, weights(out / "words")[n])}
    assert same == tables & weights(out / "lora").keys() and same  # only what is adapted, and the head
    for stage in stages:
        assert falling(out / stage), (stage, losses(out / stage))
    record = json.loads((out / "labels" / "stage.json").read_text())
    assert record["rows"]["train"]["too_long"] == 1  # the long row was cut to what the positions allow, and ran
    same_when_loaded(kept, out / "words", "AutoModelForMaskedLM")
    for place in ("labels", "lora", "reward"):
        same_when_loaded(kept, out / place, "AutoModelForSequenceClassification")
    from transformers import AutoModel

    table(
        "encoders",
        {
            "family": f"`{family}`",
            "what is particular": about,
            "longest text": f"{loading.positions(AutoModel.from_pretrained(base))} of "
            f"{config['max_position_embeddings']}",
            "head": ", ".join(f"`{h}`" for h in heads_of(out / "labels")),
        },
    )


def heads_of(folder):
    from transformers import AutoModelForSequenceClassification

    return loading.heads(AutoModelForSequenceClassification.from_pretrained(folder))


@pytest.mark.parametrize("family", families(SEQ2SEQ))
def test_encoder_decoders_through_translation(family, tmp_path, recipe, write, kept, table):
    about, config, words = SEQ2SEQ[family]
    base = make(tmp_path / "base", family, config, words, "AutoModelForSeq2SeqLM")
    rows = [{"source": r["text"], "target": " ".join(reversed(r["text"].split()))} for r in REVIEWS]
    stage = {
        "kind": "seq2seq",
        "model": {"model_name_or_path": str(base)},
        "data": {"train": write("a.jsonl", rows), "validation": write("b.jsonl", rows[:3])},
        "args": {**STEPS, "max_source_length": 32, "max_target_length": 32, "eval_strategy": "no"},
    }
    loaded = load(recipe({"s": stage}))
    chain.run(loaded)
    out = loaded.output_dir / "s"
    assert moved(base, out) > 0.9 and falling(out), losses(out)
    same_when_loaded(kept, out, "AutoModelForSeq2SeqLM")
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3
    table("seq2seq", {"family": f"`{family}`", "what is particular": about})
