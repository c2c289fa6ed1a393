"""NVFP4 against what we did not write: vLLM's reference, ModelOpt's tensors and its export."""

import ast
import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from safetensors.torch import load_file, save_file

import bitladder
from bitladder import planning
from bitladder.checkpoints.export import export
from bitladder.errors import EngineError, InfeasibleTarget, MeasurementError, ModelError, PlanError
from bitladder.evaluation.reading import load_checkpoint
from bitladder.formats import get_format, grids, why_not
from bitladder.measured import read_amax
from bitladder.measuring.decoder import Decoder
from bitladder.measuring.measure import measure
from bitladder.models.loading import load_model
from bitladder.models.target import find_target
from bitladder.recipe import MeasureSpec
from bitladder.records import BF16, Measurement
from bitladder.verification import verify
from conftest import llama_config, load_text, measure_text, save_model, source_of, spec
from test_formats import assigned, modelopt_export

W4A4, W4A16 = BOTH = ("nvfp4", "nvfp4_w4a16")
REFERENCES = ("break_fp4_bytes", "dequantize_to_dtype", "get_reciprocal", "cast_to_fp4", "ref_nvfp4_quant")


@pytest.fixture(scope="session")
def vllms(vllm_python):
    """vLLM's reference functions, compiled from its own file; importing vLLM takes half a minute."""
    found = vllm_python.parents[1].glob(
        "lib/python*/site-packages/vllm/model_executor/layers/quantization/utils/nvfp4_emulation_utils.py"
    )
    tree = ast.parse(next(found).read_text())
    wanted = {*REFERENCES, "ref_nvfp4_quant_dequant"}
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    assert len(tree.body) == len(wanted)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    known = {
        "torch": torch,
        "current_platform": SimpleNamespace(is_cuda_alike=lambda: False),
        "FLOAT4_E2M1_MAX_RECIPROCAL": 1 / 6,
        "kE2M1ToFloat_handle": SimpleNamespace(val=values),
    }
    exec(compile(tree, "nvfp4_emulation_utils.py", "exec"), known)
    return SimpleNamespace(**{name: known[name] for name in wanted})


def numbers(dtype, seed=0):
    """[48, 64]: rows of very different size, ties of the grid, a row and a block of zeros, magnitudes that vanish."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(48, 64, generator=generator) * torch.logspace(-7, 3, 48)[:, None]
    values[5] = 0
    values[7, :16] = 0
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    values[9, :16] = torch.cat([ties, -ties])
    return values.to(dtype)


def same(first, second):
    return first.dtype == second.dtype and torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (first, second)))


# --- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_stored_as_modelopt_stores_them(name, dtype):
    weight, format_ = numbers(dtype), get_format(name)
    ours = format_.encode(weight, format_.amax_of(weight))
    theirs, scales, above = NVFP4QTensor.quantize(weight.clone(), 16)
    assert same(ours["weight"], theirs._quantized_data)
    assert same(ours["weight_scale"], scales)
    assert same(ours["weight_scale_2"], above)
    restored = theirs.dequantize(torch.float32, scale=scales, double_scale=above, block_sizes={-1: 16})
    assert torch.equal(format_.decode(ours), restored)


def test_a_group_shares_the_scale_above(vllms):
    """Modules that are fused have one amax: codes and block scales are made for it, as ModelOpt makes them."""
    weight, format_, amax = numbers(torch.bfloat16), get_format(W4A4), torch.tensor(12345.0)
    ours = format_.encode(weight, amax)
    theirs, scales, _ = NVFP4QTensor.quantize(weight.clone(), 16, None, amax / 2688)
    assert float(ours["weight_scale_2"]) == float(amax / 2688)
    assert same(ours["weight"], theirs._quantized_data)
    assert same(ours["weight_scale"], scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_read_as_vllm_reads_them(vllms, dtype):
    format_, weight = get_format(W4A16), numbers(torch.bfloat16)
    parts = format_.encode(weight, format_.amax_of(weight))
    theirs = vllms.dequantize_to_dtype(
        parts["weight"], parts["weight_scale"], parts["weight_scale_2"], dtype, 16, swizzle=False
    )
    assert torch.equal(format_.decode(parts, dtype), theirs)
    every = torch.arange(256, dtype=torch.uint8).view(4, 64)  # all bytes there are
    one = torch.ones(4, 8).to(torch.float8_e4m3fn)
    parts = {"weight": every, "weight_scale": one, "weight_scale_2": torch.tensor(1.0)}
    assert torch.equal(format_.decode(parts), vllms.break_fp4_bytes(every, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("amax", [1e-6, 0.37, 3.0, 448.0, 1e5])
def test_inputs_are_rounded_as_vllm_rounds_them(vllms, dtype, amax):
    """Whatever calibration saw: larger inputs than it, and blocks that vanish beside it."""
    format_ = get_format(W4A4)
    scale = format_.input_scale(torch.tensor(amax))
    assert float(scale) == float(torch.tensor(amax) / (448 * 6))
    x = numbers(dtype, seed=3)
    theirs = vllms.ref_nvfp4_quant_dequant(x, (1.0 / scale).float(), 16)
    assert torch.equal(format_.round_input(x, scale), theirs)
    assert torch.equal(format_.round_input(x.view(2, 24, 64), scale), theirs.view(2, 24, 64))
    assert same(get_format(W4A16).round_input(x, None), x)


def test_values_go_to_the_nearest_and_ties_to_even(vllms):
    values = torch.cat([torch.linspace(-8, 8, 4097), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    assert torch.equal(grids.round_e2m1(values), vllms.cast_to_fp4(values.clamp(-6, 6)))


# --- shapes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A tiny Llama of which gate and up have 120 rows, which FP8 doesn't take, and down 120 columns: nothing does."""
    config = llama_config(intermediate_size=120, num_hidden_layers=2)
    return save_model(transformers.LlamaForCausalLM, config, tmp_path_factory.mktemp("narrow"))


def test_what_fits_no_format_is_left_alone_for_its_own_reason(narrow):
    groups = {name: {g.name.rpartition(".")[2] for g in find_target(narrow, (name,)).groups} for name in ("fp8", W4A4)}
    assert groups == {"fp8": {"qkv_proj", "o_proj"}, W4A4: {"qkv_proj", "o_proj", "gate_up_proj"}}
    found = {m.name: m.reason for m in find_target(narrow, (W4A4,)).untouched}
    why = "shape [64, 120] of model.layers.0.mlp.down_proj has rows that are not divisible by 16: no whole blocks"
    assert found["model.layers.0.mlp.down_proj"].startswith(why)


@pytest.mark.parametrize("method", ["fisher", "kl_div"])
def test_a_group_lacks_the_formats_that_it_cannot_have(narrow, text_file, tmp_path, method):
    formats = ("fp8", W4A4)
    target, data = find_target(narrow, formats), load_text(narrow, text_file)
    asked = MeasureSpec(formats=formats, method=method, engine="native")
    measurement = measure(narrow, source_of(narrow), target, data, asked, tmp_path)
    assert Measurement.read(tmp_path / "measurement.json") == measurement
    known = {(c.group.rpartition(".")[2], c.format) for c in measurement.candidates}
    assert known == {(g, f) for g in ("qkv_proj", "o_proj", "gate_up_proj") for f in formats} - {
        ("gate_up_proj", "fp8")
    }
    lacking = {(one.group, one.format) for one in measurement.left_out}
    assert lacking == {(f"model.layers.{i}.mlp.gate_up_proj", "fp8") for i in (0, 1)}
    assert "120, 64] of model.layers.0.mlp.gate_proj is not divisible by 16" in measurement.left_out[0].reason
    # planning in every way leaves such groups out of the format
    full = planning.plan(measurement, spec("full", coverage=1.0, format="fp8"))
    assert full.coverage < 1
    assert {full.formats[group] for group, _ in lacking} == {BF16}
    named = planning.plan(measurement, spec("named", include=["*"], format="fp8"))
    assert named.formats == full.formats
    floor = planning.plan(measurement, spec("floor", effective_bits=4.5))
    assert set(floor.formats.values()) == {W4A4}
    mix = planning.plan(measurement, spec("mix", effective_bits=6.5))
    assert mix.effective_bits <= 6.5
    with pytest.raises(InfeasibleTarget, match=r"no group that include .*gate_up.* can be in fp8 \(shape \[120, 64\]"):
        planning.plan(measurement, spec("x", include=["*gate_up*"], format="fp8"))
    with pytest.raises(PlanError, match=r"gate_up_proj can't be in fp8: shape \[120, 64\] .*; name another format"):
        planning.price(measurement, "x", dict.fromkeys(full.formats, "fp8"), {})
    # and what is planned is exported and verified
    amax = read_amax(measurement, tmp_path)
    schemes = {"full": full, "floor": floor}
    for name, scheme in schemes.items():
        export(scheme, measurement, amax, narrow, tmp_path / name)
    result = verify([*schemes.values()], measurement, amax, narrow, {name: tmp_path / name for name in schemes})
    assert result.ok, result
    load_checkpoint(tmp_path / "floor")


def test_a_format_that_fits_nothing_is_refused(narrow, text_file, tmp_path):
    target, data = find_target(narrow, (W4A4,)), load_text(narrow, text_file)
    only = tuple(group for group in target.groups if why_not(group, "fp8") is not None)
    asked = MeasureSpec(formats=(W4A4, "fp8"))
    with pytest.raises(MeasurementError, match=r"no group can be in fp8: shape \[120, 64\].*leave it out of"):
        measure(narrow, source_of(narrow), dataclasses.replace(target, groups=only), data, asked, tmp_path)


# --- measuring and planning -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(llama, text_file, tmp_path_factory):
    """(measurement, its directory) by exact KL, in NVFP4 and FP8."""
    output = tmp_path_factory.mktemp("measured")
    return measure_text(llama, text_file, output, engine="native", method="kl_div", formats=("fp8", *BOTH)), output


@pytest.mark.parametrize("name", BOTH)
def test_a_score_is_the_kl_of_the_group_as_others_compute_it(llama, measured, text_file, vllms, name):
    """Weights through ModelOpt's tensors, inputs through vLLM's function, in a model that is otherwise the original."""
    measurement, directory = measured
    amax, data = read_amax(measurement, directory), load_text(llama, text_file)
    group = next(group for group in measurement.groups if group.name.endswith("1.mlp.gate_up_proj"))
    model = load_model(llama, torch.float32)

    def log_probs():
        with torch.no_grad():
            return [
                model(**batch.inputs).logits[:, :-1][batch.predicted].double().log_softmax(-1) for batch in data.batches
            ]

    before = log_probs()
    for module in group.modules:
        linear = model.get_submodule(module.name)
        above = amax[f"{module.name}.weight_amax"] / 2688
        packed, scales, _ = NVFP4QTensor.quantize(linear.weight.detach().clone(), 16, None, above)
        weight = packed.dequantize(torch.float32, scale=scales, double_scale=above, block_sizes={-1: 16})
        linear.weight.data = weight
        if name == W4A4:
            inverse = 2688 / amax[f"{module.name}.input_amax"]
            linear.register_forward_pre_hook(
                lambda _, inputs, inverse=inverse: (
                    vllms.ref_nvfp4_quant_dequant(inputs[0].flatten(0, 1), inverse, 16).view_as(inputs[0]),
                )
            )
    total = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(before, log_probs(), strict=True))
    tokens = sum(batch.loss_tokens for batch in data.batches)
    candidate = measurement.by_group()[group.name][name]
    assert measurement.sensitivity(candidate) == pytest.approx(total / tokens, rel=1e-3)
    assert total > 0


@pytest.mark.parametrize("method", ["gradient", "fisher", "kl_div"])
def test_formats_scored_together_have_the_scores_of_each_alone(llama, text_file, tmp_path, method, monkeypatch):
    passes = []
    for name in ("begin", "record"):  # of a batch, whichever the method needs
        monkeypatch.setattr(Decoder, name, counted(passes, getattr(Decoder, name)))
    formats = ("fp8", "nvfp4_w4a16", "nvfp4", "fp8_pc_pt")
    together = measure_text(llama, text_file, tmp_path / "all", method=method, formats=formats)
    assert len(passes) == len(together.score_weights)  # one a batch, not one a format
    found = {(one.group, one.format): one.scores for one in together.candidates}
    for name in formats:
        alone = measure_text(llama, text_file, tmp_path / name, method=method, formats=(name,))
        assert {one.group: one.scores for one in alone.candidates} == {
            group: scores for (group, format_), scores in found.items() if format_ == name
        }
    assert len({scores for scores in found.values()}) == len(found)


def counted(passes, function):
    def count(*given, **named):
        passes.append(1)
        return function(*given, **named)

    return count


def test_four_and_a_half_bits_are_the_floor_and_mixes_lie_above(measured):
    measurement, _ = measured
    floor = planning.plan(measurement, spec("floor", effective_bits=4.5))
    assert floor.effective_bits == 4.5
    assert set(floor.formats.values()) <= set(BOTH)
    smallest = planning.at_the_floor(measurement, floor)
    assert set(smallest) == set(floor.formats.values())
    said = planning.floor_sentence("floor", floor.effective_bits, measurement.formats, smallest)
    assert said.startswith("floor: 4.50 effective bits is the floor of these formats (fp8, nvfp4, nvfp4_w4a16): every")
    mix = planning.plan(measurement, spec("mix", effective_bits=5.4))
    assert 4.5 < mix.effective_bits <= 5.4
    assert "fp8" in mix.formats.values()
    assert planning.at_the_floor(measurement, mix) == ()
    with pytest.raises(InfeasibleTarget, match=r"4\.4 effective bits is below the minimum 4\.50.* add int4_w4a16"):
        planning.plan(measurement, spec("x", effective_bits=4.4))
    with pytest.raises(InfeasibleTarget, match=r"minimum 4\.50 of these formats"):
        planning.refuse_unattainable([spec("x", effective_bits=4.25)], ("nvfp4", "fp8"))
    planning.refuse_unattainable([spec("x", effective_bits=4.5)], ("nvfp4", "fp8"))


def test_what_cannot_be_done_is_refused_before_anything_is_computed(llama, text_file, tmp_path):
    with pytest.raises(
        EngineError, match=r"ModelOpt computes nvfp4 on NVIDIA GPUs alone, and this is cpu; use engine: n"
    ):
        measure_text(llama, text_file, tmp_path / "b", formats=("fp8", W4A4), engine="modelopt", method="gradient")


# --- checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_a_uniform_checkpoint_is_what_modelopt_exports(llama, measured, tmp_path, name):
    measurement, directory = measured
    amax, scheme = read_amax(measurement, directory), assigned(measurement, name, lambda *_: name)
    export(scheme, measurement, amax, llama, tmp_path / "ours")
    modelopt_export(llama, measurement, scheme, amax, tmp_path / "theirs")
    mine, other = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    for key, tensor in mine.items():
        if key.rpartition(".")[2] in {"weight_scale", "weight_scale_2", "input_scale"} or tensor.dtype == torch.uint8:
            assert tensor.shape == other[key].shape, key
            assert same(tensor.reshape(-1), other[key].reshape(-1)), key
    for file, section in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        found, wanted = (json.loads((tmp_path / side / file).read_text())[section] for side in ("ours", "theirs"))
        assert found.pop("producer", None) == wanted.pop("producer", None)
        found.pop("ignore" if "ignore" in found else "exclude_modules")  # ours are exact names
        wanted.pop("ignore" if "ignore" in wanted else "exclude_modules")
        assert found == wanted


@pytest.fixture(scope="module")
def checkpoint(llama, measured, tmp_path_factory):
    """(scheme, directory): attention in nvfp4, gate and up in nvfp4_w4a16, down in fp8."""
    measurement, directory = measured
    kinds = {"qkv_proj": W4A4, "o_proj": W4A4, "gate_up_proj": W4A16, "down_proj": "fp8"}
    scheme = assigned(measurement, "mix", lambda _, group: kinds[group.name.rpartition(".")[2]])
    output = tmp_path_factory.mktemp("mix") / "checkpoint"
    export(scheme, measurement, read_amax(measurement, directory), llama, output)
    return scheme, output


LAYER = "model.layers.1.self_attn"


def _nibbles(found):
    weight = found[f"{LAYER}.q_proj.weight"]
    found[f"{LAYER}.q_proj.weight"] = (weight >> 4) | (weight << 4)


def _one_nibble(found):
    weight = found[f"{LAYER}.o_proj.weight"]
    weight[3, 5] ^= 0x03


def _one_sign(found):
    weight = found[f"{LAYER}.o_proj.weight"]
    row, column = (weight & 0x7 == 7).nonzero()[0].tolist()
    weight[row, column] ^= 0x08


def _one_block(found):
    scales = found[f"{LAYER}.o_proj.weight_scale"].view(torch.uint8)
    scales[2, 1] += 1


def _other_layer(found):
    found[f"{LAYER}.o_proj.weight_scale"] = found["model.layers.0.self_attn.o_proj.weight_scale"].clone()


def _transposed(found):
    scales = found[f"{LAYER}.o_proj.weight_scale"]
    found[f"{LAYER}.o_proj.weight_scale"] = scales.t().reshape(scales.shape).contiguous()


def _above(found):
    found[f"{LAYER}.k_proj.weight_scale_2"] *= 1.001


def _doubled(found):
    """The scale above halved, the blocks' scales doubled: the same numbers, another split."""
    found[f"{LAYER}.o_proj.weight_scale_2"] /= 2
    scales = found[f"{LAYER}.o_proj.weight_scale"]
    found[f"{LAYER}.o_proj.weight_scale"] = (scales.float() * 2).clamp(max=448).to(scales.dtype)


def _input(found):
    found[f"{LAYER}.k_proj.input_scale"] *= 2


def _by_448(found):
    """An input's scale as FP8 has it."""
    for name in ("q_proj", "k_proj", "v_proj"):
        found[f"{LAYER}.{name}.input_scale"] *= 6


def _reciprocal(found):
    found[f"{LAYER}.o_proj.weight_scale_2"] = 1 / found[f"{LAYER}.o_proj.weight_scale_2"]


def _extra(found):
    found["model.layers.1.mlp.gate_proj.input_scale"] = torch.tensor(1.0)


def _lost(found):
    del found[f"{LAYER}.o_proj.weight_scale_2"]


def _lost_blocks(found):
    del found[f"{LAYER}.o_proj.weight_scale"]


def _bytes_of_scales(found):
    found[f"{LAYER}.o_proj.weight_scale"] = found[f"{LAYER}.o_proj.weight_scale"].view(torch.uint8)


def _unpacked(found):
    codes = found[f"{LAYER}.o_proj.weight"]
    found[f"{LAYER}.o_proj.weight"] = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)


def _not_a_number(found):
    found[f"{LAYER}.o_proj.weight_scale"].view(torch.uint8)[0, 0] = 0x7F


BROKEN = {
    _nibbles: "codes are not the ones nearest",
    _one_nibble: "1 of 4,096 codes are not the ones nearest",
    _one_sign: "1 of 4,096 codes are not the ones nearest",
    _one_block: "1 of 256 blocks have another scale: block 9 has",
    _other_layer: "blocks have another scale",
    _transposed: "blocks have another scale",
    _above: "the source's weights give",
    _doubled: "the source's weights give",
    _input: "what calibration saw gives",
    _by_448: "what calibration saw gives",
    _reciprocal: "the source's weights give",
    _extra: "neither in the source nor asked for by the scheme",
    _lost: "missing",
    _lost_blocks: "missing",
    _bytes_of_scales: "is torch.uint8 [64, 4], not 64 x 4 float8_e4m3fn numbers",
    _unpacked: "is torch.uint8 [64, 64], the scheme says FP4 codes, two a byte, [64, 32]",
    _not_a_number: "blocks have another scale",
}


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__.strip("_"))
def test_what_is_wrong_in_the_tensors_is_found(llama, measured, checkpoint, tmp_path, change):
    measurement, directory = measured
    scheme, good = checkpoint
    shutil.copytree(good, tmp_path / "x")
    path = tmp_path / "x" / "model.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path, metadata={"format": "pt"})
    verdict = verify([scheme], measurement, read_amax(measurement, directory), llama, {"mix": tmp_path / "x"})
    problems = [one.problem for one in verdict.checkpoints[0].findings if one.tensor]
    assert any(BROKEN[change] in problem for problem in problems), problems


CONFIGS = {
    "algorithm": (lambda c: c["quantized_layers"][f"{LAYER}.o_proj"].update(quant_algo="W4A16_NVFP4"), "'NVFP4'"),
    "group size": (lambda c: c["quantized_layers"][f"{LAYER}.o_proj"].update(group_size=32), "it should be 16"),
    "no group size": (lambda c: c["quantized_layers"][f"{LAYER}.o_proj"].pop("group_size"), "is missing"),
    "missing shard": (lambda c: c["quantized_layers"].pop(f"{LAYER}.k_proj"), "is missing"),
    "bits": (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=8), "it should be 4"),
    "inputs": (
        lambda c: c["config_groups"]["group_1"].update(input_activations={"num_bits": 4}),
        "should not be there",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_wrong_in_the_configuration_is_found(llama, measured, checkpoint, tmp_path, name):
    measurement, directory = measured
    scheme, good = checkpoint
    change, words = CONFIGS[name]
    shutil.copytree(good, tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    content = json.loads(path.read_text())
    change(content["quantization_config"])
    path.write_text(json.dumps(content))
    verdict = verify([scheme], measurement, read_amax(measurement, directory), llama, {"mix": tmp_path / "x"})
    found = [one.problem for one in verdict.checkpoints[0].findings if one.file == "config.json"]
    assert any(words in problem for problem in found), found


def test_an_intact_mix_passes_and_formats_that_store_alike_differ(llama, measured, checkpoint, tmp_path):
    measurement, directory = measured
    amax, (scheme, good) = read_amax(measurement, directory), checkpoint
    other = assigned(measurement, "other", lambda _, group: W4A16 if scheme.formats[group.name] == W4A4 else "fp8")
    export(other, measurement, amax, llama, tmp_path / "other")
    result = verify([scheme, other], measurement, amax, llama, {"mix": good, "other": tmp_path / "other"})
    assert result.ok, result
    (pair,) = result.pairs
    assert pair.modules_differing == pair.modules_expected > 0


def test_the_loaded_model_is_what_vllms_functions_make_of_the_files(llama, checkpoint, vllms):
    """Every module by its own `quant_algo`, straight from the files, in the original's place."""
    tensors = load_file(checkpoint[1] / "model.safetensors")
    listed = json.loads((checkpoint[1] / "config.json").read_text())["quantization_config"]["quantized_layers"]
    model, ids = load_model(llama, torch.float32), torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        original = model(input_ids=ids).logits

    def rounding(algorithm, scale):
        def hook(_, inputs):
            rows = inputs[0].flatten(0, 1)
            if algorithm == "NVFP4":
                rows = vllms.ref_nvfp4_quant_dequant(rows, 1 / scale, 16)
            else:
                rows = (rows / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
            return (rows.view_as(inputs[0]),)

        return hook

    for name, entry in listed.items():
        linear, algorithm = model.get_submodule(name), entry["quant_algo"]
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        if algorithm == "FP8":
            linear.weight.data = weight.float() * scale
        else:
            above = tensors[f"{name}.weight_scale_2"]
            linear.weight.data = vllms.dequantize_to_dtype(weight, scale, above, torch.float32, 16, swizzle=False)
        if algorithm != "W4A16_NVFP4":
            linear.register_forward_pre_hook(rounding(algorithm, tensors[f"{name}.input_scale"]))
    with torch.no_grad():
        theirs, ours = model(input_ids=ids).logits, bitladder.load(checkpoint[1])(input_ids=ids).logits
    assert {entry["quant_algo"] for entry in listed.values()} == {"NVFP4", "W4A16_NVFP4", "FP8"}
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05 * float((theirs - original).abs().max()))
    assert float((ours - theirs).abs().mean()) < 1e-3 * float((theirs - original).abs().mean())


def test_evaluation_refuses_what_it_cannot_read(checkpoint, tmp_path):
    def changed(name, change):
        directory = tmp_path / name
        shutil.copytree(checkpoint[1], directory)
        found = load_file(directory / "model.safetensors")
        change(found)
        save_file(found, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    load_checkpoint(checkpoint[1])
    for change, words in (
        (_lost, r"o_proj\.weight is stored as codes, but its .*weight_scale_2 is missing"),
        (_bytes_of_scales, "weight_scale is not 64 x 4 positive F8_E4M3 numbers"),
        (_not_a_number, "weight_scale is not 64 x 4 positive F8_E4M3 numbers"),
        (_unpacked, "weight_scale is not 64 x 8 positive F8_E4M3 numbers"),
        (_extra, "belongs to no weight whose format has it"),
    ):
        with pytest.raises(ModelError, match=words):
            load_checkpoint(changed(change.__name__, change))
    eight = changed(
        "eight", lambda found: found.update({f"{LAYER}.o_proj.weight": torch.zeros(64, 64).to(torch.float8_e4m3fn)})
    )
    with pytest.raises(ModelError, match="is F8_E4M3, but NVFP4 is stored as U8; export this scheme again"):
        load_checkpoint(eight)
