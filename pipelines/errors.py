"""The errors that people are shown without a traceback, and "did you mean".

Everything that a user can put right is a `SetupError`: `main` prints it and ends with exit code 2.
"""

from __future__ import annotations

import difflib


class SetupError(ValueError):
    """What was asked for cannot be done; the message says why and what to change. Shown without a traceback."""


class TemplateError(SetupError):
    """A chat template whose answers cannot be told apart from what surrounds them, with the fix."""


class DataError(SetupError):
    """Data that cannot be used, with file, row and fix."""


class ModelError(SetupError):
    """A model or tokenizer that cannot be used as asked, with the fix."""


class CannotPack(ModelError):
    """An architecture that cannot be trained on packed sequences.

    Args:
        model: what cannot, as the class of a model or of its attention.
        reason: why not, a sentence that ends the message "… cannot be trained on packed sequences: ".
    """

    def __init__(self, model: str, reason: str):
        self.model, self.reason = model, reason
        super().__init__(f"{model} cannot be trained on packed sequences: {reason}. Set `packing: false`.")


class PlanError(SetupError):
    """What cannot be planned, with the fix."""


class ChainError(SetupError):
    """A chain that cannot go on as asked, with the reason per stage and what to do."""


class RecordError(SetupError):
    """A file that a run wrote about itself is damaged: which, how, and the way out. Nothing was changed."""


class WorldError(SetupError):
    """The launcher started another number of processes than it was asked for; says how to launch instead."""


class Interrupted(Exception):
    """The user stopped a stage; its last step is saved, and the same command resumes it."""


class StorageError(Exception):
    """What was to be written, or has been, is not on disk: full, read-only, damaged. One sentence; exit code 1."""


class NotFinite(ArithmeticError):
    """The loss is NaN or infinite; the message names the step, the rows and the last good checkpoint."""


def meant(word, known) -> str:
    """ " (did you mean X?)" for the closest of `known`, or nothing."""
    known = [str(k).strip("'") for k in known]
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""
