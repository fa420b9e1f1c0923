"""What a person reads when the server refuses, fails, or is something else; and that secrets are read nowhere."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import client, cron, kfp_api, kfp_target, schedule
from pipelines.cli import main
from pipelines.kfp_api import Api, KfpError
from pipelines.kfp_target import Target, target
from tests.kfp_alone import alone
from tests.kfp_server import KfpServer
from trainer.errors import ConfigError

CANARY = "canary-5ecr3t-t0ken"
HTML = b"<!doctype html><title>Sign in</title>"
TINY = {
    "components": {"comp-a": {"executorLabel": "exec-a"}}, "deploymentSpec": {}, "pipelineInfo": {"name": "tiny"},
    "root": {"dag": {"tasks": {"a": {"componentRef": {"name": "comp-a"}, "taskInfo": {"name": "a"}}}}},
    "schemaVersion": "2.1.0", "sdkVersion": "kfp-2.17.0",
}  # fmt: skip


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    alone(tmp_path, monkeypatch)
    with KfpServer() as found:
        yield found


def slept(server: KfpServer, **how: object) -> tuple[Api, list[float]]:
    """An API whose waits are noted, not waited."""
    waits: list[float] = []
    return Api(Target(server.url, **how), waits.append), waits  # type: ignore[arg-type]


STATUSES = {
    401: ("not logged in", "MILLRACE_KFP_TOKEN"),
    403: ("no permission", "--namespace"),
    404: ("not there", "/pipeline"),
    409: ("there already", "again"),
    429: ("too many requests", "wait"),
    500: ("the server failed", "ml-pipeline"),
}


@pytest.mark.parametrize("status", STATUSES)
def test_each_status_is_one_readable_error(server: KfpServer, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    server.fail("GET", "/experiments", status=status, times=99)
    assert main(["runs", "--host", server.url]) == 1
    out, err = capsys.readouterr()
    what, fix = STATUSES[status]
    message, _, hint = err.partition("\n  fix: ")
    assert out == ""
    assert f": {status}: made to fail ({what}" in message
    assert fix in hint
    assert err.count("\n") == 2


def test_a_run_that_is_not_there_is_not_the_hosts_fault(server: KfpServer) -> None:
    with pytest.raises(KfpError) as caught:
        slept(server)[0].get("/runs/1")
    assert "millrace runs" in caught.value.hint


@pytest.mark.parametrize("status", [0, 429, 500, 502, 503, 504])
def test_a_get_is_repeated_until_it_works(server: KfpServer, status: int) -> None:
    server.fail("GET", "/experiments", status=status, times=kfp_api.ATTEMPTS - 1)
    api, waits = slept(server)
    assert api.get("/experiments")["total_size"] == 0
    assert len(waits) == kfp_api.ATTEMPTS - 1
    assert all(after > before for before, after in itertools.pairwise(waits))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409])
def test_a_get_that_is_refused_is_not_repeated(server: KfpServer, status: int) -> None:
    server.fail("GET", "/experiments", status=status, times=99)
    with pytest.raises(KfpError):
        slept(server)[0].get("/experiments")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("after", "least", "most"), [("7", 7, 7), ("Fri, 31 Dec 2100 23:59:59 GMT", 120, 120), ("soon", 0, 1)]
)
def test_retry_after_is_waited_for_up_to_two_minutes(server: KfpServer, after: str, least: float, most: float) -> None:
    server.fail("GET", "/experiments", status=429, headers={"Retry-After": after})
    api, waits = slept(server)
    api.get("/experiments")
    assert least <= waits[0] <= most


def test_a_post_is_repeated_after_429(server: KfpServer) -> None:
    server.fail("POST", "/experiments", status=429)
    assert client.experiment(slept(server)[0], create=True)
    assert len(server.experiments) == 1


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [(200, {"Content-Type": "text/html"}, HTML), (302, {"Location": "https://dex.example.com/auth?state=abc"}, b""),
     (401, {}, HTML)],
    ids=["a page", "a redirect", "a page with 401"],
)  # fmt: skip
def test_a_login_page_is_named_as_one(server: KfpServer, status: int, headers: dict[str, str], body: bytes) -> None:
    server.fail("GET", "/experiments", status=status, headers=headers, body=body, times=9)
    with pytest.raises(KfpError) as caught:
        slept(server)[0].get("/experiments")
    assert "logged in" in str(caught.value) or "login page" in str(caught.value)
    assert "MILLRACE_KFP_TOKEN" in caught.value.hint
    assert "<" not in caught.value.message
    assert "state=" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("body", [b"", b"ok", b"[]", b"\xff\xfe", b'{"runs": ['], ids=repr)
def test_what_is_no_json_object_is_an_error(server: KfpServer, body: bytes) -> None:
    server.fail("GET", "/experiments", status=200, body=body)
    with pytest.raises(KfpError, match="no JSON object"):
        slept(server)[0].get("/experiments")


def weekly(api: Api, documents: list[dict], arguments: dict, name: str) -> None:
    schedule.reconcile(api, name, documents, cron.parse("@weekly"), arguments)


@pytest.mark.parametrize("path", ["/experiments", "/runs", "/recurringruns"])
def test_an_answer_without_the_id_of_what_was_made_is_an_error(server: KfpServer, path: str) -> None:
    server.fail("POST", path, status=200, body=b"{}", times=9)
    api, _ = slept(server)
    make = client.submit if path != "/recurringruns" else weekly
    with pytest.raises(KfpError, match=f"answers POST {path} with no .*_id"):
        make(api, [TINY], {}, "one")


def test_a_redirect_to_tls_names_the_host_to_give(server: KfpServer) -> None:
    place = server.url.replace("http:", "https:")
    server.fail("GET", "/runs/1", status=301, headers={"Location": f"{place}/pipeline/apis/v2beta1/runs/1?x=1"})
    with pytest.raises(KfpError) as caught:
        slept(server)[0].get("/runs/1")
    assert caught.value.hint == f"--host {place}/pipeline"


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"upstream connect error", b'"text"', b"null"], ids=repr)
def test_an_error_with_any_body_is_readable(server: KfpServer, body: bytes) -> None:
    server.fail("GET", "/experiments", status=400, body=body)
    with pytest.raises(KfpError, match="400"):
        slept(server)[0].get("/experiments")


def test_connection_refused_is_said_at_once(capsys: pytest.CaptureFixture[str], server: KfpServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert main(["submit", "--host", host]) == 1
    err = capsys.readouterr().err
    assert f"{host}: connection refused" in err
    assert "port-forward" in err


def test_a_certificate_that_nobody_vouches_for_is_explained(server: KfpServer) -> None:
    with pytest.raises(KfpError) as caught:
        Api(Target(server.url.replace("http:", "https:")), lambda _: None).get("/experiments")
    assert "no safe connection" in caught.value.message
    assert caught.value.hint.endswith(f"--host {server.url}"), "there is no TLS at that port at all"
    error = slept(server)[0]._tls("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")
    assert "--ca-file" in error.hint


def test_an_installation_of_several_users_asks_for_the_namespace(
    server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.multi_user = True
    assert main(["runs", "--host", server.url]) == 1
    assert "--namespace" in capsys.readouterr().err
    server.problems.clear()
    api, _ = slept(server, namespace="team-a")
    client.submit(api, [TINY], {}, "one")
    assert [run["display_name"] for run in client.runs(api)] == ["one"]
    assert server.problems == []


@pytest.mark.parametrize(
    "host", ["", "localhost:8080", "ftp://x", "http://", "http://me:pw@host", "http://[::1", "http://h:99999"]
)
def test_a_host_that_is_none(host: str, server: KfpServer) -> None:
    with pytest.raises(ConfigError) as caught:
        target(host)
    assert caught.value.hint
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("pasted", "expected"),
    [("http://h:8080/", "http://h:8080"), ("https://h/pipeline/#/runs/details/1", "https://h/pipeline"),
     ("https://h/_/pipeline/?ns=a", "https://h/pipeline"), ("https://h/pipeline/apis/v2beta1/", "https://h/pipeline")],
)  # fmt: skip
def test_a_pasted_page_is_a_host(pasted: str, expected: str, server: KfpServer) -> None:
    assert target(pasted).host == expected


def test_the_token_comes_from_the_flag_then_the_environment_then_the_pod(
    server: KfpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("flag", "env", "pod"):
        (tmp_path / name).write_text(f"Bearer {name}-file\n")
    assert target(server.url).token() == ""
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "pod"))
    assert target(server.url).token() == "pod-file"
    monkeypatch.setenv("MILLRACE_KFP_TOKEN_FILE", str(tmp_path / "env"))
    assert target(server.url).token() == "env-file"
    monkeypatch.setenv("MILLRACE_KFP_TOKEN", "env")
    assert target(server.url).token() == "env"
    assert target(server.url, token_file="flag").token() == "flag-file"


def test_a_token_that_is_renewed_is_read_anew(server: KfpServer, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    api = Api(target(server.url, token_file=str(path)))
    for token in ("old", "new"):
        path.write_text(token)
        server.token = token
        api.get("/experiments")


def test_a_pod_needs_no_host(server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert target().host == "http://ml-pipeline.kubeflow.svc.cluster.local:8888"


@pytest.mark.parametrize("content", [b"a\nX-Evil: 1", b"\xff", b"caf\xc3\xa9"], ids=repr)
def test_a_token_that_would_break_the_header_is_refused(server: KfpServer, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        target(server.url, token_file="token")
    assert "Evil" not in str(caught.value)


def test_no_redirect_carries_the_token_away(server: KfpServer) -> None:
    with KfpServer() as thief:
        server.fail("GET", "/experiments", status=307, headers={"Location": f"{thief.url}/apis/v2beta1/experiments"})
        with pytest.raises(KfpError, match="login page"):
            slept(server, token=lambda: CANARY)[0].get("/experiments")
        assert thief.requests == []


@pytest.mark.parametrize("kind", ["TOKEN", "COOKIES"])
def test_a_secret_is_found_in_no_output_and_no_log(
    server: KfpServer,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(f"MILLRACE_KFP_{kind}", CANARY if kind == "TOKEN" else f"authservice_session={CANARY}; x=1")
    monkeypatch.setenv("MILLRACE_KFP_HOST", server.url)
    setattr(server, kind.lower(), os.environ[f"MILLRACE_KFP_{kind}"])
    caplog.set_level(logging.DEBUG)
    echo = f'{{"message": "bad session {CANARY} in header"}}'.encode()
    assert main(["submit", "--name", "one"]) == 0
    for command in (["status"], ["runs"], ["cancel"], ["schedule", "ls"], ["compile"]):
        assert main(command) == 0
    for status in (401, 500, 302):
        server.fail(
            "GET",
            "/experiments",
            status=status,
            body=echo,
            headers={"Location": f"/login?t={CANARY}"},
            times=kfp_api.ATTEMPTS,
        )
        assert main(["runs"]) == 1
    out, err = capfd.readouterr()
    assert "bad session *** in header" in err
    written = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    for text in (
        out,
        err,
        caplog.text,
        written,
        repr(target()),
        "".join(str(each.body) + each.path for each in server.requests),
    ):
        assert CANARY not in text


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from pipelines.cli import build_parser; build_parser(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(kfp_target.__file__).parents[1],
    )
    assert not {"kfp", "kfp_server_api", "urllib3", "pydantic", "yaml"} & set(done.stdout.split())
