"""What several unit tests take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.kfp_server import KfpServer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    """A KFP server that the environment names; it must have had nothing to object to: no two schedules at once, no run killed."""
    from tests.kfp_alone import alone
    from tests.kfp_server import KfpServer

    alone(tmp_path, monkeypatch)
    with KfpServer() as found:
        monkeypatch.setenv("MILLRACE_KFP_HOST", found.url)
        yield found
        assert found.problems == []
        assert found.most_enabled <= 1
        assert found.killed == []
