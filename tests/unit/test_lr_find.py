"""The LR range test: the rates that are really used, where it ends, what it suggests, and that only its page is left."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from pipelines.cli import main
from tests.tiny import tiny_dataset
from trainer.config.load import load
from trainer.errors import ConfigError
from trainer.tasks.classify import Classify
from trainer.train import lr_find, lr_page
from trainer.train.loop import Loop
from trainer.train.lr_find import Found, Range, find, smoothed, suggest

SMALL = ["train.threads=1", "model.name=ngram", "model.buckets=512", "model.dim=16", "train.batch_size=16"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("data") / "d", "classify", rows=200)


@pytest.fixture
def used(monkeypatch):
    """Rates of all groups of the optimizer at each step."""
    found, update = [], Loop._update

    def noted(self, norm):
        update(self, norm)
        found.append([group["lr"] for group in self.optimizer.param_groups])

    monkeypatch.setattr(Loop, "_update", noted)
    return found


def test_each_step_uses_its_rate_from_the_first_to_the_last(dataset, used):
    tried = Range(1e-5, 1e-2, 31)
    words = ["train.schedule=cosine", "train.warmup=0.5", "train.lr=0.3", "train.growth.initial=8"]
    found = find(load(None, [*SMALL, *words]), dataset, tried)
    assert found.rates == [tried.rate(step) for step in range(31)]
    assert [rates[-1] for rates in used] == pytest.approx(found.rates)
    assert used[0][0] == pytest.approx(1e-5)
    assert used[-1][0] == pytest.approx(1e-2)
    assert not found.diverged


def test_with_muon_the_rate_of_the_matrices_grows_along(dataset, used):
    words = ["model.name=encoder", "model.dim=16", "model.layers=1", "model.ff=16", "model.heads=2", "train.threads=1"]
    params = load(None, [*words, "train.optimizer=muon", "train.lr=0.001", "train.muon_lr=0.02"])
    found = find(params, dataset, Range(1e-5, 1e-3, 10))
    assert [rates[0] / rates[-1] for rates in used] == pytest.approx([20.0] * 10)
    assert found.words(1e-3) == "train.lr=0.001 train.muon_lr=0.02"


def test_it_ends_where_the_loss_diverges_and_suggests_less(dataset):
    params = load(None, [*SMALL, "train.optimizer=sgd", "train.clip=0", "train.batch_size=8"])
    found = find(params, dataset, Range(1e-4, 10.0, 200, divergence=2.0))
    assert found.diverged
    assert len(found.rates) < 200
    assert found.steepest < found.rates[-1]
    assert found.tenth < found.rates[-1] / 5


def test_a_loss_that_is_not_finite_is_an_end_like_any_other(dataset):
    params = load(None, [*SMALL, "train.optimizer=sgd", "train.clip=0", "train.nonfinite.policy=skip"])
    task = Classify.losses
    steps = []

    def losses(self, model, batch):
        steps.append(1)
        return {name: term * (math.nan if len(steps) > 15 else 1.0) for name, term in task(self, model, batch).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classify, "losses", losses)
        found = find(params, dataset, Range(1e-4, 1.0, 50))
    assert found.diverged
    assert len(found.losses) == 15


def test_the_suggestion_is_the_steepest_place_before_the_lowest():
    rates = [10.0 ** (-5 + step / 10) for step in range(51)]
    # Flat to 1e-3, a slope to 1e-1, up again.
    losses = [2.0 - max(0.0, min(step - 20, 20)) / 10 + max(0, step - 40) for step in range(51)]
    losses[30:41] = [loss - 0.5 for loss in losses[30:41]]
    steepest, tenth = suggest(rates, losses)
    assert steepest == pytest.approx(rates[29], rel=0.3)
    assert tenth == pytest.approx(rates[40] / 10)


def test_a_fall_that_only_comes_back_from_a_rise_is_not_suggested():
    rates = [10.0**power for power in range(-6, 4)]
    losses = [3.5, 3.5, 3.5, 3.3, 2.9, 2.6, 2.5, 2.9, 2.4, 2.2]
    assert suggest(rates, losses) == (rates[4], rates[6] / 10)
    noise = [3.5, 3.51, 3.49, 3.3, 2.9, 2.6, 2.5, 2.51, 2.4, 2.2]
    assert suggest(rates, noise) == (rates[4], rates[9] / 10)


def test_a_loss_that_never_falls_gives_no_suggestion():
    assert suggest([1e-3, 1e-2, 1e-1, 1.0], [1.0, 2.0, 3.0, 4.0]) == (None, None)


def test_smoothing_does_not_shift_a_step():
    found = smoothed([1.0] * 30 + [0.0] * 30, 0.8)
    assert found[29] + found[30] == pytest.approx(1.0, abs=0.02)
    assert smoothed([3.0] * 5, 0.9) == pytest.approx([3.0] * 5)


WRONG = {
    "start": (Range(0.0, 1.0), "--start-lr"),
    "order": (Range(1e-1, 1e-2), "--start-lr"),
    "end": (Range(1e-1, 1e9), "--end-lr"),
    "few": (Range(num_iter=3), "--num-iter"),
    "smoothing": (Range(smoothing=1.0), "--smoothing"),
    "divergence": (Range(divergence=1.0), "--divergence"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_range_is_refused(name):
    tried, flag = WRONG[name]
    with pytest.raises(ConfigError, match=flag):
        lr_find.check(tried)


def test_the_page_is_well_formed_and_shows_both_rates():
    rates = [1e-5 * 1.3**step for step in range(40)]
    losses = [2 - step / 25 if step < 30 else 1 + step / 20 for step in range(40)]
    found = Found(rates, losses, losses, rates[10], rates[20], True, "adamw", None)
    ElementTree.fromstring(lr_page.plot(found))
    page = lr_page.page(found)
    assert found.words(rates[10]) in page
    assert "diverged" in page
    assert f"steepest descent:       {found.words(rates[10])}" in lr_page.text(found)
    none = Found(rates, losses, losses, None, None, False, "adamw", None)
    ElementTree.fromstring(lr_page.plot(none))
    assert "no suggestion" in lr_page.text(none)


def test_no_line_of_the_picture_crosses_a_name_and_no_name_is_cut():
    rates = [1e-6 * 1.4**step for step in range(41)]
    losses = [3 - step / 25 for step in range(41)]
    for first, second in itertools.product(rates[1:-1:2], repeat=2):
        found = Found(rates, losses, losses, first, second, False, "adamw", None)
        root = ElementTree.fromstring(lr_page.plot(found))
        lines = [
            tuple(map(float, re.findall(r"[\d.]+", each.attrib["d"])))
            for each in root
            if "mark" in each.attrib.get("class", "")
        ]
        for name in (each for each in root if each.attrib.get("class") == "name"):
            at, high = float(name.attrib["x"]), float(name.attrib["y"])
            left, right = (at, at + 72) if name.attrib["text-anchor"] == "start" else (at - 72, at)
            assert left > 0
            assert right < lr_page.WIDTH
            assert not any(left < x < right and top < high - 2 for x, top, _ in lines), (first, second)


def test_the_command_leaves_its_page_and_nothing_else(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["lr-find", "--dataset", str(dataset.folder), "--num-iter", "12", "--end-lr", "0.1", *SMALL]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "wrote out/lr-find.html" in said
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lr-find.html"]


def test_an_interrupted_command_leaves_nothing(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Classify, "losses", interrupted)
    assert main(["lr-find", "--dataset", str(dataset.folder), *SMALL]) == 130
    assert not list(tmp_path.rglob("*"))


def test_a_missing_dataset_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["lr-find"]) == 2
    assert "millrace run --until preprocess" in capsys.readouterr().err
