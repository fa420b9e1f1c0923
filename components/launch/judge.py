"""How a job stands and whether it is over: a pure judgement on what was observed, for the launcher to act on.

The operator looks at worker-0 alone, restarts without end and says nothing of a pod that cannot be made, so the judgement
goes by every pod: a job is a success only when all of its pods are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from components.launch import observe
from components.launch.observe import Exit, Pod, Refusal
from components.launch.spec import JobSpec
from trainer.errors import EXIT_BAD_INPUT, EXIT_CODES, EXIT_FAILURE

# Seconds that an image or a secret may be missing before it is called missing: registries have hiccups, and secrets are
# made a moment after the job; the kubelet itself tries again after 10, 20 and 40 s.
PATIENCE_S = 60.0
# Seconds that pods have to end once the job has: the ranks of one training end within a second of each other.
GRACE_S = 30.0
# Reasons of a waiting container for which the kubelet only ever tries the same again.
STUCK = {
    "ErrImagePull": "image",
    "ImagePullBackOff": "image",
    "ErrImageNeverPull": "image",
    "InvalidImageName": "image",
    "ImageInspectError": "image",
    "RegistryUnavailable": "image",
    "CreateContainerConfigError": "configuration",
    "CreateContainerError": "configuration",
    "RunContainerError": "configuration",
}

_MEMORY_HINT = "raise cluster.resources.{stage}.memory, or lower train.batch_size"
WAIT_HINT = (
    "ask for less (cluster.gpus_per_node, cluster.job.nodes, cluster.resources), add nodes, "
    "or wait longer: cluster.job.queue_timeout_s"
)


@dataclass(frozen=True)
class Verdict:
    """How a job stands.

    Attributes:
        state: waiting (not all pods have begun), suspended, running, succeeded or failed.
        reason: one word of the cluster's own: Unschedulable, ImagePullBackOff, OOMKilled, ...
        message: what happened, for people.
        hint: what to do about it.
        exit_code: what the launcher ends with.
        pods: names of the pods whose logs tell more, the most telling first.
    """

    state: Literal["waiting", "suspended", "running", "succeeded", "failed"]
    reason: str = ""
    message: str = ""
    hint: str = ""
    exit_code: int = 0
    pods: tuple[str, ...] = ()

    @property
    def over(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self.state in ("succeeded", "failed")


@dataclass
class Rank:
    """What was seen of one place in the job, over all pods that have filled it.

    Attributes:
        pod: the newest pod.
        gone: whether that pod is there no more.
        uids: restarts of the container of each pod that filled the place, by the pod's uid.
        excused: pods that were taken away by a suspension, which is nobody's failure.
        stuck_since: since when the container cannot be started, for one reason of `STUCK`; 0 while it can.
    """

    pod: Pod
    gone: bool = False
    uids: dict[str, int] = field(default_factory=dict)
    excused: int = 0
    stuck_since: float = 0.0

    @property
    def restarts(self) -> int:
        """How often the place had to be filled again."""
        return max(len(self.uids) - 1 - self.excused, 0) + sum(self.uids.values())


@dataclass
class History:
    """What a job went through, as far as it was watched. Times are seconds since 1970.

    Attributes:
        ranks: by name: worker-0, worker-1, ...
        waiting_since: since when not all pods have begun; 0 while they have.
        missing_since: since when there are fewer pods than nodes; 0 while there are as many.
        ran_s: seconds since all pods had begun for the first time, without those in suspension.
        ended_at: when the job was first seen to have ended; 0 before.
        failure: the last failure of a pod.
        suspended: whether it is not admitted, or not any more.
    """

    ranks: dict[str, Rank] = field(default_factory=dict)
    waiting_since: float = 0.0
    missing_since: float = 0.0
    ran_s: float = 0.0
    ended_at: float = 0.0
    failure: tuple[Pod, Exit] | None = None
    suspended: bool = False
    _seen_at: float = 0.0
    _ran: bool = False

    @property
    def restarts(self) -> int:
        """Pods and containers that were put in place again, over all ranks."""
        return sum(rank.restarts for rank in self.ranks.values())

    def begun(self) -> int:
        """Number of ranks whose pod runs, or has run."""
        return sum(rank.pod.begun and not rank.gone for rank in self.ranks.values())

    def see(self, job: Mapping[str, Any] | None, pods: Sequence[Pod], spec: JobSpec, now: float) -> None:
        """Take in what is there at one moment."""
        state = observe.condition(job)[0] if job else ""
        suspended, was = state == "suspended", self.suspended
        if suspended and not was:
            for rank in self.ranks.values():
                rank.excused += 1
        self.suspended = suspended
        for pod in sorted(pods, key=lambda each: each.created):
            self.see_pod(pod, now)
        there = {pod.uid for pod in pods}
        for rank in self.ranks.values():
            rank.gone = rank.pod.uid not in there
        if state in ("succeeded", "failed"):
            self.ended_at = self.ended_at or now
        missing = len(self.ranks) < spec.nodes or any(rank.gone for rank in self.ranks.values())
        self.missing_since = (self.missing_since or now) if missing else 0.0
        if self._ran and not was:
            self.ran_s += max(now - self._seen_at, 0.0)
        self._see_time(job, spec, now)

    def see_pod(self, pod: Pod, now: float) -> None:
        """Take in one state of a pod, however short it was."""
        rank = self.ranks.setdefault(pod.rank, Rank(pod))
        known = rank.uids.get(pod.uid)
        # A pod of a job that makes a new pod for each attempt stays beside the next one: the newest one counts.
        if known is None or pod.created >= rank.pod.created:
            rank.pod = pod
        rank.uids[pod.uid] = max(known or 0, pod.restarts)
        if pod.exit and pod.exit.code and (self.failure is None or pod.exit.at >= self.failure[1].at):
            self.failure = (pod, pod.exit)
        if rank.pod is pod:
            rank.stuck_since = (rank.stuck_since or now) if pod.waiting in STUCK else 0.0

    def _see_time(self, job: Mapping[str, Any] | None, spec: JobSpec, now: float) -> None:
        """Move the clocks: waiting until all have begun, running from then on, neither of them in suspension."""
        everyone = self.begun() >= spec.nodes
        if self.suspended or not everyone:
            created = observe.seconds(((job or {}).get("metadata") or {}).get("creationTimestamp"))
            # A launcher that attaches goes on with the clock of the one before it.
            self.waiting_since = self.waiting_since or (min(created, now) if created and not self._ran else now)
        else:
            self.waiting_since = 0.0
        if everyone and not self._ran:
            self._ran = True
            self.ran_s = max(now - max(rank.pod.started for rank in self.ranks.values()), 0.0)
        self._seen_at = now


def judge(
    job: Mapping[str, Any] | None, history: History, refused: Refusal | None, spec: JobSpec, now: float
) -> Verdict:
    """How the job stands.

    Args:
        job: the object; None if it is there no more.
        history: what was seen of it, this moment included.
        refused: the last refusal to make one of its pods.
        spec: what was asked for: nodes, restarts and deadlines.
        now: seconds since 1970.
    """
    if job is None:
        return _failed(
            "Deleted", f"{spec.name} was deleted by somebody else", "start it again: it goes on from its checkpoint"
        )
    state, condition = observe.condition(job)
    if state == "failed":
        return _job_failed(history, condition, spec)
    if state == "succeeded":
        return _job_succeeded(history, now)
    if history.restarts > spec.restarts:
        return _given_up(history, spec)
    found = _forgotten_failure(history, spec, now) or _stuck(history, spec, now) or _refused(history, refused, now)
    if found:
        return found
    if spec.run_timeout_s and history.ran_s > spec.run_timeout_s:
        message = f"it ran for {spec.run_timeout_s:g} s (cluster.job.run_timeout_s), and was not done"
        return _failed("DeadlineExceeded", message, "raise cluster.job.run_timeout_s; it goes on from its checkpoint")
    if not history.waiting_since:
        return Verdict("running")
    reason, message = why_waiting(job, history, refused, spec)
    if now - history.waiting_since <= spec.queue_timeout_s:
        return Verdict("suspended" if state == "suspended" else "waiting", reason, message)
    late = f"not all of its {spec.nodes} pods ran within {spec.queue_timeout_s:g} s (cluster.job.queue_timeout_s)"
    return _failed(reason, f"{late}: {message}", WAIT_HINT)


def why_waiting(job: Mapping[str, Any], history: History, refused: Refusal | None, spec: JobSpec) -> tuple[str, str]:
    """Reason and sentence on what a job waits for that does not run yet."""
    if history.suspended:
        place = f"queue {spec.queue}" if spec.queue else "whoever suspended it"
        return "Suspended", f"it waits for {place} to admit it"
    waiting = [rank.pod for rank in history.ranks.values() if not rank.gone and not rank.pod.begun]
    told = next((pod for pod in waiting if pod.waiting), None)
    if told:
        return told.waiting, f"{told.rank}: {told.waiting}{f': {told.detail}' if told.detail else ''}"
    if waiting:
        place = f"on node {waiting[0].node}" if waiting[0].node else "for a node"
        return "Pending", f"{waiting[0].rank} waits {place}"
    if refused:
        return "FailedCreate", f"its pods are refused: {refused.message}"
    if not history.ranks and not (job.get("status") or {}).get("conditions"):
        kind = job.get("kind", "job")
        return (
            "NoOperator",
            f"no operator has taken up the {kind} yet; millrace doctor --cluster tells whether one runs",
        )
    return "Pending", f"{spec.nodes - history.begun()} of its {spec.nodes} pods are not there yet"


def _failed(reason: str, message: str, hint: str, code: int = EXIT_FAILURE, pods: Sequence[str] = ()) -> Verdict:
    return Verdict("failed", reason, message, hint, code, tuple(pods))


def _job_failed(history: History, condition: Mapping[str, Any], spec: JobSpec) -> Verdict:
    reason, said = str(condition.get("reason") or "Failed"), str(condition.get("message") or "")
    # The training operator gives no reason of its own: "it was active longer than specified deadline".
    if "DeadlineExceeded" in reason or "specified deadline" in said or "active deadline" in said:
        hint = "raise cluster.job.run_timeout_s or cluster.job.queue_timeout_s; it goes on from its checkpoint"
        return _failed("DeadlineExceeded", f"its deadline passed: {said}", hint)
    culprit = _culprit(history)
    if culprit:
        return exit_verdict(*culprit, spec)
    return _failed(reason, f"the job failed: {said or reason}", "see the job's events: kubectl describe")


def _culprit(history: History) -> tuple[Pod, Exit] | None:
    """The failure that explains the others: a permanent one, and of these the first; others follow from it."""
    ended = [
        (rank.pod, rank.pod.exit)
        for rank in history.ranks.values()
        if rank.pod.exit and rank.pod.exit.code and not rank.pod.running
    ]
    found = min(ended, key=lambda each: (each[1].code >= 128, each[1].at), default=history.failure)
    evicted = next((rank.pod for rank in history.ranks.values() if rank.pod.phase == "Failed"), None)
    return found or ((evicted, Exit(EXIT_FAILURE, evicted.reason or "Failed", 0.0)) if evicted else None)


def exit_verdict(pod: Pod, end: Exit, spec: JobSpec, before: str = "") -> Verdict:
    """The failure of a pod that ended with an exit code; what its own log says of it is for the launcher to add."""
    # A code below 128 is the stage's own word, and trying again does not help; a signal's is the machine's.
    code = end.code if 0 < end.code < 128 else EXIT_FAILURE
    text, hint = f"{before}{pod.rank} ended with exit code {end.code}", "see its log above"
    if end.reason == "OOMKilled":
        limit = f" of {spec.memory}" if spec.memory else ""
        text, hint = f"{text}: out of memory, it used more than its limit{limit}", _MEMORY_HINT.format(stage=spec.stage)
    elif end.reason in ("Evicted", "Shutdown", "NodeShutdown", "Terminated", "Preempting"):
        text, hint = f"{text}: {end.reason}: {pod.detail or 'the node needed its place'}", "start it again"
    elif end.reason in ("ContainerCannotRun", "StartError"):
        text, hint = f"{text}: {end.reason}: {pod.detail or 'its program cannot be started'}", "check the image"
    elif end.code in EXIT_CODES:
        hint = f"{EXIT_CODES[end.code]}; see its log above"
    return _failed(end.reason if end.reason not in ("", "Error") else "Failed", text, hint, code, (pod.name,))


def _job_succeeded(history: History, now: float) -> Verdict:
    """Success of the job is success of its worker-0; that of the others is asked of themselves."""
    pods = [rank.pod for rank in history.ranks.values()]
    bad = [pod for pod in pods if not pod.succeeded]
    if not bad:
        return Verdict("succeeded")
    if now - history.ended_at <= GRACE_S:
        return Verdict(
            "running", "Ending", f"{', '.join(pod.rank for pod in bad)}: not ended yet, though the job is done"
        )
    told = []
    for pod in bad:
        gone = history.ranks[pod.rank].gone
        end = f"ended with exit code {pod.exit.code}" if pod.exit else "never ran"
        told.append(f"{pod.rank} {'was removed before it ended' if gone else 'still runs' if pod.running else end}")
    message = f"the job says that it succeeded, but {GRACE_S:g} s later {'; '.join(told)}"
    hint = "what it made is not to be trusted: correct what that pod's log names, and start it again"
    return _failed("Incomplete", message, hint, EXIT_FAILURE, [pod.name for pod in bad])


def _given_up(history: History, spec: JobSpec) -> Verdict:
    before = f"given up after {history.restarts} pods were lost or failed (cluster.job.restarts is {spec.restarts}); the last: "
    if history.failure:
        return exit_verdict(*history.failure, spec, before=before)
    lost = ", ".join(name for name, rank in history.ranks.items() if rank.restarts)
    hint = "find out who deletes its pods, or raise cluster.job.restarts; it goes on from its checkpoint"
    return _failed("TooManyRestarts", f"{before}{lost} was deleted", hint)


def _forgotten_failure(history: History, spec: JobSpec, now: float) -> Verdict | None:
    """A permanent failure of a pod that the operator does not act upon, perhaps because it is not there."""
    for rank in history.ranks.values():
        end = rank.pod.exit
        if not rank.gone and rank.pod.phase == "Failed" and end and 0 < end.code < 128 and now - end.at > GRACE_S:
            return exit_verdict(rank.pod, end, spec)
    return None


def _stuck(history: History, spec: JobSpec, now: float) -> Verdict | None:
    """A container that will not start by waiting: its image, or its secrets."""
    for rank in history.ranks.values():
        pod = rank.pod
        if rank.gone or not rank.stuck_since or now - rank.stuck_since < PATIENCE_S:
            continue
        return stuck_verdict(pod)
    return None


def stuck_verdict(pod: Pod) -> Verdict:
    """The failure of a pod whose container cannot be started."""
    if STUCK.get(pod.waiting) == "image":
        message = f"{pod.rank}: the image {pod.image} cannot be had: {pod.waiting}: {pod.detail}"
        hint = "correct cluster.image_prefix and cluster.image_tag, push the image, or name cluster.pull_secrets"
    else:
        message = f"{pod.rank}: its container cannot be made: {pod.waiting}: {pod.detail}"
        hint = "create what it names, or correct cluster.secrets and cluster.claim"
    return _failed(pod.waiting, message, hint, EXIT_BAD_INPUT, (pod.name,))


def _refused(history: History, refused: Refusal | None, now: float) -> Verdict | None:
    """Pods that a policy or a webhook does not let in; a quota may become free, so it has until the queue deadline."""
    if not refused or refused.is_quota or not history.missing_since or history.suspended:
        return None
    # Events count in whole seconds.
    about_this = refused.at + 1.0 >= history.missing_since
    if not about_this or now - history.missing_since < PATIENCE_S:
        return None
    hint = "change what the message names: the namespace's policy, a webhook, the service account or the priority class"
    return _failed("FailedCreate", f"its pods are refused: {refused.message}", hint, EXIT_BAD_INPUT)
