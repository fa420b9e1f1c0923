"""Runs a notebook as a person would, from the first cell to the last, in a kernel of this environment."""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat


def execute(path: Path, timeout_s: int) -> nbformat.NotebookNode:
    """The notebook with its outputs; raises nbclient's CellExecutionError at the first cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=timeout_s, kernel_name="python3", resources={"metadata": {"path": "."}}
    )
    return client.execute()


def output(notebook: nbformat.NotebookNode) -> str:
    """All text that the cells showed."""
    found = []
    for cell in notebook.cells:
        for each in cell.get("outputs", []):
            found += [each.get("text", ""), *(str(content) for content in each.get("data", {}).values())]
    return "\n".join(found)
