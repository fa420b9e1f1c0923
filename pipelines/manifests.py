"""The files of manifests/ that follow from the code: the rights of base/, and the samples, from samples/params.yaml.

python -m pipelines.manifests            # rewrite them (make golden)
python -m pipelines.manifests --check    # exit with 2 if one of them is not what the code makes
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from components.launch import chain, chain_job, names, rbac, spec
from pipelines import commands_render, kube_yaml
from pipelines.cli import build_parser
from pipelines.golden import settle
from trainer.config import Params
from trainer.config.load import load

FOLDER = Path("manifests")
SAMPLES = FOLDER / "samples"
PARAMS = SAMPLES / "params.yaml"
NAMESPACE = "millrace"
_MADE = "# Made by `python -m pipelines.manifests`"
# File -> what it shows, and the words after `millrace render` that print it in the folder of the samples.
RENDERED = {
    "data.yaml": ("The dataset that the others read: apply it first.", "job --stage preprocess --name sample-data"),
    "pytorchjob.yaml": (
        "Two pods train together: kubectl -n millrace logs -f sample-train-worker-0",
        "pytorchjob --name sample-train",
    ),
    "trainjob.yaml": (
        "The same for Kubeflow Trainer 2: a TrainJob, and the TrainingRuntime that it refers to.",
        "trainjob --name sample-trainjob --out model=/mnt/millrace/samples/trainjob/model",
    ),
    "experiment.yaml": (
        "A search of four trials, two at a time: kubectl -n millrace get experiment sample-tune -w",
        "experiment cluster.job.train=pod cluster.job.parallel_trials=2 cluster.job.priority_class=millrace-low"
        " --name sample-tune",
    ),
}


def render() -> dict[str, str]:
    """Path below manifests/ -> content."""
    made = {"base/rbac.yaml": rights(), "samples/cronjob.yaml": retraining()}
    return made | {f"samples/{name}": sample(*row) for name, row in RENDERED.items()}


def sample(text: str, words: str) -> str:
    """A sample as `millrace render` prints it, with the line that does."""
    line = f"render {words} --namespace {NAMESPACE}"
    args = build_parser().parse_args(shlex.split(line))
    objects = commands_render.objects(load(PARAMS, args.overrides), args, restricted=True)
    return f"# {text}\n{_MADE}. In this folder:\n# millrace {line}\n{kube_yaml.documents(objects)}"


def rights() -> str:
    """The roles and the launcher's binding, each right with its reason."""
    launcher = {"kind": "ServiceAccount", "name": rbac.ACCOUNT, "namespace": NAMESPACE}
    parts = [
        "# What starts and watches jobs.\n" + _role(rbac.LAUNCHER),
        kube_yaml.documents([rbac.binding(rbac.LAUNCHER, NAMESPACE, launcher)]),
        f"# For people: kubectl -n millrace create rolebinding team --role={rbac.NAMES[rbac.PERSON]} --group=YOUR-GROUP\n"
        + _role(rbac.PERSON),
        "# For `millrace doctor --cluster`, may be left out:\n"
        f"# kubectl create clusterrolebinding team-doctor --clusterrole={rbac.NAMES[rbac.DOCTOR]} --group=YOUR-GROUP\n"
        + _role(rbac.DOCTOR),
    ]
    return f"{_MADE}.\n" + "---\n".join(parts)


def _role(role: str) -> str:
    obj = rbac.manifest(role, NAMESPACE)
    rows = obj.pop("rules")
    lines = [kube_yaml.documents([obj]), "rules:\n"]
    for rule, row in zip(rbac.rules(role), rows, strict=True):
        lines.append(f"  # {rule.why}\n")
        lines += [f"  {mark} {key}: [{', '.join(map(repr, row[key]))}]\n" for mark, key in _KEYS]
    return "".join(lines)


_KEYS = (("-", "apiGroups"), (" ", "resources"), (" ", "verbs"))


def retraining() -> str:
    """The sample of a schedule without Kubeflow Pipelines."""
    text = (
        "# The whole chain every Monday at 03:00 UTC, where the data has changed: from raw data to a promoted model. At once:\n"
        "# kubectl -n millrace create job --from=cronjob/sample-retrain sample-retrain-1\n"
    )
    objects = schedule(load(PARAMS), PARAMS.read_text(encoding="utf-8"))
    return f"{text}{_MADE}.\n{kube_yaml.documents(objects)}"


def schedule(params: Params, text: str) -> list[dict[str, Any]]:
    """A CronJob whose Jobs are coordinators of engine kubernetes, and the ConfigMap that configures them.

    Args:
        params: the configuration.
        text: the same as a params.yaml.
    """
    name = "sample-retrain"
    job = chain_job.coordinator(params, name, NAMESPACE)
    template = job["spec"]["template"]
    container = template["spec"]["containers"][0]
    container["args"].append("--only-if-new")
    # A run has the name of its Job, and reads what the ConfigMap says when it starts.
    given = {"name": spec.PARAMS_ENV, "valueFrom": {"configMapKeyRef": {"name": name, "key": "params.yaml"}}}
    ours = (spec.PARAMS_ENV, chain.RUN_ENV, chain.UNTIL_ENV)
    container["env"] = [given, *(each for each in container["env"] if each["name"] not in ours)]
    for key in (names.RUN_LABEL, names.JOB_LABEL):
        template["metadata"]["labels"].pop(key, None)
    labels = {key: value for key, value in job["metadata"]["labels"].items() if key != names.RUN_LABEL}
    meta = {"name": name, "namespace": NAMESPACE, "labels": labels}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"params.yaml": text}}
    body = {
        "schedule": "0 3 * * 1",
        "timeZone": "Etc/UTC",
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": 3600,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {"metadata": {"labels": labels}, "spec": job["spec"]},
    }
    return [config, {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": meta, "spec": body}]


def main(words: list[str]) -> int:
    """Entry point of `python -m pipelines.manifests`."""
    return settle(render(), FOLDER, words, "manifests/ differs from what the code makes")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
