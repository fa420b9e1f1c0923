"""Recomputed activations change no bit; `auto` measures, keeps what it found, and leaves the run as it was."""

import json
import time

import pytest
import torch

from tests.tiny import tiny_dataset
from trainer import models, tasks
from trainer.config.load import load
from trainer.errors import ConfigError, Preempted
from trainer.parallel.group import Ranks
from trainer.train import probe
from trainer.train.fit import fit
from trainer.train.preempt import Preemption
from trainer.train.state import seed_all

CPU = torch.device("cpu")
WORDS = [
    "task.name=lm", "model.name=decoder", "model.dim=24", "model.layers=3", "model.ff=32", "model.heads=2", "model.kv_heads=1",
    "model.dropout=0.1", "distill.enabled=false", "train.threads=1", "train.max_steps=4", "train.batch_size=6",
    "train.accumulation=2", "train.log_every=1", "train.device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("lm") / "d", "lm", rows=120)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield tmp_path / "cache" / "millrace"
    torch.set_num_threads(threads)


def parts(dataset, *overrides):
    params = load(None, [*WORDS, *overrides])
    seed_all(params.train.seed)
    return params, tasks.build(params, dataset), models.build(params.model, dataset.spec)


def losses(fitted):
    return [(row["train_loss"].hex(), row["grad_norm"].hex()) for row in fitted.history if "train_loss" in row]


def settle(dataset, *overrides, folder=None, preemption=None):
    preemption = preemption or Preemption()
    return probe.settle(*parts(dataset, *overrides), Ranks(), CPU, preemption, folder, "train").train


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_change_no_bit(dataset, precision) -> None:
    plain = fit(*parts(dataset, f"train.precision={precision}"))
    for words in (["mode=blocks"], ["mode=blocks", "every=2"], ["mode=selective"]):
        words = [f"train.recompute.{word}" for word in words]
        found = fit(*parts(dataset, f"train.precision={precision}", *words))
        assert losses(found) == losses(plain)
        assert all("forward" not in vars(module) for module in found.model.modules())


@pytest.mark.parametrize(("mode", "times"), [("blocks", 2), ("selective", 1)])
def test_what_is_recomputed(dataset, mode, times) -> None:
    """`blocks` makes each product with a matrix of a block twice, `selective` keeps them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from trainer.train import recompute

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.products += function is torch.ops.aten.mm.default
            return function(*args, **(kwargs or {}))

    counts = []
    for wrap in (False, True):
        params, task, model = parts(dataset, f"train.recompute.mode={mode}")
        if wrap:
            recompute.apply(model, params.train.recompute)
        loss = model(task.batch("train", torch.arange(2).numpy())["inputs"]).sum()
        with Count() as count:
            loss.backward()
        counts.append(count.products)
    assert counts[1] - counts[0] == (times - 1) * 7 * 3


def test_a_model_without_blocks_cannot_recompute(tmp_path) -> None:
    data = tiny_dataset(tmp_path / "d", "image", rows=40)
    params = load(None, ["task.name=image", "model.name=cnn", "distill.enabled=false", "train.recompute.mode=blocks"])
    with pytest.raises(ConfigError, match=r"train\.recompute\.mode"):
        fit(params, tasks.build(params, data), models.build(params.model, data.spec))


def test_nothing_is_measured_where_all_is_said(dataset, monkeypatch) -> None:
    monkeypatch.setattr(probe.Probe, "run", None)
    assert settle(dataset).precision == "fp32"


def test_auto_is_measured_said_and_kept(dataset, tmp_path, cache, capsys, monkeypatch) -> None:
    monkeypatch.setattr(probe, "SCHEDSTAT", tmp_path / "none")  # what else this machine does is not the subject
    first = settle(dataset, "train.precision=auto", "train.compile=auto", "train.threads=auto", folder=tmp_path / "run")
    assert first.precision in ("fp32", "bf16")
    assert first.compile is False  # eight passes pay for no compilation
    assert first.threads >= 1
    assert "bf16" in capsys.readouterr().out
    monkeypatch.setattr(probe.Probe, "_measure", None)
    assert settle(dataset, "train.precision=auto", "train.compile=auto", "train.threads=auto") == first
    assert "found before" in capsys.readouterr().out
    for path in cache.iterdir():
        path.unlink()
    again = settle(dataset, "train.precision=auto", "train.compile=auto", "train.threads=auto", folder=tmp_path / "run")
    assert again == first
    assert "resumed" in capsys.readouterr().out


def test_what_was_measured_beside_other_work_is_kept_for_this_run_alone(
    dataset, tmp_path, cache, capsys, monkeypatch
) -> None:
    said = tmp_path / "schedstat"
    said.write_text("0 0 1")
    monkeypatch.setattr(probe, "SCHEDSTAT", said)
    passed = probe.Probe._pass

    def crowded(self, way, batch) -> float:
        began = time.monotonic()
        seconds = passed(self, way, batch)
        waited = float(said.read_text().split()[1]) + 1e9 * (time.monotonic() - began)
        said.write_text(f"0 {waited:.0f} 1")
        return seconds

    monkeypatch.setattr(probe.Probe, "_pass", crowded)
    settle(dataset, "train.precision=auto", folder=tmp_path / "run")
    assert "beside other work" in capsys.readouterr().out
    assert not list(cache.glob("auto-*"))
    settle(dataset, "train.precision=auto", folder=tmp_path / "run")
    assert "resumed" in capsys.readouterr().out


def test_a_resumed_run_goes_on_as_it_began(dataset, tmp_path, cache) -> None:
    (tmp_path / "run").mkdir()
    choice = {"precision": "bf16", "compile": False, "threads": 1, "why": "said so"}
    (tmp_path / "run" / probe.CHOICE).write_text(json.dumps(choice))
    assert settle(dataset, "train.precision=auto", folder=tmp_path / "run").precision == "bf16"


def test_measuring_leaves_generators_and_weights_alone(dataset) -> None:
    params, task, model = parts(dataset, "train.precision=auto")
    before, weights = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    probe.settle(params, task, model, Ranks(), CPU, Preemption(), None, "train")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_auto_run_is_the_run_it_has_chosen(dataset) -> None:
    auto = parts(dataset, "train.precision=auto")
    chosen = probe.settle(*auto, Ranks(), CPU, Preemption(), None, "train").train.precision
    assert losses(fit(*auto)) == losses(fit(*parts(dataset, f"train.precision={chosen}")))


def test_sigterm_ends_the_measuring(dataset) -> None:
    preemption = Preemption()
    preemption.asked = True
    with pytest.raises(Preempted, match="auto"):
        settle(dataset, "train.precision=auto", preemption=preemption)


def test_a_batch_that_is_too_large_is_halved(dataset, monkeypatch) -> None:
    sizes, real = [], probe.Probe._pass

    def tight(self, way, batch):
        sizes.append(len(batch["inputs"]))
        if sizes[-1] > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return real(self, way, batch)

    monkeypatch.setattr(probe.Probe, "_pass", tight)
    settle(dataset, "train.precision=auto")
    assert sizes[:2] == [6, 3]
    assert set(sizes[2:]) == {1}


@pytest.mark.parametrize(
    ("seconds", "passes", "expected"),
    [
        ([1.0, 0.97, 1.0], 10_000, ("fp32", False)),
        ([1.0, 0.5, 0.5], 10_000, ("bf16", False)),
        ([1.0, 0.5, 0.4], 10_000, ("bf16", True)),
        ([1.0, 0.5, 0.4], 500, ("bf16", True)),
        ([1.0, 0.5, 0.4], 400, ("bf16", False)),
    ],
)
def test_what_is_chosen(dataset, seconds, passes, expected) -> None:
    measured = probe.Probe(*parts(dataset, "train.precision=auto"), 1, CPU, None)
    measured.compile_s, measured.passes = 30.0, passes
    ways = [probe.Way("fp32", False, 0), probe.Way("bf16", False, 0), probe.Way("bf16", True, 0)]
    chosen, _ = measured._choose(dict(zip(ways, seconds, strict=True)))
    assert (chosen["precision"], chosen["compile"]) == expected
