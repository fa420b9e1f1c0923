"""The laptop engine: `millrace run [section.key=value ...]` around `dvc repro`."""

from __future__ import annotations

import collections
import json
import sys
import time
from pathlib import Path

import yaml

from pipelines import dvcfile, lockfile, project, screen
from pipelines.dvcfile import OUT, READS_REGISTRY
from pipelines.engine import Event, Repro
from trainer import storage
from trainer.config import Params
from trainer.config.load import load, parse_override, read_tree
from trainer.data.naming import model_name
from trainer.errors import EXIT_OK, EXIT_REFUSED, StorageError, redact
from trainer.parallel import fits
from trainer.registry import Registry

LOG = f"{OUT}/run.log"
BEFORE_TRAINING = ("raw", "preprocess", "tune")


def run(overrides: list[str], *, force: bool = False, only: list[str] | None = None) -> int:
    """Run what is not up to date in the working folder; returns the exit status of the stage that failed, or 0.

    Args:
        overrides: words `section.key=value`, written to params.yaml.
        force: run all stages.
        only: names of stages; they and what they need are run, and nothing after them.

    Raises:
        ConfigError: an override is wrong, or the model cannot be divided among the ranks; nothing was written.
        DataError: the raw data is not there; nothing was written.
    """
    folder = Path()
    project.require(folder)
    params = load(folder / project.PARAMS, overrides)
    dvcfile.render(params)  # what is wrong is said before a file is written
    check_ranks(params, only[-1] if only else "")
    with project.held(folder) as lock:
        return _run(folder, overrides, force, only or [], lock)


def _run(folder: Path, overrides: list[str], force: bool, only: list[str], lock: int) -> int:
    started = time.monotonic()
    overrides = [*overrides, *model_of_new_source(folder, overrides)]
    params = project.configure(folder, overrides)
    project.prepare(folder)
    stages = list(yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
    runs = [[*only, "--force"] if force else only]
    if not force and not only and champion_moved(params):
        runs.append(["--force", "--single-item", *READS_REGISTRY])
    board = screen.Board(stages)
    paint = board.paint
    print(f"{paint('millrace', 'bold')} {params.promote.model}  {paint(redact(params.data.source), 'dim')}", flush=True)
    for uri in dvcfile.unwatched(params):
        print(f"  not watched for changes: {redact(uri)}; `{screen.program()} run --force` reads it again", flush=True)
    code = EXIT_OK
    for words in runs:
        code = code or _repro(Repro(folder, words, keep=(lock,)), board)
    for stage in lockfile.drop_untrue(folder, params, board.ran):
        print(f"warning: {project.PARAMS} was changed while {stage} ran with what it held before\n"
              f"  fix: the next run makes {stage} again", file=sys.stderr)  # fmt: skip
    if code or only:
        if not code and not board.ran:
            print(f"  {paint('Up to date', 'bold', 'green')}: nothing has changed, no stage was run.")
        elif not code:
            print(f"  Stopped after {only[-1]}, as asked.")
        return code
    champion = present_champion(params)
    for line in screen.last_screen(folder, paint, time.monotonic() - started, len(board.ran), champion=champion):
        print(line)
    sys.stdout.flush()
    promotion = storage.read_json(folder / OUT / "promotion" / "promotion.json")
    return EXIT_OK if promotion.get("decision") == "promoted" else EXIT_REFUSED


def check_ranks(params: Params, until: str, nodes: int = 1) -> None:
    """Refuse ranks that cannot divide the model before data is prepared for it, unless the run ends before training.

    Args:
        params: the configuration.
        until: the run's last stage; empty for all.
        nodes: that train together.

    Raises:
        ConfigError: as `trainer.parallel.fits.check_ahead`.
    """
    if until not in BEFORE_TRAINING:
        fits.check_ahead(params, params.train.processes * nodes)


def _repro(repro: Repro, board: screen.Board) -> int:
    """One `dvc repro`, shown on the board and logged; returns its exit status after telling why it failed."""
    tail: collections.deque[str] = collections.deque(maxlen=screen.TAIL)
    path = repro.folder / LOG
    path.parent.mkdir(exist_ok=True)
    failed: list[str] = []
    with storage.explained(path), open(path, "a", encoding="utf-8") as log:

        def on_event(event: Event) -> None:
            if event.kind == "running":
                tail.clear()
                board.start(event.stage)
            elif event.kind == "line":
                tail.append(event.text)
                board.line(event.stage, event.text)
            elif event.kind == "failed" and repro.busy:
                pass  # the stage did not begin
            elif event.kind == "failed":
                failed.append(event.stage)
                board.failed(event.stage, repro.exit_code)
            else:
                {"unchanged": board.skipped, "restored": board.restored, "done": board.done, "tick": board.tick}[
                    event.kind
                ](event.stage)
            if event.text:
                log.write(redact(event.text) + "\n")

        try:
            code = repro.run(on_event, tick_s=0.1 if board.live else 0.0)
        finally:
            board.end()
    if code:
        _explain(code, failed, list(tail) if board.live else [], repro.errors, repro)
    return code


def _explain(code: int, failed: list[str], tail: list[str], errors: list[str], repro: Repro) -> None:
    paint = screen.Paint(sys.stderr)
    say = sys.stderr.write
    sys.stdout.flush()
    if repro.interrupted:
        say(
            "\nstopped; what is complete is kept, and a checkpoint where there is one\n  fix: the same command goes on\n"
        )
        return
    for line in tail:
        say(f"  {paint('|', 'dim')} {line}\n")
    for line in errors:
        say(f"error: dvc: {redact(line)}\n")
    if repro.busy:
        say("  fix: another `millrace run` or dvc command works in this folder; wait for it to end\n")
    if failed:
        say(screen.ended(paint, failed[0], code))
        say(f"  its output: {LOG}; after the fix, the same command goes on where it stopped\n")


def champion_moved(params: Params) -> bool:
    """Whether the champion is another one than the last run left, or none: DVC does not see that.

    It is after a rollback, when somebody else promoted, or when the registry was deleted. The candidate is then judged
    again, against the champion of today.
    """
    verdict = storage.read_json(Path(OUT) / "promotion" / "promotion.json")
    if (verdict.get("registry"), verdict.get("model")) != (params.promote.registry, params.promote.model):
        return False
    try:
        champion = Registry(params.promote.registry).champion(params.promote.model)
    except StorageError:
        return False
    if not champion:
        return bool(verdict.get("champion"))
    known = (verdict.get("champion"), verdict.get("champion_digest", champion.digest))
    return known != (champion.version, champion.digest)


def present_champion(params: Params) -> str | None:
    """The champion's version; empty if there is none, None if the registry cannot be asked."""
    try:
        champion = Registry(params.promote.registry).champion(params.promote.model)
    except StorageError:
        return None
    return champion.version if champion else ""


def model_of_new_source(folder: Path, overrides: list[str]) -> list[str]:
    """`promote.model=NAME` when the data becomes other data and no name is given.

    A champion is only beaten on its own test set; a model of other data with other labels is another model.
    """
    values = dict(parse_override(word) for word in overrides)
    source = str(values.get("data.source", ""))
    before = (read_tree(folder / project.PARAMS).get("data") or {}).get("source")
    if not source or source == before or "promote.model" in values:
        return []
    return [f"promote.model={json.dumps(model_name(source))}"]  # quoted: the name may be 2024 or null
