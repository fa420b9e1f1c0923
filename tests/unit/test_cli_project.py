"""Projects: params.yaml edited with its comments kept, dvc.yaml made from it, `millrace new`."""

import errno
import fcntl
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from pipelines import dvcfile, local, project
from pipelines.cli import main
from trainer import presets, storage
from trainer.config.load import apply_overrides, load, read_tree
from trainer.config.text import parse_yaml
from trainer.data.naming import model_name
from trainer.errors import MillraceError, StorageError
from trainer.stage import STAGES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    presets.use(presets.DEFAULT, tmp_path / "params.yaml")
    return tmp_path


def test_committed_dvc_yaml_is_what_the_table_and_the_default_preset_say() -> None:
    assert (ROOT / "dvc.yaml").read_text(encoding="utf-8") == dvcfile.render(load(ROOT / "params.yaml"))


def test_every_stage_depends_on_its_inputs_and_just_its_sections() -> None:
    stages = dvcfile.build(load(None))["stages"]
    assert list(stages) == ["raw", *STAGES]
    for name, stage in STAGES.items():
        assert stages[name]["params"] == list(stage.sections)
        inputs = [f"out/{port}" for port in stage.inputs]
        assert stages[name]["deps"] == (inputs or ["data/raw/stdlib-functions.jsonl"])


def test_registry_readers_stay_out_of_the_run_cache_and_only_promote_may_be_refused() -> None:
    stages = dvcfile.build(load(None))["stages"]
    persisted = {name for name in STAGES if any(isinstance(out, dict) for out in stages[name]["outs"])}
    assert persisted == {"evaluate", "promote"}
    assert [name for name in stages if "--allow-refusal" in stages[name]["cmd"]] == ["promote"]


def test_files_that_a_stage_reads_besides_its_inputs_are_dependencies(in_folder: Path) -> None:
    (in_folder / "my tokenizer.json").touch()
    (in_folder / "old").mkdir()
    words = ["data.tokenizer.path=my tokenizer.json", "distill.teachers=[old, s3://bucket/model, out/model]"]
    (in_folder / "out" / "model").mkdir(parents=True)
    stages = dvcfile.build(load(None, words))["stages"]
    assert stages["preprocess"]["deps"] == ["data/raw/stdlib-functions.jsonl", "my tokenizer.json"]
    assert stages["distill"]["deps"] == ["old", "out/model", "out/dataset"]
    stages = dvcfile.build(load(None, [*words, "distill.enabled=false"]))["stages"]
    assert stages["distill"]["deps"] == ["out/dataset", "out/model"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.source=s3://bucket/rows.csv"], ["s3://bucket/rows.csv"]),
        (["data.source=dvc:https://host/repo@v1:rows.csv"], []),
        (["data.source=dvc:https://host/repo:rows.csv"], ["dvc:https://host/repo:rows.csv"]),
        (["distill.teachers=[s3://bucket/model, old]"], ["s3://bucket/model"]),
        ([], []),
    ],
)
def test_what_dvc_cannot_watch_is_known(words: list[str], expected: list[str]) -> None:
    assert dvcfile.unwatched(load(None, words)) == expected


def test_a_second_run_changes_nothing(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with project.held(in_folder):
        before = {path: path.read_bytes() for path in in_folder.rglob("*") if path.is_file()}
        for words in (["run", "train.lr=0.5"], ["preset", "use", "digits"]):
            assert main(words) == 2
            assert "another `millrace run` works in this folder\n  fix: " in capsys.readouterr().err
        assert {path: path.read_bytes() for path in in_folder.rglob("*") if path.is_file()} == before
    assert main(["preset", "use", "digits"]) == 0


def test_without_locks_a_run_goes_on(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with project.held(in_folder) as descriptor:
        assert not os.get_inheritable(descriptor)


@pytest.mark.parametrize("source", ["s3://bucket/rows.csv", "dvc:https://host/repo@v1:data/rows.csv"])
def test_remote_sources_are_no_dependency(source: str) -> None:
    stages = dvcfile.build(load(None, [f"data.source={source}"]))["stages"]
    assert "raw" not in stages
    assert "deps" not in stages["preprocess"]


def test_local_sources_are_dependencies(in_folder: Path) -> None:
    (in_folder / "rows").mkdir()
    for name in ("b.csv", "a.csv", "note.txt"):
        (in_folder / "rows" / name).touch()
    for source, deps in (
        ("rows", ["rows"]),
        ("rows/a.csv", ["rows/a.csv"]),
        ("rows/*.csv", ["rows/a.csv", "rows/b.csv"]),
    ):
        stages = dvcfile.build(load(None, [f"data.source={source}"]))["stages"]
        assert stages["preprocess"]["deps"] == deps
        assert "raw" not in stages


def test_names_that_a_shell_or_yaml_would_read_survive(in_folder: Path) -> None:
    name = "my $(data) & 'rows': #1.csv"
    (in_folder / name).touch()
    text = dvcfile.render(load(None, [f"data.source={name}"]))
    assert yaml.safe_load(text)["stages"]["preprocess"]["deps"] == [name]


EDITS = {
    "number": ["train.lr=3e-5"],
    "text": ["data.text=a: #b"],
    "text like a number": ["data.label=007"],
    "quoted text like a bool": ["data.label='no'"],
    "list": ["model.orders=[1, 2]"],
    "new family": ["model.name=encoder", "model.dim=64", "model.heads=2"],
    "student's family": ["distill.student.name=textcnn"],
    "new dimension": ["tune.space.model.dim.type=int", "tune.space.model.dim.low=8", "tune.space.model.dim.high=64"],
    "bool": ["tune.enabled=false"],
    "empty": ["data.tokenizer.path="],
    "unicode": ["data.label=étiquette 标签"],
}


@pytest.mark.parametrize("case", EDITS)
def test_edit_keeps_comments_and_means_the_same(case: str, in_folder: Path) -> None:
    before = (in_folder / "params.yaml").read_text(encoding="utf-8")
    tree = apply_overrides(read_tree("params.yaml"), EDITS[case])
    after = project.edit(before, tree)
    assert parse_yaml(after, "") == tree
    changed = set(before.splitlines()) - set(after.splitlines())
    kept = {line for line in before.splitlines() if line.lstrip().startswith("#")}
    if "family" not in case:  # the comments of parameters that are gone go with them
        assert not changed & kept
        assert len(changed) <= len(EDITS[case])


def test_run_without_overrides_leaves_params_alone(in_folder: Path) -> None:
    path = in_folder / "params.yaml"
    text = path.read_text(encoding="utf-8").replace("  alpha: 0.7\n", "  alpha:    0.7  # odd but mine\n")
    assert "odd but mine" in text
    path.write_text(text, encoding="utf-8")
    project.configure(Path(), [])
    assert path.read_text(encoding="utf-8") == text


def test_an_override_of_the_same_value_leaves_params_alone(in_folder: Path) -> None:
    before = (in_folder / "params.yaml").read_bytes()
    project.configure(Path(), ["train.seed=0"])
    assert (in_folder / "params.yaml").read_bytes() == before


def test_other_data_is_another_model_unless_a_name_is_given(in_folder: Path) -> None:
    for source, expected in (
        ("data/My Reviews.csv", ['promote.model="my-reviews"']),
        ("builtin:stdlib-modules", ['promote.model="stdlib-modules"']),
        ("builtin:stdlib-functions", []),
    ):
        assert local.model_of_new_source(in_folder, [f"data.source={source}"]) == expected
    assert local.model_of_new_source(in_folder, ["data.source=x.csv", "promote.model=mine"]) == []
    assert local.model_of_new_source(in_folder, ["train.lr=1"]) == []


def test_no_scm_follows_git(in_folder: Path) -> None:
    config = in_folder / ".dvc" / "config.local"
    project.prepare(in_folder)
    assert "no_scm = true" in config.read_text(encoding="utf-8")
    (in_folder / ".git").mkdir()
    project.prepare(in_folder)
    assert not config.exists()


def test_settings_of_yours_in_config_local_are_kept(in_folder: Path) -> None:
    project.prepare(in_folder)
    config = in_folder / ".dvc" / "config.local"
    mine = '[remote "mine"]\n    url = somewhere\n'
    config.write_text(mine, encoding="utf-8")
    project.prepare(in_folder)
    assert config.read_text(encoding="utf-8").startswith(mine)
    (in_folder / ".git").mkdir()
    project.prepare(in_folder)
    assert mine in config.read_text(encoding="utf-8")


def test_committed_dvc_files_are_what_a_new_project_gets(in_folder: Path) -> None:
    assert (ROOT / ".dvc" / "config").read_text(encoding="utf-8") == project.CONFIG
    assert (ROOT / ".dvc" / ".gitignore").read_text(encoding="utf-8") == project.LOCAL_DVC_FILES
    assert (ROOT / ".dvcignore").read_text(encoding="utf-8") == project.IGNORED_BY_DVC
    assert "analytics = false" in project.CONFIG


def test_new_makes_a_whole_project(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = in_folder / "my rows.csv"
    data.write_text("body,stars\nhello,1\n", encoding="utf-8")
    assert main(["new", "there/too", "--data", str(data), "--text", "body", "--label", "stars", "train.lr=0.5"]) == 0
    folder = in_folder / "there" / "too"
    params = load(folder / "params.yaml")
    assert (params.data.source, params.data.text, params.data.label) == ("data/my rows.csv", "body", "stars")
    assert params.train.lr == 0.5
    first = (folder / "params.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert "my rows.csv" in first
    assert "standard library" not in first
    assert (folder / "data" / "my rows.csv").read_bytes() == data.read_bytes()
    tracked = yaml.safe_load((folder / "data" / "my rows.csv.dvc").read_text(encoding="utf-8"))
    assert tracked["outs"][0]["path"] == "my rows.csv"
    assert yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["preprocess"]["deps"] == [
        "data/my rows.csv"
    ]
    assert "cd there/too" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["rows.csv", "my rows [1] #2!.csv", "отзывы.csv"])
def test_data_of_a_new_project_stays_out_of_a_git_made_later(name: str, in_folder: Path) -> None:
    (in_folder / name).write_text("text,label\nhello,1\n", encoding="utf-8")
    assert main(["new", "there", "--data", name]) == 0
    folder = in_folder / "there"
    for words in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    done = subprocess.run(["git", "ls-files", "-z"], cwd=folder, check=True, capture_output=True, text=True)
    tracked = done.stdout.split("\0")
    assert f"data/{name}.dvc" in tracked
    assert f"data/{name}" not in tracked
    project.prepare(folder)
    project.dvc(folder, "add", "-q", f"data/{name}")
    assert (folder / "data" / ".gitignore").read_text(encoding="utf-8").count("\n") == 1


def test_new_names_the_model_after_the_data_unless_it_is_named(in_folder: Path) -> None:
    (in_folder / "My rows.csv").write_text("text,label\nhello,1\n", encoding="utf-8")
    for folder, words, name in (("a", [], "my-rows"), ("b", ["promote.model=mine"], "mine")):
        assert main(["new", folder, "--data", "My rows.csv", *words]) == 0
        assert load(in_folder / folder / "params.yaml").promote.model == name
    assert local.model_of_new_source(in_folder, ["data.source=data/My rows.csv"]) == ['promote.model="my-rows"']


@pytest.mark.parametrize("name", ["2024", "null", "true", "1e3"])
def test_a_model_may_be_named_like_a_number(name: str, in_folder: Path) -> None:
    (in_folder / f"{name}.csv").write_text("text,label\nhello,1\n", encoding="utf-8")
    words = [f"data.source={name}.csv"]
    assert load("params.yaml", [*words, *local.model_of_new_source(in_folder, words)]).promote.model == name
    assert main(["new", "there", "--data", f"{name}.csv"]) == 0
    assert load(in_folder / "there" / "params.yaml").promote.model == name


def test_names_in_other_scripts_are_models_of_their_own() -> None:
    sources = ["отзывы.csv", "письма.csv", "письма-1.csv", "отзывы-1.csv", "标签/*.csv", "rows/*.csv", "/dev/*"]
    names = [model_name(source) for source in sources]
    assert len(set(names)) == len(sources)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", name) for name in names), names
    assert model_name("data/отзывы.csv") == names[0], "the place does not matter"
    assert model_name("x" * 300) == "x" * 50


@pytest.mark.parametrize("there", [True, False])
def test_new_that_fails_leaves_what_was_there(there: bool, in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_folder / "rows.csv").write_text("text,label\nhello,1\n", encoding="utf-8")
    if there:
        (in_folder / "there").mkdir()

    def fail(folder: Path, *words: str) -> str:
        raise MillraceError("dvc add: no", "see DVC's message")

    with monkeypatch.context() as patched:
        patched.setattr(project, "dvc", fail)
        before = sorted(in_folder.rglob("*"))
        assert main(["new", "there", "--data", "rows.csv"]) != 0
        assert sorted(in_folder.rglob("*")) == before
    assert main(["new", "there", "--data", "rows.csv"]) == 0
    assert load(in_folder / "there" / "params.yaml").data.source == "data/rows.csv"
    assert not list(in_folder.rglob("*millrace-new*"))


@pytest.mark.parametrize(
    ("name", "content"), [("rows.csv", "text,lable\nhello,1\n"), ("rows.jsonl", '{"text": "hello", "lable": "1"}\n')]
)
def test_new_names_the_nearest_column(
    name: str, content: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_folder / name).write_text(content, encoding="utf-8")
    assert main(["new", "there", "--data", name]) == 2
    assert "did you mean 'lable'" in capsys.readouterr().err
    assert not (in_folder / "there").exists()


@pytest.mark.parametrize(("text", "label"), [("null", "1"), ("true", "2020"), ("[a]", "'b'"), ("1e3", "~")])
def test_new_takes_column_names_as_they_are(text: str, label: str, in_folder: Path) -> None:
    (in_folder / "rows.csv").write_text(f"{text},{label}\nhello,1\n", encoding="utf-8")
    assert main(["new", "there", "--data", "rows.csv", "--text", text, "--label", label]) == 0
    params = load(in_folder / "there" / "params.yaml")
    assert (params.data.text, params.data.label) == (text, label)


HOPELESS = {
    "empty file": ("rows.csv", "", [], "rows.csv: the file is empty"),
    "only a header": ("rows.csv", "text,label\n\n", [], "no rows below the header"),
    "no rows": ("rows.json", "[]", [], "row 1"),
    "unknown type": ("rows.xyz", "text,label\nhello,1\n", [], "the format of rows.xyz cannot be told"),
    "plain text": ("rows.txt", "hello\n", [], "plain text has no labels"),
    "plain text in a folder": ("rows/a.txt", "hello\n", [], "plain text has no labels"),
    "nothing readable": ("rows/a.xyz", "hello\n", [], "no file of a known format"),
    "language": ("rows.csv", "text,label\nhello,1\n", ["data.clean.language=xx"], "'xx' is not known"),
}


@pytest.mark.parametrize("case", HOPELESS)
def test_new_refuses_what_can_never_work(case: str, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content, words, expected = HOPELESS[case]
    (in_folder / name).parent.mkdir(exist_ok=True)
    (in_folder / name).write_text(content, encoding="utf-8")
    before = sorted(in_folder.rglob("*"))
    assert main(["new", "there", "--data", name.split("/")[0], *words]) == 2
    assert expected in capsys.readouterr().err
    assert sorted(in_folder.rglob("*")) == before


def test_new_takes_plain_text_for_a_language_model(in_folder: Path) -> None:
    (in_folder / "pages.txt").write_text("hello\n", encoding="utf-8")
    assert main(["new", "there", "--data", "pages.txt", "--preset", "code-lm"]) == 0


@pytest.mark.parametrize("word", ["train.lr=fast", "nothing.here=1"])
def test_new_leaves_nothing_when_it_is_refused(word: str, in_folder: Path) -> None:
    (in_folder / "rows.csv").touch()
    assert main(["new", "there", "--data", "rows.csv", word]) == 2
    assert not (in_folder / "there").exists()


def test_new_does_not_touch_a_folder_in_use(in_folder: Path) -> None:
    (in_folder / "rows.csv").touch()
    (in_folder / "there").mkdir()
    (in_folder / "there" / "mine.txt").touch()
    assert main(["new", "there", "--data", "rows.csv"]) == 2
    assert [path.name for path in (in_folder / "there").iterdir()] == ["mine.txt"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can make files")
@pytest.mark.parametrize("folder", ["/proc/there", "/proc/there/too", "rows.csv/there"])
def test_new_where_nothing_can_be_made_is_told_so(
    folder: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_folder / "rows.csv").write_text("text,label\nhello,1\n", encoding="utf-8")
    assert main(["new", folder, "--data", "rows.csv"]) == 2
    err = capsys.readouterr().err
    assert f"error: {folder}: " in err
    assert "fix: " in err
    assert "Traceback" not in err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can make files")
def test_a_file_that_cannot_be_written_is_called_by_its_name() -> None:
    with pytest.raises(StorageError, match=r"^/proc/params\.yaml: "):
        storage.write_atomic(Path("/proc/params.yaml"), b"")


def test_new_takes_a_folder_of_data(in_folder: Path) -> None:
    (in_folder / "rows").mkdir()
    (in_folder / "rows" / "a.jsonl").write_text("{}\n", encoding="utf-8")
    assert main(["new", "there", "--data", "rows"]) == 0
    assert (in_folder / "there" / "data" / "rows" / "a.jsonl").is_file()


def test_dvc_errors_come_as_ours(in_folder: Path) -> None:
    project.prepare(in_folder)
    with pytest.raises(MillraceError, match="dvc add"):
        project.dvc(in_folder, "add", "nowhere.csv")


def test_a_remote_source_is_said_not_to_be_watched_without_its_password(
    in_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = "http://me:hunter/2@localhost:9/rows.csv"
    assert main(["run", f"data.source={source}", "--until", "preprocess"]) == 2
    out, err = capfd.readouterr()
    assert "not watched for changes: http://***@localhost:9/rows.csv; " in out
    assert "run --force` reads it again" in out
    assert "hunter" not in out + err + (in_folder / local.LOG).read_text(encoding="utf-8")
