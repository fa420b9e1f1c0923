"""The rules of the house: which way imports go, what imports nothing heavy, how long files are, what files may hold."""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pytest
from pydantic import BaseModel

from trainer.config import Params
from trainer.config.model import FAMILIES
from trainer.errors import EXIT_CODES
from trainer.stage import STAGES

ROOT = Path(__file__).resolve().parents[2]
CODE = sorted(path for name in ("trainer", "components", "pipelines") for path in (ROOT / name).rglob("*.py"))
PYTHON = sorted({*CODE, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")})
HEAVY = (
    "torch",
    "daft",
    "pyarrow",
    "optuna",
    "sklearn",
    "scipy",
    "onnx",
    "onnxruntime",
    "torchao",
    "dvc",
    "tokenizers",
    "fsspec",
)
# What each package must not import: imports go pipelines -> components -> trainer.
FORBIDDEN = {
    "trainer": {"components", "pipelines", "kfp", "kubernetes", "dvc"},
    "components": {"pipelines", "torch", "dvc"},
    "pipelines": {"torch"},
}


def tracked() -> list[str]:
    try:
        done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git clone")
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, in functions too; not those only for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_go_one_way(package: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in CODE
        if path.is_relative_to(ROOT / package) and (found := imports(path) & FORBIDDEN[package])
        # The one reader of `dvc:` sources.
        if (str(path.relative_to(ROOT)), found) != ("trainer/data/dvc_source.py", {"dvc"})
    }
    assert not wrong


@pytest.mark.parametrize(
    "module", ["trainer", "trainer.config", "trainer.errors", "trainer.stage", "trainer.presets", "pipelines.cli"]
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    assert not modules_after(f"import {module}") & set(HEAVY)


def test_help_imports_nothing_heavy_and_no_schema() -> None:
    code = "from pipelines.cli import build_parser\nbuild_parser().format_help()"
    assert not modules_after(code) & {*HEAVY, "pydantic", "yaml"}


def test_files_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON}
    assert {name: count for name, count in lines.items() if count > 500} == {}
    assert statistics.median(count for count in lines.values() if count) <= 200


def sections(model: type[BaseModel], prefix: str = "") -> list[tuple[str, type[BaseModel]]]:
    found = [(prefix, model)]
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += sections(field.annotation, f"{prefix}{name}.")
    return found


def test_every_parameter_is_described() -> None:
    every = [*sections(Params), *((f"model.{name}.", family) for name, (family, _, _) in FAMILIES.items())]
    silent = [
        f"{prefix}{name}"
        for prefix, model in every
        for name, field in model.model_fields.items()
        if not field.description
        and not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
        if not (model in {family for family, _, _ in FAMILIES.values()} and name == "name")
    ]
    assert not silent
    assert not [prefix for prefix, model in every if not (model.__doc__ or "").strip()]


def test_every_stage_reads_known_sections_and_is_wired() -> None:
    made: set[str] = set()
    for stage in STAGES.values():
        assert set(stage.sections) <= set(Params.model_fields)
        assert set(stage.inputs) <= made, f"{stage.name} needs what no earlier stage makes"
        assert not set(stage.outputs) & made, "the laptop engine names folders by port"
        made |= set(stage.outputs)
    read = {section for stage in STAGES.values() for section in stage.sections}
    assert read == set(Params.model_fields) - {"cluster"}, "a section that neither a stage nor the compiler reads"


def test_every_target_exists() -> None:
    for stage in STAGES.values():
        module, function = stage.target.split(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        assert f"def {function}(" in path.read_text(encoding="utf-8")


def test_exit_codes_tell_permanent_from_retryable() -> None:
    assert {code for code in EXIT_CODES if code >= 128} == {130, 143}


def test_no_address_of_a_package_registry_and_no_path_of_a_machine() -> None:
    hosts = re.compile(
        r"https?://[\w.-]*(?:pypi|pythonhosted|index\.docker|quay|ghcr|anaconda)[\w.-]*|--(?:extra-)?index-url|--find-links"
    )
    homes = re.compile(r"(?<![\w.$}])/(?:home|root|Users|work|tmp/[a-z])[\w/.-]*")
    wrong = []
    for name in tracked():
        path = ROOT / name
        if path.suffix in (".png", ".jpg", ".ico", ".woff2") or name == "tests/unit/test_house.py":
            continue
        text = path.read_text(encoding="utf-8")
        wrong += [f"{name}: {found}" for found in hosts.findall(text)]
        # GKE puts its drivers there, on every node.
        text = text.replace("/home/kubernetes/bin/nvidia", "")
        if not name.startswith("tests/"):
            wrong += [f"{name}: {found}" for found in homes.findall(text)]
    assert not wrong


def test_nothing_is_unpickled_and_no_shell_is_used() -> None:
    wrong = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            bad = (
                name in ("pickle.load", "pickle.loads", "torch.load", "joblib.load", "eval", "exec", "os.system")
                or keywords.get("shell") == "True"
                or keywords.get("allow_pickle") == "True"
                or (name == "np.load" and keywords.get("allow_pickle") != "False")
                or keywords.get("trust_remote_code") == "True"
            )
            if bad:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not wrong


def test_packages_with_data_are_shipped() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["trainer"]
    shipped = {path for pattern in patterns for path in (ROOT / "trainer").glob(pattern)}
    data = {path for path in (ROOT / "trainer").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert data <= shipped


def test_the_lock_holds_what_pyproject_asks_for() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = settings["project"]["optional-dependencies"]
    trackers = extras.pop("track")  # what tests need, and no run

    def names(asked: Iterable[str]) -> set[str]:
        plain = {re.split(r"[\[<>=!~; ]", each)[0] for each in asked} - {"millrace"}
        return {re.sub(r"[-_.]+", "-", name).lower() for name in plain}

    def locked(*locks: str) -> set[str]:
        lock = "\n".join((ROOT / "requirements" / name).read_text(encoding="utf-8") for name in locks)
        assert "--hash=sha256:" in lock
        return {line.split("==")[0] for line in lock.splitlines() if "==" in line and not line.startswith((" ", "#"))}

    asked = [*settings["project"]["dependencies"], *chain.from_iterable(extras.values())]
    assert names(asked) <= locked("run.txt", "launcher.txt")
    assert names(trackers) <= locked("dev.txt")
    assert not names(trackers) & locked("run.txt", "data.txt", "trainer.txt", "launcher.txt")
