"""Model families: shapes, padding, saving, and export to ONNX."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from trainer import models
from trainer.artifacts.dataset import Spec
from trainer.compress.export import INPUT, export_onnx, open_session, serialise
from trainer.config.model import FAMILIES
from trainer.errors import ArtifactError, ConfigError
from trainer.models import decoder
from trainer.train.state import seed_all

TEXT = Spec("classify", vocab_size=300, num_labels=5, max_length=48)
SPECS = {"classify": TEXT, "lm": dataclasses.replace(TEXT, task="lm", num_labels=0),
         "image": Spec("image", num_labels=5, image_size=8, image_channels=1)}  # fmt: skip
SMALL = {
    "ngram": {"buckets": 512, "dim": 8, "hidden": 8}, "textcnn": {"dim": 8, "filters": 4}, "encoder": {"dim": 16, "ff": 16},
    "decoder": {"dim": 24, "layers": 2, "heads": 6, "ff": 16}, "cnn": {"width": 4}, "vit": {"dim": 16, "layers": 1, "ff": 16},
}  # fmt: skip
TEXTS = [name for name, (_, _, learns) in FAMILIES.items() if "classify" in learns]


def make(name: str, **changed: int) -> tuple[torch.nn.Module, object, Spec]:
    family, _, learns = FAMILIES[name]
    config, spec = family(name=name, **(SMALL.get(name, {}) | changed)), SPECS[learns[0]]
    seed_all(1)
    return models.build(config, spec).eval(), config, spec


def inputs(spec: Spec, rows: int = 3, length: int = 16) -> torch.Tensor:
    seed_all(2)
    if spec.task == "image":
        return torch.rand(rows, 1, 8, 8)
    return torch.randint(1, spec.vocab_size, (rows, length))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_have_the_shape_that_the_task_needs(name):
    model, _, spec = make(name)
    given = inputs(spec)
    wanted = (3, 16, spec.vocab_size) if spec.task == "lm" else (3, spec.num_labels)
    assert model(given).shape == wanted


@pytest.mark.parametrize("name", TEXTS)
def test_padding_does_not_change_a_texts_logits(name):
    model, _, spec = make(name)
    tokens = inputs(spec)
    tokens[1, 9:] = 0
    wider = torch.cat([tokens, torch.zeros(3, 24, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(model(wider), model(tokens), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(tokens[1:2, :9]), model(tokens)[1:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TEXTS)
def test_an_empty_text_has_finite_logits(name):
    model, _, _ = make(name)
    assert model(torch.zeros(2, 8, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize("name", ["decoder", "encoder", "vit"])
def test_a_stack_in_parts_is_the_whole(name):
    """Each part has no more than what the embedding, its own blocks or the head need."""
    model, _, spec = make(name, layers=3)
    given = inputs(spec)
    first, last = copy.deepcopy(model), copy.deepcopy(model)
    for attribute in set(model.head_names) - set(model.embed_names):
        setattr(first, attribute, None)
    for attribute in set(model.embed_names) - set(model.head_names):
        setattr(last, attribute, None)
    setattr(first.blocks, "2", None)
    last.blocks[0] = last.blocks[1] = torch.nn.Identity()
    x = first(given, span=(0, 2))
    assert x.shape == model.stream(given)
    assert torch.equal(last(given, x, (2, 3)), model(given))


OPTIONS = {"qk_norm": True, "bigrams": 64}


def with_options(**given) -> tuple[torch.nn.Module, object, Spec]:
    """A decoder with every option; the table of pairs, which begins at zero, holds something."""
    model, config, spec = make("decoder", **OPTIONS, **given)
    torch.nn.init.normal_(model.bigrams.weight[1:].data)
    return model, config, spec


@pytest.mark.parametrize("how", [make, lambda _: with_options()], ids=["plain", "options"])
def test_decoder_never_sees_the_future(how):
    model, _, spec = how("decoder")
    tokens = inputs(spec)
    changed = tokens.clone()
    changed[:, 10:] = 7
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :10], before[:, :10])
    assert not torch.allclose(after[:, 10:], before[:, 10:])


def test_pairs_are_of_a_token_and_the_one_before_it():
    tokens = torch.tensor([[5, 6, 7, 5, 6, 0, 0], [6, 5, 6, 7, 8, 9, 4]])
    rows = decoder.pairs(tokens, decoder.previous(tokens), 64)
    assert rows[0, 1] == rows[0, 4] == rows[1, 2]
    assert rows[0, 1] != rows[1, 1]
    # The first token has none before it, and padding is in no pair.
    assert (rows == 0).tolist() == [[True] + [False] * 4 + [True] * 2, [True] + [False] * 6]
    tokens = torch.randint(900_000, 1_000_000, (4, 64))
    large = decoder.pairs(tokens, decoder.previous(tokens), 16)
    assert 0 <= int(large.min()) <= int(large.max()) < 16


def test_the_row_of_no_pair_stays_zero():
    model, _, spec = with_options()
    model.train()(inputs(spec)).sum().backward()
    assert not model.bigrams.weight[0].any()
    assert not model.bigrams.weight.grad[0].any()
    assert model.bigrams.weight.grad[1:].any()


def test_attention_with_qk_norm_does_not_depend_on_the_size_of_queries_and_keys():
    model, _, spec = with_options()
    before = model(inputs(spec))
    with torch.no_grad():
        for block in model.blocks:
            block.query.weight.mul_(50)
            block.key.weight.mul_(50)
    torch.testing.assert_close(model(inputs(spec)), before, rtol=1e-3, atol=1e-3)


def test_decoder_with_options_learns_in_bfloat16_what_it_learns_in_float32():
    gradients = []
    for mixed in (False, True):
        model, _, spec = with_options()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits = model.train()(inputs(spec))
        logits.float().logsumexp(-1).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=0, atol=0.05 * float(wanted.abs().max()), msg=name)


def test_decoder_with_options_is_saved_exported_and_run_in_parts(tmp_path):
    pytest.importorskip("onnxruntime")
    model, config, spec = with_options(layers=3)
    given = inputs(spec, rows=2, length=31)
    given[0, 20:] = 0
    models.save(tmp_path / "m", model, config, spec, [], None, {})
    assert torch.equal(models.load(tmp_path / "m").model(given), model(given))
    x = model(given, span=(0, 1))
    assert torch.equal(model(given, x, (1, 3)), model(given))
    (found,) = open_session(serialise(export_onnx(model, spec)), 1).run(None, {INPUT: given.numpy()})
    np.testing.assert_allclose(found, model(given).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_decoder_knows_positions():
    model, _, _ = make("decoder")
    tokens = torch.tensor([[5, 9, 9, 5, 9, 9, 5]])
    assert not torch.allclose(model(tokens)[0, 0], model(tokens)[0, 3])


def test_ngrams_are_the_same_wherever_they_stand_and_differ_by_order():
    model, _, _ = make("ngram")
    rows = model.ngrams(torch.tensor([[5, 6, 7, 5, 6, 7, 0, 0]])).view(3, 8)
    assert rows[1, 0] == rows[1, 3]
    assert rows[2, 0] == rows[2, 3]
    assert rows[1, 0] != rows[1, 1]
    # An n-gram that would reach into the padding is row 0.
    assert (rows == 0).tolist() == [[False] * 6 + [True] * 2, [False] * 5 + [True] * 3, [False] * 4 + [True] * 4]


def test_hash_of_large_token_ids_stays_inside_the_table():
    family, _, _ = FAMILIES["ngram"]
    model = models.build(family(buckets=16, dim=2, orders=(1, 8)), dataclasses.replace(TEXT, vocab_size=1_000_000))
    rows = model.ngrams(torch.randint(900_000, 1_000_000, (4, 64)))
    assert 0 <= int(rows.min()) <= int(rows.max()) < 16


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_model_answers_as_before(name, tmp_path):
    model, config, spec = make(name)
    labels = [f"l{i}" for i in range(spec.num_labels)]
    models.save(tmp_path / "m", model, config, spec, labels, None, {"val_loss": 1.5})
    loaded = models.load(tmp_path / "m")
    assert (loaded.config, loaded.spec, loaded.labels) == (config, spec, labels)
    assert torch.equal(loaded.model(inputs(spec)), model(inputs(spec)))


def test_tied_embedding_counts_once_and_is_stored_once(tmp_path):
    family = FAMILIES["decoder"][0]
    tied, free = (family(dim=24, heads=6, layers=1, tie_embeddings=tie) for tie in (True, False))
    counts = [models.num_parameters(models.build(config, SPECS["lm"])) for config in (tied, free)]
    assert counts[1] - counts[0] == 24 * 300


def test_weights_of_another_shape_are_refused(tmp_path):
    model, config, spec = make("textcnn")
    models.save(tmp_path, model, config.model_copy(update={"dim": 9}), spec, ["a"] * 5, None, {})
    with pytest.raises(ArtifactError, match="does not fit"):
        models.load(tmp_path)


def test_damaged_files_are_artifact_errors(tmp_path):
    model, config, spec = make("textcnn")
    models.save(tmp_path, model, config, spec, ["a"] * 5, None, {})
    weights = (tmp_path / models.WEIGHTS).read_bytes()
    for content in (b"", weights[:40], b"\xff" * 100):
        (tmp_path / models.WEIGHTS).write_bytes(content)
        with pytest.raises(ArtifactError):
            models.load(tmp_path)
    for content in ("", "[]", "{}", '{"format": 1, "model": {"name": "nobody"}}', '{"format": 99}'):
        (tmp_path / models.CONFIG).write_text(content)
        with pytest.raises(ArtifactError):
            models.load(tmp_path)


def test_patch_that_does_not_divide_the_picture_names_the_field():
    with pytest.raises(ConfigError, match=r"model\.patch: 3"):
        models.build(FAMILIES["vit"][0](patch=3), SPECS["image"])


@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_export_agrees_for_other_batches_and_lengths(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, _, spec = make(name)
    dynamic = {0: torch.export.Dim("batch")} | ({} if spec.task == "image" else {1: torch.export.Dim("length", max=48)})
    path = tmp_path / "m.onnx"
    torch.onnx.export(
        model, (inputs(spec),), str(path), dynamo=True, dynamic_shapes=(dynamic,), input_names=["inputs"], verbose=False
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    other = inputs(spec, rows=2, length=31)
    if spec.task == "classify":
        other[0, 20:] = 0
    (found,) = session.run(None, {"inputs": other.numpy()})
    np.testing.assert_allclose(found, model(other).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_sqrtn_is_the_sum_over_the_root_of_the_number_of_ngrams():
    family, _, _ = FAMILIES["ngram"]
    mean, sqrtn = (models.build(family(name="ngram", combiner=how), TEXT).eval() for how in ("mean", "sqrtn"))
    sqrtn.load_state_dict(mean.state_dict())
    tokens = inputs(TEXT)
    tokens[1, 4:] = 0
    count = (mean.ngrams(tokens) != 0).sum(1, keepdim=True)
    bias = mean.output.bias
    torch.testing.assert_close(sqrtn(tokens) - bias, (mean(tokens) - bias) * count.sqrt())


SHAPES = """
import sys, torch
from trainer import models
from trainer.artifacts.dataset import Spec
from trainer.config.model import FAMILIES
from trainer.models.shapes import shapes_only

specs = {name: Spec("image", num_labels=2, image_size=8, image_channels=1) for name in ("cnn", "vit")}
specs["decoder"] = Spec("lm", vocab_size=9, max_length=8)
before = torch.get_rng_state()
for name, (family, *_) in FAMILIES.items():
    with shapes_only():
        model = models.build(family(name=name), specs.get(name, Spec("classify", vocab_size=9, num_labels=2, max_length=8)))
    assert all(value.is_meta for value in model.state_dict().values()), name
assert torch.equal(before, torch.get_rng_state())
assert "torch._dynamo" not in sys.modules
"""


def test_of_a_model_without_values_nothing_is_drawn_and_no_compiler_is_imported(root):
    subprocess.run([sys.executable, "-c", SHAPES], cwd=root, check=True, timeout=120)
