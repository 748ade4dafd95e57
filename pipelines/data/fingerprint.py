"""What identifies data: SHA-256 of local files, the commit of a hub data set."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipelines.data.mixing import SIDES
from pipelines.data.sources import files, is_local, sources


def content(section: dict) -> dict[str, dict]:
    """`fingerprint`, and the commit at which hub data now stand: by this, what is made of the rows may be kept."""
    out = fingerprint(section)
    for source in out.values():
        if "hub" in source:
            source["commit"] = _commit(source["hub"], source["revision"])
    return out


def _commit(path: str, revision: str | None) -> str | None:
    """The commit of a hub data set; without network that which lies in the hub's cache and will be read, if any."""
    from huggingface_hub import HfApi, constants

    try:
        return HfApi().dataset_info(path, revision=revision, timeout=10).sha
    except Exception:  # no network, or offline by choice: what cannot be read either is reported when it is read
        known = Path(constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}" / "refs" / (revision or "main")
        return known.read_text().strip() if known.is_file() else None


def fingerprint(section: dict) -> dict[str, dict]:
    """What the rows come from: SHA-256 and size of every local file, id and revision of every hub source."""
    out: dict[str, dict] = {}
    for side in SIDES:
        for source in sources(section, side):
            if not is_local(source["path"]):
                out[source["path"]] = {"hub": source["path"], "revision": source.get("revision")}
                continue
            for path in files(source["path"]):
                for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
                    if part.is_file():
                        with open(part, "rb") as stream_:
                            digest = hashlib.file_digest(stream_, "sha256").hexdigest()
                        out[str(part)] = {"sha256": digest, "bytes": part.stat().st_size}
    return out
