"""Whether a hub id can be loaded on this machine, asked for before anything runs."""

from __future__ import annotations

import functools


def unreachable(repo: str, revision: str = "main", file: str = "config.json") -> str | None:
    """Why the hub id `repo` cannot be loaded on this machine, with the fix; None where it can. Needs no torch, at most
    3 s.

    What is in the hub's cache is not asked for. Gated and private repositories answer 401 or 403, unknown ones 401 or
    404.
    """
    from urllib.parse import quote

    from huggingface_hub import constants

    if cached(repo, revision, file):
        return None
    elsewhere = (
        f"give a local folder, or `hf download {repo}` where there is network and copy the hub's cache (HF_HOME)"
    )
    if constants.HF_HUB_OFFLINE:
        return f"is no local folder and not in the hub's cache, and HF_HUB_OFFLINE is set: unset it, {elsewhere}"
    if _ask(constants.ENDPOINT) is None:
        return f"is no local folder and not in the hub's cache, and {constants.ENDPOINT} gives no answer: {elsewhere}"
    code, reason = _ask(f"{constants.ENDPOINT}/{repo}/resolve/{quote(revision, safe='')}/{file}") or (0, "")
    if code in (401, 403) and "gated" in reason.lower():
        return (
            f"is gated: ask for access at {constants.ENDPOINT}/{repo}, then `hf auth login` (or set HF_TOKEN) with a "
            "token of that account"
        )
    if code in (401, 403, 404):
        what = f"has no revision {revision!r}" if reason == "RevisionNotFound" else f"is no public model with a {file}"
        return f"{what} at {constants.ENDPOINT}: check the spelling; a private one needs `hf auth login` (or HF_TOKEN)"
    return None


def cached(repo: str, revision: str = "main", file: str = "config.json") -> bool:
    """Whether this file of a repository is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, file, revision=revision), str)


@functools.cache
def _ask(url: str) -> tuple[int, str] | None:
    """Status and the hub's error code of a HEAD request; None where no answer comes in 1.2 s (looking a name up
    included).
    """
    import threading
    import urllib.error
    import urllib.request

    from huggingface_hub.utils import build_hf_headers

    answer = []

    def ask():
        try:
            request = urllib.request.Request(url, method="HEAD", headers=build_hf_headers())
            with urllib.request.urlopen(request, timeout=1) as response:  # noqa: S310  the hub's own address
                answer.append((response.status, ""))
        except urllib.error.HTTPError as error:
            answer.append((error.code, error.headers.get("X-Error-Code", "")))
        except OSError:
            pass  # no network: no answer

    thread = threading.Thread(target=ask, daemon=True)  # a name server that is away blocks for longer than any timeout
    thread.start()
    thread.join(1.2)
    return answer[0] if answer else None
