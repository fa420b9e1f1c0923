"""The table of GPUs: dense peaks, names as drivers give them, and no guesses."""

import pytest

from trainer.errors import ConfigError
from trainer.parallel import gpus

# name of the driver -> row of the table
DEVICES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100 80GB PCIe": "a100-80",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA A10G": "a10g",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "Tesla V100-SXM2-16GB": "v100",
    "Tesla T4": "t4",
}


@pytest.mark.parametrize("device", DEVICES)
def test_a_drivers_name_finds_its_row(device: str) -> None:
    found = gpus.find(device)
    assert found is not None
    assert found.name == DEVICES[device]


@pytest.mark.parametrize(
    "device", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA L40", "NVIDIA A10", "NVIDIA GeForce RTX 4090 D", ""]
)
def test_what_is_not_in_the_table_is_not_guessed_at(device: str) -> None:
    assert gpus.find(device) is None
    assert gpus.peak(device, "bf16") is None


def test_a_precision_that_a_gpu_lacks_has_no_peak() -> None:
    assert gpus.peak("NVIDIA A100-SXM4-80GB", "fp8") is None
    assert gpus.peak("Tesla V100-SXM2-16GB", "bf16") is None


def test_peaks_are_dense() -> None:
    # The datasheets' headlines, with sparsity, are twice these.
    assert gpus.peak("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert gpus.peak("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    for gpu in gpus.GPUS.values():
        assert gpu.flops["fp16"] < 2500e12
        assert gpu.flops.get("fp8", 2 * gpu.flops["fp16"]) == pytest.approx(2 * gpu.flops["fp16"], rel=0.02)


def test_every_row_is_whole() -> None:
    for name, gpu in gpus.GPUS.items():
        assert gpu.name == name
        assert gpu.memory > 14 * gpus.GIB
        assert gpu.network < gpu.link < gpu.bandwidth
        assert 0 < gpu.price[0] < gpu.price[1]


def test_wrong_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'h100'"):
        gpus.gpu("h10")


def test_a_cpus_peak_is_measured() -> None:
    assert 1e8 < gpus.measured_peak(seconds=0.05, size=256) < 1e14
