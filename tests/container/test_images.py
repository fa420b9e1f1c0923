"""The images themselves: what is in them and what is not, how large they are, and that stages run in them, hardened."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.container.conftest import ENTRY_POINTS, IMAGES, STAGE, USER, name_of
from trainer import __version__
from trainer.artifacts import manifest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "images"))
import sizes  # noqa: E402

pytestmark = [pytest.mark.container, pytest.mark.timeout(600)]

MB = 1_000_000
# Of the whole image; of what the trainer's image has beside torch and its libraries.
BUDGETS = {"data": 800 * MB, "launcher": 250 * MB}
TRAINER_BUDGET = 300 * MB
# What must be importable, and what must be neither importable nor installed.
HAS = {
    "data": {"daft", "pyarrow", "tokenizers", "tiktoken", "PIL", "s3fs", "dvc", "numpy"},
    "trainer": {"torch", "safetensors", "optuna", "onnx", "onnxruntime", "torchao", "sklearn", "pyarrow", "s3fs"},
    "launcher": {
        "components",
        "kubernetes",
        "kubeflow",
        "kubeflow_katib_api",
        "kubeflow_trainer_api",
        "s3fs",
        "urllib3",
    },
}
HAS_NOT = {
    "data": {"torch", "kfp", "kubernetes", "nvidia", "triton", "sklearn", "components"},
    "trainer": {"kfp", "kubernetes", "daft", "dvc", "components"},
    "launcher": {"torch", "kfp", "daft", "dvc", "nvidia", "triton", "numpy"},
}
# Parts of packages that stages use, which must have outlived the removal of what they do not.
USED = {
    "data": "daft, pyarrow.parquet, pyarrow.compute, tokenizers, tiktoken, PIL.Image, s3fs, dvc.api, dvc.repo",
    "trainer": "pyarrow.parquet, sklearn.linear_model, sklearn.feature_extraction.text, sklearn.multiclass, scipy.stats, optuna,"
    " onnxruntime.quantization, onnxscript, torchao.quantization, torch.onnx, torch.distributed.run, s3fs, tokenizers",
    "launcher": "kubernetes.client, kubernetes.config, kubeflow.training, kubeflow_katib_api.models, kubeflow_trainer_api.models,"
    " urllib3, s3fs, components.table",
}
NOWHERE = {"pytest", "moto", "hypothesis", "mypy", "ruff", "pip", "pipelines", "tests"}
SMALL = "data.tokenizer.vocab_size=300 train.epochs=1 model.buckets=256 model.dim=8 train.threads=1"

DISTRIBUTIONS = """
import importlib.metadata as metadata, json
print(json.dumps(sorted({each.name.lower().replace("_", "-") for each in metadata.distributions()})))
"""


@pytest.mark.parametrize("image", IMAGES)
def test_doctor_finds_the_image_sane(run, image: str) -> None:
    done = run(image, "doctor", "--json", **STAGE)
    facts = json.loads(done.text)
    assert (done.code, facts["findings"]) == (0, [])
    assert (facts["image"], facts["user"], facts["millrace"]) == (image, USER, __version__)
    assert bool(facts["torch"]) == (image == "trainer")
    assert facts["drivers"]["s3://"]


@pytest.mark.parametrize(
    ("options", "words"),
    {
        "nowhere to write": (
            {"environment": {"HOME": "/nowhere", "TMPDIR": "/opt"}},
            ["HOME is not writable", "TMPDIR is not writable", "--tmpfs /tmp"],
        ),
        "root": ({"user": "0"}, ["runs as root", "drop `--user 0`"]),
        "little memory": ({"mem_limit": "300m"}, ["of memory", "--memory 2g"]),
        "little room": ({"tmpfs": {"/tmp": "rw,mode=1777,size=64m"}}, ["TMPDIR has", "sizeLimit"]),
    }.values(),
)
def test_doctor_names_what_is_wrong_and_the_fix(run, options: dict, words: list[str]) -> None:
    done = run("data", "doctor", **options)
    assert done.code == 2
    assert all(word in done.text for word in words), done.text


@pytest.mark.parametrize("image", IMAGES)
def test_sigterm_ends_what_runs_as_the_first_process(start, image: str, shared: Path) -> None:
    pipe = shared / "params.yaml"
    os.mkfifo(pipe)
    mounted = {str(shared): {"bind": str(shared), "mode": "rw"}}
    container = start(image, "promote", "--params", str(pipe), volumes=mounted, **STAGE)
    writer = open_when_read(pipe)
    try:
        before = time.monotonic()
        container.stop(timeout=60)
        assert time.monotonic() - before < 30
    finally:
        os.close(writer)
    assert container.wait(timeout=60)["StatusCode"] == 143


def open_when_read(pipe: Path) -> int:
    """Open a pipe for writing as soon as somebody reads it: the stage is then waiting for its parameters."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > deadline:
                raise
        time.sleep(0.1)


@pytest.mark.parametrize("image", IMAGES)
def test_the_image_holds_what_its_stages_import_and_nothing_else(python, image: str) -> None:
    names = sorted(HAS[image] | HAS_NOT[image] | NOWHERE)
    program = f"import importlib.util, json; print(json.dumps([n for n in {names} if importlib.util.find_spec(n)]))"
    assert set(python(image, program)) == HAS[image]
    installed = python(image, DISTRIBUTIONS)
    assert not [name for name in installed if name in HAS_NOT[image] | NOWHERE or name.startswith("kfp")]


def test_versions_are_those_of_the_laptop(python) -> None:
    locked = {}
    for line in (ROOT / "requirements" / "run.txt").read_text(encoding="utf-8").splitlines():
        if "==" in line and not line.startswith((" ", "#")):
            name, version = line.split(" ")[0].split("==")
            locked.setdefault(name, set()).add(version)
    program = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    for image in ("data", "trainer"):
        installed = {
            name.lower().replace("_", "-").replace(".", "-"): version
            for name, version in python(image, program).items()
        }
        others = {
            name: version
            for name, version in installed.items()
            if name not in ("millrace",) and version.split("+")[0] not in locked.get(name, ())
        }
        assert others == {}


@pytest.mark.parametrize(("image", "modules"), USED.items())
def test_what_is_left_of_the_packages_imports(python, image: str, modules: str) -> None:
    assert python(image, f"import {modules}, json; print(json.dumps('all'))") == "all"


def test_every_module_of_the_launcher_imports_where_nothing_can_be_written(python) -> None:
    program = """
import importlib, json, pkgutil
import components.launch
names = [each.name for each in pkgutil.walk_packages(components.launch.__path__, "components.launch.")]
print(json.dumps([importlib.import_module(name).__name__ for name in names if not name.endswith("__main__")]))
"""
    assert "components.launch.spec" in python("launcher", program, tmpfs={})


@pytest.mark.parametrize("image", IMAGES)
def test_no_tools_and_no_caches_are_left(python, image: str) -> None:
    program = """
import json, shutil
from pathlib import Path
tools = [name for name in ("gcc", "cc", "g++", "make", "git", "curl", "ld") if shutil.which(name)]
caches = [str(path) for path in (Path("/root/.cache"), Path("/tmp/.cache"), Path("/build")) if path.exists()]
site = Path("/opt/venv/lib").glob("python3*/site-packages")
left = [str(path) for folder in site for name in ("pip", "wheel", "**/*.a", "**/tests") for path in folder.glob(name)]
print(json.dumps(tools + caches + left[:5]))
"""
    assert python(image, program, user="0") == []


@pytest.mark.parametrize("image", IMAGES)
def test_bytecode_is_compiled(python, image: str) -> None:
    program = """
import json
from pathlib import Path
import trainer.stage, yaml, pydantic
print(json.dumps([m.__cached__ for m in (trainer.stage, yaml, pydantic) if not Path(m.__cached__).is_file()]))
"""
    assert python(image, program) == []


@pytest.mark.parametrize("image", BUDGETS)
def test_the_image_keeps_its_budget(engine, image: str) -> None:
    found = sizes.measure(engine, image)
    assert found["total"] <= BUDGETS[image], found
    assert not found["torch"], found


def test_the_trainers_image_adds_little_to_torch(engine) -> None:
    found = sizes.measure(engine, "trainer")
    assert found["torch"] > 1000 * MB
    assert found["packages"] + found["code"] <= TRAINER_BUDGET, found


@pytest.mark.parametrize("image", IMAGES)
def test_labels_user_and_entry_point(engine, image: str) -> None:
    config = engine.images.get(name_of(image)).attrs["Config"]
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in config["Labels"].items()}
    assert (labels["title"], labels["version"]) == (f"millrace/{image}", __version__)
    assert (labels["licenses"], labels["base.name"]) == ("Apache-2.0", "python:3.11-slim")
    assert len(labels["revision"]) == 40
    assert labels["description"]
    assert labels["created"].endswith("Z")
    assert config["User"] == f"{USER}:{USER}"
    assert config["Entrypoint"] == ["python", "-m", ENTRY_POINTS[image]]


def local(folder: Path, inputs: dict[str, str], outputs: dict[str, str], values: dict) -> dict:
    """An ExecutorInput as kfp.local gives it."""
    kind = {"schemaTitle": "system.Artifact", "schemaVersion": "0.0.1"}

    def port(name: str, uri: str) -> dict:
        return {"artifacts": [{"name": name, "type": kind, "uri": uri, "metadata": {}}]}

    return {
        "inputs": {"parameterValues": values, "artifacts": {name: port(name, uri) for name, uri in inputs.items()}},
        "outputs": {
            "artifacts": {name: port(name, uri) for name, uri in outputs.items()},
            "outputFile": f"{folder}/executor_output.json",
        },
    }


def backend(folder: Path, inputs: dict[str, str], outputs: dict[str, str], values: dict) -> dict:
    """As the backend's launcher gives it: URIs of the object store, numbered names, executor-logs."""

    def port(name: str, uri: str, given: bool) -> dict:
        kind = {"instanceSchema": ""} if given else {"schemaTitle": "system.Dataset", "schemaVersion": "0.0.1"}
        return {"artifacts": [{"name": "17" if given else name, "type": kind, "uri": f"minio:/{uri}"}]}

    return {
        "inputs": {
            "parameterValues": values,
            "artifacts": {name: port(name, uri, True) for name, uri in inputs.items()},
        },
        "outputs": {
            "artifacts": {
                name: port(name, uri, False) for name, uri in {**outputs, "executor-logs": "/l/executor-logs"}.items()
            },
            "outputFile": f"{folder}/output_metadata.json",
        },
    }


@pytest.mark.parametrize("dialect", [local, backend])
def test_preprocess_and_train_run_hardened_in_both_dialects(start, shared: Path, rows: Path, dialect) -> None:
    mounted = {str(shared): {"bind": str(shared), "mode": "rw"}}
    base = str(shared)
    if dialect is backend:
        mounted[base] = {"bind": "/minio/bucket", "mode": "rw"}
        base = "/bucket"
    source = {str(rows.parent): {"bind": "/source", "mode": "ro"}}
    place = "/minio/bucket" if dialect is backend else base
    values = {"overrides": f"data.source=/source/rows.csv {SMALL}"}
    steps = {
        "preprocess": ("data", {}, {"dataset": f"{base}/dataset"}),
        "train": ("trainer", {"dataset": f"{base}/dataset"}, {"model": f"{base}/model"}),
    }
    for stage, (image, inputs, outputs) in steps.items():
        given = dialect(Path(place) / stage, inputs, outputs, values)
        volumes = [f"{path}:{each['bind']}:{each['mode']}" for path, each in [*mounted.items(), *source.items()]]
        container = start(image, stage, "--executor-input", json.dumps(given), volumes=volumes)
        assert container.wait(timeout=240)["StatusCode"] == 0, container.logs().decode()
        (port,) = outputs
        written = json.loads(next((shared / stage).glob("*.json")).read_text(encoding="utf-8"))
        found = manifest.read(shared / port)
        assert written["artifacts"][port]["artifacts"][0]["metadata"]["digest"] == found.digest


def test_preprocess_gives_the_laptops_digest(run, shared: Path, rows: Path) -> None:
    words = ["preprocess", "--out", f"dataset={shared}/there", f"data.source={rows}", "data.tokenizer.vocab_size=300"]
    done = run("data", *words, folder=shared)
    assert done.code == 0, done.text
    words[2] = f"dataset={shared}/here"
    subprocess.run([sys.executable, "-m", "trainer", *words], check=True, capture_output=True, timeout=240)
    assert manifest.read(shared / "there").digest == manifest.read(shared / "here").digest


def test_a_dvc_repository_of_another_user_is_read(run, shared: Path, rows: Path) -> None:
    repo = shared / "repo"
    repo.mkdir()
    shutil.copyfile(rows, repo / "rows.csv")
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    identity = ["-c", "user.name=a tester", "-c", "user.email=tester@localhost", "-c", "commit.gpgsign=false"]
    for words in (
        ["git", "init", "-q", "-b", "main"],
        ["dvc", "init", "-q"],
        ["dvc", "add", "-q", "rows.csv"],
        ["git", "add", "-A"],
        ["git", *identity, "commit", "-qm", "rows"],
    ):
        subprocess.run(words, cwd=repo, env=env, check=True, timeout=120)
    words = ["data.tokenizer.vocab_size=300", f"data.source=dvc:{repo}@main:rows.csv"]
    done = run("data", "preprocess", "--out", f"dataset={shared}/ds", *words, folder=shared)
    assert done.code == 0, done.text
    assert manifest.read(shared / "ds", "dataset").meta["data_version"]


def test_exit_codes_come_through(run, shared: Path) -> None:
    done = run("data", "preprocess", "--out", f"dataset={shared}/ds", "data.source=/nowhere.csv", folder=shared)
    assert done.code == 2
    assert "/nowhere.csv" in done.text
    assert not (shared / "ds").exists()


@pytest.mark.parametrize(
    "command", re.findall(r"^docker run .*$", (ROOT / "docs" / "images.md").read_text(), re.MULTILINE)
)
def test_commands_of_the_documentation_run(engine, command: str) -> None:
    words = shlex.split(command)
    if shutil.which("docker") is None:
        words[0] = "podman"
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert ("all is well" if words[-1] == "doctor" else "max_rows: 100") in done.stdout


def test_the_table_of_sizes_is_of_these_images(engine, capsys) -> None:
    sizes.main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    page = (ROOT / "docs" / "images.md").read_text(encoding="utf-8")
    assert printed[0] in page
    for line in printed[2:]:
        image, total = line.split("|")[1].strip(), float(line.split("|")[2].replace(",", ""))
        (documented,) = re.findall(rf"^\| {image} \| ([\d,.]+) ", page, re.MULTILINE)
        # The base differs between registries, and a new lock moves a little.
        assert abs(total - float(documented.replace(",", ""))) <= 0.1 * total
