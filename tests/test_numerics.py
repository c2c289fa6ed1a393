import pytest
import torch

from bitladder.formats import grids

ALL_CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
VALUES = ALL_CODES.float()[torch.isfinite(ALL_CODES.float())].unique()


def test_every_code_survives():
    amax = torch.tensor(448.0)
    assert torch.equal(grids.quantise(VALUES, amax).float(), VALUES)
    assert torch.equal(grids.dequantise(grids.quantise(VALUES, amax), grids.scale_of(amax)), VALUES)


def test_codes_are_the_nearest_values():
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * 3
    amax = x.abs().max()
    scale = grids.scale_of(amax).double()
    ours = grids.quantise(x, amax).double() * scale
    nearest = (x.double()[:, None] - VALUES.double() * scale).abs().min(1).values
    assert ((ours - x.double()).abs() <= nearest * (1 + 1e-5) + 1e-12).all()


def test_half_step_bounds_the_error_tightly():
    x = torch.randn(20000, generator=torch.Generator().manual_seed(1))
    x = torch.cat([x, x * 1e-4])  # subnormals too
    amax = x.abs().max()
    scale = grids.scale_of(amax)
    error = (grids.dequantise(grids.quantise(x, amax), scale) - x).abs()
    bound = grids.half_step(x, scale)
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error > 0.99 * bound).any()


def test_saturates():
    assert grids.quantise(torch.tensor([5.0, -5.0]), torch.tensor(1.0)).float().tolist() == [448.0, -448.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantise_equals_modelopts(dtype):
    from modelopt.torch.quantization.tensor_quant import fp8_eager

    x = (torch.randn(4096, generator=torch.Generator().manual_seed(2)) * 7).to(dtype)
    amax = x.abs().max().float() * 0.9
    ours = grids.fake_quantise(x, grids.scale_of(amax))
    theirs = fp8_eager(x, grids.scale_of(amax) * 448.0)
    assert torch.equal(ours, theirs)
    assert ours.dtype == dtype


def test_the_input_is_left_alone():
    x = torch.randn(10)
    before = x.clone()
    grids.quantise(x, torch.tensor(1.0))
    assert torch.equal(x, before)
