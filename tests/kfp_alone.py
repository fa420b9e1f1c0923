"""What tests against a server of their own have in common."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines import client, kfp_api


def alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test with a server of its own: an empty working folder, no settings of this machine, and short waits."""
    for name in list(os.environ):
        if name.startswith(("MILLRACE_KFP", "KUBERNETES_SERVICE", "KF_PIPELINES")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(kfp_api, "BACKOFF_S", 0.001)
    monkeypatch.setattr(client, "POLL_S", 0.02)
