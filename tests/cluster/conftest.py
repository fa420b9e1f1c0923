"""A namespace as millrace ships it for each test, on the cluster of KUBECONFIG: `make e2e`.

Nothing here is skipped: without a cluster a test fails and says what to do. Environment: KUBECONFIG, an administrator's;
E2E_IMAGES, registry and folder of the images (docker.io/millrace); E2E_STORAGE_CLASS, a class that many pods may write to
(the cluster's default).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from components.launch.api import Api
from tests import kube
from tests.kube import CLAIM, ROOT, Volume, kubectl

LAUNCHER = "millrace-launcher"
# Of the real data of preset text-classify, as much as two processes learn from in seconds.
SMALL_DATA = ["data.max_rows=600", "data.min_label_rows=12", "data.tokenizer.vocab_size=1000", "data.max_length=128"]
_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Remember that a test failed, for the fixtures that then explain."""
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


@pytest.fixture(scope="session")
def kubeconfig() -> str:
    """The administrator's kubeconfig, of a cluster that answers."""
    if not kube.KUBECONFIG:
        pytest.fail("no cluster: `KUBECONFIG=... make e2e`, of one with the training operator, Katib and Trainer")
    kubectl("get", "--raw", "/readyz")
    return kube.KUBECONFIG


@pytest.fixture(scope="session")
def shipped(kubeconfig: str) -> list[kube.Object]:
    """What manifests/base holds for a namespace, without what the whole cluster shares and without the quota's sizes."""
    every = yaml.safe_load_all(kubectl("kustomize", str(ROOT / "manifests" / "base")))
    return [each for each in every if each["kind"] not in ("PriorityClass", "ResourceQuota")]


@pytest.fixture(scope="session")
def _namespaces(kubeconfig: str) -> Iterator[list[str]]:
    """Names of all namespaces that were made; gone at the end."""
    made: list[str] = []
    yield made
    if made:
        # A namespace goes once every controller has let go of what was in it.
        kubectl("wait", "--for=delete", "--timeout=120s", *(f"namespace/{name}" for name in made), deadline_s=130)


@pytest.fixture
def namespace(request: pytest.FixtureRequest, shipped: list[kube.Object], _namespaces: list[str]) -> Iterator[str]:
    """A new namespace with the shipped labels, service accounts, roles and limits, and the claim `millrace`.

    Deleted with all that is in it; if the test failed, what happened there is printed before.
    """
    name = f"millrace-e2e-{uuid.uuid4().hex[:8]}"
    _namespaces.append(name)
    try:
        kube.apply(*(moved(each, name) for each in shipped))
        yield name
    finally:
        if request.node.stash.get(_FAILED, False):
            kube.explain(name)
        kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")


def moved(obj: kube.Object, namespace: str) -> kube.Object:
    """A shipped object as it stands in another namespace; a claim is small and takes the tests' storage class."""
    obj = json.loads(json.dumps(obj))
    obj["metadata"]["name" if obj["kind"] == "Namespace" else "namespace"] = namespace
    for subject in obj.get("subjects", []):
        subject["namespace"] = namespace
    if obj["kind"] == "PersistentVolumeClaim":
        assert obj["metadata"]["name"] == CLAIM
        obj["spec"]["resources"]["requests"]["storage"] = "1Gi"
        if os.environ.get("E2E_STORAGE_CLASS"):
            obj["spec"]["storageClassName"] = os.environ["E2E_STORAGE_CLASS"]
    return obj


@pytest.fixture
def launcher_kubeconfig(namespace: str, tmp_path: Path) -> Path:
    """A kubeconfig of the shipped service account millrace-launcher: what is tested has its rights and no others."""
    found = json.loads(kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
    token = kubectl("-n", namespace, "create", "token", LAUNCHER, "--duration=2h").strip()
    found["users"] = [{"name": LAUNCHER, "user": {"token": token}}]
    (context,) = found["contexts"]
    context["context"] |= {"user": LAUNCHER, "namespace": namespace}
    path = tmp_path / "launcher.kubeconfig"
    path.touch(mode=0o600)
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


@pytest.fixture
def environment(launcher_kubeconfig: Path) -> dict[str, str]:
    """The environment of a launcher that runs as a process here, with the launcher's rights."""
    return os.environ | {"KUBECONFIG": str(launcher_kubeconfig), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def api(launcher_kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> Api:
    """A client with the launcher's rights, in the test's namespace. KUBECONFIG is the launcher's from here on."""
    monkeypatch.setenv("KUBECONFIG", str(launcher_kubeconfig))
    return Api.connect()


@pytest.fixture
def volume(namespace: str) -> Volume:
    """The files of the claim `millrace`."""
    return Volume(namespace)


@pytest.fixture(scope="session")
def local_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of the real data of preset text-classify, preprocessed on this machine. Do not write to it."""
    folder = tmp_path_factory.mktemp("data") / "dataset"
    words = ["preprocess", "--out", f"dataset={folder}", *SMALL_DATA]
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *words], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def dataset(volume: Volume, local_dataset: Path) -> str:
    """The same dataset on the claim; its path in pods."""
    return volume.put(local_dataset, "dataset")
