"""The whole chain on a small real subset, through `millrace run` and DVC's own commands."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from pipelines.project import held
from tests.pipeline.conftest import GIT, SMALL, environment, run_in
from trainer.artifacts import manifest
from trainer.artifacts.dataset import Dataset
from trainer.errors import MillraceError
from trainer.registry import Registry
from trainer.registry_stage import held_out_folder

pytestmark = pytest.mark.pipeline

FOLDERS = ("dataset", "tuning", "model", "student", "quantized", "evaluation", "promotion")


def digests(folder: Path) -> dict[str, str]:
    return {name: manifest.read(folder / "out" / name).digest for name in FOLDERS}


def ran(done) -> list[str]:
    """Stages that a `millrace run` in a pipe said it started."""
    return re.findall(r"^(\w+): started", done.stdout, re.MULTILINE)


def test_run_makes_every_artifact_and_a_champion(finished: Path) -> None:
    assert set(digests(finished)) == set(FOLDERS)
    metrics = json.loads((finished / "out/evaluation/metrics.json").read_text(encoding="utf-8"))
    assert {"accuracy", "macro_f1", "bytes", "latency_p50_ms"} <= set(metrics["candidate"])
    assert metrics["gate"]["decision"] in ("promoted", "refused")
    champion = Registry(finished / "registry").champion("text-classify")
    assert champion is not None
    assert champion.digest == manifest.read(finished / "out/quantized").digest


def test_raw_data_is_versioned_and_its_md5_is_everywhere(finished: Path) -> None:
    lock = yaml.safe_load((finished / "dvc.lock").read_text(encoding="utf-8"))
    md5 = lock["stages"]["raw"]["outs"][0]["md5"]
    assert manifest.read(finished / "out/dataset").meta["data_version"] == md5
    assert md5 in (finished / "out/quantized/README.md").read_text(encoding="utf-8")
    (version,) = Registry(finished / "registry").versions("text-classify")
    assert version.data_version == md5


def test_a_rerun_runs_nothing(project: Path) -> None:
    before = (digests(project), (project / "params.yaml").read_bytes(), (project / "dvc.lock").read_bytes())
    done = run_in(project, "millrace", "run")
    assert ran(done) == []
    assert "nothing has changed" in done.stdout
    assert before == (digests(project), (project / "params.yaml").read_bytes(), (project / "dvc.lock").read_bytes())


def test_a_change_of_train_reruns_train_and_what_follows(project: Path) -> None:
    before = digests(project)
    done = run_in(project, "millrace", "run", "train.lr=1e-2", "train.label_smoothing=0.2", code=None)
    assert done.returncode in (0, 4), done.stdout
    assert ran(done)[0] == "tune"
    assert {"raw", "preprocess"} & set(ran(done)) == set()
    assert {"train", "distill"} <= set(ran(done))
    after = digests(project)
    assert after["dataset"] == before["dataset"]
    assert after["model"] != before["model"]
    # A refusal, if that is the gate's answer, is told with its reason.
    verdict = json.loads((project / "out/promotion/promotion.json").read_text(encoding="utf-8"))
    assert (done.returncode == 4) == (verdict["decision"] == "refused")
    assert verdict["reason"].split()[0] in done.stdout


def test_a_change_of_evaluate_reruns_only_the_verdict(project: Path) -> None:
    run_in(project, "git", *GIT, "commit", "-q", "--allow-empty", "-m", "next")
    head = run_in(project, "git", "rev-parse", "HEAD").stdout.strip()
    done = run_in(project, "millrace", "run", "evaluate.baseline=true", code=None)
    assert ran(done) == ["evaluate", "promote"]
    metrics = json.loads((project / "out/evaluation/metrics.json").read_text(encoding="utf-8"))
    assert {"name", "accuracy", "macro_f1"} <= set(metrics["baseline"])
    assert "p_value" in metrics["comparison"]
    record = manifest.read(project / "out/promotion").record
    assert record["git_commit"] == f"{head}+", "params.yaml differs from the commit"
    assert str(project) not in json.dumps(record), "no path of a machine"


def test_a_deleted_registry_is_noticed_and_entered_again(project: Path) -> None:
    shutil.rmtree(project / "registry")
    done = run_in(project, "millrace", "run", code=4)
    assert ran(done) == ["evaluate", "promote"]
    assert len(Registry(project / "registry").versions("text-classify")) == 1
    assert "champion: none" in done.stdout


def test_a_champion_that_was_changed_elsewhere_is_noticed(project: Path) -> None:
    """A run after a rollback neither calls the candidate the champion nor makes it the champion again."""
    registry = Registry(project / "registry")
    other = shutil.copytree(project / "out/student", project.parent / "other")
    with tempfile.TemporaryDirectory() as place:
        test = held_out_folder(Dataset(project / "out/dataset"), Path(place) / "test")
        version = registry.add("text-classify", other, test, {}, bytes=1).version
    registry.rollback("text-classify", version)
    done = run_in(project, "millrace", "run", code=4)
    assert ran(done) == ["evaluate", "promote"]
    assert f"champion: {version}" in done.stdout
    assert registry.champion("text-classify").version == version
    assert ran(run_in(project, "millrace", "run", code=4)) == []


def test_a_corrupted_artifact_is_made_again(project: Path) -> None:
    before = digests(project)
    path = project / "out/model/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(content))
    run_in(project, "millrace", "run")
    assert digests(project) == before


def test_a_run_up_to_a_stage_says_that_it_is_up_to_date(project: Path) -> None:
    (project / "rows.csv").write_text("text,label\nhello,a\n", encoding="utf-8")
    run_in(project, "dvc", "add", "-q", "rows.csv")  # DVC tells of such a file in words of its own
    done = run_in(project, "millrace", "run", "--until", "tune")
    assert ran(done) == []
    assert "Up to date: nothing has changed" in done.stdout
    assert "didn't change" not in done.stdout
    assert len(done.stdout.splitlines()) == 2


def test_params_edited_while_a_stage_runs_are_not_what_it_ran_with(project: Path) -> None:
    """DVC writes to dvc.lock, and to its cache of runs, what params.yaml holds when the stage ends."""
    path = project / "params.yaml"
    words = [sys.executable, "-m", "pipelines.cli", "run", "--until", "preprocess", "data.split.seed=7"]
    process = subprocess.Popen(words, cwd=project, env=environment(), text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        assert process.stdout is not None
        assert any("reading" in line for line in process.stdout), "the stage has read its parameters"
        edited = path.read_text(encoding="utf-8").replace("    seed: 7\n", "    seed: 8\n")
        path.write_text(edited, encoding="utf-8")
        with pytest.raises(MillraceError, match="another `millrace run`"), held(project):
            pass
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert "params.yaml was changed while preprocess ran" in err
    assert "preprocess" not in yaml.safe_load((project / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    assert ran(run_in(project, "millrace", "run", "--until", "preprocess")) == ["preprocess"]
    assert manifest.read(project / "out/dataset").record["params"]["data"]["split"]["seed"] == 8
    assert ran(run_in(project, "millrace", "run", "--until", "preprocess")) == []


def test_a_failing_stage_is_named_with_its_status_and_fix(project: Path) -> None:
    done = run_in(project, "millrace", "run", "data.text=nothing", code=2)
    assert "stage preprocess ended with exit code 2" in done.stderr
    assert "nothing" in done.stdout
    assert "fix:" in done.stdout


def test_experiments_metrics_and_plots(project: Path) -> None:
    run_in(project, "dvc", "exp", "run", "-q", "-S", "train.lr=1e-2", "-S", "evaluate.examples=3")
    assert "lr: 0.01" in (project / "params.yaml").read_text(encoding="utf-8")
    assert "# Peak learning rate." in (project / "params.yaml").read_text(encoding="utf-8"), "comments are kept"
    shown = json.loads(run_in(project, "dvc", "exp", "show", "--json").stdout)
    assert len(shown) >= 2
    changes = json.loads(run_in(project, "dvc", "metrics", "diff", "--json").stdout)
    loss = changes["out/evaluation/metrics.json"]["candidate.loss"]
    assert loss["old"] != loss["new"]
    changed = json.loads(run_in(project, "dvc", "params", "diff", "--json").stdout)
    assert "train.lr" in str(changed)
    run_in(project, "dvc", "plots", "show", "-o", "plots")
    page = (project / "plots" / "index.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("training loss", "validation loss", "confusion"))


def test_repro_typed_by_hand_finds_nothing_to_do(project: Path) -> None:
    assert "up to date" in run_in(project, "dvc", "repro").stdout


def test_own_csv_with_three_words(project: Path) -> None:
    rows = [f'"the {kind} number {i} is {kind} indeed",{kind}' for i in range(60) for kind in ("good", "bad", "odd")]
    (project / "my reviews.csv").write_text("body,stars\n" + "\n".join(rows) + "\n", encoding="utf-8")
    done = run_in(project, "millrace", "run", "data.source=my reviews.csv", "data.text=body", "data.label=stars",
                  "data.dedup.near=false", code=4)  # fmt: skip
    run_in(project, "millrace", "registry", "promote", "v0001")
    assert "raw" not in ran(done)
    assert Registry(project / "registry").champion("my-reviews") is not None
    assert Registry(project / "registry").champion("text-classify") is not None, "the other model is still there"
    answer = json.loads(run_in(project, "millrace", "predict", "the good number is good indeed").stdout)
    assert answer["label"] == "good"


def test_predict_answers_with_the_champion_and_with_a_folder(project: Path) -> None:
    text = "def get(self, key): return self.headers[key]"
    champion = run_in(project, "millrace", "predict", text).stdout
    shutil.rmtree(project / "registry")
    assert run_in(project, "millrace", "predict", text).stdout == champion
    (project / "texts.txt").write_text(f"{text}\n{text}\n", encoding="utf-8")
    both = run_in(project, "millrace", "predict", "--file", "texts.txt", "--model", "out/quantized").stdout
    assert both.splitlines() == [champion.strip()] * 2
    row = json.loads(champion)
    assert row["scores"][row["label"]] == max(row["scores"].values())


def test_registry_and_report_commands(project: Path) -> None:
    listed = run_in(project, "millrace", "registry", "ls").stdout
    assert re.match(r"\* text-classify +v0001 ", listed)
    shown = json.loads(run_in(project, "millrace", "registry", "show", "text-classify").stdout)
    assert shown["champion"] is True
    report = Path(run_in(project, "millrace", "report").stdout.strip())
    assert (project / report).stat().st_size < 1_000_000


def test_a_new_project_runs_outside_of_any_git(tmp_path: Path, finished: Path) -> None:
    raw = finished / "data/raw/stdlib-functions.jsonl"
    lines = raw.read_text(encoding="utf-8").splitlines()[:6000:12]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["--data", "rows.jsonl", "--text", "text", "--label", "label"]
    small = [word for word in SMALL if not word.startswith("data.max_rows")]
    run_in(tmp_path, "millrace", "new", "mine", *words, *small)
    folder = tmp_path / "mine"
    done = run_in(folder, "millrace", "run", "--until", "preprocess")
    assert ran(done) == ["preprocess"]
    tracked = yaml.safe_load((folder / "data/rows.jsonl.dvc").read_text(encoding="utf-8"))
    assert manifest.read(folder / "out/dataset").meta["data_version"] == tracked["outs"][0]["md5"]
    assert not (folder / ".git").exists()
