"""`millrace registry` and the champion that `millrace predict` answers with, on real registries."""

import json
import tempfile
import uuid
from pathlib import Path

import pytest

from pipelines import local
from pipelines.cli import main
from trainer.artifacts import manifest
from trainer.config.load import load
from trainer.registry import Registry


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def enter(registry: Registry, model: str, content: str) -> str:
    """A version with its own content; the name that it got."""
    with tempfile.TemporaryDirectory() as place:
        candidate, test = Path(place) / "c", Path(place) / "t"
        candidate.mkdir()
        (candidate / "model.onnx").write_text(content)
        manifest.seal(candidate, "model", {}, {})
        (test / "test").mkdir(parents=True)
        manifest.seal(test, "dataset", {}, {})
        return registry.add(model, candidate, test, {}, bytes=1).version


def two_champions(registry: Registry, model: str) -> None:
    enter(registry, model, f"{model} 1")
    enter(registry, model, f"{model} 2")
    registry.promote(model, "v0001", "", "r")
    registry.promote(model, "v0002", "v0001", "r")


def shown(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    assert main(["registry", "show"]) == 0
    row = json.loads(capsys.readouterr().out)
    return row["model"], row["version"]


def test_the_model_of_params_is_the_default(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        two_champions(Registry("registry"), name)
    (in_folder / "params.yaml").write_text("promote:\n  model: two\n", encoding="utf-8")
    assert shown(capsys) == ("two", "v0002")
    assert main(["registry", "rollback"]) == 0
    assert "two: the champion is v0001 (was v0002)" in capsys.readouterr().out
    assert shown(capsys) == ("two", "v0001")
    assert Registry("registry").champion("one").version == "v0002"


def test_the_only_model_is_the_default_where_params_name_none(capsys: pytest.CaptureFixture[str]) -> None:
    two_champions(Registry("registry"), "only")
    assert shown(capsys) == ("only", "v0002")


def test_of_several_models_one_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        two_champions(Registry("registry"), name)
    assert main(["registry", "rollback"]) == 2
    assert "one, two" in capsys.readouterr().err


def test_a_version_alone_is_of_the_default_model(capsys: pytest.CaptureFixture[str]) -> None:
    two_champions(Registry("registry"), "only")
    assert main(["registry", "show", "v0001"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == "v0001"


def test_promote_names_a_champion(capsys: pytest.CaptureFixture[str]) -> None:
    two_champions(Registry("registry"), "only")
    Registry("registry").rollback("only")
    assert main(["registry", "promote", "only", "v0002"]) == 0
    assert Registry("registry").champion("only").version == "v0002"
    assert main(["registry", "ls"]) == 0
    assert "named" in capsys.readouterr().out
    assert main(["registry", "promote", "only"]) == 2
    assert "VERSION" in capsys.readouterr().err


def test_a_champion_of_a_remote_registry_is_this_models(
    in_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models, both at v0001, asked one after the other in a folder that is nobody's project."""
    import trainer.predict

    class Content:
        def __init__(self, folder: Path) -> None:
            self.text = (folder / "model.onnx").read_text()

        def predict(self, inputs: list[str], batch_size: int) -> list[dict]:
            return [{"label": self.text} for _ in inputs]

    monkeypatch.setattr(trainer.predict, "Predictor", Content)
    uri = f"memory://{uuid.uuid4().hex}"
    for name in ("one", "two"):
        version = enter(Registry(uri), name, name)
        Registry(uri).promote(name, version, "", "r")
    for name in ("one", "two"):
        (in_folder / "params.yaml").write_text(f"promote: {{model: {name}, registry: '{uri}'}}\n", encoding="utf-8")
        assert main(["predict", "text"]) == 0
        assert json.loads(capsys.readouterr().out)["label"] == name
    assert [path.name for path in in_folder.iterdir()] == ["params.yaml"]


def test_a_champion_that_was_altered_is_to_be_rolled_back(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_folder / "params.yaml").write_text("promote:\n  model: only\n", encoding="utf-8")
    two_champions(Registry("registry"), "only")
    (model,) = (in_folder / "registry" / "only" / "versions" / "v0002" / "model").glob("*.onnx")
    model.chmod(0o644)
    model.write_text("only 3")
    assert main(["predict", "text"]) == 2
    err = capsys.readouterr().err
    assert "model.onnx: corrupted" in err
    assert "fix: make an earlier version the champion: `millrace registry rollback`" in err
    assert "run the stage" not in err


def judged(folder: Path, version: str, digest: str) -> None:
    (folder / "out" / "promotion").mkdir(parents=True, exist_ok=True)
    verdict = {"decision": "promoted", "champion": version, "champion_digest": digest, "registry": "registry"}
    (folder / "out" / "promotion" / "promotion.json").write_text(json.dumps(verdict | {"model": "m"}), encoding="utf-8")


def test_a_run_sees_that_the_champion_is_another_one(in_folder: Path) -> None:
    """After a rollback, a promotion by somebody else, a new registry, or its loss; not while all is as it was left."""
    params = load(None, ["promote.model=m"])
    assert not local.champion_moved(params)
    registry = Registry("registry")
    two_champions(registry, "m")
    champion = registry.champion("m")
    judged(in_folder, "v0002", champion.digest)
    assert not local.champion_moved(params)
    judged(in_folder, "v0002", "digest of a v0002 in a registry that was deleted")
    assert local.champion_moved(params)
    judged(in_folder, "v0002", champion.digest)
    registry.rollback("m")
    assert local.champion_moved(params)
    judged(in_folder, "", "")
    assert local.champion_moved(params)
