"""One module per kind of stage. Each holds `SECTIONS`, `ROWS`, `DEFAULTS` and `run(stage)`, read top to bottom."""

KINDS = ("pretrain", "mlm", "sft", "reward", "ppo", "classify", "seq2seq", "sample", "rank", "evaluate")
WRITERS = ("pretrain", "sft", "ppo")  # they leave a causal language model, which answers prompts
NO_MODEL = ("sample", "rank", "evaluate")  # they leave rows or figures
