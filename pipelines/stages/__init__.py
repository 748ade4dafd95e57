"""One module per kind of stage. Each holds `SECTIONS`, `ROWS`, `DEFAULTS` and `run(stage)`, read top to bottom."""

KINDS = ("pretrain", "mlm", "sft", "reward", "ppo", "classify", "seq2seq")
