"""Integers and what is checked of their scales, on numbers made by hand: no model, no file that we wrote."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from bitladder.errors import ModelError
from bitladder.evaluation.reading import _check_shape, _scale, _Stored
from bitladder.formats import COMPRESSED_TENSORS, FORMATS, Part, format_of_group, get_format, integers
from bitladder.models.weights import WeightFiles
from bitladder.verification import ints

GROUP = 4


def expected(*shape, by_row=False):
    """What verification expects of scales, as far as it matters here."""
    return SimpleNamespace(shape=shape, dtype=torch.float32 if by_row else torch.bfloat16, by_row=by_row)


# --- zero points: 0 is one of the values that codes restore -------------------------------------------------------

RANGES = {
    "above": [3.0, 3.5, 3.75, 4.0],
    "below": [-4.0, -3.75, -3.5, -3.0],
    "across": [-1.0, 0.0, 0.5, 2.0],
    "one value": [2.0, 2.0, 2.0, 2.0],
    "one below": [-2.0, -2.0, -2.0, -2.0],
}


@pytest.mark.parametrize("name", RANGES)
def test_zero_lies_in_the_range_of_a_group_with_a_zero_point(name):
    weight = torch.tensor([RANGES[name]] * 8)
    scales, zeros = integers.group_ranges(weight, 4, GROUP)
    least, greatest = min(*RANGES[name], 0), max(*RANGES[name], 0)
    assert float(scales[0, 0]) == float(torch.tensor((greatest - least) / 15).to(torch.bfloat16))
    assert int(zeros[0, 0]) == round(-8 - least / ((greatest - least) / 15))
    codes = integers.codes(weight, scales, 4, zeros)
    error = (integers.restored(codes, scales, zeros) - weight).abs()
    assert float(error.max()) <= 0.5 * float(scales[0, 0]) + 15 * 2.0**-9 * float(scales[0, 0])  # BF16 scales
    at_zero = zeros.repeat_interleave(GROUP, 1).to(torch.int8)
    assert -8 <= int(zeros.min()) <= int(zeros.max()) <= 7
    assert not bool(integers.restored(at_zero, scales, zeros).any())
    theirs = ints.ranges_of(weight, 4, expected(8, 1))
    assert torch.equal(theirs[0], scales)
    assert torch.equal(theirs[1], integers.packed_along_rows(zeros, 4))


# --- verification's own arithmetic ------------------------------------------------------------------------------


def test_scales_are_made_of_the_greatest_magnitude_and_of_zeros_are_usable():
    weight = torch.tensor([[1.0, -7.5, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0], [0.75, 0.0, 0.0, 0.0, -15.0, 1.0, 1.0, 1.0]])
    found = ints.scales_of(weight, 4, expected(2, 2))
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[1.0, 1.0], [float(torch.tensor(0.1).to(torch.bfloat16)), 2.0]]
    rows = torch.stack([torch.full((8,), 255.0), torch.zeros(8)])
    found = ints.scales_of(rows, 8, expected(2, by_row=True))
    int8 = get_format("int8")
    assert torch.equal(found, int8.tensor_scales(int8.amax_of(rows))["weight_scale"])
    assert float(found[0]) == 2.0
    assert 0 < float(found[1]) < float("inf")


@pytest.mark.parametrize("value", [0.0, -1e-37, 1e-37])
def test_a_group_of_zeros_has_the_librarys_scale_and_zero_point(value):
    """As one has whose scale would be no usable number: its inverse overflows."""
    weight = torch.full((8, GROUP), value)
    scales, words = ints.ranges_of(weight, 4, expected(8, 1))
    assert scales.tolist() == [[2.0**-7]] * 8
    assert ints.zero_points(words, 4).tolist() == [[0]] * 8
    ours, zeros = integers.group_ranges(weight, 4, GROUP)
    assert torch.equal(ours, scales)
    assert not bool(zeros.any())


def test_zero_points_fill_a_word_from_its_lowest_bits():
    zeros = torch.tensor([[-8], [-7], [0], [1], [7], [-1], [2], [3]])
    words = integers.packed_along_rows(zeros.to(torch.int8), 4)
    assert words.shape == (1, 1)
    assert int(words[0, 0]) & 0xFFFFFFFF == 0xBA7F9810  # code + 8, the last row in the highest four bits
    assert ints.zero_points(words, 4).tolist() == zeros.tolist()


def test_a_wrong_zero_point_is_named_by_row_and_group():
    right = torch.zeros(16, 3, dtype=torch.int8)
    wrong = right.clone()
    wrong[11, 2], wrong[13, 0] = 5, -3
    stored, wanted = (integers.packed_along_rows(zeros, 4) for zeros in (wrong, right))
    assert ints.zeros_problem(wanted, wanted, 4) is None
    said = ints.zeros_problem(stored, wanted, 4)
    assert said == "2 of 48 groups have another zero point: group 2 of row 11 has 5, the source's weights give 0"


@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
@pytest.mark.parametrize("name", ["int8", "int8_w8a16", "int4_w4a16", "int4_w4a16_asym"])
def test_every_code_that_is_not_the_nearest_is_counted(name, rows_at_once, monkeypatch):
    format_ = get_format(name)
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(2)) + torch.linspace(-1, 1, 8)[:, None]
    parts = format_.encode(weight, format_.amax_of(weight))
    monkeypatch.setattr(ints, "_AT_ONCE", rows_at_once * 256)

    def wrong(codes, source=weight):
        zeros = parts.get("weight_zero_point")
        return ints.wrong_codes(codes, parts["weight_scale"], format_.code_bits, source, zeros)

    assert wrong(parts["weight"]) == 0
    assert wrong(parts["weight"], weight * 1.5) > 1000
    bits, rng = format_.code_bits, torch.Generator().manual_seed(4)
    codes = parts["weight"] if name == "int8" else integers.unpacked(parts["weight"], bits)
    moved = torch.zeros(codes.shape, dtype=torch.bool).flatten()
    moved[torch.randperm(codes.numel(), generator=rng)[:50]] = True
    moved = moved.reshape(codes.shape)
    shifted = torch.where(moved, codes - codes.sign() - (codes == 0).to(torch.int8), codes)  # towards zero, or -1
    again = shifted if name == "int8" else integers.packed(shifted, bits)
    assert wrong(again) >= 45  # a value halfway between two codes is as near to both
    assert wrong(again) <= 50


def test_only_an_end_of_the_range_may_stand_for_more_and_outwards_alone():
    scale = torch.ones(1)

    def wrong(code, value):
        return ints.wrong_codes(torch.tensor([[code]], dtype=torch.int8), scale, 8, torch.tensor([[value]]))

    assert [wrong(127, value) for value in (126.4, 126.6, 127.4, 140.0)] == [1, 0, 0, 0]
    assert [wrong(-128, value) for value in (-127.4, -127.6, -128.4, -140.0)] == [1, 0, 0, 0]
    assert [wrong(126, value) for value in (125.4, 125.5, 126.5, 126.6)] == [1, 0, 0, 1]
    assert wrong(-127, -140.0) == 1


def test_codes_are_looked_for_in_their_dtype_and_shape():
    weight = torch.zeros(6, 256)
    assert ints.stored_as(weight, 8, packed=False)[:2] == (torch.int8, [6, 256])
    assert ints.stored_as(weight, 8, packed=True)[:2] == (torch.int32, [6, 64])
    assert ints.stored_as(weight, 4, packed=True)[:2] == (torch.int32, [6, 32])


# --- reading a checkpoint ---------------------------------------------------------------------------------------

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}


def stored(directory, **tensors):
    save_file({"m.weight_packed": torch.zeros(2, 2, dtype=torch.int32), **tensors}, directory / "model.safetensors")
    return WeightFiles.open(directory)


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_that_are_not_positive_numbers_are_refused(dtype, value, tmp_path):
    if value == float("inf") and dtype == "F8_E4M3":
        pytest.skip("it has none")
    scales = torch.ones(2, 3)
    part = Part("m.s", dtype, (2, 3))
    good = _scale(stored(tmp_path, **{"m.s": scales.to(DTYPES[dtype])}), "m.weight_packed", part)
    assert torch.equal(good.float(), scales)
    scales[1, 2] = value
    files = stored(tmp_path, **{"m.s": scales.to(DTYPES[dtype])})
    with pytest.raises(ModelError, match=r"m\.s is not 2 x 3 positive (float32|BF16|F8_E4M3) numbers"):
        _scale(files, "m.weight_packed", part)


def test_what_says_how_large_a_weight_is_must_be_there_and_right(tmp_path):
    format_ = get_format("int4_w4a16")
    layout = format_.layouts[COMPRESSED_TENSORS]
    part = Part("m.weight_shape", "I64", (2,), counts=True)

    def check(**tensors):
        _check_shape(
            stored(tmp_path, **tensors), _Stored("m.weight", "m.weight_packed", format_, layout), part, (2, 16)
        )

    check(**{"m.weight_shape": torch.tensor([2, 16])})
    for numbers in ([16, 2], [2, 15], [2, 16, 1], [2]):
        with pytest.raises(ModelError, match=r"m\.weight_shape is \[.*\], but m\.weight_packed holds \[2, 16\]"):
            check(**{"m.weight_shape": torch.tensor(numbers)})
    with pytest.raises(ModelError, match=r"m\.weight_packed is stored as codes, but its m\.weight_shape is missing"):
        check()


# --- what a configuration says of scales ------------------------------------------------------------------------


@pytest.mark.parametrize("said", [None, "torch.float8_e4m3fn", "torch.bfloat16"])
@pytest.mark.parametrize("name", [name for name in FORMATS if COMPRESSED_TENSORS in FORMATS[name].layouts])
def test_scales_that_are_exponents_are_told_by_their_dtype_alone(name, said):
    layout = FORMATS[name].layouts[COMPRESSED_TENSORS]
    group = {"weights": dict(layout.weights), "input_activations": layout.inputs}
    assert format_of_group(group) is FORMATS[name]
    if name == "mxfp8":
        group["weights"]["scale_dtype"] = said
        assert format_of_group(group) is None
    else:
        group["weights"]["scale_dtype"] = "torch.uint8"
        assert format_of_group(group) is None
