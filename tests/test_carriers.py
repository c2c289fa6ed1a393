"""Checkpoints in compressed-tensors' layout: against its library, transformers' own loader and vLLM's."""

import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

from bitladder import library, planning
from bitladder.checkpoints import writer
from bitladder.checkpoints.export import export
from bitladder.errors import ModelError, PlanError
from bitladder.evaluation.evaluate import compare
from bitladder.evaluation.reading import load_checkpoint
from bitladder.evaluation.reference import Reference
from bitladder.evaluation.simulation import Simulation
from bitladder.formats import COMPRESSED_TENSORS, FORMATS, MODELOPT, format_of_group, get_format
from bitladder.measured import read_amax
from bitladder.recipe import SchemeSpec
from bitladder.records import BF16, CheckpointManifest
from bitladder.verification import verify
from conftest import load_text, measure_text

EACH = sorted(name for name, one in FORMATS.items() if COMPRESSED_TENSORS in one.layouts)
# compressed-tensors 0.20.0 has no place for packed zero points where transformers loads; see the test that says so
ZEROS = [name for name in EACH if FORMATS[name].zero_points]
BY_TRANSFORMERS = [name for name in EACH if name not in ZEROS]
MIX, ON_CPUS = "mix", "on_cpus"
TO_BFLOAT16 = ("mxfp8", "nvfp4", "nvfp4_w4a16")
NOT_ON_CPUS = ("int8_w8a16", "int8_w8a16_g64")  # vLLM 0.32 has no such kernel there
PRESETS = {
    "fp8": "FP8",
    "fp8_pc_pt": "FP8_DYNAMIC",
    "fp8_block": "FP8_BLOCK",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "nvfp4_w4a16": "NVFP4A16",
    "int8": "INT8",
    "int8_w8a16": "W8A16",
    "int4_w4a16": "W4A16",
    "int4_w4a16_asym": "W4A16_ASYM",
}
IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def llama(wide_llama) -> Path:
    return wide_llama


@pytest.fixture(scope="module")
def measured(llama, text_file, tmp_path_factory):
    """(measurement, amax) in all formats that compressed-tensors holds."""
    output = tmp_path_factory.mktemp("measured")
    measurement = measure_text(llama, text_file, output, formats=tuple(EACH))
    return measurement, read_amax(measurement, output)


@pytest.fixture(scope="module")
def schemes(measured):
    """One scheme a format, a mix of all that transformers loads with bf16, and one of all that vLLM runs on CPUs."""
    measurement, _ = measured

    def priced(name, chosen):
        formats = {group.name: chosen(index) for index, group in enumerate(measurement.groups)}
        return planning.price(measurement, name, formats, SchemeSpec(name=name, include=("*",)))

    ways = {name: priced(name, lambda _, name=name: name) for name in EACH}
    kinds = [*BY_TRANSFORMERS, BF16]
    few = [name for name in [*EACH, BF16] if name not in NOT_ON_CPUS]
    return {
        **ways,
        MIX: priced(MIX, lambda index: kinds[index % len(kinds)]),
        ON_CPUS: priced(ON_CPUS, lambda index: few[-1 - index % len(few)]),
    }


@pytest.fixture(scope="module")
def directories(llama, measured, schemes, tmp_path_factory):
    """{scheme: directory}: to be copied, not changed."""
    root = tmp_path_factory.mktemp("carried")
    for name, scheme in schemes.items():
        export(scheme, *measured, llama, root / name, carrier=COMPRESSED_TENSORS)
    return {name: root / name for name in schemes}


def section_of(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def verified(llama, measured, scheme, directory, carrier=COMPRESSED_TENSORS):
    return verify([scheme], *measured, llama, {scheme.name: directory}, carrier=carrier).checkpoints[0]


def log_probs(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.double().log_softmax(-1)


def kl(first, second):
    return float((first.exp() * (first - second)).sum(-1).mean())


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_group_is_the_librarys_own_preset(directories, name):
    (group,) = QuantizationConfig.model_validate(section_of(directories[name])).config_groups.values()
    preset = preset_name_to_scheme(PRESETS[name], targets=[])
    told = {"observer", "zp_dtype"}  # of calibration, which is over
    for side in ("weights", "input_activations"):
        mine, other = getattr(group, side), getattr(preset, side)
        assert (mine is None) == (other is None)
        assert mine is None or mine.model_dump(exclude=told) == other.model_dump(exclude=told)
    assert format_of_group(section_of(directories[name])["config_groups"]["group_0"]).name == name


def test_a_mix_names_every_module_once(directories, schemes, measured):
    section = section_of(directories[MIX])
    assert (section["quant_method"], section["format"]) == ("compressed-tensors", "mixed-precision")
    formats = {
        target: format_of_group(group).name
        for group in section["config_groups"].values()
        for target in group["targets"]
    }
    wanted = {m.name: schemes[MIX].formats[g.name] for g in measured[0].groups for m in g.modules}
    assert formats == {module: name for module, name in wanted.items() if name != BF16}
    assert set(section["ignore"]) == {m for m, name in wanted.items() if name == BF16} | {
        "lm_head",
        "model.embed_tokens",
    }
    assert not (directories[MIX] / "hf_quant_config.json").exists()
    assert section_of(directories["fp8"])["format"] == "float-quantized"


@pytest.mark.parametrize("name", [*EACH, MIX, ON_CPUS])
def test_verification_finds_nothing(llama, measured, schemes, directories, name):
    result = verified(llama, measured, schemes[name], directories[name])
    assert result.ok, result.findings
    assert CheckpointManifest.read(directories[name] / CheckpointManifest.FILE_NAME).carrier == COMPRESSED_TENSORS
    assert not verified(llama, measured, schemes[name], directories[name], MODELOPT).ok


@pytest.mark.parametrize("name", [*EACH, MIX, ON_CPUS])
def test_evaluation_simulation_and_modelopts_layout_agree(
    llama, measured, schemes, directories, name, tmp_path, text_file
):
    scheme = schemes[name]
    mine = log_probs(load_checkpoint(directories[name]))
    if all(MODELOPT in get_format(one).layouts for one in scheme.formats.values() if one != BF16):
        export(scheme, *measured, llama, tmp_path / "modelopt")
        torch.testing.assert_close(mine, log_probs(load_checkpoint(tmp_path / "modelopt")), rtol=0, atol=1e-4)
    assert kl(log_probs(load_checkpoint(llama)), mine) > 1e-6
    data = load_text(llama, text_file)
    with Reference.compute(llama, data, device="cpu") as reference:
        (result, *_), _ = compare(reference, directories[name], name)
        simulation = Simulation(llama, measured[0], measured[1], carrier=COMPRESSED_TENSORS)
        assert simulation.results([reference], scheme)[0].value == result.value


def test_half_precision_measured_in_bfloat16_is_verified(llama, text_file, tmp_path):
    """Scales of blocks and groups are made of the file's numbers, those of rows and tensors of what was measured."""
    model = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    noise = torch.Generator().manual_seed(5)
    tensors = {n: (t.float() + 0.01 * torch.randn(t.shape, generator=noise)).half() for n, t in tensors.items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    measurement = measure_text(model, text_file, tmp_path / "out", formats=tuple(EACH), dtype="bfloat16")
    measured = measurement, read_amax(measurement, tmp_path / "out")
    for turn in range(2):  # 12 groups, of which every format gets one
        formats = {group.name: EACH[(i + 12 * turn) % len(EACH)] for i, group in enumerate(measurement.groups)}
        scheme = planning.price(measurement, f"mix{turn}", formats, SchemeSpec(name="x", include=("*",)))
        export(scheme, *measured, model, tmp_path / scheme.name, carrier=COMPRESSED_TENSORS)
        result = verified(model, measured, scheme, tmp_path / scheme.name)
        assert result.ok, result.findings


# --- transformers' own loader -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BY_TRANSFORMERS, MIX])
def test_transformers_loads_it_by_itself(directories, name):
    """In bfloat16, `from_pretrained`'s default here, it is no farther from our numbers than bfloat16 is.

    compressed-tensors 0.20.0 restores FP4 and MXFP8 to bfloat16 in any case, so float32 is tried without them.
    """
    ours = log_probs(load_checkpoint(directories[name]))
    rounded = kl(ours, log_probs(load_checkpoint(directories[name], torch.bfloat16)))
    with library.quiet_libraries():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directories[name])
        found = kl(ours, log_probs(theirs))
    assert theirs.dtype == torch.bfloat16
    assert found < 1.5 * rounded + 1e-5


@pytest.mark.parametrize("name", [name for name in BY_TRANSFORMERS if name not in TO_BFLOAT16])
def test_transformers_computes_what_we_do_in_float32(directories, name):
    """Every layer by itself; the logits but for ties, which a random model makes much of (fp8 has few).

    The inputs of int8 are scaled by amax / 127 in vLLM, and so in our evaluation; compressed-tensors has amax / 127.5.
    """
    ours = load_checkpoint(directories[name])
    with library.quiet_libraries():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directories[name], dtype=torch.float32)
        mine, other = log_probs(ours), log_probs(theirs)
    rounded = kl(mine, log_probs(load_checkpoint(directories[name], torch.bfloat16)))
    assert kl(mine, other) < (1e-5 if name == "fp8" else 1.5 * rounded)
    near = 0.05 if name == "int8" else 1e-5
    modules, compared = dict(ours.named_modules()), 0
    for path, linear in theirs.named_modules():
        if not hasattr(linear, "quantization_scheme"):
            continue
        x = torch.randn(2, 5, linear.in_features, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(linear.weight.detach(), modules[path].weight.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(linear(x).detach(), modules[path](x).detach(), rtol=near, atol=near)
        compared += 1
    assert compared == 21


@pytest.mark.parametrize("name", ZEROS)
def test_transformers_refuses_zero_points_unless_it_restores_weights(directories, name):
    """compressed-tensors 0.20.0 compresses a module of shapes alone but for its zero points; docs and cards say so."""
    with library.quiet_libraries(), pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(directories[name])


@pytest.mark.parametrize("name", ZEROS)
def test_transformers_restores_weights_with_zero_points(directories, name):
    """Rounded to bfloat16, whatever dtype is asked for; inputs of these formats aren't rounded, so nothing is lost."""
    ours = load_checkpoint(directories[name])
    rounded = kl(log_probs(ours), log_probs(load_checkpoint(directories[name], torch.bfloat16)))
    how = transformers.CompressedTensorsConfig(dequantize=True)
    with library.quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checkpoint's own configuration is taken but for how it is loaded
        load = transformers.AutoModelForCausalLM.from_pretrained
        theirs = load(directories[name], quantization_config=how)
        exact = load(directories[name], quantization_config=how, dtype=torch.float32)
    assert theirs.dtype == torch.bfloat16
    assert kl(log_probs(ours), log_probs(theirs)) < 1.5 * rounded + 1e-5
    for model in (theirs, exact):
        for group in section_of(directories[name])["config_groups"].values():
            for path in group["targets"]:
                weight = ours.get_parameter(f"{path}.weight").to(torch.bfloat16)
                assert torch.equal(model.get_parameter(f"{path}.weight"), weight.to(model.dtype)), path


# --- what is wrong is found -------------------------------------------------------------------------------------


def damaged(directory, destination, change):
    shutil.copytree(directory, destination)
    path = destination / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return destination


DOWN = "model.layers.1.mlp.down_proj"
UPSIDE_DOWN = {
    "weight_global_scale": "the source's weights give",
    "input_global_scale": "what calibration saw gives",
}


@pytest.mark.parametrize("leaf", sorted(UPSIDE_DOWN))
def test_a_global_scale_that_is_not_inverted_is_found(llama, measured, schemes, directories, tmp_path, leaf):
    def change(tensors):
        tensors[f"{DOWN}.{leaf}"] = 1 / tensors[f"{DOWN}.{leaf}"]

    copy = damaged(directories["nvfp4"], tmp_path / "x", change)
    findings = verified(llama, measured, schemes["nvfp4"], copy).findings
    assert any(f.tensor == f"{DOWN}.{leaf}" and UPSIDE_DOWN[leaf] in f.problem for f in findings)


@pytest.mark.parametrize(
    ("name", "leaf", "shape", "says"),
    [
        ("fp8", "weight_scale", (), r"is torch.float32 \[\], not one float32 number \[1\]"),
        ("fp8_pc_pt", "weight_scale", (128,), r"is torch.float32 \[128\], not 128 x 1 float32 numbers"),
        ("nvfp4", "weight_global_scale", (), r"is torch.float32 \[\], not one float32 number \[1\]"),
    ],
)
def test_modelopts_shapes_are_found(llama, measured, schemes, directories, tmp_path, name, leaf, shape, says):
    def change(tensors):
        tensors[f"{DOWN}.{leaf}"] = tensors[f"{DOWN}.{leaf}"].reshape(shape)

    copy = damaged(directories[name], tmp_path / "x", change)
    findings = [f.problem for f in verified(llama, measured, schemes[name], copy).findings if f.tensor]
    assert len(findings) == 1
    assert re.search(says, findings[0])


def test_a_module_in_another_group_is_found(llama, measured, schemes, directories, tmp_path):
    copy = tmp_path / "x"
    shutil.copytree(directories[MIX], copy)
    config = json.loads((copy / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    first, second, *_ = groups.values()
    second["targets"].append(first["targets"].pop(0))
    (copy / "config.json").write_text(json.dumps(config))
    problems = [f.problem for f in verified(llama, measured, schemes[MIX], copy).findings]
    assert any("config_groups.group_0.targets lacks" in problem for problem in problems)
    with pytest.raises(ModelError):
        load_checkpoint(copy)


def test_a_module_in_no_group_is_refused(directories, tmp_path):
    shutil.copytree(directories["nvfp4"], tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"].remove(DOWN)
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"{DOWN} is stored as codes, but its config group is in no config group"):
        load_checkpoint(tmp_path / "x")


def test_a_fp8_kv_cache_is_refused_with_the_carrier_that_has_it(llama, measured, schemes, tmp_path):
    scheme = schemes["fp8"].model_copy(update={"kv_cache_format": "fp8"})
    with pytest.raises(PlanError, match=r"scheme fp8: .*KV cache.*export.carrier: modelopt"):
        export(scheme, *measured, llama, tmp_path / "x", carrier=COMPRESSED_TENSORS)


# --- integers ---------------------------------------------------------------------------------------------------

INTEGERS = [name for name in EACH if FORMATS[name].code_dtype in ("I8", "I32")]
GROUPED = [name for name in INTEGERS if FORMATS[name].group_size]


@pytest.mark.parametrize("name", [name for name in INTEGERS if name not in ZEROS])
def test_integers_are_the_librarys(name):
    """Scales, codes and packing by compressed-tensors' own functions."""
    format_ = get_format(name)
    layout = format_.layouts[COMPRESSED_TENSORS]
    args = QuantizationArgs(**layout.weights)
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 48)[:, None]
    weight[5] = 0
    amax = format_.amax_of(weight)
    parts = format_.encode(weight, amax)
    groups = weight.reshape(48, -1, format_.group_size or 256)
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    mine = parts["weight_scale"].float().reshape(scales.shape)
    kept = torch.arange(48) != 5  # zeros: any scale will do
    torch.testing.assert_close(mine[kept], scales[kept], rtol=2**-8 if format_.group_size else 1e-6, atol=0)
    stored = mine if format_.group_size else mine.reshape(48, 1)
    state = {"weight": weight, "weight_scale": stored}
    compressor = BaseCompressor.get_value_from_registry(layout.compression)
    scheme = QuantizationScheme(targets=[], weights=args)
    theirs = compressor.compress(state, scheme)
    assert torch.equal(theirs[layout.name("weight")], parts["weight"])
    if format_.group_size:
        assert torch.equal(theirs["weight_shape"], parts["weight_shape"])
    restored = compressor.decompress(dict(theirs), scheme)["weight"].float()
    assert torch.equal(format_.decode(parts), restored)
    half = stored.repeat_interleave(256 // stored.shape[1], 1) / 2
    within = (restored - weight).abs() <= half * (1 + 1e-4)
    assert bool((within | ((restored - weight).abs() <= 2 * half)).all())
    assert within.float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ZEROS)
def test_zero_points_are_the_librarys(name, dtype):
    """Scales, zero points, codes and packing to the bit; codes of what is stored in BF16, divided in float32."""
    format_ = get_format(name)
    layout = format_.layouts[COMPRESSED_TENSORS]
    args = QuantizationArgs(**layout.weights, scale_dtype=torch.bfloat16)
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 48)[:, None]
    weight += torch.linspace(-2, 2, 48)[:, None]
    weight[5], weight[6], weight[7], weight[8] = 0, weight[6].abs(), -weight[7].abs(), 3
    weight = weight.to(dtype).float()
    parts = format_.encode(weight.to(dtype), format_.amax_of(weight))
    groups = weight.reshape(48, -1, format_.group_size)
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    assert torch.equal(parts["weight_scale"].float(), scales)
    state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
    compressor = BaseCompressor.get_value_from_registry(layout.compression)
    scheme = QuantizationScheme(targets=[], weights=args)
    theirs = compressor.compress(state, scheme)
    assert {layout.name(part) for part in parts} == set(theirs)
    for part in ("weight", "weight_zero_point", "weight_shape"):
        assert torch.equal(theirs[layout.name(part)], parts[part]), part
    restored = compressor.decompress(dict(theirs), scheme)["weight"].float()
    assert torch.equal(format_.decode(parts), restored)
    assert len(zeros.unique()) > 8
    assert bool((restored[5] == 0).all())
    ends = scales.repeat_interleave(format_.group_size, 1)
    assert bool(((restored - weight).abs() <= ends).all())


@pytest.mark.parametrize("name", ZEROS)
def test_a_zero_point_serves_values_of_one_sign(name):
    """They have all 16 codes then, which symmetric ones give half of."""
    weight = torch.rand(64, 256, generator=torch.Generator().manual_seed(3))

    def error(format_):
        return float((format_.decode(format_.encode(weight, format_.amax_of(weight))) - weight).square().mean().sqrt())

    assert error(get_format(name)) < 0.6 * error(get_format(name.replace("_asym", "")))


@pytest.mark.parametrize("at_once", [1, 24, 1 << 20])
def test_zero_points_are_written_in_whole_numbers_of_rows(measured, schemes, llama, directories, tmp_path, at_once):
    """However few rows are made at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_CODED_ELEMENTS", at_once * 256)
        export(schemes[ZEROS[0]], *measured, llama, tmp_path / "x", carrier=COMPRESSED_TENSORS)
    again, before = (
        load_file(tmp_path / "x" / "model.safetensors"),
        load_file(directories[ZEROS[0]] / "model.safetensors"),
    )
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


def test_every_stored_bit_of_integers_counts():
    shape = (256, 512)
    elements = 256 * 512
    assert get_format("int4_w4a16").bits(shape) == elements * (4 + 16 / 128)
    assert get_format("int4_w4a16_g64").bits(shape) == elements * (4 + 16 / 64)
    assert get_format("int8_w8a16").bits(shape) == elements * (8 + 16 / 128)
    assert get_format("int8").bits(shape) == elements * 8 + 256 * 32
    assert get_format("int4_w4a16_asym").bits(shape) == elements * (4 + (16 + 4) / 128)
    assert get_format("int4_w4a16_asym_g64").bits(shape) == elements * (4 + (16 + 4) / 64)
    assert get_format("int4_w4a16_asym").tensor_scale_bytes == 16
    assert get_format("int4_w4a16_asym").least_bits == 4.15625
    assert "a number of rows that 8 doesn't divide" in get_format("int4_w4a16_asym").why_not((12, 256))
    assert get_format("int4_w4a16").tensor_scale_bytes == 16  # weight_shape
    assert "not divisible by 128" in get_format("int4_w4a16").why_not((576, 576))
    assert get_format("int4_w4a16_g64").why_not((576, 576)) is None


@pytest.mark.parametrize("name", INTEGERS)
def test_a_scheme_that_modelopts_layout_cannot_hold_is_refused(llama, measured, schemes, tmp_path, name):
    with pytest.raises(
        PlanError, match=rf"scheme {name}: {name} is no format of modelopt checkpoints; set .*: compressed"
    ):
        export(schemes[name], *measured, llama, tmp_path / "x")


@pytest.mark.parametrize("name", INTEGERS)
def test_wrong_integers_are_found(llama, measured, schemes, directories, tmp_path, name):
    codes = f"{DOWN}.{get_format(name).layouts[COMPRESSED_TENSORS].name('weight')}"

    def flipped(tensors):
        tensors[codes].view(torch.uint8)[3, 7] ^= 0x8

    def scaled(tensors):
        scale = tensors[f"{DOWN}.weight_scale"]
        scale[4, 0] *= 2

    for index, (change, where) in enumerate(((flipped, codes), (scaled, f"{DOWN}.weight_scale"))):
        copy = damaged(directories[name], tmp_path / str(index), change)
        findings = verified(llama, measured, schemes[name], copy).findings
        assert where in {f.tensor for f in findings}, (change, findings)


@pytest.mark.parametrize("name", GROUPED)
def test_a_weight_of_another_shape_is_found(llama, measured, schemes, directories, tmp_path, name):
    def change(tensors):
        tensors[f"{DOWN}.weight_shape"] += 1

    copy = damaged(directories[name], tmp_path / "x", change)
    findings = verified(llama, measured, schemes[name], copy).findings
    assert f"{DOWN}.weight_shape" in {f.tensor for f in findings}
    with pytest.raises(ModelError, match=rf"{DOWN}.weight_shape is \[129, 257\], but .* holds \[128, 256\]"):
        load_checkpoint(copy)


# --- zero points ------------------------------------------------------------------------------------------------

ZERO, GATE, UP = f"{DOWN}.weight_zero_point", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"
TOP = -(1 << 31)


def exchange(first, second):
    def change(tensors):
        names = [f"{module}.weight_zero_point" for module in (first, second)]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]

    return change


def made(function):
    return lambda tensors: tensors.update({ZERO: function(tensors[ZERO]).contiguous()})


def unpacked(words):
    return unpack_from_int32(words, 4, torch.Size((len(words) * 8, words.shape[1])), packed_dim=0)


def nibbles_swapped(words):
    some = words.contiguous().view(torch.uint8)
    return ((some >> 4) | (some << 4)).view(torch.int32)


def a_step_more(words):
    zeros = unpacked(words)
    zeros[13, 1] += 1 if zeros[13, 1] < 7 else -1
    return pack_to_int32(zeros, 4, packed_dim=0)


# what `verify` says of it, and whether evaluation refuses it
WRONG_ZEROS = {
    "of_another_layer": (exchange(DOWN, DOWN.replace("1", "0")), "groups have another zero point", False),
    "of_another_shard": (exchange(GATE, UP), "groups have another zero point", False),
    "wrong_by_one": (made(a_step_more), "1 of 256 groups have another zero point: group 1 of row 13 has", False),
    "nibbles_swapped": (made(nibbles_swapped), "groups have another zero point", False),
    "words_in_another_order": (made(lambda z: z.flip(0)), "groups have another zero point", False),
    "without_their_offset": (made(lambda z: z ^ (0x08888888 | TOP)), "groups have another zero point", False),
    "as_of_symmetric_codes": (made(lambda z: torch.full_like(z, 0x08888888 | TOP)), "another zero point", False),
    "missing": (lambda tensors: tensors.pop(ZERO), "missing", True),
    "along_the_columns": (
        made(lambda z: pack_to_int32(unpacked(z), 4, packed_dim=1)),
        r"is torch.int32 \[128, 1\]",
        True,
    ),
    "transposed": (made(lambda z: z.t()), r"is torch.int32 \[2, 16\], not 16 x 2 int32 numbers", True),
    "not_packed": (made(unpacked), r"is torch.int8 \[128, 2\], not 16 x 2 int32 numbers", True),
    "a_row_less": (made(lambda z: z[1:]), r"is torch.int32 \[15, 2\], not 16 x 2 int32 numbers", True),
    "floats": (made(lambda z: z.float()), r"is torch.float32 \[16, 2\], not 16 x 2 int32 numbers", True),
}


@pytest.mark.parametrize("case", WRONG_ZEROS)
def test_wrong_zero_points_are_found(llama, measured, schemes, directories, tmp_path, case):
    change, says, refused = WRONG_ZEROS[case]
    name = "int4_w4a16_asym"
    copy = damaged(directories[name], tmp_path / "x", change)
    where = f"{GATE}.weight_zero_point" if case == "of_another_shard" else ZERO
    findings = verified(llama, measured, schemes[name], copy).findings
    assert any(f.tensor == where and re.search(says, f.problem) for f in findings), findings
    if refused:
        with pytest.raises(ModelError, match=re.escape(ZERO)):
            load_checkpoint(copy)
    else:
        codes = {f.tensor for f in findings if "codes are not the ones nearest" in f.problem}
        assert where.replace("zero_point", "packed") in codes  # what they restore is off by whole steps


def test_a_weight_with_zero_points_is_restored_with_them(directories, measured, llama):
    """By the library, from the file alone."""
    name = "int4_w4a16_asym"
    tensors = load_file(directories[name] / "model.safetensors")
    args = QuantizationArgs(**get_format(name).layouts[COMPRESSED_TENSORS].weights)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    leaves = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    state = {leaf: tensors[f"{DOWN}.{leaf}"] for leaf in leaves}
    state["weight_scale"] = state["weight_scale"].float()
    restored = compressor.decompress(state, QuantizationScheme(targets=[], weights=args))["weight"]
    assert torch.equal(load_checkpoint(directories[name]).get_parameter(f"{DOWN}.weight"), restored)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_the_configuration_says_of_zero_points_counts(directories, tmp_path, symmetric):
    name = "int4_w4a16_asym" if symmetric else "int4_w4a16"
    shutil.copytree(directories[name], tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = symmetric
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    says = "weight_zero_point belongs to no weight whose format has it" if symmetric else "weight_zero_point is missing"
    with pytest.raises(ModelError, match=says):
        load_checkpoint(tmp_path / "x")


def test_the_manifest_tells_zero_points(llama, measured, schemes, directories, tmp_path):
    name = "int4_w4a16_asym"
    manifest = CheckpointManifest.read(directories[name] / CheckpointManifest.FILE_NAME)
    records = {one.name: one for one in manifest.modules}
    stored = load_file(directories[name] / "model.safetensors")[ZERO]
    digest = hashlib.sha256(stored.numpy().tobytes()).hexdigest()
    assert records[DOWN].weight_zero_point_sha256 == digest
    text = (directories["int4_w4a16"] / "bitladder_manifest.json").read_text()
    assert "zero_point" not in text
    shutil.copytree(directories[name], tmp_path / "x")
    records[DOWN] = records[DOWN].model_copy(update={"weight_zero_point_sha256": digest[::-1]})
    changed = manifest.model_copy(update={"modules": tuple(records.values())})
    changed.write(tmp_path / "x" / CheckpointManifest.FILE_NAME)
    problems = [f.problem for f in verified(llama, measured, schemes[name], tmp_path / "x").findings]
    assert any(f"modules.{DOWN}.weight.weight_zero_point_sha256 is " in problem for problem in problems), problems
