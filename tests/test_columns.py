"""Compensated codes in every format: on its grid, better than the nearest, exported, verified, simulated and scored."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bitladder.checkpoints.export import export
from bitladder.errors import RecordError
from bitladder.evaluation.evaluate import evaluate_checkpoint
from bitladder.evaluation.reference import Reference
from bitladder.evaluation.simulation import Simulation
from bitladder.formats import COMPRESSED_TENSORS, FORMATS, MODELOPT, get_format, integers
from bitladder.measured import Codes, codes_files, read_amax, read_codes
from bitladder.measuring import rounding
from bitladder.records import BF16, CheckpointManifest, Measurement
from bitladder.steps.measure import measure as measure_step
from bitladder.steps.measure import take_over
from bitladder.verification import verify
from broken_checkpoints import list_again
from conftest import llama_config, load_text, measure_text, save_model
from test_formats import assigned
from test_pipeline import work_of
from test_rounding import seen_by

EACH = sorted(FORMATS)
CHOSEN = [name for name in EACH if FORMATS[name].group_size is not None and name != "mxfp8"]  # scales, by error
MADE = [name for name in EACH if FORMATS[name].weight_like is None]
OF_CARRIER = {
    carrier: [name for name in EACH if carrier in FORMATS[name].layouts] for carrier in (MODELOPT, COMPRESSED_TENSORS)
}


@pytest.fixture(scope="module")
def drawn():
    """(weight [256, 384], its inputs): neighbours are alike, and some columns count more."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(256, 384, generator=generator) * torch.rand(256, 1, generator=generator)
    x = torch.randn(1000, 384, generator=generator).cumsum(1) / 384**0.5 * torch.rand(384, generator=generator)
    return weight, x


@pytest.fixture(scope="module")
def layer(drawn):
    """(weight, products of its inputs)."""
    weight, x = drawn
    return weight, x.t() @ x


def rounded(name, weight, products, damping=0.1, **changes):
    """(parts, `Rounded`, columns) of a weight."""
    format_ = get_format(name)
    columns = format_.columns(format_.amax_of(weight), len(weight))
    for key, value in changes.items():
        setattr(columns, key, value)
    found = rounding.compensated(weight, products, columns, damping)
    scales = format_.tensor_scales(format_.amax_of(weight))
    return columns.parts(found.values, found.scales) | scales, found, columns


@pytest.mark.parametrize("exponent", [-80, 80])
@pytest.mark.parametrize("name", EACH)
def test_weights_whose_squares_are_no_numbers_get_the_same_codes(name, exponent, layer):
    """A power of two changes no digit."""
    weight, products = layer
    by = 2.0**exponent
    assert torch.equal(rounded(name, weight * by, products)[1].values / by, rounded(name, weight, products)[1].values)


@pytest.mark.parametrize("name", EACH)
def test_what_is_stored_restores_what_was_chosen(name, layer):
    parts, found, _ = rounded(name, *layer)
    format_ = get_format(name)
    assert torch.equal(format_.decode(parts), found.values)
    stored = {part.name: part for part in format_.stored(layer[0].shape) if not part.counts}
    stored.pop("input_scale", None)
    assert {part: tensor.shape for part, tensor in parts.items()} == {
        part: torch.Size(one.shape) for part, one in stored.items()
    }
    steps = found.steps.repeat_interleave(384 // found.steps.shape[1], 1)
    farthest = ((found.values - layer[0]).abs() / steps).amax(1)
    assert torch.allclose(found.largest_shift(layer[0]), farthest, rtol=1e-5)
    # what lies on the grid is its own nearest: a step beside it lies as much farther
    worst = float(found.largest_shift(layer[0]).max())
    assert 0.4 < worst < 500


@pytest.mark.parametrize("name", EACH)
def test_without_correlation_and_candidates_codes_are_those_of_the_encoder(name, layer):
    """Which are ModelOpt's and compressed-tensors' own, bit for bit."""
    format_, weight = get_format(name), layer[0]
    parts, _, columns = rounded(name, weight, torch.eye(384), factors=(1.0,))
    again = rounding.nearest(weight, format_.columns(format_.amax_of(weight), len(weight)))
    assert all(torch.equal(part, parts[key]) for key, part in columns.parts(again.values, again.scales).items())
    encoded = format_.encode(weight, format_.amax_of(weight))
    for part, tensor in parts.items():
        same = tensor.reshape(-1).view(torch.uint8) == encoded[part].reshape(-1).view(torch.uint8)
        if name.startswith("nvfp4") and part == "weight":  # -0 has a code of its own; so has what is nearest to it
            restored = (format_.decode(parts), format_.decode(encoded))
            assert torch.equal(*restored)
            continue
        assert bool(same.all()), part


@pytest.mark.parametrize("name", EACH)
def test_the_outputs_error_falls(name, drawn):
    weight, x = drawn
    format_ = get_format(name)
    _, found, _ = rounded(name, weight, x.t() @ x)
    nearest = format_.decode(format_.encode(weight, format_.amax_of(weight)))
    errors = rounding.output_errors(weight, (found.values, nearest), x)
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_scales_are_better_than_those_of_the_largest_value(name, layer):
    weight, generator = layer[0], torch.Generator().manual_seed(1)
    shared = torch.randn(1000, 32, generator=generator) @ torch.randn(32, 384, generator=generator) / 6
    x = (torch.randn(1000, 384, generator=generator) + shared) * torch.rand(384, generator=generator)
    products = x.t() @ x
    many, one = (rounded(name, weight, products, **one)[1].values for one in ({}, {"factors": (1.0,)}))
    errors = rounding.output_errors(weight, (many, one), x)
    assert errors[0] <= (1 if name.startswith("int8") else 0.96) * errors[1]
    # without correlation each group has the candidate with the least error of its own
    diagonal = torch.diag(torch.linspace(1, 3, 384))
    best = rounded(name, weight, diagonal, 1e-6)[1]
    size, importance = get_format(name).group_size, diagonal.diagonal() ** 1

    def losses(values):
        return ((values - weight) ** 2 * importance).reshape(len(weight), -1, size).sum(-1)

    for factor in rounded(name, weight, diagonal)[2].factors:
        other = rounded(name, weight, diagonal, 1e-6, factors=(factor,))[1]
        assert bool((losses(best.values) <= losses(other.values) * (1 + 1e-5) + 1e-12).all()), factor


def test_which_formats_choose_scales():
    weight = torch.ones(256, 256)
    columns = {name: FORMATS[name].columns(FORMATS[name].amax_of(weight), 256) for name in EACH}
    assert [name for name, one in columns.items() if len(one.factors) > 1] == CHOSEN


def test_columns_that_share_a_scale_stay_together():
    diagonal = torch.tensor([1.0, 9.0, 2.0, 2.0, 30.0, 0.0, 7.0, 8.0])
    order, groups = rounding._order(diagonal, 2)
    assert groups == [2, 3, 0, 1]
    assert order.tolist() == [4, 5, 7, 6, 1, 0, 2, 3]
    assert rounding._order(diagonal, 1)[0].tolist() == [4, 1, 7, 6, 2, 3, 0, 5]


@pytest.mark.parametrize("name", CHOSEN)
def test_candidates_are_the_encoders_scales_of_smaller_and_larger_values(name, layer):
    format_, weight = get_format(name), layer[0].clone()
    weight[::2] = weight[::2].abs()  # whose zero points are at the end
    columns = format_.columns(format_.amax_of(weight), len(weight))
    size, factors = columns.size, torch.tensor(columns.factors)[:, None]
    found = columns.at([1]).scales(weight[:, size : 2 * size].t(), factors)
    assert found.shape[1:] == (len(columns.factors), len(weight))
    for index, factor in enumerate(columns.factors):
        parts = format_.encode(weight * factor, format_.amax_of(weight))
        assert torch.equal(found[0, index], parts["weight_scale"][:, 1].float()), factor
        if format_.zero_points:
            zeros = integers.unpacked_along_rows(parts["weight_zero_point"], format_.code_bits)[:, 1]
            assert torch.equal(found[1, index], zeros.float()), factor
    if format_.zero_points:
        assert float(found[1].min()) == -(2 ** (format_.code_bits - 1))


def test_the_largest_of_a_block_may_fall_on_four():
    """1.5 times the scale that puts it on 6: then all of these are codes."""
    weight = torch.tensor([4.0, 3, 2, 1.5, 1, 0.5, -4, -3, 3, 3, 2, -2, 4, 1, -1, 0.5]).repeat(16, 2)
    weight[:, 16:] *= 28  # then 16 is the first blocks' scale by the largest value, and 24 is a number of E4M3 too
    _, found, _ = rounded("nvfp4", weight, torch.eye(32))
    step = found.steps[:, :1]
    assert bool(((found.values[:, :16] / step).abs().amax(1) == 4).all())
    assert torch.allclose(found.values[:, :16], weight[:, :16], rtol=1e-6)


@pytest.mark.parametrize("name", EACH)
def test_what_lies_beyond_the_largest_code_is_the_largest(name, layer):
    """What other columns' errors added may be more than a scale was chosen for."""
    format_, weight = get_format(name), layer[0]
    columns = format_.columns(format_.amax_of(weight), len(weight))
    values = weight[:, : max(columns.size, 16)].t()
    columns = columns.at([0])
    scales = columns.scales(values[: columns.size], torch.ones(1, 1))[:, 0]
    end = columns.nearest(values[0].abs() * 1e4, scales)
    assert bool(torch.isfinite(end).all())
    assert torch.equal(columns.nearest(values[0].abs() * 2e4, scales), end)
    assert torch.equal(columns.nearest(end, scales), end)


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_damping_is_a_share_of_the_products(name, layer):
    weight, products = layer
    assert torch.equal(rounded(name, weight, products * 1024)[1].values, rounded(name, weight, products)[1].values)


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "int4_w4a16_asym"])
def test_errors_are_spread_over_all_columns_that_are_to_come(name, layer, monkeypatch):
    """At once within some, and over the rest by one product: which they are changes the order of sums alone."""
    found = []
    for together in (128, 384):
        monkeypatch.setattr(rounding, "_COLUMNS_AT_ONCE", together)
        found.append(rounded(name, *layer)[1].values)
    assert float((found[0] == found[1]).float().mean()) > 0.98


# --- end to end -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(wide_llama) -> Path:
    return wide_llama


@pytest.fixture(scope="module")
def measured(llama, text_file, tmp_path_factory):
    """(measurement, its directory) of compensated codes in all formats."""
    output = tmp_path_factory.mktemp("measured")
    settings = {"formats": tuple(EACH), "rounding": "compensated", "samples": 16}
    return measure_text(llama, text_file, output, **settings), output


def mix_of(measurement, carrier):
    names = [*OF_CARRIER[carrier], BF16]
    return assigned(measurement, f"mix_{carrier}", lambda index, _: names[index % len(names)])


def whole_of(measurement, name):
    return assigned(measurement, name, lambda *_: name)


@pytest.fixture(scope="module")
def exported(llama, measured, tmp_path_factory):
    """{scheme's name: (scheme, carrier, directory)}: a mix by each carrier, and every format alone by the last."""
    measurement, directory = measured
    amax, codes = read_amax(measurement, directory), read_codes(measurement, directory)
    root = tmp_path_factory.mktemp("exported")
    schemes = [(mix_of(measurement, carrier), carrier) for carrier in OF_CARRIER]
    schemes += [(whole_of(measurement, name), COMPRESSED_TENSORS) for name in OF_CARRIER[COMPRESSED_TENSORS]]
    for scheme, carrier in schemes:
        export(scheme, measurement, amax, llama, root / scheme.name, codes=codes, carrier=carrier)
    return {scheme.name: (scheme, carrier, root / scheme.name) for scheme, carrier in schemes}


def test_every_format_has_codes_of_its_own(measured):
    measurement, output = measured
    assert Measurement.read(output / "measurement.json") == measurement
    names = [module.name for group in measurement.groups for module in group.modules]
    known = {(module.name, module.format) for module in measurement.rounding.modules}
    assert known == {(name, format_) for name in names for format_ in MADE}
    codes = read_codes(measurement, output)
    for name in EACH:  # W4A16 has the codes of W4A4
        assert "weight" in codes.parts(names[0], get_format(name))
    for module in measurement.rounding.modules:
        assert (module.output_error < module.nearest_output_error) != module.nearest_taken, (module.name, module.format)
        assert bool(module.scales_sha256) == (FORMATS[module.format].group_size is not None)


def test_a_format_alone_has_the_codes_that_it_has_among_others(llama, text_file, measured, tmp_path):
    for name in ("nvfp4", "int4_w4a16_asym_g64"):
        alone = measure_text(
            llama, text_file, tmp_path / name, formats=(name,), rounding="compensated", samples=16
        ).rounding
        among = [module for module in measured[0].rounding.modules if module.format == name]
        assert [m.codes_sha256 for m in alone.modules] == [m.codes_sha256 for m in among]
    # codes of W4A16 by itself are made for inputs that aren't rounded
    only = measure_text(
        llama, text_file, tmp_path / "only", formats=("nvfp4_w4a16",), rounding="compensated", samples=16
    ).rounding
    assert {module.format for module in only.modules} == {"nvfp4_w4a16"}


def test_products_are_those_of_inputs_as_they_are_served(llama, text_file, measured):
    """The recorded errors again, of transformers' and torch's own passes of the last of sixteen rows."""
    measurement, output = measured
    amax, codes = read_amax(measurement, output), read_codes(measurement, output)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    names = [module.name for group in measurement.groups[:2] for module in group.modules]
    seen, gradients = seen_by(model, names, load_text(llama, text_file, samples=16).batches)
    for record in measurement.rounding.modules:
        if record.name not in seen:
            continue
        format_ = get_format(record.format)
        scale = format_.input_scale(amax[f"{record.name}.input_amax"]) if format_.has_input_scale else None
        x = format_.round_input(seen[record.name][15:].flatten(0, 1), scale)
        x = x * (gradients[record.name][15:].flatten(0, 1).norm(dim=1) / x.norm(dim=1)).sqrt()[:, None]
        weight = model.get_parameter(f"{record.name}.weight").detach()
        parts = {part: codes.read(record.name, format_, part) for part in codes.parts(record.name, format_)}
        restored = format_.decode(parts | format_.tensor_scales(amax[format_.weight_key(record.name)]))
        error = float((x @ (weight - restored).t()).norm() / (x @ weight.t()).norm())
        assert record.output_error == pytest.approx(error, rel=1e-3), (record.name, record.format)
        if record.format == "int8":  # how far off is of each module of a group
            scales = format_.tensor_scales(amax[format_.weight_key(record.name)])["weight_scale"]
            steps = parts["weight"].float() - weight / scales[:, None]
            assert record.largest_shift == pytest.approx(float(steps.abs().max()), rel=1e-4), record.name


def test_checkpoints_verify(llama, measured, exported):
    measurement, directory = measured
    amax = read_amax(measurement, directory)
    for scheme, carrier, path in exported.values():
        found = verify([scheme], measurement, amax, llama, {scheme.name: path}, carrier=carrier).checkpoints[0]
        assert found.findings == (), scheme.name
        manifest = CheckpointManifest.read(path / CheckpointManifest.FILE_NAME)
        assert {module.rounding for module in manifest.modules} == {"compensated"}


def test_a_simulated_scheme_equals_the_exported_checkpoint(llama, text_file, measured, exported):
    measurement, directory = measured
    amax, codes = read_amax(measurement, directory), read_codes(measurement, directory)
    data = load_text(llama, text_file, samples=4, avoid=measurement.calibration)
    with Reference.compute(llama, data) as reference:
        for scheme, carrier, path in exported.values():
            simulation = Simulation(llama, measurement, amax, "cpu", codes, carrier)
            assert simulation.results([reference], scheme) == evaluate_checkpoint([reference], path).results


def rewritten(path, change):
    """Change a checkpoint's tensors in place, and its manifest's digest of the file."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    list_again(path)


PARTS = [
    (name, part)
    for name in OF_CARRIER[COMPRESSED_TENSORS]
    for part in ("weight", "weight_scale", "weight_zero_point")
    if part == "weight" or part in FORMATS[name].scale_names
]


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_other_codes_and_scales_are_found(llama, measured, exported, tmp_path, name, part):
    """One bit of one number: whatever it is, the file isn't the one that was measured."""
    measurement, directory = measured
    format_ = get_format(name)
    scheme, carrier, source = exported[name]
    path = shutil.copytree(source, tmp_path / name)
    module = CheckpointManifest.read(path / CheckpointManifest.FILE_NAME).modules[0]
    stored = f"{module.tensor.removesuffix('.weight')}.{format_.layouts[carrier].name(part)}"

    def flip(tensors):
        numbers = tensors[stored].reshape(-1).view(torch.uint8)
        numbers[0] ^= 1

    rewritten(path, flip)
    amax = read_amax(measurement, directory)
    found = verify([scheme], measurement, amax, llama, {name: path}, carrier=carrier).checkpoints[0].findings
    assert any(finding.tensor == stored for finding in found), found


def test_codes_that_are_only_said_to_be_the_measured_ones_are_far_off(llama, measured, exported, tmp_path):
    """A record that says whatever the file holds: the distance from the source still counts."""
    measurement, directory = measured
    name = "int4_w4a16_g64"
    scheme, carrier, source = exported[name]
    path = shutil.copytree(source, tmp_path / name)
    module = measurement.rounding.modules[0].name
    stored = f"{module}.weight_packed"
    rewritten(path, lambda tensors: tensors[stored].neg_())
    digest = hashlib.sha256(load_file(path / "model.safetensors")[stored].numpy().tobytes()).hexdigest()
    modules = tuple(
        one.model_copy(update={"codes_sha256": digest}) if (one.name, one.format) == (module, name) else one
        for one in measurement.rounding.modules
    )
    told = measurement.model_copy(update={"rounding": measurement.rounding.model_copy(update={"modules": modules})})
    told_scheme = scheme.model_copy(update={"measurement_sha256": told.fingerprint()})
    amax = read_amax(measurement, directory)
    found = verify([told_scheme], told, amax, llama, {name: path}, carrier=carrier).checkpoints[0].findings
    assert any("farther from the source than was recorded" in one.problem for one in found if one.tensor == stored)


def test_kl_of_one_group_is_the_simulated_one(llama, text_file, tmp_path):
    settings = {"formats": ("nvfp4", "int4_w4a16_g64"), "rounding": "compensated", "method": "kl_div", "samples": 16}
    measurement = measure_text(llama, text_file, tmp_path, **settings)
    amax, codes = read_amax(measurement, tmp_path), read_codes(measurement, tmp_path)
    simulation = Simulation(llama, measurement, amax, "cpu", codes, COMPRESSED_TENSORS)
    data = load_text(llama, text_file, samples=16)
    with Reference.compute(llama, data, split="calibration") as reference:
        for candidate in measurement.candidates[:4]:
            own, name = candidate.group, candidate.format
            scheme = assigned(measurement, "one", lambda _, g, own=own, name=name: name if g.name == own else BF16)
            kl = simulation.results([reference], scheme)[0].value
            assert measurement.sensitivity(candidate) == pytest.approx(kl, rel=2e-3)


def test_codes_of_an_earlier_version_are_not_taken_for_ours(measured, tmp_path):
    """They lay under a module's name alone."""
    measurement, output = measured
    path = codes_files(output / "codes")[0]
    tensors = {"model.layers.0.mlp.down_proj": next(iter(load_file(path).values()))}
    save_file(tensors, tmp_path / path.name)
    assert set(Codes.in_files([tmp_path / path.name]).files) == {"model.layers.0.mlp"}


def without_formats(measurement):
    """The record as an earlier version wrote it, which made codes of one format."""
    modules = tuple(one.model_copy(update={"format": "", "scales_sha256": {}}) for one in measurement.rounding.modules)
    return measurement.model_copy(
        update={"rounding": measurement.rounding.model_copy(update={"modules": modules}), "settings_sha256": "0" * 64}
    )


def test_codes_that_two_files_have_are_refused(measured, tmp_path):
    path = codes_files(measured[1] / "codes")[0]
    shutil.copy(path, tmp_path / "other.safetensors")
    with pytest.raises(RecordError, match="both have codes of"):
        Codes.in_files([path, tmp_path / "other.safetensors"])


def test_a_run_of_an_earlier_version_is_measured_again(llama, text_file, tmp_path):
    settings = {"engine": "native", "formats": ("fp8",), "rounding": "compensated"}
    output, said = tmp_path / "run", []

    def work():
        found = work_of((llama, text_file, text_file), output, controls={"kinds": []}, measurement=settings)
        found.tell = said.append
        return found

    now = measure_step(work())
    earlier = without_formats(now)
    earlier.write(output / "measurement.json")
    with pytest.raises(RecordError, match="codes of an earlier version's kind; run `bitladder measure` again"):
        read_codes(earlier, output)
    other = work_of((llama, text_file, text_file), tmp_path / "other", controls={"kinds": []})
    with pytest.raises(RecordError, match="codes of an earlier version's kind; measure again where it was made"):
        take_over(other, output / "measurement.json")
    again = measure_step(work())
    reasons = [line for line in said if line.startswith("measuring again")]
    assert reasons == ["measuring again: an earlier version made its compensated codes"]
    assert again.rounding == now.rounding


def test_checkpoints_of_an_earlier_version_still_verify(llama, text_file, tmp_path):
    measurement = measure_text(llama, text_file, tmp_path, formats=("fp8",), rounding="compensated")
    amax, codes = read_amax(measurement, tmp_path), read_codes(measurement, tmp_path)
    scheme = whole_of(measurement, "fp8")
    export(scheme, measurement, amax, llama, tmp_path / "fp8", codes=codes)
    earlier = without_formats(measurement)
    scheme = scheme.model_copy(update={"measurement_sha256": earlier.fingerprint()})
    manifest = CheckpointManifest.read(tmp_path / "fp8" / CheckpointManifest.FILE_NAME)
    wanted = {"scheme_sha256": scheme.fingerprint(), "measurement_sha256": earlier.fingerprint()}
    manifest.model_copy(update=wanted).write(tmp_path / "fp8" / CheckpointManifest.FILE_NAME)
    found = verify([scheme], earlier, amax, llama, {"fp8": tmp_path / "fp8"}).checkpoints[0].findings
    assert not [one for one in found if one.tensor], found


def test_codes_of_a_model_in_fp16_verify_where_it_was_measured_in_bf16(text_file, tmp_path):
    """They are as far from the weights that were measured as was recorded; from those of the file a little farther."""
    config = llama_config(hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    path = save_model(transformers.LlamaForCausalLM, config, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.0007)  # into digits that BF16 hasn't
    model.save_pretrained(path)
    settings = {"formats": ("fp8", "int8", "nvfp4"), "rounding": "compensated", "dtype": "bfloat16"}
    measurement = measure_text(path, text_file, tmp_path / "run", **settings)
    amax, codes = (read(measurement, tmp_path / "run") for read in (read_amax, read_codes))
    for name in settings["formats"]:
        scheme, directory = whole_of(measurement, name), tmp_path / name
        export(scheme, measurement, amax, path, directory, codes=codes, carrier=COMPRESSED_TENSORS)
        found = verify([scheme], measurement, amax, path, {name: directory}, carrier=COMPRESSED_TENSORS)
        assert found.checkpoints[0].findings == ()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
def test_the_outputs_error_is_one_of_any_magnitude(drawn, size):
    weight, x = drawn
    assert rounding.output_errors(weight * size, (weight * 1.25 * size,), x) == pytest.approx([0.25], rel=1e-5)
    assert rounding.output_errors(weight * 0, (weight * 0,), x) == [0]


def test_both_engines_make_the_same_codes_of_weights_of_one_block_too(text_file, tmp_path):
    """ModelOpt's amax of one block has no dimensions."""
    config = llama_config(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_key_value_heads=2)
    path = save_model(transformers.LlamaForCausalLM, config, tmp_path / "model")
    settings = {"formats": ("fp8", "fp8_block", "int8"), "rounding": "compensated", "method": "gradient"}
    ours, theirs = (
        measure_text(path, text_file, tmp_path / engine, engine=engine, **settings) for engine in ("native", "modelopt")
    )
    assert ours.rounding.modules == theirs.rounding.modules
    for engine in ("native", "modelopt"):
        amax = load_file(tmp_path / engine / "measurement.safetensors")
        assert amax["model.layers.0.self_attn.o_proj.block_amax"].shape == (1, 1)
