"""Chat completions of an OpenAI-compatible server: retried, rate-limited, and nothing that it sends is trusted.

A key comes from the environment and is sent in a header; whatever the server says is cleared of it before it is shown
or kept. Redirects are not followed, so the key goes to the address in the recipe and nowhere else.
"""

from __future__ import annotations

import email.utils
import logging
import os
import threading
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2
from pydantic import BaseModel, Field, ValidationError

from pipelines.errors import SetupError

logger = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"  # where a key is looked for if the recipe names no variable
TRIES = 6
FIRST_WAIT = 1.0  # seconds before the second try; twice as long before each further one
LONGEST_WAIT = 300.0  # seconds: a server that asks for more patience than this gets this
LARGEST = 2**20  # bytes of a reply
FOR_ALL = (401, 403, 404, 405)  # what every request would be answered with: a wrong key, address or model
FOR_THIS = (400, 413, 422)  # what this request alone may be answered with: too long, refused by a filter


class NoReply(Exception):
    """A request that got no reply, however often it was sent; the message says why.

    Args:
        this_alone: the server refuses this request, such as one that is too long; others may pass.
    """

    def __init__(self, reason: str, this_alone: bool = False):
        super().__init__(reason)
        self.this_alone = this_alone


class _Unusable(Exception):
    """One try that failed and is worth another; `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Reply:
    """What a model wrote. `refused`: it, or a filter, would not; `whole`: it came to its end."""

    text: str
    refused: bool = False
    whole: bool = True


class _Message(BaseModel, strict=True):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel, strict=True):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel, strict=True):
    choices: list[_Choice] = Field(min_length=1)


def key_for(endpoint: str, variable: str | None) -> str | None:
    """The key of the environment that goes with an endpoint; None where there is none.

    The usual variable's key is not sent unencrypted to other machines: for that the recipe must name a variable.
    """
    private = urlsplit(endpoint).scheme == "https" or _on_this_machine(endpoint)
    return os.environ.get(variable or (KEY if private else ""), "").strip() or None


def _on_this_machine(endpoint: str) -> bool:
    return urlsplit(endpoint).hostname in ("127.0.0.1", "localhost", "::1")


class Endpoint:
    """A server's `POST …/chat/completions`; any number of threads may ask at once.

    Args:
        url: up to and with `/v1`.
        key: sent as a bearer token; never part of any message.
        timeout: seconds for one whole reply.
        per_minute: requests at most, retries counted; None: no limit.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 120.0, per_minute: float | None = None):
        self.url, self.key, self.timeout = url.rstrip("/") + "/chat/completions", key, timeout
        self.gap = 60 / per_minute if per_minute else 0.0
        self.stopped = threading.Event()  # set: whoever waits for another try gives up
        self._next, self._lock = 0.0, threading.Lock()  # when the next request may be sent
        headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})}
        # What is meant for this machine goes to no proxy that the environment names.
        proxies = not _on_this_machine(url)
        self._client = httpx2.Client(headers=headers, timeout=timeout, follow_redirects=False, trust_env=proxies)

    def close(self) -> None:
        """Give up what is waited for, and end the connections."""
        self.stopped.set()
        self._client.close()

    def ask(self, body: dict) -> Reply:
        """The reply to one request. `NoReply` where there is none; `SetupError` for what no request would pass."""
        for number in range(TRIES):
            try:
                self._wait()
                return self._once(body)
            except _Unusable as error:
                reason, wait = str(error), max(error.wait, FIRST_WAIT * 2**number)
            if number + 1 < TRIES:
                logger.info("%s: %s; again in %.0f s", self.url, reason, wait)
                self.stopped.wait(min(wait, LONGEST_WAIT))
            if self.stopped.is_set():
                raise NoReply("stopped")
        raise NoReply(f"{reason} ({TRIES} tries)")

    def _wait(self) -> None:
        """Until the rate allows another request."""
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + self.gap
        self.stopped.wait(at - now)

    def _pause(self, seconds: float) -> None:
        """Nobody sends anything for so long: the server has had enough."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + min(seconds, LONGEST_WAIT))

    def _once(self, body: dict) -> Reply:
        try:
            status, headers, content = self._send(body)
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise _Unusable(self._clean(f"{type(error).__name__}: {error}")) from None
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise SetupError(f"{self.url} is no address: {self._clean(str(error))}") from None
        words = self._clean(content.decode("utf-8", "replace")).split()  # before it is cut, or half a key could stay
        said = f"HTTP {status}: {' '.join(words)}"[:300]
        if status in FOR_ALL or 300 <= status < 400:
            raise SetupError(f"{self.url} answers {said}. Check rank.judge: endpoint, model, and the key's variable")
        if status in FOR_THIS:
            raise NoReply(said, this_alone=True)
        if status != 200:
            wait = _seconds(headers.get("retry-after"))
            if wait:
                self._pause(wait)
            raise _Unusable(said, wait)
        try:
            choice = _Completion.model_validate_json(content).choices[0]
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            at = ".".join(map(str, first["loc"]))
            raise _Unusable(f"no chat completion ({at + ': ' if at else ''}{first['msg']})") from None
        message, ended = choice.message, choice.finish_reason
        if message.refusal or ended == "content_filter":
            return Reply(self._clean(message.refusal or message.content or ""), refused=True)
        return Reply(self._clean(message.content or ""), whole=ended != "length")

    def _send(self, body: dict) -> tuple[int, httpx2.Headers, bytes]:
        """`(status, headers, body)`; a reply that is too large or drips for too long is cut off."""
        end, content = time.monotonic() + self.timeout, bytearray()
        with self._client.stream("POST", self.url, json=body) as response:
            for part in response.iter_raw(65536):
                content += part
                if len(content) > LARGEST:
                    raise _Unusable(f"a reply of more than {LARGEST >> 20} MB")
                if time.monotonic() > end:
                    raise _Unusable(f"no whole reply in {self.timeout:g} s")
            return response.status_code, response.headers, bytes(content)

    def _clean(self, text: str) -> str:
        return text.replace(self.key, "…") if self.key else text


def _seconds(retry_after: str | None) -> float:
    """What a Retry-After header asks for: seconds or a date; 0 without one, or for nonsense."""
    if not retry_after:
        return 0.0
    try:
        wait = float(retry_after)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(wait, 0.0), LONGEST_WAIT) if wait == wait else 0.0
