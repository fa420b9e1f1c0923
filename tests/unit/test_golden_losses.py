"""No change of the code changes a loss by a bit, unless the golden file says so too."""

from pathlib import Path

from tests.golden_losses import RUNS, printed

GOLDEN = Path(__file__).resolve().parents[1] / "golden_losses.txt"


def test_losses_are_those_of_the_golden_file() -> None:
    expected, found = GOLDEN.read_text(encoding="utf-8").splitlines(), printed().splitlines()
    assert {line.split()[0] for line in expected} == set(RUNS)
    different = [f"{new}  (golden: {old})" for old, new in zip(expected, found, strict=False) if old != new]
    assert not different, (
        f"first of {len(different)}: {different[0]}; meant? python -m tests.golden_losses > {GOLDEN.name}"
    )
    assert len(found) == len(expected)
