"""SIGTERM while training: remembered, answered once, and never lost between two trainings."""

from __future__ import annotations

import os
import signal

import pytest

from trainer.errors import Preempted
from trainer.train.preempt import Interrupted, Preemption


@pytest.fixture(autouse=True)
def handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def interrupted_with(error):
    with Preemption():
        terminate()
        raise error


def test_it_is_remembered_and_raised_when_polled():
    with Preemption() as preemption:
        preemption.poll()
        terminate()
        assert preemption.asked
        with pytest.raises(Interrupted):
            preemption.poll()


def test_a_request_after_the_last_poll_reaches_the_outer_one():
    with Preemption() as outer:
        with Preemption() as inner:
            terminate()
        assert inner.asked
        assert outer.asked


def test_a_request_reaches_the_outer_one_when_another_error_is_in_flight():
    with Preemption() as outer:
        with pytest.raises(ValueError, match="pruned"):
            interrupted_with(ValueError("pruned"))
        assert outer.asked


@pytest.mark.parametrize("answer", [Preempted("x", "y"), Interrupted()])
def test_an_answered_request_is_not_passed_on(answer):
    with Preemption() as outer:
        with pytest.raises(type(answer)):
            interrupted_with(answer)
        assert not outer.asked


def test_without_a_request_nobody_is_told():
    calls = []
    signal.signal(signal.SIGTERM, lambda *given: calls.append(given))
    with Preemption():
        pass
    assert calls == []
    with Preemption():
        terminate()
    assert calls == [(signal.SIGTERM, None)]


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_handler_that_cannot_be_called_is_put_back(before):
    signal.signal(signal.SIGTERM, before)
    with Preemption() as preemption:
        terminate()
    assert preemption.asked
    assert signal.getsignal(signal.SIGTERM) == before
