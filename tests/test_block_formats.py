"""FP8 in 128 x 128 blocks and MXFP8 against what we did not write: vLLM's functions, ModelOpt's tensors, torch's E8M0."""

import ast
from types import SimpleNamespace

import pytest
import torch
from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor
from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor

from bitladder.formats import get_format, grids, why_no_shapes

SQUARES, MX = "fp8_block", "mxfp8"
LAYERS = "vllm/model_executor/layers/quantization"


def functions(vllm_python, file, wanted, known):
    """Functions of a file of vLLM's, compiled from it: importing vLLM takes half a minute."""
    path = next(vllm_python.parents[1].glob(f"lib/python*/site-packages/{LAYERS}/{file}"))
    tree = ast.parse(path.read_text())
    tree.body = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in wanted]
    assert len(tree.body) == len(wanted)
    exec(compile(tree, file, "exec"), known)
    return SimpleNamespace(**{name: known[name] for name in wanted})


@pytest.fixture(scope="session")
def mx(vllm_python):
    known = {
        "torch": torch,
        "MXFP8_BLOCK_SIZE": 32,
        "MXFP8_VALUE_DTYPE": torch.float8_e4m3fn,
        "swizzle_mxfp8_scale": None,
    }
    names = {"_mxfp8_e4m3_quantize_torch", "dequant_mxfp8_to_bf16"}
    return functions(vllm_python, "utils/mxfp8_utils.py", names, known)


@pytest.fixture(scope="session")
def groups(vllm_python):
    known = {
        "torch": torch,
        "F": torch.nn.functional,
        "_FP8_MAX": 448.0,
        "_FP8_MIN": -448.0,
        "_FP8_DTYPE": torch.float8_e4m3fn,
        "_FP8_MIN_SCALING_FACTOR": 1 / (448 * 512),
    }
    found = functions(vllm_python, "input_quant_fp8.py", {"_quantize_group_native"}, known)
    return lambda x: found._quantize_group_native(
        SimpleNamespace(group_size=128, use_ue8m0=False, column_major_scales=False), x
    )


def numbers(dtype, rows=128, seed=0, least=-3):
    """[rows, 256]: rows of very different size, blocks of zeros, an outlier, and the edges of powers of two."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, 256, generator=generator) * torch.logspace(least, 3, rows)[:, None]
    values[5] = 0
    values[7, :32] = 0
    values[9, 100] = 3e4
    values[11, :32], values[11, 32:64] = 448.0, -7.0 * 2.0**-20
    values[12, :32] = 449.0 if dtype == torch.float32 else 450.0
    return values.to(dtype)


def same(first, second):
    return first.dtype == second.dtype and torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (first, second)))


# --- MXFP8 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mxfp8_weights_are_stored_as_modelopt_stores_them(mx, dtype):
    weight, format_ = numbers(dtype), get_format(MX)
    ours = format_.encode(weight, format_.amax_of(weight))
    scales = MXFP8QTensor.get_weights_scaling_factor(weight)
    assert same(ours["weight_scale"], scales)
    assert same(ours["weight"], MXFP8QTensor.quantize_with_scale(weight, scales))
    assert torch.equal(format_.decode(ours, torch.bfloat16), mx.dequant_mxfp8_to_bf16(ours["weight"], scales))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp8_inputs_are_rounded_as_vllm_rounds_them(mx, dtype):
    x = numbers(dtype, seed=3)
    codes, scales = mx._mxfp8_e4m3_quantize_torch(x)
    wanted = (codes.float().view(128, 8, 32) * torch.exp2(scales.float() - 127)[..., None]).view(x.shape).to(dtype)
    assert torch.equal(get_format(MX).round_input(x, None), wanted)
    assert torch.equal(get_format(MX).round_input(x.view(2, 64, 256), None), wanted.view(2, 64, 256))


def test_e8m0_is_torchs():
    every = torch.arange(256, dtype=torch.uint8)
    known = every.view(torch.float8_e8m0fnu).float()
    torch.testing.assert_close(grids.powers(every), known, rtol=0, atol=0, equal_nan=True)


def test_a_blocks_scale_is_the_least_power_in_which_nothing_saturates():
    amax = torch.cat([448.0 * 2.0 ** torch.arange(-40.0, 40), 2.0 ** torch.arange(-110.0, 100), torch.rand(2000) * 1e4])
    amax = torch.cat([amax, torch.nextafter(amax, torch.tensor(torch.inf)), torch.nextafter(amax, torch.tensor(0.0))])
    scales = grids.powers(grids.exponents_of(amax[:, None].expand(-1, 32).contiguous(), 32)[:, 0]).double()
    assert bool((amax.double() <= 448 * scales).all())
    assert bool((amax.double() > 448 * scales / 2).all())
    assert grids.exponents_of(torch.zeros(1, 32), 32).item() == 0


# --- blocks of 128 x 128 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_square_blocks_are_stored_as_modelopt_stores_them(dtype):
    weight, format_ = numbers(dtype, rows=256), get_format(SQUARES)
    amax = format_.amax_of(weight)
    ours = format_.encode(weight, amax)
    blocks = weight.float().view(2, 128, 2, 128).abs()
    assert torch.equal(amax, torch.stack([blocks[i, :, j].max() for i in (0, 1) for j in (0, 1)]).view(2, 2))
    assert tuple(ours["weight_scale"].shape) == (2, 1, 2, 1)
    theirs, scales = FP8QTensor.quantize(weight.float(), block_sizes={-1: 128, -2: 128})
    assert torch.equal(ours["weight_scale"].view(2, 2), scales.view(2, 2))
    steps = ours["weight"].view(torch.uint8).int() - theirs._quantized_data.view(torch.uint8).int()
    assert int(steps.abs().max()) <= 1  # it divides, we multiply: ties
    assert (steps != 0).float().mean() < 1e-3
    restored = format_.decode(ours)
    assert torch.equal(restored[130, 200], ours["weight"][130, 200].float() * scales.view(2, 2)[1, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_are_rounded_as_vllm_rounds_them(groups, dtype):
    x = numbers(dtype, seed=3, least=0)
    codes, scales = groups(x)
    wanted = (codes.float().view(128, 2, 128) * scales[..., None]).view(x.shape).to(dtype)
    found = get_format(SQUARES).round_input(x, None)
    assert torch.equal(found, wanted)
    assert torch.equal(get_format(SQUARES).round_input(x.view(2, 64, 256), None), found.view(2, 64, 256))
    tiny = torch.full((1, 128), 1e-7)  # below the least scale of vLLM's plain function; its kernels go on to 1e-10
    assert torch.equal(get_format(SQUARES).round_input(tiny, None), tiny)


# --- shapes -----------------------------------------------------------------------------------------------------


def test_shapes_that_the_formats_do_not_take():
    assert why_no_shapes({"m": (256, 128)}, SQUARES) is None
    for shape in ((128, 64), (192, 128), (576, 576)):
        assert f"shape {list(shape)} of m is not divisible by 128: no whole blocks" in why_no_shapes({"m": shape}, SQUARES)
    assert why_no_shapes({"m": (7, 32)}, MX) is None
    assert "no whole blocks of MXFP8 numbers" in why_no_shapes({"m": (32, 48)}, MX)
    assert get_format(SQUARES).bits((128, 256)) == 128 * 256 * (8 + 32 / 16384)
    assert get_format(MX).bits((3, 64)) == 3 * 64 * 8.25
