"""A stage as a job of the cluster, asked for with the words of the trainer's own command line: `train` with its inputs
and outputs by URI.

The job's name is that of its output, and its pods carry the digests of its inputs: the same call finds its job again, and
never takes the result of other inputs for its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from components.launch import apart, experiments, launcher, pytorchjob, spec, submit, trainjob, validate
from components.launch.api import Api, Object
from components.launch.asked import INPUTS_ANNOTATION, Asked, inputs_value, name_of
from components.launch.launcher import JobFailed, Outcome
from components.launch.logs import Out, say
from components.launch.spec import PARAMS_ENV, JobSpec
from trainer import storage
from trainer.configure import is_shared
from trainer.errors import ConfigError, StorageError
from trainer.stage import STAGES


def run(
    api: Api,
    asked: Asked,
    *,
    out: Out = say,
    detach: bool = False,
) -> Outcome:
    """Run a stage as a job, to its end.

    Args:
        api: the API server.
        asked: the stage.
        out: takes each line.
        detach: leave the job running when a signal ends the launcher.

    Raises:
        ConfigError: an input or output cannot be reached by other pods, or the cluster would refuse the job.
        Stopped: a signal came.
    """
    check(asked)
    digests = {port: digest_of(uri) for port, uri in sorted(asked.inputs.items())}
    if asked.stage == "tune":
        return experiments.run(api, asked, digests, out=out, detach=detach)
    job, manifest = training(asked, api.namespace, digests)
    validate.check_apart(manifest, restricted=submit.enforces_restricted(api))
    outcome = launcher.run(api, job, manifest, out=out, detach=detach)
    if outcome.ok:
        try:
            verify(asked)
        except JobFailed:
            submit.remove(api, job, manifest, out=out)  # or the next call would find its success again
            raise
    return outcome


def training(asked: Asked, namespace: str, digests: Mapping[str, str]) -> tuple[JobSpec, list[Object]]:
    """The job that trains, and its objects."""
    kind = asked.params.cluster.job.train
    job = spec.training(
        asked.params, name=name_of(asked), namespace=namespace, args=words(asked), gpus=asked.gpus, nodes=asked.nodes,
        owner=asked.owner, run=asked.run,
    )  # fmt: skip
    job = replace(job, annotations={**job.annotations, INPUTS_ANNOTATION: inputs_value(digests)})
    return job, trainjob.trainjob(job) if kind == "trainjob" else [pytorchjob.pytorchjob(job)]


def words(asked: Asked) -> list[str]:
    """Words after `python -m trainer` in the pods of the job."""
    found = [asked.stage, "--params", f"env:{PARAMS_ENV}"]
    for flag, ports in (("--in", asked.inputs), ("--out", asked.outputs)):
        for port, uri in ports.items():
            found += [flag, f"{port}={uri}"]
    nodes = asked.nodes or asked.params.cluster.job.nodes
    return found + spec.checkpoints(asked.params, name_of(asked), next(iter(asked.outputs.values())), nodes)


def check(asked: Asked) -> None:
    """Refuse inputs and outputs that are missing, or that other pods cannot reach.

    Raises:
        ConfigError: names the input or output, and the key or pipeline input that mends it.
    """
    stage = STAGES[asked.stage]
    for port, row in (*stage.inputs.items(), *stage.outputs.items()):
        if port not in asked.inputs and port not in asked.outputs and not row.optional:
            flag = "--in" if port in stage.inputs else "--out"
            raise ConfigError(f"{asked.stage}: {flag} {port}=URI is missing ({row.help})", f"add {flag} {port}=URI")
    cluster = asked.params.cluster
    for port, uri in (*asked.inputs.items(), *asked.outputs.items()):
        if not is_shared(uri, cluster):
            raise ConfigError(
                f"{asked.stage}: {port} is at {uri}, which the pods of a job cannot reach (pipeline input `store`)",
                "set store, or cluster.store, to a URI such as s3://bucket/runs, or to a path below cluster.mount "
                f"({cluster.mount}) and name a PersistentVolumeClaim in cluster.claim",
            )
        if asked.stage == "tune" and not storage.is_remote(uri) and not Path(cluster.mount).is_dir():
            # What Katib has found is written from here, hours later.
            raise ConfigError(
                f"tune: {port} is at {uri}, and the claim {cluster.claim} is not mounted here, where its result is written",
                "run it in the cluster (`millrace run --engine kubernetes`), or set cluster.store to an object store",
            )


def digest_of(uri: str) -> str:
    """Digest of an artifact; empty where the launcher itself does not mount the claim."""
    if not storage.is_remote(uri):
        return read_digest(uri) if storage.exists(f"{uri}/{storage.MANIFEST}") else ""
    return str(apart.call("components.launch.stages:read_digest", uri))


def read_digest(uri: str) -> str:
    """Digest of the artifact at a URI, from its manifest.

    Raises:
        StorageError: there is none, or it cannot be read.
    """
    try:
        return str(json.loads(storage.read_bytes(f"{uri}/{storage.MANIFEST}"))["digest"])
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{uri}: its {storage.MANIFEST} is none", "run the stage that makes it again") from None


def verify(asked: Asked) -> None:
    """Refuse a success that left nothing.

    Raises:
        JobFailed: an output is not there, or not complete.
    """
    for port, uri in asked.outputs.items():
        if not storage.is_remote(uri) and not storage.exists(str(PurePosixPath(uri).parent)):
            continue  # on a claim that is not mounted here
        try:
            digest = digest_of(uri)
        except StorageError as error:
            digest, reason = "", error.message
        else:
            reason = f"{uri}: not a complete artifact"
        if not digest:
            message = f"{asked.stage}: the job succeeded, but left no {port}: {reason}"
            raise JobFailed(message, "do all pods reach the same place? see cluster.store and cluster.claim", 1)
