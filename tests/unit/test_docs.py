"""Documentation that cannot drift: generated pages, links, the file tree, and a home for every command that is shown."""

import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pipelines import docs
from pipelines.cli import build_parser
from trainer import __version__
from trainer.__main__ import build_parser as build_stage_parser
from trainer.config.load import parse_override, read_tree, validate

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def commands() -> list[tuple[str, str]]:
    """Page and line of each command in a ```sh block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            found += [(page.name, line) for line in block.splitlines() if line.strip()]
    return found


COMMANDS = commands()


@pytest.mark.parametrize("name", docs.PAGES)
def test_generated_page_is_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == docs.PAGES[name](), "run `make docs`"


def test_commands_were_found() -> None:
    assert {"README.md", "quickstart.md", "concepts.md"} <= {page for page, _ in COMMANDS}
    assert len(COMMANDS) > 15


def untagged_commands(text: str) -> list[str]:
    """Lines of code blocks without a tag, and of indented ones, that are commands."""
    found, tag = [], None
    for line in text.splitlines():
        if line.startswith("```"):
            tag = line[3:].strip() if tag is None else None
        elif tag == "" and re.match(r"(\$ )?(millrace|make|dvc|python3?) ", line):
            found.append(line)
        elif tag is None and re.match(r"(    |\t)\s*(\$ )?(millrace|make|dvc|python3?) ", line):
            found.append(line.strip())
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_of_commands_are_tagged(page: Path) -> None:
    assert untagged_commands(page.read_text(encoding="utf-8")) == []


def test_an_untagged_block_of_commands_is_found() -> None:
    text = (
        "```sh\nmillrace run\n```\ntext\n```\nMakefile  targets\ndvc repro\n$ make run\n```\nmake up\n\n    make run\n"
    )
    assert untagged_commands(text) == ["dvc repro", "$ make run", "make run"]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_command_parses(page: str, line: str) -> None:
    words = shlex.split(line.split("|")[-1], comments=True)
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))
    if words[0] == "make":
        targets = re.findall(r"^([a-z0-9]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
    elif words[0] == "millrace":
        args = build_parser().parse_args(words[1:])
        check_overrides(getattr(args, "overrides", []))
    elif words[:3] == ["python", "-m", "trainer"]:
        check_overrides(build_stage_parser().parse_args(words[3:]).overrides)
    elif words[:2] == ["docker", "run"]:
        image = next(i for i, word in enumerate(words) if word.startswith("docker.io/"))
        assert re.fullmatch(rf"docker\.io/millrace/(data|trainer|launcher):{re.escape(__version__)}", words[image])
        check_overrides(build_stage_parser().parse_args(words[image + 1 :]).overrides)
    elif words[0] == "dvc":
        assert words[1] in ("repro", "exp", "metrics", "plots")
        if "-S" in words:
            check_overrides([words[words.index("-S") + 1]])
    elif words[0] == "kubectl":
        files = [path for flag, path in itertools.pairwise(words) if flag in ("-f", "-k") and path != "-"]
        files += [word for word in shlex.split(line) if word.startswith("manifests/")]
        assert all((ROOT / path).exists() for path in files)
    elif words[:2] == ["cat", "-"]:
        tree = read_tree(ROOT / "params.yaml")
        assert list(tree)[-1] == "cluster", "sed cuts off what comes after it"
        validate(tree | read_tree(ROOT / words[2]))
    else:
        assert line == ". .venv/bin/activate", "a command that no test knows how to run"


def check_overrides(words: list[str]) -> None:
    tree: dict = {}
    for word in words:
        key, value = parse_override(word)
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    validate(tree)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = [
        link
        for link in re.findall(r"\]\(([^)#\s]+)", text)
        if not link.startswith("http") and not (page.parent / link).exists()
    ]
    assert not broken


def test_file_tree_of_the_readme_is_the_repositorys() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"```text\n(Makefile.*?)```", readme, re.DOTALL)
    shown = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip()}
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git clone")
    there = {name.split("/")[0] for name in done.stdout.splitlines()}
    assert shown <= there
    folders = {name.split("/")[0] for name in done.stdout.splitlines() if "/" in name}
    assert {name for name in folders if not name.startswith(".")} <= shown


def test_makefile_targets_named_in_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^Makefile +the targets: (.*)$", readme, re.MULTILINE)
    targets = re.findall(r"^([a-z0-9]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(line.split()) <= set(targets)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_every_adr_has_its_parts_and_is_short() -> None:
    for page in sorted((ROOT / "docs" / "adr").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert re.match(r"# \d+\. \S", text)
        assert all(part in text for part in ("Status:", "## Context", "## Decision", "## Consequences")), page.name
        assert len(text.splitlines()) <= 60


def test_results_table_has_a_row_for_each_side() -> None:
    metrics = {
        "candidate": {"accuracy": 0.9, "macro_f1": 0.8, "bytes": 1_500_000, "latency_p50_ms": 0.5},
        "teacher": {"accuracy": 0.91, "macro_f1": 0.81, "bytes": 9_000_000},
        "baseline": {"name": "x", "accuracy": 0.7, "macro_f1": 0.6},
    }
    table = docs.results(metrics).splitlines()
    assert table[0] == "|  | accuracy | macro-F1 | size | latency |"
    assert table[2] == "| candidate | 0.9000 | 0.8000 | 1.5 MB | 0.50 ms |"
    assert table[4] == "| baseline | 0.7000 | 0.6000 |  |  |"
    assert len(table) == 5


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_makefile_takes_the_pythons_that_the_readme_names() -> None:
    first, last = re.findall(r"Python 3\.(\d+) to 3\.(\d+)", (ROOT / "README.md").read_text(encoding="utf-8"))[0]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    tried = {int(minor) for minor in re.findall(r"python3\.(\d+)(?=[ ;])", makefile.split("endif")[0])}
    assert tried == set(range(int(first), int(last) + 1))
    assert f"not (3, {first}) <= sys.version_info < (3, {int(last) + 1})" in makefile


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_says_to_run_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    files = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    for target, names in re.findall(r'make (test|fault|slow|e2e)[^`\n]*ARGS="-k \'?([\w ]+)\'?"', text):
        for name in re.split(r" or | and ", names):
            homes = [
                path for path, code in files.items() if name in path.name or re.search(rf"def test_\w*{name}", code)
            ]
            assert homes, f"no test is called {name}"
            slow = any("pytest.mark.slow" in files[path] and "pytest.mark.fault" in files[path] for path in homes)
            assert slow or target != "fault", f"`make fault` has no test called {name}"
    for name in re.findall(r"make bench ONLY=(\w+)", text):
        assert (ROOT / "benchmarks" / f"{name}.py").is_file()
