"""The registry, on a local folder and on S3 (a moto server): versions, champion, compare-and-swap, rollback."""

import errno
import fcntl
import json
from pathlib import Path

import pytest

from tests import s3
from tests.tiny import tiny_dataset
from trainer.artifacts import manifest
from trainer.config.load import load
from trainer.errors import ArtifactError, ConfigError, GateRefused
from trainer.registry import Registry
from trainer.registry_stage import held_out_folder
from trainer.stage import execute


@pytest.fixture(scope="module")
def s3_root():
    with s3.bucket("registries") as uri:
        yield uri


@pytest.fixture(params=["local", "s3"])
def registry(request, tmp_path):
    if request.param == "local":
        return Registry(tmp_path / "registry")
    return Registry(f"{request.getfixturevalue('s3_root')}/{tmp_path.name}")


def candidate(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_text(content)
    (folder / "extra").mkdir()
    (folder / "extra" / "note.txt").write_text("a file of a folder")
    manifest.seal(folder, "model", {}, {})
    return folder


def held_out(folder: Path) -> Path:
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "labels.npy").write_bytes(b"labels")
    manifest.seal(folder, "dataset", {"data_version": "abc", "of": "parent"}, {})
    return folder


FACTS = {"bytes": 7, "metrics": {"accuracy": 0.5}}


def enter(registry: Registry, tmp_path: Path, content: str):
    test = tmp_path / "held-out"
    if not test.exists():
        held_out(test)
    return registry.add("m", candidate(tmp_path / f"c-{content}", content), test, {"accuracy": 0.5}, **FACTS)


def tree(registry: Registry, path: str) -> dict[str, bytes]:
    """Content of all files below a path."""
    found = {}
    for name in registry.store.names(path):
        content = registry.store.read(f"{path}/{name}") if "." in name or name == "claim" else None
        found |= {f"{path}/{name}": content} if content is not None else tree(registry, f"{path}/{name}")
    return found


def test_versions_are_numbered_and_never_change(registry, tmp_path):
    first = enter(registry, tmp_path, "one")
    before = tree(registry, "m/versions/v0001")
    second = enter(registry, tmp_path, "two")
    registry.promote("m", "v0002", "", "r")
    assert [first.version, second.version] == ["v0001", "v0002"]
    assert [version.version for version in registry.versions("m")] == ["v0001", "v0002"]
    assert len(before) >= 7
    assert tree(registry, "m/versions/v0001") == before


def test_a_version_holds_model_test_and_figures(registry, tmp_path):
    version = enter(registry, tmp_path, "one")
    model = registry.fetch("m", "v0001", "model", tmp_path / "cache")
    assert (model / "model.onnx").read_text() == "one"
    assert (model / "extra" / "note.txt").is_file()
    test = registry.fetch("m", "v0001", "test", tmp_path / "cache2")
    assert (test / "test" / "labels.npy").read_bytes() == b"labels"
    assert (version.data_version, version.dataset_digest, version.bytes) == ("abc", "parent", 7)
    assert registry.evaluation("m", "v0001") == {"accuracy": 0.5}


def test_the_same_candidate_is_entered_once(registry, tmp_path):
    first = enter(registry, tmp_path, "one")
    again = registry.add("m", tmp_path / "c-one", tmp_path / "held-out", {"accuracy": 0.9}, **FACTS)
    assert again == first
    assert len(registry.versions("m")) == 1


def test_promotion_needs_the_champion_it_was_compared_with(registry, tmp_path):
    for content in ("one", "two", "three"):
        enter(registry, tmp_path, content)
    registry.promote("m", "v0001", "", "first")
    registry.promote("m", "v0002", "v0001", "better")
    with pytest.raises(GateRefused, match="v0002 now"):
        registry.promote("m", "v0003", "v0001", "late")
    with pytest.raises(GateRefused):
        registry.promote("m", "v0003", "", "late")
    assert registry.champion("m").version == "v0002"


def test_of_many_creators_of_a_file_one_wins(registry):
    """What the compare-and-swap rests on; the loser's content is nowhere to be seen."""
    from concurrent.futures import ThreadPoolExecutor

    for number in range(5):
        path = f"m/promotions/{number:06d}.json"
        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(lambda who, path=path: registry.store.create(path, f"{who}".encode() * 1000), range(6)))
        assert won.count(True) == 1
        assert registry.store.read(path) == f"{won.index(True)}".encode() * 1000


def test_promoting_the_champion_again_changes_nothing(registry, tmp_path):
    enter(registry, tmp_path, "one")
    first = registry.promote("m", "v0001", "", "first")
    assert registry.promote("m", "v0001", "", "again") == first
    assert len(registry.history("m")) == 1


def test_rollback_walks_back_through_the_champions(registry, tmp_path):
    for content in ("one", "two", "three"):
        enter(registry, tmp_path, content)
    registry.promote("m", "v0001", "", "r")
    registry.promote("m", "v0002", "v0001", "r")
    registry.promote("m", "v0003", "v0002", "r")
    assert registry.rollback("m")["version"] == "v0002"
    assert registry.rollback("m")["version"] == "v0001"
    with pytest.raises(ArtifactError, match="no earlier champion"):
        registry.rollback("m")
    assert registry.rollback("m", "v0003")["version"] == "v0003"
    assert [event.action for event in registry.history("m")] == ["promote"] * 3 + ["rollback"] * 3
    assert registry.champion("m").version == "v0003"


def test_a_stale_pointer_file_is_brought_up_to_date(registry, tmp_path):
    enter(registry, tmp_path, "one")
    enter(registry, tmp_path, "two")
    registry.promote("m", "v0001", "", "r")
    stale = registry.store.read("m/champion.json")
    registry.promote("m", "v0002", "v0001", "r")
    registry.store.replace("m/champion.json", stale)
    assert registry.champion("m").version == "v0002"
    registry.promote("m", "v0002", "v0001", "r")
    assert json.loads(registry.store.read("m/champion.json"))["version"] == "v0002"


def test_show_and_list_tell_the_champion(registry, tmp_path):
    enter(registry, tmp_path, "one")
    enter(registry, tmp_path, "two")
    registry.promote("m", "v0001", "", "r")
    assert [(row["version"], row["champion"]) for row in registry.list_versions()] == [
        ("v0001", True),
        ("v0002", False),
    ]
    assert registry.show("m")["version"] == "v0001"
    assert registry.show("m", "v0002")["champion"] is False
    assert json.dumps(registry.show("m"))


def test_an_unfinished_version_is_not_there(registry, tmp_path):
    enter(registry, tmp_path, "one")
    registry.store.create("m/versions/v0002/claim", b"killed here")
    assert [version.version for version in registry.versions("m")] == ["v0001"]
    assert enter(registry, tmp_path, "two").version == "v0003"


@pytest.mark.parametrize("name", ["../x", "", "A", "a/b", "-a", "a" * 64, "a\n"])
def test_bad_model_names_are_refused(tmp_path, name):
    with pytest.raises(ConfigError):
        Registry(tmp_path).versions(name)


@pytest.mark.parametrize("name", ["v2", "v0009", "../v0001", "champion", ""])
def test_unknown_versions_are_refused_by_name(tmp_path, name):
    registry = Registry(tmp_path / "r")
    enter(registry, tmp_path, "one")
    with pytest.raises(ArtifactError, match="no version"):
        registry.version("m", name)


def test_an_empty_registry_says_what_to_do(tmp_path):
    registry = Registry(tmp_path / "none")
    assert registry.models() == registry.list_versions() == []
    assert registry.champion("m") is None
    with pytest.raises(ArtifactError, match="no champion"):
        registry.show("m")
    with pytest.raises(ArtifactError, match="nothing was promoted"):
        registry.rollback("m")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("file", ["versions/v0001/version.json", "promotions/000001.json"])
def test_each_flipped_byte_is_found(tmp_path, file):
    registry = Registry(tmp_path / "r")
    enter(registry, tmp_path, "one")
    registry.promote("m", "v0001", "", "r")
    path = tmp_path / "r" / "m" / file
    content = path.read_bytes()
    for place in range(0, len(content) - 1, 7):
        changed = bytearray(content)
        changed[place] ^= 0x04
        path.write_bytes(changed)
        if changed.split() == content.split():
            continue
        with pytest.raises(ArtifactError, match="corrupted"):
            registry.show("m")
    path.write_bytes(content)
    registry.show("m")


def test_no_rollback_to_a_corrupted_model(tmp_path):
    registry = Registry(tmp_path / "r")
    enter(registry, tmp_path, "one")
    enter(registry, tmp_path, "two")
    registry.promote("m", "v0001", "", "r")
    registry.promote("m", "v0002", "v0001", "r")
    (tmp_path / "r/m/versions/v0001/model/model.onnx").write_text("onE")
    with pytest.raises(ArtifactError, match="corrupted"):
        registry.rollback("m")
    assert registry.champion("m").version == "v0002"


# The stage


def evaluation(folder: Path, model: Path, dataset: Path, decision: str = "promoted", champion: str = "") -> Path:
    folder.mkdir()
    figures = {
        "candidate": {"accuracy": 0.9, "bytes": 5},
        "gate": {"decision": decision, "reason": f"because {decision}", "champion": champion},
    }
    (folder / "metrics.json").write_text(json.dumps(figures))
    meta = {"candidate": manifest.read(model).digest, "dataset": manifest.read(dataset).digest}
    manifest.seal(folder, "evaluation", meta, {}, ("metrics.json",))
    return folder


def promote(tmp_path: Path, model: Path, figures: Path, out: str = "promotion"):
    params = load(None, [f"promote.registry={tmp_path / 'registry'}", "promote.model=m"])
    inputs = {"dataset": str(tmp_path / "dataset"), "quantized": str(model), "evaluation": str(figures)}
    return execute("promote", params, inputs, {"promotion": str(tmp_path / out)})


@pytest.fixture
def dataset(tmp_path):
    return tiny_dataset(tmp_path / "dataset", "classify", 40).folder


def test_stage_promotes_and_is_repeatable(tmp_path, dataset):
    model = candidate(tmp_path / "c", "one")
    figures = evaluation(tmp_path / "e", model, dataset)
    promote(tmp_path, model, figures)
    promote(tmp_path, model, figures)
    registry = Registry(tmp_path / "registry")
    assert registry.champion("m").version == "v0001"
    assert len(registry.versions("m")) == len(registry.history("m")) == 1
    assert json.loads((tmp_path / "promotion/promotion.json").read_text())["decision"] == "promoted"


def test_stage_refused_keeps_the_champion_and_exits_with_4(tmp_path, dataset):
    first, second = candidate(tmp_path / "c1", "one"), candidate(tmp_path / "c2", "two")
    promote(tmp_path, first, evaluation(tmp_path / "e1", first, dataset))
    with pytest.raises(GateRefused, match="because refused") as caught:
        promote(tmp_path, second, evaluation(tmp_path / "e2", second, dataset, "refused", "v0001"))
    assert caught.value.exit_code == 4
    registry = Registry(tmp_path / "registry")
    assert registry.champion("m").version == "v0001"
    assert [row["decision"] for row in registry.list_versions("m")] == ["promoted", "refused"]
    manifest.read(tmp_path / "promotion", "promotion")
    assert json.loads((tmp_path / "promotion/promotion.json").read_text())["decision"] == "refused"


def test_stage_refuses_an_outdated_comparison(tmp_path, dataset):
    first, second = candidate(tmp_path / "c1", "one"), candidate(tmp_path / "c2", "two")
    promote(tmp_path, first, evaluation(tmp_path / "e1", first, dataset))
    with pytest.raises(GateRefused, match="evaluate again"):
        promote(tmp_path, second, evaluation(tmp_path / "e2", second, dataset, "promoted", ""))
    assert Registry(tmp_path / "registry").champion("m").version == "v0001"


def test_stage_wants_the_evaluation_of_this_candidate_and_dataset(tmp_path, dataset):
    first, second = candidate(tmp_path / "c1", "one"), candidate(tmp_path / "c2", "two")
    with pytest.raises(ArtifactError, match="another candidate"):
        promote(tmp_path, second, evaluation(tmp_path / "e1", first, dataset))
    other = tiny_dataset(tmp_path / "other", "classify", 40, seed=1).folder
    with pytest.raises(ArtifactError, match="another dataset"):
        promote(tmp_path, first, evaluation(tmp_path / "e2", first, other))
    assert Registry(tmp_path / "registry").models() == []


def test_the_kept_test_split_is_the_datasets(tmp_path, dataset):
    from trainer.artifacts.dataset import Dataset

    whole = Dataset(dataset)
    kept = Dataset(held_out_folder(whole, tmp_path / "kept"), verify=True)
    assert kept.split("test").texts() == whole.split("test").texts()
    assert kept.labels == whole.labels
    assert kept.spec == whole.spec
    assert kept.meta["of"] == whole.manifest.digest
    with pytest.raises(ArtifactError):
        kept.split("train")


# What the records say


def rows(tmp_path: Path) -> list[tuple[str, bool, str]]:
    listed = Registry(tmp_path / "registry").list_versions("m")
    return [(row["version"], row["champion"], row["decision"]) for row in listed]


def test_a_judgement_does_not_hide_a_later_one(tmp_path, dataset):
    """Refused at first, promoted with another baseline: the champion's row says why it is the champion."""
    model = candidate(tmp_path / "c", "one")
    with pytest.raises(GateRefused):
        promote(tmp_path, model, evaluation(tmp_path / "e1", model, dataset, "refused"))
    assert rows(tmp_path) == [("v0001", False, "refused")]
    promote(tmp_path, model, evaluation(tmp_path / "e2", model, dataset))
    assert rows(tmp_path) == [("v0001", True, "promoted")]
    shown = Registry(tmp_path / "registry").show("m")
    assert shown["reason"] == shown["evaluation"]["gate"]["reason"] == "because promoted"
    assert [each["decision"] for each in shown["judgements"]] == ["refused", "promoted"]


def test_a_late_refusal_is_recorded_as_one(tmp_path, dataset):
    """The gate let it pass, but the champion had changed by then."""
    first, second = candidate(tmp_path / "c1", "one"), candidate(tmp_path / "c2", "two")
    promote(tmp_path, first, evaluation(tmp_path / "e1", first, dataset))
    with pytest.raises(GateRefused):
        promote(tmp_path, second, evaluation(tmp_path / "e2", second, dataset, "promoted", ""))
    assert rows(tmp_path) == [("v0001", True, "promoted"), ("v0002", False, "refused")]
    assert "evaluate again" in Registry(tmp_path / "registry").show("m", "v0002")["reason"]


def rolled_back(tmp_path, dataset):
    """The registry after two promotions and a rollback of the second, and the second candidate."""
    first, second = candidate(tmp_path / "c1", "one"), candidate(tmp_path / "c2", "two")
    promote(tmp_path, first, evaluation(tmp_path / "e1", first, dataset))
    promote(tmp_path, second, evaluation(tmp_path / "e2", second, dataset, "promoted", "v0001"))
    registry = Registry(tmp_path / "registry")
    registry.rollback("m")
    return registry, second


def test_records_follow_a_rollback_and_a_person_who_names_a_champion(tmp_path, dataset):
    registry, _ = rolled_back(tmp_path, dataset)
    assert rows(tmp_path) == [("v0001", True, "restored"), ("v0002", False, "withdrawn")]
    registry.name_champion("m", "v0002")
    assert rows(tmp_path) == [("v0001", False, "restored"), ("v0002", True, "named")]
    assert [event.action for event in registry.history("m")] == ["promote", "promote", "rollback", "name"]


def test_what_was_rolled_back_from_is_not_promoted_again_by_a_rerun(tmp_path, dataset):
    registry, second = rolled_back(tmp_path, dataset)
    with pytest.raises(GateRefused, match="millrace registry promote m v0002"):
        promote(tmp_path, second, tmp_path / "e2")
    assert registry.champion("m").version == "v0001"
    assert rows(tmp_path)[1] == ("v0002", False, "refused")
    verdict = json.loads((tmp_path / "promotion/promotion.json").read_text())
    assert (verdict["decision"], verdict["champion"]) == ("refused", "v0001")
    registry.name_champion("m", "v0002")
    promote(tmp_path, second, tmp_path / "e2")
    assert rows(tmp_path)[1] == ("v0002", True, "promoted")
    assert (
        json.loads((tmp_path / "promotion/promotion.json").read_text())["champion_digest"]
        == manifest.read(second).digest
    )


def test_a_superseded_champion_was_not_rolled_back_from(registry, tmp_path):
    for content in ("one", "two", "three"):
        enter(registry, tmp_path, content)
    registry.promote("m", "v0001", "", "r")
    registry.promote("m", "v0002", "v0001", "r")
    registry.promote("m", "v0001", "v0002", "better on other data")
    registry.rollback("m", "v0003")
    with pytest.raises(GateRefused, match="rolled back from v0001 to v0003"):
        registry.promote("m", "v0001", "v0003", "r")
    assert registry.promote("m", "v0002", "v0003", "r").number == 5


def test_of_many_judges_none_is_lost(registry, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    enter(registry, tmp_path, "one")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda who: registry.judge("m", "v0001", "refused", f"{who}", 0, {}), range(8)))
    found = registry.judgements("m")
    assert [judgement.number for judgement in found] == list(range(1, 9))
    assert {judgement.reason for judgement in found} == {f"{who}" for who in range(8)}


def test_a_version_from_before_there_were_judgements_is_read(tmp_path):
    from trainer.registry import _sealed

    registry = Registry(tmp_path / "r")
    enter(registry, tmp_path, "one")
    path = tmp_path / "r/m/versions/v0001/version.json"
    body = json.loads(path.read_text())
    del body["seal"], body["format"]
    path.write_bytes(_sealed(body | {"decision": "refused", "reason": "r"}))
    registry.promote("m", "v0001", "", "r")
    assert registry.list_versions("m")[0]["decision"] == "promoted"


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def refuse(*words):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    registry = Registry(tmp_path / "registry")
    enter(registry, tmp_path, "one")
    registry.promote("m", "v0001", "", "first")
    assert registry.champion("m").version == "v0001"
