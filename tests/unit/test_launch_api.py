"""The client of the Kubernetes API against a real HTTP server that answers well, badly, late or not at all."""

import datetime
import json
import ssl
import subprocess
import sys
import threading
import time
from email.utils import formatdate

import pytest

from components.launch import access
from components.launch.access import Login
from components.launch.api import Api, ApiError, Stop
from tests.api_server import ApiServer, drops, listed, pod, promises_more, refuses, sends
from trainer.errors import MillraceError

TOKEN = "canary-token"


def client(server, token=lambda: f"Bearer {TOKEN}"):
    return Api(lambda: Login(server.url, "ns", token))


def asked(server):
    return [(each.method, each.path) for each in server.asked]


def test_a_list_comes_in_pages_and_says_what_its_members_are():
    with ApiServer(listed("7", pod("a", "1"), **{"continue": "next"}), listed("7", pod("b", "2"))) as server:
        items, version = client(server).listing("Pod", label_selector="x=y", field_selector="spec.nodeName=n")
    assert [item["metadata"]["name"] for item in items] == ["a", "b"]
    assert {(item["kind"], item["apiVersion"]) for item in items} == {("Pod", "v1")}
    assert "managedFields" not in items[0]["metadata"]
    assert version == "7"
    first, second = (each.query for each in server.asked)
    assert first == {"labelSelector": "x=y", "fieldSelector": "spec.nodeName=n", "limit": "500"}
    assert second == {**first, "continue": "next"}


def test_where_objects_are_found():
    job = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "j", "namespace": "other"}}
    with ApiServer(*[sends(200, job)] * 5) as server:
        api = client(server)
        api.create(job, dry_run=True)
        api.get("Node", "n")
        api.get("PyTorchJob", "j")
        api.delete("Job", "j", grace_s=0, uid="u")
        api.patch("ConfigMap", "c/../d", {"data": {"a": None}})
    assert asked(server) == [
        ("POST", "/apis/kubeflow.org/v1/namespaces/other/pytorchjobs"),
        ("GET", "/api/v1/nodes/n"),
        ("GET", "/apis/kubeflow.org/v1/namespaces/ns/pytorchjobs/j"),
        ("DELETE", "/apis/batch/v1/namespaces/ns/jobs/j"),
        ("PATCH", "/api/v1/namespaces/ns/configmaps/c%2F..%2Fd"),
    ]
    create, _, _, delete, patch = server.asked
    assert create.query == {"fieldManager": "millrace", "fieldValidation": "Strict", "dryRun": "All"}
    assert create.body == job
    assert delete.body["preconditions"] == {"uid": "u"}
    assert (delete.body["gracePeriodSeconds"], delete.body["propagationPolicy"]) == (0, "Background")
    assert patch.headers["Content-Type"] == "application/merge-patch+json"
    assert patch.body == {"data": {"a": None}}


def test_what_is_gone_already_is_no_error():
    with ApiServer(sends(200), refuses(404, "NotFound")) as server:
        assert client(server).delete("Job", "j")
        assert not client(server).delete("Job", "j")


def test_an_unknown_kind_is_named():
    with ApiServer() as server, pytest.raises(MillraceError, match="Widget"):
        client(server).get("Widget", "w")


TROUBLE = {
    "busy": refuses(429, "TooManyRequests", Retry_After="1"),
    "internal": refuses(500, "InternalError", "etcdserver: leader changed"),
    "starting": sends(503, b"a page of the load balancer"),
    "dropped": drops,
    "cut": promises_more,
    "no-json": sends(200, b"<html>"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_trouble_is_asked_again_as_long_as_the_caller_allows(name):
    with ApiServer(TROUBLE[name], TROUBLE[name], sends(200, {"a": 1})) as server:
        began = time.monotonic()
        assert client(server).get("Pod", "p", within_s=30) == {"a": 1}
        waited = time.monotonic() - began
    assert len(server.asked) == 3
    assert name != "busy" or waited >= 2  # Retry-After is obeyed
    with ApiServer(TROUBLE[name], sends(200, {"a": 1})) as server:
        with pytest.raises(ApiError):
            client(server).get("Pod", "p", within_s=0)
        assert len(server.asked) == 1


@pytest.mark.parametrize("status", [400, 403, 404, 409, 422, 302])
def test_what_is_refused_is_not_asked_again(status):
    with ApiServer(refuses(status, "Reason", "pods is forbidden"), sends(200)) as server:
        with pytest.raises(ApiError, match="pods is forbidden") as caught:
            client(server).get("Pod", "p")
        assert len(server.asked) == 1
    assert (caught.value.status, caught.value.reason) == (status, "Reason")


def test_a_server_that_is_down_is_waited_for_until_the_deadline():
    with ApiServer() as server:
        api = client(server)
    with pytest.raises(ApiError, match="does not answer: Connection refused") as caught:
        api.get("Pod", "p", within_s=1)
    assert caught.value.status == 0
    later = ApiServer(sends(200, {"a": 1}), port=server.port)
    timer = threading.Timer(1.0, later.__enter__)
    timer.start()
    assert api.get("Pod", "p", within_s=30) == {"a": 1}
    timer.join()
    later.__exit__()


@pytest.mark.parametrize("status", [401, 403])
def test_after_an_outage_a_refusal_may_pass(status):
    """An API server that has just started knows neither tokens nor roles yet."""
    with ApiServer(drops, *[refuses(status, "Forbidden")] * 2, sends(200, {"a": 1})) as server:
        assert client(server).get("Pod", "p", within_s=30) == {"a": 1}


def test_neither_errors_nor_reprs_hold_the_token():
    with ApiServer(refuses(403, "Forbidden"), drops) as server:
        api = client(server)
        said = repr(Login(server.url, "ns", lambda: TOKEN)) + repr(vars(api))
        for within in (0, 0):
            with pytest.raises(ApiError) as caught:
                api.get("Pod", "p", within_s=within)
            said += repr(caught.value) + str(caught.value)
        assert server.asked[0].headers["Authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in said


# TLS and logins


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """ca.crt, and a server's context with a certificate of it for 127.0.0.1; a folder."""
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("tls")
    for name in ("ca", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        made = (
            x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(True, None), True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False)
            .sign(key, hashes.SHA256())
        )  # fmt: skip
        (folder / f"{name}.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    return folder


def tls(folder):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.crt", folder / "ca.key")
    return context


@pytest.fixture
def pod_folder(tmp_path, certificates):
    """The service account's folder of a pod."""
    (tmp_path / "ca.crt").write_bytes((certificates / "ca.crt").read_bytes())
    (tmp_path / "token").write_text("old\n")
    (tmp_path / "namespace").write_text("mine\n")
    return tmp_path


def in_pod(server, folder, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    return Api(lambda: access.in_cluster(folder=folder))


def test_a_replaced_token_is_read_again(pod_folder, certificates, monkeypatch):
    def only_new(handler):
        known = handler.headers["Authorization"] == "Bearer new"
        (sends(200, {"a": 1}) if known else refuses(401, "Unauthorized"))(handler)

    with ApiServer(sends(200), *[only_new] * 3, tls=tls(certificates)) as server:
        api = in_pod(server, pod_folder, monkeypatch)
        assert api.namespace == "mine"
        api.get("Pod", "p")
        (pod_folder / "token").write_text("new\n")
        assert api.get("Pod", "p", within_s=0) == {"a": 1}
        assert api.get("Pod", "p", within_s=0) == {"a": 1}
    assert [each.headers["Authorization"] for each in server.asked] == [
        "Bearer old", "Bearer old", "Bearer new", "Bearer new",
    ]  # fmt: skip


def test_a_token_that_cannot_be_read_for_a_moment_is_kept(pod_folder, certificates, monkeypatch):
    monkeypatch.setattr(access, "_TOKEN_S", 0.0)
    with ApiServer(sends(200), sends(200), tls=tls(certificates)) as server:
        api = in_pod(server, pod_folder, monkeypatch)
        api.get("Pod", "p")
        (pod_folder / "token").unlink()
        api.get("Pod", "p")
    assert [each.headers["Authorization"] for each in server.asked] == ["Bearer old", "Bearer old"]


def test_a_login_that_stays_wrong_is_an_error(pod_folder, certificates, monkeypatch):
    with ApiServer(*[refuses(401, "Unauthorized")] * 3, tls=tls(certificates)) as server:
        api = in_pod(server, pod_folder, monkeypatch)
        with pytest.raises(ApiError, match="log in again"):
            api.get("Pod", "p")
        assert len(server.asked) == 2


def test_a_certificate_of_somebody_else_is_refused_at_once(pod_folder, certificates, monkeypatch):
    (pod_folder / "ca.crt").write_bytes((certificates / "other.crt").read_bytes())
    with ApiServer(sends(200), tls=tls(certificates)) as server:
        with pytest.raises(ApiError, match="not trusted") as caught:
            in_pod(server, pod_folder, monkeypatch).get("Pod", "p")
        assert server.asked == []
    assert "certificate" in caught.value.hint


def test_a_pod_without_service_account_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    with pytest.raises(MillraceError, match="automountServiceAccountToken"):
        access.in_cluster(folder=tmp_path)


def kubeconfig(folder, monkeypatch, server, user, **cluster):
    content = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": server, **cluster}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "theirs"}}],
    }  # fmt: skip
    (folder / "kubeconfig").write_text(json.dumps(content))
    monkeypatch.setenv("KUBECONFIG", str(folder / "kubeconfig"))


def test_an_exec_plugin_is_run_again_when_its_token_has_expired(tmp_path, monkeypatch):
    (tmp_path / "plugin").write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib\n"
        f"tries = pathlib.Path({str(tmp_path / 'tries')!r})\n"
        "tries.write_text(str(int(tries.read_text()) + 1 if tries.exists() else 1))\n"
        "status = {'token': 'made-' + tries.read_text(), 'expirationTimestamp': '2020-01-01T00:00:00Z'}\n"
        "api = 'client.authentication.k8s.io/v1'\n"
        "print(json.dumps({'apiVersion': api, 'kind': 'ExecCredential', 'status': status}))\n"
    )
    (tmp_path / "plugin").chmod(0o700)
    run = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(tmp_path / "plugin"),
           "interactiveMode": "Never"}  # fmt: skip
    with ApiServer(sends(200), sends(200)) as server:
        kubeconfig(tmp_path, monkeypatch, server.url, {"exec": run})
        api = Api.connect()
        assert api.namespace == "theirs"
        api.get("Pod", "p")
        api.get("Pod", "p")
    first, second = (each.headers["Authorization"] for each in server.asked)
    assert first.startswith("Bearer made-")
    assert second.startswith("Bearer made-")
    assert first != second


def test_nothing_is_sent_where_others_could_read_it(tmp_path, monkeypatch):
    kubeconfig(tmp_path, monkeypatch, "https://127.0.0.1:1", {"token": TOKEN}, **{"insecure-skip-tls-verify": True})
    with pytest.raises(MillraceError, match="insecure-skip-tls-verify"):
        Api.connect()
    kubeconfig(tmp_path, monkeypatch, "http://203.0.113.1:8080", {"token": TOKEN})
    with pytest.raises(MillraceError, match="without TLS"):
        Api.connect()


def test_no_kubeconfig_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(MillraceError, match="no cluster"):
        Api.connect()


# Output of pods


def test_output_comes_in_lines_however_it_is_cut():
    with ApiServer() as server:
        server.answers = [server.streams(b"one\ntw", b"o\r\nd", b"r\xc3", b"\xa9i \xff\nlast", stay=False)]
        lines = list(client(server).log("p", "c", tail=3, timestamps=True, since_time="2026-01-01T00:00:00Z"))
    assert lines == ["one", "two", "dréi �", "last"]
    (found,) = server.asked
    assert found.path == "/api/v1/namespaces/ns/pods/p/log"
    assert found.query == {
        "container": "c", "tailLines": "3", "timestamps": "true", "sinceTime": "2026-01-01T00:00:00Z"
    }  # fmt: skip


def test_a_line_without_end_takes_no_memory_without_end():
    with ApiServer() as server:
        server.answers = [server.streams(*[b"x" * 50_000] * 10, stay=False)]
        pieces = list(client(server).log("p", "c"))
    assert max(map(len, pieces)) == 65536
    assert "".join(pieces) == "x" * 500_000


def test_output_that_breaks_off_is_an_error_after_its_lines():
    with ApiServer() as server:
        server.answers = [server.streams(b"one\n", cut=True)]
        found = []
        with pytest.raises(ApiError) as caught:
            found.extend(client(server).log("p", "c", follow=True))
    assert caught.value.status == 0


def test_a_silent_stream_ends_when_it_is_told_to():
    stop, lines = Stop(), []
    with ApiServer() as server:
        server.answers = [server.streams(b"one\n")]
        reader = threading.Thread(
            target=lambda: lines.extend(client(server).log("p", "c", follow=True, stop=stop)), daemon=True
        )
        reader.start()
        while not server.asked:
            time.sleep(0.01)
        stop.set()
        reader.join(10)
        assert not reader.is_alive()
    # One that begins afterwards ends at once.
    with ApiServer() as server:
        assert list(client(server).log("p", "c", follow=True, stop=stop)) == []


def test_what_waits_for_hours_imports_little():
    code = (
        "import sys, components.launch.watch, components.launch.rbac\n"
        "heavy = {'kubernetes', 'numpy', 'pydantic', 'yaml', 'kfp', 'torch', 'requests'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "rss = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')]\n"
        "print(rss[0])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 40_000  # kB; 24 MB on CPython 3.11, of which 11 MB are Python's own


def test_time_is_the_servers_and_not_a_wrong_clock_of_ours(monkeypatch):
    wrong = time.time() - 7200
    monkeypatch.setattr(time, "time", lambda: wrong)

    def dated(handler):
        handler.date_time_string = lambda timestamp=None: formatdate(wrong + 7200, usegmt=True)
        sends()(handler)

    with ApiServer(dated) as server:
        api = client(server)
        assert api.now() - wrong < 60
        api.get("Pod", "p")
        assert 7190 < api.now() - wrong < 7260
