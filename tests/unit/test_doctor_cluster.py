"""`millrace doctor --cluster`: what it reads from an API server and what it says of KFP's retries."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines import doctor
from pipelines.cli import main
from trainer.errors import MillraceError

# As Kubeflow Pipelines 2.17.0 ships it, and as somebody may have changed it.
DEFAULTS = """
spec:
  ttlStrategy: {secondsAfterCompletion: 3600}
  templateDefaults:
    retryStrategy:
      limit: '2'
      retryPolicy: %s
"""
POLICIES = {
    "OnError": True, "OnTransientError": True, "Always": False, "OnFailure": False,
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_that_ignores_failing_commands_is_noted(policy):
    note = doctor.retry_note({"workflowDefaults": DEFAULTS % policy}, "kubeflow")
    assert (note is not None) == POLICIES[policy]
    if note:
        assert policy in note.what
        assert "set_retry" in note.what
        assert "-n kubeflow" in note.fix


@pytest.mark.parametrize("text", [None, "", "spec: {}", "spec:\n", "spec: [1]", "a: [", "3"])
def test_other_defaults_are_no_note(text):
    assert doctor.retry_note({} if text is None else {"workflowDefaults": text}, "kubeflow") is None


@pytest.fixture
def api(tmp_path, monkeypatch):
    """An API server that holds one ConfigMap; answer[0] is the status to answer with, asked the paths."""
    asked, answer = [], [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            name = "workflow-controller-configmap"
            found = {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": name},
                     "data": {"workflowDefaults": DEFAULTS % "OnError"}}  # fmt: skip
            status = answer[0] if self.path.startswith("/api/v1/namespaces/kubeflow/configmaps/") else 404
            content = json.dumps(found if status == 200 else {"kind": "Status", "code": status}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "u", "user": {"token": "canary-token"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }  # fmt: skip
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    yield asked, answer
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_note_reaches_the_screen_and_the_token_does_not(api, capsys):
    assert main(["doctor", "--cluster"]) in (0, 2)
    out = capsys.readouterr()
    assert "ignores set_retry" in out.out
    assert "canary-token" not in out.out + out.err
    ((path, login),) = api[0]
    assert path == "/api/v1/namespaces/kubeflow/configmaps/workflow-controller-configmap"
    assert login == "Bearer canary-token"


def test_json_holds_facts_findings_and_notes(api, capsys):
    main(["doctor", "--cluster", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [set(note) for note in found["notes"]] == [{"what", "why", "fix"}]
    assert found["python"]


@pytest.mark.parametrize(("status", "word"), [(401, "log in"), (403, "can-i"), (404, "--namespace"), (500, "look at")])
def test_what_the_cluster_refuses_has_a_fix(status, word, api):
    api[1][0] = status
    with pytest.raises(MillraceError) as caught:
        doctor.controller("kubeflow")
    assert str(status) in caught.value.message
    assert word in caught.value.hint


def test_no_cluster_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(MillraceError, match="no cluster"):
        doctor.controller("kubeflow")


def test_without_cluster_nothing_is_asked(api, capsys):
    main(["doctor"])
    assert api[0] == []
    assert "set_retry" not in capsys.readouterr().out
