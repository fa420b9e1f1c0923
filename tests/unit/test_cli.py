"""The command line: names, exit codes and messages. Runs `main` in this process, in a folder of its own."""

import io
import json
import sys
from pathlib import Path

import pytest

from pipelines import commands, reference
from pipelines.cli import build_parser, main
from trainer import __version__, presets
from trainer.artifacts import manifest
from trainer.config import Params
from trainer.config.load import load
from trainer.stage import STAGES


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Standard error of a command that must end with 2 and a fix."""
    try:
        code = main(words)
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code == 2, err
    assert "error: " in err
    assert "fix: " in err
    assert "Traceback" not in err
    return err


WRONG = {
    "command": (["rnu"], "did you mean 'run'"),
    "action": (["preset", "shw"], "did you mean 'show'"),
    "preset": (["preset", "use", "text-clasify"], "did you mean 'text-classify'"),
    "stage": (["stage", "trian"], "did you mean 'train'"),
    "until": (["run", "--until", "trian"], "did you mean 'train'"),
    "option": (["run", "--froce"], "--froce"),
    "no project": (["run"], "params.yaml: no such file"),
    "report without a run": (["report"], "no such file"),
    "no model": (["predict", "text"], "no model"),
    "no such model": (["predict", "--model", "nowhere", "text"], "nowhere"),
    "batch size": (["predict", "--batch-size", "0", "text"], "above 0"),
    "config key": (["config", "trian.lr=1"], "did you mean 'train'"),
    "config nested key": (["config", "train.le=1"], "did you mean 'lr'"),
    "new without data": (["new", "there", "--data", "nowhere.csv"], "nowhere.csv: no such file"),
    "new from a device": (["new", "there", "--data", "/dev/null"], "/dev/null: neither a file nor a folder"),
    "new preset": (["new", "there", "--data", ".", "--preset", "digit"], "no such preset"),
    "rollback": (["registry", "--uri", "reg", "rollback", "default"], "no earlier champion"),
    "registry model": (["registry", "--uri", "reg", "show", "Not A Name"], "not a model name"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_words_name_the_fix(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = WRONG[case]
    assert expected in refused(words, capsys)


BAD_OVERRIDES = ["train.lr=fast", "train.lr=-1", "train.lr=nan", "tran.lr=1", "train.learning_rate=1", "lr=1", "train=1",
                 "model.name=gpt", "data.split.val=0.95", "data.source=", "data.source=nowhere.csv",
                 "data.source=builtin:stdlib", "data.tokenizer.path=nowhere.json", "distill.teachers=[nowhere]",
                 "tune.space.train.nothing.low=1", "distill.student.name=decoder", "parallel.tp=2"]  # fmt: skip


@pytest.mark.parametrize("word", BAD_OVERRIDES)
def test_a_bad_override_changes_no_file(word: str, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    presets.use(presets.DEFAULT, in_folder / "params.yaml")
    before = {path: path.read_bytes() for path in in_folder.rglob("*") if path.is_file()}
    refused(["run", "train.epochs=3", word], capsys)
    assert {path: path.read_bytes() for path in in_folder.rglob("*") if path.is_file()} == before


BLAMED = {
    "unknown key": (["run", "train.lrr=1"], "error: command line: train.lrr: unknown key; did you mean 'lr'?"),
    "bad value": (["run", "train.lr=fast"], "error: command line: train.lr: must be a valid number"),
    "two values that do not fit": (["config", "data.split.val=0.95"], "error: command line: data.split: val (0.95)"),
    "new": (["new", "there", "--data", "rows.csv", "train.lrr=1"], "error: command line: train.lrr: unknown key"),
    "text": (["new", "there", "--data", "rows.csv", "--text", "boddy"], "fix: set --text to the name of a column"),
    "label": (["new", "there", "--data", "rows.csv", "--label", "topc"], "fix: set --label to the name of a column"),
    "key": (["new", "there", "--data", "rows.jsonl", "--text", "boddy"], "fix: set --text and --label to the keys"),
}


@pytest.mark.parametrize("case", BLAMED)
def test_a_wrong_word_is_blamed_on_the_command_line(
    case: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    presets.use(presets.DEFAULT, in_folder / "params.yaml")
    (in_folder / "rows.csv").write_text("text,label\nhello,1\n", encoding="utf-8")
    (in_folder / "rows.jsonl").write_text('{"text": "hello", "label": "1"}\n', encoding="utf-8")
    words, expected = BLAMED[case]
    assert expected in refused(words, capsys)


def test_what_is_wrong_in_the_file_is_blamed_on_the_file(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_folder / "params.yaml").write_text("train: {lrr: 1}\n", encoding="utf-8")
    assert "error: params.yaml: train.lrr: unknown key" in refused(["run", "train.epochs=3"], capsys)


def test_help_of_every_command_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    def parsers(parser, words):
        yield words
        for action in parser._actions:
            if action.choices and hasattr(action.choices, "items"):
                for name, sub in action.choices.items():
                    yield from parsers(sub, [*words, name])

    every = list(parsers(build_parser(), []))
    assert len(every) > 12
    for words in every:
        try:
            code = main([*words, "--help"])
        except SystemExit as error:
            code = error.code
        assert code == 0, words
        assert len(capsys.readouterr().out.splitlines()) > 3, words


def test_help_lists_the_exit_code_of_ctrl_c(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(args: object) -> int:
        raise KeyboardInterrupt

    assert _exit(["--help"]) == 0
    listed = capsys.readouterr().out.partition("exit codes:")[2]
    monkeypatch.setattr(commands, "version", stopped)
    assert f"  {main(['version'])}  stopped by Ctrl-C" in listed


def test_stage_help_comes_from_the_stage_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit(["stage"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for stage in STAGES.values():
        assert stage.help in out


def _exit(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as error:
        return int(error.code or 0)


def test_stage_passes_its_words_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage", "train", "--print-config", "train.lr=0.125"]) == 0
    assert "lr: 0.125" in capsys.readouterr().out


def test_new_asks_only_for_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(["new"], capsys)
    assert "required: DIR, --data\n" in err


def test_wrong_words_are_told_without_their_passwords(capsys: pytest.CaptureFixture[str]) -> None:
    assert "hunter2" not in refused(["run", "--from=https://me:hunter2@host/x"], capsys)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"millrace {__version__}\n"


def test_config_lists_every_parameter_with_default_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    out = capsys.readouterr().out
    for section, field in Params.model_fields.items():
        inner = field.annotation
        if hasattr(inner, "model_fields"):
            for key, spec in inner.model_fields.items():
                assert f"{section}.{key}" in out
                if spec.description and not hasattr(spec.annotation, "model_fields"):  # a section of its own has keys
                    assert " ".join(spec.description.split()) in " ".join(out.split())
    assert "train.lr = 0.001\n    float, > 0.0, <= 100.0. Peak learning rate." in out


def test_config_prints_what_the_stages_will_see(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    presets.use("debian-sections", in_folder / "params.yaml")
    assert main(["config", "--print-config", "train.lr=0.25"]) == 0
    (in_folder / "again.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert load("again.yaml") == load("params.yaml", ["train.lr=0.25"])


def test_schema_is_json_and_closed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Params.model_fields)


@pytest.mark.parametrize("name", presets.names())
def test_preset_show_and_use_agree(name: str, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preset", "show", name]) == 0
    shown = capsys.readouterr().out
    assert main(["preset", "use", name]) == 0
    assert (in_folder / "params.yaml").read_text(encoding="utf-8") == shown


def test_preset_use_keeps_changes_of_yours(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preset", "use", "text-classify"]) == 0
    assert main(["preset", "use", "debian-sections"]) == 0, "an unchanged preset may be replaced"
    path = in_folder / "params.yaml"
    path.write_text(path.read_text(encoding="utf-8") + "# mine\n", encoding="utf-8")
    refused(["preset", "use", "text-classify"], capsys)
    assert path.read_text(encoding="utf-8").endswith("# mine\n")
    assert main(["preset", "use", "text-classify", "--force"]) == 0


def test_preset_ls_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preset", "ls"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == presets.names()


def test_reference_covers_what_the_model_dumps() -> None:
    def leaves(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict) and f"{prefix}{key}" != "tune.space":
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    listed = {key.path.split(" ")[0] for key in reference.parameters()}
    dumped = {path for path in leaves(Params().model_dump()) if not path.startswith("distill.student.")}
    assert dumped <= listed


def test_commented_yaml_reads_back_to_the_same_parameters(in_folder: Path) -> None:
    params = load(None, ["train.lr=3e-5", "model.name=encoder", "model.dim=64", "data.source=a b: c.csv",
                         "tune.space.model.dim.type=categorical", "tune.space.model.dim.choices=[32, 64]"])  # fmt: skip
    (in_folder / "params.yaml").write_text(reference.commented(params), encoding="utf-8")
    assert load("params.yaml") == params


def test_a_closed_pipe_is_no_error(in_folder: Path) -> None:
    import subprocess

    command = f"{sys.executable} -m pipelines.cli config | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command}; true"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("data.source")
    assert "BrokenPipe" not in done.stderr


class Echo:
    """Stands where a model would: what is tested is how inputs reach it."""

    def __init__(self, folder: Path) -> None:
        self.batches: list[list[str]] = []

    def predict(self, inputs: list[str], batch_size: int) -> list[dict]:
        assert 0 < len(inputs) <= batch_size
        return [{"label": text, "batch": len(inputs)} for text in inputs]


@pytest.fixture
def echo(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import trainer.predict

    monkeypatch.setattr(trainer.predict, "Predictor", Echo)
    (in_folder / "model").mkdir()
    return in_folder


def labels(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]


def test_predict_takes_texts(echo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--model", "model", "one", "two words", "{not json"]) == 0
    assert labels(capsys) == ["one", "two words", "{not json"]


def test_predict_answers_from_no_model_that_was_altered(echo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (echo / "model" / "model.onnx").write_bytes(b"weights")
    manifest.seal(echo / "model", "model", {}, {})
    assert main(["predict", "--model", "model", "one"]) == 0
    (echo / "model" / "model.onnx").write_bytes(b"weighty")
    capsys.readouterr()
    assert "model/model.onnx: corrupted" in refused(["predict", "--model", "model", "one"], capsys)
    (echo / "out").mkdir()
    (echo / "model").rename(echo / "out" / "quantized")
    assert "out/quantized/model.onnx: corrupted" in refused(["predict", "one"], capsys)


def test_predict_reads_lines_and_json_from_a_file(echo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (echo / "in.txt").write_text(
        'one\n\n{"text": "two\\nlines", "n": 1}\n  "three"\n"four" he said\n', encoding="utf-8"
    )
    assert main(["predict", "--model", "model", "--file", "in.txt"]) == 0
    assert labels(capsys) == ["one", "two\nlines", "three", '"four" he said']


def test_predict_reads_json_after_a_byte_order_mark_and_spaces(echo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (echo / "in.txt").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n \t{"text": "two"}\n  three\n')
    assert main(["predict", "--model", "model", "--file", "in.txt"]) == 0
    assert labels(capsys) == ["one", "two", "  three"]
    (echo / "plain.txt").write_bytes(b"\xef\xbb\xbfone\n")
    assert main(["predict", "--model", "model", "--file", "plain.txt"]) == 0
    assert labels(capsys) == ["one"]


def test_predict_reads_stdin_in_batches(
    echo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{i}\n" for i in range(5))))
    assert main(["predict", "--model", "model", "--batch-size", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["label"], row["batch"]) for row in rows] == [("0", 2), ("1", 2), ("2", 2), ("3", 2), ("4", 1)]


BAD_INPUTS = {
    "empty": (b"", "no input"),
    "not UTF-8": (b"one\n\ncaf\xe9\n", "in.txt:3: not UTF-8"),
    "not UTF-8 far behind": (b"x" * 100_000 + b"\n\xff\n", "in.txt:2: not UTF-8"),
    "damaged object": (b'{"text": "x"}\n {"text": "y"\n', "in.txt:2: begins with { but is no JSON object"),
    "object without the key": (b'one\n{"body": "x"}\n', "in.txt:2"),
    "object with a number": (b'{"text": 3}\n', "in.txt:1"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_predict_names_the_bad_line(case: str, echo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = BAD_INPUTS[case]
    (echo / "in.txt").write_bytes(content)
    assert expected in refused(["predict", "--model", "model", "--file", "in.txt"], capsys)
