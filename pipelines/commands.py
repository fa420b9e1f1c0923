"""What each command of `millrace` does; each is `command(args) -> exit status`."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import project
from pipelines.dvcfile import CONTAINERS, KUBERNETES, OUT
from trainer import __version__, presets, storage
from trainer.config import Params
from trainer.config.load import dump, load
from trainer.config.names import nearest
from trainer.errors import EXIT_OK, ArtifactError, ConfigError, DataError, StorageError, redact

if TYPE_CHECKING:
    from trainer.registry import Registry

_OTHER_CHAMPION = (
    "make an earlier version the champion: `millrace registry rollback`, or restore the registry from a backup"
)


def run(args: Namespace) -> int:
    """`millrace run`."""
    from pipelines import local
    from trainer.stage import STAGES

    known = {"laptop": ["raw"], "docker": ["raw", "configure"], "kubernetes": []}[args.engine] + list(STAGES)
    if args.until and args.until not in known:
        raise ConfigError(f"--until {args.until}: no such stage; {nearest(args.until, known)}", "correct the name")
    if args.engine != "kubernetes":
        _refuse_cluster_words(args)
    if args.engine == "docker":
        from pipelines import containers

        return containers.run(args.overrides, until=args.until or "")
    if args.engine == "kubernetes":
        from pipelines import kubernetes_engine

        return kubernetes_engine.run(args)
    return local.run(args.overrides, force=args.force, only=[args.until] if args.until else None)


def _refuse_cluster_words(args: Namespace) -> None:
    for name in ("namespace", "attach", "resume", "cancel", "detach", "runs"):
        if getattr(args, name) not in (None, False):
            raise ConfigError(
                f"--{name}: is for --engine kubernetes", f"add --engine kubernetes, or leave --{name} out"
            )


def new(args: Namespace) -> int:
    """`millrace new`."""
    from pipelines.screen import program

    folder = Path(args.folder)
    params = project.new(folder, Path(args.data), args.text, args.label, args.preset, args.overrides)
    print(f"made {folder}: params.yaml, dvc.yaml and {redact(params.data.source)}, which DVC versions")
    print(f"next: cd {folder} && {program()} run")
    return EXIT_OK


def preset(args: Namespace) -> int:
    """`millrace preset ls|show|use`."""
    if args.action == "ls":
        for name in presets.names():
            print(f"{name:<18}{presets.summary(name)}")
    elif args.action == "show":
        print(presets.text(args.name), end="")
    else:
        _use_preset(args.name, Path(project.PARAMS), args.force)
    return EXIT_OK


def _use_preset(name: str, path: Path, force: bool) -> None:
    content = presets.text(name)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if before and not force and before not in [presets.text(known) for known in presets.names()]:
        raise ConfigError(f"{path}: has changes of yours", "keep a copy of it, then add --force")
    with project.held(path.parent) if (path.parent / ".dvc").is_dir() else nullcontext():
        presets.use(name, path)
        if (path.parent / "dvc.yaml").is_file():
            project.configure(path.parent, [])
    print(f"wrote {path}: {content.splitlines()[0].lstrip('# ')}")


def predict(args: Namespace) -> int:
    """`millrace predict`: inputs in, a line of JSON each out, a batch at a time."""
    from trainer.predict import Predictor

    with tempfile.TemporaryDirectory(prefix="millrace-") as cache:
        predictor = Predictor(_model_folder(args.model, Path(cache)))
    inputs = iter(args.texts) if args.texts else _read_inputs(args.file, args.text)
    count = 0
    while batch := list(islice(inputs, args.batch_size)):
        for row in predictor.predict(batch, batch_size=args.batch_size):
            print(json.dumps(row, ensure_ascii=False))
        sys.stdout.flush()
        count += len(batch)
    if not count:
        raise DataError("predict: no input", 'give texts, --file FILE or lines on stdin: millrace predict "a text"')
    return EXIT_OK


def _model_folder(given: str | None, cache: Path) -> Path:
    """The folder of a model: the one given, the champion (below `cache`, if its registry is remote), or the last run's.

    Raises:
        ArtifactError: there is none.
    """
    if given:
        path = Path(given)
        if not path.is_dir():
            raise ArtifactError(f"--model {given}: no such folder", "name a model folder such as out/quantized")
        return _verified(path)
    from trainer.registry import Registry

    params = _params()
    uri = params.promote.registry
    if storage.is_remote(uri) or Path(uri).is_dir():
        registry = Registry(uri)
        champion = registry.champion(params.promote.model)
        if champion:
            try:
                return registry.fetch(params.promote.model, champion.version, "model", cache)
            except ArtifactError as error:
                raise ArtifactError(error.message, _OTHER_CHAMPION) from error
    made = [path for folder in (OUT, f"{CONTAINERS}/latest") if (path := Path(folder) / "quantized").is_dir()]
    if made:
        return _verified(max(made, key=lambda path: path.stat().st_mtime))
    raise ArtifactError("no model: the registry has no champion and no run has made one", "make one: millrace run")


def _verified(path: Path) -> Path:
    """The folder itself, whose bytes are those that its manifest lists; a model of others may come without one.

    Raises:
        ArtifactError: a file is missing, surplus or altered.
    """
    from trainer.artifacts import manifest

    if (path / storage.MANIFEST).is_file():
        manifest.read(path, "model")
    return path


def _params() -> Params:
    """params.yaml of the working folder, or the defaults where there is none."""
    return load(project.PARAMS if Path(project.PARAMS).is_file() else None)


def _read_inputs(file: str | None, key: str) -> Iterator[str]:
    if not file:
        yield from _inputs_of(getattr(sys.stdin, "buffer", sys.stdin), "stdin", key)
        return
    with storage.explained(file):
        if Path(file).is_dir():
            raise StorageError(f"--file {file}: is a folder", "name a file")
        with open(file, "rb") as lines:
            yield from _inputs_of(lines, file, key)


def _inputs_of(lines: Iterable[bytes | str], name: str, key: str) -> Iterator[str]:
    """A text for each line that is not empty; a line that is a JSON object or JSON text is read as such."""
    for number, raw in enumerate(lines, 1):
        try:
            line = raw.decode() if isinstance(raw, bytes) else raw
        except UnicodeDecodeError as error:
            raise DataError(f"{name}:{number}: not UTF-8 ({error.reason})", "save it as UTF-8") from None
        line = line.removeprefix("\ufeff" if number == 1 else "").rstrip("\r\n")
        if line.strip():
            yield _input_of(line, f"{name}:{number}", key)


def _input_of(line: str, where: str, key: str) -> str:
    start = line.lstrip()[0]
    if start not in '{"':
        return line
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        if start == '"':  # a text may begin with a quotation
            return line
        hint = f'correct it, or write a text that begins with {{ as {{"{key}": "..."}}'
        raise DataError(f"{where}: begins with {{ but is no JSON object: {error}", hint) from None
    if isinstance(value, dict):
        if not isinstance(value.get(key), str):
            raise DataError(f"{where}: the object has no text at key {key!r}; {nearest(key, value)}", "give --text KEY")
        value = value[key]
    return value if isinstance(value, str) else line


def registry(args: Namespace) -> int:
    """`millrace registry ls|show|rollback|promote`."""
    from trainer.registry import Registry

    found = Registry(args.uri or _params().promote.registry)
    if args.action != "ls":
        model, version = _model_and_version(found, args.model, args.version)
    if args.action == "show":
        print(json.dumps(found.show(model, version), indent=1, ensure_ascii=False))
    elif args.action in ("rollback", "promote"):
        if args.action == "promote" and not version:
            raise ConfigError(
                "registry promote: VERSION is missing", "name one of `millrace registry ls`, such as v0002"
            )
        entry = found.rollback(model, version) if args.action == "rollback" else found.name_champion(model, version)
        print(f"{model}: the champion is {entry['version']} (was {entry['previous'] or 'none'})")
    else:
        rows = found.list_versions(args.model)
        if not rows:
            print(f"no versions in {found.uri}", file=sys.stderr)
        for row in rows:
            print(_version_line(row))
    return EXIT_OK


def _model_and_version(found: Registry, model: str, version: str) -> tuple[str, str]:
    """The words MODEL and VERSION, either of which may be left out.

    Raises:
        ConfigError: no model was named, and the registry holds several, none of them that of params.yaml.
    """
    known = found.models()
    if not version and model not in known and re.fullmatch(r"v\d{4,9}", model):
        model, version = "", model
    if model:
        return model, version
    own = _params().promote.model
    if own not in known and len(known) > 1:
        raise ConfigError(f"registry {found.uri}: which model? it holds {', '.join(known)}", "name the MODEL")
    return (own if own in known or not known else known[0]), version


def _version_line(row: dict[str, Any]) -> str:
    from pipelines.screen import size

    metrics = row["metrics"]
    score = next((f"{name} {metrics[name]:.4f}" for name in ("accuracy", "bits_per_byte") if name in metrics), "")
    facts = f"{row['version']}  {row['created']}  {row['decision']:<9} {score:<20} {size(row['bytes']):>8}"
    return f"{'*' if row['champion'] else ' '} {row['model']:<20} {facts}"


def report(args: Namespace) -> int:
    """`millrace report`: the path on stdout, for a person or another program."""
    # Of the run of one of the engines, whichever was later.
    paths = [
        Path(folder) / "evaluation" / "report.html" for folder in (OUT, f"{CONTAINERS}/latest", f"{KUBERNETES}/latest")
    ]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise ArtifactError(f"{paths[0]}: no such file", "make one: millrace run")
    path = max(found, key=lambda path: path.stat().st_mtime)
    print(path)
    if args.open:
        import webbrowser

        if not webbrowser.open(path.absolute().as_uri()):
            print("no browser found; open the file yourself", file=sys.stderr)
    return EXIT_OK


def config(args: Namespace) -> int:
    """`millrace config`."""
    from pipelines import reference

    if args.schema:
        print(reference.schema())
    elif args.print_config or args.overrides:
        print(dump(load(project.PARAMS if Path(project.PARAMS).is_file() else None, args.overrides)), end="")
    else:
        print(reference.table())
    return EXIT_OK


def doctor(args: Namespace) -> int:
    """`millrace doctor`."""
    from pipelines import doctor as found

    where = {name: getattr(args, name) for name in ("namespace", "system", "account", "store")}
    return found.run(args.cluster, args.json, args.overrides, **where)


def version(args: Namespace) -> int:
    """`millrace version`."""
    print(f"millrace {__version__}")
    return EXIT_OK
