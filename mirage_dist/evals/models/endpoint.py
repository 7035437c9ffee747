"""A small client for OpenAI-compatible chat endpoints. Transient failures are retried, others are reported.

The key is read from the environment at the start and goes into one header and nowhere else: messages name no header and
repeat no text of the server, which might quote the key, and redirects, which would send it elsewhere, are not followed.
"""

from __future__ import annotations

import base64
import email.utils
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from typing import Any

from mirage_dist.data import pictures
from mirage_dist.schema import ChatConfig, ConfigError

LONGEST_WAIT = 300.0  # seconds; a longer Retry-After is cut to this
LARGEST_ANSWER = 1 << 20  # bytes
GIVE_UP = 20  # after so many requests in a row without a working server, the rest fails untried
HOPELESS = (401, 403, 404)  # every other request to this address with this key would fail too


class _Transient(Exception):
    """A failure that is retried. wait: seconds that the server requested before the next attempt."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Final(Exception):
    """A failure that is not retried. hopeless: every other request would fail in the same way."""

    def __init__(self, reason: str, hopeless: bool = False) -> None:
        super().__init__(reason)
        self.hopeless = hopeless


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """Raises ConfigError when `key_env` names an environment variable that is empty or not set."""

    def __init__(self, config: ChatConfig, max_new_tokens: int, json_mode: bool) -> None:
        self.url = f"{str(config.url).rstrip('/')}/chat/completions"
        self.timeout, self.retries, self.backoff = config.timeout, config.retries, config.backoff
        self.concurrency = config.concurrency
        self.fixed = {"model": config.model, "temperature": 0, "max_tokens": max_new_tokens}
        if json_mode:
            self.fixed["response_format"] = {"type": "json_object"}
        self._headers = {"Content-Type": "application/json"}
        if config.key_env is not None:
            key = os.environ.get(config.key_env, "")
            if not key.isascii() or not key.isprintable() or not key:
                raise ConfigError("key_env: the environment variable that it names is not set, or holds no key")
            self._headers["Authorization"] = f"Bearer {key}"
        self._open = urllib.request.build_opener(_NoRedirects).open
        self._stopped = threading.Event()
        self._reason, self._in_a_row = "", 0

    @property
    def identity(self) -> dict[str, Any]:
        return {"url": self.url, **self.fixed}

    def ask_all(
        self, requests: Sequence[tuple[str, str, str | None]]
    ) -> Generator[tuple[int, str | None, str], None, None]:
        """(index, answer, "") or (index, None, reason) for each (system, text, path of a picture), as they arrive.

        Never raises for what a server does. After `GIVE_UP` failures in a row the rest fails untried.
        """
        self._stopped.clear()
        self._in_a_row = 0
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                step = 32 * self.concurrency  # bounds the pictures in memory
                for start in range(0, len(requests), step):
                    chunk = range(start, min(start + step, len(requests)))
                    waiting = {pool.submit(self._outcome, *requests[i]): i for i in chunk}
                    for future in as_completed(waiting):
                        text, reason = future.result()
                        yield waiting[future], text, reason
            finally:  # also when the caller closes this generator
                self._stopped.set()
                pool.shutdown(cancel_futures=True)

    def _alive(self) -> None:
        self._in_a_row = 0

    def _dead(self, reason: str) -> None:
        """Count a request that met no working server in any of its attempts."""
        self._in_a_row += 1
        if self._in_a_row >= GIVE_UP and not self._stopped.is_set():
            self._give_up(reason)

    def _give_up(self, reason: str) -> None:
        self._reason = f"given up after: {reason}"
        self._stopped.set()

    def _outcome(self, system: str, text: str, image: str | None) -> tuple[str | None, str]:
        try:
            body = json.dumps({**self.fixed, "messages": _messages(system, text, image)}).encode()
        except pictures.PictureError as error:
            return None, f"its picture cannot be read: {error.cause}"
        reason = ""
        for attempt in range(self.retries + 1):
            if self._stopped.is_set():
                return None, reason or self._reason
            try:
                answer = self._once(body)
                self._alive()
                return answer, ""
            except _Final as error:
                self._alive()  # a server that rejects one request, such as for its content, may accept the next
                if error.hopeless:
                    self._give_up(str(error))
                return None, str(error)
            except _Transient as error:
                reason, wait = str(error), error.wait
            if attempt < self.retries:
                # Random, so that requests that were refused together are not repeated together.
                own = self.backoff * 2**attempt * random.uniform(0.75, 1.25)
                self._stopped.wait(min(LONGEST_WAIT, max(own, wait or 0.0)))
        self._dead(reason)
        return None, reason

    def _once(self, body: bytes) -> str:
        request = urllib.request.Request(self.url, body, self._headers, method="POST")
        try:
            with self._open(request, timeout=self.timeout) as response:
                return _content(self._read(response))
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"HTTP {error.code}"
            if error.code in (408, 429) or error.code >= 500:
                raise _Transient(reason, _retry_after(error.headers.get("Retry-After"))) from None
            raise _Final(reason, error.code in HOPELESS) from None
        except TimeoutError:
            raise _Transient("timed out") from None
        except (OSError, HTTPException) as error:
            timed_out = isinstance(getattr(error, "reason", None), TimeoutError)
            raise _Transient("timed out" if timed_out else "connection failed") from None

    def _read(self, response: Any) -> bytes:
        """The whole body, within one time-out: a socket's own time-out starts anew with each read."""
        deadline, parts, size = time.monotonic() + self.timeout, [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > LARGEST_ANSWER:
                raise _Transient("not a chat completion")
            if time.monotonic() > deadline:
                raise _Transient("timed out")
        return b"".join(parts)


def _content(body: bytes) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        content = None
    if not isinstance(content, str):
        raise _Transient("not a chat completion")
    return content


def _messages(system: str, text: str, image: str | None) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if image is not None:
        kind, content_bytes = pictures.encoded(image)
        data = base64.b64encode(content_bytes).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}})
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


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
