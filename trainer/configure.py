"""The first task of a pipeline run: check what the run form says, find the data's version, and what there is to do.

python -m trainer configure --executor-input '{{$}}'

Nothing downstream is run with a wrong parameter: all of them are checked here, in a second, before a large image is
pulled. Each section of the configuration becomes an output parameter of its own, so that a stage is run again only if
what it reads has changed. Parameters: those of the run form (components/build.py), and section `cluster` as it was
compiled in.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import executor, log, presets, storage
from trainer.config import Params
from trainer.config.cluster import Cluster
from trainer.config.load import apply_overrides, parse_override, validate
from trainer.config.text import parse_yaml
from trainer.config.words import split_words
from trainer.data.naming import model_name
from trainer.errors import EXIT_OK, ConfigError, redact
from trainer.registry import Registry
from trainer.views.markdown import code, prose, table

# How the line begins that says so: a coordinator without Kubeflow reads it.
NOTHING_NEW = "nothing new"
_SSH_USER = re.compile(r"(?<=ssh://)[\w.-]+@")


@dataclass(frozen=True)
class Plan:
    """What a run is to do.

    Attributes:
        params: the checked configuration; section `cluster` is the one that was compiled in.
        nodes: pods that train together.
        data_version: DVC's md5 of the raw data.
        champion: version and data version of the model that is to be beaten; empty if there is none.
        proceed: whether there is anything to do.
        warnings: what a person should know.
    """

    params: Params
    nodes: int
    data_version: str
    champion: tuple[str, str]
    proceed: bool
    warnings: tuple[str, ...] = ()


def run(text: str, overrides: Sequence[str]) -> int:
    """Plan the run as an ExecutorInput says and write the executor output; returns the exit status.

    Raises:
        ConfigError: a parameter is wrong.
        DataError: there is no such data.
    """
    given = executor.read(text)
    plan = make(given.values, overrides)
    params = plan.params
    tree = params.model_dump(mode="json", exclude={"cluster"})
    values: dict[str, str] = {
        executor.SECTION.format(section): json.dumps(content, sort_keys=True, ensure_ascii=False)
        for section, content in tree.items()
    }
    gpus = _count(given.values, "gpus_per_node", 0)
    # Search in its own pod and distillation train in one process, which sees one accelerator; others would be held for
    # nothing. The trials of an Experiment train as `train` does.
    searching = gpus if params.cluster.job.tune == "experiment" else min(gpus, 1)
    asked = {
        "tune": searching if params.tune.enabled else 0,
        "train": gpus,
        "distill": min(gpus, 1) if params.distill.enabled else 0,
    }
    values |= {f"{name}_gpus": str(count) for name, count in asked.items()}
    values |= {"train_nodes": str(plan.nodes), "data_version": plan.data_version, "proceed": str(plan.proceed).lower()}
    metadata: dict[str, dict[str, Any]] = {}
    if "summary" in given.outputs:
        target = Path(executor.local_artifact(given.outputs["summary"]["uri"]))
        storage.write_atomic(target, summary(plan, given.values).encode())
        metadata["summary"] = {}
    executor.write(given, metadata, values)
    for warning in plan.warnings:
        log.say(f"configure: {warning}")
    log.say(f"configure: data version {plan.data_version}")
    if not plan.proceed:
        log.say(f"configure: {NOTHING_NEW}: champion {plan.champion[0]} was trained on this version of the data")
    return EXIT_OK


def make(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Plan:
    """Plan a run from the values of the run form; `overrides` come last.

    Raises:
        ConfigError: a parameter is wrong.
        DataError: there is no such data.
    """
    warnings: list[str] = []
    params = resolve(values, overrides)
    store = executor.store_of(values)
    refuse_secrets({**places(params), "store": store})
    cluster = _compiled(values)
    said = params.cluster != Cluster() or any(word.startswith("cluster.") for word in _words(values, overrides))
    if said and params.cluster != cluster:
        warnings.append("cluster: what the run form says of it is not used: the pipeline was compiled with its own")
    params = params.model_copy(update={"cluster": cluster})
    nodes = _nodes(values, cluster)
    _check_store(store, params)
    registry = params.promote.registry
    if not storage.is_remote(registry) and not _is_kept(storage.local_path(registry)):
        # A folder of the container: gone with it. A run without a registry is a run all the same.
        place = f"{store}/registry" if store else str(Path(tempfile.gettempdir()) / "registry")
        params = validate(apply_overrides(params.model_dump(mode="json"), {"promote.registry": place}), "parameters")
        if not store:
            warnings.append(
                "no registry was given, so the candidate is compared with the baseline only and no champion is kept; "
                "set the pipeline input registry to a URI or a mounted path"
            )
    version = data_version(params)
    champion = _champion(params)
    same = bool(champion[1]) and champion[1] == version
    proceed = not (same and bool(values.get("only_if_new")))
    return Plan(params, nodes, version, champion, proceed, tuple(warnings))


def _is_kept(registry: Path) -> bool:
    return registry.is_absolute() or os.path.isdir(registry)  # noqa: PTH112 - of a name that is too long it says no


def places(params: Params) -> dict[str, str]:
    """Key -> URI of what a configuration reads and writes."""
    return {"data.source": params.data.source, "promote.registry": params.promote.registry}


def refuse_secrets(uris: Mapping[str, str]) -> None:
    """Refuse what Kubeflow would keep and show to all: parameters are no place for secrets.

    Raises:
        ConfigError: a URI holds credentials; the message names its key.
    """
    for name, uri in uris.items():
        known = _SSH_USER.sub("", uri)  # a name is no secret
        if redact(known) != known:
            raise ConfigError(
                f"{name}: {redact(uri)}: holds a password, key, token or signature, and Kubeflow keeps and shows parameters",
                "put it into a Kubernetes secret, and name that in cluster.secrets, for example for AWS_ACCESS_KEY_ID",
            )


def _check_store(store: str, params: Params) -> None:
    """Refuse now what would fail later, in another pod.

    Raises:
        ConfigError: the store is no place that all pods see; or there is none, and a job of the cluster needs one.
        StorageError: there is no driver for it, or no right to read it.
    """
    if store and not storage.is_remote(store) and not storage.local_path(store).is_absolute():
        raise ConfigError(f"parameter store: {store}: a folder of one pod", "pass a URI or a mounted path, from / on")
    require_store("parameter store", store, params)
    if store:
        storage.exists(store)


def require_store(key: str, store: str, params: Params) -> None:
    """See that the pods of what is launched have a place where they read and write.

    Args:
        key: what to call the store in an error.
        store: URI or path; empty for none.
        params: the configuration, with the section `cluster` that is compiled in.

    Raises:
        ConfigError: they have none.
    """
    cluster = params.cluster
    if not (jobs := cluster.job.launched) or is_shared(store, cluster):
        return
    what = f"{redact(store)}: not in the volume of cluster.claim" if store else "none is given"
    because = " and ".join(f"cluster.job.{name}={getattr(cluster.job, name)}" for name in jobs)
    raise ConfigError(
        f"{key}: {what}, and with {because} the pods of a job read and write there",
        "pass a URI such as s3://bucket/runs, or compile with cluster.claim=CLAIM and pass a path in that volume, "
        f"such as {cluster.mount}/runs",
    )


def is_shared(uri: str, cluster: Cluster) -> bool:
    """Whether every pod sees what a URI names: it is remote, or in the volume that all mount."""
    if storage.is_remote(uri):
        return True
    return bool(uri and cluster.claim) and Path(os.path.normpath(storage.local_path(uri))).is_relative_to(cluster.mount)


def resolve(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Params:
    """The configuration that the run form asks for.

    Raises:
        ConfigError: a parameter is wrong; the message names it.
    """
    text, preset, source, registry = (
        str(values.get(name) or "").strip() for name in ("params", "preset", "data", "registry")
    )
    if preset and text:
        raise ConfigError("parameters preset and params: both are given", "clear the one that is not to be used")
    preset = preset or presets.DEFAULT
    where = "parameter params" if text else f"preset {preset}"
    tree = parse_yaml(text or presets.text(preset), where)
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: must be a mapping of sections", "pass the text of a params.yaml")
    words = _words(values, overrides)
    named = {key for key, _ in map(parse_override, words)}
    changes: dict[str, Any] = {}
    if source:
        changes["data.source"] = source
        before = tree.get("data")
        if not isinstance(before, dict) or source != before.get("source"):
            changes["promote.model"] = model_name(source)
    if registry:
        changes["promote.registry"] = registry
    if trials := _count(values, "trials", 0):
        changes["tune.trials"] = trials
    if (gpus := _count(values, "gpus_per_node", 0)) > 1:
        changes["train.processes"] = gpus
    tree = apply_overrides(tree, {key: value for key, value in changes.items() if key not in named})
    return validate(apply_overrides(tree, words), where)


def _words(values: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    return [*split_words(values.get("overrides") or []), *overrides]


def _compiled(values: Mapping[str, Any]) -> Cluster:
    """Section `cluster` of the configuration with which the pipeline was compiled."""
    where = f"parameter {executor.SECTION.format('cluster')}"
    return validate({"cluster": parse_yaml(str(values.get("cluster_params") or "{}"), where)}, where).cluster


def _nodes(values: Mapping[str, Any], cluster: Cluster) -> int:
    """How many pods train together.

    Raises:
        ConfigError: more than the pipeline was compiled for.
    """
    nodes = _count(values, "nodes", 1)
    if nodes > 1 and cluster.job.train == "pod":
        raise ConfigError(
            f"parameter nodes: {nodes}: this pipeline trains in the pod of its step",
            "compile with cluster.job.train=pytorchjob, or set nodes to 1",
        )
    return nodes


def _count(values: Mapping[str, Any], name: str, least: int) -> int:
    """A whole number of the run form, which may come as a float."""
    value = values.get(name)
    if value is None:
        return least
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value % 1 != 0 or value < least:
        raise ConfigError(
            f"parameter {name}: must be a whole number from {least} (given {value!r})", "correct the run form"
        )
    return int(value)


def data_version(params: Params) -> str:
    """The version of the raw data, without a copy of it where it is far away.

    Raises:
        DataError: there is no such data.
    """
    from trainer.data.sources import version

    with tempfile.TemporaryDirectory(prefix="millrace-") as work:
        return version(params.data.source, params.data.format, Path(work))


def _champion(params: Params) -> tuple[str, str]:
    registry = Registry(params.promote.registry)
    champion = registry.champion(params.promote.model)
    if champion is None:
        return "", ""
    return champion.version, registry.version(params.promote.model, champion.version).data_version


def _where(plan: Plan) -> str:
    job, processes = plan.params.cluster.job, plan.params.train.processes
    each = f"{processes} process{'es' * (processes > 1)}"
    return f"the step's pod, {each}" if job.train == "pod" else f"a {code(job.train)}, {plan.nodes} x {each}"


def summary(plan: Plan, values: Mapping[str, Any]) -> str:
    """A page of Markdown on what the run is to do."""
    params = plan.params
    rows = [
        ("data", code(params.data.source)),
        ("data version", code(plan.data_version)),
        ("task", code(params.task.name)),
        ("model", code(params.model.name)),
        ("search", f"{params.tune.trials} trials over {len(params.tune.space)} parameters" if params.tune.enabled else "off"),
        ("trains in", _where(plan)),
        ("student", code(params.distill.student.name) if params.distill.enabled else "off"),
        ("int8", "on" if params.quantize.enabled else "off"),
        ("registry", code(params.promote.registry)),
        ("champion", code(plan.champion[0]) if plan.champion[0] else "none"),
        ("store", code(values.get("store") or "KFP's own")),
    ]  # fmt: skip
    slot = str(values.get("scheduled_at") or "")
    if slot and "{{" not in slot:  # hosts before 2.16 leave the placeholder as it is
        rows.append(("scheduled at", code(slot)))
    lines = ["# configure", "", "Every parameter was checked.", "", table(("", ""), rows)]
    if not plan.proceed:
        lines += ["", "**Nothing new:** the champion was trained on this version of the data. The run ends here."]
    lines += [line for warning in plan.warnings for line in ("", f"> **Note:** {prose(warning, 600)}")]
    return "\n".join(lines) + "\n"
