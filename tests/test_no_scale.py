"""Groups that have no FP8 scale (weights or inputs that are zero, modules that no sample reaches) stay in 16 bits."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bitladder import planning
from bitladder.checkpoints.export import export
from bitladder.errors import MeasurementError
from bitladder.evaluation.evaluate import compare
from bitladder.evaluation.reference import Reference
from bitladder.evaluation.simulation import Simulation
from bitladder.measured import read_amax, read_codes
from bitladder.measuring.checks import with_scales
from bitladder.models.target import Target, find_target
from bitladder.recipe import MeasureSpec
from bitladder.records import CheckpointManifest, QuantGroup, QuantModule
from bitladder.verification import verify
from conftest import TEXT, load_text, measure_text, save_model, spec

WEIGHTS = "all zero in its weights: no FP8 scale"
INPUT = "all zero in its input during calibration: no FP8 scale"
UNREACHED = "reached by no calibration sample: no FP8 scale"
LAYER = "model.layers.1"

# what is zero -> modules that stay in 16 bits, and why
ZEROS = {
    "down_proj": (["mlp.down_proj"], {"mlp.down_proj": WEIGHTS}),
    "up_proj": (["mlp.up_proj"], {"mlp.down_proj": INPUT}),
    "qkv_proj": (
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        {f"self_attn.{leaf}_proj": WEIGHTS for leaf in "qkv"} | {"self_attn.o_proj": INPUT},
    ),
}


def with_zeros(source, directory, names):
    for path in source.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    for name in names:
        tensors[f"{name}.weight"].zero_()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def reasons(measurement):
    return {
        module.name.removeprefix(f"{LAYER}."): module.reason
        for module in measurement.untouched
        if "no FP8 scale" in module.reason
    }


ENGINES = {
    "fisher": {"engine": "native", "method": "fisher"},
    "kl_div": {"engine": "native", "method": "kl_div"},
    "compensated": {"engine": "native", "method": "fisher", "rounding": "compensated"},
    "streamed": {"engine": "native", "method": "fisher", "memory_gb": 0.5},
    "modelopt": {"engine": "modelopt", "method": "gradient"},
    "modelopt_kl_div": {"engine": "modelopt", "method": "kl_div"},
    "modelopt_compensated": {"engine": "modelopt", "method": "gradient", "rounding": "compensated"},
}


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("settings", ENGINES.values(), ids=ENGINES)
def test_a_group_without_a_scale_stays_in_16_bits(zero, settings, llama, text_file, tmp_path):
    (tmp_path / "source").mkdir()
    names, expected = ZEROS[zero]
    source = with_zeros(llama, tmp_path / "source", [f"{LAYER}.{name}" for name in names])
    measurement = measure_text(source, text_file, tmp_path, samples=4, **settings)
    assert reasons(measurement) == expected
    whole = find_target(llama)
    left = {f"{LAYER}.{name}" for name in expected}
    assert [group for group in whole.groups if left.isdisjoint(m.name for m in group.modules)] == list(
        measurement.groups
    )
    amax = read_amax(measurement, tmp_path)
    codes = read_codes(measurement, tmp_path)
    assert left.isdisjoint(name.rpartition(".")[0] for name in amax)
    (scheme,) = planning.plan_all(measurement, [spec("full", coverage=1.0)])
    assert left < set(scheme.exclude_modules)
    directory = tmp_path / "checkpoint"
    export(scheme, measurement, amax, source, directory, codes=codes)
    verdict = verify([scheme], measurement, amax, source, {"full": directory})
    assert verdict.ok, [finding for one in verdict.checkpoints for finding in one.findings]
    ignored = json.loads((directory / "config.json").read_text())["quantization_config"]["ignore"]
    assert left < set(ignored)
    manifest = CheckpointManifest.read(directory / CheckpointManifest.FILE_NAME)
    assert left.isdisjoint(module.name for module in manifest.modules)
    with Reference.compute(source, load_text(llama, text_file, samples=4, length=20)) as reference:
        exported = compare(reference, directory, "full")[0]
        simulated = Simulation(source, measurement, amax, codes=codes).results([reference], scheme)
    assert [result.value for result in exported] == [result.value for result in simulated]
    assert all(torch.isfinite(torch.tensor(result.value)) for result in exported)


def test_inspect_names_weights_that_are_zero_before_anything_is_computed(llama, tmp_path):
    source = with_zeros(llama, tmp_path, [f"{LAYER}.mlp.down_proj"])
    target = find_target(source)
    assert WEIGHTS in {module.reason for module in target.untouched if module.name == f"{LAYER}.mlp.down_proj"}
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{LAYER}.mlp.down_proj.weight"][-1, -1] = 1.0  # the last value is looked at, too
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert any(group.name == f"{LAYER}.mlp.down_proj" for group in find_target(source).groups)


def test_where_scales_are_not_shared_one_zero_module_keeps_its_group_back(llama, text_file, tmp_path):
    (tmp_path / "source").mkdir()
    source = with_zeros(llama, tmp_path / "source", [f"{LAYER}.mlp.gate_proj"])
    measurement = measure_text(source, text_file, tmp_path, samples=2, share_fused_scales=False)
    assert reasons(measurement) == {
        "mlp.gate_proj": WEIGHTS,
        "mlp.up_proj": f"fused with gate_proj, which is {WEIGHTS}",
        "mlp.down_proj": INPUT,
    }


@pytest.mark.parametrize("engine", ["native", "modelopt"])
def test_a_model_without_any_scale_is_one_line(engine, llama, text_file, tmp_path):
    (tmp_path / "source").mkdir()
    names = ["input_layernorm", "post_attention_layernorm"]
    source = with_zeros(llama, tmp_path / "source", [f"model.layers.{i}.{name}" for i in range(3) for name in names])
    with pytest.raises(MeasurementError, match=r"no group is left to quantise: .* is all zero in its input .* all 12"):
        measure_text(source, text_file, tmp_path, samples=2, engine=engine, method="kl_div")


def test_an_fp8_cache_is_refused_where_some_layer_has_no_scale_of_its_values(llama, text_file, tmp_path):
    (tmp_path / "source").mkdir()
    source = with_zeros(llama, tmp_path / "source", [f"{LAYER}.self_attn.v_proj"])
    measurement = measure_text(source, text_file, tmp_path, samples=2)
    assert reasons(measurement) == {"self_attn.o_proj": INPUT}
    amax = read_amax(measurement, tmp_path)
    assert not any(name.endswith((".k_amax", ".v_amax")) for name in amax)
    (scheme,) = planning.plan_all(measurement, [spec("full", coverage=1.0, kv_cache="fp8")])
    with pytest.raises(MeasurementError, match=r"kv_cache: fp8 .* set kv_cache: none"):
        export(scheme, measurement, amax, source, tmp_path / "checkpoint")


def test_modules_that_no_sample_reaches_stay_in_16_bits(text_file, tmp_path):
    """Mllama passes its cross-attention layers by where a batch has no picture."""
    text = {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1], "pad_token_id": 0}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
        "max_num_tiles": 1,
    }
    config = transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=5)
    source = save_model(transformers.MllamaForConditionalGeneration, config, tmp_path / "source")
    measurement = measure_text(source, text_file, tmp_path, samples=2, engine="modelopt", method="gradient")
    left = {module.name for module in measurement.untouched if module.reason == UNREACHED}
    layer = "model.language_model.layers.1"
    assert left == {f"{layer}.cross_attn.{leaf}_proj" for leaf in "qkvo"} | {
        f"{layer}.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")
    }
    assert {group.name.removeprefix("model.language_model.layers.")[0] for group in measurement.groups} == {"0", "2"}


def test_nan_is_an_error_before_a_group_is_left_alone():
    group = QuantGroup(name="layers.0.up_proj", modules=(QuantModule(name="layers.0.up_proj"),), weight_elements=1)
    amax = {"layers.0.up_proj.weight_amax": torch.tensor(0.0), "layers.0.up_proj.input_amax": torch.tensor(torch.nan)}
    with pytest.raises(MeasurementError, match="layers.0.up_proj: its activations hold NaN or Inf"):
        with_scales(Target("", (group,), ()), amax, MeasureSpec())


@pytest.mark.parametrize(
    ("weight", "seen", "reason"),
    [
        (0.0, 1.0, WEIGHTS),
        (1.0, 0.0, INPUT),
        (None, 1.0, UNREACHED),
        (1.0, None, UNREACHED),
        (1e-36, 1.0, "too small (weights up to 1.0e-36, inputs up to 1.0e+00): no FP8 scale"),
        (1.0, 1e-36, "too small (weights up to 1.0e+00, inputs up to 1.0e-36): no FP8 scale"),
    ],
)
def test_a_group_stays_where_no_scale_is_a_number(weight, seen, reason):
    names = ("layers.0.up_proj", "layers.1.up_proj")
    groups = tuple(QuantGroup(name=n, modules=(QuantModule(name=n),), weight_elements=1) for n in names)
    amax = {f"{name}.{kind}_amax": torch.tensor(1.2e-35) for name in names for kind in ("weight", "input")}
    for kind, value in (("weight", weight), ("input", seen)):
        amax.pop(f"{names[0]}.{kind}_amax")
        if value is not None:
            amax[f"{names[0]}.{kind}_amax"] = torch.tensor(value)
    found = with_scales(Target("", groups, ()), amax, MeasureSpec())
    assert [group.name for group in found.groups] == [names[1]]  # whose scales are just numbers
    assert [(module.name, module.reason) for module in found.untouched] == [(names[0], reason)]
    scale = amax[f"{names[1]}.weight_amax"] / 448
    assert scale > torch.finfo(torch.float32).tiny
    assert torch.isfinite(1 / scale)
