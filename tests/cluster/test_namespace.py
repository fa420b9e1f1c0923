"""What every test on the cluster stands on: a namespace with the shipped rights and no others, and the data in its volume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.launch.api import Api, ApiError
from tests import kube
from tests.kube import Volume, kubectl
from trainer.artifacts import manifest

pytestmark = pytest.mark.cluster


def test_the_namespace_lets_only_restricted_pods_in(namespace: str) -> None:
    labels = kube.get(namespace, "namespace", namespace)["metadata"]["labels"]
    assert labels["katib.kubeflow.org/metrics-collector-injection"] == "enabled"
    said = kubectl("-n", namespace, "run", "root", f"--image={kube.image('launcher')}", ok=False)
    assert 'violates PodSecurity "restricted' in said


def test_the_launcher_has_the_shipped_rights_and_no_others(api: Api, namespace: str) -> None:
    assert api.namespace == namespace
    assert api.list("PyTorchJob") == []
    for kind, place in {"Secret": namespace, "Pod": "kube-system", "Node": ""}.items():
        with pytest.raises(ApiError) as caught:
            api.list(kind, namespace=place, within_s=5)
        assert caught.value.status == 403


def test_data_goes_to_the_volume_and_back(
    volume: Volume, dataset: str, local_dataset: Path, tmp_path: Path, namespace: str
) -> None:
    here = manifest.read(local_dataset, "dataset")
    assert json.loads(volume.text("dataset/manifest.json"))["digest"] == here.digest
    assert manifest.read(volume.fetch("dataset", tmp_path / "back"), "dataset").digest == here.digest
    assert "manifest.json" in volume.files("dataset")
    assert volume.files("nowhere") == []
    assert kube.condition(kube.get(namespace, "pod", Volume.POD), "Ready")
