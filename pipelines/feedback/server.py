"""The web application behind the ranking page: FastAPI on loopback, a token in every path, no cookies.

    /TOKEN/                  the page                   /TOKEN/api/session     tags, and who has judged how much
    /TOKEN/results           the results page           /TOKEN/api/item        a prompt with its answers, shuffled, and
    /TOKEN/static/…          its scripts and styles                            what was judged before
    /TOKEN/export/…          rows to download           /TOKEN/api/judgement   saves; answers when it is on disk
                                                        /TOKEN/api/results     what `results.summary` says

Model output is data all the way: it travels as JSON, the scripts only ever set text, and the policy below forbids inline
scripts, other origins and (Trusted Types) any parsing of strings as HTML.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import statistics
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles

from pipelines.feedback import results
from pipelines.feedback.store import Conflict, Id, Judgement, Name, Store

STATIC = Path(__file__).parent / "static"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def create_app(store: Store, keys: list[str], tags: list[str]) -> FastAPI:
    """The application for the prompts `keys` of `store`, in this order, with these tags.

    The store is used from the event loop only, so that its calls come one after the other.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    api = APIRouter(prefix=f"/{store.token}")
    places = {key: n for n, key in enumerate(keys)}
    opened: dict[tuple[str, str], str] = {}  # (labeller, tab) -> the prompt it shows

    @app.middleware("http")
    async def guard(request: Request, call_next):
        refusal = refused(request, store.token)
        response = PlainTextResponse(refusal, status_code=403) if refusal else await call_next(request)
        response.headers.update(HEADERS)
        return response

    @api.get("/")
    async def page():
        return FileResponse(STATIC / "index.html")

    @api.get("/results")
    async def results_page():
        return FileResponse(STATIC / "results.html")

    @api.get("/api/session")
    async def session():
        people = [{"name": name, **progress(name)} for name in store.labellers()]
        return {"store": hashlib.sha256(store.token.encode()).hexdigest()[:12], "tags": tags, "labellers": people}

    @api.get("/api/item")
    async def item(labeller: Annotated[Name, Query()], tab: Annotated[Id, Query()], item: str | None = None):
        """The prompt `item`, or the next one that this labeller has not judged and no other tab of theirs shows."""
        if item is not None and item not in places:
            raise HTTPException(404, "this prompt is not among those to be ranked")
        judged = [j["item"] for j in store.history(labeller) if j["item"] in places]
        key = item
        if key is None:
            done = set(judged)
            left = [key for key in keys if key not in done]
            elsewhere = {shown for (who, where), shown in opened.items() if who == labeller and where != tab}
            key = next((key for key in left if key not in elsewhere), left[0] if left else None)
        opened[labeller, tab] = key
        at = judged.index(key) if key in judged else len(judged)
        around = {
            "back": judged[at - 1] if at else None,
            "forward": judged[at + 1] if at + 1 < len(judged) else None,
            "progress": progress(labeller),
        }
        if key is None:
            return {"item": None, **around}
        row, order = store.item(key), shuffled(store.item(key), key, labeller)
        current = store.current(key, labeller)
        return {
            "item": key,
            "prompt": row["prompt"],
            "answers": [row["completions"][i] for i in order],
            "judgement": current and _shown(current, order),
            **around,
        }

    @api.post("/api/judgement")
    async def judgement(sent: Judgement):
        """Save a judgement, whose ranks and tags are in the shown order; 409 with what stands where it is outdated."""
        row = store.item(sent.item) if sent.item in places else None
        if row is None:
            raise HTTPException(404, "this prompt is not among those to be ranked")
        order = shuffled(row, sent.item, sent.labeller)
        if len(sent.tags) != len(order) or (sent.ranks is not None and len(sent.ranks) != len(order)):
            raise HTTPException(422, f"ranks and tags need one entry for each of the {len(order)} answers")
        if unknown := sorted({tag for chosen in sent.tags for tag in chosen} - set(tags)):
            raise HTTPException(422, f"unknown tag {unknown[0]!r}; there are {', '.join(tags)}")
        # What is shown once may stand in the row several times (two models gave the same answer): all get its rank.
        shown = {row["completions"][i]: n for n, i in enumerate(order)}
        back = [shown[text] for text in row["completions"]]
        ranks = None if sent.ranks is None else [sent.ranks[n] for n in back]
        tagged = [[tag for tag in tags if tag in sent.tags[n]] for n in back]
        try:
            store.save(sent.model_copy(update={"ranks": ranks, "tags": tagged}))
        except Conflict as conflict:
            current = conflict.current and _shown(conflict.current, order)
            return JSONResponse({"detail": str(conflict), "judgement": current}, status_code=409)
        return {"saved": sent.id, "progress": progress(sent.labeller)}

    @api.get("/api/results")
    async def summary():
        judgements = list(store.judgements())
        return await run_in_threadpool(results.summary, judgements, tags)

    @api.get("/export/rankings.jsonl")
    async def rankings():
        return _download(store.rankings(), "rankings.jsonl")

    @api.get("/export/ideal.jsonl")
    async def ideals():
        return _download(store.ideals(), "ideal.jsonl")

    def progress(labeller: str) -> dict:
        """How far a labeller is; `an_hour` from the median time of the last 20 prompts."""
        done = [j for j in store.history(labeller) if j["item"] in places]
        seconds = [j["seconds"] for j in done[-20:] if j["ranks"] is not None and j["seconds"] > 0]
        return {
            "total": len(keys),
            "judged": len(done),
            "skipped": sum(j["ranks"] is None for j in done),
            "an_hour": round(3600 / statistics.median(seconds)) if len(seconds) >= 3 else None,
        }

    app.include_router(api)
    app.mount(f"/{store.token}/static", StaticFiles(directory=STATIC))
    return app


def refused(request: Request, token: str) -> str | None:
    """Why a request is turned away: a name that is not this machine's, another site behind it, or no token."""
    host = request.headers.get("host", "")
    if urlsplit(f"//{host}").hostname not in LOOPBACK:  # DNS rebinding: another site's name that points here
        return "refused: this server is only for 127.0.0.1 and localhost"
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return "refused: the request comes from another site"
    site, mode = request.headers.get("sec-fetch-site", "none"), request.headers.get("sec-fetch-mode")
    if site not in ("none", "same-origin") and mode != "navigate":
        return "refused: the request comes from another site"
    if not secrets.compare_digest(request.url.path.split("/")[1].encode(), token.encode()):
        return "refused: open the address that `python -m pipelines rank` printed; it holds a token"
    return None


def shuffled(row: dict, key: str, labeller: str) -> list[int]:
    """The order in which a labeller sees the distinct answers: positions in `row["completions"]`.

    It depends on the prompt and the labeller alone, in every version of Python: ranks that arrive after a restart are
    mapped back by it.
    """
    first = {text: i for i, text in reversed(list(enumerate(row["completions"])))}
    return sorted(first.values(), key=lambda i: hashlib.blake2b(f"{labeller}|{key}|{i}".encode()).digest())


def _shown(judgement: dict, order: list[int]) -> dict:
    """A stored judgement in the shown order."""
    ranks = judgement["ranks"] and [judgement["ranks"][i] for i in order]
    kept = {name: judgement[name] for name in ("note", "ideal", "seconds")}
    return {"id": judgement["judgement"], "ranks": ranks, "tags": [judgement["tags"][i] for i in order], **kept}


def _download(rows, name: str) -> PlainTextResponse:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return PlainTextResponse(text, media_type="application/jsonl", headers=headers)
