"""One recipe file takes a language model from raw text to an RLHF-tuned policy, launched by Accelerate."""

__version__ = "0.1.0"
