"""Katib's configuration, and how it must be for namespaces that enforce the policy "restricted".

python -m pipelines.katib_config [--namespace kubeflow]     # prints the ConfigMap, mended, for kubectl apply -f -

As Katib 0.19 ships it, the pods that suggest values, stop trials early and collect metrics have no security context.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from typing import Any

import yaml

from components.launch.api import Api, Object
from trainer.errors import EXIT_OK

CONFIG_MAP = "katib-config"
KEY = "katib-config.yaml"
# Katib's images have no user of their own.
USER = 1000


def settings(config_map: Object) -> dict[str, Any]:
    """What a ConfigMap of Katib says.

    Raises:
        KeyError: it is none.
        TypeError: likewise.
        yaml.YAMLError: it cannot be read.
    """
    found = yaml.safe_load(config_map["data"][KEY])
    if not isinstance(found, dict):
        raise TypeError("no mapping")
    return found


def context() -> dict[str, Any]:
    """The security context that passes the policy."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def open_algorithms(config: dict[str, Any], used: Collection[str] = ()) -> list[str]:
    """Algorithms whose pods the policy refuses.

    Args:
        config: what `settings` found.
        used: which ones count; empty takes all.
    """
    # Not of early stopping: Katib 0.19 reads no context for its container.
    listed = (config.get("runtime") or {}).get("suggestions") or []
    return [
        str(each.get("algorithmName"))
        for each in listed
        if (not used or each.get("algorithmName") in used) and not _passes(each.get("securityContext") or {})
    ]


def _passes(given: dict[str, Any]) -> bool:
    return (
        bool(given.get("runAsNonRoot"))
        and given.get("allowPrivilegeEscalation") is False
        and "ALL" in ((given.get("capabilities") or {}).get("drop") or [])
        and (given.get("seccompProfile") or {}).get("type") in ("RuntimeDefault", "Localhost")
    )


def mended(config_map: Object) -> Object:
    """The ConfigMap with what the policy demands, and nothing else changed.

    Raises:
        KeyError: it is none of Katib.
        TypeError: likewise.
        yaml.YAMLError: it cannot be read.
    """
    config = settings(config_map)
    config.setdefault("init", {}).setdefault("controller", {})["injectSecurityContext"] = True
    for each in (config.get("runtime") or {}).get("suggestions") or []:
        if not _passes(each.get("securityContext") or {}):
            each["securityContext"] = {**(each.get("securityContext") or {}), **context()}
    meta = {
        key: config_map["metadata"][key] for key in ("name", "namespace", "labels") if key in config_map["metadata"]
    }
    data = {**config_map["data"], KEY: yaml.safe_dump(config, sort_keys=False)}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}


def main(words: list[str]) -> int:
    """Print the mended ConfigMap of the cluster."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.katib_config", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--namespace", default="kubeflow", help="where Katib is installed (default: kubeflow)")
    args = parser.parse_args(words)
    found = Api.connect().get("ConfigMap", CONFIG_MAP, namespace=args.namespace, within_s=10)
    print(yaml.safe_dump(mended(found), sort_keys=False), end="")
    return EXIT_OK


if __name__ == "__main__":
    from trainer.__main__ import exit_status

    sys.exit(exit_status(lambda: main(sys.argv[1:])))
