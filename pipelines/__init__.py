"""One recipe file takes a language model from raw text to an RLHF-tuned policy, launched by Accelerate."""

__version__ = "0.1.0"
IGNORE_INDEX = -100  # a label that is not learned: the default of torch.nn.functional.cross_entropy
