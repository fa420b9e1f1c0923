"""Slow: every stage of the chain is killed at random moments, fifty times in all, and ends as an undisturbed one does.

The candidate wins: what tells the labels apart are signs, and the baseline reads only words. So a killed promotion is one
that moves the champion.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.registered import registry_of
from trainer.artifacts import manifest
from trainer.errors import ArtifactError
from trainer.registry import Registry
from trainer.stage import STAGES

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
NUM_KILLS = 50
DEADLINE_S = 120
SIGNS = "!?+="
WORDS = [
    "data.source=raw.csv", "data.tokenizer.vocab_size=300", "data.max_length=32", "data.dedup.near=false",
    "data.split.test=0.25", "train.epochs=6", "train.batch_size=16", "train.threads=1", "train.checkpoint_every=5",
    "train.lr=3e-2", "model.name=ngram", "model.buckets=512", "model.dim=8", "tune.trials=2", "tune.epochs=1",
    "distill.student.buckets=256", "distill.student.dim=8", "distill.lr=5e-2", "quantize.torchao=false",
    "evaluate.bootstrap=100", "evaluate.latency_runs=10", "promote.registry=registry",
]  # fmt: skip
# What comes into the registry, in this order.
PROMOTED = (
    ".lock", "versions/v0001", "promotions/000001.json", "champion.json", "judgements/000001.json",
)  # fmt: skip


@dataclass(frozen=True)
class Undisturbed:
    """What each stage made without a kill, and the seconds it took."""

    folder: Path
    digests: dict[str, str]
    seconds: dict[str, float]


def write_rows(path: Path) -> None:
    """400 rows of four labels, a third of the words replaced by their label's sign."""
    draw = random.Random(0)
    lines = ["text,label"]
    for row in range(400):
        words = [SIGNS[row % 4] if draw.random() < 0.35 else f"word{draw.randrange(40)}" for _ in range(12)]
        lines.append(f"{' '.join(words)} {row},label-{row % 4}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def output_of(name: str) -> str:
    (port,) = STAGES[name].outputs
    return port


def start(name: str, folder: Path, inputs: Path) -> subprocess.Popen:
    """A stage in `folder`, with inputs of the undisturbed chain, so that each stage is tested for itself."""
    command = [sys.executable, "-m", "trainer", name]
    for port in STAGES[name].inputs:
        command += ["--in", f"{port}={inputs / 'out' / port}"]
    command += ["--out", f"{output_of(name)}=out/{output_of(name)}", *WORDS]
    with open(folder / f"{name}.log", "a") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def kill(process: subprocess.Popen) -> None:
    """Kill -9 the stage and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait(timeout=30)


def finish(name: str, folder: Path, inputs: Path) -> str:
    """Run a stage to its end; returns the digest of its output."""
    process = start(name, folder, inputs)
    try:
        code = process.wait(timeout=DEADLINE_S)
    finally:
        kill(process)
    assert code == 0, f"{name}: {(folder / f'{name}.log').read_text()[-3000:]}"
    return manifest.read(folder / "out" / output_of(name)).digest


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_rows(folder / "raw.csv")
    digests, seconds = {}, {}
    for name in STAGES:
        began = time.monotonic()
        digests[name] = finish(name, folder, folder)
        seconds[name] = time.monotonic() - began
    gate = json.loads((folder / "out/evaluation/metrics.json").read_text(encoding="utf-8"))["gate"]
    assert gate["decision"] == "promoted", f"the champion would not move: {gate['reason']}"
    check_registry(folder, folder)
    return Undisturbed(folder, digests, seconds)


def check_registry(folder: Path, undisturbed: Path) -> None:
    """One version, which is the candidate and the champion, and all else as a promotion without a kill leaves it."""
    candidate = manifest.read(undisturbed / "out" / "quantized").digest
    registry = Registry(folder / "registry")
    assert [(name, entry.digest) for name in registry.models() for entry in registry.versions(name)] == [
        ("default", candidate)
    ]
    champion = registry.champion("default")
    assert champion is not None
    assert (champion.version, champion.digest) == ("v0001", candidate)
    assert registry_of(folder / "registry") == registry_of(undisturbed / "registry")


def wait_for_a_moment(name: str, process: subprocess.Popen, folder: Path, seconds: float, draw: random.Random) -> None:
    """Any moment of the stage; of promote, one soon after a file that is drawn has come into the registry."""
    if name == "promote":
        # Less than a tenth of the stage's time, which would be missed by most of the few kills.
        awaited = folder / "registry" / "default" / draw.choice(PROMOTED)
        while process.poll() is None and not awaited.exists():
            time.sleep(0.0005)
        seconds = 0.02
    time.sleep(draw.uniform(0.0, seconds))


@pytest.mark.parametrize("number", range(len(STAGES)), ids=list(STAGES))
def test_killed_at_random_moments_a_stage_ends_with_the_same_digest(
    number: int, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    name = list(STAGES)[number]
    kills = NUM_KILLS // len(STAGES) + (number < NUM_KILLS % len(STAGES))
    seed = random.randrange(10**6)
    print(f"{name}: seed {seed}, {kills} kills within {undisturbed.seconds[name]:.1f} s")
    draw = random.Random(seed)
    write_rows(tmp_path / "raw.csv")
    output = tmp_path / "out" / output_of(name)
    for _ in range(kills):
        process = start(name, tmp_path, undisturbed.folder)
        try:
            wait_for_a_moment(name, process, tmp_path, undisturbed.seconds[name], draw)
            ended = process.poll()
        finally:
            kill(process)
        assert ended in (None, 0), (tmp_path / f"{name}.log").read_text()[-3000:]
        try:
            assert manifest.read(output).digest == undisturbed.digests[name], "something else was accepted"
        except ArtifactError:
            assert not output.exists(), "half an output stands at the target"
        if name == "promote":
            # Each kill meets a promotion from its beginning, and a rerun has to end that one well.
            moved = Registry(tmp_path / "registry").champion("default") is not None
            print(
                f"the champion had {'moved' if moved else 'not moved'}, the output was {'' if output.exists() else 'not '}there"
            )
            assert finish(name, tmp_path, undisturbed.folder) == undisturbed.digests[name]
            check_registry(tmp_path, undisturbed.folder)
            shutil.rmtree(tmp_path / "registry")
            shutil.rmtree(output)
    assert finish(name, tmp_path, undisturbed.folder) == undisturbed.digests[name]
    assert [path.name for path in output.parent.iterdir()] == [output.name], "what the killed stages left was not swept"
