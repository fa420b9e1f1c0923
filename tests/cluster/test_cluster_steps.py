"""Steps of the compiled pipeline that launch, as pods on a real cluster: image, command, resources and user are those of the
package, the ExecutorInput is as Kubeflow's backend gives it, and the rights are those that docs/kubeflow.md gives it.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from components.launch import pods
from pipelines import compiler
from tests import kube
from tests.cluster.conftest import LAUNCHER, SMALL_DATA
from tests.kube import CLAIM, MOUNT, Volume, get, kubectl, wait_for
from trainer.config import Params
from trainer.config.load import load
from trainer.executor import SECTION

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]

RUN, ACCOUNT = "0d3c5f5e-1111-4222-8333-abcdefabcdef", "pipeline-runner"
ROOT = f"mlpipeline/v2/artifacts/millrace/{RUN}"
WORDS = [
    *SMALL_DATA, "train.epochs=2", "train.threads=1", "model.buckets=4096", "model.dim=16", "cluster.job.train=pytorchjob",
    "cluster.job.nodes=2", f"cluster.claim={CLAIM}", f"cluster.store={MOUNT}/runs", "cluster.resources.train.cpu=100m",
    "cluster.resources.train.memory=1Gi", "cluster.job.grace_s=2", f"cluster.image_prefix={kube.REGISTRY}",
]  # fmt: skip


class Steps:
    """Pods for the tasks of a package, with the mounts and variables that Kubeflow gives them."""

    def __init__(self, namespace: str, volume: Volume, words: list[str], empty: Path) -> None:
        self.namespace, self.volume = namespace, volume
        self.params: Params = load(None, [*WORDS, *words])
        self.spec, self.platform = compiler.package(self.params)
        volume.put(empty, "kfp")  # what Kubeflow mounts at /minio
        kubectl("-n", namespace, "create", "serviceaccount", ACCOUNT)
        subject = f"--serviceaccount={namespace}:{ACCOUNT}"
        kubectl("-n", namespace, "create", "rolebinding", "millrace-steps", f"--role={LAUNCHER}", subject)

    def start(self, name: str, values: dict[str, Any], inputs: dict[str, str]) -> None:
        """Start the pod of a task; `inputs` are paths of artifacts."""
        container = self.spec["deploymentSpec"]["executors"][f"exec-{name}"]["container"]
        placed = self.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{name}"]
        outputs = self.spec["components"][f"comp-{name}"].get("outputDefinitions", {}).get("artifacts", {})
        given = {
            "inputs": {
                "parameterValues": values,
                "artifacts": {port: {"artifacts": [{"name": "7", "uri": uri}]} for port, uri in inputs.items()},
            },
            "outputs": {
                "artifacts": {
                    port: {"artifacts": [{"name": port, "type": each["artifactType"], "uri": f"minio://{ROOT}/{name}/a1/{port}"}]}
                    for port, each in outputs.items()
                },
                "outputFile": f"/minio/{ROOT}/{name}/a1/output_metadata.json",
            },
        }  # fmt: skip
        asked = container["resources"]
        user = {key: int(value) for key, value in placed["securityContext"].items() if key != "runAsNonRoot"}
        mounts = [{"name": "claim", "mountPath": MOUNT}, {"name": "claim", "mountPath": "/minio", "subPath": "kfp"}]
        own = {"KFP_POD_NAME": "metadata.name", "KFP_POD_UID": "metadata.uid"}
        made = {
            "name": "main",
            "image": container["image"],
            "command": container["command"],
            "args": [word.replace("{{$}}", json.dumps(given)) for word in container["args"]],
            "env": [{"name": key, "valueFrom": {"fieldRef": {"fieldPath": path}}} for key, path in own.items()],
            "securityContext": pods.container_security() | user,
            "resources": {
                "requests": {"cpu": asked["resourceCpuRequest"], "memory": asked["resourceMemoryRequest"]},
                "limits": {"memory": asked["resourceMemoryLimit"]},
            },
            "volumeMounts": [*mounts, {"name": "tmp", "mountPath": "/tmp"}],
        }
        spec = {
            "serviceAccountName": ACCOUNT, "restartPolicy": "Never", "containers": [made],
            "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
            "volumes": [{"name": "claim", "persistentVolumeClaim": {"claimName": CLAIM}}, {"name": "tmp", "emptyDir": {}}],
        }  # fmt: skip
        meta = {"name": name, "namespace": self.namespace}
        kube.apply({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})

    def ended(self, name: str) -> str:
        """Wait for the end of a task's pod; gives its phase."""

        def phase() -> str:
            found = str(get(self.namespace, "pod", name)["status"].get("phase"))
            return found if found in ("Succeeded", "Failed") else ""

        return wait_for(f"the end of step {name}", phase, 200)

    def log(self, name: str) -> str:
        return kubectl("-n", self.namespace, "logs", name)

    def train(self, dataset: str, **values: str) -> None:
        """Start the task `train` with what `configure` and the package would give it."""
        tree = self.params.model_dump(mode="json")
        given = {SECTION.format(name): json.dumps(tree[name]) for name in ("task", "model", "train", "parallel")}
        compiled_in = json.dumps(self.params.cluster.model_dump(mode="json", exclude_defaults=True))
        given |= {
            "cluster_params": compiled_in,
            "nodes": "2",
            "gpus": "0",
            "store": self.params.cluster.store,
            **values,
        }
        self.start("train", given, {"dataset": dataset})

    def finish(self) -> None:
        """Run the task `finish` as after a cancel."""
        values = {"run_id": RUN, "run_name": "x", "store": self.params.cluster.store, "status": {"state": "RUNNING"}}
        self.start("finish", values, {})
        assert self.ended("finish") == "Succeeded", self.log("finish")

    def jobs(self) -> list[Any]:
        return list(get(self.namespace, "pytorchjobs"))


def test_a_step_trains_on_two_nodes_and_shows_what_the_stage_would(namespace, volume, dataset, tmp_path) -> None:
    steps = Steps(namespace, volume, [], tmp_path)
    steps.train(dataset)
    assert steps.ended("train") == "Succeeded", steps.log("train")
    (job,) = steps.jobs()
    assert job["metadata"]["labels"]["millrace.dev/run"] == RUN
    assert [owner["name"] for owner in job["metadata"]["ownerReferences"]] == ["train"]
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 2
    made = json.loads(volume.text(f"kfp/{ROOT}/train/a1/output_metadata.json"))["artifacts"]
    assert set(made) == {"model", "metrics", "summary"}
    assert made["metrics"]["artifacts"][0]["metadata"]
    reference = json.loads(volume.text(f"kfp/{ROOT}/train/a1/model/reference.json"))
    assert reference["uri"] == f"{MOUNT}/runs/{RUN}/train/a1/model"
    assert reference["digest"] == made["model"]["artifacts"][0]["metadata"]["digest"]
    assert "model.safetensors" in volume.files(f"runs/{RUN}/train/a1/model")
    steps.finish()
    assert [each["metadata"]["uid"] for each in steps.jobs()] == [job["metadata"]["uid"]], "kept for its logs"


def test_the_last_task_ends_what_still_runs_of_a_run(namespace, volume, dataset, tmp_path) -> None:
    # Kubeflow kills the step itself within a second; here it lives on, and sees that its job has gone.
    steps = Steps(namespace, volume, ["train.epochs=100000"], tmp_path)
    steps.train(dataset)
    wait_for("a job that trains", lambda: "loss" in steps.log("train") if steps.jobs() else False, 150)
    steps.finish()
    assert "had not ended, and was removed" in steps.log("finish")
    assert steps.jobs() == []
    assert not get(namespace, "pods", "-l", "millrace.dev/job")
    assert not volume.files(f"runs/{RUN}/train/a1")
    assert steps.ended("train") == "Failed"
    assert "error: " in steps.log("train")


def test_the_page_gives_the_steps_their_rights(namespace) -> None:
    """What docs/kubeflow.md shows, in a namespace of our own in place of Kubeflow's."""
    page = (kube.ROOT / "docs" / "kubeflow.md").read_text(encoding="utf-8")
    shown = [
        line for line in page.splitlines() if line.startswith(("sed 's/namespace: millrace$/", "kubectl -n kubeflow"))
    ]
    assert len(shown) == 2
    kube.kubectl("-n", namespace, "create", "serviceaccount", "pipeline-runner")
    who = f"--as=system:serviceaccount:{namespace}:pipeline-runner"
    asked = ("-n", namespace, "auth", "can-i", "create", "pytorchjobs.kubeflow.org", who)
    assert "no" in kube.kubectl(*asked, ok=False)
    for line in shown:
        command = ["bash", "-o", "pipefail", "-ec", line.replace("kubeflow", namespace)]
        done = subprocess.run(command, cwd=kube.ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
    kube.wait_for("the right", lambda: "yes" in kube.kubectl(*asked, ok=False), 20)
