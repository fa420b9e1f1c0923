"""Watch one job from its first second to its end: its conditions, its pods, their refusals and what rank 0 prints."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace

from components.launch import judge, logs, observe, submit
from components.launch.api import Api, ApiError, Object
from components.launch.feed import Feed
from components.launch.judge import History, Verdict
from components.launch.logs import Follower, Out
from components.launch.observe import Pod
from components.launch.spec import JobSpec
from components.launch.watch import Change

_TICK_S = 1.0
# A thousand pods that fail at once tell the same story.
_MAX_TAILS = 8
_REPEAT_S = 300.0
# An operator that is there takes a job up within this time.
_OPERATOR_S = 15.0
# A pod that has a node begins within this time, unless its image is large; what its events say before that may pass.
_STARTING_S = 15.0
_ASK_S = 15.0
# The other ranks of a failed training end within this time, and say more of the cause.
_ENDING_S = 5.0


class Signalled(BaseException):
    """A signal came; raised by its handler, from wherever the main thread waits."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def event_names(kind: str, name: str) -> list[str]:
    """Names of the objects whose events tell of a job: its own, and that of the Job which a TrainJob's JobSet makes."""
    return [name, f"{name}-node-0"] if kind == "TrainJob" else [name]


@dataclass
class Tracker:
    """One job, its pods and their refusals, as they change. A context manager."""

    api: Api
    spec: JobSpec
    start: Object
    out: Out
    history: History = field(default_factory=History)
    pods: dict[str, Pod] = field(default_factory=dict)
    events: dict[str, Object] = field(default_factory=dict)
    tails: dict[str, tuple[str, list[str]]] = field(default_factory=dict)
    began_at: float = 0.0

    def __post_init__(self) -> None:
        self.job: Object | None = self.start
        self.uid = self.start["metadata"]["uid"]
        self.created = observe.seconds(self.start["metadata"].get("creationTimestamp"))
        name, kind = self.spec.name, self.start["kind"]
        asked = [
            (kind, {"field_selector": f"metadata.name={name}"}),
            ("Pod", {"label_selector": submit.selector(name)}),
            *(("Event", {"field_selector": f"involvedObject.name={each}"}) for each in event_names(kind, name)),
        ]
        self._feed = Feed(self.api, asked, self.spec.namespace, self.out, name)
        self._follower: Follower | None = None
        self._followed: tuple[str, int] = ("", 0)
        self._told: tuple[str, float] = ("", 0.0)
        self._lost = 0
        self._seen = False
        self._asked_at = 0.0
        self._warning = ("", "")

    def __enter__(self) -> Tracker:
        self._feed.__enter__()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._follower:
            self._follower.close() if kind is None else self._follower.abandon()
        # Threads that read may need a second to end; after a signal there is none.
        if kind is not Signalled:
            self._feed.__exit__()

    @property
    def living(self) -> list[str]:
        """Names of the pods that still hold a place on a node."""
        return [name for name, pod in self.pods.items() if pod.living]

    @property
    def terminal(self) -> bool:
        """Whether the job itself says that it has ended."""
        return self.job is not None and observe.condition(self.job)[0] in ("succeeded", "failed")

    def wait(self) -> Verdict:
        """Watch until the job is over."""
        while True:
            for change in self._feed.take(_TICK_S):
                self._apply(change)
            if not self._feed.current:
                continue
            if not self._seen:  # the list is in, and the job was not in it
                self.job = None
            now = self.api.now()
            self.history.see(self.job, list(self.pods.values()), self.spec, now)
            refused = observe.refusal(self.events.values())
            verdict = judge.judge(self.job, self.history, refused, self.spec, now)
            verdict = self._with_warning(verdict, now)
            self._tell(verdict, now)
            self._follow()
            ending = self.terminal and self.living and now - self.history.ended_at < _ENDING_S
            if verdict.over and not ending:
                return self._explained(verdict)

    def _with_warning(self, verdict: Verdict, now: float) -> Verdict:
        """The verdict with what the kubelet says of a pod that has a node and does not begin: a volume, the network."""
        pods = (rank.pod for rank in self.history.ranks.values() if not rank.gone)
        pod = next((pod for pod in pods if pod.node and not pod.begun and not pod.waiting), None)
        if verdict.reason != "Pending" or not pod or now - self.history.waiting_since < _STARTING_S:
            return verdict
        if verdict.over or now - self._asked_at > _ASK_S:
            self._asked_at = now
            with suppress(ApiError):
                selector = f"involvedObject.name={pod.name},involvedObject.uid={pod.uid}"
                found = self.api.list("Event", field_selector=selector, namespace=self.spec.namespace, within_s=5.0)
                self._warning = observe.warning(found)
        reason, said = self._warning
        return replace(verdict, reason=reason, message=f"{verdict.message}: {reason}: {said}") if reason else verdict

    def _apply(self, change: Change) -> None:
        name, gone = change.object["metadata"]["name"], change.type == "DELETED"
        if change.kind == "Pod":
            if self._is_of_another(change.object):
                return
            pod = observe.read_pod(change.object)
            self.history.see_pod(pod, self.api.now())
            self._keep_tail(pod)
            if gone:
                self.pods.pop(name, None)
            else:
                self.pods[name] = pod
        elif change.kind == "Event":
            self.events[name] = change.object
        else:
            self._seen = True
            other = change.object["metadata"]["uid"] != self.uid
            self.job = None if gone or other else change.object

    def _is_of_another(self, pod: Object) -> bool:
        """Whether a pod is left from an earlier job of this name: its node may be down, so that it does not go."""
        owners = pod["metadata"].get("ownerReferences") or []
        return any(each.get("kind") == self.start["kind"] and each.get("uid") != self.uid for each in owners)

    def _keep_tail(self, pod: Pod) -> None:
        """Read the end of a failed pod's log at once: the operator removes a pod that it replaces."""
        if not pod.exit or pod.exit.code == 0 or len(self.tails) >= _MAX_TAILS:
            return
        key = f"{pod.uid}/{pod.restarts}"
        if key in self.tails:
            return
        lines = logs.ending(self.api, pod.name, pod.container, pod.running or pod.restarts > 0, self.spec.namespace)
        if lines:
            self.tails[key] = (pod.name, lines)
        if not self._is_first(pod):
            for line in logs.shown(pod.rank, lines[-logs.TAIL :]):
                self.out(line)

    def _is_first(self, pod: Pod) -> bool:
        """Whether it is the pod whose log is streamed: the master, or the first worker where there is none."""
        return pod.index == 0 and (not self.spec.master or pod.rank.startswith("master"))

    def _follow(self) -> None:
        """Stream the log of rank 0, over all pods that fill its place."""
        rank = next((rank for rank in self.history.ranks.values() if self._is_first(rank.pod)), None)
        if not rank or not rank.pod.begun:
            return
        pod = rank.pod
        uid, restarts = self._followed
        if pod.uid != uid:
            self._follower = Follower(
                self.api, pod.name, pod.container, self.out, self.spec.namespace, before=self._follower
            )
            self._follower.start()
        elif pod.restarts > restarts and self._follower:
            self._follower.restarted()
        self._followed = (pod.uid, pod.restarts)
        if self._follower and (rank.gone or not pod.living):
            self._follower.finish()

    def _tell(self, verdict: Verdict, now: float) -> None:
        """Say what has changed, and every few minutes what it still waits for."""
        if self.history.restarts > self._lost:
            last = self.history.failure
            why = f"; the last: {last[0].rank} ended with exit code {last[1].code}" if last else ""
            self.out(
                f"{self.spec.name}: {self.history.restarts} of at most {self.spec.restarts} pods put in place again{why}"
            )
            self._lost = self.history.restarts
        if verdict.over or (verdict.reason == "NoOperator" and now - self.created < _OPERATOR_S):
            return
        if verdict.state == "running" and not self.began_at:
            self.began_at = now
        text = verdict.message
        if verdict.state == "running":
            text = text or f"all {self.spec.nodes} pods run"
        else:
            text = f"{verdict.state}, {self.history.begun()} of {self.spec.nodes} pods run: {text}"
        repeat = verdict.state != "running" and now - self._told[1] > _REPEAT_S
        if text != self._told[0] or repeat:
            self.out(f"{self.spec.name}: {text}")
            self._told = (text, now)

    def _explained(self, verdict: Verdict) -> Verdict:
        """The verdict with what the failed pod itself said."""
        if verdict.state != "failed":
            return verdict
        by_name = dict(self.tails.values())
        for name in verdict.pods:
            pod = self.pods.get(name)
            lines = by_name.get(name) or (
                logs.ending(self.api, name, pod.container, pod.restarts > 0, self.spec.namespace) if pod else []
            )
            told = logs.trainer_error(lines)
            if told:
                return replace(verdict, message=f"{verdict.message}: {told.message}", hint=told.hint or verdict.hint)
        return verdict
