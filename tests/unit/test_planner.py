"""`millrace plan`: what it proposes fits, what it refuses does not, and what it says would fit does."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli import main
from pipelines.commands_plan import SEARCHED
from trainer import presets
from trainer.config.load import apply_overrides, load, parse_override, validate
from trainer.config.text import parse_yaml
from trainer.errors import ConfigError
from trainer.parallel.dims import resolve
from trainer.parallel.gpus import GPUS, gpu
from trainer.planner.layout import configured, global_batch
from trainer.planner.search import _changes, choices, fits, problem_of, refusal

ROOT = Path(__file__).resolve().parents[2]
LARGE = [name for name in presets.names() if presets.needs_gpus(name)]


def asked(preset: str, gpus: int, kind: str, *words: str, per_node: int = 8, batch: int = 0):
    params = validate(apply_overrides(parse_yaml(presets.text(preset), preset), words), preset)
    fixed = {key: value for key, value in map(parse_override, words) if key.startswith(SEARCHED)}
    return problem_of(params, gpu(kind), gpus, per_node, batch, fixed)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["plan", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_sizes_are_marked_by_the_gpus_that_they_ask_for() -> None:
    assert set(LARGE) == {
        "gpt2-124m", "llama-8b", "vishwam-10b", "ultra-3b", "ultra-13b", "ultra-52b", "ultra-390b",
    }  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_a_size_fits_as_it_is_configured(name: str) -> None:
    params = validate(parse_yaml(presets.text(name), name))
    gpus = params.cluster.gpus_per_node * params.cluster.job.nodes
    assert params.train.processes == params.cluster.gpus_per_node
    problem = asked(name, gpus, "h100")
    layout = configured(params, gpus)
    from trainer.planner.memory import memory

    assert fits(problem, memory(problem.shape, layout))
    assert layout.sequences == global_batch(params)


# preset, GPUs, kind
PLANS = {
    "one GPU": ("gpt2-124m", 1, "a100-40"),
    "a node": ("ultra-3b", 8, "h100"),
    "several nodes": ("llama-8b", 64, "h100"),
    "small GPUs": ("llama-8b", 64, "rtx4090"),
    "a thousand": ("ultra-390b", 1024, "h200"),
}


@pytest.mark.parametrize("case", PLANS)
def test_what_is_proposed_fits_divides_and_keeps_the_batch(case: str) -> None:
    preset, gpus, kind = PLANS[case]
    problem = asked(preset, gpus, kind)
    found = choices(problem)
    assert found == sorted(found, key=lambda choice: -choice.score)
    for choice in found:
        layout = choice.layout
        assert choice.memory.total <= gpu(kind).memory
        assert layout.gpus == gpus
        assert layout.sequences == problem.batch
        assert layout.tp <= problem.per_node
        assert choice.fast.total < choice.slow.total
    # As words of params.yaml it is the same mesh, and a valid one.
    words = [f"{key}={value}" for key, value in found[0].layout.words().items()]
    params = validate(apply_overrides(parse_yaml(presets.text(preset), preset), words), preset)
    dims = resolve(params.parallel, gpus)
    best = found[0].layout
    assert (dims.dp_replicate, dims.dp_shard, dims.tp, dims.pp) == (best.dp_replicate, best.dp_shard, best.tp, best.pp)


def test_what_is_given_stays_as_it_is() -> None:
    found = choices(asked("llama-8b", 64, "h100", "parallel.tp=4", "parallel.zero=3", "train.batch_size=2"))
    assert {(each.layout.tp, each.layout.zero, each.layout.batch) for each in found} == {(4, 3, 2)}


def test_an_optimizer_that_needs_whole_matrices_is_not_divided() -> None:
    found = choices(asked("gpt2-124m", 8, "h100", "train.optimizer=adamw8bit"))
    assert found
    assert {(each.layout.tp, each.layout.zero, each.layout.dp_shard) for each in found} == {(1, 0, 1)}


def test_the_most_tokens_per_second_win() -> None:
    # Tensor parallelism costs transfers: where the model fits without, it is not proposed.
    assert choices(asked("gpt2-124m", 8, "h100"))[0].layout.tp == 1
    # On GPUs without NVLink it is dearer still.
    assert choices(asked("llama-8b", 64, "l40s"))[0].layout.tp == 1


REFUSED = {
    "too large": ("ultra-390b", 8, "h100", []),
    "too large for a small GPU": ("llama-8b", 4, "t4", ["train.precision=fp16"]),
    "held to a mesh": ("llama-8b", 8, "h100", ["parallel.zero=0", "parallel.tp=1", "parallel.pp=1"]),
    "a budget": ("llama-8b", 8, "h100", ["train.memory_gb=30"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_gives_the_reason_and_changes_that_fit(case: str) -> None:
    preset, gpus, kind, words = REFUSED[case]
    problem = asked(preset, gpus, kind, *words)
    assert not choices(problem)
    error = refusal(problem)
    assert re.search(r"needs [\d,.]+ GiB on each GPU, which has [\d.]+ \(\w+", error.message)
    changes = error.hint.split("; or ")
    assert changes
    for change in changes:
        if change.startswith("--gpus"):
            numbers = [int(number) for number in re.findall(r"\d+", change)]
            assert choices(asked(preset, numbers[0], kind, *words, batch=numbers[-1] if len(numbers) > 1 else 0))
        elif change.startswith("--gpu "):
            assert choices(asked(preset, gpus, change.split()[1], *words))
        else:
            left = change.removeprefix("leave out ")
            assert choices(asked(preset, gpus, kind, *[word for word in words if word != left]))


FEWEST = {name: REFUSED[name] for name in ("too large", "too large for a small GPU", "a budget")}


@pytest.mark.parametrize("case", [*FEWEST, "within a node"])
def test_no_smaller_number_of_gpus_would_do_than_the_one_proposed(case: str) -> None:
    preset, gpus, kind, words = FEWEST.get(case, ("llama-8b", 1, "h100", []))
    found = re.search(r"--gpus (\d+)(?: --global|;|$)", refusal(asked(preset, gpus, kind, *words)).hint)
    assert found
    fewer = [number for number in range(gpus, int(found[1])) if number < 8 or number % 8 == 0]
    assert not any(choices(asked(preset, number, kind, *words)) for number in fewer)


def test_many_more_gpus_are_sought_in_doublings() -> None:
    # 1,536 are 192 nodes: a pipeline of 3 stages goes on fitting 3,072, and no power of two.
    words = ["parallel.pp=3", "parallel.tp=1", "parallel.zero=3", "train.memory_gb=123.51"]
    assert "--gpus 3072" in [*_changes(asked("ultra-390b", 1536, "b200", *words, batch=9216))]


UNDIVIDED = {
    "seven nodes": ("ultra-390b", 56, "h100", 0, ["--gpus 64"]),
    "a small batch": ("gpt2-124m", 64, "h100", 7, ["--global-batch 64", "--gpus 112"]),
}


@pytest.mark.parametrize("case", UNDIVIDED)
def test_gpus_that_nothing_divides_get_the_nearest_numbers_that_something_does(case: str) -> None:
    preset, gpus, kind, batch, changes = UNDIVIDED[case]
    error = refusal(asked(preset, gpus, kind, batch=batch))
    assert f"no mesh of {gpus} GPUs divides" in error.message
    assert [change for change in error.hint.split("; or ") if not change.startswith("--gpu ")] == changes


def test_a_precision_that_the_gpu_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="v100 has no bf16") as caught:
        asked("llama-8b", 64, "v100")
    assert caught.value.hint == "use train.precision=fp16"


@pytest.mark.parametrize("axis", ["cp", "ep"])
def test_an_axis_that_cannot_be_planned_for_is_refused(axis: str) -> None:
    with pytest.raises(ConfigError, match=f"parallel.{axis}: 2, but it cannot be planned for") as caught:
        asked("llama-8b", 64, "h100", f"parallel.{axis}=2")
    assert caught.value.hint == f"plan with parallel.{axis}=1"


def test_a_family_that_cannot_be_planned_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "--preset", "digits", "--gpus", "8")
    assert code == 2
    assert "only language models of family decoder" in error


def test_a_layout_as_configured_is_checked_and_the_smallest_change_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "llama-8b", "--gpus", "64", "--gpu", "h100", "--check"]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "dp_shard 64, zero 3" in out
    code, _, error = run(capsys, *words, "train.batch_size=4", "train.recompute.mode=none")
    assert code == 2
    fix = re.search(r"fix: (.*?)(; or|$)", error, re.MULTILINE)
    assert fix
    assert "train." in fix[1]
    code, out, _ = run(capsys, *words, "train.batch_size=4", "train.recompute.mode=none", *fix[1].split())
    assert code == 0
    # Copies of the whole model never fit, however many: then it is another mesh, here or on more GPUs.
    words = ["--preset", "llama-8b", "--gpu", "h100", "--check", "parallel.zero=0", "parallel.dp_shard=1"]
    leave = "leave out --check and the keys of the mesh"
    _, _, error = run(capsys, *words, "--gpus", "8")
    assert f"{leave}: another one fits" in error
    _, _, error = run(capsys, *words, "--gpus", "2")
    assert f"{leave}, and give --gpus 4" in error


def test_days_and_cost_follow_from_tokens_and_price(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "ultra-3b", "--gpus", "64", "--gpu", "h200", "--json"]
    one = json.loads(run(capsys, *words, "--tokens", "100B", "--price", "2")[1])
    two = json.loads(run(capsys, *words, "--tokens", "200e9", "--price", "4")[1])
    assert one["run"]["tokens"] == pytest.approx(100e9)
    assert two["run"]["days"] == pytest.approx([2 * days for days in one["run"]["days"]])
    assert two["run"]["cost"] == pytest.approx([4 * cost for cost in one["run"]["cost"]])
    assert one["run"]["gpu_hours"] == pytest.approx([24 * 64 * days for days in one["run"]["days"]])
    steps = json.loads(run(capsys, *words, "--steps", "1000")[1])["run"]
    assert steps["tokens"] == pytest.approx(1000 * one["step"]["tokens"])
    unknown = json.loads(run(capsys, *words, "train.max_steps=0")[1])
    assert unknown["run"] is None


def test_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "--preset", "ultra-52b", "--gpus", "256", "--gpu", "h100", "--json")[1])
    assert sum(found["memory"]["parts"].values()) == pytest.approx(found["memory"]["total"])
    for end in (0, 1):
        assert sum(each[end] for each in found["seconds"]["parts"].values()) == pytest.approx(
            found["seconds"]["total"][end]
        )
        assert found["tokens_per_s"][end] == pytest.approx(found["step"]["tokens"] / found["seconds"]["total"][end])
        assert 0.02 < found["mfu"][end] < 0.75
    assert found["checkpoint"]["bytes"] > 12 * found["model"]["parameters"]


WRONG = {
    "kind": (["--gpu", "h1000", "--gpus", "8"], "did you mean 'h100'"),
    "part of a node": (["--gpus", "12"], "whole nodes of 8"),
    "both": (["--gpus", "8", "--tokens", "1B", "--steps", "5"], "both given"),
    "no count": (["--gpus", "8", "--tokens", "many"], "not a count"),
    "key": (["--gpus", "8", "train.batchsize=4"], "batch_size"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_words_are_told(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, told = WRONG[case]
    code, _, error = run(capsys, "--preset", "ultra-3b", *words)
    assert code == 2
    assert told in error
    assert "fix:" in error


def test_it_needs_no_torch_and_plans_for_params_yaml(tmp_path: Path) -> None:
    presets.use("gpt2-124m", tmp_path / "params.yaml")
    code = (
        "import sys; from pipelines.cli import main; "
        "assert main(['plan', '--gpus', '8', '--gpu', 'h100']) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "params.yaml on 8 x h100" in done.stdout
    assert load(tmp_path / "params.yaml").model.name == "decoder"


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    shown = re.search(r"```sh\n(millrace plan [^\n]*)\n```\n+```text\n(.*?)```", text, re.DOTALL)
    assert shown
    code, out, _ = run(capsys, *shlex.split(shown[1])[2:])
    assert code == 0
    assert out.strip("\n") == shown[2].strip("\n")


def test_the_page_shows_how_a_refusal_reads(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    shown = re.search(r"What `millrace (plan [^`]*)` answers:\n\n```text\n(.*?)```", text, re.DOTALL)
    assert shown
    code, _, error = run(capsys, *shlex.split(shown[1])[1:])
    assert code == 2
    assert error.strip("\n") == shown[2].strip("\n")


def test_the_page_lists_every_gpu() -> None:
    text = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in GPUS)
