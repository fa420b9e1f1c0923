"""A small client of the Kubernetes API, over urllib3 alone: the official one costs 68 MB, and a launcher waits for hours.

Every call is tried again, with back-off, while the API server does not answer, is busy or restarts, for as long as the
caller allows. Certificates are always checked.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any, Self, TypeVar
from urllib.parse import urlencode

import urllib3
from urllib3.exceptions import HTTPError

from components.launch import access, kinds
from components.launch.access import Login
from components.launch.wire import BAD_CERTIFICATE, ApiError, Backoff, Stop, Stream, refused, unreachable

__all__ = ["Api", "ApiError", "Backoff", "Object", "Objects", "Stop", "Stream", "slim"]

Object = dict[str, Any]
Objects = list[Object]
_T = TypeVar("_T")
_CONNECT_S = 5.0
_READ_S = 30.0
_LEAST_READ_S = 10.0
_PAGE = 500
# Clocks that differ by less are called the same: dates come in whole seconds.
_CLOCK_S = 5.0
# A line of a pod's output that is longer comes in pieces.
_LONGEST_LINE = 65536
# So long after an outage the server may still refuse what it allows: it has not read its roles yet.
_WAKING_S = 30.0
# A peer that vanished without a word (a node, a VPN) is noticed after about 30 s, even in a stream that is silent for hours.
_KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (("TCP_NODELAY", 1), ("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
]


class Api:
    """The API server. Objects are dicts, as they stand in YAML. Safe to use from several threads."""

    def __init__(self, login: Callable[[], Login]) -> None:
        self._find = login
        self._lock = threading.Lock()
        self._login = login()
        self._pool = _pool(self._login)
        self._down_at = float("-inf")
        # The server's clock at one moment of our monotonic one.
        self._clock = (time.time(), time.monotonic())

    @classmethod
    def connect(cls, namespace: str = "") -> Self:
        """Log in as this process may: kubeconfig or service account.

        Args:
            namespace: overrides that of the login.

        Raises:
            MillraceError: there is no cluster to talk to.
        """
        return cls(lambda: access.find(namespace))

    @property
    def namespace(self) -> str:
        """The namespace of every call that names none."""
        return self._login.namespace

    @property
    def host(self) -> str:
        """Address of the API server."""
        return self._login.host

    def now(self) -> float:
        """Seconds since 1970 by the API server's clock, which dates what happens to a job: ours may be wrong, or be set."""
        at, then = self._clock
        return at + time.monotonic() - then

    def get(self, kind: str, name: str, *, namespace: str = "", within_s: float = 60.0) -> Object:
        """One object.

        Raises:
            ApiError: status 404 if there is none.
        """
        return self.request("GET", kinds.path(kind, namespace or self.namespace, name), within_s=within_s)

    def list(self, kind: str, *, label_selector: str = "", field_selector: str = "", namespace: str = "",
             within_s: float = 60.0) -> Objects:  # fmt: skip
        """All objects of a kind that the selectors take.

        Raises:
            ApiError: see `request`.
        """
        return self.listing(
            kind, label_selector=label_selector, field_selector=field_selector, namespace=namespace, within_s=within_s
        )[0]

    def listing(self, kind: str, *, label_selector: str = "", field_selector: str = "", namespace: str = "",
                within_s: float = 60.0) -> tuple[Objects, str]:  # fmt: skip
        """The same, with the version of the list, from which a watch goes on."""
        address = kinds.path(kind, namespace or self.namespace)
        query = {"labelSelector": label_selector, "fieldSelector": field_selector, "limit": str(_PAGE)}
        found: Objects = []
        while True:
            page = self.request("GET", address, query, within_s=within_s)
            if "metadata" not in page:
                raise ApiError(0, "BadAnswer", f"GET {address}: the answer is no list")
            for item in page.get("items") or []:
                # Members of a list do not say what they are.
                found.append({"apiVersion": kinds.KINDS[kind].version, "kind": kind, **slim(item)})
            following = page["metadata"].get("continue")
            if not following:
                return found, page["metadata"].get("resourceVersion", "")
            query["continue"] = following

    def create(self, obj: Object, *, dry_run: bool = False, namespace: str = "", within_s: float = 60.0) -> Object:
        """Make an object; unknown fields are refused. Give it a name: after a lost answer a second try meets its own work.

        Args:
            obj: with apiVersion, kind and metadata; the namespace in metadata comes first.
            dry_run: have it checked, admitted and defaulted, but not made.
            namespace: where metadata names none; else that of the login.
            within_s: seconds, tries and pauses together.

        Raises:
            ApiError: status 409 if it exists already, which it also does when an earlier try made it and the answer was
                lost; 403 for a missing right or a refusing policy; 400 or 422 for wrong fields.
        """
        place = obj.get("metadata", {}).get("namespace") or namespace or self.namespace
        query = {"fieldManager": "millrace", "fieldValidation": "Strict", "dryRun": "All" if dry_run else ""}
        address = kinds.path(obj["kind"], place, version=obj["apiVersion"])
        return self.request("POST", address, query, obj, within_s=within_s)

    def delete(self, kind: str, name: str, *, propagation: str = "Background", grace_s: int | None = None, uid: str = "",
               namespace: str = "", within_s: float = 60.0) -> bool:  # fmt: skip
        """Delete an object, and what it owns.

        Args:
            kind: of `kinds.KINDS`.
            name: of the object.
            propagation: Background, Foreground or Orphan.
            grace_s: seconds until its processes are killed; None leaves it to the object.
            uid: delete only this one, and not another that has got the same name since.
            namespace: else that of the login.
            within_s: seconds, tries and pauses together.

        Returns:
            False if it was gone already.

        Raises:
            ApiError: status 409 if there is one with another uid.
        """
        body: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        if uid:
            body["preconditions"] = {"uid": uid}
        address = kinds.path(kind, namespace or self.namespace, name)
        try:
            self.request("DELETE", address, None, body, within_s=within_s)
        except ApiError as error:
            if error.status != 404:
                raise
            return False
        return True

    def patch(self, kind: str, name: str, change: Object, *, namespace: str = "", within_s: float = 60.0) -> Object:
        """Merge a change into an object (JSON merge patch: null removes a field, lists are replaced).

        Raises:
            ApiError: status 404 if there is none.
        """
        address = kinds.path(kind, namespace or self.namespace, name)
        return self.request("PATCH", address, {"fieldManager": "millrace"}, change, within_s=within_s)

    def log(self, pod: str, container: str, *, follow: bool = False, since_time: str = "", tail: int | None = None,
            previous: bool = False, timestamps: bool = False, stop: Stop | None = None, namespace: str = "",
            within_s: float = 30.0) -> Iterator[str]:  # fmt: skip
        """What a container printed, line by line, without line ends; lines over 64 KiB come in pieces.

        Args:
            pod: its name.
            container: its name.
            follow: go on until the container ends.
            since_time: only what is not older: RFC 3339, whole seconds (the server ignores fractions).
            tail: only the last lines.
            previous: of the container before its last restart.
            timestamps: begin each line with its time, RFC 3339 with nanoseconds.
            stop: ends the stream when it is set.
            namespace: else that of the login.
            within_s: seconds for the first byte; what is followed may then go on for ever.

        Raises:
            ApiError: status 400 while the container waits; 404 without pod; 0 when the connection breaks in the middle,
                after which the caller goes on with `since_time`.
        """
        query = {
            "container": container, "follow": "true" if follow else "", "sinceTime": since_time,
            "tailLines": "" if tail is None else str(tail), "previous": "true" if previous else "",
            "timestamps": "true" if timestamps else "",
        }  # fmt: skip
        address = kinds.path("Pod", namespace or self.namespace, pod) + "/log"
        opened = self._patiently(
            lambda: self.stream(address, query, stop=stop, read_s=None if follow else _READ_S), within_s
        )
        with opened as stream:
            for line in stream.lines(_LONGEST_LINE):
                yield line.decode(errors="replace").rstrip("\r\n")

    def stream(self, address: str, query: dict[str, str], *, stop: threading.Event | None = None,
               read_s: float | None = None) -> Stream:  # fmt: skip
        """Open an answer that goes on, with one try.

        Args:
            address: path at the API server.
            query: empty values are left out.
            stop: ends the stream; at once if it is a `Stop`, else after the next line.
            read_s: seconds of silence after which the connection counts as broken; None waits for ever.

        Raises:
            ApiError: it could not be opened.
        """
        return Stream(self._open("GET", address, query, None, read_s, False), stop)

    def request(self, method: str, address: str, query: dict[str, str] | None = None, body: Object | None = None, *,
                within_s: float = 60.0) -> Object:  # fmt: skip
        """One call, repeated while the server does not answer or says it is busy.

        Args:
            method: of HTTP.
            address: path at the API server.
            query: empty values are left out.
            body: sent as JSON.
            within_s: seconds, tries and pauses together; the last try may take up to 30 s more.

        Raises:
            ApiError: what it refused; status 0 if it did not answer in that time.
        """

        def attempt() -> Object:
            content = json.dumps(body).encode() if body is not None else None
            response = self._open(
                method, address, query or {}, content, min(_READ_S, max(within_s, _LEAST_READ_S)), True
            )
            try:
                found = json.loads(response.data)
            except ValueError:
                raise ApiError(0, "BadAnswer", f"{method} {address}: the answer is no JSON") from None
            return found if isinstance(found, dict) else {}

        return self._patiently(attempt, within_s)

    def transient(self, error: ApiError) -> bool:
        """Is it worth another try: no answer, busy, restarting, or refusing because it has only just started?"""
        if error.status in (401, 403):
            return time.monotonic() - self._down_at < _WAKING_S
        return error.reason != BAD_CERTIFICATE and error.status in (0, 408, 429, 500, 502, 503, 504)

    def _patiently(self, attempt: Callable[[], _T], within_s: float) -> _T:
        end, backoff = time.monotonic() + within_s, Backoff()
        while True:
            try:
                return attempt()
            except ApiError as error:
                pause = backoff.pause(error)
                if not self.transient(error) or time.monotonic() + pause > end:
                    raise
            time.sleep(pause)

    def _open(self, method: str, address: str, query: dict[str, str], body: bytes | None, read_s: float | None,
              whole: bool) -> urllib3.BaseHTTPResponse:  # fmt: skip
        """One exchange; after a 401 a second one with a new login, since tokens are replaced while we run."""
        given = {key: value for key, value in query.items() if value}
        login = self._login
        for again in (True, False):
            kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
            headers = {"Accept": "application/json", "Content-Type": kind, "User-Agent": "millrace"}
            token, began = login.token(), time.monotonic()
            if token:
                headers["Authorization"] = token
            try:
                response = self._pool.request(
                    method, f"{login.host}{address}" + (f"?{urlencode(given)}" if given else ""), body=body,
                    headers=headers, retries=False, redirect=False, preload_content=whole,
                    timeout=urllib3.Timeout(connect=_CONNECT_S, read=read_s),
                )  # fmt: skip
            except (HTTPError, OSError) as error:
                self._down_at = time.monotonic()
                raise unreachable(error) from None
            if response.status < 300:
                self._set_clock(response.headers.get("Date", ""), began)
                return response
            problem = refused(response, f"{method} {address}")
            if problem.status in (502, 503, 504):
                self._down_at = time.monotonic()
            if response.status != 401 or not again:
                raise problem
            login = self._renew(login)
        raise AssertionError("unreachable")

    def _set_clock(self, date: str, began: float) -> None:
        """Take over the server's time, in whole seconds, from an answer that came at once, if ours is another."""
        now = time.monotonic()
        try:
            at = parsedate_to_datetime(date).timestamp()
        except ValueError:  # a proxy's, perhaps
            return
        if now - began < 1.0 and abs(at - self.now()) > _CLOCK_S:
            self._clock = (at, now)

    def _renew(self, old: Login) -> Login:
        with self._lock:
            if self._login is old:  # else another thread has just done it
                self._login = self._find()
                # Exec plugins may also give a new client certificate.
                self._pool = _pool(self._login)
            return self._login


def slim(obj: Object) -> Object:
    """The object without its list of who wrote which field: half of its size, and of no use here."""
    obj.get("metadata", {}).pop("managedFields", None)
    return obj


def _pool(login: Login) -> urllib3.PoolManager:
    options: dict[str, Any] = {"num_pools": 2, "maxsize": 8, "socket_options": _KEEPALIVE}
    if login.host.startswith("https:"):
        options |= {"cert_reqs": "CERT_REQUIRED", **login.tls}
    if login.proxy:
        return urllib3.ProxyManager(login.proxy, **options)
    return urllib3.PoolManager(**options)
