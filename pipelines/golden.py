"""Golden files: the compiled pipeline and the command line's help, as a reviewer sees them change.

python -m pipelines.golden            # rewrite tests/golden (make golden)
python -m pipelines.golden --check    # exit with 2 if one of them is not what the code makes
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from pipelines import compiler
from trainer import presets, storage
from trainer.config.load import validate
from trainer.config.text import parse_yaml

FOLDER = Path("tests/golden")
# Everything that params.yaml's `cluster` can say, beside the defaults.
_FULL = {
    "cluster": {
        "image_prefix": "registry.example/team/millrace", "image_tag": "v1", "pull_secrets": ["pull"], "user": 1000,
        "retries": 0, "secrets": {"AWS_ACCESS_KEY_ID": "object-store/access-key"}, "claim": "shared", "mount": "/data",
        "store": "/data/runs", "gpus_per_node": 4,
        "shm": "8Gi", "accelerator": "amd.com/gpu", "resources": {"train": {"cpu": "8", "memory": "64Gi"}},
    }
}  # fmt: skip

# Training and search as jobs of the cluster.
_JOBS = {
    "cluster": {
        "store": "s3://bucket/runs", "gpus_per_node": 8, "job": {"train": "pytorchjob", "tune": "experiment", "nodes": 2},
    }
}  # fmt: skip


def render() -> dict[str, str]:
    """Name -> content of each golden file."""
    default = validate(parse_yaml(presets.text(presets.DEFAULT), presets.DEFAULT))
    return {
        "pipeline.yaml": compiler.text(default),
        "pipeline-cluster.yaml": compiler.text(validate(_FULL)),
        "pipeline-jobs.yaml": compiler.text(validate(_JOBS)),
        "help.txt": _help(),
    }


def _help() -> str:
    from pipelines.cli import build_parser
    from pipelines.docs import parsers
    from trainer.__main__ import build_parser as build_stage_parser

    os.environ["COLUMNS"] = "120"  # argparse wraps lines at the terminal's width
    every = [*parsers(build_parser()), *parsers(build_stage_parser())]
    return "\n".join(f"$ {each.prog} --help\n{each.format_help()}" for each in every)


def changes(made: Mapping[str, str], folder: Path = FOLDER) -> list[str]:
    """Lines of a diff from the files to what the code makes; a file that is no longer made is one too."""
    lines: list[str] = []
    known = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    for name in sorted({*made, *known}):
        path = folder / name
        before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        lines += difflib.unified_diff(before, made.get(name, "").splitlines(), str(path), "made now", lineterm="", n=1)
    return lines


def main(words: list[str]) -> int:
    """Entry point of `python -m pipelines.golden`."""
    return settle(render(), FOLDER, words, "golden files differ")


def settle(made: Mapping[str, str], folder: Path, words: list[str], differ: str) -> int:
    """Write what the code makes, or with `--check` only say that the files differ; returns the exit status.

    Args:
        made: path below the folder -> content.
        folder: where the files are.
        words: of the command line.
        differ: the error, if they do.
    """
    found = changes(made, folder)
    if words == ["--check"]:
        if found:
            print("\n".join(found[:60]), file=sys.stderr)
            print(f"error: {differ}\n  fix: look at the change, then `make golden`", file=sys.stderr)
        return 2 if found else 0
    for name, content in made.items():
        storage.write_atomic(folder / name, content.encode())
    print(f"wrote {folder}" if found else f"{folder} is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
