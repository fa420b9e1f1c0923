"""A small real HTTP server that plays an API server's answers, good and bad, one per request."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Answer = Callable[[BaseHTTPRequestHandler], None]


@dataclass(frozen=True)
class Asked:
    """One request as it came in."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


def sends(status: int = 200, content: Any = None, **headers: str) -> Answer:
    """An answer with JSON; `Retry_After` for Retry-After."""
    data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def refuses(status: int, reason: str, message: str = "no", **headers: str) -> Answer:
    """A Status, as the API server words what it refuses."""
    return sends(status, {"kind": "Status", "code": status, "reason": reason, "message": message}, **headers)


def drops(handler: BaseHTTPRequestHandler) -> None:
    """No answer: the connection ends."""
    handler.close_connection = True


def promises_more(handler: BaseHTTPRequestHandler) -> None:
    """An answer that ends in its middle."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"kind": "Po')
    handler.close_connection = True


def listed(version: str, *items: dict[str, Any], **meta: str) -> Answer:
    """A list."""
    return sends(200, {"metadata": {"resourceVersion": version, **meta}, "items": list(items)})


def pod(name: str, version: str, uid: str = "", **more: Any) -> dict[str, Any]:
    """An object with what a watch needs."""
    meta = {"name": name, "resourceVersion": version, "uid": uid or f"uid-{name}", "managedFields": [1]}
    return {"metadata": meta, **more}


def event(change: str, obj: dict[str, Any]) -> bytes:
    """A line of a watch."""
    return json.dumps({"type": change, "object": obj}).encode() + b"\n"


class ApiServer:
    """Serves `answers` one after the other, and then what `usual` says; a context manager.

    Attributes:
        answers: what is still to be answered.
        asked: what was asked for so far.
    """

    def __init__(
        self,
        *answers: Answer,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        usual: Callable[[Asked], Answer] | None = None,
    ) -> None:
        """By default, `usual` is a stream that stays open and silent."""
        self.answers = list(answers)
        self.asked: list[Asked] = []
        self._over = threading.Event()
        self._lock = threading.Lock()
        server = self
        usual_answer = usual

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def _do(self) -> None:
                parts = urlsplit(self.path)
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                asked = Asked(
                    self.command, parts.path, query, dict(self.headers), json.loads(content) if content else None
                )
                with server._lock:
                    server.asked.append(asked)
                    usual = usual_answer or (lambda _: server.streams())
                    answer = server.answers.pop(0) if server.answers else usual(asked)
                answer(self)

            do_GET = do_POST = do_DELETE = do_PATCH = _do  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            # Else its end waits for streams that are held open.
            block_on_close = False

            def handle_error(self, *_: object) -> None:
                pass  # clients leave in the middle

        self._server = Listener(("127.0.0.1", port), Handler)
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def streams(self, *pieces: bytes, cut: bool = False, stay: bool = True) -> Answer:
        """An answer in chunks; then silence until the server ends (stay), or an end, in mid-chunk if cut."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            for piece in pieces:
                handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            if cut:
                handler.wfile.write(b"ff\r\nhalf of it")
                handler.close_connection = True
            elif stay:
                self._over.wait(60)
                handler.close_connection = True
            else:
                handler.wfile.write(b"0\r\n\r\n")

        return answer

    def __enter__(self) -> ApiServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
