"""Slow: whole presets as a stranger runs them, and what the README promises of each. Not part of `make test`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.conftest import environment, run_in
from trainer import presets
from trainer.artifacts import manifest
from trainer.config.load import load
from trainer.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.pipeline, pytest.mark.slow, pytest.mark.timeout(1800)]


def offline() -> list[str]:
    """Words before a command that unplug the network. A skip, and only for those who are not root, if that is refused."""
    words = ["unshare", "--map-root-user", "--net"]
    try:
        done = subprocess.run([*words, "cat", "/proc/net/dev"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        if os.geteuid():
            pytest.skip("this machine lets only root unplug the network")
        pytest.fail(f"cannot unplug the network: {error}")
    assert re.findall(r"^ *(\S+):", done.stdout, re.MULTILINE) == ["lo"]
    return words


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files in a folder of their own, without git history."""
    folder = tmp_path_factory.mktemp("clone") / "millrace"
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def make(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """`make` in a folder, with this environment for its .venv: its stamp says that it is set up."""
    env = environment() | {"PYTHONPATH": str(folder)}
    env.pop("OMP_NUM_THREADS")
    # A make around these tests must not hand its own variables on.
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS"):
        env.pop(name, None)
    settings = [f"VENV={sys.prefix}", f"PYTHON={sys.executable}"]
    planned = subprocess.run(
        ["make", "-n", *settings, *words], cwd=folder, env=env, capture_output=True, text=True, check=True
    )
    stamps = re.findall(r"^touch (\S+)$", planned.stdout, re.MULTILINE)
    for stamp in stamps:
        Path(stamp).touch()
    try:
        return subprocess.run(
            [*offline(), "make", *settings, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=1500
        )
    finally:
        for stamp in stamps:
            Path(stamp).unlink()


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "out/evaluation/metrics.json").read_text(encoding="utf-8"))


def test_make_run_with_the_network_unplugged(clone: Path) -> None:
    done = make(clone, "run")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(done.stdout[-2500:])
    metrics = metrics_of(clone)
    candidate, teacher, baseline = metrics["candidate"], metrics["teacher"], metrics["baseline"]
    assert candidate["accuracy"] > baseline["accuracy"]
    assert metrics["comparison"]["p_value"] < 0.01
    assert metrics["gate"]["decision"] == "promoted"
    assert metrics["student"]["num_parameters"] <= 0.5 * teacher["num_parameters"]
    assert metrics["student"]["accuracy"] >= 0.97 * teacher["accuracy"]
    assert candidate["accuracy"] >= metrics["student"]["accuracy"] - 0.005
    assert candidate["bytes"] <= 0.35 * metrics["student"]["bytes"]
    for name in ("dataset", "tuning", "model", "student", "quantized", "evaluation", "promotion"):
        manifest.read(clone / "out" / name)
    report = (clone / "out/evaluation/report.html").read_text(encoding="utf-8")
    assert len(report) < 1_000_000
    assert not re.search(r"""(?:src|href)=["']https?:""", report)
    assert Registry(clone / "registry").champion("text-classify") is not None
    again = make(clone, "run")
    assert again.returncode == 0
    assert ": started" not in again.stdout
    assert "installing" not in again.stdout


def test_make_alone_prints_the_targets(clone: Path) -> None:
    done = subprocess.run(["make"], cwd=clone, capture_output=True, text=True, check=True)
    assert {"make run", "make test"} <= set(re.findall(r"make \w+", done.stdout))


def check_digits(metrics: dict, folder: Path) -> None:
    assert metrics["cross_validation"]["folds"] >= 5
    assert metrics["cross_validation"]["accuracy"] >= 0.993


def check_debian(metrics: dict, folder: Path) -> None:
    assert metrics["candidate"]["accuracy"] > 0.760
    assert metrics["candidate"]["macro_f1"] > 0.737
    assert manifest.read(folder / "out/model").record["seconds"] < metrics["baseline"]["seconds"]
    # The baseline is about as good, so the gate's verdict depends on this machine's package lists.
    found = metrics["comparison"]
    better = found["p_value"] < 0.01 and found["accuracy"]["value"] > 0
    assert metrics["gate"]["decision"] == ("promoted" if better else "refused")


def check_code(metrics: dict, folder: Path) -> None:
    candidate, baseline, xz = (metrics[name]["bits_per_byte"] for name in ("candidate", "baseline", "xz"))
    assert metrics["baseline"]["name"] == "byte n-gram of order 5, interpolated Kneser-Ney"
    assert metrics["baseline"]["settings"] == {"context in bytes": 5}
    assert 0 < candidate < baseline < 8
    assert metrics["xz"]["name"].startswith("xz -9e")
    assert 0 < xz < 8
    # The report shows the three side by side, whichever of them is the lowest.
    report = (folder / "out/evaluation/report.html").read_text(encoding="utf-8")
    for figure in (candidate, baseline, xz):
        assert f"{figure:.3f}" in report
    found, gate = metrics["comparison"], metrics["gate"]
    difference = found["bits_per_byte"]
    assert difference["value"] == pytest.approx(candidate - baseline, abs=1e-9)
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert 0 < found["p_value"] <= 1
    # There was no champion, so the gate goes by the baseline alone, at the level that is configured.
    alpha = load(folder / "params.yaml").promote.alpha
    assert (gate["champion"], gate["alpha"]) == ("", alpha)
    assert gate["decision"] == ("promoted" if found["p_value"] < alpha else "refused")
    p_text = "p < 0.0001" if found["p_value"] < 1e-4 else f"p = {found['p_value']:.4f}"
    for words in (f"{baseline - candidate:.4f} bits per byte better", p_text, metrics["baseline"]["name"]):
        assert words in gate["reason"]
    champion = Registry(folder / "registry").champion("code-lm")
    promoted = manifest.read(folder / "out/quantized").digest if gate["decision"] == "promoted" else None
    assert (champion.digest if champion else None) == promoted


CHECKS = {"digits": check_digits, "debian-sections": check_debian, "code-lm": check_code}


@pytest.mark.parametrize(
    "name", [name for name in presets.names() if name != presets.DEFAULT and not presets.needs_gpus(name)]
)
def test_preset_keeps_its_promise(name: str, tmp_path: Path) -> None:
    if name == "debian-sections" and not shutil.which("apt-cache"):
        pytest.skip("no apt on this machine")
    run_in(tmp_path, "millrace", "preset", "use", name)
    done = run_in(tmp_path, "millrace", "run", code=None, deadline_s=1500)
    print(done.stdout[-2500:])
    assert done.returncode in (0, 4), done.stdout[-3000:] + done.stderr[-3000:]
    if name in CHECKS:
        CHECKS[name](metrics_of(tmp_path), tmp_path)
