"""FP8 in squares and MXFP8 against what we did not write: vLLM's functions, ModelOpt's tensors, torch's E8M0."""

import ast
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor
from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor
from safetensors.torch import load_file, save_file

from bitladder import planning
from bitladder.checkpoints.export import export
from bitladder.errors import EngineError, ModelError
from bitladder.evaluation.reading import load_checkpoint
from bitladder.formats import get_format, grids, why_no_shapes
from bitladder.measured import read_amax
from bitladder.models.loading import load_model
from bitladder.records import BF16
from bitladder.verification import verify
from conftest import llama_config, load_text, measure_text, save_model, spec
from test_formats import assigned, modelopt_export

SQUARES, MX = BOTH = ("fp8_block", "mxfp8")
LAYERS = "vllm/model_executor/layers/quantization"


def functions(vllm_python, file, wanted, known, folder=LAYERS):
    """Functions of a file of vLLM's, compiled from it: importing vLLM takes half a minute."""
    path = next(vllm_python.parents[1].glob(f"lib/python*/site-packages/{folder}/{file}"))
    tree = ast.parse(path.read_text())
    tree.body = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in wanted]
    assert len(tree.body) == len(wanted)
    for node in tree.body:
        node.decorator_list = []  # that compile it
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
    return lambda x, powers=False: found._quantize_group_native(
        SimpleNamespace(group_size=128, use_ue8m0=powers, column_major_scales=False), x
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
        assert f"shape {list(shape)} of m is not divisible by 128: no whole blocks" in why_no_shapes(
            {"m": shape}, SQUARES
        )
    assert why_no_shapes({"m": (7, 32)}, MX) is None
    assert "no whole blocks of MXFP8 numbers" in why_no_shapes({"m": (32, 48)}, MX)
    assert get_format(SQUARES).bits((128, 256)) == 128 * 256 * (8 + 32 / 16384)
    assert get_format(MX).bits((3, 64)) == 3 * 64 * 8.25


# --- checkpoints ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama of which MXFP8 takes everything, squares all but gate, up and down: 320 rows or columns."""
    config = llama_config(hidden_size=256, intermediate_size=320, num_hidden_layers=2)
    return save_model(transformers.LlamaForCausalLM, config, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def measured(model, text_file, tmp_path_factory):
    """(measurement, its directory) by exact KL."""
    output = tmp_path_factory.mktemp("measured")
    return measure_text(model, text_file, output, engine="native", method="kl_div", formats=BOTH, samples=2), output


@pytest.fixture(scope="module")
def checkpoint(model, measured, tmp_path_factory):
    """(scheme, directory): attention in squares, the rest in MXFP8."""
    measurement, directory = measured
    scheme = assigned(measurement, "mix", lambda _, group: SQUARES if "self_attn" in group.name else MX)
    output = tmp_path_factory.mktemp("mix") / "checkpoint"
    export(scheme, measurement, read_amax(measurement, directory), model, output)
    return scheme, output


def test_a_group_that_has_no_whole_blocks_lacks_the_format(measured):
    measurement, _ = measured
    lacking = {(one.group.rpartition(".")[2], one.format) for one in measurement.left_out}
    assert lacking == {("gate_up_proj", SQUARES), ("down_proj", SQUARES)}
    assert "is not divisible by 128: no whole blocks of 128 x 128" in measurement.left_out[0].reason
    full = planning.plan(measurement, spec("full", coverage=1.0, format=SQUARES))
    assert {name.rpartition(".")[2] for name, form in full.formats.items() if form == BF16} == {
        "gate_up_proj",
        "down_proj",
    }
    floor = planning.plan(measurement, spec("floor", effective_bits=8.25))
    assert floor.effective_bits <= 8.25
    assert {form for name, form in floor.formats.items() if "mlp" in name} == {MX}


@pytest.mark.parametrize("name", BOTH)
def test_a_score_is_the_kl_of_the_group_as_others_compute_it(model, measured, text_file, mx, groups, name):
    """Weights through ModelOpt's tensors, inputs through vLLM's function, in a model that is otherwise the original."""
    measurement, _ = measured
    data, group = load_text(model, text_file, samples=2), measurement.groups[0]
    original = load_model(model, torch.float32)

    def log_probs():
        with torch.no_grad():
            logits = (original(**batch.inputs).logits[:, :-1][batch.predicted] for batch in data.batches)
            return [one.double().log_softmax(-1) for one in logits]

    def rounded(x):
        flat = x.flatten(0, -2)
        if name == MX:
            codes, scales = mx._mxfp8_e4m3_quantize_torch(flat)
            scales = torch.exp2(scales.float() - 127)
        else:
            codes, scales = groups(flat)
        return (codes.float().view(*scales.shape, -1) * scales[..., None]).view(x.shape)

    before = log_probs()
    for module in group.modules:
        linear = original.get_submodule(module.name)
        kind, sizes = (MXFP8QTensor, {-1: 32}) if name == MX else (FP8QTensor, {-1: 128, -2: 128})
        packed, scales = kind.quantize(linear.weight.detach().clone(), **({} if name == MX else {"block_sizes": sizes}))
        linear.weight.data = packed.dequantize(torch.float32, scale=scales, block_sizes=sizes)
        linear.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(before, log_probs(), strict=True))
    tokens = sum(batch.loss_tokens for batch in data.batches)
    candidate = measurement.by_group()[group.name][name]
    assert measurement.sensitivity(candidate) == pytest.approx(total / tokens, rel=1e-2)
    assert total > 0


def test_modelopts_search_refuses_what_it_keeps_no_scale_of(model, text_file, tmp_path):
    with pytest.raises(
        EngineError, match="keeps no amax of mxfp8, without which nothing can be exported; use engine: n"
    ):
        measure_text(model, text_file, tmp_path, formats=(SQUARES, MX), engine="modelopt", method="gradient")


@pytest.mark.parametrize("name", BOTH)
def test_a_uniform_checkpoint_is_what_modelopt_exports(model, measured, tmp_path, name):
    measurement, directory = measured
    amax = read_amax(measurement, directory)
    lacking = {(one.group, one.format) for one in measurement.left_out}
    scheme = assigned(measurement, name, lambda _, group: BF16 if (group.name, name) in lacking else name)
    export(scheme, measurement, amax, model, tmp_path / "ours")
    modelopt_export(model, measurement, scheme, amax, tmp_path / "theirs")
    mine, other = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    for key, tensor in mine.items():
        assert tensor.shape == other[key].shape, key
        if tensor.dtype == torch.float8_e4m3fn:
            steps = tensor.view(torch.uint8).int() - other[key].view(torch.uint8).int()
            assert int(steps.abs().max()) <= (name == SQUARES), key
            assert (steps != 0).float().mean() < 5e-3, key  # ties: it divides
        elif key.endswith("scale"):
            assert same(tensor, other[key]), key
    for file, section in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        found, wanted = (json.loads((tmp_path / side / file).read_text())[section] for side in ("ours", "theirs"))
        assert found.pop("producer", None) == wanted.pop("producer", None)
        found.pop("ignore" if "ignore" in found else "exclude_modules")  # ours are exact names
        wanted.pop("ignore" if "ignore" in wanted else "exclude_modules")
        assert found == wanted


LAYER = "model.layers.1"
Q, O, GATE, DOWN = (f"{LAYER}.{n}_proj" for n in ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.down"))  # noqa: E741
BROKEN = {
    "square": (
        f"{O}.weight_scale",
        lambda s: s * torch.tensor([1.0, 1.01]).view(2, 1, 1, 1),
        "blocks have another",
    ),
    "squares_swapped": (f"{O}.weight_scale", lambda s: s.flip(2), "blocks have another scale: block 0 has"),
    "squeezed": (f"{O}.weight_scale", lambda s: s[:, 0, :, 0].contiguous(), "not 2 x 1 x 2 x 1 float32 numbers"),
    "inverse": (f"{O}.weight_scale", lambda s: 1 / s, "blocks have another scale"),
    "codes": (f"{O}.weight", lambda w: w.t().contiguous(), "codes are not the ones nearest"),
    "one_code": (f"{O}.weight", lambda w: stepped(w, 200, 130), "1 of 65,536 codes are not the ones nearest"),
    "exponent": (f"{GATE}.weight_scale", lambda s: stepped(s, 3, 2), "1 of 2,560 blocks have another scale: block 26"),
    "exponents_by_floor": (f"{GATE}.weight_scale", lambda s: s - 1, "blocks have another scale"),
    "as_powers": (f"{GATE}.weight_scale", lambda s: torch.exp2(s.float() - 127), "not 320 x 8 uint8 numbers"),
    "mx_code": (f"{DOWN}.weight", lambda w: stepped(w, 255, 319), "1 of 81,920 codes are not the ones nearest"),
    "mx_codes": (f"{GATE}.weight", lambda w: w.flip(0), "codes are not the ones nearest"),
}


def stepped(values, row, column):
    """One number four codes on."""
    bytes_ = values.view(torch.uint8).clone()
    bytes_[row, column] ^= 0x04
    return bytes_.view(values.dtype)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_in_the_tensors_is_found(model, measured, checkpoint, tmp_path, name):
    measurement, directory = measured
    scheme, good = checkpoint
    tensor, change, words = BROKEN[name]
    shutil.copytree(good, tmp_path / "x")
    found = load_file(tmp_path / "x" / "model.safetensors")
    found[tensor] = change(found[tensor])
    save_file(found, tmp_path / "x" / "model.safetensors", metadata={"format": "pt"})
    amax = read_amax(measurement, directory)
    assert verify([scheme], measurement, amax, model, {"mix": good}).ok
    verdict = verify([scheme], measurement, amax, model, {"mix": tmp_path / "x"})
    problems = [one.problem for one in verdict.checkpoints[0].findings if one.tensor == tensor]
    assert any(words in problem for problem in problems), problems


def test_evaluation_reads_zero_blocks_and_refuses_an_exponent_that_is_none(checkpoint, tmp_path):
    def changed(name, number):
        shutil.copytree(checkpoint[1], tmp_path / name)
        found = load_file(tmp_path / name / "model.safetensors")
        found[f"{GATE}.weight_scale"][4, 2] = number
        save_file(found, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        return tmp_path / name

    weight = load_checkpoint(changed("zero", 0)).get_submodule(GATE).weight
    assert float(weight[4, 64:96].detach().abs().max()) < 1e-35
    with pytest.raises(ModelError, match=r"gate_proj\.weight_scale is not 320 x 8 positive U8 numbers"):
        load_checkpoint(changed("nan", 255))
