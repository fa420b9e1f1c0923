"""The images' recipes, what is removed from them, and what the doctor finds: all that needs no container engine."""

import ast
import ctypes
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from trainer import doctor
from trainer.errors import EXIT_BAD_INPUT, EXIT_OK
from trainer.stage import STAGES

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "images").glob("*.Dockerfile"))
IMAGES = ["data", "launcher", "trainer"]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


slim = load(ROOT / "images" / "slim.py")


def instructions(recipe: Path) -> list[tuple[str, str]]:
    """(instruction, rest of it) of a Dockerfile, lines joined and comments left out."""
    lines = [line for line in recipe.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines() if line.strip()]


def final_stage(recipe: Path) -> list[tuple[str, str]]:
    every = instructions(recipe)
    last = max(i for i, (word, _) in enumerate(every) if word == "FROM")
    return every[last:]


def locked(name: str) -> dict[str, set[str]]:
    """Package -> versions of a lock; a universal lock may hold one for each Python."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if "==" in line and not line.startswith((" ", "#")):
            package, version = line.split(" ")[0].split("==")
            found.setdefault(package, set()).add(version)
    return found


def test_there_are_three_images() -> None:
    assert [path.stem for path in RECIPES] == IMAGES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_user_is_a_number_and_the_entry_point_has_no_shell(recipe: Path) -> None:
    stage = dict(final_stage(recipe))
    assert stage["USER"] == "65532:65532"
    module = "components.launch" if recipe.stem == "launcher" else "trainer"
    assert json.loads(stage["ENTRYPOINT"]) == ["python", "-m", module]
    assert "CMD" not in stage


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_last_stage_only_copies(recipe: Path) -> None:
    words = [word for word, _ in final_stage(recipe)]
    assert not {"RUN", "ADD", "VOLUME"} & set(words)
    assert all("--from=build" in rest for word, rest in final_stage(recipe) if word == "COPY")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_stage_starts_from_the_base_that_is_given(recipe: Path) -> None:
    every = instructions(recipe)
    assert every[0] == ("ARG", "BASE=python:3.11-slim")
    assert {rest.split(" ")[0] for word, rest in every if word == "FROM"} == {"${BASE}"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_packages_come_from_the_lock_by_hash(recipe: Path) -> None:
    installs = [
        part
        for word, rest in instructions(recipe)
        if word == "RUN"
        for part in rest.split("&&")
        if "pip" in part and " install " in part
    ]
    assert len(installs) == 2
    assert f"--require-hashes --no-deps -r {recipe.stem}.txt" in installs[0]
    assert installs[1].rstrip().endswith("--no-build-isolation --no-deps --target /opt/millrace .")
    assert all("--no-cache-dir" in part for part in installs)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_all_that_is_written_goes_below_tmp(recipe: Path) -> None:
    stage = dict(final_stage(recipe))
    environment = dict(word.split("=", 1) for word in shlex.split(stage["ENV"]))
    folders = [name for name in environment if name.startswith("XDG_") or name.endswith(("_DIR", "HOME"))]
    assert {"HOME", "XDG_CACHE_HOME"} <= set(folders)
    assert all(environment[name].startswith("/tmp") for name in [*folders, "TMPDIR"])
    assert {"PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "ORT_DISABLE_TELEMETRY", "DO_NOT_TRACK"} <= set(environment)
    assert environment["MILLRACE_IMAGE"] == recipe.stem
    assert stage["WORKDIR"] == "/tmp"
    main = (ROOT / "trainer" / "__main__.py").read_text(encoding="utf-8")
    assert f'"GOMP_SPINCOUNT", "{environment["GOMP_SPINCOUNT"]}"' in main


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_what_is_copied_is_let_through(recipe: Path) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"]
    copied = {
        word
        for kind, rest in instructions(recipe)
        if kind == "COPY" and "--from" not in rest
        for word in rest.split(" ")[:-1]
    }
    assert copied
    for name in copied:
        assert (ROOT / name).exists()
        assert any(Path(name).match(rule[1:]) for rule in rules), name


def test_the_launcher_holds_what_its_code_imports_of_ours() -> None:
    copied = [
        ROOT / word
        for kind, rest in instructions(ROOT / "images" / "launcher.Dockerfile")
        if kind == "COPY" and "--from" not in rest
        for word in rest.split(" ")[:-1]
    ]
    files = {
        path for root in copied for path in ([root] if root.is_file() else root.rglob("*")) if path.suffix == ".py"
    }
    assert ROOT / "components" / "launch" / "__init__.py" in files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                module = ROOT / name.replace(".", "/")
                needed = [each for each in (module.with_suffix(".py"), module / "__init__.py") if each.is_file()]
                if name.split(".")[0] in ("trainer", "components", "pipelines"):
                    assert set(needed) <= files, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("image", IMAGES)
def test_locks_agree_with_the_laptops(image: str) -> None:
    laptop = locked("run")
    own = {"kubeflow-training", "retrying"} if image == "launcher" else set()
    assert {name: versions for name, versions in locked(image).items() if laptop.get(name) != versions}.keys() <= own


@pytest.mark.parametrize(
    ("image", "absent"),
    [
        ("data", {"torch", "kfp", "kubernetes", "triton"}),
        ("trainer", {"kfp", "kubernetes", "dvc", "daft"}),
        ("launcher", {"torch", "kfp", "numpy", "triton"}),
    ],
)
def test_locks_hold_nothing_that_the_image_must_not(image: str, absent: set[str]) -> None:
    assert not absent & set(locked(image))


def imports(target: str, seen: set[str]) -> set[str]:
    """Top-level packages that a stage's module and what it imports of ours import, in functions too."""
    path = ROOT / (target.replace(".", "/") + ".py")
    path = path if path.exists() else ROOT / target.replace(".", "/") / "__init__.py"
    if target in seen or not path.exists():
        return set()
    seen.add(target)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] == "trainer":
                found |= imports(name, seen)
            elif name.split(".")[0] not in sys.stdlib_module_names:
                found.add(name.split(".")[0])
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_what_the_doctor_looks_for_is_what_the_stage_imports(stage: str) -> None:
    # `torch.onnx` imports onnxscript; tokenizers is named where a stage encodes.
    assert set(doctor.NEEDS[stage]) - {"onnxscript"} <= imports(STAGES[stage].target.split(":")[0], set())


def test_the_doctor_knows_every_stage_and_every_image() -> None:
    assert set(doctor.NEEDS) == set(STAGES)
    assert sorted(doctor.IMAGES) == IMAGES
    assert sorted(name for stages in doctor.IMAGES.values() for name in stages) == sorted(STAGES)


def test_the_doctor_finds_this_machine_sane() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "doctor", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    facts = json.loads(done.stdout)
    assert (done.returncode == EXIT_OK) == facts["sane"] == (not facts["findings"])
    assert facts["stages"] == {name: [] for name in STAGES}
    assert facts["torch"]["version"]


def test_a_finding_says_what_why_and_the_fix(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    assert doctor.run(as_json=False) == EXIT_BAD_INPUT
    text = capsys.readouterr().out
    assert re.search(r"finding: HOME is not writable.*\n  why: .+\n  fix: .*--tmpfs /tmp", text)
    assert text.rstrip().endswith("1 findings")


def test_an_image_that_lacks_what_its_stages_import_is_found(monkeypatch) -> None:
    monkeypatch.setitem(doctor.NEEDS, "promote", ("numpy", "no_such_package"))
    monkeypatch.setenv("MILLRACE_IMAGE", "data")
    findings = [each for each in doctor.examine().findings if "no_such_package" in each.what]
    assert [each.fix for each in findings] == ["build the image again: make images IMAGES=data"]


@pytest.mark.parametrize(
    ("files", "memory", "cores"),
    {
        "version 2": ({"memory.max": "536870912\n", "cpu.max": "150000 100000\n"}, 536870912, 1.5),
        "version 2, no limit": ({"memory.max": "max\n", "cpu.max": "max 100000\n"}, 0, 0.0),
        "version 1": (
            {
                "memory/memory.limit_in_bytes": "1073741824\n",
                "cpu/cpu.cfs_quota_us": "50000\n",
                "cpu/cpu.cfs_period_us": "100000\n",
            },
            1 << 30,
            0.5,
        ),
        "version 1, no limit": (
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
            },
            0,
            0.0,
        ),
        "none": ({}, 0, 0.0),
    }.values(),
)
def test_limits_of_both_versions_of_cgroups(tmp_path, files: dict, memory: int, cores: float) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert (doctor.memory_limit(tmp_path), doctor.cpu_quota(tmp_path)) == (memory, cores)


def test_slim_removes_tests_and_keeps_code(tmp_path) -> None:
    kept = ["a/__init__.py", "a/testing.py", "botocore/data/s3/x.json", "botocore/data/endpoints.json", "a/lib.so"]
    removed = ["a/tests/x.py", "a/b/tests/c/tests/x.py", "a/lib.a", "botocore/data/ec2/x.json", "pyarrow/src/x.cc"]
    for name in [*kept, *removed]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    slim.main(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


def test_every_pattern_of_slim_still_finds_something() -> None:
    site = Path(sysconfig.get_path("purelib"))
    assert [pattern for pattern in slim.DROP if not next(site.glob(pattern), None)] == []
    assert all((site / "botocore" / "data" / name).is_dir() for name in slim.AWS_SERVICES)


def test_a_stripped_library_is_smaller_and_loads(tmp_path) -> None:
    site = Path(sysconfig.get_path("purelib"))
    (library,) = [path for path in slim.libraries(site) if path.parent.name == "tokenizers"]
    content = slim.strip(library.read_bytes())
    assert len(content) < 0.9 * library.stat().st_size
    path = tmp_path / library.name
    path.write_bytes(content)
    assert ctypes.CDLL(str(path)).PyInit_tokenizers
    assert slim.strip(content) == content


def test_what_is_no_elf_file_is_not_stripped() -> None:
    assert slim.strip(b"#!/bin/sh\n") == b"#!/bin/sh\n"


@pytest.mark.parametrize("marker", ["container", "cluster"])
def test_the_marker_is_kept_out_of_the_fast_tests(marker: str) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert any(line.startswith(f"{marker}:") for line in settings["tool"]["pytest"]["ini_options"]["markers"])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert makefile.count(f"not {marker}") == 2
