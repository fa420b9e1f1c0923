"""A project on disk: a folder with params.yaml, dvc.yaml and .dvc, be it the clone or one made by `millrace new`."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines import dvcfile
from trainer import presets, storage
from trainer.config import Params
from trainer.config.load import COMMAND_LINE, apply_overrides, load, read_tree, validate
from trainer.config.text import parse_yaml
from trainer.data.naming import model_name
from trainer.errors import ConfigError, DataError, MillraceError

PARAMS = "params.yaml"
CONFIG = "[core]\n    analytics = false\n    check_update = false\n    autostage = false\n"
IGNORED_BY_DVC = (
    "# Folders in which DVC looks for nothing.\n.venv\nregistry\nout/.scratch\nout/containers\nout/kubernetes\n"
)
IGNORED_BY_GIT = "/out/\n/registry/\n/data/raw/\n/dvc_plots/\n"
LOCAL_DVC_FILES = "/config.local\n/tmp\n/cache\n"


def environment() -> dict[str, str]:
    """Environment of DVC and of the stages: this Python first on the path, and nothing phones home."""
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env |= {"DVC_NO_ANALYTICS": "1", "DVC_STUDIO_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    return env


def require(folder: Path) -> None:
    """Check that a folder is a project.

    Raises:
        ConfigError: there is no params.yaml.
    """
    if not (folder / PARAMS).is_file():
        raise ConfigError(
            f"{folder / PARAMS}: no such file",
            "go to the project's folder, or make one with `millrace new DIR --data FILE --text COL --label COL`",
        )


def require_installed(who: str, *modules: str) -> None:
    """Check that the extra `kfp` is installed.

    Raises:
        MillraceError: a module is missing; the message says that `who` needs it.
    """
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        raise MillraceError(
            f"{who} needs {error.name}, which is not installed", "pip install 'millrace[kfp]'"
        ) from None


def prepare(folder: Path) -> None:
    """Make .dvc and tell DVC whether there is git: a folder without git is a project as well."""
    config = folder / ".dvc" / "config"
    if not config.is_file():
        storage.write_atomic(config, CONFIG.encode())
        storage.write_atomic(folder / ".dvc" / ".gitignore", LOCAL_DVC_FILES.encode())
    (folder / ".dvc" / "tmp").mkdir(exist_ok=True)
    local = folder / ".dvc" / "config.local"
    section = "[core]\n    no_scm = true\n"
    text = local.read_text(encoding="utf-8") if local.is_file() else ""
    if inside_git(folder):
        if text == section:
            local.unlink()
    elif "no_scm" not in text:
        storage.write_atomic(local, (text + section).encode())


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """Keep other commands that write params.yaml out of a project; the system lets go when the process dies.

    Gives the descriptor that holds the lock, for a child process that is to hold it as well.

    Raises:
        MillraceError: another process works in the project; nothing was written.
    """
    path = folder / ".dvc" / "tmp" / "millrace.lock"
    with storage.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MillraceError(
                "another `millrace run` works in this folder", "wait for it to end, or stop it"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield descriptor
    finally:
        os.close(descriptor)


def inside_git(folder: Path) -> bool:
    """Whether the folder is the root of a git work tree, or lies in one."""
    return any((parent / ".git").exists() for parent in (folder.absolute(), *folder.absolute().parents))


def configure(folder: Path, overrides: list[str]) -> Params:
    """Write overrides into a project's params.yaml, keeping its comments, and bring dvc.yaml up to date.

    Nothing is written unless all of it is right.

    Raises:
        ConfigError: an override or the file is wrong.
        DataError: data.source is a local path at which nothing is.
    """
    require(folder)
    path = folder / PARAMS
    params = load(path, overrides)
    text = dvcfile.render(params)
    write_params(folder, overrides)
    dvcfile.write(folder, text)
    return params


def write_params(folder: Path, overrides: list[str]) -> None:
    """Write overrides, which are right, into a project's params.yaml, and nothing else."""
    path = folder / PARAMS
    before = read_tree(path)
    tree = apply_overrides(before, overrides)
    if tree != before:
        storage.write_atomic(path, edit(path.read_text(encoding="utf-8"), tree).encode())


def edit(text: str, tree: Mapping[str, Any]) -> str:
    """The YAML text changed so that it holds `tree`, with its comments and order kept."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.preserve_quotes = True
    # As it was written, not as nothing at all.
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    document = yaml.load(text)
    if document is None:
        document = yaml.map()
    _merge(document, tree)
    out = StringIO()
    yaml.dump(document, out)
    if parse_yaml(out.getvalue(), PARAMS) != _plain(tree):
        raise AssertionError("the edited file does not hold the new values")
    return out.getvalue()


def _merge(node: Any, tree: Mapping[str, Any]) -> None:
    for key in [key for key in node if key not in tree]:
        del node[key]
    for key, value in tree.items():
        if isinstance(value, Mapping) and isinstance(node.get(key), Mapping):
            _merge(node[key], value)
        elif key not in node or node[key] != value or type(value) is bool:
            node[key] = _flow(value)


def _flow(value: Any) -> Any:
    """Lists are written on one line, as in the presets."""
    from ruamel.yaml.comments import CommentedSeq

    if isinstance(value, (list, tuple)):
        sequence = CommentedSeq(_flow(item) for item in value)
        sequence.fa.set_flow_style()
        return sequence
    return {key: _flow(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def new(folder: Path, data: Path, text: str, label: str, preset: str, overrides: list[str]) -> Params:
    """Make a project: the data is copied into data/ and put under DVC, params.yaml is the preset with the columns set.

    Raises:
        ConfigError: the folder is not empty, or an override is wrong.
        DataError: there is no such data, it has not these columns, or the stage preprocess could make nothing of it.
    """
    data = data.expanduser()
    if not data.exists():
        raise DataError(f"--data {data}: no such file or folder", "correct the path")
    if not data.is_file() and not data.is_dir():
        raise DataError(f"--data {data}: neither a file nor a folder", "name a file or a folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is there already and is not empty", "name a folder that does not exist yet")
    place = f"data/{data.name}"
    # As they are, not as YAML: a column may be called 1, null or true.
    values = {"data.source": place, "data.text": text, "data.label": label, "promote.model": model_name(place)}
    content = presets.text(preset)
    tree = apply_overrides(apply_overrides(parse_yaml(content, preset), values), overrides)
    params = validate(tree, COMMAND_LINE)
    _check_data(data, params)
    existed = folder.is_dir()
    # Built aside, on the same file system: a failure leaves what was there before.
    aside = folder / ".millrace-new" if existed else folder.with_name(f".{folder.name}.millrace-new")
    try:
        with storage.explained(folder):
            storage.remove(aside)
            _make_folder(aside, folder)
            # What a preset says of its own data is not true of this one.
            head, _, body = edit(content, tree).partition("\n\n")
            about = f"# {params.promote.model}: made by `millrace new` from {json.dumps(data.name)} and the preset {preset}.\n"
            about += (
                "# `millrace config` lists every key with its type and bounds; any can be given on the command line.\n"
            )
            _build(aside, data, place, f"{about}\n{body}" if head.startswith("#") else f"{about}\n{head}\n\n{body}")
            if existed:
                for path in sorted(
                    aside.iterdir(), key=lambda path: path.name == PARAMS
                ):  # what makes it a project, last
                    path.rename(folder / path.name)
                aside.rmdir()
            else:
                aside.rename(folder)
    except BaseException:
        storage.remove(aside)
        raise
    return params


def _make_folder(aside: Path, folder: Path) -> None:
    """Make the folder `aside`; an error names `folder`, the one that was asked for."""
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def _check_data(data: Path, params: Params) -> None:
    """Raises a DataError or ConfigError for what the stage preprocess is sure to refuse, without reading all of it."""
    from trainer.data.chunks import check_columns
    from trainer.data.clean import make_cleaner
    from trainer.data.sources import resolve

    make_cleaner(params.data.clean)
    with tempfile.TemporaryDirectory(prefix="millrace-") as work:
        files = resolve(str(data), params.data.format, Path(work)).files
    if params.task.name != "lm" and any(file.format == "text" for file in files):
        raise DataError(
            f"--data {data}: plain text has no labels", "add --preset code-lm, or give a CSV with a label column"
        )
    with storage.explained(data):
        if all(file.format in ("csv", "tsv", "images") and not _has_rows(file.path, params) for file in files):
            raise DataError(f"--data {data}: no rows below the header", "give it rows")
        if data.is_file():
            try:
                check_columns(files[0], params.data.encoding, (params.data.text, params.data.label), params.task.name)
            except DataError as error:
                hint = error.hint.replace("data.text", "--text").replace("data.label", "--label")
                raise DataError(error.message, hint) from None


def _has_rows(path: Path, params: Params) -> bool:
    """Whether a table has more than its header's line."""
    with open(path, encoding=params.data.encoding, errors="replace") as lines:
        return sum(1 for _ in islice(filter(str.strip, lines), 2)) > 1


def _build(folder: Path, data: Path, place: str, content: str) -> None:
    """Write a whole project into an empty folder."""
    with storage.explained(folder):
        (folder / "data").mkdir()
        target = folder / place
        if data.is_dir():
            shutil.copytree(data, target)
        else:
            shutil.copyfile(data, target)
        (folder / PARAMS).write_text(content, encoding="utf-8")
        (folder / ".dvcignore").write_text(IGNORED_BY_DVC, encoding="utf-8")
        (folder / ".gitignore").write_text(IGNORED_BY_GIT, encoding="utf-8")
        # DVC writes this line only where there is git already, and takes no data that git tracks as well.
        ignored = "/" + re.sub(r"([\\*?\[\]!# ])", r"\\\1", data.name) + "\n"
        (folder / "data" / ".gitignore").write_text(ignored, encoding="utf-8")
        prepare(folder)
    dvc(folder, "add", "-q", place)
    before = Path.cwd()
    os.chdir(folder)  # the paths of dvc.yaml are relative to the project's folder
    try:
        configure(Path(), [])
    finally:
        os.chdir(before)


def dvc(folder: Path, *words: str) -> str:
    """Run a DVC command in a project's folder and return its output.

    Raises:
        MillraceError: it failed; the message is DVC's own.
    """
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise MillraceError(f"dvc {' '.join(words)}: {done.stderr.strip()}", "see DVC's message")
    return done.stdout
