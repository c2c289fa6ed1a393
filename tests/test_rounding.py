"""Compensated codes: ModelOpt's own GPTQ gives the same; they are exported, verified, simulated and scored."""

import dataclasses
import functools
import hashlib
import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from bitladder import planning
from bitladder.checkpoints.export import export, export_all
from bitladder.data.batches import Batch
from bitladder.errors import EngineError, MeasurementError, RecordError
from bitladder.evaluation.evaluate import evaluate_checkpoint
from bitladder.evaluation.reference import Reference
from bitladder.evaluation.simulation import Simulation
from bitladder.formats import get_format, grids
from bitladder.measured import read_amax, read_codes
from bitladder.measuring import compensation, layers, rounding
from bitladder.models.loading import load_model
from bitladder.recipe import HeldOutSpec, MeasureSpec
from bitladder.records import CheckpointManifest, Measurement
from bitladder.steps.export import export as export_step
from bitladder.steps.measure import take_over
from bitladder.steps.plan import plan
from bitladder.steps.run import run as run_step
from bitladder.verification import verify
from broken_checkpoints import list_again
from conftest import load_text, measure_text, spec
from test_native import measured_by, pairs
from test_pipeline import work_of
from test_positions import MODEL

COMPENSATED = {"rounding": "compensated"}
FP8 = get_format("fp8")


def correlated(tokens, features, seed=0):
    """Inputs [tokens, features] of which each is much like its neighbours."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, features, generator=generator).cumsum(1) / features**0.5


def codes_of(weight, products, amax, damping, **options):
    columns = get_format("fp8").columns(amax, len(weight))
    found = rounding.compensated(weight, products, columns, damping, **options)
    return columns.parts(found.values, found.scales)["weight"]


@pytest.fixture
def layer():
    """(weight [24, 160], products of its inputs, amax)."""
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(1))
    x = correlated(1000, 160)
    return weight, x.t() @ x, weight.abs().amax()


def test_codes_are_those_of_modelopts_gptq(layer):
    from modelopt.torch.quantization.utils.calib_utils import compute_hessian_inverse, gptq_blockwise_update

    weight, products, amax = layer
    order = torch.argsort(products.diagonal(), descending=True)
    theirs = weight[:, order].clone()
    inverse = compute_hessian_inverse(products[order][:, order], theirs, 0.01)
    scale = grids.scale_of(amax)
    gptq_blockwise_update(theirs, inverse, 64, lambda w: grids.dequantise(grids.quantise(w, amax), scale))
    ours = codes_of(weight, products, amax, 0.01, sweeps=0)
    assert ours.dtype == torch.float8_e4m3fn
    same = grids.dequantise(ours, scale)[:, order] == theirs
    assert same.float().mean() > 0.999  # a float32 sum in another order may lie on the other side of a boundary


def test_the_outputs_error_falls(layer):
    weight, products, amax = layer
    codes = codes_of(weight, products, amax, 0.01), grids.quantise(weight, amax)
    restored = [grids.dequantise(some, grids.scale_of(amax)) for some in codes]
    x = correlated(1000, 160)
    exact = x @ weight.t()
    direct = [float((x @ some.t() - exact).norm() / exact.norm()) for some in restored]
    assert rounding.output_errors(weight, restored, x) == pytest.approx(direct, rel=1e-3)
    assert direct[0] < 0.5 * direct[1]


@pytest.mark.parametrize("name", ["fp8", "fp8_pc_pt", "nvfp4", "mxfp8", "int4_w4a16_asym_g64"])
def test_a_sweep_is_coordinate_descent(layer, name):
    """Column after column takes its best value beside the others: in float64, one by one, from GPTQ's codes on."""
    weight, products = layer[0][:, :128], layer[1][:128, :128]  # whole groups
    format_ = get_format(name)
    amax = format_.amax_of(weight)
    columns = format_.columns(amax, len(weight))
    before = rounding.compensated(weight, products, columns, 0.01, sweeps=0)
    after = rounding.compensated(weight, products, columns, 0.01)
    exact, hessian = weight.double(), products.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(128)

    def cost(values):
        error = exact - values.double()
        return ((error @ hessian) * error).sum(1)

    assert (cost(after.values) <= cost(before.values) * (1 + 1e-5)).all()
    assert cost(after.values).sum() < cost(before.values).sum()
    stored = columns.parts(after.values, after.scales) | format_.tensor_scales(amax)
    torch.testing.assert_close(format_.decode(stored), after.values)
    values, size = before.values.double(), columns.size
    groups = torch.argsort(products.diagonal().view(-1, size).sum(1), descending=True, stable=True)
    for group in groups.tolist():
        own, scales = columns.at([group]), before.scales[..., group if before.scales.shape[-1] > 1 else 0]
        for column in (group * size + products.diagonal().view(-1, size)[group].argsort(descending=True)).tolist():
            best = values[:, column] + ((exact - values) @ hessian[:, column]) / hessian[column, column]
            values[:, column] = own.nearest(best.float(), scales).double()
    assert (after.values == values).float().mean() > 0.99  # a sum in another order may lie on the other side
    assert torch.equal(after.scales, before.scales)


def test_without_correlation_the_nearest_codes_are_the_best(layer):
    weight, _, amax = layer
    codes = codes_of(weight, torch.eye(160), amax, 0.01)
    assert torch.equal(codes.view(torch.uint8), grids.quantise(weight, amax).view(torch.uint8))
    far = codes_of(weight, layer[1], amax, 1e9)
    assert torch.equal(far.view(torch.uint8), grids.quantise(weight, amax).view(torch.uint8))


def test_products_that_have_no_inverse_are_refused(layer):
    weight, _, amax = layer
    with pytest.raises(MeasurementError, match="not positive definite.*raise measurement.damping"):
        codes_of(weight, torch.zeros(160, 160), amax, 0.1)


@pytest.fixture(scope="module")
def compensated(llama, text_file, tmp_path_factory):
    """(measurement with compensated codes, its directory) of the tiny Llama."""
    output = tmp_path_factory.mktemp("compensated")
    return measure_text(llama, text_file, output, **COMPENSATED), output


def test_every_module_has_its_codes_and_a_smaller_error(compensated):
    measurement, output = compensated
    names = [module.name for group in measurement.groups for module in group.modules]
    rounding_ = measurement.rounding
    assert [module.name for module in rounding_.modules] == names
    assert rounding_.scored
    assert rounding_.samples == 6
    for module in rounding_.modules:
        assert 0 < module.output_error <= module.nearest_output_error
        assert (module.output_error < module.nearest_output_error) != module.nearest_taken
        assert module.largest_shift > 0
    assert sum(module.nearest_taken for module in rounding_.modules) < len(names) / 2
    stored = {name: codes for path in sorted((output / "codes").iterdir()) for name, codes in load_file(path).items()}
    assert set(stored) == {f"{name}.fp8.weight" for name in names}
    assert Measurement.read(output / "measurement.json") == measurement
    assert not (output / "measuring").exists()


def seen_by(model, names, batches):
    """Inputs [rows, tokens, features] of modules, and the gradient by their outputs of labels that the model draws.

    From transformers' own forward pass and torch's backward pass of the whole model; random signs stand for the labels.
    """
    inputs, outputs, gradients, hooks = {}, {}, {}, []

    def keep(module, args, output, name):
        inputs.setdefault(name, []).append(args[0].detach())
        outputs[name] = output

    for name in names:
        hooks.append(model.get_submodule(name).register_forward_hook(functools.partial(keep, name=name)))
    for batch in batches:
        logits = model(**batch.inputs).logits[:, :-1].flatten(0, 1)
        seed = hashlib.sha256(batch.inputs["input_ids"].numpy().tobytes()).hexdigest()[:15]
        generator = torch.Generator().manual_seed(int(seed, 16))
        signs = 2.0 * torch.randint(0, 2, logits.shape, generator=generator, dtype=torch.int8) - 1
        p = logits.detach().softmax(-1)
        drawn = p.sqrt() * signs - p * (p.sqrt() * signs).sum(-1, keepdim=True)  # covariance diag(p) - p pT
        found = torch.autograd.grad(logits, [outputs[name] for name in names], drawn)
        for name, gradient in zip(names, found, strict=True):
            gradients.setdefault(name, []).append(gradient)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(some) for name, some in inputs.items()}, {
        n: torch.cat(some) for n, some in gradients.items()
    }


def test_codes_are_made_from_some_rows_and_checked_on_others(llama, text_file, compensated):
    """Codes and recorded errors again, from transformers' and torch's own passes: of six rows the last one checks."""
    measurement, output = compensated
    amax, codes = read_amax(measurement, output), read_codes(measurement, output)
    model, names = load_model(llama, torch.float32), [module.name for module in measurement.rounding.modules]
    inputs, gradients = seen_by(model, names, load_text(llama, text_file).batches)
    for module in measurement.rounding.modules:
        scale = grids.scale_of(amax[f"{module.name}.input_amax"])
        lengths = gradients[module.name].norm(dim=2, keepdim=True)
        x = grids.fake_quantise(inputs[module.name], scale)
        x = x * (lengths / lengths.mean() / x.norm(dim=2, keepdim=True)).sqrt()
        made_from, checked = x[:5].flatten(0, 1), x[5]
        weight, weight_amax = model.get_parameter(f"{module.name}.weight").detach(), amax[f"{module.name}.weight_amax"]
        ours, scale = codes.read(module.name, FP8, "weight"), grids.scale_of(weight_amax)
        error = (checked @ (weight - grids.dequantise(ours, scale)).t()).norm() / (checked @ weight.t()).norm()
        assert module.output_error == pytest.approx(float(error), rel=1e-3)
        wanted = codes_of(weight, made_from.t() @ made_from, weight_amax, 0.1)
        if module.nearest_taken:
            wanted = grids.quantise(weight, weight_amax)
        assert (ours.float() == wanted.float()).float().mean() > 0.99  # sums in another order


def of_rows(ids, part=0, batch=2):
    """Batches of rows of tokens, which are of one set."""
    split = ids.split(batch)
    return [Batch({"input_ids": some, "attention_mask": torch.ones_like(some)}, some, part) for some in split]


def strange(llama, text_file, where):
    """A data set whose rows repeat one of two tokens each, but for those that check the codes of one set or of none.

    Of the first set's eight rows the eighth checks, of the second one's two the last.
    """
    generator = torch.Generator().manual_seed(0)
    ids = (5 + torch.arange(10) % 2)[:, None].repeat(1, 24)
    for row in {"nowhere": (), "first": (7,), "second": (9,)}[where]:
        ids[row] = torch.randint(20, 380, (24,), generator=generator)
    batches = of_rows(ids[:8]) + of_rows(ids[8:], part=1, batch=1)
    return dataclasses.replace(load_text(llama, text_file, samples=10), batches=tuple(batches))


@pytest.mark.parametrize(("where", "least", "most"), [("nowhere", 0.0, 0.3), ("first", 0.9, 1.0), ("second", 0.9, 1.0)])
def test_what_loses_on_rows_of_any_set_has_the_nearest_codes(llama, text_file, tmp_path, where, least, most):
    formats = ("fp8", "nvfp4")
    data = strange(llama, text_file, where)
    settings = {**COMPENSATED, "formats": formats, "damping": 1e-4, "method": "gradient"}
    measurement = measured_by("native", llama, data, tmp_path, **settings)
    amax, codes = read_amax(measurement, tmp_path), read_codes(measurement, tmp_path)
    model, modules = load_model(llama, torch.float32), measurement.rounding.modules
    for module in modules:
        format_ = get_format(module.format)
        parts = codes.parts(module.name, format_)
        encoded = format_.encode(model.get_parameter(f"{module.name}.weight"), amax[format_.weight_key(module.name)])
        restored, nearest = (format_.decode(encoded | some) for some in (parts, {}))
        assert torch.equal(restored, nearest) == module.nearest_taken, module.name
        assert (module.output_error == module.nearest_output_error) == module.nearest_taken
    assert least <= sum(module.nearest_taken for module in modules) / len(modules) <= most
    schemes = [planning.plan(measurement, spec(name, coverage=1.0, format=name)) for name in formats]
    directories = {scheme.name: tmp_path / scheme.name for scheme in schemes}
    export_all(schemes, measurement, amax, llama, directories, codes=codes)
    assert verify(schemes, measurement, amax, llama, directories).ok


def test_an_input_counts_by_its_length_and_its_gradients():
    inputs = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-16, 4e-16], [3e15, -4e15]])
    weighed = compensation._weighed(inputs, torch.tensor([[20.0], [1e6], [20.0], [0.0]]))
    wanted = torch.tensor([[6.0, 8.0], [0.0, 0.0], [6e-8, 8e-8], [0.0, 0.0]])
    torch.testing.assert_close(weighed, wanted, rtol=1e-6, atol=0)


def test_rows_that_check_lie_evenly_in_every_set():
    ids = torch.arange(96)[:, None].repeat(1, 3)
    batches = [one for pair in zip(of_rows(ids[:48], 0), of_rows(ids[48:], 1), strict=True) for one in pair]
    batches += of_rows(ids[:1], 2)
    batches[1].inputs["attention_mask"][1, 2] = 0  # padding
    uses = compensation._uses(batches, "cpu")
    checks = {part: [] for part in range(3)}
    for batch, use in zip(batches, uses, strict=True):
        assert use.part == batch.part
        checks[use.part] += batch.inputs["input_ids"][use.checked.any(1), 0].tolist()
        counted = batch.inputs["attention_mask"].bool()
        both = use.made_from.int() + use.checked.int()
        assert torch.equal(both, counted.int() * (2 if use.part == 2 else 1))  # a set's only row does both
    assert checks == {0: [15, 31, 47], 1: [63, 79, 95], 2: [0]}
    many = compensation._uses(of_rows(torch.zeros(160, 600)), "cpu")
    assert sum(int(use.checked.sum()) for use in many) == 8 * 512  # enough to compare two roundings
    assert sum(int(use.made_from.sum()) for use in many) == 152 * 600


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        (1, [0]),
        (2, [1]),
        (15, [14]),
        (16, [15]),
        (17, [16]),
        (31, [30]),
        (33, [16, 32]),
        (300, [37, 74, 112, 149, 187, 224, 262, 299]),
    ],
)
def test_one_row_in_sixteen_of_each_set_checks(size, rows):
    """As the guide says: of less than sixteen one, of more than 128 eight; with another set and with padding, too."""
    ids = torch.arange(size)[:, None].repeat(1, 5)
    other = of_rows(torch.arange(2)[:, None].repeat(1, 5), part=1, batch=1)
    batches = [other[0], *of_rows(ids, batch=4), other[1]]
    for batch in batches:
        batch.inputs["attention_mask"][:, :3] = 0  # on the left
    uses = compensation._uses(batches, "cpu")
    for part, wanted in ((0, rows), (1, [1])):
        own = [
            (batch.inputs["input_ids"][:, 0], use) for batch, use in zip(batches, uses, strict=True) if use.part == part
        ]
        checked, made_from = (torch.cat([getattr(use, what) for _, use in own]) for what in ("checked", "made_from"))
        assert torch.cat([row for row, _ in own])[checked[:, 4]].tolist() == wanted
        assert int(checked.sum()) == 2 * len(wanted)
        assert not (checked | made_from)[:, :3].any()
        assert torch.equal(made_from[:, 4], ~checked[:, 4] | (len(checked) == 1))


def test_both_engines_make_the_same_codes(llama, text_file, tmp_path, compensated):
    by_modelopt = measure_text(llama, text_file, tmp_path, engine="modelopt", rounding="compensated")
    ours, theirs = compensated[0].rounding, by_modelopt.rounding
    assert [m.codes_sha256 for m in ours.modules] == [m.codes_sha256 for m in theirs.modules]
    assert not theirs.scored  # ModelOpt's scores are those of the nearest codes
    nearest = measure_text(llama, text_file, tmp_path, engine="modelopt")
    assert nearest.candidates == by_modelopt.candidates
    assert nearest.rounding is None
    assert not (tmp_path / "codes").exists()  # of the measurement before


@pytest.mark.parametrize("method", ["gradient", "fisher", "kl_div"])
def test_scores_are_those_of_the_codes(llama, text_file, tmp_path, method):
    measurement = measure_text(llama, text_file, tmp_path, **COMPENSATED, method=method)
    nearest = measure_text(llama, text_file, tmp_path / "nearest", engine="native", method=method)
    total, before = (sum(m.sensitivity(c) for c in m.candidates) for m in (measurement, nearest))
    assert total < before
    if method != "kl_div":
        return
    amax, codes = read_amax(measurement, tmp_path), read_codes(measurement, tmp_path)
    simulation = Simulation(llama, measurement, amax, "cpu", codes)
    with Reference.compute(llama, load_text(llama, text_file), split="calibration") as reference:
        for candidate in measurement.candidates[:3]:
            scheme = planning.plan(measurement, spec("one", include=[candidate.group]))
            kl = simulation.results([reference], scheme)[0].value
            assert measurement.sensitivity(candidate) == pytest.approx(kl, rel=1e-3)


@pytest.fixture(scope="module")
def exported(llama, compensated, tmp_path_factory):
    """(schemes, {name: directory}) with compensated codes."""
    measurement, directory = compensated
    amax, codes = read_amax(measurement, directory), read_codes(measurement, directory)
    schemes = planning.plan_all(measurement, [spec("half", coverage=0.5), spec("all", coverage=1.0)])
    output = tmp_path_factory.mktemp("exported")
    directories = {scheme.name: output / scheme.name for scheme in schemes}
    export_all(schemes, measurement, amax, llama, directories, codes=codes)
    return schemes, directories


def test_checkpoints_hold_the_codes_and_verify(llama, compensated, exported):
    measurement, directory = compensated
    schemes, directories = exported
    codes = read_codes(measurement, directory)
    for scheme in schemes:
        manifest = CheckpointManifest.read(directories[scheme.name] / CheckpointManifest.FILE_NAME)
        tensors = load_file(directories[scheme.name] / "model.safetensors")
        assert {module.rounding for module in manifest.modules} == {"compensated"}
        for module in manifest.modules:
            assert torch.equal(
                tensors[module.tensor].view(torch.uint8),
                codes.read(module.name, FP8, "weight").view(torch.uint8),
            )
    assert verify(schemes, measurement, read_amax(measurement, directory), llama, directories).ok


def test_files_have_the_layout_of_nearest_codes(llama, text_file, exported, tmp_path):
    measurement = measure_text(llama, text_file, tmp_path / "nearest", engine="native")
    amax = read_amax(measurement, tmp_path / "nearest")
    scheme = planning.plan(measurement, spec("all", coverage=1.0))
    export(scheme, measurement, amax, llama, tmp_path / "all")
    nearest, ours = (load_file(path / "model.safetensors") for path in (tmp_path / "all", exported[1]["all"]))
    assert {name: (t.dtype, t.shape) for name, t in nearest.items()} == {
        name: (t.dtype, t.shape) for name, t in ours.items()
    }
    raw = [{name: tensor.reshape(-1).view(torch.uint8) for name, tensor in t.items()} for t in (nearest, ours)]
    differing = {name for name in nearest if not torch.equal(raw[0][name], raw[1][name])}
    assert differing
    assert all(nearest[name].dtype == torch.float8_e4m3fn for name in differing)  # the same scales
    for name in ("config.json", "hf_quant_config.json"):
        assert (tmp_path / "all" / name).read_bytes() == (exported[1]["all"] / name).read_bytes()


@pytest.mark.parametrize("how", ["nearest", "far"])
def test_other_codes_are_found(llama, compensated, exported, tmp_path, how):
    measurement, directory = compensated
    amax = read_amax(measurement, directory)
    schemes, directories = exported
    shutil.copytree(directories["all"], tmp_path / "all")
    path = tmp_path / "all/model.safetensors"
    tensors, source = load_file(path), load_file(llama / "model.safetensors")
    manifest = CheckpointManifest.read(tmp_path / "all" / CheckpointManifest.FILE_NAME)
    module = manifest.modules[0]
    if how == "nearest":
        tensors[module.tensor] = (source[module.tensor].float() / module.weight_scale).to(torch.float8_e4m3fn)
    else:
        tensors[module.tensor][0, 0] = -tensors[module.tensor][0].float().abs().amax()
    save_file(tensors, path, metadata={"format": "pt"})
    list_again(tmp_path / "all")
    result = verify(schemes[1:], measurement, amax, llama, {"all": tmp_path / "all"})
    problems = [(finding.tensor, finding.problem) for finding in result.checkpoints[0].findings]
    assert (module.tensor, "its codes are not the compensated ones of the measurement") in problems
    farther = [problem for _, problem in problems if "farther from the source than was recorded" in problem]
    assert len(farther) == (how == "far")


def test_a_simulated_scheme_equals_the_exported_checkpoint(llama, text_file, compensated, exported):
    measurement, directory = compensated
    amax, codes = read_amax(measurement, directory), read_codes(measurement, directory)
    data = load_text(llama, text_file, samples=4, avoid=measurement.calibration)
    simulation = Simulation(llama, measurement, amax, "cpu", codes)
    with Reference.compute(llama, data) as reference:
        for scheme in exported[0]:
            on_disk = evaluate_checkpoint([reference], exported[1][scheme.name])
            assert simulation.results([reference], scheme) == on_disk.results


def test_codes_of_the_wrong_kind_are_refused(llama, compensated, measured, tmp_path):
    measurement, directory = compensated
    amax = read_amax(measurement, directory)
    scheme = planning.plan(measurement, spec("all", coverage=1.0))
    with pytest.raises(MeasurementError, match="no codes were given, the measurement has compensated ones"):
        export(scheme, measurement, amax, llama, tmp_path / "x")
    codes = read_codes(measurement, directory)
    with pytest.raises(MeasurementError, match="compensated codes were given, the measurement has no"):
        Simulation(llama, measured[0], amax, "cpu", codes)


def test_changed_code_files_are_refused(compensated, tmp_path):
    measurement, directory = compensated
    shutil.copytree(directory / "codes", tmp_path / "codes")
    first = sorted((tmp_path / "codes").iterdir())[0]
    with first.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(RecordError, match="is not the file that measurement.json was written with"):
        read_codes(measurement, tmp_path)
    first.unlink()
    with pytest.raises(RecordError, match="is missing; run `bitladder measure` again"):
        read_codes(measurement, tmp_path)


@pytest.mark.parametrize("engine", ["native", "modelopt"])
@pytest.mark.parametrize("phase", ["weigh tokens", "round", "score"])
def test_a_killed_run_goes_on_with_the_same_codes(llama, text_file, tmp_path, compensated, phase, engine):
    class Killed(Exception):
        pass

    def progress(what, done, total):
        if what == phase and done == 1:
            raise Killed

    settings = {**COMPENSATED, "engine": engine}
    with pytest.raises(Killed):
        measure_text(llama, text_file, tmp_path, progress=progress, **settings)
    assert (
        len(list((tmp_path / "measuring/codes").glob("*.safetensors")))
        == {"weigh tokens": 0, "round": 1, "score": {"native": 3, "modelopt": 0}[engine]}[phase]
    )
    again = []
    measurement = measure_text(
        llama, text_file, tmp_path, progress=lambda what, done, total: again.append((what, done)), **settings
    )
    assert measurement.rounding.modules == compensated[0].rounding.modules
    assert (("round", 0) in again) == ((phase, engine) != ("score", "native"))
    weighed = [done for what, done in again if what == "weigh tokens"]
    begun = {"weigh tokens": [1, 2, 3], "round": [], "score": {"native": [], "modelopt": [0, 1, 2, 3]}[engine]}
    assert weighed == begun[phase]


def test_pictures_count_and_padding_does_not(tmp_path):
    data = pairs(8, 4)
    padded = [~batch.inputs["attention_mask"].bool() for batch in data.batches]
    assert any(bool(mask.any()) for mask in padded)
    others = []
    for batch, mask in zip(data.batches, padded, strict=True):
        ids = batch.inputs["input_ids"].masked_fill(mask, 5)  # another token where nothing counts
        others.append(Batch({**batch.inputs, "input_ids": ids}, batch.labels))
    found = [
        measured_by("native", MODEL, some, tmp_path / name, rounding="compensated").rounding.modules
        for name, some in (("one", data), ("other", dataclasses.replace(data, batches=tuple(others))))
    ]
    assert all(module.output_error < module.nearest_output_error for module in found[0])
    assert [m.output_error for m in found[0]] == pytest.approx([m.output_error for m in found[1]], rel=1e-4)


def test_hidden_states_that_change_between_layers_are_refused(llama, text_file, tmp_path, monkeypatch):
    load = layers.load_model

    def changed(*args):
        model = load(*args)
        model.model.layers[2].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
        return model

    monkeypatch.setattr(layers, "load_model", changed)
    told = []
    with pytest.raises(EngineError, match=r"changes the hidden states before decoder layer 2 .* use rounding: nearest"):
        measure_text(llama, text_file, tmp_path, progress=lambda what, *_: told.append(what), rounding="compensated")
    assert "calibrate" in told
    assert "weigh tokens" not in told  # which takes longer


def test_a_module_that_no_gradient_reaches_is_refused(llama, text_file, tmp_path, monkeypatch):
    load = layers.load_model

    def loaded(*args):
        model = load(*args)
        model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, inputs, output: output.detach())
        return model

    monkeypatch.setattr(layers, "load_model", loaded)
    refused = r"^model\.layers\.1\.mlp\.\w+: no gradient of the loss reaches this module; use "
    for method, remedy in (("fisher", "rounding: nearest with method: kl_div"), ("kl_div", "rounding: nearest")):
        with pytest.raises(MeasurementError, match=f"{refused}{remedy}$"):
            measure_text(llama, text_file, tmp_path / "compensated", method=method, **COMPENSATED)
    with pytest.raises(MeasurementError, match=f"{refused}method: kl_div$"):
        measure_text(llama, text_file, tmp_path / "fisher")
    assert measure_text(llama, text_file, tmp_path / "nearest", method="kl_div").rounding is None


def test_gradients_that_are_no_numbers_are_refused(llama, text_file, tmp_path, monkeypatch):
    load = layers.load_model

    def loaded(*args):
        model = load(*args)
        poison = lambda _, inputs, output: output.register_hook(lambda gradient: gradient * torch.inf) and None  # noqa: E731
        model.model.layers[1].mlp.register_forward_hook(lambda *seen: poison(*seen) if seen[2].requires_grad else None)
        return model

    monkeypatch.setattr(layers, "load_model", loaded)
    refused = (
        r"^model\.layers\.0\.\S+: the gradient by its output holds NaN or Inf; measure in float32 .* rounding: nearest$"
    )
    with pytest.raises(MeasurementError, match=refused):
        measure_text(llama, text_file, tmp_path, method="kl_div", **COMPENSATED)


def test_what_no_output_depends_on_counts_by_its_inputs_alone(llama, text_file, tmp_path, monkeypatch):
    load = layers.load_model

    def loaded(*args):
        model = load(*args)
        nothing = lambda output: output.register_hook(torch.zeros_like) and None  # noqa: E731
        model.model.layers[1].mlp.register_forward_hook(
            lambda *seen: nothing(seen[2]) if seen[2].requires_grad else None
        )
        return model

    monkeypatch.setattr(layers, "load_model", loaded)
    measurement = measure_text(llama, text_file, tmp_path, method="kl_div", **COMPENSATED)
    amax, codes = read_amax(measurement, tmp_path), read_codes(measurement, tmp_path)
    model = load_model(llama, torch.float32)
    records = [module for module in measurement.rounding.modules if ".layers.1.mlp." in module.name]
    inputs, _ = seen_by(model, [module.name for module in records], load_text(llama, text_file).batches)
    assert len(records) == 3
    for module in records:
        x = grids.fake_quantise(inputs[module.name][5], grids.scale_of(amax[f"{module.name}.input_amax"]))
        x = x / x.norm(dim=1, keepdim=True).sqrt()
        weight, scale = model.get_parameter(f"{module.name}.weight").detach(), amax[f"{module.name}.weight_amax"] / 448
        restored = grids.dequantise(codes.read(module.name, FP8, "weight"), scale)
        error = (x @ (weight - restored).t()).norm() / (x @ weight.t()).norm()
        assert module.output_error == pytest.approx(float(error), rel=1e-3)


def test_a_run_keeps_its_codes_or_measures_again(llama, text_file, tmp_path):
    def run(name, **changes):
        work = work_of((llama, text_file, text_file), tmp_path / name, controls={"kinds": []}, **changes)
        work.recipe = work.recipe.model_copy(update={"held_out": (HeldOutSpec(samples=2, sequence_length=24),)})
        return work

    first = run("first", measurement=COMPENSATED)
    first.tell = (told := []).append
    run_step(first)
    assert first.done[0] == "measure"
    assert [line for line in told if "a second calibration set, data: {kind: generated}" in line]
    report = (tmp_path / "first/report.md").read_text()
    assert "Codes: compensated (GPTQ), damping 0.1" in report
    modules = Measurement.read(tmp_path / "first/measurement.json").rounding.modules
    taken = sum(module.nearest_taken for module in modules)
    assert (f"; {taken} of {len(modules)} did worse on rows that check and stay the nearest;" in report) == bool(taken)
    again = run("first", measurement=COMPENSATED)
    run_step(again)
    assert again.done == []

    path = sorted((tmp_path / "first/codes").iterdir())[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    other = run("other")
    with pytest.raises(RecordError, match="is missing or not what .* was written with; copy both together"):
        take_over(other, tmp_path / "first/measurement.json")
    damaged = run("first", measurement=COMPENSATED)
    run_step(damaged)
    assert damaged.done == ["measure"]  # the same bytes as before: what came of them is still valid
    assert path.read_bytes() == whole

    take_over(other, tmp_path / "first/measurement.json")
    plan(other)
    export_step(other)
    name = "checkpoints/full/model.safetensors"
    assert (tmp_path / "other" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_what_cannot_be_exported_cannot_be_compensated():
    with pytest.raises(ValidationError, match="rounding: compensated needs share_fused_scales: true"):
        MeasureSpec(rounding="compensated", share_fused_scales=False)


@pytest.mark.parametrize("name", ["0.safetensors", "layer-00000-copy.safetensors", "layer-99999.safetensors", "zz"])
def test_a_stray_file_among_the_codes_changes_nothing(name, llama, compensated, tmp_path):
    """Only the files that the measurement lists have codes, whatever the other is called."""
    measurement, directory = compensated
    shutil.copytree(directory, tmp_path / "measured")
    listed = measurement.rounding.files[0].name
    wrong = {
        key: (codes.view(torch.uint8) ^ 0x41).view(codes.dtype)
        for key, codes in load_file(tmp_path / "measured" / "codes" / listed).items()
    }
    save_file(wrong, tmp_path / "measured" / "codes" / name)
    amax, codes = (
        read_amax(measurement, directory),
        read_codes(measurement, tmp_path / "measured"),
    )
    right = read_codes(measurement, directory)
    for key in wrong:
        module = key.removesuffix(".fp8.weight")
        assert torch.equal(*(some.read(module, FP8, "weight").view(torch.uint8) for some in (codes, right)))
    scheme = planning.plan(measurement, spec("full", coverage=1.0))
    export(scheme, measurement, amax, llama, tmp_path / "full", codes=codes)
    assert verify([scheme], measurement, amax, llama, {"full": tmp_path / "full"}).ok
