"""Where the API server is and who we are: the service account of a pod, or the kubeconfig of a person."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.errors import MillraceError

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
# The kubelet renews a token at four fifths of its life, an hour at least.
_TOKEN_S = 60.0
_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Login:
    """How the API server is reached; `token` is the value of the header Authorization, and is never printed."""

    host: str
    namespace: str
    token: Callable[[], str] = field(repr=False)
    tls: dict[str, Any] = field(default_factory=dict, repr=False)
    proxy: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.host)
        if parts.scheme != "https" and parts.hostname not in _LOCAL:
            raise MillraceError(
                f"API server {self.host}: without TLS, what we send and who we are can be read on the way",
                "give its https:// address in the kubeconfig, or use `kubectl proxy` on this machine",
            )


def find(namespace: str = "") -> Login:
    """The login of this process: KUBECONFIG if it is set, else a pod's service account, else ~/.kube/config.

    Args:
        namespace: overrides the one of the context or of the pod.

    Raises:
        MillraceError: there is no cluster to talk to, or its certificate would not be checked.
    """
    if not os.environ.get("KUBECONFIG") and "KUBERNETES_SERVICE_HOST" in os.environ:
        return in_cluster(namespace)
    return kubeconfig(namespace)


def in_cluster(namespace: str = "", folder: Path = SERVICE_ACCOUNT) -> Login:
    """The login of a pod; its token is read again every minute, because the kubelet replaces it.

    Args:
        namespace: overrides the pod's own.
        folder: where the kubelet mounts token, namespace and ca.crt.

    Raises:
        MillraceError: no token is mounted.
    """
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    try:
        own = (folder / "namespace").read_text().strip()
        (folder / "token").read_bytes()
    except OSError as error:
        raise MillraceError(
            f"no service account in this pod: {error}",
            "set automountServiceAccountToken: true and serviceAccountName for the pod that launches",
        ) from None
    held = ("", 0.0)

    def token() -> str:
        nonlocal held
        if not held[0] or time.monotonic() - held[1] > _TOKEN_S:
            try:
                text = (folder / "token").read_text().strip()
            except OSError:
                if not held[0]:
                    raise
                return held[0]  # it is good for an hour, and the kubelet will have put the next one there by then
            held = (f"Bearer {text}", time.monotonic())
        return held[0]

    address = f"[{host}]" if ":" in host else host
    return Login(f"https://{address}:{port}", namespace or own, token, {"ca_certs": str(folder / "ca.crt")})


def kubeconfig(namespace: str = "") -> Login:
    """The login of the kubeconfig's current context, exec plugins and OIDC included.

    Args:
        namespace: overrides the context's own; without either it is `default`.

    Raises:
        MillraceError: there is no usable kubeconfig, or it says not to check the server's certificate.
    """
    # 68 MB: only for people's machines, never in a pod.
    from kubernetes import client, config

    path = os.environ.get("KUBECONFIG") or None
    settings = client.Configuration()
    try:
        config.load_kube_config(path, client_configuration=settings)
        context = config.list_kube_config_contexts(path)[1]["context"]
    except Exception as error:  # what a broken kubeconfig raises has no class in common
        raise MillraceError(f"no cluster: {error}", "set KUBECONFIG, or use `kubectl config use-context`") from None
    if not settings.verify_ssl:
        raise MillraceError(
            "the kubeconfig has insecure-skip-tls-verify: anybody on the way could take your token",
            "kubectl config set-cluster NAME --insecure-skip-tls-verify=false --certificate-authority=FILE",
        )
    tls = {"ca_certs": settings.ssl_ca_cert, "cert_file": settings.cert_file, "key_file": settings.key_file}
    name = getattr(settings, "tls_server_name", None)
    if name:
        tls |= {"server_hostname": name, "assert_hostname": name}
    return Login(
        settings.host,
        namespace or context.get("namespace") or "default",
        # The library's hook runs the exec plugin, or renews the OIDC token, once it has expired.
        lambda: settings.get_api_key_with_prefix("authorization") or "",
        {key: value for key, value in tls.items() if value},
        settings.proxy or "",
    )
