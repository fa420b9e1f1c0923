"""A run on a cluster as events, read from what the pods of its coordinator print, one after the other if one is lost."""

from __future__ import annotations

import queue
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from components.launch import chain_log, observe
from components.launch.api import Api, ApiError
from components.launch.chain_log import Event
from components.launch.logs import Follower
from trainer.errors import MillraceError

_CONTAINER = "main"
# How often the coordinator's pods are looked at, and how long what they print may lag behind.
_LOOK_S = 2.0
_DRAIN_S = 10.0
# What the kubelet alternates between for as long as an image is not to be had.
_NO_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")


@dataclass
class Following:
    """What is followed: the coordinator's Job by its name.

    Attributes:
        api: the API server.
        job: name of the Job.
        told: the last reason for which no pod runs, so that it is said once.
    """

    api: Api
    job: str
    told: str = ""
    _lines: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    _readers: dict[str, Follower] = field(default_factory=dict)

    def events(self) -> Generator[Event, None, None]:
        """The events of the run, from its beginning; between them, `tick` when time passed. The last one is `end`.

        Raises:
            MillraceError: the coordinator was removed, or ended without a word.
            ApiError: the cluster does not answer for a minute.
        """
        looked, closing = float("-inf"), 0.0
        job: dict[str, Any] = {}
        try:
            while True:
                if time.monotonic() - looked >= _LOOK_S:
                    job = self._job()
                    waiting = self._look(job)
                    looked = time.monotonic()
                    if waiting and waiting != self.told:
                        self.told = waiting
                        yield Event("waiting", text=waiting)
                    if observe.condition(job)[0] in ("succeeded", "failed") and not closing:
                        closing = time.monotonic() + _DRAIN_S
                try:
                    event = chain_log.read(self._lines.get(timeout=0.1))
                except queue.Empty:
                    if closing and (
                        time.monotonic() > closing or not any(each.is_alive() for each in self._readers.values())
                    ):
                        raise _without_a_word(job) from None
                    yield Event("tick")
                    continue
                yield event
                if event.kind == "end":
                    return
        finally:
            for reader in self._readers.values():
                reader.abandon()

    def _job(self) -> dict[str, Any]:
        try:
            return self.api.get("Job", self.job)
        except ApiError as error:
            if error.status != 404:
                raise
            raise MillraceError(
                f"job {self.job}: not there any more: the run was cancelled, or its time to be kept is over",
                "start another one: millrace run --engine kubernetes",
            ) from None

    def _look(self, job: dict[str, Any]) -> str:
        """Follow each pod of the coordinator that has begun; returns why none does."""
        objects = self.api.list("Pod", label_selector=f"batch.kubernetes.io/job-name={self.job}")
        found = sorted((observe.read_pod(each) for each in objects), key=lambda pod: pod.created)
        for pod in found:
            if pod.begun and pod.uid not in self._readers:
                before = next(reversed(self._readers.values()), None)
                self._readers[pod.uid] = Follower(self.api, pod.name, _CONTAINER, self._lines.put, before=before)
                self._readers[pod.uid].start()
        living = {pod.uid for pod in found if pod.living}
        for uid, reader in self._readers.items():
            if uid not in living:
                reader.finish()
        if any(pod.begun and pod.living for pod in found):
            return ""
        if found and found[-1].waiting:
            return _waits(found[-1])
        return self._refusal(job) if not found else ""

    def _refusal(self, job: dict[str, Any]) -> str:
        try:
            events = self.api.list("Event", field_selector=f"involvedObject.uid={job['metadata']['uid']}")
        except ApiError:  # not everybody may read events, and nothing depends on it
            return ""
        refused = observe.refusal(events)
        return f"the coordinator's pod is refused: {refused.message}" if refused else ""


def _waits(pod: observe.Pod) -> str:
    if pod.waiting not in _NO_IMAGE:
        return f"the coordinator waits: {pod.waiting}: {pod.detail}"
    return (
        f"the coordinator waits: its image {pod.image} cannot be pulled\n"
        "  fix: push it; or end this run with --cancel and start one with another cluster.image_prefix or "
        "cluster.image_tag, or with cluster.pull_secrets"
    )


def _without_a_word(job: dict[str, Any]) -> MillraceError:
    _, condition = observe.condition(job)
    name = job["metadata"]["name"]
    why = str(condition.get("message") or condition.get("reason") or "it ended")
    return MillraceError(
        f"job {name}: the coordinator ended without a word: {why}",
        f"look at `kubectl describe job {name}`, then go on with `millrace run --engine kubernetes --resume`",
    )
