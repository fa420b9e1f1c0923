"""What the source never does: run text as code, unpickle, start a shell, read YAML with tags, or phone home."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import redact

ROOT = Path(__file__).parents[2]
FILES = sorted(path for package in ("trainer", "pipelines", "components") for path in (ROOT / package).rglob("*.py"))
BUILTINS = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "os.spawnl", "os.execl"}
# The one loader that is made for configurations: it knows neither tags nor aliases.
YAML_HOME = "trainer/config/text.py"
# PyTorch's distributed checkpoints hold a pickle: it is read, after its digest, by an unpickler with a list of classes.
UNPICKLER_HOME = "trainer/train/dcp.py"


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an expression; what is no name in it is a question mark."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def given(call: ast.Call, name: str):
    """The constant that a call gives for a keyword; None if it is not given."""
    return next((getattr(word.value, "value", "?") for word in call.keywords if word.arg == name), None)


def import_offences(node: ast.Import | ast.ImportFrom, file: str):
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    allowed = {"pickle"} if file == UNPICKLER_HOME and isinstance(node, ast.Import) else set()
    return [f"imports {name}" for name in names if name.split(".")[0] in MODULES - allowed]


def call_offences(call: ast.Call, file: str):
    name = dotted(call.func)
    keywords = {word.arg for word in call.keywords}
    if name in BUILTINS or name in SHELLS:
        yield f"calls {name}"
    if given(call, "shell") not in (None, False):
        yield f"{name} with shell=True"
    if name in ("np.load", "numpy.load") and given(call, "allow_pickle") is not False:
        yield "np.load without allow_pickle=False"
    if name == "torch.load" and given(call, "weights_only") is not True:
        yield "torch.load without weights_only=True"
    if name in ("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all"):
        yield f"calls {name}"
    if name.startswith("pickle.") and not name.endswith("Error"):
        yield f"calls {name}"
    if name == "yaml.load" and file != YAML_HOME and (keywords or len(call.args) > 1):
        yield "yaml.load outside of trainer/config/text.py"
    if given(call, "trust_remote_code") not in (None, False):
        yield f"{name} with trust_remote_code"
    if name.endswith((".extractall", ".unpack_archive")) and "filter" not in keywords:
        yield f"{name} without a filter"
    if name in ("tempfile.mktemp", "mktemp"):
        yield "mktemp, which others can foresee"


def offences(text: str, file: str):
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += [(node.lineno, offence) for offence in import_offences(node, file)]
        elif isinstance(node, ast.Call):
            found += [(node.lineno, offence) for offence in call_offences(node, file)]
    return found


def test_the_source_is_found():
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_file_runs_what_it_reads(path):
    file = path.relative_to(ROOT).as_posix()
    assert offences(path.read_text(encoding="utf-8"), file) == []


BAD = [
    "eval('1')", "exec(text)", "__import__('os')", "import pickle", "from pickle import loads", "import joblib", "os.system('x')",
    "pickle.loads(x)",
    "subprocess.run('x', shell=True)", "subprocess.run('x', shell=flag)", "np.load('x')", "np.load('x', allow_pickle=True)",
    "torch.load('x')", "torch.load('x', weights_only=False)", "yaml.load(x, Loader=yaml.Loader)", "yaml.unsafe_load(x)",
    "AutoModel.from_pretrained('x', trust_remote_code=True)", "archive.extractall('x')", "tempfile.mktemp()",
]  # fmt: skip


def test_the_one_unpickler_names_the_classes_it_knows():
    tree = ast.parse((ROOT / UNPICKLER_HOME).read_text(encoding="utf-8"))
    classes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(dotted, node.bases)
    ]
    assert classes
    for each in classes:
        assert "find_class" in [part.name for part in each.body if isinstance(part, ast.FunctionDef)]


@pytest.mark.parametrize("text", BAD)
def test_the_check_finds_what_it_looks_for(text):
    assert offences(text, "trainer/x.py")


def test_nothing_phones_home():
    code = "import os, trainer; print(os.environ['DO_NOT_TRACK'], os.environ['RAY_USAGE_STATS_ENABLED'])"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("DO_NOT_TRACK", "RAY_USAGE_STATS_ENABLED")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environment, cwd=ROOT
    )
    assert done.stdout.split() == ["1", "0"]


BLANKED = {
    "https://ghp_TOKEN@github.com/x": "https://***@github.com/x",
    "dvc:https://ghp_TOKEN@host/x@v1:rows.csv": "dvc:https://***@host/x@v1:rows.csv",
    "https://user:pa/ss@host": "https://***@host",
    "https://user:pa?s/s#@host/x": "https://***@host/x",
    "https://user:p@ss@github.com/x@v2": "https://***@github.com/x@v2",
    "https://user:p@s/s@host/x": "https://***@host/x",
    "https://user:pass@[::1]:80/x@v2": "https://***@[::1]:80/x@v2",
    "https://host/x,https://user:pass@host/x": "https://host/x,https://***@host/x",
    "s3://AKIA:12/3@bucket/x": "s3://***@bucket/x",
    "abfs://box:pass@account/x": "abfs://***@account/x",
    '{"a": "https://u:pass@host", "b": "me@here"}': '{"a": "https://***@host", "b": "me@here"}',
    "Server=x;PWD=pass word": "Server=x;PWD=*** word",
    "passwd=a&b=1": "passwd=***&b=1",
    "https://host/x?api_key=k&token=t": "https://host/x?api_key=***&token=***",
    "--api-key=k": "--api-key=***",
    "AWS_SECRET_ACCESS_KEY=a/b+c": "AWS_SECRET_ACCESS_KEY=***",
}


@pytest.mark.parametrize("text", BLANKED)
def test_no_secret_is_printed(text):
    assert redact(text) == BLANKED[text]
    assert redact(BLANKED[text]) == BLANKED[text]


@pytest.mark.parametrize(
    "text",
    ["https://host/path@v2", "https://host:80/path@v2", "https://host:80?a@b", "http://[::1]:80/path@v2", "s3://bucket/a:b@c",
     "dvc:https://host/repo@v1:rows.csv", "file:///a/b@c:d", "abfs://box@account.dfs/x", "git@host:a/b", "me@here",
     "section.key=value", "tokens=12", "pwd", "see https://host:x and me@here"],
)  # fmt: skip
def test_what_is_no_secret_is_printed(text):
    assert redact(text) == text
