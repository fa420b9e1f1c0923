"""What a model cannot be divided by is refused before ranks or pods are started, with the key and the way out."""

from __future__ import annotations

import json

import pytest

from components.launch import spec
from pipelines import local
from trainer.artifacts import manifest
from trainer.config.load import load
from trainer.errors import ConfigError
from trainer.parallel import fits
from trainer.parallel.launch import launch
from trainer.stage import Call
from trainer.train import stage

DECODER = ["task.name=lm", "model.name=decoder", "model.dim=32", "model.layers=2", "model.heads=4", "model.kv_heads=2"]
# name -> (parameters, ranks, what the message says, what the fix says)
REFUSED = {
    "more stages than blocks": (
        [*DECODER, "parallel.pp=4"], 4, "parallel.pp: 4 stages, but the model has 2 blocks",
        "use parallel.pp=2, or model.layers=4 or more",
    ),
    "more stages of each rank than blocks": (
        [*DECODER, "parallel.pp=2", "parallel.pipeline.schedule=interleaved"], 2, "2 ranks with 2 stages each",
        "parallel.pipeline.schedule=1f1b",
    ),
    "micro-batches of interleaved stages": (
        [*DECODER, "parallel.pp=2", "parallel.pipeline.schedule=interleaved", "parallel.pipeline.microbatches=3",
         "model.layers=4"], 2, "parallel.pipeline.microbatches: 3", "microbatches=4",
    ),
    "heads": ([*DECODER, "parallel.tp=4"], 4, "parallel.tp: 4 does not divide model.kv_heads (2)", "parallel.tp that divides"),
    "columns": ([*DECODER, "parallel.tp=2", "model.ff=33"], 2, "does not divide model.ff (33)", "parallel.tp that divides"),
    "no attention": (["model.name=textcnn", "parallel.tp=2"], 2, "model.name=textcnn has no plan", "parallel.tp=1"),
    "axes": ([*DECODER, "parallel.tp=2", "parallel.pp=2"], 2, "= 4 does not divide the number of ranks, 2", "4 ranks"),
    "experts beside matrices": ([*DECODER, "parallel.tp=2", "parallel.ep=2"], 4, "parallel.ep: 2, but experts", "parallel.tp=1"),
    "context on a CPU": ([*DECODER, "parallel.cp=2", "train.device=cpu"], 2, "for GPUs", "parallel.cp=1"),
}  # fmt: skip

OF_RANKS = ("axes", "experts beside matrices", "context on a CPU")


@pytest.mark.parametrize("name", REFUSED)
def test_no_rank_is_started_for_what_cannot_be(name, tmp_path):
    words, ranks, message, fix = REFUSED[name]
    params = load(None, [*words, f"train.processes={ranks}", "distill.enabled=false"])
    with pytest.raises(ConfigError) as caught:
        launch(Call(params, {}, {}, tmp_path))
    assert message in caught.value.message
    assert fix in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_of_ranks_here_it_is_known_whether_there_is_a_gpu(monkeypatch):
    params = load(None, [*DECODER, "parallel.cp=2", "distill.enabled=false"])
    fits.check_ahead(params, 2)
    monkeypatch.setattr(fits, "_has_gpu", lambda: False)
    with pytest.raises(ConfigError, match="for GPUs"):
        fits.check(params, 2)
    monkeypatch.setattr(fits, "_has_gpu", lambda: True)
    assert fits.check(params, 2).cp == 2


@pytest.mark.parametrize("name", REFUSED)
def test_no_job_is_made_for_what_cannot_be(name):
    words, ranks, message, _ = REFUSED[name]
    words = [*words, "distill.enabled=false", f"train.processes={ranks // 2}"]
    given = {"name": "a", "namespace": "b", "args": [], "nodes": 2}
    with pytest.raises(ConfigError) as caught:
        spec.stage(load(None, words), "train", **given)
    assert message in caught.value.message
    # A search may yet find a model that fits, if it looks for one; it finds no other number of ranks.
    elsewhere = load(None, [*words, "tune.space={model.dropout: {low: 0.0, high: 0.5}}"])
    with pytest.raises(ConfigError):
        spec.stage(elsewhere, "train", **given)
    family = load(None, words).model.name
    searched = load(None, [*words, f"tune.space={{model.name: {{type: categorical, choices: [{family}]}}}}"])
    if name in OF_RANKS:
        with pytest.raises(ConfigError):
            spec.stage(searched, "train", **given)
    else:
        spec.stage(searched, "train", **given)


def test_a_run_is_refused_before_its_data_is_prepared_unless_it_ends_there():
    params = load(None, ["parallel.dp_replicate=2"])
    for until in ("raw", "preprocess", "tune"):
        local.check_ranks(params, until)
    for until in ("train", "evaluate", ""):
        with pytest.raises(ConfigError, match="not the number of ranks, 1"):
            local.check_ranks(params, until)
    local.check_ranks(params, "", nodes=2)


def test_it_is_the_model_of_the_search_that_counts(tmp_path, monkeypatch):
    (tmp_path / "best.json").write_text(json.dumps({"params": {"model.layers": 4}}))
    manifest.seal(tmp_path, "tuning", {}, {})
    words, ranks, message, _ = REFUSED["more stages than blocks"]
    params = load(None, [*words, f"train.processes={ranks}", "distill.enabled=false"])
    with pytest.raises(ConfigError, match=message):
        stage.run(Call(params, {}, {}, tmp_path))
    monkeypatch.setattr("trainer.parallel.launch._launch", lambda call, *_: call.params.model.layers)
    assert stage.run(Call(params, {"tuning": tmp_path}, {}, tmp_path / "scratch")) == 4


def test_what_can_be_divided_is_what_has_a_plan():
    from trainer.parallel.tensor import FAMILIES

    assert set(fits.BLOCKS) == set(FAMILIES)
    for words, ranks in ((["parallel.tp=2", "parallel.pp=2"], 4), (["parallel.tp=2", "parallel.zero=3"], 8), ([], 3)):
        assert fits.check(load(None, [*DECODER, *words, "distill.enabled=false"]), ranks).size == ranks
