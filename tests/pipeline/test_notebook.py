"""docs/quickstart.ipynb from its first cell to its last, with the laptop engine."""

import json

import pytest

from tests import notebook


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_runs(root, monkeypatch):
    monkeypatch.setenv("MILLRACE_ENGINE", "laptop")
    shown = notebook.output(notebook.execute(root / "docs" / "quickstart.ipynb", 600))
    assert "| candidate |" in shown
    assert "'asyncio'" in shown
    assert "docker.io/millrace/trainer" in shown


def test_the_committed_notebook_holds_no_outputs(root):
    cells = json.loads((root / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
