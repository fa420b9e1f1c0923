"""int8 and ONNX: close to fp32, small, the same bytes for the same weights, and honestly tabled."""

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.artifacts import manifest
from trainer.artifacts.dataset import Spec
from trainer.compress import measure, quantize
from trainer.compress.export import INPUT, export_onnx, open_session, serialise
from trainer.config.load import validate
from trainer.predict import served_bytes
from trainer.stage import execute

FAMILIES = {
    "ngram": {"buckets": 512, "dim": 16, "hidden": 24},
    "textcnn": {"dim": 16, "filters": 8},
    "encoder": {"dim": 16, "ff": 32, "layers": 1, "heads": 2},
    "decoder": {"dim": 16, "ff": 32, "layers": 1, "heads": 2, "kv_heads": 1},
    "cnn": {"width": 16, "stages": 2},
    "vit": {"dim": 16, "ff": 32, "layers": 1, "heads": 2},
}
TASKS = {"decoder": "lm", "cnn": "image", "vit": "image"}


def built(name: str, **changes):
    task = TASKS.get(name, "classify")
    spec = (
        Spec(task, num_labels=5, image_size=8, image_channels=1)
        if task == "image"
        else Spec(task, vocab_size=300, num_labels=0 if task == "lm" else 5, max_length=64)
    )
    params = validate(
        {"task": {"name": task}, "model": {"name": name} | FAMILIES[name] | changes, "distill": {"enabled": False}}
    )
    torch.manual_seed(0)
    return models.build(params.model, spec).eval(), spec


def inputs(spec: Spec, rows: int, length: int = 24) -> np.ndarray:
    rng = np.random.default_rng(rows)
    if spec.task == "image":
        return rng.random((rows, 1, 8, 8), np.float32)
    tokens = rng.integers(2, spec.vocab_size, (rows, length))
    tokens[0, length // 2 :] = 0
    return tokens


def run(content: bytes, given: np.ndarray) -> np.ndarray:
    return open_session(content, 1).run(None, {INPUT: given})[0]


def expected(model: nn.Module, given: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(given)).numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_exports_and_quantises(name):
    model, spec = built(name)
    exported = export_onnx(model, spec)
    fp32, dynamic = serialise(exported), serialise(quantize.quantize_dynamic(exported))
    static = serialise(quantize.quantize_static(exported, [inputs(spec, rows) for rows in (4, 5)]))
    for rows, length in ((1, 8), (1, 64), (3, 17)):
        given = inputs(spec, rows, length)
        wanted = expected(model, given)
        np.testing.assert_allclose(run(fp32, given), wanted, atol=2e-5, rtol=1e-4)
        spread = float(np.abs(wanted).max())
        for content in (dynamic, static):
            assert np.abs(run(content, given) - wanted).max() < 0.12 * spread
    if name in ("ngram", "encoder"):
        assert len(dynamic) < len(fp32)


def test_the_file_holds_no_trace_of_the_machine_and_is_the_same_everywhere(root, tmp_path):
    code = (
        "import sys; from pathlib import Path; from tests.unit import test_compress_quantize as t\n"
        "from trainer.compress import quantize; from trainer.compress.export import export_onnx, serialise\n"
        "model, spec = t.built('ngram'); made = export_onnx(model, spec)\n"
        "out = Path(sys.argv[1]); out.joinpath('f').write_bytes(serialise(made))\n"
        "out.joinpath('q').write_bytes(serialise(quantize.quantize_dynamic(made)))\n"
        "out.joinpath('s').write_bytes(serialise(quantize.quantize_static(made, [t.inputs(spec, 4)])))\n"
    )
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    env = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(root), "TMPDIR": str(folder), "HOME": str(folder)}
    env |= {"XDG_CACHE_HOME": str(folder / "cache")}
    env.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=folder, env=env, check=True, timeout=240)
    model, spec = built("ngram")
    made = export_onnx(model, spec)
    here = {
        "f": serialise(made),
        "q": serialise(quantize.quantize_dynamic(made)),
        "s": serialise(quantize.quantize_static(made, [inputs(spec, 4)])),
    }
    for name, content in here.items():
        assert content == (folder / name).read_bytes()
        for trace in (str(root), str(tmp_path), "site-packages", ".py", "aten"):
            assert trace.encode() not in content
    left = {path.name for path in folder.rglob("*") if path.is_file()}  # torch makes an empty cache folder
    assert left == {"f", "q", "s"}  # no temporary file, no telemetry session, no device id


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 9),
    scale=st.sampled_from([1e-30, 1e-7, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 10**6),
)
def test_rows_lose_at_most_half_a_step(rows, width, scale, seed):
    table = (np.random.default_rng(seed).standard_normal((rows, width)) * scale).astype(np.float32)
    values, scales = quantize.quantize_rows(table)
    assert values.dtype == np.int8
    assert scales.shape == (rows, 1)
    assert scales.dtype == np.float16
    wide = scales.astype(np.float32)
    assert np.isfinite(wide).all()
    assert (np.abs(values * wide - table) <= 0.5 * wide * (1 + 1e-5) + 1e-30).all()
    assert (wide <= np.abs(table).max(axis=1, keepdims=True) / 127 * 1.002 + 1e-7).all()


def test_a_row_of_zeros_stays_zero():
    table = np.zeros((3, 4), np.float32)
    table[1] = [1, -2, 3, 0]
    values, scales = quantize.quantize_rows(table)
    assert (values[[0, 2]] * scales[[0, 2]].astype(np.float32) == 0).all()
    np.testing.assert_allclose(values[1] * scales[1].astype(np.float32), table[1], atol=0.013)


def test_the_table_is_int8_and_nothing_of_it_stays_float():
    model, spec = built("ngram", buckets=4096)
    made = quantize.quantize_dynamic(export_onnx(model, spec))
    kinds = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in made.graph.initializer}
    assert kinds["table.weight_int8"] == (onnx.TensorProto.INT8, (4096, 16))
    assert kinds["table.weight_scale"] == (onnx.TensorProto.FLOAT16, (4096, 1))
    large = [name for name, (kind, dims) in kinds.items() if kind == onnx.TensorProto.FLOAT and np.prod(dims) > 100]
    assert large == []


def test_int8_is_at_most_35_percent_of_fp32():
    model, spec = built("ngram", buckets=16384, dim=32, hidden=0)
    made = quantize.quantize_dynamic(export_onnx(model, spec))
    fp32 = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert len(serialise(made)) < 0.29 * fp32


def test_a_table_that_two_nodes_read_is_stored_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(600, 16)
            self.output = nn.Linear(16, 3)

        def forward(self, tokens):
            return self.output(self.table(tokens).mean(1) + self.table(tokens * 2 % 600).amax(1))

    torch.manual_seed(0)
    model = Twice().eval()
    spec = Spec("classify", vocab_size=600, num_labels=3, max_length=64)
    made = quantize.quantize_gathers(export_onnx(model, spec))
    names = [tensor.name for tensor in made.graph.initializer]
    assert names.count("table.weight_int8") == 1
    assert "table.weight" not in names
    given = inputs(spec, 3)
    np.testing.assert_allclose(run(serialise(made), given), expected(model, given), atol=0.02)


def test_a_table_that_is_also_the_output_layer_is_stored_once():
    model, spec = built("decoder")
    exported = export_onnx(model, spec)
    made = quantize.quantize_dynamic(exported)
    shapes = [tuple(tensor.dims) for tensor in made.graph.initializer if np.prod(tensor.dims) >= 300 * 16]
    assert shapes == [(16, 300)]
    given = inputs(spec, 3)
    wanted = expected(model, given)
    assert np.abs(run(serialise(made), given) - wanted).max() < 0.03 * np.abs(wanted).max()


def test_a_decoder_with_qk_norm_and_bigrams_is_quantised_table_of_pairs_and_all():
    model, spec = built("decoder", qk_norm=True, bigrams=512)
    torch.nn.init.normal_(model.bigrams.weight[1:].data, std=0.02)
    made = quantize.quantize_dynamic(export_onnx(model, spec))
    shapes = sorted(tuple(tensor.dims) for tensor in made.graph.initializer if np.prod(tensor.dims) >= 300 * 16)
    assert shapes == [(16, 300), (512, 16)]
    given = inputs(spec, 3)
    wanted = expected(model, given)
    assert np.abs(run(serialise(made), given) - wanted).max() < 0.05 * np.abs(wanted).max()
    torchao, _ = quantize.quantize_torchao(model)
    assert np.abs(expected(torchao, given) - wanted).max() < 0.1 * np.abs(wanted).max()


def test_small_tables_are_left_alone():
    model, spec = built("ngram", buckets=64, dim=4, hidden=0)
    exported = export_onnx(model, spec)
    assert quantize.quantize_gathers(exported).SerializeToString() == exported.SerializeToString()


def test_unfolding_a_gemm_changes_no_number():
    model, spec = built("ngram")
    exported = export_onnx(model, spec)
    unfolded = quantize.unfold(exported)
    assert "Gemm" in {node.op_type for node in exported.graph.node}
    assert "Gemm" not in {node.op_type for node in unfolded.graph.node}
    given = inputs(spec, 4)
    np.testing.assert_allclose(run(serialise(unfolded), given), run(serialise(exported), given), atol=1e-6)


def test_torchao_quantises_linear_layers_and_tables_and_spares_the_original():
    model, spec = built("ngram")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made, note = quantize.quantize_torchao(model)
    given = inputs(spec, 4)
    wanted = expected(model, given)
    found = expected(made, given)
    assert 0 < np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()
    assert quantize.tensor_bytes(made) < 0.45 * quantize.tensor_bytes(model)
    assert note == ""
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_torchao_says_what_it_left_out():
    model, _ = built("cnn")
    assert quantize.quantize_torchao(model)[1] == "Conv2d stay float32"


def test_a_shared_weight_is_counted_once():
    layer = nn.Linear(10, 10, bias=False)
    assert quantize.tensor_bytes(nn.Sequential(layer, layer)) == 400


def test_a_variant_that_loses_too_much_is_marked():
    fp32 = measure.row("fp32 torch", 100, figures(0.90), None, "accuracy")
    bad = measure.row("int8 onnx-static", 30, figures(0.894), fp32, "accuracy")
    good = measure.row("int8 onnx-dynamic", 30, figures(0.896), fp32, "accuracy", served=True)
    assert bad.note == "loses 0.60 points, more than 0.5"
    assert bad.lost == pytest.approx(0.6)
    assert (good.note, good.ratio) == ("", 0.3)
    text = measure.as_text([fp32, good, bad], "accuracy")
    assert "served" in text.splitlines()[2]
    assert "loses 0.60 points" in text.splitlines()[3]


def test_more_bits_per_byte_are_a_loss():
    assert measure.points_lost(2.02, 2.00, "bits_per_byte") == pytest.approx(1.0)
    assert measure.points_lost(1.98, 2.00, "bits_per_byte") < 0


def figures(score: float) -> dict[str, float]:
    return {"score": score, "latency_p50_ms": 1.0, "latency_p99_ms": 2.0, "rows_per_s": 3.0}


# -- the stage ----------------------------------------------------------------------------------------------------------

TREE = {
    "model": {"name": "ngram", "buckets": 2048, "dim": 16},
    "train": {"epochs": 4, "batch_size": 32, "threads": 1, "lr": 0.03},
    "quantize": {"calibration_rows": 32},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("quantize")
    tiny_dataset(place / "dataset", "classify", 200)
    execute("train", validate(TREE), {"dataset": str(place / "dataset")}, {"model": str(place / "student")})
    return place


def quantise(place, out, **changes):
    params = validate(TREE | {"quantize": TREE["quantize"] | changes})
    ports = {"dataset": str(place / "dataset"), "student": str(place / "student")}
    return execute("quantize", params, ports, {"quantized": str(out)})


@pytest.fixture(scope="module")
def quantized(place):
    quantise(place, place / "quantized")
    return place / "quantized"


def test_the_stage_tables_every_variant(quantized):
    table = json.loads((quantized / "table.json").read_text())
    rows = {row["variant"]: row for row in table["rows"]}
    assert list(rows) == ["fp32 torch", "fp32 onnx", "int8 onnx-dynamic", "int8 onnx-static", "int8 torchao"]
    assert [name for name, row in rows.items() if row["served"]] == ["int8 onnx-dynamic"]
    assert rows["int8 onnx-dynamic"]["bytes"] == served_bytes(quantized) == (quantized / "model.onnx").stat().st_size
    assert rows["fp32 torch"]["bytes"] == (quantized / "model.safetensors").stat().st_size
    assert rows["fp32 onnx"]["score"] == rows["fp32 torch"]["score"]
    for row in rows.values():
        assert 0 < row["latency_p50_ms"] <= row["latency_p99_ms"]
        assert row["rows_per_s"] > 0


def test_the_folder_is_a_model_of_its_own(quantized, place):
    loaded, student = models.load(quantized), models.load(place / "student")
    temperature = json.loads((quantized / "manifest.json").read_text())["meta"]["temperature"]
    for name, weight in student.model.state_dict().items():
        wanted = weight / temperature if name.startswith("output.") else weight
        assert torch.equal(loaded.model.state_dict()[name], wanted)
    assert loaded.labels == student.labels
    assert "model-index" in (quantized / "README.md").read_text()


def test_what_the_table_says_is_what_the_served_file_scores(quantized, place):
    params = validate(TREE)
    task = tasks.build(params, models_dataset(place))
    scored = task.evaluate(measure.OnnxModule((quantized / "model.onnx").read_bytes()), "val")["accuracy"]
    assert json.loads((quantized / "metrics.json").read_text()) == {"val_accuracy": scored}


def models_dataset(place):
    from trainer.artifacts.dataset import Dataset

    return Dataset(place / "dataset")


def test_quantising_again_gives_the_same_digest(quantized, place, tmp_path):
    quantise(place, tmp_path / "again")
    assert manifest.read(tmp_path / "again").digest == manifest.read(quantized).digest


def test_without_quantisation_the_model_is_only_exported(place, tmp_path):
    quantise(place, tmp_path / "plain", enabled=False)
    rows = json.loads((tmp_path / "plain" / "table.json").read_text())["rows"]
    assert [row["variant"] for row in rows if row["served"]] == ["fp32 onnx"]
    assert len(rows) == 2
    weights = onnx.load(str(tmp_path / "plain" / "model.onnx")).graph.initializer
    assert {"table.weight"} <= {tensor.name for tensor in weights}


def test_static_is_served_if_asked_and_pruned_weights_are_in_both_files(place, tmp_path):
    prune = {"target": 0.6, "every": 1, "epochs": 2}
    quantise(place, tmp_path / "static", serve="onnx-static", torchao=False, prune=prune)
    folder = tmp_path / "static"
    rows = json.loads((folder / "table.json").read_text())["rows"]
    assert [row["variant"] for row in rows if row["served"]] == ["int8 onnx-static"]
    assert "int8 torchao" not in {row["variant"] for row in rows}
    made = onnx.load(str(folder / "model.onnx"))
    assert "QuantizeLinear" in {node.op_type for node in made.graph.node}
    table = models.load(folder).model.state_dict()["table.weight"]
    assert float((table == 0).float().mean()) == pytest.approx(0.6, abs=0.02)
    tensors = {each.name: each for each in made.graph.initializer}
    assert ((numpy_helper.to_array(tensors["table.weight_int8"]) == 0) >= (table == 0).numpy()).all()
    assert (folder / "history.jsonl").read_text().count("\n") >= 1
