"""Tiny tokenizers with the structures of public families, made in memory: their kind of vocabulary and of template."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = [chr(c) for c in range(33, 127)]
MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("an", "d")]
TURNS = "{% for m in messages %}"

CHATML = TURNS + (
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# A system message of its own before dialogues without one, as Qwen2.5's and SmolLM2's.
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}" + CHATML
)
# Thoughts are taken from earlier turns and always there in the last one, as Qwen3's.
THINK = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\\n' "
    "}}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 "
    "%}{% endif %}{% endfor %}"
    + TURNS
    + "{% if m.role in ('user', 'system') %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + "
    "'\\n</tool_response><|im_end|>\\n' }}"
    "{% elif m.role == 'assistant' %}{% set text = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if not thought and '</think>' in text %}{% set thought = "
    "text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' + "
    "text.lstrip('\\n') }}"
    "{% else %}{{ text }}{% endif %}{% for call in m.tool_calls or [] %}{{ '\\n<tool_call>\\n' + (call.function | "
    "tojson) + '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif "
    "%}"
)
# The prompt opens a thought, answers are written without theirs, as DeepSeek-R1's.
OPEN_THOUGHT = (
    "{{ bos_token }}"
    + TURNS
    + "{% if m.role == 'assistant' %}{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% elif m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"
)
# Trimmed, the assistant is called model, no system messages, turns must alternate, as Gemma's.
TRIMMED = (
    "{{ bos_token }}"
    + TURNS
    + "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + "
    "'<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}"
    + TURNS
    + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
INST = TURNS + (
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% else %}{{ m.content }}{% endif "
    "%}{% endfor %}"
)
# Markers that swallow the white space behind them and are put together from roles, as Phi-3's.
ROLES = TURNS + (
    "{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Nothing closes an answer but the next turn, as GLM's.
OBSERVED = TURNS + (
    "{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% "
    "endif %}"
)
PLAIN = None


def byte_level():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*letters, *("".join(m) for m in MERGES), "ĊĊ", "Ġt"])}
    backend = Tokenizer(models.BPE(vocab, [*MERGES, ("Ċ", "Ċ"), ("Ġ", "t")]))
    backend.normalizer = normalizers.NFC()
    split = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece(prefix: str):
    """BPE with bytes to fall back to; `prefix`: "always" a space before a text and behind a special token, "first",
    "never".
    """
    pieces = [f"<0x{i:02X}>" for i in range(256)] + ["▁", *LETTERS, *("".join(m) for m in MERGES), "▁t", "▁▁"]
    vocab = {t: i for i, t in enumerate(["<unk>", *pieces])}
    merges = [*MERGES, ("▁", "t"), ("▁", "▁")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prefix == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        replace = normalizers.Replace(" ", "▁")
        backend.normalizer = (
            normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix == "always" else replace
        )
    strip = [decoders.Strip(" ", 1, 0)] if prefix != "never" else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def unigram():
    """A vocabulary in which the control tokens are ordinary pieces, too."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((c, -3.0) for c in LETTERS), ("▁the", -1.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return backend


def word_piece():
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{c}" for c in LETTERS), "the"]
    backend = Tokenizer(models.WordPiece({t: i for i, t in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


IM = ["<|im_start|>", "<|im_end|>"]
S = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAMILIES = {  # name: (vocabulary, special tokens, other added tokens, template, names of special tokens)
    "chatml": (byte_level, [*IM, "<pad>"], [], CHATML, {"eos_token": IM[1]}),
    "default system": (byte_level, [*IM, "<pad>"], [], DEFAULT_SYSTEM, {"eos_token": IM[1], "bos_token": IM[0]}),
    "ordinary markers": (byte_level, ["<pad>", "</s>"], IM, CHATML, {"eos_token": "</s>"}),
    "thoughts": (
        byte_level,
        [*IM, "<pad>"],
        ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"],
        THINK,
        {"eos_token": IM[1]},
    ),
    "open thought": (
        byte_level,
        ["<s>", "</s>", "<|user|>", "<|assistant|>", "<pad>"],
        ["<think>", "</think>"],
        OPEN_THOUGHT,
        {"bos_token": "<s>", "eos_token": "</s>"},
    ),
    "headers": (
        byte_level,
        ["<|begin|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>"],
        [],
        HEADERS,
        {"bos_token": "<|begin|>", "eos_token": "<|end_of_text|>"},
    ),
    "observed": (
        byte_level,
        ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<pad>"],
        [],
        OBSERVED,
        {"eos_token": "<|endoftext|>"},
    ),
    "plain bytes": (byte_level, ["<|endoftext|>", "<pad>"], [], PLAIN, {"eos_token": "<|endoftext|>"}),
    "inst": (lambda: sentencepiece("always"), ["<s>", "</s>", "<pad>"], [], INST, S),
    "inst, first": (lambda: sentencepiece("first"), ["<s>", "</s>", "<pad>"], [], INST, S),
    "plain pieces": (lambda: sentencepiece("always"), ["<s>", "</s>", "<pad>"], [], PLAIN, S),
    "trimmed": (
        lambda: sentencepiece("never"),
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<pad>"],
        ["\n\n"],
        TRIMMED,
        {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"},
    ),
    "roles": (
        lambda: sentencepiece("first"),
        [
            "</s>",
            *(AddedToken(f"<|{r}|>", special=True, rstrip=True) for r in ("system", "user", "assistant", "end")),
            "<pad>",
        ],
        [],
        ROLES,
        {"eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "unigram": (unigram, ["<s>", "</s>", "<pad>"], [], PLAIN, S),
    "word pieces": (
        word_piece,
        ["[CLS]", "[SEP]"],
        [],
        PLAIN,
        {"eos_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"},
    ),
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    make, special, added, template, names = FAMILIES[name]
    backend = make()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{"pad_token": "<pad>", **names})
    tokenizer.add_tokens(
        [t if isinstance(t, AddedToken) else AddedToken(t, special=True, normalized=False) for t in special], True
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in added])
    tokenizer.chat_template = template
    return tokenizer
