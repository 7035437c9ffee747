"""A small client for OpenAI-compatible endpoints. Transient failures are retried, others are reported.

The key is read from the environment at the start and goes into one header and nowhere else. Messages name no header. A
server's words are masked before they are shown (see `replies.shown`) and are never written to a file. Redirects, which
would send the key elsewhere, are not followed. httpx's transport is used without its client class, so there are no
cookies, no netrc and no proxy, except for the one that `https_proxy` names for https addresses: it passes on what it
cannot read.
"""

from __future__ import annotations

import base64
import email.utils
import json
import os
import random
import ssl
import threading
import time
import urllib.request
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import httpx

from mirage_dist.data import pictures
from mirage_dist.data.sample import Draw
from mirage_dist.evals.models import replies
from mirage_dist.evals.models.replies import Failed, NoAnswer, Reply
from mirage_dist.schema import ConfigError, EndpointConfig

LONGEST_WAIT = 300.0  # seconds; a longer Retry-After is cut to this
LARGEST_ANSWER = 1 << 20  # bytes
LOOK_SECONDS = 0.5  # between two looks at whether to stop
IDLE_SECONDS = 4.0  # a connection that was idle for longer is not used again; common servers close theirs after 5
# The rest is not sent after so many requests in a row without a working server, or so many that were all rejected for
# one reason before the first answer came.
GIVE_UP = 20
GIVEN_UP = "given up after: "  # with which the reason of a request that was not sent begins


class Health:
    """Whether it makes sense to send further requests to an endpoint, by what became of the earlier ones.

    stopped: no further request is sent. given_up: nor will any be, in a later call.
    """

    def __init__(self) -> None:
        self.stopped, self.given_up = threading.Event(), False
        self.untried = Failed("stopped", untried=True)
        self._lock = threading.Lock()
        self._dead_in_a_row, self._answers = 0, 0
        self._rejections: Counter[str] = Counter()

    def answered(self) -> None:
        with self._lock:
            self._dead_in_a_row, self._answers = 0, self._answers + 1

    def failed(self, error: NoAnswer) -> None:
        """Count a request that got no answer in any of its attempts."""
        failure = error.failure
        with self._lock:
            self._dead_in_a_row = 0 if error.alive else self._dead_in_a_row + 1
            if error.alive and (failure.guessed or failure.reason != replies.FILTERED):
                self._rejections[failure.reason] += 1
            alike = self._rejections[failure.reason] >= GIVE_UP and not self._answers and len(self._rejections) == 1
            if (error.hopeless or alike or self._dead_in_a_row >= GIVE_UP) and not self.stopped.is_set():
                self.untried = Failed(GIVEN_UP + failure.reason, failure.words, untried=True)
                self.given_up = True
                self.stopped.set()


class Request(NamedTuple):
    """One request. system: None sends no such message. image: the path of a picture. reply: the assistant's turn that
    follows the text, for classifiers of conversations. history: earlier (text, answer) turns, oldest first. shown: the
    turn that shows the picture, from 0, the oldest one. draw: how the answer is drawn; None as the endpoint's options
    say.
    """

    system: str | None
    text: str
    image: str | None
    reply: str | None = None
    history: Sequence[tuple[str, str]] = ()
    shown: int = 0
    draw: Draw | None = None


class Endpoint:
    """chat: whether requests are chats; else each is a text that the model continues (`/completions`).

    Raises ConfigError when `key_env` names an environment variable that is empty or not set, and for an address or
    a proxy's address that cannot be one.
    """

    def __init__(self, config: EndpointConfig, max_new_tokens: int, json_mode: bool, chat: bool = True) -> None:
        self.url = f"{str(config.url).rstrip('/')}/{'chat/' if chat else ''}completions"
        self.chat = chat
        self.timeout, self.retries, self.backoff = config.timeout, config.retries, config.backoff
        self.concurrency = config.concurrency
        self.fixed: dict[str, Any] = {"model": config.model}
        if config.temperature is not None:
            self.fixed["temperature"] = 0
        if config.max_completion_tokens is not None:
            self.fixed["max_completion_tokens"] = config.max_completion_tokens
        else:
            self.fixed["max_tokens"] = config.max_tokens or max_new_tokens
        if json_mode:
            self.fixed["response_format"] = {"type": "json_object"}
        self.fixed |= config.extra
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "mirage-dist"}
        self._key = ""
        if config.key_env is not None:
            self._key = os.environ.get(config.key_env, "")
            if not self._key.isascii() or not self._key.isprintable() or not self._key.strip():
                raise ConfigError("key_env: the environment variable that it names is not set, or holds no key")
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._kept = _transport(self.url, config.concurrency, config.concurrency)
        self._fresh = _transport(self.url, config.concurrency, 0)  # a new connection for each request
        for transport in (self._kept, self._fresh):
            weakref.finalize(self, transport.close)

    @property
    def identity(self) -> dict[str, Any]:
        return {"url": self.url, **self.fixed}

    def ask_all(self, requests: Sequence[Request]) -> Generator[tuple[int, str | Failed], None, None]:
        """(index, answer without reasoning) of each request, as they arrive; of some, why there is no answer."""
        with closing(self.replies(requests)) as arriving:
            for batch in arriving:
                yield from ((i, reply if isinstance(reply, Failed) else reply.answer) for i, reply in batch)

    def replies(
        self, requests: Sequence[Request], health: Health | None = None, stopped: Callable[[], bool] = lambda: False
    ) -> Generator[list[tuple[int, Reply | Failed]], None, None]:
        """(index, reply) of each request, those together that arrive together; of some, why there is no answer.

        Never raises for what a server does. The first requests are spread over all of them, so that what they have in
        common is not what one part of the suite has in common, such as questions that a filter blocks.
        health: of earlier calls, which this one goes on with. stopped: whether no further request is to be sent; asked
        every now and then, because a server may demand long pauses.
        """
        health = health or Health()
        if not health.given_up:
            health.stopped.clear()
        order = _spread(len(requests))
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                step = 32 * self.concurrency  # bounds the pictures in memory
                for start in range(0, len(order), step):
                    waiting = {pool.submit(self._outcome, health, requests[i]): i for i in order[start : start + step]}
                    while waiting:
                        done, _ = wait(waiting, LOOK_SECONDS, FIRST_COMPLETED)
                        if done:
                            yield [(waiting.pop(future), future.result()) for future in done]
                        if stopped():
                            health.stopped.set()
            finally:  # also when the caller closes this generator
                health.stopped.set()
                pool.shutdown(cancel_futures=True)

    def _outcome(self, health: Health, request: Request) -> Reply | Failed:
        if health.stopped.is_set():
            return health.untried
        turns = [*(text for turn in request.history for text in turn), request.text, request.reply]
        text = "\n".join(turn for turn in turns if turn is not None)
        drawn = {} if request.draw is None else asdict(request.draw)
        try:
            content = {"messages": _messages(request)} if self.chat else {"prompt": request.text}
            body = json.dumps({**self.fixed, **drawn, **content}).encode()
        except pictures.PictureError as error:
            return Failed(f"its picture cannot be read: {error.cause}")
        attempt = 0
        while True:
            try:
                answer = self._on_any_connection(body, text)
                health.answered()
                return answer
            except NoAnswer as error:
                if not error.again or attempt == self.retries:
                    health.failed(error)
                    return error.failure
                # Random, so that requests that were refused together are not repeated together.
                own = self.backoff * 2 ** min(attempt, 20) * random.uniform(0.75, 1.25)
                if health.stopped.wait(min(LONGEST_WAIT, max(own, error.wait or 0.0))):
                    return replace(error.failure, final=False)  # the attempts that are left may have got an answer
            attempt += 1

    def _on_any_connection(self, body: bytes, text: str) -> Reply:
        """Send one request. A server may close an idle connection at the moment at which it is used again: the request
        is then sent over a new one, at once, since no working server has seen it.
        """
        try:
            return self._once(body, text, self._kept)
        except _Closed:
            pass
        try:
            return self._once(body, text, self._fresh)
        except _Closed:
            raise NoAnswer(Failed("connection failed"), again=True, alive=False) from None

    def _once(self, body: bytes, text: str, transport: httpx.HTTPTransport) -> Reply:
        events: list[str] = []
        extensions = {
            "timeout": httpx.Timeout(self.timeout).as_dict(),
            "trace": lambda event, _: events.append(event),
        }
        request = httpx.Request("POST", self.url, headers=self._headers, content=body, extensions=extensions)
        deadline = time.monotonic() + self.timeout
        try:
            response = transport.handle_request(request)
            try:
                content = _read(response, deadline)
            finally:
                response.close()
        except httpx.TimeoutException:
            raise NoAnswer(Failed("timed out"), again=True, alive=False) from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            made = any(event.startswith("connection.connect_") for event in events)
            replied = any(event.endswith("receive_response_headers.complete") for event in events)
            if not made and not replied:
                raise _Closed from None
            words = replies.shown(str(error), self._key, text)
            raise NoAnswer(Failed("connection failed", words), again=True, alive=False) from None
        if response.status_code == 200 and not replies.error_in(content):
            return replies.completion(content, self._key)
        wait = _retry_after(response.headers.get("Retry-After"))
        raise replies.error(response.status_code, content, wait, self._key, text)


class _Closed(Exception):
    """The server closed a connection that an earlier request had used, before it replied to this one."""


def _transport(url: str, connections: int, kept: int) -> httpx.HTTPTransport:
    """kept: connections that are used again."""
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL:
        raise ConfigError("url: expected an address such as http://localhost:8000/v1") from None
    proxy = None
    if address.scheme == "https" and not urllib.request.proxy_bypass(address.host):
        proxy = urllib.request.getproxies().get("https")
    try:
        return httpx.HTTPTransport(
            # The system's certificates, or those that SSL_CERT_FILE names; http has none.
            verify=ssl.create_default_context() if address.scheme == "https" else False,
            trust_env=False,
            limits=httpx.Limits(
                max_connections=connections, max_keepalive_connections=kept, keepalive_expiry=IDLE_SECONDS
            ),
            proxy=proxy if proxy is None or "://" in proxy else f"http://{proxy}",
        )
    except (httpx.InvalidURL, ValueError, ImportError):
        raise ConfigError("https_proxy: the environment variable holds no http:// or https:// address") from None


def _read(response: httpx.Response, deadline: float) -> bytes:
    """The whole body, by the deadline: a socket's own time-out starts anew with each read."""
    parts, size = [], 0
    for part in response.iter_bytes():
        parts.append(part)
        size += len(part)
        if size > LARGEST_ANSWER:
            raise NoAnswer(Failed("not a chat completion"), again=True, alive=False)
        if time.monotonic() > deadline:
            raise NoAnswer(Failed("timed out"), again=True, alive=False)
    return b"".join(parts)


def _spread(count: int) -> list[int]:
    """0 … count - 1; the first GIVE_UP are spread evenly, the others follow in order."""
    first = dict.fromkeys(i * count // GIVE_UP for i in range(GIVE_UP)) if count else {}
    return [*first, *(i for i in range(count) if i not in first)]


def _messages(request: Request) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.system is not None:
        messages.append({"role": "system", "content": request.system})
    for turn, (text, answer) in enumerate(request.history):
        messages.append(_of_user(text, request.image if turn == request.shown else None))
        messages.append({"role": "assistant", "content": answer})
    messages.append(_of_user(request.text, request.image if len(request.history) == request.shown else None))
    if request.reply is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": request.reply}]})
    return messages


def _of_user(text: str, image: str | None) -> dict[str, Any]:
    """One turn of the user, with its picture before the text."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        kind, content_bytes = pictures.encoded(image)
        data = base64.b64encode(content_bytes).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}})
    return {"role": "user", "content": content}


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, which holds a number of seconds or a date (RFC 9110, 10.2.3)."""
    if header is None:
        return None
    try:
        if header.strip().isdigit():
            return float(header)
        return email.utils.mktime_tz(_date(header)) - time.time()
    except (ValueError, OverflowError):
        return None


def _date(header: str) -> tuple:
    parsed = email.utils.parsedate_tz(header)
    if parsed is None:
        raise ValueError(header)
    return parsed
