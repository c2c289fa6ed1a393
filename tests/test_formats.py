"""Every registered format, from codes to a whole ladder, against what we did not write."""

import ast
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.fx.experimental.proxy_tensor import make_fx

import bitladder
from bitladder import planning
from bitladder.checkpoints import writer
from bitladder.checkpoints.export import export
from bitladder.errors import MeasurementError, ModelError, RecipeError
from bitladder.evaluation.evaluate import compare
from bitladder.evaluation.reading import load_checkpoint
from bitladder.evaluation.reference import Reference
from bitladder.evaluation.simulation import Simulation
from bitladder.formats import (
    FORMATS,
    INPUT_SCALE,
    MODELOPT,
    WEIGHT,
    WEIGHT_SCALE,
    get_format,
    group_bits,
    why_no_shapes,
)
from bitladder.formats.grids import half_step
from bitladder.measured import read_amax, read_codes
from bitladder.models.loading import load_model
from bitladder.recipe import MeasureSpec, SchemeSpec, WorkersSpec
from bitladder.records import BF16, QuantGroup, QuantModule
from bitladder.verification import checks, verify
from conftest import llama_config, load_text, measure_text, save_model, spec

ROWS, SQUARES = "fp8_pc_pt", "fp8_block"
EACH = sorted(name for name, one in FORMATS.items() if MODELOPT in one.layouts)  # tests/test_carriers.py: the others
SCALED = ("fp8", "fp8_pc_pt")  # codes times a scale a tensor or a row, and no more
# of which every format takes every module
WIDE = llama_config(hidden_size=256, intermediate_size=384, num_hidden_layers=2)
BY_MODELOPT = [name for name in EACH if FORMATS[name].modelopt_on_cpu]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A tiny Llama whose rows have very different magnitudes, and one of zeros."""
    directory = save_model(transformers.LlamaForCausalLM, WIDE, tmp_path_factory.mktemp("llama"))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name] = tensors[name] * torch.logspace(-2, 1, len(tensors[name]))[:, None].to(tensors[name].dtype)
    tensors[name][3] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def measured(llama, text_file, tmp_path_factory):
    """(measurement, its directory) in all formats."""
    output = tmp_path_factory.mktemp("measured")
    return measure_text(llama, text_file, output, formats=tuple(EACH)), output


def assigned(measurement, name, formats):
    """The scheme with the format that `formats(index, group)` gives each group."""
    chosen = {group.name: formats(index, group) for index, group in enumerate(measurement.groups)}
    return planning.price(measurement, name, chosen, SchemeSpec(name=name, include=("*",)))


def mixed(measurement, name="mix"):
    return assigned(measurement, name, lambda index, _: [BF16, *EACH][index % (len(EACH) + 1)])


def exported(llama, measured, scheme, destination):
    measurement, directory = measured
    return export(scheme, measurement, read_amax(measurement, directory), llama, destination)


def verified(llama, measured, scheme, destination):
    measurement, directory = measured
    amax = read_amax(measurement, directory)
    return verify([scheme], measurement, amax, llama, {scheme.name: destination}).checkpoints[0]


@pytest.fixture(scope="module")
def checkpoint(llama, measured, tmp_path_factory):
    """(scheme, directory) of a mix of all formats; to be copied, not changed."""
    scheme, directory = mixed(measured[0]), tmp_path_factory.mktemp("mix") / "checkpoint"
    exported(llama, measured, scheme, directory)
    return scheme, directory


# --- what a format says of itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_restore_a_weight_within_half_a_step(name, dtype):
    format_ = get_format(name)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(256, 128, generator=generator) * torch.logspace(-3, 2, 256)[:, None]).to(dtype)
    weight[5] = 0
    amax = format_.amax_of(weight)
    parts = format_.encode(weight, amax)
    restored = format_.decode(parts)
    assert restored.shape == weight.shape
    assert torch.equal(restored[5], torch.zeros(128))
    assert torch.equal(format_.decode(parts, dtype), restored.to(dtype))
    if name not in SCALED:
        return  # tests/test_nvfp4.py, tests/test_block_formats.py
    codes, scale = parts[WEIGHT], parts[WEIGHT_SCALE]
    assert torch.equal(restored, format_.restored(codes, scale))
    step = half_step(weight.float(), scale[:, None] if scale.dim() else scale)
    assert bool(((restored - weight.float()).abs() <= step * (1 + 1e-5)).all())
    for column in (0, 17):  # compensated rounding goes column by column
        assert torch.equal(format_.codes(weight[:, column], amax).view(torch.uint8), codes[:, column].view(torch.uint8))
        assert torch.equal(format_.restored(codes[:, column], scale), restored[:, column])


@pytest.mark.parametrize("name", EACH)
def test_every_part_has_its_name_shape_and_bits(name):
    format_, shape = get_format(name), (256, 384)
    stored = {part.name: part for part in format_.stored(shape)}
    parts = {part.name: part for part in format_.parts(shape)}
    weight = torch.randn(shape)
    amax = format_.amax_of(weight)
    made = format_.encode(weight, amax)
    assert stored.keys() == {WEIGHT, *parts}
    assert stored.keys() - made.keys() == ({INPUT_SCALE} if format_.has_input_scale else set())
    dtypes = {"F32": torch.float32, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}
    for part, tensor in made.items():
        assert (dtypes[stored[part].dtype], stored[part].shape) == (tensor.dtype, tuple(tensor.shape))
        assert stored[part].bits == 8 * tensor.nbytes
        if tensor.dim() and part not in format_.tensor_scales(amax):  # what is written block by block
            rows = format_.made(part, weight[120:140], format_.rows_of(amax, 120, 20))
            assert torch.equal(rows.view(torch.uint8), tensor[120:140].view(torch.uint8))
    assert format_.weight_shape(stored[WEIGHT].shape) == shape
    assert format_.tensor_scale_bytes == 4 * sum(part.shape == () for part in parts.values())
    assert format_.bits(shape) == 8 * sum(tensor.nbytes for tensor in made.values() if tensor.dim())
    assert format_.bits(shape) == 256 * 384 * format_.least_bits + (32 * 256 if format_.channels else 0)
    module = QuantModule(name="m", tensor="m.weight", shape=shape)
    group = QuantGroup(name="g", modules=(module, module), weight_elements=2 * 256 * 384)
    assert group_bits(group, name) == 2 * format_.bits(shape)
    unknown = group.model_copy(update={"modules": (module.model_copy(update={"shape": None}), module)})
    assert group_bits(unknown, name) == format_.least_bits * group.weight_elements
    assert group_bits(group, BF16) == 16 * group.weight_elements


@pytest.mark.parametrize("name", BY_MODELOPT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_and_inputs_are_rounded_as_modelopt_rounds_them(name, dtype):
    import modelopt.torch.quantization as mtq

    format_ = get_format(name)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 7, 256, generator=generator).to(dtype) * 3
    linear = torch.nn.Linear(256, 128, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(128, 256, generator=generator) * torch.logspace(-2, 1, 128)[:, None])
    model = torch.nn.Sequential(linear)
    mtq.quantize(model, format_.modelopt_quantisation(), forward_loop=lambda m: m(x))
    amax = format_.amax_of(linear.weight)
    ours = format_.decode(format_.encode(linear.weight.detach(), amax), dtype)
    theirs = linear.weight_quantizer(linear.weight).detach()
    torch.testing.assert_close(ours, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    scale = format_.input_scale(linear.input_quantizer.amax.float()) if format_.has_input_scale else None
    rounded, known = format_.round_input(x, scale), linear.input_quantizer(x)
    if name != SQUARES:
        torch.testing.assert_close(rounded, known, rtol=1e-2, atol=0)
        return
    assert ((rounded - known).abs() > 1e-2 * known.abs()).float().mean() < 1e-3  # vLLM divides: ties go elsewhere
    torch.testing.assert_close(rounded, known, rtol=1 / 8, atol=0)


def test_every_token_has_a_scale_of_its_own():
    x = torch.tensor([[1.0, -448.0, 3.0], [1e-6, 2e-6, -4.48e-4], [0.0, 0.0, 0.0]])
    assert torch.equal(get_format(ROWS).round_input(x, None)[0], torch.tensor([1.0, -448.0, 3.0]))
    alone = torch.cat([get_format(ROWS).round_input(row[None], None) for row in x])
    assert torch.equal(get_format(ROWS).round_input(x, None), alone)
    assert torch.equal(alone[2], torch.zeros(3))


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_an_input_has_its_scale_of_float32_maxima(name):
    """A compiler keeps a maximum as it is within a kernel, and rounds it to its dtype between two of them."""
    format_, x = get_format(name), torch.linspace(-3, 5, 2 * 256, dtype=torch.bfloat16).view(2, 256)
    scale = format_.input_scale(torch.tensor(5.0)) if format_.has_input_scale else None
    traced = make_fx(lambda x: format_.round_input(x, scale))(x)
    maxima = [node for node in traced.graph.nodes if node.target == torch.ops.aten.amax.default]
    assert bool(maxima) == (format_.input != "unrounded" and name != "fp8")  # with one scale, which is stored
    assert all(node.meta["tensor_meta"].dtype == torch.float32 for node in maxima)


@pytest.mark.parametrize(
    ("name", "shape", "fitting"),
    [
        ("int4_w4a16", (64, 576), "int4_w4a16_g64"),
        ("int4_w4a16_asym", (64, 576), "int4_w4a16_asym_g64"),
        ("int4_w4a16_asym", (100, 128), "int4_w4a16"),  # no whole numbers of zero points
        ("int4_w4a16_g64", (64, 544), "nvfp4_w4a16"),
        ("int8_w8a16", (64, 576), "int8_w8a16_g64"),
        ("int8_w8a16", (64, 544), None),  # of eight bits the others round inputs
        ("fp8_block", (576, 576), "fp8_pc_pt"),
        ("fp8", (120, 64), "mxfp8"),
        ("nvfp4", (64, 120), None),
    ],
)
def test_a_shape_that_a_format_does_not_take_is_told_the_format_that_fits(name, shape, fitting):
    said = why_no_shapes({"m": shape}, name)
    assert said.startswith(f"shape {list(shape)} of m ")
    assert re.findall(r"\((\w+) fits\)$", said) == ([] if fitting is None else [fitting])
    if fitting is not None:
        assert why_no_shapes({"m": shape}, fitting) is None


def test_what_fits_one_module_of_a_fused_group_alone_is_not_named():
    said = why_no_shapes({"q": (64, 576), "k": (64, 544)}, "int4_w4a16")
    assert said.endswith("of q has rows that are not divisible by 128: no whole groups of integers (nvfp4_w4a16 fits)")


def test_a_refusal_of_a_model_that_no_group_fits_names_the_format_that_does(tmp_path, text_file):
    config = llama_config(hidden_size=192, intermediate_size=192, num_attention_heads=4, num_hidden_layers=1)
    directory = save_model(transformers.LlamaForCausalLM, config, tmp_path / "narrow")
    with pytest.raises(MeasurementError, match=r"can be in int4_w4a16: .* \(int4_w4a16_g64 fits\); leave it out of me"):
        measure_text(directory, text_file, tmp_path / "out", formats=("fp8", "int4_w4a16"))
    measured = measure_text(directory, text_file, tmp_path / "out", formats=("fp8", "int4_w4a16_g64"), samples=2)
    assert measured.left_out == ()


# --- measuring --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_our_engine_agrees_with_modelopt_in_every_format(llama, text_file, tmp_path, method):
    found = []
    for engine in ("native", "modelopt"):
        measurement = measure_text(
            llama, text_file, tmp_path / engine, engine=engine, method=method, formats=tuple(BY_MODELOPT)
        )
        found.append({(c.group, c.format): sum(c.scores) for c in measurement.candidates})
    assert {name for _, name in found[0]} == set(BY_MODELOPT)
    assert found[0].keys() == found[1].keys()
    for key, score in found[0].items():
        assert score == pytest.approx(found[1][key], rel=2e-2 if key[1] == SQUARES else 5e-3), key  # ties: see above


@pytest.mark.parametrize("name", [ROWS, SQUARES])
def test_modelopt_measures_a_format_alone_that_stores_nothing_of_an_input(llama, text_file, tmp_path, name):
    asked = {"engine": "modelopt", "method": "gradient", "formats": (name,), "samples": 2}
    measurement = measure_text(llama, text_file, tmp_path, **asked)
    assert {candidate.format for candidate in measurement.candidates} == {name}
    assert len(measurement.candidates) == len(measurement.groups) == 8
    scheme = assigned(measurement, "all", lambda *_: name)
    amax = read_amax(measurement, tmp_path)
    export(scheme, measurement, amax, llama, tmp_path / "checkpoint")
    result = verify([scheme], measurement, amax, llama, {"all": tmp_path / "checkpoint"})
    assert result.ok, result


def test_a_format_scores_the_same_beside_another(llama, text_file, tmp_path, measured):
    for name in EACH:
        alone = measure_text(llama, text_file, tmp_path / name, formats=(name,))
        together = [candidate for candidate in measured[0].candidates if candidate.format == name]
        assert list(alone.candidates) == together


def test_a_run_killed_between_formats_goes_on_with_the_same_bytes(llama, text_file, tmp_path, measured):
    class Killed(Exception):
        pass

    def progress(step, done, total):
        if step == "score" and done == total - 1:
            raise Killed

    with pytest.raises(Killed):
        measure_text(llama, text_file, tmp_path, progress, formats=tuple(EACH))
    seen = []
    again = measure_text(
        llama, text_file, tmp_path, lambda step, done, total: seen.append((step, done)), formats=tuple(EACH)
    )
    assert min(done for step, done in seen if step == "score") > 0
    assert again.fingerprint() == measured[0].fingerprint()


def test_a_run_with_modelopt_that_was_killed_while_scoring_gives_the_same_scores(llama, text_file, tmp_path):
    """The amax values are installed again: an input that is scaled as it comes must get none."""

    class Killed(Exception):
        pass

    def progress(step, done, total):
        if step == "score" and done == total - 1:
            raise Killed

    asked = {"engine": "modelopt", "method": "gradient", "formats": tuple(BY_MODELOPT)}
    with pytest.raises(Killed):
        measure_text(llama, text_file, tmp_path / "killed", progress, **asked)
    assert (tmp_path / "killed" / "measuring" / "amax.safetensors").exists()
    again, whole = (measure_text(llama, text_file, tmp_path / name, **asked) for name in ("killed", "whole"))
    assert again.fingerprint() == whole.fingerprint()


def test_workers_score_in_all_formats():
    assert WorkersSpec(count=2).problem(MeasureSpec(formats=("fp8", ROWS))) is None
    with pytest.raises(
        RecipeError, match="unknown format 'fp9'; known: fp8, fp8_pc_pt, fp8_block, .*nvfp4, nvfp4_w4a16, int8"
    ):
        get_format("fp9")


def test_compensated_codes_of_rows_beat_the_nearest_ones(llama, text_file, tmp_path):
    measurement = measure_text(llama, text_file, tmp_path, formats=(ROWS,), rounding="compensated", samples=12)
    assert measurement.rounding is not None
    better = [m.output_error < m.nearest_output_error for m in measurement.rounding.modules if m.output_error > 0]
    assert sum(better) > 0.8 * len(better)
    scheme = assigned(measurement, "all", lambda *_: ROWS)
    codes = read_codes(measurement, tmp_path)
    amax = read_amax(measurement, tmp_path)
    export(scheme, measurement, amax, llama, tmp_path / "checkpoint", codes=codes)
    result = verify([scheme], measurement, amax, llama, {"all": tmp_path / "checkpoint"}).checkpoints[0]
    assert result.findings == ()


# --- checkpoints ------------------------------------------------------------------------------------------------


def test_planning_chooses_between_formats(measured):
    measurement, _ = measured
    scheme = planning.plan(measurement, spec("mix", effective_bits=9.0))
    assert len(set(scheme.formats.values()) - {BF16}) > 1
    assert scheme.effective_bits <= 9.0
    one = planning.plan(measurement, spec("rows", coverage=1.0, format=ROWS))
    assert one.weight_bits == sum(group_bits(group, ROWS) for group in measurement.groups) > 8 * one.searched_weights


@pytest.mark.parametrize("name", [*EACH, "mix"])
def test_a_checkpoint_verifies_and_computes_what_was_simulated(llama, measured, text_file, tmp_path, name):
    measurement, directory = measured
    scheme = mixed(measurement) if name == "mix" else assigned(measurement, name, lambda *_: name)
    manifest = exported(llama, measured, scheme, tmp_path / "checkpoint")
    found = verified(llama, measured, scheme, tmp_path / "checkpoint")
    assert found.findings == ()
    assert found.codes_checked == sum(g.weight_elements for g in measurement.groups if scheme.formats[g.name] != BF16)
    size = sum(
        sum(math.prod(part.shape) * (4 if part.dtype == "F32" else 1) for part in format_.stored(module.shape))
        for group in measurement.groups
        if scheme.formats[group.name] != BF16
        for format_ in [get_format(scheme.formats[group.name])]
        for module in group.modules
    )
    untouched = sum(2 * g.weight_elements for g in measurement.groups if scheme.formats[g.name] == BF16)
    assert scheme.weight_bytes == size + untouched
    assert {module.format for module in manifest.modules} == set(scheme.formats.values()) - {BF16}
    data = load_text(llama, text_file)
    with Reference.compute(llama, data, split="text", device="cpu") as reference:
        simulation = Simulation(llama, measurement, read_amax(measurement, directory))
        simulated = simulation.results([reference], scheme)
        read, count = compare(reference, tmp_path / "checkpoint", scheme.name)
    assert count == len(manifest.modules)
    assert [r.value for r in read if r.metric == "kl"] == [r.value for r in simulated if r.metric == "kl"]


def test_rows_keep_their_scales_where_a_weight_is_written_and_read_in_blocks(
    llama, measured, checkpoint, tmp_path, monkeypatch
):
    scheme, whole = checkpoint
    monkeypatch.setattr(writer, "_CODED_ELEMENTS", 5 * 256)  # five rows of most weights: the last block is shorter
    monkeypatch.setattr(checks, "_BLOCK", 7 * 256)
    exported(llama, measured, scheme, tmp_path / "blocks")
    name = "model.safetensors"
    assert (tmp_path / "blocks" / name).read_bytes() == (whole / name).read_bytes()
    assert verified(llama, measured, scheme, tmp_path / "blocks").findings == ()


def test_a_mix_lists_every_module_as_modelopt_does(llama, measured, checkpoint, tmp_path):
    """Tensors and JSON of ModelOpt's own export of the same assignment, apart from codes that its division moves."""
    scheme, ours = checkpoint
    measurement, directory = measured
    modelopt_export(llama, measurement, scheme, read_amax(measurement, directory), tmp_path / "theirs")
    mine, other = load_file(ours / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.shape == other[name].shape, name
        if tensor.dtype == torch.uint8 or (tensor.dtype == torch.float8_e4m3fn and name.endswith("scale")):
            assert tensor.dtype == other[name].dtype, name
            assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name
        elif tensor.dtype == torch.float8_e4m3fn:
            assert other[name].dtype == tensor.dtype, name
            steps = tensor.view(torch.uint8).int() - other[name].view(torch.uint8).int()
            assert int(steps.abs().max()) <= 1
            assert (steps != 0).float().mean() < 0.05
        else:
            torch.testing.assert_close(tensor.float(), other[name].float(), rtol=1e-6, atol=0)
    found, wanted = (
        json.loads((d / "config.json").read_text())["quantization_config"] for d in (ours, tmp_path / "theirs")
    )
    assert found["quant_algo"] == wanted["quant_algo"] == "MIXED_PRECISION"
    assert found["quantized_layers"] == wanted["quantized_layers"]
    assert sorted(found["config_groups"].values(), key=str) == sorted(wanted["config_groups"].values(), key=str)
    legacy = json.loads((ours / "hf_quant_config.json").read_text())["quantization"]
    assert legacy["quantized_layers"] == wanted["quantized_layers"]
    assert list(legacy["exclude_modules"]) == list(scheme.exclude_modules)


def modelopt_export(source, measurement, scheme, amax, destination):
    """What ModelOpt itself exports for this assignment, in float32, with fused scales shared."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    model = load_model(source, torch.float32)
    entries = [{"quantizer_name": "*", "enable": False}]
    for group in measurement.groups:
        if scheme.formats[group.name] == BF16:
            continue
        theirs = getattr(mtq, get_format(scheme.formats[group.name]).modelopt_config)["quant_cfg"]
        cfg = {e["quantizer_name"]: e["cfg"] for e in theirs if e["quantizer_name"] in KINDS and "cfg" in e}
        for module in group.modules:
            entries += [
                {"quantizer_name": f"{module.name}.{kind.lstrip('*')}", "cfg": cfg[kind], "enable": True}
                for kind in KINDS
                if kind in cfg
            ]
    ids = torch.arange(8).view(1, 8)
    mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"}, forward_loop=lambda m: m(input_ids=ids))
    for group in measurement.groups:
        if scheme.formats[group.name] in (BF16, ROWS, SQUARES, "mxfp8"):
            continue
        for module in group.modules:
            linear = model.get_submodule(module.name)
            for kind in ("weight", "input"):
                quantizer = getattr(linear, f"{kind}_quantizer")
                if quantizer.is_enabled:
                    quantizer.amax = amax[f"{module.name}.{kind}_amax"]
        if len(group.modules) > 1:
            preprocess_linear_fusion([model.get_submodule(module.name) for module in group.modules])
    export_hf_checkpoint(model, dtype=torch.float32, export_dir=destination)


KINDS = ("*weight_quantizer", "*input_quantizer")


# --- what is wrong is found -------------------------------------------------------------------------------------


def test_wrong_rows_and_lists_are_found(llama, measured, checkpoint, tmp_path):
    scheme, good = checkpoint
    measurement, _ = measured
    module = next(m for g in measurement.groups if scheme.formats[g.name] == ROWS for m in g.modules)
    prefix = module.tensor.removesuffix(".weight")

    def wrong(name, change):
        directory = tmp_path / name
        shutil.copytree(good, directory)
        change(directory)
        return " | ".join(f.problem for f in verified(llama, measured, scheme, directory).findings)

    def tensors(change):
        def apply(directory):
            found = load_file(directory / "model.safetensors")
            change(found)
            save_file(found, directory / "model.safetensors", metadata={"format": "pt"})

        return apply

    def config(change):
        def apply(directory):
            path = directory / "config.json"
            content = json.loads(path.read_text())
            change(content["quantization_config"])
            path.write_text(json.dumps(content))

        return apply

    def one_row(found):
        found[f"{prefix}.weight_scale"][2] *= 1.001

    assert "1 of " in wrong("row", tensors(one_row))
    assert "rows have another scale: row 2 has" in wrong("row2", tensors(one_row))
    scalar = tensors(lambda found: found.update({f"{prefix}.weight_scale": found[f"{prefix}.weight_scale"][0].clone()}))
    assert "float32 numbers" in wrong("scalar", scalar)
    extra = tensors(lambda found: found.update({f"{prefix}.input_scale": torch.tensor(1.0)}))
    assert "neither in the source nor asked for" in wrong("input", extra)
    unlisted = config(lambda section: section["quantized_layers"].pop(prefix))
    assert f"quantized_layers.{prefix} is missing" in wrong("unlisted", unlisted)
    other = config(lambda section: section["quantized_layers"][prefix].update(quant_algo="FP8"))
    assert "it should be 'FP8_PER_CHANNEL_PER_TOKEN'" in wrong("other", other)


def test_evaluation_refuses_what_doesn_t_fit_the_format(checkpoint, measured, tmp_path):
    scheme, good = checkpoint
    module = next(m for g in measured[0].groups if scheme.formats[g.name] == ROWS for m in g.modules)
    prefix = module.tensor.removesuffix(".weight")

    def changed(name, change, rewrite=None):
        directory = tmp_path / name
        shutil.copytree(good, directory)
        found = load_file(directory / "model.safetensors")
        change(found)
        save_file(found, directory / "model.safetensors", metadata={"format": "pt"})
        if rewrite:
            path = directory / "config.json"
            content = json.loads(path.read_text())
            rewrite(content["quantization_config"])
            path.write_text(json.dumps(content))
        return directory

    one = changed("one", lambda found: found.update({f"{prefix}.weight_scale": torch.tensor(1.0)}))
    with pytest.raises(ModelError, match=r"weight_scale is not \d+ positive float32 numbers"):
        load_checkpoint(one)
    extra = changed("extra", lambda found: found.update({f"{prefix}.input_scale": torch.tensor(1.0)}))
    with pytest.raises(ModelError, match="belongs to no weight whose format has it"):
        load_checkpoint(extra)
    unlisted = changed("unlisted", lambda _: None, lambda section: section["quantized_layers"].pop(prefix))
    with pytest.raises(ModelError, match="is stored as codes, but its quant_algo is None; known: FP8, FP8_PER"):
        load_checkpoint(unlisted)


def test_no_other_module_knows_a_format():
    """What a format is stands in `formats`; what a runtime makes of one in `runtimes`; verification says it again."""
    source = Path(bitladder.__file__).parent
    allowed = (
        "formats/",
        "runtimes/",
        "verification/",
        "demo/",
        "models/headers.py",
        "models/sources.py",
        "models/weights.py",
        "records/checkpoint.py",  # names of fields
    )
    for path in source.rglob("*.py"):
        name = path.relative_to(source).as_posix()
        if name.startswith(allowed):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant):
                assert node.value not in (448, 2688), name
                if isinstance(node.value, str) and not re.search(r"\s", node.value):
                    assert not re.search(r"F8_E4M3|E2M1|weight_scale|input_scale", node.value), (name, node.value)
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("float8"), name
