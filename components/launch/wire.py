"""What a conversation with the API server is made of: its errors, answers that go on, and pauses between tries."""

from __future__ import annotations

import json
import random
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Self

import urllib3
from urllib3.exceptions import HTTPError

from trainer.errors import MillraceError

_PIECE = 65536
_HINTS = {
    0: "look at the API server, KUBECONFIG and the network or VPN; the same command goes on where it was",
    401: "log in again: the cluster does not know this token or certificate",
    403: "ask for the right: `millrace doctor --cluster` lists every one that is missing",
    404: "`millrace doctor --cluster` says which parts the cluster lacks",
    409: "somebody else changed or made the same object: look at it with kubectl, and try again",
}
BAD_CERTIFICATE = "BadCertificate"
_UNTRUSTED = "put the certificate that signs the server's into the kubeconfig: certificate-authority-data"


class ApiError(MillraceError):
    """What the API server refused, or that it did not answer (status 0)."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float = 0.0) -> None:
        hint = _UNTRUSTED if reason == BAD_CERTIFICATE else _HINTS.get(0 if status >= 500 else status, "")
        super().__init__(message or f"the API server says {status} {reason}", hint)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after


class Stop(threading.Event):
    """An event that, once set, also ends the streams that are being read for it, at once."""

    def __init__(self) -> None:
        super().__init__()
        self._streams: set[Stream] = set()

    def hold(self, stream: Stream) -> None:
        """End this stream when the event is set."""
        self._streams.add(stream)
        if self.is_set():
            stream.shutdown()

    def drop(self, stream: Stream) -> None:
        """Forget a stream that has ended."""
        self._streams.discard(stream)

    def set(self) -> None:
        """Set the event and end its streams."""
        super().set()
        for stream in list(self._streams):
            stream.shutdown()


class Stream:
    """The lines of an answer that goes on: a watch, or the output of a pod that is followed. A context manager."""

    def __init__(self, response: urllib3.BaseHTTPResponse, stop: threading.Event | None = None) -> None:
        self._response = response
        self._stop = stop
        if isinstance(stop, Stop):
            stop.hold(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self._stop, Stop):
            self._stop.drop(self)
        self._response.close()

    def shutdown(self) -> None:
        """End the stream; for other threads, while one reads."""
        with suppress(OSError, RuntimeError, ValueError):  # it has ended by itself
            self._response.shutdown()

    def lines(self, longest: int = 0) -> Iterator[bytes]:
        """The lines with their ends; the last one has none if the stream was cut in it.

        Args:
            longest: bytes after which a line is given out in pieces; 0 for none.

        Raises:
            ApiError: the connection broke.
        """
        rest = b""
        while not (self._stop and self._stop.is_set()):
            try:
                data = self._response.read1(_PIECE)
            except (HTTPError, OSError) as error:
                if self._stop and self._stop.is_set():
                    return
                raise unreachable(error) from None
            if not data:
                break
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield line + b"\n"
            while longest and len(rest) > longest:
                yield rest[:longest]
                rest = rest[longest:]
        if rest:
            yield rest


class Backoff:
    """Pauses between tries: twice as long each time, with jitter, so that a thousand clients do not come back as one."""

    def __init__(self, first_s: float = 0.25, most_s: float = 5.0) -> None:
        self._first_s, self._most_s, self._tries = first_s, most_s, 0

    def pause(self, error: ApiError | None = None) -> float:
        """Seconds to wait now; at least what the server asked for."""
        usual = min(self._most_s, self._first_s * 2.0 ** min(self._tries, 20)) * random.uniform(0.5, 1.0)  # noqa: S311
        self._tries += 1
        return max(usual, error.retry_after if error else 0.0)

    def reset(self) -> None:
        """Begin with a short pause again: the server answered."""
        self._tries = 0


def unreachable(error: Exception) -> ApiError:
    """The error for no answer: what urllib3 or the operating system says of it, without addresses."""
    cause: object = error
    said = type(error).__name__
    while isinstance(cause, BaseException):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ApiError(0, BAD_CERTIFICATE, f"the API server's certificate is not trusted: {cause.verify_message}")
        if isinstance(cause, OSError) and cause.strerror:
            said = cause.strerror
        cause = cause.__cause__ or (cause.args[0] if cause.args else None)
    return ApiError(0, type(error).__name__, f"the API server does not answer: {said}")


def refused(response: urllib3.BaseHTTPResponse, what: str) -> ApiError:
    """The Status that the server sent, or what a proxy before it said."""
    try:
        status = json.loads(response.data)
    except (ValueError, HTTPError, OSError):
        status = {}
    response.close()
    status = status if isinstance(status, dict) else {}
    reason = str(status.get("reason") or response.reason or "")
    after = response.headers.get("Retry-After", "")
    message = f"{status.get('message') or 'refused'} ({response.status} {reason})"
    return ApiError(
        response.status, reason, f"{what}: {message}", float(after) if after.isascii() and after.isdigit() else 0.0
    )
