"""params.yaml: whatever is wrong in it is a ConfigError that names the dotted path and the fix; nothing else escapes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer.config import Params
from trainer.config.load import apply_overrides, dump, load, parse_override, read_tree, validate, with_values
from trainer.config.model import FAMILIES
from trainer.config.text import MAX_BYTES, parse_yaml
from trainer.errors import ConfigError, MillraceError, redact


def refusal(action, *arguments) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        action(*arguments)
    assert caught.value.hint, "an error tells the fix"
    assert caught.value.exit_code == 2
    return caught.value


UNKNOWN = {
    "section": ({"trian": {}}, "trian: unknown key; did you mean 'train'?"),
    "key": ({"train": {"lrr": 1}}, "train.lrr: unknown key; did you mean 'lr'?"),
    "case": ({"train": {"LR": 1}}, "train.LR: unknown key; did you mean 'lr'?"),
    "second level": ({"data": {"clean": {"htlm": True}}}, "data.clean.htlm: unknown key; did you mean 'html'?"),
    "default family": ({"model": {"bucket": 64}}, "model.bucket: unknown key; did you mean 'buckets'?"),
    "student": ({"distill": {"student": {"hiden": 1}}}, "distill.student.hiden: unknown key; did you mean 'hidden'?"),
    "student family": (
        {"distill": {"student": {"name": "textcnn", "size": [3]}}},
        "distill.student.size: unknown key; did you mean 'sizes'?",
    ),
    "space": (
        {"tune": {"space": {"train.lr": {"lo": 1, "high": 2}}}},
        "tune.space.train.lr.lo: unknown key; did you mean 'low'?",
    ),
    "dimension": (
        {"tune": {"space": {"train.batchsize": {"low": 1, "high": 2}}}},
        "tune.space.train.batchsize: unknown key 'batchsize'; did you mean 'batch_size'?".replace("'batchsize'", "batchsize"),
    ),
    "prune": ({"quantize": {"prune": {"targt": 0.5}}}, "quantize.prune.targt: unknown key; did you mean 'target'?"),
    "at the wrong place": ({"batch_size": 3}, "batch_size: unknown key; did you mean 'train.batch_size'?"),
    "in the wrong section": ({"data": {"lr": 3}}, "data.lr: unknown key; did you mean 'train.lr'?"),
    "family": ({"model": {"name": "textcn"}}, "model.name: textcn is not a model family; did you mean 'textcnn'?"),
    "optimizer": ({"train": {"optimizer": "adamww"}}, "train.optimizer: 'adamww' is not known; did you mean 'adamw'?"),
    "schedule": ({"train": {"schedule": "cosin"}}, "train.schedule: 'cosin' is not known; did you mean 'cosine'?"),
    "metric": ({"tune": {"metric": "accuracy"}}, "tune.metric: 'accuracy' is not known; did you mean 'val_accuracy'?"),
    "optimizer to search": (
        {"tune": {"space": {"train.optimizer": {"type": "categorical", "choices": ["sgd", "adma"]}}}},
        "tune.space.train.optimizer.choices: 'adma' is not known; did you mean 'adam'?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_names_are_answered_with_the_nearest(case):
    tree, message = UNKNOWN[case]
    assert message in str(refusal(validate, tree))


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_keys_of_each_family_are_answered_with_its_own_keys(family):
    tree = {"model": {"name": family, "dropuot": 0.1}}
    assert "model.dropuot: unknown key; did you mean 'dropout'?" in str(refusal(validate, tree))


WRONG = {
    "text for a number": ("train.lr", "'1'"),
    "truth value for a number": ("train.lr", "true"),
    "truth value for a count": ("train.epochs", "true"),
    "truth value for one of several numbers": ("data.image_channels", "true"),
    "number for a truth value": ("train.compile", "1"),
    "yes for a truth value": ("train.compile", "yes"),
    "fraction for a count": ("train.epochs", "1.5"),
    "number for a text": ("data.text", "1"),
    "null for a number": ("train.lr", "null"),
    "list for a number": ("train.lr", "[1]"),
    "mapping for a number": ("train.lr", "{a: 1}"),
    "number for a list": ("train.betas", "0.9"),
    "short list": ("train.betas", "[0.9]"),
    "long list": ("train.betas", "[0.9, 0.9, 0.9]"),
    "empty list": ("model.orders", "[]"),
    "number for a section": ("data.clean", "3"),
    "list for a section": ("data.clean", "[]"),
    "null for a section": ("data.clean", "null"),
    "below": ("train.epochs", "0"),
    "above": ("distill.alpha", "1.0001"),
    "on an open bound": ("data.split.val", "1.0"),
    "below in a list": ("train.betas", "[0.9, -0.1]"),
    "NaN": ("train.lr", ".nan"),
    "infinite": ("train.lr", ".inf"),
    "minus infinite": ("train.lr", "-.inf"),
    "infinite by overflow": ("train.lr", "1e999"),
    "more than 64 bits": ("train.seed", "9" * 20),
    "more digits than Python reads": ("train.seed", "9" * 5000),
    "more digits in base 16": ("train.seed", "0x" + "f" * 5000),
    "no encoding": ("data.encoding", "utf-99"),
    "binary encoding": ("data.encoding", "hex"),
    "NUL": ("data.text", r'"a\0b"'),
    "lone surrogate": ("data.text", r'"\ud800"'),
    "family as a list": ("model.name", "[ngram]"),
    "family as a number": ("model.name", "3"),
    "family as null": ("model.name", "null"),
    "registry name": ("promote.model", "../x"),
    "no value": ("train.lr", ""),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_refused_by_their_dotted_path(case):
    key, value = WRONG[case]
    assert key in refusal(load, None, [f"{key}={value}"]).message


LR, STOP = "tune.space.train.lr", "tune.space.train.early_stopping"
CROSS = {
    "splits leave nothing": (["data.split.val=0.5", "data.split.test=0.5"], "data.split"),
    "bounds crossed": (["data.clean.min_chars=9", "data.clean.max_chars=8"], "data.clean"),
    "heads": (["model.name=encoder", "model.heads=3"], "model"),
    "one row for pairs": (["task.name=lm", "model.name=decoder", "model.bigrams=1"], "model"),
    "odd heads": (["task.name=lm", "model.name=decoder", "model.dim=18", "model.heads=6"], "model"),
    "task of the model": (["task.name=lm"], "model.name"),
    "task of the student": (["task.name=lm", "model.name=decoder"], "distill.student.name"),
    "sequences of texts": (["parallel.cp=2"], "parallel.cp (2) divides the sequences of language models"),
    "slices of sequences": (
        ["task.name=lm", "model.name=decoder", "distill.enabled=false", "parallel.cp=3"],
        "data.max_length is 512: use 510 or 516",
    ),
    "classes of a language model": (
        ["task.name=lm", "model.name=decoder", "distill.enabled=false", "train.class_weights=balanced"], "train.class_weights",
    ),
    "weights": (["distill.weights=[1, 1]"], "distill"),
    "prune order": (["quantize.prune.begin=0.7", "quantize.prune.end=0.7"], "quantize.prune"),
    "direction": (["tune.metric=val_loss"], "tune"),
    "log from zero": ([f"{LR}.low=0", f"{LR}.high=1", f"{LR}.log=true"], "tune.space.train.lr"),
    "low above high": (["tune.space.train.lr.low=2", "tune.space.train.lr.high=1"], "tune.space.train.lr"),
    "out of the bounds of what is searched": ([f"{LR}.low=-1", f"{LR}.high=1"], f"{LR}.low"),
    "fractions of a count": (["tune.space.train.epochs.low=1", "tune.space.train.epochs.high=3"], "tune.space.train.epochs.low"),
    "a section to search": ([f"{STOP}.low=1", f"{STOP}.high=2"], STOP),
    "a list to search": (["tune.space.train.betas.low=1", "tune.space.train.betas.high=2"], "tune.space.train.betas"),
    "a section that is not searched": (["tune.space.data.seed.low=1", "tune.space.data.seed.high=2"], "tune.space.data.seed"),
    "of another family": (["tune.space.model.filters.low=1", "tune.space.model.filters.high=2"], "tune.space.model.filters"),
}  # fmt: skip


@pytest.mark.parametrize("case", CROSS)
def test_values_that_do_not_fit_together_are_refused(case):
    words, key = CROSS[case]
    assert key in refusal(load, None, words).message


FILES = {
    "empty": (b"", "empty"),
    "only comments": (b"# nothing\n", "empty"),
    "not UTF-8": (b"train:\n  lr: 1 # \xff\n", "not UTF-8 at byte 17"),
    "UTF-16": ("train: {}".encode("utf-16"), "not UTF-8"),
    "NUL": (b"train: {}\0", "not valid YAML"),
    "no YAML": (b"train: [1\n", "not valid YAML"),
    "tab": (b"train:\n\tlr: 1\n", "not valid YAML"),
    "a list": (b"- train\n", "mapping of sections"),
    "a text": (b"train", "mapping of sections"),
    "a number as section": (b"1: {}\n", "1: a key must be text"),
    "a list as key": (b"[1]: {}\n", "a key is a list"),
    "null section": (b"train:\n", "train: must be a section"),
    "list section": (b"train: [1, 2]\n", "train: must be a section"),
    "duplicate section": (b"train: {}\ntrain: {}\n", "key 'train' appears twice"),
    "duplicate key": (b"train: {lr: 1, lr: 2}\n", "key 'lr' appears twice"),
    "two documents": (b"train: {}\n---\ntrain: {}\n", "not valid YAML"),
    "alias": (b"train: &a {}\ndata: *a\n", "aliases"),
    "alias bomb": (
        b"a: &a [x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [*%c,*%c,*%c]\n" % (c, c, c - 1, c - 1, c - 1) for c in range(98, 120)),
        "aliases",
    ),
    "tag": (b"train: !!python/object/apply:os.system ['true']\n", "tags"),
    "core tag": (b"train: {lr: !!float ''}\n", "tags"),
    "deep lists": (b"train: " + b"[" * 100_000, "nested too deeply"),
    "deep mappings": (b"train: " + b"{a: " * 200 + b"}" * 200, "nested too deeply"),
    "deep but parsable": (b"train: " + b"[" * 40 + b"]" * 40, "nested too deeply"),
    "huge": (b"# " + b"x" * MAX_BYTES + b"\n", "larger than"),
    "many keys": (b"".join(b"k%d: 1\n" % i for i in range(3000)), "and 2990 more"),
    "escape sequence in a key": (b'"\\e[31mtrain": {}\n', r"'\x1b[31mtrain': unknown key"),
    "long key": (b'? "' + b"k" * 5000 + b'"\n: {}\n', "unknown key"),
    "infinite key": (b".inf: {}\n", "a key must be text"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_broken_files_are_refused_by_their_name(case, tmp_path):
    content, message = FILES[case]
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    error = refusal(load, path)
    assert message in error.message
    assert len(str(error)) < 4000


def test_missing_file_folder_and_endless_file_are_refused(tmp_path):
    assert "no such file" in refusal(load, tmp_path / "none.yaml").message
    assert "directory" in refusal(load, tmp_path).message
    assert "larger than" in refusal(load, "/dev/zero").message
    assert "Not a directory" in refusal(load, "/dev/null/params.yaml").message


def test_an_unreadable_configuration_exits_with_2_and_no_traceback(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("train:\n  lrr: 1\n")
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "train", "--params", str(path), "--in", "dataset=x", "--out", "model=y"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "did you mean 'lr'?" in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr


OVERRIDES = {
    "1e-3": 0.001, "1E-3": 0.001, "-2": -2, "010": 10, "0o17": 15, "0x1F": 31, "1_000": "1_000", "1:30": "1:30",
    ".5": 0.5, "5.": 5,
    "true": True, "False": False, "yes": "yes", "no": "no", "on": "on", "null": None, "~": None, "": "", "  spaced  ": "spaced",
    "'1e-3'": "1e-3", '"1"': "1", "[1, 2]": [1, 2], "[]": [], "{a: 1}": {"a": 1}, "2020-01-01": "2020-01-01", "a=b": "a=b",
    "*.csv": "*.csv", "data/*.csv": "data/*.csv",
    "#1": "#1", "a #b": "a #b", "a: b": "a: b", "@x": "@x", "&a": "&a", "!x": "!x", "%x": "%x",
    "- a": "- a", "s3://bucket/a b": "s3://bucket/a b", "dvc:REPO@REV:PATH": "dvc:REPO@REV:PATH",
    "C:\\x": "C:\\x", "é": "é", "=": "=", "?": "?",
}  # fmt: skip


@pytest.mark.parametrize("text", OVERRIDES)
def test_values_of_overrides(text):
    assert parse_override(f"train.x={text}") == ("train.x", OVERRIDES[text])
    assert type(parse_override(f"train.x={text}")[1]) is type(OVERRIDES[text]) or OVERRIDES[text] == 5


@pytest.mark.parametrize(
    "word",
    ["train", "train.lr", "=1", "train=1", "train..lr=1", ".lr=1", "train.=1", "train lr=1", "", "=", "+train.lr=1",
     "a.b" * 99 + "=1",
     "a" + ".b" * 2000 + "=1", "train.lr=[1", 'train.lr="1', "train.lr={a", "train.lr.x=1", "train.\x1b=1"],
)  # fmt: skip
def test_malformed_overrides_are_refused(word):
    tree = {"train": {"lr": 1}}
    refusal(apply_overrides, tree, [word])
    assert tree == {"train": {"lr": 1}}


def test_overrides_set_values_and_leave_the_tree_alone():
    tree = {"data": {"split": {"val": 0.2}}}
    result = validate(apply_overrides(tree, ["data.split.test=0.3", "train.betas=[0.5, 0.6]", "data.source=*.csv"]))
    assert (result.data.split.val, result.data.split.test) == (0.2, 0.3)
    assert result.train.betas == (0.5, 0.6)
    assert result.data.source == "*.csv"
    assert tree == {"data": {"split": {"val": 0.2}}}


def test_later_overrides_win():
    assert load(None, ["train.lr=1", "train.lr=2"]).train.lr == 2


def test_another_family_drops_the_parameters_of_the_old_one_in_any_order():
    tree = {"model": {"buckets": 64, "dropout": 0.3}, "distill": {"student": {"name": "ngram", "buckets": 64}}}
    for words in (["model.name=textcnn", "model.filters=7"], ["model.filters=7", "model.name=textcnn"]):
        params = validate(apply_overrides(tree, [*words, "distill.student.name=textcnn"]))
        assert (params.model.name, params.model.filters, params.model.dropout) == ("textcnn", 7, 0.3)
        assert params.distill.student.name == "textcnn"
    assert validate(apply_overrides(tree, ["model.name=ngram"])).model.buckets == 64


def test_whole_floats_are_accepted_for_counts():
    assert load(None, ["train.max_steps=1e3"]).train.max_steps == 1000
    assert load(None, ["train.lr=1"]).train.lr == 1.0


def test_values_of_a_search_are_set_and_checked_again():
    params = with_values(load(None), {"train.lr": np.float64(0.5), "train.epochs": np.int64(7)})
    assert (params.train.lr, params.train.epochs) == (0.5, 7)
    assert "train.lr" in refusal(with_values, params, {"train.lr": float("nan")}).message
    assert "train.epochs" in refusal(with_values, params, {"train.epochs": 0}).message
    assert "model.layers" in refusal(with_values, params, {"model.layers": 3}).message
    assert "train.lr" in refusal(with_values, params, {"train.lr": object()}).message


def test_parameters_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        load(None).train.lr = 3  # type: ignore[misc]


def test_every_field_is_described():
    def walk(model, prefix=""):
        for name, field in model.model_fields.items():
            yield prefix + name, field
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                yield from walk(field.annotation, f"{prefix}{name}.")

    sections = {name for name, field in walk(Params) if hasattr(field.annotation, "model_fields")}
    assert [name for name, field in walk(Params) if not field.description and name not in sections] == []


def test_presets_are_valid_and_survive_dump_and_load():
    presets = sorted((Path(__file__).parents[2] / "trainer" / "presets").glob("*.yaml"))
    assert presets
    for path in presets:
        params = load(path)
        assert validate(parse_yaml(dump(params), "dump")) == params


def test_tree_is_read_without_validation(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(b"\xef\xbb\xbftrain: {lr: 1e-3}\n")
    assert read_tree(path) == {"train": {"lr": 0.001}}


SECRETS = {
    "s3://AKIA:se/c+ret@bucket/x": "se/c+ret",
    "https://user:secret@host/x": "secret",
    "https://:secret@host": "secret",
    "https://host/x?X-Amz-Signature=secret&b=1": "secret",
    "abfs://c@a.dfs/x?sig=secret": "secret",
    "gs://b/x?access_token=secret": "secret",
    "see s3://a:secret@b/x and s3://c:secret@d/y": "secret",
}


@pytest.mark.parametrize("uri", SECRETS)
def test_secrets_never_reach_an_error(uri):
    error = MillraceError(f"{uri}: failed", f"look at {uri}")
    assert SECRETS[uri] not in str(error) + repr(error) + error.message + error.hint


@pytest.mark.parametrize(
    "text", ["s3://bucket/a:b", "https://host:80/r@rev", "dvc:https://h/r@v:p", "abfs://c@a.dfs/x", "a@b:c", ""]
)
def test_uris_without_secrets_are_shown_as_they_are(text):
    assert redact(text) == text


def test_start_up_imports_no_heavy_library():
    code = "import sys, trainer.__main__, trainer.config.load; print(*sorted(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    heavy = {
        "torch",
        "numpy",
        "daft",
        "pyarrow",
        "optuna",
        "onnxruntime",
        "kfp",
        "kubernetes",
        "dvc",
        "fsspec",
        "sklearn",
        "scipy",
    }
    assert heavy & set(done.stdout.split()) == set()


def test_a_dimension_may_be_a_truth_value() -> None:
    dimension = {"type": "categorical", "choices": [True, False]}
    assert validate({"tune": {"space": {"train.compile": dimension}}}).tune.space["train.compile"].choices == (
        True,
        False,
    )
    with pytest.raises(ConfigError, match=r"tune\.space\.train\.compile\.choices"):
        validate({"tune": {"space": {"train.compile": {"type": "categorical", "choices": ["maybe"]}}}})
