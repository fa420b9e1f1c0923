"""A server that speaks the v2beta1 API of Kubeflow Pipelines, as its swagger 2.17 and the real server's source have it.

Every request is recorded and checked: method, path, query, content type, login, each field of its body. What is wrong is
answered with 400 and noted in `problems`. Runs advance by one step of `script` whenever one is asked for. Faults can be
injected before or after a request takes effect.

    with KfpServer() as server: ... server.url ... server.requests ...
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.kfp_nodes import EPOCH, Json, nodes

API = "/apis/v2beta1"
ID = r"(?P<id>[\w-]+)"
LISTED = {"page_token", "page_size", "sort_by", "filter", "namespace"}
# Method, path, query words, handler.
ROUTES: tuple[tuple[str, str, set[str], str], ...] = (
    ("GET", "/healthz", set(), "healthz"),
    ("GET", "/experiments", LISTED, "list_experiments"),
    ("POST", "/experiments", set(), "create_experiment"),
    ("GET", f"/pipelines/(?P<pipeline>[\\w-]+)/versions/{ID}", set(), "get_version"),
    ("GET", "/runs", LISTED | {"experiment_id"}, "list_runs"),
    ("POST", "/runs", {"experiment_id"}, "create_run"),
    ("GET", f"/runs/{ID}", {"experiment_id"}, "get_run"),
    ("POST", f"/runs/{ID}:terminate", {"experiment_id"}, "terminate_run"),
    ("POST", f"/runs/{ID}:archive", {"experiment_id"}, "archive_run"),
    ("GET", "/recurringruns", LISTED | {"experiment_id"}, "list_recurring"),
    ("POST", "/recurringruns", set(), "create_recurring"),
    ("GET", f"/recurringruns/{ID}", set(), "get_recurring"),
    ("POST", f"/recurringruns/{ID}:enable", set(), "enable"),
    ("POST", f"/recurringruns/{ID}:disable", set(), "disable"),
    ("DELETE", f"/recurringruns/{ID}", {"propagation_policy"}, "delete_recurring"),
    ("GET", f"/apis/v1alpha1/runs/{ID}/nodes/(?P<pod>[^/]+)/log", set(), "log"),
    ("GET", "/k8s/pod/logs", {"podname", "runid", "podnamespace"}, "ui_log"),
)
# Fields of a request's body -> type; those with `!` must be there.
RUN = {"display_name!": str, "description": str, "experiment_id!": str, "pipeline_spec!": dict, "runtime_config": dict,
       "service_account": str}  # fmt: skip
RECURRING = RUN | {"trigger!": dict, "mode!": str, "max_concurrency!": str, "no_catchup": bool, "namespace": str}
EXPERIMENT = {"display_name!": str, "description": str, "namespace": str}
KINDS = {
    "STRING": str,
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": bool,
    "LIST": list,
    "STRUCT": dict,
}
FINAL = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


@dataclass
class Fault:
    """What happens instead of an answer: a status, or a connection that breaks; before or after the effect."""

    method: str
    path: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b'{"error": "made to fail", "code": 13, "message": "made to fail"}'
    after: bool = False
    delay: float = 0.0
    times: int = 1


class KfpServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, token: str = "", cookies: str = "", multi_user: bool = False, ui: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.cookies, self.multi_user, self.ui = token, cookies, multi_user, ui
        self.lock = threading.RLock()
        self.requests: list[Request] = []
        self.problems: list[str] = []
        self.faults: list[Fault] = []
        self.experiments: dict[str, Json] = {}
        self.runs: dict[str, Json] = {}
        self.recurring: dict[str, Json] = {}
        self.versions: dict[str, Json] = {}
        self.logs: dict[str, str] = {}
        self.script: list[tuple[str, dict[str, str]]] = [("SUCCEEDED", {})]
        self.killed: list[str] = []
        # The most schedules of one name that were enabled at a time.
        self.most_enabled = 0
        self.on_event: Callable[[str], None] = lambda event: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> KfpServer:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join(10)
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error of the server; anything else is one of the test's."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.problems.append(f"{type(error).__name__}: {error}")

    def fail(self, method: str, path: str, **how: Any) -> None:
        """Let the next matching requests fail; `path` is a regular expression for what follows /apis/v2beta1."""
        self.faults.append(Fault(method, path, **how))

    def sent(self, method: str, path: str) -> list[Request]:
        """Recorded requests of a method whose path matches."""
        return [
            each for each in self.requests if each.method == method and re.fullmatch(path, each.path.removeprefix(API))
        ]

    def start_run(self, recurring_id: str, state: str = "RUNNING") -> str:
        """What the scheduler does when a schedule is due."""
        found = self.recurring[recurring_id]
        return self._run(found["display_name"], found, state, recurring_id)["run_id"]

    # --- the API ---------------------------------------------------------------------------------------------------

    def healthz(self, request: Request) -> Json:
        return {"multi_user": self.multi_user}

    def list_experiments(self, request: Request) -> Json:
        self._need_namespace(request.query.get("namespace"))
        keys = {"display_name", "experiment_id", "created_at", "namespace"}
        return _page(list(self.experiments.values()), "experiments", request, keys)

    def create_experiment(self, request: Request) -> Json:
        self._fields(request.body, EXPERIMENT)
        self._need_namespace(request.body.get("namespace"))
        if any(each["display_name"] == request.body["display_name"] for each in self.experiments.values()):
            raise Refused(409, "Already exist error: an experiment of this name exists")
        made = request.body | {"experiment_id": str(uuid.uuid4()), "storage_state": "AVAILABLE", "created_at": _now()}
        self.experiments[made["experiment_id"]] = made
        return made

    def get_version(self, request: Request, pipeline: str, id: str) -> Json:
        return _known(self.versions, id, "pipeline version")

    def list_runs(self, request: Request) -> Json:
        if "experiment_id" not in request.query:
            self._need_namespace(request.query.get("namespace"))
        keys = {"run_id", "display_name", "created_at", "state", "experiment_id", "recurring_run_id", "description"}
        found = [
            run
            for run in self.runs.values()
            if run["experiment_id"] == request.query.get("experiment_id", run["experiment_id"])
        ]
        return _page(found, "runs", request, keys)

    def create_run(self, request: Request) -> Json:
        self._fields(request.body, RUN)
        _known(self.experiments, request.body["experiment_id"], "experiment")
        self._check_inputs(request.body)
        return self._run(request.body["display_name"], request.body, "PENDING", "")

    def _run(self, name: str, body: Json, state: str, recurring_id: str) -> Json:
        made = {
            "run_id": str(uuid.uuid4()), "display_name": name, "description": body.get("description", ""), "state": state,
            "experiment_id": body["experiment_id"], "pipeline_spec": body["pipeline_spec"], "created_at": _now(),
            "runtime_config": body.get("runtime_config", {}), "scheduled_at": _now(), "finished_at": EPOCH,
            "storage_state": "AVAILABLE", "_at": 0, "_order": len(self.runs), "_cancelled": 0,
        }  # fmt: skip
        if recurring_id:
            made["recurring_run_id"] = recurring_id
        self.runs[made["run_id"]] = made
        return made

    def get_run(self, request: Request, id: str) -> Json:
        run = _known(self.runs, id, "run")
        if run["state"] in FINAL:
            return run
        if run["_cancelled"]:
            # CANCELING is seen before FAILED.
            state, tasks = ("CANCELING" if run["_cancelled"] == 1 else "FAILED"), {}
            run["_cancelled"] += 1
        else:
            state, tasks = self.script[min(run["_at"], len(self.script) - 1)]
            run["_at"] += 1
        run["state"] = state
        if tasks:
            run["run_details"] = {"task_details": nodes(run, tasks)}
        if state in FINAL:
            run["finished_at"] = _now()
        return run

    def terminate_run(self, request: Request, id: str) -> Json:
        run = _known(self.runs, id, "run")
        if run["state"] in (*FINAL, "CANCELING"):
            raise Refused(409, f"Failed to terminate run {id}: it is in state {run['state']}")
        run["state"], run["_cancelled"] = "CANCELING", 1
        return {}

    def archive_run(self, request: Request, id: str) -> Json:
        _known(self.runs, id, "run")["storage_state"] = "ARCHIVED"
        return {}

    def list_recurring(self, request: Request) -> Json:
        if "experiment_id" not in request.query:
            self._need_namespace(request.query.get("namespace"))
        keys = {"recurring_run_id", "display_name", "created_at", "updated_at", "description"}
        found = [each for each in self.recurring.values()
                 if each["experiment_id"] == request.query.get("experiment_id", each["experiment_id"])]  # fmt: skip
        return _page(found, "recurringRuns", request, keys)

    def create_recurring(self, request: Request) -> Json:
        body = request.body
        self._fields(body, RECURRING)
        _known(self.experiments, body["experiment_id"], "experiment")
        self._check_inputs(body)
        cron = (body["trigger"].get("cron_schedule") or {}).get("cron", "")
        if set(body["trigger"]) != {"cron_schedule"} or len(cron.split()) != 6:
            raise Refused(400, f"trigger {body['trigger']}: not six cron fields")
        if not 1 <= int(body["max_concurrency"]) <= 10 or body["mode"] not in ("ENABLE", "DISABLE"):
            raise Refused(400, "max_concurrency or mode out of range")
        if len(body.get("description", "")) > 255:
            raise Refused(400, "description: more than 255 characters")
        kept = {key: value for key, value in body.items() if key != "mode"}
        made = kept | {
            "recurring_run_id": str(uuid.uuid4()), "status": f"{body['mode']}D", "created_at": _now(), "updated_at": _now(),
            "_order": len(self.recurring),
        }  # fmt: skip
        self.recurring[made["recurring_run_id"]] = made
        return made

    def get_recurring(self, request: Request, id: str) -> Json:
        return _known(self.recurring, id, "recurring run")

    def enable(self, request: Request, id: str) -> Json:
        _known(self.recurring, id, "recurring run")["status"] = "ENABLED"
        return {}

    def disable(self, request: Request, id: str) -> Json:
        _known(self.recurring, id, "recurring run")["status"] = "DISABLED"
        return {}

    def delete_recurring(self, request: Request, id: str) -> Json:
        _known(self.recurring, id, "recurring run")
        policy = request.query.get("propagation_policy", "DELETE_PROPAGATION_POLICY_UNSPECIFIED")
        if policy not in ("DELETE_PROPAGATION_POLICY_UNSPECIFIED", "FOREGROUND", "BACKGROUND", "ORPHAN"):
            raise Refused(400, f"propagation_policy {policy}")
        # As before 2.16: the policy is not read, and the pods of an active run go as well.
        self.killed += [run["run_id"] for run in self.runs.values()
                        if run.get("recurring_run_id") == id and run["state"] not in FINAL]  # fmt: skip
        del self.recurring[id]
        return {}

    def log(self, request: Request, id: str, pod: str) -> str:
        """As the real one: an error comes with status 200, after whatever text there is."""
        if self.ui:
            return "<!doctype html><html>the UI's first page</html>"
        _known(self.runs, id, "run")
        error = json.dumps(
            {"error_message": f"Failed to read logs from pod {pod}", "error_details": "not found"},
            separators=(",", ":"),
        )
        return self.logs.get(pod, error)

    def ui_log(self, request: Request) -> str:
        """The UI's server stands before the API's, and passes on only what is below /apis/v2beta1 and v1beta1."""
        if not self.ui:
            raise Refused(404, "404 page not found")
        _known(self.runs, request.query["runid"], "run")
        if request.query["podname"] not in self.logs:
            raise Refused(500, "Could not get main container logs")
        return self.logs[request.query["podname"]]

    # --- checks ----------------------------------------------------------------------------------------------------

    def _need_namespace(self, namespace: str | None) -> None:
        if self.multi_user and not namespace:
            raise Refused(400, "Invalid input error: a namespace cannot be empty in multi-user mode")

    def _fields(self, body: Any, known: dict[str, type]) -> None:
        if not isinstance(body, dict):
            raise Refused(400, "the body is no JSON object")
        types = {key.rstrip("!"): kind for key, kind in known.items()}
        for key, value in body.items():
            if key not in types:
                raise Refused(400, f"unknown field {key}")
            if not isinstance(value, types[key]):
                raise Refused(400, f"field {key}: not a {types[key].__name__}")
        for key in known:
            if key.endswith("!") and not body.get(key[:-1]):
                raise Refused(400, f"field {key[:-1]}: is missing")

    def _check_inputs(self, body: Json) -> None:
        """The arguments against the pipeline's inputs."""
        spec = body["pipeline_spec"]
        if not set(spec) <= {"pipeline_spec", "platform_spec"} and "root" not in spec:
            raise Refused(400, "pipeline_spec: neither a pipeline nor a pair with a platform")
        spec = spec.get("pipeline_spec", spec)
        if not {"pipelineInfo", "root", "schemaVersion", "components"} <= set(spec):
            raise Refused(400, "pipeline_spec: not a pipeline")
        known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
        config = body.get("runtime_config", {})
        if set(config) - {"parameters", "pipeline_root"}:
            raise Refused(400, "runtime_config: unknown field")
        given = config.get("parameters", {})
        for key, value in given.items():
            kind = KINDS.get(known.get(key, {}).get("parameterType", ""))
            if kind is None or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise Refused(400, f"parameter {key}: unknown, or of the wrong type")
        for key, about in known.items():
            if key not in given and not about.get("isOptional") and "defaultValue" not in about:
                raise Refused(400, f"parameter {key}: is missing")

    def note(self) -> None:
        """After each effect: how many schedules of a name are enabled."""
        enabled: dict[str, int] = {}
        for each in self.recurring.values():
            enabled[each["display_name"]] = enabled.get(each["display_name"], 0) + (each["status"] == "ENABLED")
        self.most_enabled = max([self.most_enabled, *enabled.values()])


class Handler(BaseHTTPRequestHandler):
    server: KfpServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one packet: the second would wait for the first one's receipt

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(
            self.command, parts.path, query, {key.lower(): value for key, value in self.headers.items()}, raw
        )
        server = self.server
        with server.lock:
            server.requests.append(request)
            fault = self._fault(request)
        server.on_event(f"{request.method} {request.path}")
        if fault:
            time.sleep(fault.delay)
            if fault.after:
                self._answer(request)
            if fault.status:
                self._send(fault.status, fault.body, {"Content-Type": "application/json", **fault.headers})
            else:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, answer = self._answer(request)
        if isinstance(answer, str):
            self._send(status, answer.encode(), {"Content-Type": "text/plain; charset=utf-8"})
        else:
            self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _fault(self, request: Request) -> Fault | None:
        for fault in self.server.faults:
            if (
                fault.times
                and fault.method == request.method
                and re.fullmatch(fault.path, request.path.removeprefix(API))
            ):
                fault.times -= 1
                return fault
        return None

    def _answer(self, request: Request) -> tuple[int, Any]:
        server = self.server
        with server.lock:
            try:
                answer = self._route(request)
                server.note()
            except Refused as error:
                if error.status == 400:
                    server.problems.append(f"{request.method} {request.path}: {error}")
                return error.status, {"error": str(error), "code": 3, "message": str(error), "details": []}
            shown = {k: v for k, v in answer.items() if not k.startswith("_")} if isinstance(answer, dict) else answer
            return 200, json.loads(json.dumps(shown))

    def _route(self, request: Request) -> Any:
        server = self.server
        if server.token and request.headers.get("authorization") != f"Bearer {server.token}":
            raise Refused(401, "Request header error: there is no user identity header.")
        if server.cookies and request.headers.get("cookie") != server.cookies:
            raise Refused(401, "no session")
        for method, pattern, words, name in ROUTES:
            found = re.fullmatch(pattern if pattern.startswith(("/apis", "/k8s")) else API + pattern, request.path)
            if not found or method != request.method:
                continue
            if unknown := set(request.query) - words:
                raise Refused(400, f"unknown query {unknown}")
            if request.method == "POST":
                if request.headers.get("content-type") != "application/json":
                    raise Refused(400, f"content type {request.headers.get('content-type')}")
                request.body = json.loads(request.body) if request.body else None
            return getattr(server, name)(request, **found.groupdict())
        server.problems.append(f"{request.method} {request.path}: no such call")
        raise Refused(404, "Not Found")

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _known(table: dict[str, Json], id: str, what: str) -> Json:
    if id not in table:
        raise Refused(404, f"ResourceNotFoundError: {what} {id} not found")
    return table[id]


def _now() -> str:
    """In whole seconds, as the server counts."""
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _page(items: list[Json], key: str, request: Request, keys: set[str]) -> Json:
    """A page of a list, filtered and sorted; the filter is decoded once more than the query, as the server does."""
    encoded = request.query.get("filter", "")
    for predicate in json.loads(unquote(encoded.replace("+", " ")))["predicates"] if encoded else []:
        if (
            set(predicate) != {"operation", "key", "string_value"}
            or predicate["operation"] != "EQUALS"
            or predicate["key"] not in keys
        ):
            raise Refused(400, f"filter {predicate}")
        # MySQL, on which the server stands by default, takes large and small letters for the same.
        value = predicate["string_value"].lower()
        items = [each for each in items if each.get(predicate["key"], "").lower() == value]
    by, _, way = request.query.get("sort_by", "created_at").partition(" ")
    if by not in keys or way not in ("", "asc", "desc"):
        raise Refused(400, f"sort_by {by} {way}")
    items = sorted(items, key=lambda each: (each[by], each.get("_order", 0)), reverse=way == "desc")
    size = min(int(request.query.get("page_size") or 20), 200)
    token = request.query.get("page_token", "")
    start = int(base64.b64decode(token)) if token else 0
    page = [{k: v for k, v in each.items() if not k.startswith("_")} for each in items[start : start + size]]
    more = (
        {"next_page_token": base64.b64encode(str(start + size).encode()).decode()} if start + size < len(items) else {}
    )
    return ({key: page} if page else {}) | {"total_size": len(items)} | more
