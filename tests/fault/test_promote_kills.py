"""A winning candidate is promoted by a process that is killed: then a rerun leaves the registry as if nothing had been.

The stage runs in a forked child that kills itself before its n-th file operation, so nothing depends on how fast the
machine is and the moment in which the champion changes is hit for certain.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.registered import registry_of
from tests.tiny import tiny_dataset
from trainer.artifacts import manifest
from trainer.config.load import load
from trainer.errors import ArtifactError
from trainer.registry import Registry
from trainer.stage import execute

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

REASON = "because it is better"
CHAMPION_CHANGES = ("promotions/000001.json", "champion.json", "judgements/000001.json")


@dataclass(frozen=True)
class Made:
    """The inputs of the stage, made once."""

    dataset: Path
    model: Path
    evaluation: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    dataset = tiny_dataset(folder / "dataset", "classify", 40).folder
    model, evaluation = folder / "quantized", folder / "evaluation"
    (model / "extra").mkdir(parents=True)
    (model / "model.onnx").write_text("weights")
    (model / "extra" / "note.txt").write_text("a file of a folder")
    manifest.seal(model, "model", {}, {})
    evaluation.mkdir()
    gate = {"decision": "promoted", "reason": REASON, "champion": ""}
    (evaluation / "metrics.json").write_text(json.dumps({"candidate": {"accuracy": 0.9, "bytes": 7}, "gate": gate}))
    meta = {"candidate": manifest.read(model).digest, "dataset": manifest.read(dataset).digest}
    manifest.seal(evaluation, "evaluation", meta, {}, ("metrics.json",))
    inputs = Made(dataset, model, evaluation)
    promote(inputs, folder / "here")  # imports all that the forks need, which then all do the same operations
    return inputs


def promote(made: Made, place: Path) -> None:
    params = load(None, [f"promote.registry={place / 'registry'}", "promote.model=m"])
    inputs = {"dataset": str(made.dataset), "quantized": str(made.model), "evaluation": str(made.evaluation)}
    execute("promote", params, inputs, {"promotion": str(place / "out" / "promotion")})


def promote_in_a_child(made: Made, place: Path, kill_at: int = 0) -> bool:
    """Promote in a child that kills itself before file operation `kill_at`; 0: never, and it writes down all of them.

    Returns whether it came to that operation.
    """
    place.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        seen: list[str] = []
        done = False

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if not done and (event == "open" or event.startswith(("os.", "shutil."))):
                seen.append(f"{event} {' '.join(map(str, arguments))}")
                if len(seen) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        status = 1
        try:
            promote(made, place)
            done = True
            if not kill_at:
                (place / "operations.json").write_text(json.dumps(seen))
            status = 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in ((0, -signal.SIGKILL) if kill_at else (0,))
    return code != 0


def verdict_of(place: Path) -> dict[str, str]:
    folder = place / "out" / "promotion"
    manifest.read(folder, "promotion")
    verdict = json.loads((folder / "promotion.json").read_text())
    assert verdict.pop("registry") == str(place / "registry")
    return verdict


def check_after_a_kill(place: Path) -> bool:
    """The registry is readable, its champion is a whole version; returns whether there is one."""
    registry = Registry(place / "registry")
    champion = registry.champion("m")
    for row in registry.list_versions("m"):
        registry.fetch("m", row["version"], "model", place / "cache")
    if champion:
        assert registry.show("m")["version"] == champion.version == "v0001"
    try:
        manifest.read(place / "out" / "promotion", "promotion")
    except ArtifactError:
        assert not (place / "out" / "promotion").exists(), "half an output stands at the target"
    return champion is not None


def test_killed_anywhere_a_rerun_leaves_one_version_one_champion_and_the_same_records(made, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    promote_in_a_child(made, undisturbed)
    champion = Registry(undisturbed / "registry").champion("m")
    assert champion is not None
    assert (champion.digest, champion.reason) == (manifest.read(made.model).digest, REASON)
    operations = json.loads((undisturbed / "operations.json").read_text())
    changes = [
        number
        for number, operation in enumerate(operations, start=1)
        if operation.startswith(("os.link", "os.rename")) and any(name in operation for name in CHAMPION_CHANGES)
    ]
    assert len(changes) == len(CHAMPION_CHANGES), "these are not the operations that change the champion"
    seed = random.randrange(10**6)
    print(f"seed {seed}, {len(operations)} operations, the champion changes at {changes}")
    draw = random.Random(seed)
    moments = {number + after for number in changes for after in (0, 1)} | set(
        draw.sample(range(1, len(operations) + 1), 6)
    )
    states = []
    for number in sorted(moments):
        place = tmp_path / f"killed-{number}"
        assert promote_in_a_child(made, place, number)
        states.append(check_after_a_kill(place))
        promote_in_a_child(made, place)
        found = Registry(place / "registry")
        assert [version.digest for version in found.versions("m")] == [champion.digest]
        assert (found.champion("m").version, found.champion("m").digest) == ("v0001", champion.digest)
        assert registry_of(place / "registry") == registry_of(undisturbed / "registry"), (
            f"killed before {operations[number - 1]}"
        )
        assert verdict_of(place) == verdict_of(undisturbed)
    assert set(states) == {False, True}, "no kill before the champion changed, or none after"


def test_killed_again_and_again_it_ends_all_the_same(made, tmp_path):
    """Six kills of one promotion, each in what the one before left."""
    undisturbed, place = tmp_path / "undisturbed", tmp_path / "killed"
    promote_in_a_child(made, undisturbed)
    operations = json.loads((undisturbed / "operations.json").read_text())
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(6):
        promote_in_a_child(made, place, draw.randrange(1, len(operations) + 1))
        check_after_a_kill(place)
    promote_in_a_child(made, place)
    assert registry_of(place / "registry") == registry_of(undisturbed / "registry")
    assert verdict_of(place) == verdict_of(undisturbed)
    assert not [path for path in (place / "registry/m/versions").iterdir() if path.name.startswith(".")]
