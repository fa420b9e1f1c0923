"""The rights of components/launch/rbac.py in one namespace, for whoever is to have them.

python -m pipelines.rights --namespace NAME system:serviceaccount:NAME:ACCOUNT     # a service account, made if need be
python -m pipelines.rights --namespace NAME --role person anna                     # a user

Prints the objects for `kubectl apply -f -`; the namespace of manifests/ has them already.
"""

from __future__ import annotations

import argparse
import sys

from components.launch import rbac
from components.launch.api import Object
from pipelines import kube_yaml
from trainer.errors import EXIT_OK

ACCOUNT = "system:serviceaccount:"


def objects(role: str, who: str, namespace: str) -> list[Object]:
    """A Role of the namespace, its binding, and the service account if it is for one.

    Args:
        role: `rbac.LAUNCHER` or `rbac.PERSON`.
        who: a name as Kubernetes tells it: a user's, or system:serviceaccount:NAMESPACE:NAME.
        namespace: where the rights hold.
    """
    made: list[Object] = [rbac.manifest(role, namespace)]
    subject = {"kind": "User", "name": who}
    if who.startswith(ACCOUNT):
        place, _, account = who.removeprefix(ACCOUNT).partition(":")
        subject = {"kind": "ServiceAccount", "name": account, "namespace": place}
        made.append({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account, "namespace": place}})
    return [*made, rbac.binding(role, namespace, subject)]


def main(words: list[str]) -> int:
    """Print the objects."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.rights")
    parser.add_argument("--namespace", required=True, help="where the rights hold")
    parser.add_argument("--role", choices=(rbac.LAUNCHER, rbac.PERSON), default=rbac.LAUNCHER)
    parser.add_argument("who", help=f"a user, or {ACCOUNT}NAMESPACE:NAME")
    args = parser.parse_args(words)
    print(kube_yaml.documents(objects(args.role, args.who, args.namespace)), end="")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
