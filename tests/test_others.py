"""Benchmarks' reader of other tools' checkpoints, against files that compressed-tensors' own library makes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from safetensors.torch import load_file, save_file

from bitladder.formats.targets import TARGETS
from bitladder.models.weights import SINGLE_FILE, WeightFiles

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
MODULES = (Q, DOWN)
# preset -> (its compressor, the format of ours, bits with scales where rows are 128 and 256 wide)
PRESETS = {
    "NVFP4": ("nvfp4-pack-quantized", "nvfp4", 4.5),
    "W4A16": ("pack-quantized", "int4_w4a16_g64", 4.25),
    "W8A16": ("pack-quantized", "int8_w8a16_g64", 8.25),
    "FP8": ("float-quantized", "fp8", 8.0),
    "FP8_DYNAMIC": ("float-quantized", "fp8_pc_pt", 8 + 32 * (128 + 128) / (128 * 128 + 128 * 256)),
}
BIAS = 0.25
INPUT = torch.linspace(-3, 3, 256)


@pytest.fixture
def others_files(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import others_files

    return others_files


def scheme_of(preset: str, targets: list[str]) -> QuantizationScheme:
    scheme = preset_name_to_scheme(preset, targets)
    if scheme.weights.group_size == 128:
        scheme.weights = scheme.weights.model_copy(update={"group_size": 64})
    return scheme


def compressed(preset: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return what the library stores of a weight, scales of integers among them that are negative, and restores."""
    scheme = scheme_of(preset, [])
    size = scheme.weights.group_size or weight.shape[1]
    scale = weight.reshape(len(weight), -1, size).abs().amax(-1)
    state = {"weight": weight}
    if preset == "NVFP4":
        state["weight_global_scale"] = torch.tensor([448 * 6 / weight.abs().max()])
        state["weight_scale"] = (scale / 6 * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    elif preset == "FP8_DYNAMIC":
        state["weight_scale"] = scale / 448
    elif preset == "FP8":
        state["weight_scale"] = scale.max(0).values / 448
    else:
        signs = torch.where(torch.arange(scale.numel()).reshape(scale.shape) % 3 == 0, -1, 1)
        scale = (scale / (2 ** (scheme.weights.num_bits - 1) - 0.5)).to(torch.bfloat16).float()  # as it will be read
        state |= {"weight_scale": scale * signs, "weight_zero_point": torch.zeros(scale.shape, dtype=torch.int8)}
    compressor = BaseCompressor.get_value_from_registry(PRESETS[preset][0])
    stored = compressor.compress(state, scheme)
    restored = compressor.decompress(dict(stored), scheme)["weight"].float()
    if preset == "NVFP4":
        stored["input_global_scale"] = torch.tensor([448 * 6 / INPUT.abs().max()])
    if preset == "FP8":
        stored["input_scale"] = torch.tensor([INPUT.abs().max() / 448])
    return stored, restored


def write(source: Path, output: Path, presets: dict[str, str], targets: dict[str, list[str]]) -> dict:
    """Write a checkpoint in which some modules are quantised, as other tools do; returns the restored weights."""
    shutil.copytree(source, output)
    tensors = load_file(output / SINGLE_FILE)
    linear = [name for name in tensors if name.endswith("_proj.weight")]
    tensors |= {name.replace("weight", "bias"): torch.full(tensors[name].shape[:1], BIAS) for name in linear}
    restored = {}
    for module, preset in presets.items():
        parts, restored[module] = compressed(preset, tensors.pop(f"{module}.weight").float())
        tensors |= {f"{module}.{name}": part.contiguous() for name, part in parts.items()}
    save_file(tensors, output / SINGLE_FILE, metadata={"format": "pt"})
    config = json.loads((output / "config.json").read_text()) | {"attention_bias": True, "mlp_bias": True}
    groups = {
        f"group_{number}": scheme_of(preset, names).model_dump(mode="json")
        for number, (preset, names) in enumerate(targets.items())
    }
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": groups}
    (output / "config.json").write_text(json.dumps(config))
    return restored


@pytest.mark.parametrize("preset", PRESETS)
def test_a_uniform_checkpoint_restores_what_the_library_does(wide_llama, tmp_path, others_files, preset):
    _, name, bits = PRESETS[preset]
    restored = write(wide_llama, tmp_path / "x", dict.fromkeys(MODULES, preset), {preset: ["Linear"]})
    model, formats = others_files.load(tmp_path / "x", {})
    assert {module: one.name for module, one in formats.items()} == dict.fromkeys(MODULES, name)
    rtol = 2**-8 if preset == "NVFP4" else 1e-6  # the library restores FP4 to bfloat16
    for module in MODULES:
        torch.testing.assert_close(model.get_parameter(f"{module}.weight"), restored[module], rtol=rtol, atol=0)
        assert bool((model.get_parameter(f"{module}.bias") == BIAS).all())
    other = load_file(wide_llama / SINGLE_FILE)["model.layers.0.self_attn.k_proj.weight"]
    assert torch.equal(model.get_parameter("model.layers.0.self_attn.k_proj.weight"), other.float())
    assert others_files.stored_bits(WeightFiles.open(tmp_path / "x"), formats) == pytest.approx(bits)


def test_inputs_are_rounded_as_the_device_does(wide_llama, tmp_path, others_files):
    """Blackwell rounds the inputs of NVFP4 to 4 bits by the stored scale, Hopper leaves them."""
    write(wide_llama, tmp_path / "x", {DOWN: "NVFP4"}, {"NVFP4": ["Linear"]})
    hopper, blackwell = (
        others_files.load(tmp_path / "x", TARGETS[target].arithmetic)[0].get_submodule(DOWN)
        for target in ("hopper", "blackwell")
    )
    torch.testing.assert_close(hopper(INPUT), hopper.weight @ INPUT + BIAS)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid, above = torch.cat([-values, values]), INPUT.abs().max() / (448 * 6)
    blocks = INPUT.reshape(-1, 16)
    scales = (blocks.abs().amax(1, keepdim=True) / 6 / above).to(torch.float8_e4m3fn).float() * above
    rounded = grid[(blocks / scales)[..., None].sub(grid).abs().argmin(-1)] * scales
    torch.testing.assert_close(blackwell(INPUT), hopper.weight @ rounded.flatten() + BIAS)
    assert float((blackwell(INPUT) - hopper(INPUT)).detach().abs().max()) > 0.05


def test_a_mix_is_read_by_the_names_of_its_groups(wide_llama, tmp_path, others_files):
    presets = {Q: "W4A16", DOWN: "W8A16"}
    restored = write(wide_llama, tmp_path / "x", presets, {"W4A16": [Q], "W8A16": [DOWN]})
    model, formats = others_files.load(tmp_path / "x", {})
    for module, preset in presets.items():
        assert formats[module].name == PRESETS[preset][1]
        torch.testing.assert_close(model.get_parameter(f"{module}.weight"), restored[module], rtol=1e-6, atol=0)
    bits = others_files.stored_bits(WeightFiles.open(tmp_path / "x"), formats)
    assert bits == pytest.approx((4.25 * 128 * 128 + 8.25 * 128 * 256) / (128 * 128 + 128 * 256))


def test_what_is_no_format_of_ours_is_refused(wide_llama, tmp_path, others_files):
    write(wide_llama, tmp_path / "x", {Q: "W4A16"}, {"W4A16": [DOWN]})
    with pytest.raises(ValueError, match=f"{Q} is in no group"):
        others_files.load(tmp_path / "x", {})
    write(wide_llama, tmp_path / "y", {Q: "W4A16"}, {"W4A16": ["Linear"]})
    tensors = load_file(tmp_path / "y" / SINGLE_FILE)
    tensors[f"{Q}.weight_zero_point"] = torch.ones(128, 2, dtype=torch.int8)
    save_file(tensors, tmp_path / "y" / SINGLE_FILE)
    with pytest.raises(ValueError, match=f"int4_w4a16_g64 has no {Q}.weight_zero_point"):
        others_files.load(tmp_path / "y", {})
