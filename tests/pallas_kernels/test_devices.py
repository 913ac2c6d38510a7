"""One table says what a device can do; jax's names and targets lead to the same row."""

import sys

import pytest

import pallas_kernels
from pallas_kernels import attention, devices


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", "h100pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("cpu", None),
    ],
)
def test_a_kind_of_jax_leads_to_its_row(kind: str, name: str | None) -> None:
    assert devices.of_kind(kind) == (devices.DEVICES[name] if name else None)


def test_a_tpu7x_chip_is_two_devices_in_every_figure() -> None:
    assert devices.slice_of("tpu7x:2x2x1").size == 8 and devices.slice_of("v5p:2x2x1").size == 4
    half = devices.DEVICES["tpu7x"]  # of a chip's 2,307 TFLOP/s, 7.38 TB/s and 192 GB
    chip = (2307e12, 7.38e12, 192e9)
    assert (2 * half.flops, 2 * half.hbm, 2 * half.memory) == pytest.approx(chip, rel=1e-3)


@pytest.mark.parametrize(
    "target", ["", "v5p", "v5p:", "v5p:8x8", "v5p:0x8x4", "h100:2x4", "h100:\u0663", "x:8", "cpu:8"]
)
def test_a_wrong_slice_is_one_sentence(target: str) -> None:
    with pytest.raises(ValueError, match="target="):
        devices.slice_of(target)


def test_a_name_that_an_op_shares_with_its_folder_means_the_op() -> None:
    folder = sys.modules["pallas_kernels.attention"]
    setattr(pallas_kernels, "attention", folder)  # noqa: B010  as the import system does
    assert pallas_kernels.attention is attention and callable(attention)
    assert all(hasattr(pallas_kernels, name) for name in pallas_kernels.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'flash'"):
        pallas_kernels.flash  # noqa: B018
