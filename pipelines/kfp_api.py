"""Requests to a Kubeflow Pipelines API server, and what its answers mean to a person.

A GET is repeated, with back-off and as long as Retry-After says, after 429, 5xx and dropped connections. What creates
something is repeated only when it surely has not taken effect, or when a look shows that it has not.

The transport (TLS, proxies, connection pool) is kfp_server_api's. kfp.Client is not used: its constructor asks for the
server's health, prints, and raises what only a traceback explains.
"""

from __future__ import annotations

import email.utils
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from pipelines.kfp_target import LOGIN, NO_HOST, Target
from trainer.errors import EXIT_FAILURE, ConfigError, MillraceError

API = "/apis/v2beta1"
ATTEMPTS = 6
BACKOFF_S = 0.5
_BACKOFF_MAX_S = 20.0
_RETRY_AFTER_MAX_S = 120.0
_CONNECT_S, _READ_S = 10.0, 90.0
_PAGE = 100
Json = dict[str, Any]
T = TypeVar("T")


class KfpError(MillraceError):
    """The server refused, failed, or could not be reached.

    Attributes:
        status: HTTP status; 0 without an answer.
        may_have_worked: whether a request that changes something may have taken effect all the same.
        transient: whether the same request may succeed later.
        retry_after: seconds the server asks to wait, or None.
    """

    exit_code = EXIT_FAILURE

    def __init__(
        self, message: str, hint: str, *, status: int = 0, may_have_worked: bool = False, transient: bool = False,
        retry_after: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message, hint)
        self.status, self.may_have_worked, self.transient = status, may_have_worked, transient
        self.retry_after = retry_after


def filter_(**equal: str) -> str:
    """A filter for lists: each field equal to its value. The server decodes it twice, so it is encoded once here."""
    predicates = [{"operation": "EQUALS", "key": key, "string_value": value} for key, value in equal.items()]
    return quote(json.dumps({"predicates": predicates}), safe="")


class Api:
    """Calls, each with its errors made readable."""

    def __init__(self, target: Target, sleep: Callable[[float], None] = time.sleep) -> None:
        import kfp_server_api
        import urllib3

        self.target, self._sleep = target, sleep
        config = kfp_server_api.Configuration(host=target.host)
        config.ssl_ca_cert = target.ca_file or None
        # No redirect is followed: it leads to a login page, and would carry the token there.
        config.retries = urllib3.Retry(False)
        try:
            self._rest = kfp_server_api.rest.RESTClientObject(config)
        except OSError as error:
            raise ConfigError(f"--ca-file {target.ca_file}: {error}", "name a file of PEM certificates") from None

    def get(self, path: str, **query: str | int) -> Json:
        """A JSON answer; repeated while the trouble may pass."""
        return self._parsed(self._repeated(lambda: self._send("GET", path, query)), "GET", path)

    def text(self, path: str, **query: str | int) -> str:
        """The same for an answer that is plain text."""
        return self._repeated(lambda: self._send("GET", path, query))[0].decode("utf-8", "replace")

    def pages(self, path: str, key: str, **query: str | int) -> Iterator[Json]:
        """The items of a list, over all its pages."""
        token = ""
        while True:
            page = self.get(path, page_size=_PAGE, **{**query, **({"page_token": token} if token else {})})
            yield from page.get(key) or []
            before, token = token, page.get("next_page_token") or ""
            if not token or token == before:
                return

    def create(self, path: str, body: Json, key: str, find: Callable[[], Json | None]) -> Json:
        """POST that creates something once.

        Args:
            path: below `/apis/v2beta1`.
            body: of the request.
            key: field in which the answer has the id.
            find: looks for what this very request has created.
        """
        for attempt in range(ATTEMPTS):
            try:
                made = self._parsed(self._send("POST", path, {}, body), "POST", path)
                if not made.get(key):
                    raise self._strange("POST", path, f"no {key}")
                return made
            except KfpError as error:
                if error.may_have_worked:
                    found = self._found(find, error)
                    if found is not None:
                        return found
                if self._gives_up(error, attempt):
                    raise
                self._wait(attempt, error)
        raise AssertionError("unreachable")

    def _found(self, find: Callable[[], Json | None], error: KfpError) -> Json | None:
        """What the failed request created: looked for twice, because the server may still be at it."""
        found = find()
        if found is None:
            self._wait(1, error)
            found = find()
        return found

    def act(self, method: str, path: str, **query: str) -> None:
        """A request that may be sent twice, for it leaves the same state: enable, disable, terminate, delete."""
        self._repeated(lambda: self._send(method, path, query))

    def _repeated(self, send: Callable[[], T]) -> T:
        for attempt in range(ATTEMPTS):
            try:
                return send()
            except KfpError as error:
                if self._gives_up(error, attempt):
                    raise
                self._wait(attempt, error)
        raise AssertionError("unreachable")

    def _gives_up(self, error: KfpError, attempt: int) -> bool:
        """Whether another attempt is of no use; who typed a wrong port is told so at once."""
        refused = not error.status and not error.may_have_worked
        return not error.transient or attempt >= (2 if refused else ATTEMPTS - 1)

    def _wait(self, attempt: int, error: KfpError) -> None:
        delay = min(BACKOFF_S * 2**attempt, _BACKOFF_MAX_S) * random.uniform(0.75, 1.25)  # noqa: S311
        self._sleep(delay if error.retry_after is None else max(delay, min(error.retry_after, _RETRY_AFTER_MAX_S)))

    def _send(self, method: str, path: str, query: dict[str, Any], body: Json | None = None) -> tuple[bytes, str]:
        """One request; returns the answer's bytes and content type."""
        import kfp_server_api
        import urllib3.exceptions as failed

        url = self.target.host + (path if path.startswith(("/apis/", "/k8s/")) else API + path)
        headers = {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": "millrace"}
        token, cookies = self.target.token(), self.target.cookies()
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        headers |= {"Cookie": cookies} if cookies else {}
        try:
            answer = self._rest.request(
                method,
                url,
                query_params=list(query.items()),
                headers=headers,
                body=body,
                _request_timeout=(_CONNECT_S, _READ_S),
            )
        except kfp_server_api.ApiException as error:
            if error.status:
                raise self._refused(method, path, error) from None
            raise self._tls(str(error.reason)) from None
        except failed.SSLError as error:
            raise self._tls(str(error)) from None
        except failed.HTTPError as error:
            raise self._unreachable(error) from None
        return answer.data, str(answer.getheader("content-type") or "")

    def _parsed(self, answer: tuple[bytes, str], method: str, path: str) -> Json:
        """The JSON object of an answer."""
        data, kind = answer
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if isinstance(found, dict):
            return found
        if "html" in kind or data.lstrip()[:1] == b"<":
            raise KfpError(
                f"{self.target.host}: answers {method} {path} with a web page: a login page, or not Kubeflow Pipelines",
                f"{LOGIN}; if you are logged in, check the host (the dashboard's needs /pipeline at its end)",
                status=401,
            )
        raise self._strange(method, path, "what is no JSON object")

    def _strange(self, method: str, path: str, what: str) -> KfpError:
        return KfpError(
            f"{self.target.host}: answers {method} {path} with {what}",
            "check that the host is a Kubeflow Pipelines API and that no proxy stands before it",
            may_have_worked=True,
        )

    def _refused(self, method: str, path: str, error: Any) -> KfpError:
        """What an HTTP status means."""
        status, host = int(error.status), self.target.host
        headers = {str(key).lower(): str(value) for key, value in dict(error.headers or {}).items()}
        said = self._said(error.body, headers.get("content-type", ""))
        where = f"{host}: {method} {path}: {status}{': ' + said if said else ''}"
        known = {
            401: ("not logged in, or the login has expired", LOGIN),
            403: (f"no permission{' in namespace ' + self.target.namespace if self.target.namespace else ''}",
                  "ask for the role kubeflow-edit there, or name a --namespace of yours"),
            404: ("not there", "check the id with `millrace runs`, the --namespace, and that the host is Kubeflow Pipelines 2"),
            409: ("there already, or changed by someone else meanwhile", "run the same command again"),
            429: ("too many requests", "wait a minute, then run the same command again"),
        }  # fmt: skip
        if status in (301, 302, 303, 307, 308):
            return self._elsewhere(method, path, status, headers.get("location", ""))
        if status == 404 and path.count("/") == 1:
            what, fix = (
                "not there",
                "check that the host is Kubeflow Pipelines 2 (the dashboard's needs /pipeline at its end)",
            )
        elif status >= 500:
            what, fix = (
                "the server failed",
                "look at the logs of deploy/ml-pipeline; `millrace runs` shows what has been started",
            )
        elif status in known:
            what, fix = known[status]
        else:
            what, fix = "refused", "correct what the message names"
            if "namespace" in said.lower() and not self.target.namespace:
                fix = "give your profile's --namespace (or MILLRACE_KFP_NAMESPACE): this installation has several users"
        return KfpError(
            f"{where} ({what})", fix, status=status, may_have_worked=status >= 500, transient=status in (429, 502, 503, 504)
            or (status == 500 and method == "GET"), retry_after=_seconds(headers.get("retry-after", "")),
        )  # fmt: skip

    def _elsewhere(self, method: str, path: str, status: int, location: str) -> KfpError:
        """A redirect: to the same place by TLS, or to a login page."""
        place, own = urlsplit(location), urlsplit(self.target.host)
        to = f"{place.scheme}://{place.netloc}{place.path}" if place.netloc else place.path
        what = f"{self.target.host}: sends {method} {path} elsewhere ({to or status})"
        end = f"{API}{path}"
        if (own.scheme, place.scheme, place.hostname) == ("http", "https", own.hostname) and place.path.endswith(end):
            return KfpError(what, f"--host {to.removesuffix(end)}", status=status)
        return KfpError(f"{what}: a login page", LOGIN, status=status)

    def _said(self, body: Any, kind: str) -> str:
        """The server's own words, short, and without the secrets that it may repeat."""
        text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body or "")
        if "html" in kind or text.lstrip().startswith("<"):
            return ""
        try:
            found = json.loads(text)
            text = str(found.get("message") or found.get("error_message") or found.get("error") or "")
        except (ValueError, AttributeError):
            pass
        for secret in (self.target.token(), self.target.cookies()):
            for part in (secret, *(word.partition("=")[2] for word in secret.split("; "))):
                text = text.replace(part, "***") if len(part) > 5 else text
        text = " ".join(text.split())
        return text if len(text) <= 400 else text[:399] + "…"

    def _tls(self, reason: str) -> KfpError:
        why = reason.splitlines()[-1][:200]
        fix = "give the file of the certificates that sign it: --ca-file FILE"
        if "WRONG_VERSION_NUMBER" in reason:
            fix = f"that port speaks no TLS: --host {self.target.host.replace('https:', 'http:', 1)}"
        return KfpError(f"{self.target.host}: no safe connection: {why}", fix)

    def _unreachable(self, error: Exception) -> KfpError:
        """No answer. A connection that was never made has surely changed nothing."""
        import urllib3.exceptions as failed

        cause = getattr(error, "reason", None)
        cause = cause if isinstance(cause, Exception) else error
        if isinstance(cause, failed.LocationParseError | failed.LocationValueError):
            return KfpError(f"{self.target.host}: is not an address", "check --host")
        if isinstance(cause, failed.NewConnectionError | failed.ConnectTimeoutError | failed.NameResolutionError):
            refused = "refused" in str(cause).lower()
            why = (
                "connection refused"
                if refused
                else "no such host"
                if isinstance(cause, failed.NameResolutionError)
                else "no connection"
            )
            return KfpError(
                f"{self.target.host}: {why}",
                f"is the server up, and the port forwarded? Else {NO_HOST}",
                transient=refused,
            )
        why = "no answer in time" if isinstance(cause, failed.ReadTimeoutError) else "the connection broke off"
        return KfpError(
            f"{self.target.host}: {why}", "run the same command again; `millrace runs` shows what has been started",
            may_have_worked=True, transient=True,
        )  # fmt: skip


def _seconds(value: str) -> float | None:
    """Retry-After in seconds: a number, or the seconds until its date."""
    if value.strip().isdigit():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0) if value else None
    except ValueError:
        return None
