"""The judgement on a job: pure, from plain objects as the API server gives them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from components.launch import observe
from components.launch.judge import GRACE_S, PATIENCE_S, History, Verdict, judge
from components.launch.spec import JobSpec

T0 = 1_800_000_000.0


def stamp(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def spec(**changes: Any) -> JobSpec:
    given: dict[str, Any] = {
        "name": "job", "stage": "train", "image": "docker.io/millrace/trainer:1", "args": ("train",), "nodes": 2,
        "queue_timeout_s": 100.0, "run_timeout_s": 0.0, "restarts": 2, "memory": "1Gi",
    }  # fmt: skip
    return JobSpec(**given | changes)


def job(*conditions: str, at: float = T0, **more: Any) -> dict[str, Any]:
    found = [{"type": name, "status": "True", "reason": name, "message": f"it is {name}"} for name in conditions]
    meta = {"name": "job", "uid": "u", "creationTimestamp": stamp(at)}
    return {"kind": "PyTorchJob", "metadata": meta, "status": {"conditions": found}, **more}


def pod(
    index: int = 0, state: dict[str, Any] | None = None, *, phase: str = "Running", uid: str = "", restarts: int = 0,
    last: dict[str, Any] | None = None, created: float = T0, **status: Any,
) -> observe.Pod:  # fmt: skip
    own = {
        "name": "pytorch", "image": "docker.io/millrace/trainer:1", "restartCount": restarts, "state": state or {},
        "lastState": last or {},
    }  # fmt: skip
    obj = {
        "metadata": {
            "name": f"job-worker-{index}", "uid": uid or f"uid-{index}", "creationTimestamp": stamp(created),
            "labels": {
                "training.kubeflow.org/replica-type": "worker", "training.kubeflow.org/replica-index": str(index),
            },
        },
        "spec": {"containers": [{"name": "istio-proxy"}, {"name": "pytorch"}], "nodeName": "node-a"},
        "status": {"phase": phase, "containerStatuses": [own] if state is not None else [], **status},
    }  # fmt: skip
    return observe.read_pod(obj)


def running(index: int = 0, at: float = T0, **more: Any) -> observe.Pod:
    return pod(index, {"running": {"startedAt": stamp(at)}}, **more)


def ended(index: int = 0, code: int = 0, reason: str = "", at: float = T0 + 50, **more: Any) -> observe.Pod:
    state = {"terminated": {"exitCode": code, "reason": reason, "startedAt": stamp(T0), "finishedAt": stamp(at)}}
    return pod(index, state, phase="Failed" if code else "Succeeded", **more)


def stuck(index: int, reason: str, message: str = "") -> observe.Pod:
    return pod(index, {"waiting": {"reason": reason, "message": message}}, phase="Pending")


def unscheduled(index: int, message: str) -> observe.Pod:
    found = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return pod(index, None, phase="Pending", conditions=[found])


def play(*moments: tuple[float, dict[str, Any] | None, list[observe.Pod]], refused: observe.Refusal | None = None,
         **changes: Any) -> Verdict:  # fmt: skip
    """The verdict after what was seen at each moment: (seconds, job, pods)."""
    history, asked = History(), spec(**changes)
    for at, obj, pods in moments:
        history.see(obj, pods, asked, T0 + at)
    at, obj, _ = moments[-1]
    return judge(obj, history, refused, asked, T0 + at)


BOTH = [running(0), running(1)]


def test_a_job_runs_once_all_its_pods_have_begun():
    assert play((5, job("Running"), [running(0)])).state == "waiting"
    assert play((5, job("Running"), BOTH)).state == "running"


def test_unschedulable_is_named_while_it_waits_and_ends_at_the_queue_deadline():
    alone = [running(0), unscheduled(1, "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")]
    early, late = play((99, job("Created"), alone)), play((101, job("Created"), alone))
    assert (early.state, early.reason) == ("waiting", "Unschedulable")
    assert (late.state, late.reason) == ("failed", "Unschedulable")
    assert "Insufficient nvidia.com/gpu" in late.message
    assert "cluster.job.queue_timeout_s" in late.message + late.hint
    assert late.exit_code != 0


def test_the_queue_clock_of_an_attached_launcher_began_with_the_job():
    waiting = [running(0), unscheduled(1, "no room")]
    assert play((101, job("Created"), waiting)).state == "failed"
    assert play((101, job("Created", at=T0 + 50), waiting)).state == "waiting"


def test_suspension_is_no_failure_but_counts_as_queue_time():
    assert play((99, job("Suspended"), [])).state == "suspended"
    late = play((101, job("Suspended"), []), queue="team", scheduler="kueue")
    assert (late.state, late.reason) == ("failed", "Suspended")
    assert "queue team" in late.message


def test_a_job_that_is_suspended_again_waits_anew_and_loses_no_restarts_by_it():
    moments = [(5, job("Running"), BOTH), (500, job("Suspended"), [])]
    again = [running(0, uid="new-0", created=T0 + 590), running(1, uid="new-1", created=T0 + 590)]
    assert play(*moments, (590, job("Suspended"), [])).state == "suspended"
    assert play(*moments, (590, job("Running"), again), restarts=0).state == "running"
    assert play(*moments, (601, job("Suspended"), [])).state == "failed"


def test_time_in_suspension_is_no_run_time():
    moments = [
        (5, job("Running"), BOTH),
        (50, job("Running"), BOTH),
        (90, job("Suspended"), []),
        (140, job("Running"), BOTH),
    ]
    assert play(*moments, (145, job("Running"), BOTH), run_timeout_s=100).state == "running"
    late = play(*moments, (200, job("Running"), BOTH), run_timeout_s=100)
    assert (late.reason, late.state) == ("DeadlineExceeded", "failed")
    assert "cluster.job.run_timeout_s" in late.message


@pytest.mark.parametrize("reason", ["ImagePullBackOff", "CreateContainerConfigError", "InvalidImageName"])
def test_a_container_that_cannot_start_is_given_patience_and_then_reported_long_before_the_queue_deadline(reason):
    pods = [running(0), stuck(1, reason, "the kubelet's words")]
    begin = (1.0, job("Created"), pods)
    assert play(begin, (PATIENCE_S, job("Created"), pods), queue_timeout_s=3600).state == "waiting"
    late = play(begin, (PATIENCE_S + 2, job("Created"), pods), queue_timeout_s=3600)
    assert (late.state, late.reason) == ("failed", reason)
    assert "worker-1" in late.message
    assert "the kubelet's words" in late.message


def test_a_missing_image_is_named():
    pods = [stuck(0, "ErrImagePull"), stuck(1, "ImagePullBackOff")]
    late = play((1, job("Created"), pods), (80, job("Created"), pods))
    assert "docker.io/millrace/trainer:1" in late.message
    assert "cluster.image" in late.hint


def test_patience_begins_anew_when_the_container_could_start_meanwhile():
    bad, good = [running(0), stuck(1, "ImagePullBackOff")], BOTH
    moments = [(1, job(), bad), (50, job(), good), (51, job(), bad)]
    assert play(*moments, (80, job(), bad)).state == "waiting"


def test_success_needs_every_pod():
    done = job("Succeeded")
    assert play((50, done, [ended(0), ended(1)])).state == "succeeded"
    for other in (running(1), ended(1, 2), pod(1, {"waiting": {"reason": "CrashLoopBackOff"}}, restarts=1)):
        assert play((50, done, [ended(0), other])).state == "running"
        late = play((50, done, [ended(0), other]), (52 + GRACE_S, done, [ended(0), other]))
        assert (late.state, late.reason) == ("failed", "Incomplete")
        assert late.exit_code != 0
        assert "worker-1" in late.message


def test_a_pod_removed_before_it_ended_spoils_success_and_one_that_was_cleaned_up_does_not():
    done = job("Succeeded")
    assert play((5, job(), BOTH), (50, done, [ended(0)]), (90, done, [ended(0)])).state == "failed"
    assert play((5, job(), [running(0), ended(1)]), (50, done, []), (90, done, [])).state == "failed"
    assert play((5, job(), [ended(0), ended(1)]), (50, done, [])).state == "succeeded"
    # A launcher that comes when all is cleaned up has only the job's word.
    assert play((50, done, [])).state == "succeeded"


def test_failed_names_the_permanent_exit_code_and_not_what_followed_from_it():
    verdict = play((60, job("Failed"), [ended(0, 137, "Error", at=T0 + 40), ended(1, 3, "Error", at=T0 + 45)]))
    assert (verdict.state, verdict.exit_code, verdict.pods) == ("failed", 3, ("job-worker-1",))
    assert "worker-1 ended with exit code 3" in verdict.message
    assert "diverged" in verdict.hint


def test_failed_without_any_pod_still_is_not_green():
    verdict = play((60, job("Failed"), []))
    assert (verdict.state, verdict.exit_code) == ("failed", 1)
    assert "it is Failed" in verdict.message


def test_failed_wins_over_succeeded():
    assert play((60, job("Succeeded", "Failed"), [ended(0), ended(1)])).state == "failed"


def test_out_of_memory_is_named_with_the_limit_and_the_key():
    verdict = play((60, job("Failed"), [running(0), ended(1, 137, "OOMKilled")]))
    assert verdict.reason == "OOMKilled"
    assert "1Gi" in verdict.message
    assert "cluster.resources.train.memory" in verdict.hint
    assert verdict.exit_code == 1


def test_eviction_is_named():
    lost = ended(1, 137, "Error")
    evicted = pod(1, {"terminated": {"exitCode": 137, "finishedAt": stamp(T0 + 50)}}, phase="Failed", reason="Evicted",
                  message="The node was low on resource: memory.")  # fmt: skip
    assert lost.exit.reason == "Error"
    verdict = play((60, job("Failed"), [running(0), evicted]))
    assert verdict.reason == "Evicted"
    assert "low on resource" in verdict.message


def test_deadline_of_the_job_itself():
    late = job()
    late["status"]["conditions"] = [
        {"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "Job was active too long"}
    ]
    assert play((60, late, [running(0)])).reason == "DeadlineExceeded"


def test_the_operators_deadline_is_named_and_not_the_signals_with_which_it_ended_the_pods():
    late = job()
    said = "Job job has failed because it was active longer than specified deadline"
    late["status"]["conditions"] = [{"type": "Failed", "status": "True", "reason": "PyTorchJobFailed", "message": said}]
    verdict = play((60, late, [ended(0, 143), ended(1, 143)]))
    assert (verdict.state, verdict.reason) == ("failed", "DeadlineExceeded")


def test_restarts_are_counted_over_pods_and_containers():
    history, asked = History(), spec()
    history.see(job(), [running(0), running(1)], asked, T0)
    history.see(job(), [running(0), running(1, uid="second", created=T0 + 9)], asked, T0 + 10)
    history.see(job(), [running(0, restarts=2), running(1, uid="second", created=T0 + 9)], asked, T0 + 20)
    assert history.restarts == 3


def test_beyond_the_restarts_it_is_given_up():
    def after(count: int) -> Verdict:
        moments = [
            (
                10.0 * i,
                job("Running"),
                [running(0), ended(1, 137, "Error", T0 + 10 * i, uid=f"pod-{i}", created=T0 + 10 * i)],
            )
            for i in range(count + 1)
        ]
        return play(*moments)

    assert not after(2).over
    given_up = after(3)
    assert given_up.state == "failed"
    assert "cluster.job.restarts is 2" in given_up.message
    assert "exit code 137" in given_up.message
    assert given_up.exit_code == 1


def test_deleted_pods_count_as_restarts_too():
    moments = [(10.0 * i, job("Running"), [running(0), running(1, uid=f"p{i}", created=T0 + i)]) for i in range(4)]
    assert play(*moments).reason == "TooManyRestarts"


def test_refused_pods_are_named_though_the_job_has_no_conditions_at_all():
    event = {
        "reason": "FailedCreatePod", "lastTimestamp": stamp(T0 + 2), "metadata": {"creationTimestamp": stamp(T0)},
        "message": 'Error creating: pods "job-worker-1" is forbidden: violates PodSecurity "restricted:latest"',
    }  # fmt: skip
    refused = observe.refusal([event])
    early = play((3, job(), []), refused=refused)
    assert (early.state, early.reason) == ("waiting", "FailedCreate")
    late = play((3, job(), []), (70, job(), []), refused=refused)
    assert (late.state, late.reason) == ("failed", "FailedCreate")
    assert "PodSecurity" in late.message


def test_a_quota_may_become_free_so_it_waits_to_the_deadline():
    refused = observe.Refusal('pods "job-worker-1" is forbidden: exceeded quota: gpus', T0 + 2)
    assert play((3, job(), []), (99, job(), []), refused=refused).state == "waiting"
    late = play((3, job(), []), (101, job(), []), refused=refused)
    assert late.state == "failed"
    assert "exceeded quota" in late.message


def test_nobody_takes_the_job_up():
    verdict = play((101, job(), []))
    assert (verdict.state, verdict.reason) == ("failed", "NoOperator")


def test_a_deleted_job_is_a_failure():
    assert play((5, job("Running"), BOTH), (9, None, [])).reason == "Deleted"


def test_a_permanent_failure_that_the_operator_does_not_see_is_seen_by_us():
    pods = [running(0), ended(1, 2, "Error", at=T0 + 10)]
    assert play((11, job("Running"), pods)).state == "running"
    late = play((11, job("Running"), pods), (12 + GRACE_S, job("Running"), pods))
    assert (late.state, late.exit_code) == ("failed", 2)


def test_the_container_is_ours_whatever_was_injected():
    assert running(0).container == "pytorch"
