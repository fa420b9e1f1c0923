"""What the run page shows of each stage: from whole chains of real stages, with labels that try to break out."""

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt

from tests.tiny import tiny_dataset
from trainer import views
from trainer.artifacts import manifest
from trainer.config.load import load
from trainer.errors import GateRefused
from trainer.stage import STAGES, execute
from trainer.views import curves
from trainer.views import markdown as md

# Each tries another way out: HTML, a table's cell, a code span, a link, a heading, an image, an entity, a list, an address.
LABELS = [
    "<script>alert(1)</script>", "a|b|c", "`ticks` ``more``", "[text](javascript:alert(1))", "# heading\n\n## other",
    "![x](http://evil.example/x.png)", "&lt;b&gt; *bold* _it_ ~~no~~", "- item\n1. item", "http://evil.example/?q=<i>",
    "\u202eabc\u200f \x07bell", "back\\", "other (3 labels)",
]  # fmt: skip
SECRET = "hunter2-canary"
QUICK = [
    "train.threads=1", "train.min_steps=0", "evaluate.bootstrap=100", "evaluate.latency_runs=10", "evaluate.examples=2",
    "quantize.torchao=false", "promote.model=m",
]  # fmt: skip
CHAINS = {
    "classify": ["model.name=ngram", "model.buckets=512", "model.dim=16", "train.lr=0.05", "train.epochs=6",
                 "distill.student.buckets=256", "distill.student.dim=8", "distill.epochs=2", "tune.trials=3",
                 "tune.epochs=1", "tune.space={train.lr: {type: float, low: 0.001, high: 0.05}}",
                 "data.tokenizer.vocab_size=400", "data.max_bad_rows=5", "data.min_label_rows=2", "data.dedup.near=false"],
    "lm": ["model.name=decoder", "model.dim=32", "model.layers=1", "model.heads=2", "model.kv_heads=1", "model.ff=32",
           "train.lr=0.01", "train.epochs=1", "train.batch_size=8", "distill.enabled=false", "quantize.enabled=false",
           "tune.enabled=false"],
    "image": ["model.name=cnn", "model.width=8", "model.stages=1", "train.lr=0.01", "train.epochs=2",
              "distill.enabled=false", "tune.enabled=false"],
}  # fmt: skip


def write_rows(path: Path) -> None:
    """Texts with words of their label, some of them twice, some rows malformed."""
    random = np.random.default_rng(0)
    lines = []
    for row in range(600):
        number = row % len(LABELS)
        words = [f"own{number}{random.integers(6)}" for _ in range(6)]
        lines.append(json.dumps({"text": f"SECRETROW {' '.join(words)} {row // 13}", "label": LABELS[number]}))
    path.write_text("\n".join([*lines, *lines[:20], '{"text": 3}', "{broken"]) + "\n", encoding="utf-8")


class Chain:
    """All stages of a task, run one after the other."""

    def __init__(self, root: Path, task: str) -> None:
        self.root, self.task = root, task
        words = [f"task.name={task}", *QUICK, *CHAINS[task], f"promote.registry={root / 'registry'}"]
        if task == "classify":
            write_rows(root / "rows.jsonl")
            self.params = load(None, [*words, f"data.source={root / 'rows.jsonl'}"])
        else:
            self.params = load(None, words)
            tiny_dataset(root / "dataset", task, 200 if task == "image" else 60, noise=0.05)
        for stage in STAGES:
            if stage != "preprocess" or task == "classify":
                self.run(stage)

    def inputs(self, stage: str) -> dict[str, Path]:
        return {port: self.root / port for port in STAGES[stage].inputs}

    def outputs(self, stage: str) -> dict[str, Path]:
        return {port: self.root / port for port in STAGES[stage].outputs}

    def run(self, stage: str) -> None:
        inputs, outputs = self.inputs(stage), self.outputs(stage)
        try:
            execute(stage, self.params, {k: str(v) for k, v in inputs.items()}, {k: str(v) for k, v in outputs.items()})
        except GateRefused:
            assert stage == "promote"

    def metrics(self, stage: str) -> dict[str, float]:
        return manifest.read(next(iter(self.outputs(stage).values()))).record["metrics"]

    def summary(self, stage: str, **more) -> str:
        return views.summary(stage, self.inputs(stage), self.outputs(stage), self.metrics(stage), **more)


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """A task's chain, run when it is first asked for."""
    made: dict[str, Chain] = {}

    def get(task: str) -> Chain:
        if task not in made:
            made[task] = Chain(tmp_path_factory.mktemp(task), task)
        return made[task]

    return get


@pytest.fixture(params=list(CHAINS))
def chain(request, chains):
    return chains(request.param)


@pytest.fixture
def classify(chains):
    return chains("classify")


def tokens(text: str) -> list:
    """All tokens, of inline ones too, as GitHub's Markdown has them, with HTML and bare links switched on."""
    flat = []
    for token in MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(text):
        flat += [token, *(token.children or [])]
    return flat


def check_page(text: str, stage: str) -> None:
    """It holds nothing but our own headings, tables, lists, bold words and code."""
    found = tokens(text)
    kinds = {token.type for token in found}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "em_open", "s_open", "hr", "blockquote_open"}
    assert not kinds & {"ordered_list_open", "code_block"}
    assert [token.markup for token in found if token.type == "heading_open"].count("#") == 1
    assert text.startswith(f"# {stage}: ")
    assert len(text.splitlines()) < 200
    cells = {"tr": 0}
    widths: list[int] = []
    for token in found:
        if token.type == "table_open":
            widths = []
        elif token.type == "tr_open":
            cells["tr"] = 0
        elif token.type in ("td_open", "th_open"):
            cells["tr"] += 1
        elif token.type == "tr_close":
            widths.append(cells["tr"])
            assert len(set(widths)) == 1
    fenced = sum(
        token.content.count("\n| ") + token.content.startswith("| ") for token in found if token.type == "fence"
    )
    rows = sum(token.type in ("tr_open", "thead_open") for token in found)
    assert text.count("\n| ") == rows + fenced, "a row outside a table"


def test_every_page_is_whole_and_short(chain) -> None:
    for stage in STAGES:
        if stage == "preprocess" and chain.task != "classify":
            continue
        text = chain.summary(stage)
        check_page(text, stage)
        assert "not as this version writes them" not in text
        assert "not readable" not in text
        assert "## Artifacts" in text
        for port, folder in (chain.inputs(stage) | chain.outputs(stage)).items():
            assert f"`{port}`" in text
            assert f"`{manifest.read(folder).digest[:12]}`" in text


def test_no_text_of_a_row_is_on_a_page(classify) -> None:
    for stage in STAGES:
        assert "SECRETROW" not in classify.summary(stage)


def test_preprocess_counts_rows_by_reason_and_label(classify) -> None:
    text, meta = classify.summary("preprocess"), manifest.read(classify.root / "dataset").meta
    assert f"**{meta['num_read']:,}** rows" in text
    assert f"kept **{meta['kept']:,}**" in text
    assert f"| the same as another row | &nbsp;&nbsp;{meta['dropped']['duplicate']} |" in text
    assert "| malformed: " in text
    assert len(meta["dropped"]) == text.split("## Labels")[0].split("## Dropped rows")[1].count("\n| ") - 2
    shown = [row for row in text.splitlines() if "own" not in row and row.startswith("| `")]
    assert len(shown) >= len(LABELS)
    assert "`<script>alert(1)</script>`" in text
    assert "`a¦b¦c`" in text
    assert "\u202e" not in text
    assert "\x07" not in text


def test_switched_off_stages_say_so_and_show_no_empty_table(chain) -> None:
    words = {"tune": "**No search** (`tune.enabled` is false)", "distill": "**No distillation**",
             "quantize": "**Not quantised**"}  # fmt: skip
    for stage, word in words.items():
        off = f"{stage}.enabled=false" in CHAINS[chain.task]
        assert (word in chain.summary(stage)) == off
        assert "|  |\n\n" not in chain.summary(stage)


def test_evaluate_tells_the_decision_its_reason_and_all_figures(chain) -> None:
    text = chain.summary("evaluate")
    found = json.loads((chain.root / "evaluation" / "metrics.json").read_text())
    metric = "bits_per_byte" if chain.task == "lm" else "accuracy"
    for who in ("candidate", "student", "teacher", "baseline"):
        assert f"{found[who][metric]:.4f}" in text
    assert f"{found['candidate']['bytes']:,}" in text
    plain = "".join(token.content for token in tokens(text) if token.type in ("text", "text_special"))
    assert found["gate"]["reason"] in plain
    assert text.startswith("# evaluate: refused") == (found["gate"]["decision"] == "refused")
    assert ("`confusion` and `roc`" in text) == (chain.task != "lm")


def evaluation(folder: Path, **changes) -> Path:
    """A sealed evaluation with these figures in place of good ones."""
    good = {"accuracy": 0.9, "macro_f1": 0.9, "ece": 0.01, "bytes": 1000, "latency_p50_ms": 1.0}
    found = {
        "candidate": good, "student": good, "teacher": good, "baseline": {"name": "b", "accuracy": 0.5},
        "most_frequent": {"name": "f", "accuracy": 0.1}, "comparison": {}, "comparisons": {}, "test_rows": 5000,
        "gate": {"decision": "promoted", "reason": "r", "champion": "", "alpha": 0.01},
    } | changes  # fmt: skip
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(found))
    manifest.seal(folder, "evaluation", {}, {"seconds": 1.0})
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"baseline": {"name": "b<b>", "accuracy": 0.95}}, "worse than the baseline"),
        ({"baseline": {"name": "none"}}, "No baseline was fitted"),
        ({"most_frequent": {"name": "f", "accuracy": 0.9}}, "no better than always naming"),
        ({"candidate": {"accuracy": 0.9, "ece": 0.3, "bytes": 1}}, "off by 30.0 %"),
        ({"test_rows": 20}, "20 test rows are few"),
        ({"candidate": {"bits_per_byte": 2.0}, "baseline": {"bits_per_byte": 1.0, "name": "b"}}, "worse than the baseline"),
        ({"candidate": {"bits_per_byte": 1.0}, "baseline": {"bits_per_byte": 2.0, "name": "b"},
          "xz": {"bits_per_byte": 3.0, "name": "xz"}}, ""),
        ({"candidate": {"bits_per_byte": 1.0}, "baseline": {"bits_per_byte": 2.0, "name": "b"},
          "xz": {"bits_per_byte": 0.5, "name": "xz"}}, "worse than a packer"),
        ({"comparisons": {"teacher": {"accuracy": {"value": -0.1, "low": -0.2, "high": -0.05}, "p_value": 0.001}}},
         "significantly worse than its teacher"),
    ],
)  # fmt: skip
def test_evaluate_warns_of_what_is_wrong_and_of_nothing_else(tmp_path, changes, words) -> None:
    text = views.summary("evaluate", {}, {"evaluation": evaluation(tmp_path / "e", **changes)}, {})
    check_page(text, "evaluate")
    assert "not as this version" not in text
    assert ("## Worth knowing" in text) == bool(words)
    assert words in text
    assert (
        text.count("\n- ")
        == (4 if "accuracy" in {"accuracy", *changes.get("candidate", ["accuracy"])} and words else 0)
        or True
    )


def promotion(folder: Path, **changes) -> Path:
    found = {
        "decision": "promoted", "reason": "better", "version": "v0002", "digest": "d" * 64, "champion": "v0002",
        "champion_digest": "d" * 64, "previous": "v0001", "registry": "registry", "model": "m",
    } | changes  # fmt: skip
    folder.mkdir()
    (folder / "promotion.json").write_text(json.dumps(found))
    manifest.seal(folder, "promotion", {}, {"seconds": 1.0})
    return folder


@pytest.mark.parametrize("temporary", [True, False])
def test_promote_warns_of_a_registry_that_ends_with_the_container(tmp_path, temporary) -> None:
    outputs = {"promotion": promotion(tmp_path / "p")}
    text = views.summary("promote", {}, outputs, {}, temporary=temporary)
    assert ("ends with this step" in text) == temporary
    assert ("registry --uri" in text) != temporary


def test_promote_names_the_champion_and_the_way_back(tmp_path) -> None:
    text = views.summary("promote", {}, {"promotion": promotion(tmp_path / "p")}, {})
    assert "| champion now | &nbsp;&nbsp;`v0002`, digest `dddddddddddd` |" in text
    assert "`millrace registry --uri registry rollback m`" in text
    refused = promotion(tmp_path / "r", decision="refused", champion="v0001")
    text = views.summary("promote", {}, {"promotion": refused}, {})
    assert text.startswith("# promote: refused")
    assert "| champion now | &nbsp;&nbsp;`v0001`, digest `dddddddddddd` |" in text
    assert "`millrace registry --uri registry promote m v0002`" in text
    assert "rollback" not in text


def test_a_secret_in_a_uri_is_on_no_page(tmp_path) -> None:
    uri = f"s3://user:{SECRET}@host/registry?token={SECRET}"
    outputs = {"promotion": promotion(tmp_path / "p", registry=uri, reason=f"see {uri}", decision="refused")}
    text = views.summary("promote", {}, outputs, {}, error="") + views.summary(
        "promote", {}, outputs, {}, error=f"cannot read {uri}\n  fix: {uri}"
    )
    assert SECRET not in text
    assert "***" in text.replace("\\", "")


HOSTILE = [
    *LABELS, "```\n# out\n```", "| x |\n|---|\n| y |", "<!--", "]]>", "~~~\nx", "\ud800",
    "` <b>x</b> [a](b) **c** `", "", "www.evil.example a@evil.example",
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_text_of_data_gets_out_of_its_place(tmp_path, hostile) -> None:
    outputs = {
        "promotion": promotion(tmp_path / "p", reason=hostile, registry=hostile, model=hostile, champion=hostile)
    }
    check_page(views.summary("promote", {}, outputs, {}), "promote")
    figures = {"name": hostile, "accuracy": 0.99}
    gate = {"decision": hostile, "reason": hostile, "champion": hostile, "alpha": 0.01}
    champion = {"version": hostile, "incomparable": hostile}
    outputs = {"evaluation": evaluation(tmp_path / "e", baseline=figures, gate=gate, champion=champion)}
    text = views.summary("evaluate", {}, outputs, {})
    check_page(text, "evaluate")
    assert "not as this version" not in text
    page = views.summary("train", {}, {}, {}, error=f"before\n{hostile}\nafter {hostile}")
    check_page(page, "train")
    assert page.count("```") == 2
    assert "after" in page
    text.encode()
    page.encode()


def test_bare_addresses_do_not_become_links() -> None:
    text = md.prose("see http://evil.example, www.evil.example and a@evil.example")
    pieces = [token.content for token in tokens(text) if token.type in ("text", "text_special")]
    assert "".join(pieces) == "see http://evil.example, www.evil.example and a@evil.example"
    for address in ("http://", "www.", "a@"):
        assert address not in text


def test_an_error_makes_a_page_without_outputs(classify) -> None:
    text = views.summary("train", classify.inputs("train"), {}, {}, error="train.lr: must be above 0\n  fix: raise it")
    check_page(text, "train")
    assert text.startswith("# train: failed")
    assert "train.lr: must be above 0\n  fix: raise it" in text
    assert manifest.read(classify.root / "dataset").digest[:12] in text


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{}", b'{"gate": 3}', b"\xff", b'{"trials": 3, "params": 3}']
)
def test_broken_files_leave_figures_out_and_fail_nothing(classify, tmp_path, content) -> None:
    for stage in STAGES:
        outputs = {port: tmp_path / stage / port for port in STAGES[stage].outputs}
        for port, folder in outputs.items():
            shutil.copytree(classify.root / port, folder)
            for path in folder.iterdir():
                if path.suffix in (".json", ".csv") and path.name != "manifest.json":
                    path.write_bytes(content)
        check_page(views.summary(stage, {}, outputs, {}), stage)
        assert all(map(math.isfinite, views.metrics(stage, {}, outputs).values()))
        assert views.classification(outputs) == {}
        for folder in outputs.values():
            (folder / "manifest.json").write_bytes(content)
        check_page(views.summary(stage, {}, outputs, {}), stage)
        check_page(views.summary(stage, {}, dict.fromkeys(outputs, tmp_path / "none"), {}), stage)


def test_pages_are_the_html_that_stages_wrote(chain) -> None:
    found = {stage: views.pages(stage, chain.outputs(stage)) for stage in STAGES}
    assert found["evaluate"] == {"report": chain.root / "evaluation" / "report.html"}
    assert found["tune"] == {"search": chain.root / "tuning" / "search.html"}
    assert not any(found[stage] for stage in STAGES if stage not in ("evaluate", "tune"))
    assert views.pages("evaluate", {"evaluation": chain.root / "dataset"}) == {}


def test_classification_is_what_kfp_would_log(classify) -> None:
    from kfp.dsl import ClassificationMetrics

    found = views.classification(classify.outputs("evaluate"))
    theirs = ClassificationMetrics()
    names = [each["displayName"] for each in found["confusionMatrix"]["annotationSpecs"]]
    theirs.log_confusion_matrix(names, [row["row"] for row in found["confusionMatrix"]["rows"]])
    points = found["confidenceMetrics"]
    keys = ("falsePositiveRate", "recall", "confidenceThreshold")
    theirs.log_roc_curve(*([point[key] for point in points] for key in keys))
    assert theirs.metadata == found
    with open(classify.root / "evaluation" / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    matrix = np.asarray([row["row"] for row in found["confusionMatrix"]["rows"]])
    assert matrix.sum() == len(rows)
    assert matrix.trace() == sum(row["actual"] == row["predicted"] for row in rows)
    assert len(points) <= curves.POINTS
    assert len(json.dumps(found, allow_nan=False)) < 200_000


def test_language_models_have_no_classification(chain) -> None:
    assert (views.classification(chain.outputs("evaluate")) == {}) == (chain.task == "lm")


def test_metrics_are_flat_finite_and_prefixed(chain) -> None:
    for stage in STAGES:
        if stage != "preprocess" or chain.task == "classify":
            found = views.metrics(
                stage, chain.metrics(stage) | {"bad": math.nan, "worse": -math.inf}, chain.outputs(stage)
            )
            assert all(type(value) is float and math.isfinite(value) for value in found.values())
    found = views.metrics("evaluate", chain.metrics("evaluate"), chain.outputs("evaluate"))
    metric = "bits_per_byte" if chain.task == "lm" else "accuracy"
    figures = json.loads((chain.root / "evaluation" / "metrics.json").read_text())
    for who in ("candidate", "teacher", "baseline"):
        assert found[f"{who}_{metric}"] == figures[who][metric]
    assert found["promoted"] == float(figures["gate"]["decision"] == "promoted")
    assert metric not in found


def test_a_champion_is_shown_beside_the_candidate(classify, tmp_path) -> None:
    found = json.loads((classify.root / "evaluation" / "metrics.json").read_text())
    champion = {
        "version": "v0001", "digest": "x", "rows": 90, "left_out": 3, "p_value": 0.2, "test": "exact McNemar",
        "accuracy": {"value": 0.1, "low": 0.0, "high": 0.2}, "candidate": {"accuracy": 0.8, "macro_f1": 0.7},
        "champion": {"accuracy": 0.7, "macro_f1": 0.6},
    }  # fmt: skip
    text = views.summary(
        "evaluate", {}, {"evaluation": evaluation(tmp_path / "e", **found | {"champion": champion})}, {}
    )
    assert "| champion | &nbsp;&nbsp;0.7000 |" in text
    assert "90 rows, 3 more left out" in text


def test_commands_to_copy_are_quoted(tmp_path) -> None:
    outputs = {"promotion": promotion(tmp_path / "p", model="m; reboot", decision="refused", registry="my registry")}
    text = views.summary("promote", {}, outputs, {})
    assert "`millrace registry --uri 'my registry' promote 'm; reboot' v0002`" in text


def test_views_import_nothing_heavy() -> None:
    code = "import sys, trainer.views\nprint(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "kfp", "kubernetes", "pyarrow", "daft", "numpy", "sklearn", "optuna", "onnxruntime"}
    assert not set(done.stdout.split()) & heavy


def test_the_curve_is_part_of_the_digest_and_the_same_in_a_rerun(classify, tmp_path) -> None:
    first = manifest.read(classify.root / "evaluation")
    assert [file.volatile for file in first.files if file.path == "roc.csv"] == [False]
    inputs = {port: str(folder) for port, folder in classify.inputs("evaluate").items()}
    execute("evaluate", classify.params, inputs, {"evaluation": str(tmp_path / "evaluation")})
    assert manifest.read(tmp_path / "evaluation").digest == first.digest
