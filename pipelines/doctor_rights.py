"""`millrace doctor --cluster`: may we, and may the launcher's service account, do all that millrace does?

The rights are those of components/launch/rbac.py, and the cluster is asked about each verb on its own, as any of them
may come from another role.
"""

from __future__ import annotations

import hashlib
import shlex
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from components.launch import rbac
from components.launch.api import Api, ApiError, Object
from components.launch.rbac import Rule
from pipelines.doctor_look import PATIENCE_S, Look
from pipelines.rights import ACCOUNT

_REVIEWS = "authorization.k8s.io/v1"


def whoami(api: Api) -> str:
    """Our name at the cluster; empty if it is too old to say (before 1.28).

    Raises:
        ApiError: the cluster does not answer.
    """
    asking = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    try:
        found = api.create(asking, within_s=PATIENCE_S)
    except ApiError as error:
        if error.status not in (403, 404):
            raise
        return ""
    return str(found.get("status", {}).get("userInfo", {}).get("username", ""))


def check(look: Look, account: str = "") -> None:
    """What is missing: in our own rights, and, where a person asks, in those of the launcher's service account.

    Args:
        look: gets the findings.
        account: service account that launches; empty takes the one of manifests/.

    Raises:
        ApiError: the cluster does not answer.
    """
    me = whoami(look.api)
    look.facts["user"] = me or "unknown"
    if me.startswith(ACCOUNT) and not account:
        _lacks(look, rbac.LAUNCHER, me, _missing(look, rbac.LAUNCHER, ""), urgent=True)
        return
    # Where nothing is launched, only engine kubernetes needs these rights: Kubeflow Pipelines has its own.
    urgent = bool(look.params.cluster.job.launched or account)
    _lacks(look, rbac.PERSON, me or "you", _missing(look, rbac.PERSON, ""), urgent)
    other = f"{ACCOUNT}{look.namespace}:{account or rbac.ACCOUNT}"
    try:
        missing = _missing(look, rbac.LAUNCHER, other)
    except ApiError as error:
        if error.status != 403:
            raise
        look.unseen.append("create localsubjectaccessreviews.authorization.k8s.io")
        return
    _lacks(look, rbac.LAUNCHER, other, missing, urgent)


def _missing(look: Look, role: str, account: str) -> list[tuple[Rule, str]]:
    """Verbs that are not allowed; of a service account if one is named, else to us."""
    wanted = list(rbac.single(role, look.lacking))
    with ThreadPoolExecutor(8) as threads:
        allowed = list(threads.map(lambda each: _allowed(look, each[0], each[1], account), wanted))
    return [each for each, good in zip(wanted, allowed, strict=True) if not good]


def _allowed(look: Look, rule: Rule, verb: str, account: str) -> bool:
    resource, _, part = rule.resource.partition("/")
    where = {"namespace": look.namespace, "verb": verb, "group": rule.group, "resource": resource, "subresource": part}
    review: Object = {"apiVersion": _REVIEWS, "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": where}}
    if account:
        place = account.split(":")[2]
        groups = ["system:serviceaccounts", f"system:serviceaccounts:{place}", "system:authenticated"]
        review["kind"] = "LocalSubjectAccessReview"
        review["metadata"] = {"namespace": look.namespace}
        review["spec"] |= {"user": account, "groups": groups}
    found = look.api.create(review, namespace=look.namespace, within_s=PATIENCE_S)
    return bool(found.get("status", {}).get("allowed"))


def _lacks(look: Look, role: str, who: str, missing: list[tuple[Rule, str]], urgent: bool) -> None:
    """One finding for all resources that lack the same verbs, so that one command gives them."""
    say = look.finding if urgent else look.note
    wanted = len(list(rbac.single(role, look.lacking)))
    look.facts.setdefault("rights", {})[who] = {"role": role, "of": wanted, "missing": len(missing)}
    if len(missing) == wanted:
        say(
            f"{who} has no rights in namespace {look.namespace}, or does not exist",
            "it starts jobs, watches them and cleans up"
            if role == rbac.LAUNCHER
            else "runs cannot be started or looked at",
            f"kubectl apply -k an overlay of manifests/, whose namespace is millrace; for this one: {_whole(look, role, who)}",
        )
        return
    verbs: dict[Rule, tuple[str, ...]] = {}
    for rule, verb in missing:
        verbs[rule] = (*verbs.get(rule, ()), verb)
    alike: dict[tuple[str, ...], list[Rule]] = defaultdict(list)
    for rule, lacking in verbs.items():
        alike[lacking].append(rule)
    for lacking, rules in alike.items():
        words = [f"{rule.resource}.{rule.group}" if rule.group else rule.resource for rule in rules]
        say(
            f"{who} may not {', '.join(lacking)} {', '.join(words)} in namespace {look.namespace}",
            "; ".join(dict.fromkeys(rule.why for rule in rules)),
            grant(look.namespace, who, lacking, words),
        )


def _whole(look: Look, role: str, who: str) -> str:
    """The command that gives a whole role, with the service account if there is none."""
    words = ["--namespace", look.namespace, "--role", role, who]
    return f"python -m pipelines.rights {shlex.join(words)} | kubectl apply -f -"


def grant(namespace: str, who: str, verbs: Sequence[str], resources: Sequence[str]) -> str:
    """The commands that give rights in a namespace.

    Args:
        namespace: where.
        who: a user, or system:serviceaccount:NAMESPACE:NAME.
        verbs: of RBAC.
        resources: as kubectl takes them, such as jobs.batch.
    """
    # A name that no earlier repair has used for something else.
    name = f"millrace-{hashlib.sha256(repr((who, verbs, resources)).encode()).hexdigest()[:8]}"
    return (
        f"kubectl create role {name} -n {namespace} --verb={','.join(verbs)} --resource={','.join(resources)} && "
        f"kubectl create rolebinding {name} -n {namespace} --role={name} {_subject(who)}"
    )


def _subject(who: str) -> str:
    return f"--serviceaccount={who.removeprefix(ACCOUNT)}" if who.startswith(ACCOUNT) else f"--user={shlex.quote(who)}"


def unseen(look: Look) -> None:
    """One note on all that we were not allowed to look at."""
    if not look.unseen:
        return
    words = sorted(set(look.unseen))
    verbs = sorted({word.split()[0] for word in words})
    resources = sorted({word.split()[1] for word in words})
    who, name = str(look.facts.get("user", "you")), rbac.NAMES[rbac.DOCTOR]
    look.note(
        f"not looked at, for want of a right: {', '.join(words)}",
        "what is wrong there stays unknown; running jobs does not need these rights",
        f"kubectl create clusterrole {name} --verb={','.join(verbs)} --resource={','.join(resources)} && "
        f"kubectl create clusterrolebinding {name} --clusterrole={name} {_subject(who)}",
    )
