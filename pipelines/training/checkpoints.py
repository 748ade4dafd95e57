"""Checkpoints that are whole or not used."""

from __future__ import annotations

from pathlib import Path

COMPLETE = "complete"  # an empty file in a checkpoint, written when every process has written its part


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole; None when there is none."""
    whole = [p.parent for p in folder.glob(f"checkpoint-*/{COMPLETE}")] if folder.is_dir() else []
    return str(max(whole, key=lambda p: int(p.name.rpartition("-")[2]))) if whole else None
