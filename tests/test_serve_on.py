"""Scores, evaluations and reports in the arithmetic of the device that will serve, against vLLM's functions."""

import hashlib
import itertools
import json
from typing import get_args

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bitladder
from bitladder.errors import EngineError, RecipeError, StaleRecord, VerificationFailed
from bitladder.formats import FORMATS, POWERS_OF_TWO, WEIGHT_ONLY, get_format, grids
from bitladder.formats.targets import TARGETS, served, target_of
from bitladder.recipe.sections import ServedOn
from bitladder.records import CheckpointManifest, Measurement, Verification
from bitladder.report.tables import layer_counts, on_devices
from conftest import llama_config, save_model
from test_block_formats import functions, groups, numbers  # noqa: F401


@pytest.fixture(scope="session")
def deep_gemm(vllm_python):
    """vLLM's rounding of a weight whose scales become powers of two."""
    known = {
        "torch": torch,
        "DEFAULT_BLOCK_SIZE": [128, 128],
        "current_platform": type("Platform", (), {"fp8_dtype": staticmethod(lambda: torch.float8_e4m3fn)}),
        "get_fp8_min_max": lambda: (-448.0, 448.0),
        "cdiv": lambda x, y: -(-x // y),
    }
    names = {"per_block_cast_to_fp8", "_ceil_to_ue8m0", "_align"}
    return functions(vllm_python, "deep_gemm.py", names, known, "vllm/utils").per_block_cast_to_fp8


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama whose weights have whole blocks of 128 x 128."""
    config = llama_config(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4)
    return save_model(transformers.LlamaForCausalLM, config, tmp_path_factory.mktemp("wide"))


def recipe(model, text_file, output, formats, method="fisher", **changes):
    data = {"samples": 4, "sequence_length": 24, "batch_size": 2}
    return bitladder.Run(
        {
            "model": {"path": model},
            "calibration": {"data": {"kind": "text", "path": text_file}, **data},
            "held_out": {"data": {"kind": "text", "path": text_file}, **data},
            "measurement": {"formats": formats, "method": method},
            "schemes": [{"name": "full", "coverage": 1.0, "format": formats[0]}],
            "controls": {"kinds": ["inverse"]},
            "output": output,
            **changes,
        }
    )


def scores(measurement, name):
    return {one.group: one.scores for one in measurement.candidates if one.format == name}


def test_recipes_know_the_devices_that_formats_know():
    assert set(get_args(ServedOn)) == set(TARGETS)
    for target in TARGETS.values():
        assert {*target.arithmetic, *target.unsupported} <= set(FORMATS)
        assert not set(target.arithmetic) & target.unsupported


# Of the first GPUs whose products vLLM gives inputs rounded in a format; before them weights are restored alone.
ROUNDS_FROM = {"fp8": (8, 9), "fp8_pc_pt": (8, 9), "fp8_block": (9, 0), "mxfp8": (10, 0), "nvfp4": (10, 0)}


@pytest.mark.parametrize("name", sorted(name for name, one in FORMATS.items() if one.input != "unrounded"))
@pytest.mark.parametrize("target", sorted(name for name, one in TARGETS.items() if one.capability is not None))
def test_a_gpu_rounds_inputs_from_the_generation_on_that_has_the_units(target, name):
    least = ROUNDS_FROM.get(name, (0, 0))  # INT8's units are in all of them
    capability = TARGETS[target].capability
    assert (served([name], target).get(name) == WEIGHT_ONLY) == (capability < least)


@pytest.mark.parametrize(
    ("capability", "target"),
    [
        (None, "cpu"),
        ((8, 0), "ampere"),
        ((8, 6), "ampere"),
        ((8, 9), "ada"),
        ((9, 0), "hopper"),
        ((10, 0), "blackwell"),
        ((10, 3), "blackwell"),
        ((12, 0), "blackwell_rtx"),
        ((12, 1), "blackwell_rtx"),
    ],
)
def test_which_device_a_compute_capability_is(capability, target):
    assert target_of(capability) == target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_are_rounded_as_vllm_rounds_them_for_deep_gemm(deep_gemm, dtype):
    """requant_weight_ue8m0_inplace: what the file holds is restored in float32 and rounded a second time."""
    format_ = get_format("fp8_block", {"fp8_block": POWERS_OF_TWO})
    weight = numbers(dtype)
    parts = format_.encode(weight, format_.amax_of(weight))
    codes, scales = deep_gemm(format_.decode(parts), use_ue8m0=True)
    wanted = codes.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(format_.served_weight(parts), wanted)
    assert not torch.equal(format_.served_weight(parts), format_.decode(parts))
    assert torch.equal(get_format("fp8_block").served_weight(parts), format_.decode(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_rounded_as_vllm_rounds_them_for_deep_gemm(groups, dtype):  # noqa: F811
    format_ = get_format("fp8_block", {"fp8_block": POWERS_OF_TWO})
    x = numbers(dtype, least=-1)
    codes, scales = groups(x, powers=True)
    wanted = (codes.float() * scales.repeat_interleave(128, 1)).to(dtype)
    wanted[5] = 0  # zeros: vLLM's reference divides them by its least scale
    assert torch.equal(format_.served_input(x, None), wanted)
    assert not torch.equal(format_.served_input(x, None), get_format("fp8_block").served_input(x, None))


def test_a_power_above_is_the_least_one():
    powers = torch.tensor([2.0**-100, 0.25, 1.0, 2.0**90])
    assert torch.equal(grids.power_above(powers), powers)
    assert torch.equal(grids.power_above(torch.nextafter(powers, torch.tensor(torch.inf))), powers * 2)
    assert torch.equal(grids.power_above(torch.nextafter(powers, torch.tensor(0.0))), powers)


@pytest.mark.parametrize("method", ["gradient", "fisher", "kl_div"])
def test_four_bits_are_scored_with_inputs_in_16_bits_on_hopper(wide, text_file, tmp_path, method):
    """Just as the format that never rounds inputs; on Blackwell they are rounded, which costs."""
    formats = ["nvfp4", "nvfp4_w4a16", "fp8"]
    hopper = recipe(wide, text_file, tmp_path / "hopper", formats, method, serve_on="hopper").measure()
    assert hopper.arithmetic == {"nvfp4": WEIGHT_ONLY}
    assert scores(hopper, "nvfp4") == scores(hopper, "nvfp4_w4a16")
    blackwell = recipe(wide, text_file, tmp_path / "blackwell", formats, method, serve_on="blackwell").measure()
    assert blackwell.arithmetic == {}
    assert scores(blackwell, "nvfp4_w4a16") == scores(hopper, "nvfp4_w4a16")
    assert scores(blackwell, "nvfp4") != scores(hopper, "nvfp4")
    assert scores(blackwell, "fp8") == scores(hopper, "fp8")
    here = recipe(wide, text_file, tmp_path / "here", formats, method).measure()  # a CPU: as they are stored
    assert scores(here, "nvfp4") == scores(blackwell, "nvfp4")


@pytest.mark.parametrize(
    ("name", "target", "how"),
    [("nvfp4", "hopper", WEIGHT_ONLY), ("fp8_block", "hopper", POWERS_OF_TWO), ("fp8", "ampere", WEIGHT_ONLY)],
)
def test_what_is_scored_is_what_is_evaluated_and_reported(wide, text_file, tmp_path, name, target, how):
    run = recipe(wide, text_file, tmp_path / "out", [name], serve_on=target)
    report = run.run()
    assert report.arithmetic == {name: how}
    words = {
        WEIGHT_ONLY: "with inputs in 16 bits",
        POWERS_OF_TWO: "with every block's scale rounded up to a power of two",
    }
    assert run.evaluate()["full"].arithmetic.endswith(f"; {name} {words[how]}")
    loaded = bitladder.load(run.checkpoint("full"), serve_on=target)
    plain = bitladder.load(run.checkpoint("full"))
    ids = torch.arange(24)[None] % 100
    with torch.no_grad():
        assert not torch.equal(loaded(ids).logits, plain(ids).logits)
    page = (tmp_path / "out" / "report.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| NVIDIA")}
    for each in ("ampere", "ada", "hopper", "blackwell", "blackwell_rtx"):
        row = rows[TARGETS[each].title]
        same = served([name], each) == {name: how}
        assert f"| {'yes' if same else 'no'} |" in row
        known = served([name], each).get(name)
        assert row.endswith(f"| {f'{name.upper()} {known}' if known else 'as stored'} |")


def test_a_device_is_said_of_what_a_scheme_uses_alone(wide, text_file, tmp_path):
    """One of two formats that were measured: the other is in neither table."""
    schemes = [{"name": name, "coverage": 1.0, "format": name} for name in ("nvfp4", "fp8")]
    run = recipe(wide, text_file, tmp_path / "out", ["nvfp4", "fp8"], schemes=schemes, serve_on="hopper")
    report = run.run()
    header, _, *rows = on_devices(report).splitlines()
    names = header.strip("| ").split(" | ")
    found = dict(zip(names, next(row for row in rows if "Hopper" in row).strip("| ").split(" | "), strict=True))
    assert (found["nvfp4"], found["fp8"]) == ("NVFP4 weight-only", "as stored")
    counted = [tuple(line.strip("| ").split(" | ")[:2]) for line in layer_counts(report).splitlines()[2:]]
    assert set(counted) == {("nvfp4", "NVFP4"), ("nvfp4", "BF16"), ("fp8", "FP8"), ("fp8", "BF16")}


def test_a_simulated_scheme_is_what_its_checkpoint_evaluates_to(wide, text_file, tmp_path):
    """In the served arithmetic too: the control arms stand beside the checkpoints."""
    from bitladder.runinfo import Meter
    from bitladder.steps.originals import Originals
    from bitladder.steps.simulated import simulation_of

    run = recipe(wide, text_file, tmp_path / "out", ["fp8_block"], serve_on="hopper")
    for step in ("measure", "plan", "export"):
        getattr(run, step)()
    evaluation = run.evaluate()["full"]
    with run._working() as work, Originals(work) as originals:
        simulation = simulation_of(work, work.measurement(), "cpu")
        (scheme,) = work.schemes()
        found = simulation.results(originals.references(Meter()), scheme)
    assert found[0].value == evaluation.results[0].value


@pytest.mark.parametrize("carrier", ["modelopt", "compressed-tensors"])
def test_compensated_blocks_reach_files_with_scales_that_stay(wide, text_file, tmp_path, deep_gemm, carrier):
    """What DeepGEMM's users make of the file's weights is what the measurement chose, in either layout."""
    from bitladder.runinfo import Meter
    from bitladder.steps.originals import Originals
    from bitladder.steps.simulated import simulation_of

    settings = {"formats": ["fp8_block"], "rounding": "compensated"}
    asked = {"serve_on": "hopper", "measurement": settings, "export": {"carrier": carrier}}
    run = recipe(wide, text_file, tmp_path / "out", ["fp8_block"], **asked)
    measurement = run.measure()
    assert not any(module.nearest_taken for module in measurement.rounding.modules)
    run.plan()
    run.export()
    assert run.verify().ok
    evaluation = run.evaluate()["full"]
    with run._working() as work, Originals(work) as originals:
        simulation = simulation_of(work, work.measurement(), "cpu")
        (scheme,) = work.schemes()
        found = simulation.results(originals.references(Meter()), scheme)
        directory = work.checkpoint_directory("full")
    assert found[0].value == evaluation.results[0].value
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    names = [name for name in tensors if name.endswith("weight_scale")]
    assert len(names) == len(measurement.rounding.modules)
    manifest = CheckpointManifest.read(directory / CheckpointManifest.FILE_NAME)
    recorded = {f"{one.tensor}_scale": one.weight_scale_sha256 for one in manifest.modules}
    for name in names:
        codes = tensors[name.removesuffix("_scale")].float()
        scales = tensors[name].reshape(codes.shape[0] // 128, codes.shape[1] // 128)
        weight = codes * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert recorded[name] == hashlib.sha256(tensors[name].numpy().tobytes()).hexdigest()
        again, powers = deep_gemm(weight, use_ue8m0=True)
        assert torch.equal(again.float() * powers.repeat_interleave(128, 0).repeat_interleave(128, 1), weight)


def test_blocks_with_the_nearest_codes_stand_beside_others(wide, text_file, tmp_path, monkeypatch):
    """Each is verified in the steps that it has: those of its largest values, or powers of two."""
    from bitladder.measuring import compensation

    verdicts = itertools.cycle(([0.5, 1.0], [2.0, 1.0]))
    monkeypatch.setattr(compensation, "output_errors", lambda *_: next(verdicts))
    settings = {"formats": ["fp8_block"], "rounding": "compensated"}
    run = recipe(wide, text_file, tmp_path / "out", ["fp8_block"], serve_on="hopper", measurement=settings)
    taken = {one.name: one.nearest_taken for one in run.measure().rounding.modules}
    assert set(taken.values()) == {True, False}
    for step in ("plan", "export"):
        getattr(run, step)()
    assert run.verify().ok
    original = load_file(wide / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out/checkpoints/full/model.safetensors").items():
        if name.endswith("weight_scale"):
            weight = original[name.removesuffix("_scale")].float()
            blocks = weight.reshape(len(weight) // 128, 128, weight.shape[1] // 128, 128)
            scales = blocks.abs().amax((1, 3), keepdim=True) / 448
            exponents = torch.frexp(scales).exponent  # no scale is a power of two by itself
            powers = torch.ldexp(torch.ones_like(scales), exponents)
            assert torch.equal(tensor, scales if taken[name.removesuffix(".weight_scale")] else powers)


def test_other_scales_than_those_that_were_chosen_are_found(wide, text_file, tmp_path):
    settings = {"formats": ["fp8_block"], "rounding": "compensated"}
    run = recipe(wide, text_file, tmp_path / "out", ["fp8_block"], serve_on="hopper", measurement=settings)
    for step in ("measure", "plan", "export"):
        getattr(run, step)()
    path = next((tmp_path / "out/checkpoints/full").glob("*.safetensors"))
    tensors, changed = load_file(path), next(name for name in load_file(path) if name.endswith("weight_scale"))
    tensors[changed] = tensors[changed] * 1.5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(VerificationFailed):
        run.verify()
    (checked,) = Verification.read(tmp_path / "out/verification.json").checkpoints
    found = {finding.tensor: finding.problem for finding in checked.findings}
    assert "not those that the measurement chose with the codes" in found[changed]


def test_another_device_is_measured_again_only_where_it_computes_otherwise(wide, text_file, tmp_path):
    output = tmp_path / "out"

    def made(formats, target):
        run = recipe(wide, text_file, output, formats, serve_on=target)
        return run.measure(), (output / "measurement.json").stat().st_mtime_ns

    first, written = made(["fp8"], "hopper")
    assert made(["fp8"], "blackwell") == (first, written)
    again, later = made(["fp8"], "ampere")
    assert later != written
    assert again.arithmetic == {"fp8": WEIGHT_ONLY}


def test_what_a_device_runs_otherwise_is_not_taken_over(wide, text_file, tmp_path):
    recipe(wide, text_file, tmp_path / "first", ["nvfp4"], serve_on="hopper").measure()
    path = tmp_path / "first" / "measurement.json"
    other = recipe(wide, text_file, tmp_path / "second", ["nvfp4"], serve_on="blackwell")
    with pytest.raises(StaleRecord, match="nvfp4 weight-only.*serve_on: blackwell"):
        other.run(path)
    assert not (tmp_path / "second" / "measurement.json").exists()
    taken = recipe(wide, text_file, tmp_path / "third", ["nvfp4"], serve_on="ada")
    assert taken.run(path).arithmetic == {"nvfp4": WEIGHT_ONLY}


def test_modelopt_scores_formats_as_they_are_stored(wide, text_file, tmp_path):
    spec = {"formats": ["fp8"], "engine": "modelopt", "method": "gradient"}
    with pytest.raises(EngineError, match="serve_on: ampere computes fp8 weight-only.*engine: native"):
        recipe(wide, text_file, tmp_path / "out", ["fp8"], serve_on="ampere", measurement=spec).measure()


def test_a_format_that_a_device_does_not_run_is_refused(wide, text_file, tmp_path):
    with pytest.raises(RecipeError, match="serve_on is blackwell, where vLLM runs no int8"):
        recipe(wide, text_file, tmp_path / "out", ["int8"], serve_on="blackwell").measure()
    with pytest.raises(RecipeError, match="serve_on"):
        recipe(wide, text_file, tmp_path / "out", ["fp8"], serve_on="turing").measure()
    with pytest.raises(RecipeError, match="'turing' is unknown; use ampere, ada"):
        bitladder.load(wide, serve_on="turing")


def test_blocks_of_before_they_had_powers_of_two_are_made_again_alone(wide, text_file, tmp_path, monkeypatch):
    """And it is said why; what has no such blocks, or the nearest codes, stays."""
    from bitladder.measuring import measure
    from bitladder.steps.measure import known_measurement

    for name, rounding, wanted in (
        ("fp8", "compensated", None),
        ("fp8_block", "nearest", None),
        ("fp8_block", "compensated", "an earlier version made it otherwise"),
    ):
        settings = {"formats": [name], "rounding": rounding}
        run = recipe(wide, text_file, tmp_path / name / rounding, [name], serve_on="hopper", measurement=settings)
        with monkeypatch.context() as patch:
            patch.setattr(measure, "_BLOCKS", "as before")
            made = run.measure()
        with run._working() as work:
            assert known_measurement(work) == (made, wanted)


def test_a_measurement_as_stored_says_nothing_of_it(wide, text_file, tmp_path):
    """So that records, and digests, from before there were devices stay what they were."""
    recipe(wide, text_file, tmp_path / "out", ["fp8"]).measure()
    content = json.loads((tmp_path / "out" / "measurement.json").read_text())
    assert "arithmetic" not in content
    assert Measurement.read(tmp_path / "out" / "measurement.json").arithmetic == {}
