"""Compensated codes are checked as they are stored and served, whatever a weight holds and how it lies in memory."""

import pytest
import torch

from bitladder.formats import FORMATS, POWERS_OF_TWO, WEIGHT, get_format, grids
from bitladder.measuring import compensation, rounding

EACH = sorted(FORMATS)


def amax_of(format_, weight):
    return format_.amax_of(weight).float()


def made(format_, weight, products, *checks, damping=0.1):
    """What is kept of a module's weight, with products of its inputs and the inputs that check."""
    amax = {format_.weight_key("one"): amax_of(format_, weight)}
    with torch.no_grad():
        return compensation._of_module("one", weight, format_, products, checks, damping, amax)


def restored(format_, found, weight):
    """The weight that a checkpoint with these parts restores, by the format's own decoder."""
    return format_.decode(format_.tensor_scales(amax_of(format_, weight)) | found.parts)


def plainly(format_, weight):
    """The weight that the nearest codes restore, by the format's own encoder and decoder."""
    return format_.decode(format_.encode(weight, amax_of(format_, weight)))


def error_of(weight, other, x):
    """|X (W - Q)| / |X W| in float64."""
    exact = weight.double()
    return float((x.double() @ (exact - other.double()).t()).norm() / (x.double() @ exact.t()).norm())


@pytest.fixture(scope="module")
def inputs():
    """(inputs of which each is much like its neighbours, inputs that are like none), [tokens, 256]."""
    generator = torch.Generator().manual_seed(0)
    alike = torch.randn(1000, 256, generator=generator).cumsum(1) / 16
    return alike, torch.randn(300, 256, generator=generator)


@pytest.fixture(scope="module")
def odd():
    """A weight [128, 256] with rows and columns of zeros, of -0.0, of very small and very large numbers."""
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(1))
    weight[3], weight[4], weight[:, 32:64] = 0, -0.0, 0
    weight[5] *= 1e-7
    weight[7] *= 1e4
    weight[9] = weight[9].abs()
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EACH)
def test_what_is_stored_is_what_was_checked(name, dtype, odd, inputs):
    format_, weight = get_format(name), odd.to(dtype)
    alike, others = inputs
    products = alike.t() @ alike
    plain = plainly(format_, weight)
    for rows in (weight, weight.t().contiguous().t()):  # row by row in memory, and column by column
        better = made(format_, rows, products, alike)
        assert not better.figures["nearest_taken"]
        values = restored(format_, better, weight)
        assert better.figures["output_error"] == pytest.approx(error_of(weight, values, alike), rel=1e-3)
        assert better.figures["output_error"] < better.figures["nearest_output_error"]
        assert better.figures["nearest_output_error"] == pytest.approx(error_of(weight, plain, alike), rel=1e-3)
        worse = made(format_, rows, products, alike, others, damping=1e-4)
        assert worse.figures["nearest_taken"]
        assert torch.equal(restored(format_, worse, weight), plain)
        both = [error_of(weight, plain, x) for x in (alike, others)]
        assert worse.figures["output_error"] == pytest.approx(sum(both) / 2, rel=1e-3)
        assert all(part.is_contiguous() for one in (better, worse) for part in one.parts.values())


@pytest.mark.parametrize("name", ["fp8", "int8", "nvfp4"])
def test_the_largest_shift_is_that_of_what_is_stored(name, odd, inputs):
    format_, (alike, others) = get_format(name), inputs
    for checks, damping, taken in (((alike,), 0.1, False), ((others,), 1e-4, True)):
        found = made(format_, odd, alike.t() @ alike, *checks, damping=damping)
        parts = format_.tensor_scales(amax_of(format_, odd)) | found.parts
        steps = parts["weight_scale"].float() * parts.get("weight_scale_2", 1)
        steps = steps.expand(128) if steps.dim() == 0 else steps
        away = (odd - format_.decode(parts)).abs().reshape(128, steps[0].numel(), -1) / steps.reshape(128, -1, 1)
        assert found.figures["nearest_taken"] == taken
        assert found.figures["largest_shift"] == pytest.approx(float(away.max()), rel=1e-5)


def rounded_up(weight):
    """A weight with every block's scale rounded up to a power of two, as DeepGEMM's users store it again."""
    blocks = weight.double().reshape(len(weight) // 128, 128, -1, 128)
    scales = torch.exp2((blocks.abs().amax((1, 3), keepdim=True) / 448).log2().ceil())
    return ((blocks / scales).to(torch.float8_e4m3fn).double() * scales).reshape(weight.shape)


@pytest.fixture(scope="module")
def powers():
    return get_format("fp8_block", {"fp8_block": POWERS_OF_TWO})


def test_blocks_keep_what_is_made_up_for_where_scales_are_rounded_up_to_powers_of_two(odd, inputs, powers):
    """Their scales are such powers from the start: a device that makes them so leaves the weight as it is."""
    alike, _ = inputs
    even = torch.randn(128, 256, generator=torch.Generator().manual_seed(1))
    for weight in (even, odd):
        found, plain = made(powers, weight, alike.t() @ alike, alike), plainly(powers, weight)
        values = restored(powers, found, weight)
        assert torch.equal(rounded_up(values).float(), values)
        assert torch.equal(powers.served_weight(found.parts), values)
        assert torch.equal(torch.frexp(found.parts["weight_scale"]).mantissa, torch.full((1, 1, 2, 1), 0.5))
        assert not found.figures["nearest_taken"]
        error, nearest = (error_of(weight, each, alike) for each in (values, rounded_up(plain)))
        assert found.figures["output_error"] == pytest.approx(error, rel=1e-3)
        assert found.figures["nearest_output_error"] == pytest.approx(nearest, rel=1e-3)
        unserved = made(get_format("fp8_block"), weight, alike.t() @ alike, alike)
        assert error < 1.2 * unserved.figures["output_error"]  # that of blocks with any scales, where these serve
        assert error < 0.5 * error_of(weight, rounded_up(restored(powers, unserved, weight)), alike)


def test_blocks_too_small_for_a_scale_of_their_own_are_served_as_they_are_stored(inputs, powers):
    """A device gives no block a scale below that of 1e-4: neither do codes that are made for it."""
    alike, _ = inputs
    small = torch.randn(128, 256, generator=torch.Generator().manual_seed(3)) * 1e-6
    small[:, 128:] *= 1e-3
    found = made(powers, small, alike.t() @ alike, alike)
    assert not found.figures["nearest_taken"]
    assert torch.equal(powers.served_weight(found.parts), restored(powers, found, small))
    assert found.parts["weight_scale"].flatten().tolist() == [2.0**-22] * 2  # the power above 1e-4 / 448


def test_nearest_codes_of_blocks_have_the_scales_of_the_largest_values(odd, inputs, powers):
    alike, others = inputs
    found = made(powers, odd, alike.t() @ alike, others, damping=1e-4)
    assert found.figures["nearest_taken"]
    encoded = powers.encode(odd, amax_of(powers, odd))
    assert set(found.parts) == set(encoded)
    assert all(torch.equal(found.parts[part], encoded[part]) for part in encoded)
    steps = encoded["weight_scale"].repeat_interleave(128, 0).repeat_interleave(128, 2).reshape(128, 256)
    away = (odd - plainly(powers, odd)).abs() / steps
    assert found.figures["largest_shift"] == pytest.approx(float(away.max()), rel=1e-5)
    assert found.figures["output_error"] == pytest.approx(
        error_of(odd, rounded_up(plainly(powers, odd)), others), rel=1e-3
    )


@pytest.mark.parametrize("name", ["int4_w4a16_g64", "int4_w4a16_asym"])
def test_codes_that_are_no_numbers_are_farther_off(name, odd, inputs):
    """What is made up for at the end of float32's range overflows; the nearest values don't."""
    format_, weight = get_format(name), odd * 1e32
    found = made(format_, weight, inputs[0].t() @ inputs[0], inputs[0])
    assert found.figures["nearest_taken"]
    assert bool(restored(format_, found, weight).isfinite().all())
    assert torch.equal(
        restored(format_, found, weight), format_.decode(format_.encode(weight, amax_of(format_, weight)))
    )


def test_an_output_of_zeros_may_not_become_another(inputs):
    """Where the inputs that check meet weights of zero alone, codes that make up for others there are farther off."""
    format_, weight = get_format("fp8"), torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    weight[:, 128:] = 0
    checked = inputs[0].clone()
    checked[:, :128] = 0
    products = inputs[0].t() @ inputs[0]
    free = made(format_, weight, products, inputs[0])
    assert not free.figures["nearest_taken"]
    assert bool(restored(format_, free, weight)[:, 128:].any())
    found = made(format_, weight, products, checked)
    assert found.figures["nearest_taken"]
    assert found.figures["output_error"] == found.figures["nearest_output_error"] == 0
    assert not restored(format_, found, weight)[:, 128:].any()


def test_codes_lie_row_by_row_for_gpus_that_multiply_them():
    """cuBLAS takes an input's codes row by row, and a weight's [out_features, in_features] so that they are transposed.

    Source: torch._scaled_mm, "mat_a must be row-major", "mat_b must be column-major".
    """
    tokens = torch.randn(1, 64, 32).transpose(1, 2).reshape(-1, 64)  # of one row, as a mixer gives them
    assert not tokens.is_contiguous()
    codes = grids.quantise(tokens, tokens.abs().amax())
    assert codes.is_contiguous()
    assert torch.equal(codes.float(), grids.quantise(tokens.contiguous(), tokens.abs().amax()).float())
    weight = torch.randn(32, 64).t()
    assert get_format("fp8").encode(weight, weight.abs().amax())[WEIGHT].is_contiguous()


@pytest.mark.parametrize("name", EACH)
def test_the_nearest_walk_gives_the_encoders_values(name, odd):
    """On which `largest_shift` of a module with nearest codes rests."""
    format_ = get_format(name)
    for weight in (odd, odd.bfloat16(), odd.t().contiguous().t(), odd * 1e-36, odd * 1e30):
        amax = amax_of(format_, weight) * (1.7 if format_.amax_name == "weight_amax" else 1)  # shared with a larger one
        columns = format_.columns(amax, len(weight))
        found = rounding.nearest(weight, columns)
        wanted = format_.decode(format_.encode(weight, amax))
        assert torch.equal(found.values, wanted)
        assert torch.equal(
            format_.decode(columns.parts(found.values, found.scales) | format_.tensor_scales(amax)), wanted
        )
