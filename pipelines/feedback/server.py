"""The web application behind the ranking page: FastAPI on loopback, a token in every path, no cookies.

    /TOKEN/                  the page                   /TOKEN/api/session     tags, and who has judged how much
    /TOKEN/results           the results page           /TOKEN/api/item        a prompt with its answers, shuffled, and
    /TOKEN/static/…          its scripts and styles                            what was judged before
    /TOKEN/export/…          rows to download           /TOKEN/api/judgement   saves; answers when it is on disk
                                                        /TOKEN/api/results     what `results.summary` says

A wrong request is refused with 4xx. A store that cannot be used now (gone, locked, another one, no room) is 503 with
the reason, which the page shows while it tries again; nothing else may fail. The database is used by a few threads of
its own, so that waiting for it holds up neither the event loop nor the pages.

Model output is data all the way: it travels as JSON, the scripts only ever set text, and the policy below forbids
inline scripts, other origins and (Trusted Types) any parsing of strings as HTML.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import anyio
from fastapi import APIRouter, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles

from pipelines import files
from pipelines.feedback import results
from pipelines.feedback.assignment import left_over, next_key, shared_keys, shuffled
from pipelines.feedback.store import Conflict, Id, Judgement, Key, Name, Store, StoreError

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST = 4_000_000  # bytes of a request: the longest note and ideal answer, each letter as \uXXXX, are a third of it
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


class Json(Response):
    """JSON in ASCII: a half surrogate in an answer travels as \\udXXX, which browsers read, and UTF-8 could
    not hold.
    """

    media_type = "application/json"

    def render(self, content) -> bytes:
        """The body."""
        return json.dumps(content, allow_nan=False).encode("ascii")


def create_app(store: Store, keys: list[str], tags: list[str], overlap: float = 1.0) -> FastAPI:
    """The application for the prompts `keys` of `store`, in this order, with these tags.

    `overlap` is the share of prompts that are given to everybody (see `assignment`).
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    api = APIRouter(prefix=f"/{store.token}")
    places, shared = {key: n for n, key in enumerate(keys)}, shared_keys(keys, overlap)
    opened: dict[tuple[str, str], str | None] = {}  # (labeller, tab) -> the prompt it shows
    arrivals: list[str] = store.labellers()
    choosing = threading.Lock()  # two who ask at once get different prompts
    threads = anyio.CapacityLimiter(8)
    trouble: list[str] = []  # what is wrong with the store now, as the terminal shows it

    async def aside(work: Callable[[], object]) -> Json | Response:
        """The JSON (or response) that `work` gives in a thread that may wait for the database."""
        try:
            found = await anyio.to_thread.run_sync(work, limiter=threads)
        except StoreError as error:
            if trouble != [str(error)]:
                trouble[:] = [str(error)]
                logger.error("%s", error)
            return Json({"detail": str(error)}, status_code=503)
        if trouble:
            trouble.clear()
            logger.error("%s: the store of judgements can be used again.", store.path)
        return found if isinstance(found, Response) else Json(found)

    @app.middleware("http")
    async def guard(request: Request, call_next):
        refusal = refused(request, store.token)
        if refusal:
            response = PlainTextResponse(refusal, status_code=403)
        elif request.method == "POST" and not sent_bytes(request) <= LARGEST:
            response = Json({"detail": f"a request needs a length, of at most {LARGEST:,} bytes"}, status_code=413)
        else:
            response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(_, error: RequestValidationError):
        # Without the input itself, which may be NaN or no Unicode.
        found = [{"loc": [str(part) for part in e["loc"]], "msg": e["msg"]} for e in error.errors()]
        return Json({"detail": found[:20]}, status_code=422)

    @api.get("/")
    async def page():
        return FileResponse(STATIC / "index.html")

    @api.get("/results")
    async def results_page():
        return FileResponse(STATIC / "results.html")

    @api.get("/api/session")
    async def session():
        def people():
            return [{"name": name, **progress(name, store.history(name))} for name in store.labellers()]

        mark = hashlib.sha256(store.token.encode()).hexdigest()[:12]
        return await aside(lambda: {"store": mark, "tags": tags, "labellers": people()})

    @api.get("/api/item")
    async def item(
        labeller: Annotated[Name, Query()], tab: Annotated[Id, Query()], item: Annotated[Key | None, Query()] = None
    ):
        """The prompt `item`, or the next one for this labeller (see `assignment`)."""
        if item is not None and item not in places:
            raise HTTPException(404, "this prompt is not among those to be ranked")
        return await aside(lambda: shown(labeller, tab, item))

    def shown(labeller: str, tab: str, key: str | None) -> dict:
        history = store.history(labeller)
        judged = [j["item"] for j in history if j["item"] in places]
        taken = taken_by_others(labeller)
        with choosing:
            if labeller not in arrivals:
                arrivals.append(labeller)
            others = {shown for (who, _), shown in opened.items() if who != labeller}
            elsewhere = {shown for (who, where), shown in opened.items() if who == labeller and where != tab}
            if key is None:
                key = next_key(keys, shared, judged, elsewhere, taken, others, arrivals.index(labeller))
            opened[labeller, tab] = key
        at = judged.index(key) if key in judged else len(judged)
        around = {
            "back": judged[at - 1] if at else None,
            "forward": judged[at + 1] if at + 1 < len(judged) else None,
            "progress": progress(labeller, history, taken),
        }
        row = key and store.item(key)
        if not row:
            return {"item": None, **around}
        order, current = shuffled(row, key, labeller), next((j for j in history if j["item"] == key), None)
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
        if sent.item not in places:
            raise HTTPException(404, "this prompt is not among those to be ranked")
        return await aside(lambda: saved(sent))

    def saved(sent: Judgement) -> dict | Json:
        row = store.item(sent.item)
        if row is None:
            return Json({"detail": "this prompt is no longer in the store"}, status_code=404)
        order = shuffled(row, sent.item, sent.labeller)
        if len(sent.tags) != len(order) or (sent.ranks is not None and len(sent.ranks) != len(order)):
            wrong = f"ranks and tags need one entry for each of the {len(order)} answers"
            return Json({"detail": wrong}, status_code=422)
        if unknown := sorted({tag for chosen in sent.tags for tag in chosen} - set(tags)):
            return Json({"detail": f"unknown tag {unknown[0]!r}; there are {', '.join(tags)}"}, status_code=422)
        # What is shown once may stand in the row several times (two models gave the same answer): all get its rank.
        first = {row["completions"][i]: n for n, i in enumerate(order)}
        back = [first[text] for text in row["completions"]]
        ranks = None if sent.ranks is None else [sent.ranks[n] for n in back]
        tagged = [[tag for tag in tags if tag in sent.tags[n]] for n in back]
        try:
            store.save(sent.model_copy(update={"ranks": ranks, "tags": tagged}))
        except Conflict as conflict:
            current = conflict.current and _shown(conflict.current, order)
            return Json({"detail": str(conflict), "judgement": current}, status_code=409)
        return {"saved": sent.id, "progress": progress(sent.labeller, store.history(sent.labeller))}

    @api.get("/api/results")
    async def summary():
        return await aside(lambda: results.summary(list(store.judgements()), tags))

    @api.get("/export/rankings.jsonl")
    async def rankings():
        return await aside(lambda: _download(store.rankings(), "rankings.jsonl"))

    @api.get("/export/ideal.jsonl")
    async def ideals():
        return await aside(lambda: _download(store.ideals(), "ideal.jsonl"))

    def taken_by_others(labeller: str) -> set[str]:
        """The prompts that somebody else has ranked."""
        return {key for key, who in store.ranked_by().items() if who - {labeller}}

    def progress(labeller: str, history: list[dict], taken: set[str] | None = None) -> dict:
        """How far a labeller is; `an_hour` from the median time of the last 20 prompts."""
        done = [j for j in history if j["item"] in places]
        seconds = [j["seconds"] for j in done[-20:] if j["ranks"] is not None and j["seconds"]]
        taken = taken_by_others(labeller) if taken is None else taken
        return {
            "total": len(done) + left_over(keys, shared, {j["item"] for j in done}, taken),
            "judged": len(done),
            "skipped": sum(j["ranks"] is None for j in done),
            "an_hour": round(3600 / statistics.median(seconds)) if len(seconds) >= 3 else None,
        }

    app.include_router(api)
    app.mount(f"/{store.token}/static", StaticFiles(directory=STATIC))
    return app


def refused(request: Request, token: str) -> str | None:
    """Why a request is turned away: a name that is not this machine's, another site behind it, or no token."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    try:
        name, site = urlsplit(f"//{host}").hostname, None if origin is None else urlsplit(origin).netloc
    except ValueError:  # an address that is none
        return "refused: this server is only for 127.0.0.1 and localhost"
    if name not in LOOPBACK:  # DNS rebinding: another site's name that points here
        return "refused: this server is only for 127.0.0.1 and localhost"
    if site is not None and site != host:
        return "refused: the request comes from another site"
    site, mode = request.headers.get("sec-fetch-site", "none"), request.headers.get("sec-fetch-mode")
    if site not in ("none", "same-origin") and mode != "navigate":
        return "refused: the request comes from another site"
    given = request.scope["path"].split("/")[1:2]  # not `request.url`, which parses the host again
    if not given or not secrets.compare_digest(given[0].encode(errors="replace"), token.encode()):
        return "refused: open the address that `python -m pipelines rank` printed; it holds a token"
    return None


def sent_bytes(request: Request) -> float:
    """The length of a request's body as its header gives it; infinite where there is no such header."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else float("inf")


def _shown(judgement: dict, order: list[int]) -> dict:
    """A stored judgement in the shown order."""
    ranks = judgement["ranks"] and [judgement["ranks"][i] for i in order]
    kept = {name: judgement[name] for name in ("note", "ideal")} | {"seconds": judgement["seconds"] or 0}
    return {"id": judgement["judgement"], "ranks": ranks, "tags": [judgement["tags"][i] for i in order], **kept}


def _download(rows, name: str) -> PlainTextResponse:
    text = "".join(map(files.json_line, rows))
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return PlainTextResponse(text, media_type="application/jsonl", headers=headers)
