"""The model registry: versions that are never overwritten, and one champion per model, at any storage URI.

    URI/MODEL/versions/v0001/   model/           the candidate's folder as it was judged
                                test/            the test split it was judged on, a dataset folder of its own
                                evaluation.json  the figures that it was entered with
                                version.json     written last: a version without it is not there
    URI/MODEL/promotions/000001.json             the log; the newest entry names the champion
    URI/MODEL/judgements/000001.json             each time a candidate was judged: what came of it, why, on what figures
    URI/MODEL/champion.json                      a copy of the newest entry, for people and other tools

Nothing is changed in place. A version is built aside and renamed into its number (on object stores: its number is
claimed, and version.json comes last). An entry of the log is created exclusively: of two promoters that both expect
the same champion one wins and the other is told to evaluate again. So a reader, at any moment and after any crash,
finds whole versions and one champion.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer import storage
from trainer.artifacts import manifest
from trainer.config.names import nearest
from trainer.errors import ArtifactError, ConfigError, GateRefused
from trainer.registry_store import Store, copy_tree, open_store

FORMAT = 1
_MODEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_VERSION = re.compile(r"v\d{4,9}")
_ENTRY = re.compile(r"(\d{6,9})\.json")


@dataclass(frozen=True)
class Version:
    """A model that was entered; `version` is its name (v0001), `digest` the candidate's artifact digest."""

    version: str
    digest: str
    created: str
    bytes: int
    dataset_digest: str
    data_version: str
    evaluation_digest: str
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Promotion:
    """An entry of the log: from now on `version` is the champion.

    `action` is `promote` (the gate let it pass), `rollback`, or `name` (a person named it, whatever the gate says).
    """

    number: int
    action: str
    version: str
    digest: str
    previous: str
    reason: str
    time: str


@dataclass(frozen=True)
class Judgement:
    """What came of judging a version once; a version may be judged again, against another champion or baseline.

    `decision` is `promoted` or `refused`, `event` the number of the promotion log's newest entry by then (0: it was empty).
    """

    number: int
    version: str
    digest: str
    decision: str
    reason: str
    event: int
    time: str
    evaluation: dict[str, Any] = field(default_factory=dict)


class Registry:
    """A registry at a storage URI. Every method reads what is there now; nothing is cached."""

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri).rstrip("/") or "/"
        self.store: Store = open_store(self.uri)

    # Reading

    def models(self) -> list[str]:
        """Names of the models that have versions or a champion, sorted."""
        return [name for name in self.store.names("") if _MODEL.fullmatch(name)]

    def versions(self, model: str) -> list[Version]:
        """The complete versions of a model, oldest first."""
        _check_model(model)
        names = sorted(name for name in self.store.names(f"{model}/versions") if _VERSION.fullmatch(name))
        found = (self._read_version(model, name) for name in sorted(names, key=_number))
        return [version for version in found if version]

    def version(self, model: str, name: str) -> Version:
        """One version.

        Raises:
            ArtifactError: there is no such version, or its version.json is corrupted.
        """
        _check_model(model)
        found = self._read_version(model, name) if _VERSION.fullmatch(name) else None
        if not found:
            known = [version.version for version in self.versions(model)]
            hint = nearest(name, known) if known else f"model {model!r} has no versions at {self.uri}"
            raise ArtifactError(f"registry {self.uri}: model {model!r} has no version {name!r}", hint)
        return found

    def history(self, model: str) -> list[Promotion]:
        """The log of promotions and rollbacks, oldest first."""
        return [self._read_entry(model, number) for number in self._numbers(model, "promotions")]

    def judgements(self, model: str) -> list[Judgement]:
        """All judgements, oldest first."""
        return [self._read_judgement(model, number) for number in self._numbers(model, "judgements")]

    def champion(self, model: str) -> Promotion | None:
        """The newest entry of the log: what is the champion now; None if nothing was promoted yet."""
        numbers = self._numbers(model, "promotions")
        return self._read_entry(model, numbers[-1]) if numbers else None

    def fetch(self, model: str, version: str, part: str, cache: Path) -> Path:
        """A local, verified folder: part `model` or `test` of a version; copied below `cache` from object stores."""
        self.version(model, version)
        folder = storage.fetch(self.store.uri(f"{model}/versions/{version}/{part}"), cache / version)
        manifest.read(folder, {"model": "model", "test": "dataset"}[part])
        return folder

    def evaluation(self, model: str, version: str) -> dict[str, Any]:
        """The figures that a version was entered with.

        Raises:
            ArtifactError: they are missing or do not match the digest in version.json.
        """
        entry = self.version(model, version)
        content = self.store.read(f"{model}/versions/{version}/evaluation.json")
        if content is None or hashlib.sha256(content).hexdigest() != entry.evaluation_digest:
            raise ArtifactError(
                f"registry {self.uri}: {model}/versions/{version}/evaluation.json is missing or corrupted",
                "restore the registry from a backup",
            )
        return dict(json.loads(content))

    # Reading, for the CLI: plain JSON values

    def list_versions(self, model: str = "") -> list[dict[str, Any]]:
        """A row for each version of a model, or of all models, with what was last decided on it.

        It has the `Version` fields, `model`, `champion` (bool), `decision` and `reason`. The decision is the last
        judgement's (promoted, refused), or what the log of promotions says after it: promoted, restored by a rollback,
        named by a person, withdrawn by a rollback. A version that was entered and never judged has `entered`.
        """
        rows = []
        for name in [model] if model else self.models():
            judged = {judgement.version: judgement for judgement in self.judgements(name)}
            history = self.history(name)
            for version in self.versions(name):
                rows.append(_row(name, version, judged.get(version.version), history))
        return rows

    def show(self, model: str, version: str = "") -> dict[str, Any]:
        """All about a version (without one: the champion): its row, its evaluation, the model's history and its URI.

        Raises:
            ArtifactError: there is no such version, or no champion.
        """
        champion = self.champion(model)
        if not version:
            if not champion:
                known = ", ".join(self.models()) or "none"
                message = f"registry {self.uri}: model {model!r} has no champion"
                raise ArtifactError(message, f"promote one with `millrace run`; models here: {known}")
            version = champion.version
        entry, history = self.version(model, version), self.history(model)
        entered_with = self.evaluation(model, version)
        judgements = [judgement for judgement in self.judgements(model) if judgement.version == version]
        last = judgements[-1] if judgements else None
        return {
            **_row(model, entry, last, history),
            "uri": self.store.uri(f"{model}/versions/{version}/model"),
            "evaluation": last.evaluation if last else entered_with,
            "judgements": [{k: v for k, v in asdict(each).items() if k != "evaluation"} for each in judgements],
            "history": [asdict(event) for event in history],
        }

    # Writing

    def add(self, model: str, candidate: Path, test: Path, evaluation: dict[str, Any], **facts: Any) -> Version:
        """Enter a candidate; the same candidate (by digest) is entered once and its version returned.

        Args:
            model: the model's name.
            candidate: sealed model folder.
            test: sealed dataset folder that holds the test split, see `trainer.registry_stage.held_out_folder`.
            evaluation: the figures, JSON values.
            facts: fields of `Version` that the caller knows: bytes, metrics.
        """
        _check_model(model)
        found = manifest.read(candidate, "model")
        data = manifest.read(test, "dataset")
        with self.store.lock(f"{model}/.lock"):
            same = next((entry for entry in self.versions(model) if entry.digest == found.digest), None)
            if same:
                return same
            text = manifest.canonical(evaluation)
            with self.store.staging(f"{model}/versions") as staging:
                copy_tree(candidate, staging / "model")
                copy_tree(test, staging / "test")
                (staging / "evaluation.json").write_bytes(text)
                while True:
                    name = f"v{self._last_number(model) + 1:04d}"
                    version = Version(
                        version=name,
                        digest=found.digest,
                        created=_now(),
                        dataset_digest=str(data.meta.get("of", data.digest)),
                        data_version=str(data.meta.get("data_version", "")),
                        evaluation_digest=hashlib.sha256(text).hexdigest(),
                        **facts,
                    )
                    storage.write_atomic(staging / "version.json", _sealed(asdict(version)))
                    if self.store.publish(staging, f"{model}/versions/{name}", last="version.json"):
                        break
        # On an object store, where nothing is locked, another may have entered the same candidate at the same time.
        return next(entry for entry in self.versions(model) if entry.digest == found.digest)

    def judge(
        self, model: str, version: str, decision: str, reason: str, event: int, evaluation: dict[str, Any]
    ) -> Judgement:
        """Record what came of judging a version; see `Judgement`.

        The same as the newest record is recorded once: that is a rerun of a stage that was killed after recording it.
        """
        digest = self.version(model, version).digest
        while True:
            numbers = self._numbers(model, "judgements")
            number = int(numbers[-1]) + 1 if numbers else 1
            made = Judgement(number, version, digest, decision, reason, event, _now(), evaluation)
            with suppress(ArtifactError):  # a newest record that cannot be read is not this one
                newest = self._read_judgement(model, numbers[-1] if numbers else "")
                if replace(made, number=newest.number, time=newest.time) == newest:
                    return newest
            if self.store.create(f"{model}/judgements/{number:06d}.json", _sealed(asdict(made))):
                return made

    def promote(self, model: str, version: str, expected: str, reason: str) -> Promotion:
        """Make a version the champion, if the champion still is `expected` (a version; empty: there is none).

        It is a no-op if the version is the champion already.

        Raises:
            GateRefused: the champion is another one by now: the comparison that led here is out of date; or somebody
                rolled back from this version, which only a person may take back (`name_champion`).
        """
        entry = self.version(model, version)
        history = self.history(model)
        champion = history[-1] if history else None
        if champion and champion.version == version:
            self._copy_pointer(model)
            return champion
        now = champion.version if champion else ""
        if now != expected:
            raise GateRefused(
                f"the champion of {model!r} is {now or 'none'} now; the candidate was compared with {expected or 'none'}",
                "evaluate again: it will be compared with today's champion",
            )
        if left := _withdrawn(history).get(version):
            raise GateRefused(
                f"{model!r} was rolled back from {version} to {left.version} on {left.time}",
                f"if it shall be the champion again, name it: millrace registry promote {model} {version}",
            )
        return self._append(model, "promote", entry, champion, reason)

    def rollback(self, model: str, version: str = "") -> dict[str, Any]:
        """Make an earlier version the champion again; without one, the champion before the current one.

        Returns the new entry of the log.

        Raises:
            ArtifactError: there is no such version, or no champion before the current one.
            GateRefused: the champion changed while this ran.
        """
        history = self.history(model)
        champion = history[-1] if history else None
        if not version:
            stack = _stack(history)
            if len(stack) < 2:
                current = f"{champion.version} is the first" if champion else "nothing was promoted"
                message = f"registry {self.uri}: model {model!r} has no earlier champion ({current})"
                raise ArtifactError(message, "name a version; see `millrace registry ls`")
            version = stack[-2]
        reason = f"rolled back from {champion.version if champion else 'none'}"
        return self._choose(model, version, champion, "rollback", reason)

    def name_champion(self, model: str, version: str) -> dict[str, Any]:
        """Make a version the champion because a person says so, whatever the gate said; returns the new entry of the log.

        Raises:
            ArtifactError: there is no such version, or its model is not whole.
            GateRefused: the champion changed while this ran.
        """
        return self._choose(model, version, self.champion(model), "name", "named by hand")

    def fetch_check(self, model: str, version: str) -> None:
        """Check that a version's model is whole before it becomes the champion.

        Raises:
            ArtifactError: a file is missing or corrupted.
        """
        import tempfile

        with tempfile.TemporaryDirectory(prefix="millrace-") as cache:
            self.fetch(model, version, "model", Path(cache))

    # Details

    def _choose(self, model: str, version: str, champion: Promotion | None, action: str, reason: str) -> dict[str, Any]:
        entry = self.version(model, version)
        if champion and champion.version == version:
            return asdict(champion)
        self.fetch_check(model, version)
        return asdict(self._append(model, action, entry, champion, reason))

    def _numbers(self, model: str, log: str) -> list[str]:
        """Numbers of a log's entries as they are written, in order."""
        _check_model(model)
        names = self.store.names(f"{model}/{log}")
        return sorted((match[1] for name in names if (match := _ENTRY.fullmatch(name))), key=int)

    def _append(self, model: str, action: str, entry: Version, champion: Promotion | None, reason: str) -> Promotion:
        number = champion.number + 1 if champion else 1
        previous = champion.version if champion else ""
        event = Promotion(number, action, entry.version, entry.digest, previous, reason, _now())
        if not self.store.create(f"{model}/promotions/{number:06d}.json", _sealed(asdict(event))):
            raise GateRefused(
                f"another champion of {model!r} was chosen at the same moment",
                "evaluate again, or look with `registry ls`",
            )
        self._copy_pointer(model)
        return event

    def _copy_pointer(self, model: str) -> None:
        """Bring champion.json to the newest entry. Each writer looks again afterwards, so the last one leaves it right."""
        while champion := self.champion(model):
            content = _sealed(asdict(champion))
            if self.store.read(f"{model}/champion.json") != content:
                self.store.replace(f"{model}/champion.json", content)
            if self.champion(model) == champion:
                return

    def _last_number(self, model: str) -> int:
        return max(
            (_number(name) for name in self.store.names(f"{model}/versions") if _VERSION.fullmatch(name)), default=0
        )

    def _read_version(self, model: str, name: str) -> Version | None:
        content = self.store.read(f"{model}/versions/{name}/version.json")
        if not content:
            return None
        body = self._unsealed(content, f"{model}/versions/{name}/version.json")
        for key in ("decision", "reason"):  # as written before there were judgements
            body.pop(key, None)
        return Version(**body)

    def _read_entry(self, model: str, number: str) -> Promotion:
        path = f"{model}/promotions/{number}.json"
        return Promotion(**self._unsealed(self.store.read(path) or b"", path))

    def _read_judgement(self, model: str, number: str) -> Judgement:
        path = f"{model}/judgements/{number}.json"
        return Judgement(**self._unsealed(self.store.read(path) or b"", path))

    def _unsealed(self, content: bytes, path: str) -> dict[str, Any]:
        try:
            body = json.loads(content)
            expected = body.pop("seal")
            intact = hashlib.sha256(manifest.canonical(body)).hexdigest() == expected
            if intact and body.pop("format") == FORMAT:
                return dict(body)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        raise ArtifactError(f"{self.store.uri(path)}: corrupted, or of another format", "restore it from a backup")


def _check_model(model: str) -> None:
    if not _MODEL.fullmatch(model):
        raise ConfigError(f"{model!r} is not a model name", "use lower-case letters, digits and dashes")


def _number(version: str) -> int:
    return int(version[1:])


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _sealed(body: dict[str, Any]) -> bytes:
    body = {"format": FORMAT, **body}
    seal = hashlib.sha256(manifest.canonical(body)).hexdigest()
    return json.dumps({**body, "seal": seal}, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _stack(history: Sequence[Promotion]) -> list[str]:
    """Champions in force, oldest first: a promotion puts one on top, a rollback takes off what is above its version."""
    stack: list[str] = []
    for event in history:
        if event.action == "rollback" and event.version in stack:
            del stack[stack.index(event.version) + 1 :]
        else:
            stack.append(event.version)
    return stack


def _withdrawn(history: Sequence[Promotion]) -> dict[str, Promotion]:
    """Versions that somebody rolled back from and did not choose again, each with the rollback."""
    left: dict[str, Promotion] = {}
    for number, event in enumerate(history):
        if event.action == "rollback":
            before, after = _stack(history[:number]), _stack(history[: number + 1])
            left |= dict.fromkeys([name for name in before if name not in after or name == event.previous], event)
        left.pop(event.version, None)
    return left


_ACTIONS = {"promote": "promoted", "rollback": "restored", "name": "named"}


def _row(model: str, version: Version, judged: Judgement | None, history: Sequence[Promotion]) -> dict[str, Any]:
    """A version with what was last decided on it: by the gate, or in the log of promotions after that."""
    name = version.version
    decision, reason = (judged.decision, judged.reason) if judged else ("entered", "")
    left = _withdrawn(history).get(name)
    last = left or next((event for event in reversed(history) if event.version == name), None)
    if last and last.number > (judged.event if judged else 0):
        decision, reason = ("withdrawn" if left else _ACTIONS[last.action]), last.reason
    row = {"model": model, "champion": bool(history) and history[-1].version == name}
    return {**row, **asdict(version), "decision": decision, "reason": reason}
