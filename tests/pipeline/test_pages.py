"""Every command that the README and the pages of docs/ show is run: here, or by the test that is named here."""

import hashlib
import re
import subprocess
from pathlib import Path

import pytest

from tests.pipeline.conftest import environment

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.pipeline
# The beginning of a command -> the test that runs it.
ELSEWHERE = {
    "make run": "tests/pipeline/test_whole_presets.py::test_make_run_with_the_network_unplugged",
    "make test": ".ci/run",
    "make ": "tests/pipeline/test_whole_presets.py::test_make_alone_prints_the_targets",
    ". .venv/bin/activate": "tests/pipeline/conftest.py: environment() does the same",
    "docker run": "tests/container/test_images.py",
    "make images": "tests/container/conftest.py",
    "millrace run --engine docker": "tests/container/test_engine_chain.py",
    "export MILLRACE_KFP": "tests/unit/test_client_api.py",
    "millrace submit": "tests/unit/test_client_runs.py",
    "millrace status": "tests/unit/test_client_runs.py",
    "millrace logs": "tests/unit/test_client_runs.py",
    "millrace cancel": "tests/unit/test_client_runs.py",
    "millrace runs": "tests/unit/test_client_runs.py",
    "millrace schedule": "tests/unit/test_schedule.py",
    "python -m pipelines.katib_config": "tests/cluster/test_cluster_doctor.py",
    "sed 's/namespace: millrace$/": "tests/cluster/test_cluster_steps.py::test_the_page_gives_the_steps_their_rights",
    "kubectl ": "tests/cluster/test_cluster_manifests.py",
    "millrace doctor --cluster": "tests/cluster/test_cluster_doctor.py",
    "millrace run --engine kubernetes": "tests/cluster/test_cluster_engine.py",
    "millrace run data.source=": "tests/pipeline/test_chain.py::test_own_csv_with_three_words",
    "millrace run": "tests/pipeline/test_chain.py::test_a_change_of_train_reruns_train_and_what_follows",
    "millrace new": "tests/pipeline/test_chain.py::test_a_new_project_runs_outside_of_any_git",
    "millrace registry rollback": "tests/unit/test_cli_registry.py::test_the_model_of_params_is_the_default",
    "millrace checkpoint": "tests/unit/test_cli_checkpoint.py",
    "millrace predict --model model": "tests/unit/test_cli_checkpoint.py::test_export_gives_the_model_of_the_best_step",
    "dvc exp run": "tests/pipeline/test_chain.py::test_experiments_metrics_and_plots",
    "dvc repro": "tests/pipeline/test_chain.py::test_repro_typed_by_hand_finds_nothing_to_do",
}


def shown() -> list[str]:
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            found += [line.strip() for line in block.splitlines() if line.strip()]
    return list(dict.fromkeys(found))


def test_the_tests_named_above_exist() -> None:
    for command, name in ELSEWHERE.items():
        if "::" in name:
            file, function = name.split("::")
            assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), command


def test_the_other_commands_run_as_they_are_shown(project: Path) -> None:
    rows = [f"{' '.join(hashlib.md5(bytes([i])).hexdigest())},{i % 2}" for i in range(60)]
    (project / "my.csv").write_text("\n".join(["body,topic", *rows]), encoding="utf-8")
    (project / "texts.txt").write_text("def get(self): pass\nimport sys\n", encoding="utf-8")
    (project / "manifests").symlink_to(ROOT / "manifests")
    commands = [line for line in shown() if not any(line.startswith(start) for start in ELSEWHERE)]
    assert len(commands) >= 8
    for command in commands:
        # Commands for people, `|` among them: this is the one place where a shell is meant.
        line = command.replace("millrace ", "python -m pipelines.cli ")
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            cwd=project,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
