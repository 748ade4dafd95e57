"""One recipe file takes a language model from raw text to an RLHF-tuned policy, launched by Accelerate."""

from pathlib import Path

__version__ = "0.1.0"
IGNORE_INDEX = -100  # a label that is not learned: the default of torch.nn.functional.cross_entropy


def shipped(folder: str) -> Path:
    """`recipes`, `accelerate_configs` or `data` as they come with this package: inside it, or beside it in a
    checkout.
    """
    package = Path(__file__).parent
    inside = package / "shipped" / folder
    return inside if inside.is_dir() else package.parent / folder
