"""dvc.yaml, generated from the stage table and params.yaml: the laptop engine's whole graph.

python -m pipelines.dvcfile            # rewrite dvc.yaml in the working folder
python -m pipelines.dvcfile --check    # exit with 2 if it is not what the stage table and params.yaml say

Each stage depends on its input folders and on just its own sections of params.yaml. Three things are not plain:

- A built-in source is written to data/raw by a stage of its own, so that raw data is a DVC output with its md5 in
  dvc.lock, and preprocess reads that file.
- `promote` says yes or no, and a no is an answer, not a failure: a failed stage would lose the whole `dvc exp run`.
- `evaluate` and `promote` read the registry, which DVC does not track; `persist` keeps them out of DVC's run cache,
  which would otherwise bring back a verdict on a champion of the past.
"""

from __future__ import annotations

import shlex
import sys
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import yaml

from trainer import storage
from trainer.config import Params
from trainer.config.load import load
from trainer.errors import ConfigError, DataError, MillraceError
from trainer.stage import STAGES, Stage

HEADER = """\
# The pipeline as DVC runs it: `millrace run`, `dvc repro` or `dvc exp run -S train.epochs=12`.
# Generated from trainer/stage.py and params.yaml by pipelines/dvcfile.py; `millrace run` keeps it up to date.
"""
OUT = "out"
CONTAINERS = f"{OUT}/containers"  # of the container engine; DVC knows nothing of it
KUBERNETES = f"{OUT}/kubernetes"  # of the cluster engine, likewise
RAW = "data/raw"
BUILTIN = "builtin:"
# Their verdict depends on the registry as well as on what DVC tracks.
READS_REGISTRY = ("evaluate", "promote")
METRICS = f"{OUT}/evaluation/metrics.json"


def out(port: str) -> str:
    """Folder of an artifact, by the name of its port."""
    return f"{OUT}/{port}"


def raw_file(source: str) -> str:
    """File to which a built-in source is written, from `builtin:NAME`."""
    from trainer.data.builtin import SOURCES

    name = source.removeprefix(BUILTIN)
    if name not in SOURCES:
        from trainer.config.names import nearest

        raise ConfigError(
            f"data.source: {source!r} is not a built-in source; {nearest(name, SOURCES)}", "correct the name"
        )
    return f"{RAW}/{name}.jsonl"


def source_paths(source: str) -> list[str]:
    """Local files and folders that DVC watches for changes; none for remote sources, which have versions of their own.

    Raises:
        DataError: nothing is there.
    """
    if source.startswith("dvc:") or storage.is_remote(source):
        return []
    path = str(storage.local_path(source))
    if Path(path).exists():
        return [path]
    found = sorted(glob(path, recursive=True)) if has_magic(path) else []
    if not found:
        raise _missing("data.source", source)
    return [name for name in found if Path(name).is_file()] or found


def watched(key: str, uri: str) -> list[str]:
    """The local path, if it is one, of a file or folder that a stage reads besides its inputs.

    Raises:
        DataError: nothing is there.
    """
    if not uri or storage.is_remote(uri):
        return []
    path = str(storage.local_path(uri))
    if not Path(path).exists():
        raise _missing(key, uri)
    return [path]


def _missing(key: str, uri: str) -> DataError:
    return DataError(f"{key}: {uri}: no such file or folder", "correct the path, in params.yaml or on the command line")


def unwatched(params: Params) -> list[str]:
    """URIs whose changes DVC does not see: remote ones, and a DVC repository without a revision."""
    source = params.data.source
    if source.startswith("dvc:"):
        from trainer.data.dvc_source import parse_dvc

        found = [] if parse_dvc(source)[1] else [source]
    else:
        found = [source] if storage.is_remote(source) else []
    return [*found, *(uri for uri in teachers(params) if storage.is_remote(uri))]


def teachers(params: Params) -> tuple[str, ...]:
    """URIs of the teachers that the stage distill reads besides the trained model."""
    return params.distill.teachers if params.distill.enabled else ()


def build(params: Params) -> dict[str, Any]:
    """The content of dvc.yaml.

    Raises:
        ConfigError: the built-in source has no such name.
        DataError: the source, the tokenizer or a teacher is a local path at which nothing is.
    """
    stages: dict[str, Any] = {}
    source = params.data.source
    overrides: list[str] = []
    if source.startswith(BUILTIN):
        raw = raw_file(source)
        name = source.removeprefix(BUILTIN)
        stages["raw"] = {
            "desc": f"write the built-in source {name} to a file, which DVC versions",
            "cmd": f"python -m trainer.data.builtin {shlex.quote(name)} --out {shlex.quote(raw)}",
            "outs": [raw],
        }
        overrides = [f"data.source={raw}"]
        paths = [raw]
    else:
        paths = source_paths(source)
    files = {
        "preprocess": [*paths, *watched("data.tokenizer.path", params.data.tokenizer.path)],
        "distill": [path for uri in teachers(params) for path in watched("distill.teachers", uri)],
    }
    for stage in STAGES.values():
        stages[stage.name] = _entry(stage, [] if stage.inputs else overrides, files.get(stage.name, []))
    return {"stages": stages, "metrics": [METRICS], "plots": plots()}


def _entry(stage: Stage, overrides: list[str], paths: list[str]) -> dict[str, Any]:
    words = ["python", "-m", "trainer", stage.name, "--params", "params.yaml"]
    for port in stage.inputs:
        words += ["--in", f"{port}={out(port)}"]
    for port in stage.outputs:
        words += ["--out", f"{port}={out(port)}"]
    if stage.name == "promote":
        words.append("--allow-refusal")
    entry: dict[str, Any] = {"desc": stage.help, "cmd": shlex.join([*words, *overrides])}
    deps = list(dict.fromkeys([*paths, *(out(port) for port in stage.inputs)]))
    if deps:
        entry["deps"] = deps
    entry["params"] = list(stage.sections)
    persist = {"persist": True}
    entry["outs"] = [{out(port): persist} if stage.name in READS_REGISTRY else out(port) for port in stage.outputs]
    return entry


def plots() -> list[dict[str, Any]]:
    """What `dvc plots show` draws, from tables that the stage evaluate writes."""
    learning, predictions = f"{OUT}/evaluation/learning.csv", f"{OUT}/evaluation/predictions.csv"
    return [
        {"training loss": {"x": "step", "y": {learning: "train_loss"}, "y_label": "loss"}},
        {"validation loss": {"x": "step", "y": {learning: "val_loss"}, "y_label": "loss"}},
        {
            "confusion": {
                "x": {predictions: "actual"},
                "y": {predictions: "predicted"},
                "template": "confusion",
            }
        },
    ]


def render(params: Params) -> str:
    """The text of dvc.yaml."""
    return HEADER + yaml.safe_dump(build(params), sort_keys=False, width=1000, allow_unicode=True)


def write(folder: Path, text: str) -> bool:
    """Rewrite dvc.yaml in a project folder if it differs; returns whether it did."""
    path = folder / "dvc.yaml"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    storage.write_atomic(path, text.encode())
    return True


def main(words: list[str]) -> int:
    """Entry point of `python -m pipelines.dvcfile`."""
    try:
        params = load("params.yaml")
        if words == ["--check"]:
            path = Path("dvc.yaml")
            if not path.is_file() or path.read_text(encoding="utf-8") != render(params):
                raise ConfigError("dvc.yaml: not what params.yaml says", "run python -m pipelines.dvcfile")
        else:
            write(Path(), render(params))
    except MillraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
