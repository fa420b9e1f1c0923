"""What the containers of a run are given: images, a user, folders, the network, the environment, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import docker_runner, dvcfile
from pipelines.dvcfile import OUT
from trainer import storage
from trainer.config import Params
from trainer.errors import MillraceError

if TYPE_CHECKING:
    from docker import DockerClient

TMPFS = "rw,exec,nosuid,nodev,mode=1777"
# What a stage computes with: it is passed on, so that a run has as many threads here as on the laptop.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def pin_images(client: DockerClient, spec: dict[str, Any]) -> dict[str, str]:
    """Write into a pipeline spec the names by which the engine has its images; nothing is pulled.

    Returns the id of each: an image that is built again meanwhile is not what a run goes on with.

    Raises:
        MillraceError: an image is not there.
    """
    containers = [each["container"] for each in spec["deploymentSpec"]["executors"].values() if "container" in each]
    known = {
        tag: str(image.id)
        for image in client.images.list()
        for tag in (*image.tags, *(image.attrs.get("RepoDigests") or ()))
    }
    names = {each["image"]: _known_as(each["image"], known) for each in containers}
    if missing := sorted(name for name, found in names.items() if not found):
        raise MillraceError(f"no such image here: {', '.join(missing)}", "build them: `make images`, or pull them")
    for each in containers:
        each["image"] = names[each["image"]]
    return {name: known[name] for name in names.values()}


def _known_as(name: str, known: Container[str]) -> str:
    """The name of an image as Docker (short) or podman (with its registry) lists it; empty if it is not there."""
    name = name if ":" in name.rpartition("/")[2] or "@" in name else f"{name}:latest"
    short = name.removeprefix("docker.io/").removeprefix("library/")
    forms = (name, short, f"localhost/{short}", f"docker.io/{short}", f"docker.io/library/{short}")
    return next((form for form in forms if form in known), "")


@contextmanager
def options(client: DockerClient, params: Params, folder: Path) -> Iterator[dict[str, Any]]:
    """What every container of a run is created with; meanwhile the folders it writes to belong to its user.

    Args:
        client: the engine.
        params: the project's configuration.
        folder: the run's folder.
    """
    uid, gid = _user(client, params)
    tasks = folder.absolute() / "tasks"
    tasks.mkdir()
    written = [tasks, *_registry(params)]
    # Paths are the same inside: data.source is the same text, and so the digests are the same, as on the laptop.
    volumes = {str(path): {"bind": str(path), "mode": "ro"} for path in read_paths(params)}
    volumes |= {str(path): {"bind": str(path), "mode": "rw"} for path in written}
    if bad := [path for path in volumes if ":" in path]:
        raise MillraceError(f"{bad[0]}: a path with a colon cannot be given to a container", "rename or move it")
    environment = {"HOME": "/tmp", "TMPDIR": "/tmp", "PYTHONUNBUFFERED": "1"}  # noqa: S108
    environment |= {name: os.environ[name] for name in (*_THREADS, *params.cluster.secrets) if name in os.environ}
    found = {
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "user": f"{uid}:{gid}",
        "tmpfs": {"/tmp": TMPFS},  # noqa: S108
        "shm_size": params.cluster.shm.removesuffix("i"),
        "init": False,  # the entry point is PID 1 and takes SIGTERM itself
        "working_dir": str(Path.cwd()),
        "environment": environment,
        "labels": {docker_runner.RUN_LABEL: folder.name, docker_runner.OWNER_LABEL: docker_runner.owner()},
        "volumes": volumes,
    }
    if not _needs_network(params):
        found["network_mode"] = "none"
    with _given(written, uid, gid):
        yield found


def _user(client: DockerClient, params: Params) -> tuple[int, int]:
    """User and group of the containers: whoever may write this person's files.

    An engine without root maps its own root to the person that it runs for; root lends the folders to `cluster.user`.
    """
    info = client.info()
    if info.get("Rootless") or any("rootless" in option for option in info.get("SecurityOptions") or ()):
        return 0, 0
    if os.getuid() == 0:
        return params.cluster.user, params.cluster.user
    return os.getuid(), os.getgid()


@contextmanager
def _given(folders: list[Path], uid: int, gid: int) -> Iterator[None]:
    """Root's own folders belong to the containers' user while they run, and to their owner again after it."""
    if os.getuid() != 0 or uid == 0:
        yield
        return
    owners = {folder: folder.parent.stat() for folder in folders}
    for folder in folders:
        _own(folder, uid, gid)
    try:
        yield
    finally:
        for folder, owner in owners.items():
            _own(folder, owner.st_uid, owner.st_gid)


def _own(folder: Path, uid: int, gid: int) -> None:
    os.chown(folder, uid, gid)
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.chown(Path(root) / name, uid, gid, follow_symlinks=False)


def _registry(params: Params) -> list[Path]:
    """The folder of the registry, made if it is not there; none if it is elsewhere."""
    uri = params.promote.registry
    if storage.is_remote(uri):
        return []
    path = storage.local_path(uri).absolute()
    with storage.explained(path):
        path.mkdir(parents=True, exist_ok=True)
    return [path]


def read_paths(params: Params) -> list[Path]:
    """Local files and folders that stages read besides their inputs: those that dvc.yaml has as dependencies."""
    stages = dvcfile.build(params)["stages"].values()
    names = {name for stage in stages for name in stage.get("deps", ()) if not name.startswith(f"{OUT}/")}
    repository, _, _ = _dvc_parts(params.data.source)
    if repository and not storage.is_remote(repository):
        names.add(str(storage.local_path(repository)))
    return sorted(Path(os.path.normpath(Path(name).absolute())) for name in names)


def _dvc_parts(source: str) -> tuple[str, str, str]:
    if not source.startswith("dvc:"):
        return "", "", ""
    from trainer.data.dvc_source import parse_dvc

    return parse_dvc(source)


def _needs_network(params: Params) -> bool:
    """Whether a stage reads or writes anything that is not on this machine; whoever is given a secret does."""
    uris = (params.data.source, params.data.tokenizer.path, params.promote.registry, *dvcfile.teachers(params))
    return any(map(storage.is_remote, uris)) or params.data.source.startswith("dvc:") or bool(params.cluster.secrets)


def secret_values(params: Params) -> list[str]:
    """Values of the secrets, longest first, to be kept out of logs; what is shorter than 4 characters is no secret."""
    values = {os.environ.get(name, "") for name in params.cluster.secrets}
    return sorted((value for value in values if len(value) >= 4), key=len, reverse=True)
