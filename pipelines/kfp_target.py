"""Which Kubeflow Pipelines server, and how to log in: flags, then the environment, then the pod that this runs in."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from trainer.errors import ConfigError

# Where the volume that kfp's ServiceAccountTokenVolumeCredentials reads is mounted by custom, and its variable.
_POD_TOKEN = "/var/run/secrets/kubeflow/pipelines/token"  # noqa: S105
_POD_TOKEN_ENV = "KF_PIPELINES_SA_TOKEN_PATH"  # noqa: S105
_IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
NO_HOST = (
    "set MILLRACE_KFP_HOST or give --host; without an address of its own: "
    "`kubectl -n kubeflow port-forward svc/ml-pipeline-ui 8080:80` and --host http://localhost:8080"
)
LOGIN = (
    "log in: put a token into MILLRACE_KFP_TOKEN or --token-file, "
    "or the browser's cookies into MILLRACE_KFP_COOKIES or --cookies-file"
)


@dataclass(frozen=True)
class Target:
    """Which server, and how to log in. Secrets are read anew for each request, for they expire; none is in `repr`.

    Attributes:
        host: address of the API or of the UI before it, with scheme and without a slash at its end.
        namespace: profile namespace of a multi-user installation; else empty.
        experiment: name under which runs are filed.
        ca_file: certificates that sign the server's; empty takes the public ones.
        token: gives the bearer token, or "".
        cookies: gives the Cookie header, or "".
    """

    host: str
    namespace: str = ""
    experiment: str = "millrace"
    ca_file: str = ""
    token: Callable[[], str] = field(default=str, repr=False)
    cookies: Callable[[], str] = field(default=str, repr=False)


def target(
    host: str = "",
    namespace: str = "",
    experiment: str = "",
    token_file: str = "",
    cookies_file: str = "",
    ca_file: str = "",
) -> Target:
    """What the flags, then the environment, then the pod that this runs in say.

    Raises:
        ConfigError: no host, a host with a password in it, or a file that cannot be read.
    """
    env = os.environ.get
    given = host or env("MILLRACE_KFP_HOST", "") or (_IN_CLUSTER if env("KUBERNETES_SERVICE_HOST") else "")
    token_path = token_file or ("" if env("MILLRACE_KFP_TOKEN") else env("MILLRACE_KFP_TOKEN_FILE", "") or _pod_token())
    if ca_file and not Path(ca_file).is_file():
        raise ConfigError(f"--ca-file {ca_file}: no such file", "name a file of PEM certificates")
    found = Target(
        host=_address(given),
        namespace=namespace or env("MILLRACE_KFP_NAMESPACE", ""),
        experiment=experiment or env("MILLRACE_KFP_EXPERIMENT", "") or "millrace",
        ca_file=ca_file,
        token=lambda: _secret(token_path, "MILLRACE_KFP_TOKEN"),
        cookies=lambda: _secret(cookies_file, "MILLRACE_KFP_COOKIES"),
    )
    found.token()
    found.cookies()
    return found


def _pod_token() -> str:
    path = os.environ.get(_POD_TOKEN_ENV, _POD_TOKEN)
    return path if Path(path).is_file() else ""


def _secret(path: str, name: str) -> str:
    """The file's text, else the environment variable's; never part of a message."""
    where = path or name
    try:
        text = (Path(path).read_text(encoding="utf-8") if path else os.environ.get(name, "")).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {type(error).__name__}", "name a readable text file") from None
    if not text.isascii() or not text.isprintable():
        raise ConfigError(f"{where}: is not one line of plain characters", "it must hold the token or cookies alone")
    return text.removeprefix("Bearer ").strip()


def _address(host: str) -> str:
    """The host as requests need it, from what people paste, such as the address of a page of the UI."""
    if not host:
        raise ConfigError("no Kubeflow Pipelines host", NO_HOST)
    try:
        parts = urlsplit(host)
        bad = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
    except ValueError:
        bad = True
    if bad:
        # `localhost:8080` reads as a scheme and a path.
        likely = f"http://{host}" if re.fullmatch(r"[\w.-]+:\d+", host) else "http://localhost:8080"
        raise ConfigError(
            f"host {host}: is not an address", f"such as {likely} or https://kubeflow.example.com/pipeline"
        )
    if "@" in parts.netloc:
        raise ConfigError(f"--host {host}: holds a user or password", LOGIN)
    path = parts.path.rstrip("/").removesuffix("/apis/v2beta1").removesuffix("/apis").rstrip("/")
    # The dashboard's frame `/_/pipeline` is a page; what it frames, and its API, are below `/pipeline`.
    return f"{parts.scheme}://{parts.netloc}{path.replace('/_/pipeline', '/pipeline')}"
