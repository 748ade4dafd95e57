"""One recipe file takes a language model from raw text to an RLHF-tuned policy, launched by Accelerate."""

__version__ = "0.1.0"


class SetupError(ValueError):
    """What was asked for cannot be done; the message says why and what to change. Shown without a traceback."""
