"""Promoters at the same time, and killed at any moment: the registry can always be read and has one champion."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.artifacts import manifest
from trainer.errors import ArtifactError
from trainer.registry import Registry

pytestmark = pytest.mark.fault

FACTS = {"bytes": 7, "metrics": {}}

# argv: registry, test folder, work folder, seed, rounds, log. Each round enters a new candidate and tries to promote it.
PROMOTER = """
import sys
from pathlib import Path
from trainer.artifacts import manifest
from trainer.errors import GateRefused
from trainer.registry import Registry
registry, test, work, seed, rounds, log = Registry(sys.argv[1]), *map(Path, sys.argv[2:4]), *sys.argv[4:]
print("ready", flush=True)
for number in range(int(rounds)):
    champion = registry.champion("m")
    folder = work / f"{seed}-{number}"
    folder.mkdir()
    (folder / "model.onnx").write_text(f"{seed} {number} " * 2000)
    manifest.seal(folder, "model", {}, {})
    version = registry.add("m", folder, test, {}, bytes=1)
    try:
        event = registry.promote("m", version.version, champion.version if champion else "", "r")
        line = f"{event.number} {version.version}"
    except GateRefused:
        line = f"refused {version.version}"
    with open(log, "a") as file:
        file.write(line + "\\n")
"""


@pytest.fixture
def held_out(tmp_path):
    (tmp_path / "held-out" / "test").mkdir(parents=True)
    (tmp_path / "held-out" / "test" / "labels.npy").write_bytes(b"labels")
    manifest.seal(tmp_path / "held-out", "dataset", {}, {})
    return tmp_path / "held-out"


def start(tmp_path: Path, held_out: Path, seed: str, rounds: int) -> subprocess.Popen:
    work = tmp_path / f"work-{seed}"
    work.mkdir()
    arguments = [tmp_path / "registry", held_out, work, seed, rounds, tmp_path / f"log-{seed}"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROMOTER, *map(str, arguments)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.readline() == b"ready\n"
    return process


def stop(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(timeout=10)
    process.stdout.close()


def check(root: Path, cache: Path) -> None:
    """Every version is whole, the log has no gap, its newest entry names a version, and champion.json is whole."""
    registry = Registry(root)
    versions = registry.versions("m")
    for version in versions:
        registry.fetch("m", version.version, "model", cache)
        registry.fetch("m", version.version, "test", cache)
        registry.evaluation("m", version.version)
    history = registry.history("m")
    assert [event.number for event in history] == list(range(1, len(history) + 1))
    previous = ""
    for event in history:
        assert event.previous == previous
        assert any(version.version == event.version and version.digest == event.digest for version in versions)
        previous = event.version
    pointer = registry.store.read("m/champion.json")
    assert pointer is None or json.loads(pointer)["version"] in {version.version for version in versions}


def test_two_promoters_at_once_never_lose_or_overwrite_anything(tmp_path, held_out):
    rounds = 30
    processes = [start(tmp_path, held_out, seed, rounds) for seed in ("a", "b", "c")]
    try:
        for process in processes:
            assert process.wait(timeout=120) == 0
    finally:
        for process in processes:
            stop(process)
    check(tmp_path / "registry", tmp_path / "cache")
    registry = Registry(tmp_path / "registry")
    assert len(registry.versions("m")) == len({version.digest for version in registry.versions("m")}) == 3 * rounds
    lines = [line.split() for seed in "abc" for line in (tmp_path / f"log-{seed}").read_text().splitlines()]
    won = {int(number): version for number, version in lines if number != "refused"}
    assert len(lines) == 3 * rounds
    assert won == {event.number: event.version for event in registry.history("m")}
    assert json.loads(registry.store.read("m/champion.json"))["version"] == registry.champion("m").version
    assert any(number == "refused" for number, _ in lines), "the promoters never met: nothing was tested"


def test_killed_at_random_moments_it_stays_readable(tmp_path, held_out):
    chance = random.Random(3)
    for kill in range(12):
        process = start(tmp_path, held_out, f"k{kill}", 1000)
        try:
            time.sleep(chance.uniform(0.0, 0.06))
        finally:
            stop(process)
        check(tmp_path / "registry", tmp_path / "cache")
    process = start(tmp_path, held_out, "last", 3)
    try:
        assert process.wait(timeout=60) == 0
    finally:
        stop(process)
    check(tmp_path / "registry", tmp_path / "cache")
    registry = Registry(tmp_path / "registry")
    assert registry.champion("m").version == registry.versions("m")[-1].version
    assert not [path for path in (tmp_path / "registry/m/versions").iterdir() if path.name.startswith(".")]


def killed_at(operation: int, work) -> bool:
    """Run `work` in a child that kills itself before its n-th file operation; whether it came that far."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, _: tuple) -> None:
            nonlocal seen
            if event == "open" or event.startswith(("os.", "shutil.")):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_before_each_file_operation_it_stays_readable(tmp_path, held_out):
    """Entering and promoting a candidate beside a champion, cut off at every single operation in turn."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_text(name)
        manifest.seal(tmp_path / name, "model", {}, {})
    Registry(tmp_path / "base").add("m", tmp_path / "first", held_out, {}, **FACTS)
    Registry(tmp_path / "base").promote("m", "v0001", "", "r")
    for operation in range(1, 400):
        root = tmp_path / f"r{operation}"
        shutil.copytree(tmp_path / "base", root)

        def work(root: Path = root) -> None:
            version = Registry(root).add("m", tmp_path / "second", held_out, {}, **FACTS)
            Registry(root).promote("m", version.version, "v0001", "r")

        killed = killed_at(operation, work)
        check(root, tmp_path / "cache")
        if not killed:
            assert Registry(root).champion("m").version == "v0002"
            break
    assert 20 < operation < 399, "the kills did not reach from the first to the last operation"


def test_a_full_disk_leaves_the_registry_as_it_was(tmp_path, held_out):
    """A candidate larger than what is left: an error that says so, and nothing half-written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    try:
        registry = Registry(disk / "registry")
        for name, size in (("small", 1000), ("large", 3_000_000)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.onnx").write_bytes(b"x" * size)
            manifest.seal(tmp_path / name, "model", {}, {})
        registry.add("m", tmp_path / "small", held_out, {}, **FACTS)
        registry.promote("m", "v0001", "", "r")
        with pytest.raises(ValueError, match="No space left"):
            registry.add("m", tmp_path / "large", held_out, {}, **FACTS)
        check(disk / "registry", tmp_path / "cache")
        assert [version.version for version in registry.versions("m")] == ["v0001"]
        assert not [path for path in (disk / "registry/m/versions").iterdir() if path.name.startswith(".")]
        with pytest.raises(ArtifactError):
            registry.version("m", "v0002")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
