"""`millrace run --engine docker` in the real images: the default pipeline on a slice of the default data."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import docker_runner
from tests.pipeline.conftest import SMALL, environment
from trainer.artifacts import manifest
from trainer.stage import STAGES

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]
PORTS = {port: spec.kind for stage in STAGES.values() for port, spec in stage.outputs.items()}


def millrace(folder: Path, *words: str, deadline_s: int = 600) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", *words]
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=deadline_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=30)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture
def project(tmp_path: Path, engine: Any) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    assert millrace(folder, "preset", "use", "text-classify").returncode == 0
    return folder


def test_both_engines_make_the_same_and_decide_the_same(project: Path, engine: Any) -> None:
    laptop = project.with_name("laptop")
    shutil.copytree(project, laptop)
    here = millrace(laptop, "run", *SMALL)
    there = millrace(project, "run", "--engine", "docker", *SMALL)
    assert (here.returncode, there.returncode) == (4, 4), there.stdout[-3000:] + there.stderr[-3000:]
    made = project / "out" / "containers" / "latest"
    # Timings and reports are declared volatile and are not part of a digest; all else is equal in every bit.
    expected = {port: manifest.read(laptop / "out" / port, kind).digest for port, kind in PORTS.items()}
    assert {port: manifest.read(made / port, kind).digest for port, kind in PORTS.items()} == expected
    assert (project / "params.yaml").read_bytes() == (laptop / "params.yaml").read_bytes()
    entered = [json.loads((folder / "registry/text-classify/versions/v0001/version.json").read_text("utf-8"))
               for folder in (project, laptop)]  # fmt: skip
    assert entered[0]["digest"] == entered[1]["digest"]

    def verdict(text: str) -> list[str]:
        return [line for line in text.splitlines() if "REFUSED" in line or "accuracy   macro-F1" in line]

    assert verdict(there.stdout) == verdict(here.stdout) != []
    run = (project / "out" / "containers" / "latest").resolve().name
    assert docker_runner.containers_of(engine, run) == []
    owners = {path.lstat().st_uid for path in project.rglob("*")}
    assert owners == {os.getuid()}
    # What one engine entered in the registry, the other one goes on with.
    assert millrace(project, "registry", "promote", "v0001").returncode == 0
    fewer = [f"{stage}.enabled=false" for stage in ("tune", "distill", "quantize")]
    again = millrace(project, "run", "--engine", "docker", "train.seed=1", *fewer)
    assert again.returncode in (0, 4), again.stderr
    assert "champion: v000" in again.stdout
    assert len(list((project / "registry/text-classify/versions").iterdir())) == 2


def test_a_stage_at_work_in_its_image_ends_when_it_is_asked(project: Path, engine: Any) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "run", "--engine", "docker", *SMALL,
         "train.epochs=5000", "tune.enabled=false"],
        cwd=project, env=environment(), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("train: step="):
                break
        process.terminate()
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=30)
    assert process.returncode == 143
    assert "stopped" in err
    folder = next((project / "out" / "containers").glob("2*"))
    assert docker_runner.containers_of(engine, folder.name) == []
    log = (folder / "run.log").read_text(encoding="utf-8")
    assert "train: SIGTERM at step" in log, "the stage did not hear of it"


def test_wrong_data_is_named_as_on_a_laptop(project: Path) -> None:
    (project / "rows.csv").write_text("text,label\na,x\nb,y\n", encoding="utf-8")
    done = millrace(project, "run", "--engine", "docker", "data.source=rows.csv", "data.label=topic")
    assert done.returncode == 2
    assert "topic" in done.stdout
    assert "stage preprocess ended with exit code 2" in done.stderr or "stage configure ended" in done.stderr
