"""A model that doesn't fit is streamed from its files, and measured to the same bytes."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bitladder.errors import EngineError, MeasurementError, ModelError
from bitladder.measuring import layers
from bitladder.measuring.job import Job
from bitladder.measuring.layers import DeviceMemory, StreamedLayers, open_without_layers
from bitladder.measuring.measure import settings_sha256
from bitladder.models import weights
from bitladder.models.loading import load_model
from bitladder.models.target import find_target
from bitladder.recipe import MeasureSpec
from bitladder.runinfo import no_progress
from conftest import load_text, save_model, source_of
from test_native import FAMILIES, measured_by, pairs
from test_positions import MODEL

SMALL = 0.5  # GB: less than anything is measured in


def stream(directory, dtype=torch.float32):
    return StreamedLayers.open(directory, find_target(directory), dtype, DeviceMemory("cpu", SMALL))


@pytest.fixture
def loads(monkeypatch):
    """The numbers of the layers that were loaded, in order; two batches are at hand at once."""
    found, loaded = [], StreamedLayers.loaded
    monkeypatch.setattr(StreamedLayers, "loaded", lambda self, index: found.append(index) or loaded(self, index))
    monkeypatch.setattr(layers, "batches_at_once", lambda _: 2)
    return found


SETTINGS = {
    "gradient": {"method": "gradient"},
    "fisher": {"method": "fisher"},
    "kl_div": {"method": "kl_div"},
    "compensated": {"method": "gradient", "rounding": "compensated"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_streamed_measurement_has_the_same_bytes(llama, text_file, tmp_path, loads, settings):
    data = load_text(llama, text_file, samples=6, batch=2)
    whole = measured_by("native", llama, data, tmp_path / "whole", **settings)
    assert not loads
    streamed = measured_by("native", llama, data, tmp_path / "streamed", memory_gb=SMALL, **settings)
    assert streamed.fingerprint() == whole.fingerprint()
    codes = whole.rounding.files if whole.rounding else ()
    for name in ("measurement.safetensors", *(f"codes/{entry.name}" for entry in codes)):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()
    count, chunks = 3, 2  # layers; three batches, two at a time
    passes = {"gradient": 2, "fisher": 2, "kl_div": 1}[settings["method"]]
    rounding = count * (1 + 2 * chunks) if "rounding" in settings else 0  # once, after forward and back for the weights
    assert len(loads) == count * chunks * (1 + passes) + rounding


@pytest.mark.parametrize("method", ["gradient", "fisher", "kl_div"])
def test_pictures_are_streamed_too(tmp_path, method):
    data = pairs(4, 2)
    whole, streamed = (
        measured_by("native", MODEL, data, tmp_path / name, method=method, memory_gb=limit)
        for name, limit in (("whole", None), ("streamed", SMALL))
    )
    assert streamed.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_opened_without_layers_is_what_transformers_loads(tmp_path, family, dtype):
    cls, config = FAMILIES[family]
    save_model(cls, config(), tmp_path, tokenizer=False)
    streamed = stream(tmp_path, dtype)
    loaded = load_model(tmp_path, dtype)
    expected = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    inside = f"{streamed.path}."
    found = [*streamed.model.named_parameters(), *streamed.model.named_buffers()]
    assert {name for name, value in found if value.is_meta} == {
        name for name, _ in loaded.named_parameters() if name.startswith(inside)
    }
    for name, value in found:
        if not value.is_meta:
            assert value.dtype == expected[name].dtype, name
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    for index in (0, 1, 0):
        with streamed.loaded(index) as layer:
            for name, value in layer.named_parameters():
                assert torch.equal(value, expected[f"{inside}{index}.{name}"]), name
        assert all(value.is_meta for value in layer.parameters())


def test_a_layer_goes_again_after_a_failure(llama):
    streamed = stream(llama)
    with pytest.raises(KeyError), streamed.loaded(0):
        raise KeyError
    assert all(value.is_meta for value in streamed.layers.parameters())


@pytest.mark.parametrize("part", ["embed_tokens.weight", "layers.1.mlp.up_proj.weight"])
def test_nan_in_a_streamed_weight_is_named(llama, text_file, tmp_path, part):
    directory = Path(shutil.copytree(llama, tmp_path / "model"))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    (name,) = (name for name in tensors if name.endswith(part))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    data = load_text(directory, text_file)
    with pytest.raises(ModelError, match=f"tensor {name} holds NaN or Inf"):
        measured_by("native", directory, data, tmp_path / "out", memory_gb=SMALL)


def test_models_that_cannot_be_opened_so_are_refused(llama, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules", {"norm"}, raising=False)
    with pytest.raises(EngineError, match=r"keeps some modules in float32.*memory_gb"):
        open_without_layers(llama, "model.layers", torch.float32, "cpu")


def test_an_unfilled_buffer_is_refused(llama, monkeypatch):
    monkeypatch.setattr(transformers.LlamaModel, "_init_weights", lambda *_: None)
    with pytest.raises(EngineError, match=r"doesn't fill the buffer model.rotary_emb.*memory_gb"):
        open_without_layers(llama, "model.layers", torch.float32, "cpu")


def test_what_fits_is_decided_by_the_limit(llama):
    job = Job(find_target(llama), (), (torch.Size([2, 24]),), MeasureSpec(), "cpu", no_progress)
    assert DeviceMemory("cpu", 2.0).fits(llama, job, torch.float32)
    assert not DeviceMemory("cpu", SMALL).fits(llama, job, torch.float32)
    assert DeviceMemory("cpu", None).fits(llama, job, torch.float32)


def test_what_a_layer_takes_at_work_has_to_fit_too(llama):
    """60 times its input [rows, tokens, 64]: 2.0 GB for 131,072 tokens in float32, half of it in BF16."""
    job = Job(find_target(llama), (), (torch.Size([1, 8]), torch.Size([128, 1024])), MeasureSpec(), "cpu", no_progress)
    for limit, dtype, fits in ((2.0, torch.float32, False), (2.1, torch.float32, True), (2.0, torch.bfloat16, True)):
        assert DeviceMemory("cpu", limit).fits(llama, job, dtype) is fits


def test_a_layer_in_fp8_has_to_fit_too(llama, monkeypatch):
    monkeypatch.setattr(layers, "_WORKING_BYTES", 0)
    target = find_target(llama)
    job = Job(target, (), (torch.Size([1, 1]),), MeasureSpec(), "cpu", no_progress)
    weights_bytes = 4 * sum(value.numel() for value in load_file(llama / "model.safetensors").values())
    layer_bytes = 4 * sum(group.weight_elements for group in target.groups) // 3  # three layers, alike
    needed = (weights_bytes + layer_bytes + 60 * 64 * 4) / 1e9
    assert DeviceMemory("cpu", needed + 1e-8).fits(llama, job, torch.float32)
    assert not DeviceMemory("cpu", needed - 1e-8).fits(llama, job, torch.float32)


def test_the_limit_is_no_part_of_the_key(llama, text_file):
    data = load_text(llama, text_file)
    keys = {
        settings_sha256(source_of(llama), data, MeasureSpec(engine="native", memory_gb=limit)) for limit in (None, 1.0)
    }
    assert len(keys) == 1


def test_host_memory_bounds_the_batches_at_once(monkeypatch):
    monkeypatch.setattr(layers.psutil, "virtual_memory", lambda: type("", (), {"available": 8e9})())
    assert layers.batches_at_once(0.5e9) == 4
    assert layers.batches_at_once(1e12) == 1


@pytest.mark.parametrize("loader", ["load_model", "open_without_layers"])
def test_a_model_that_does_not_fit_is_said_with_the_remedy(llama, text_file, tmp_path, monkeypatch, loader):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(layers, loader, full)
    limit = {"memory_gb": 0.001} if loader == "open_without_layers" else {}
    with pytest.raises(MeasurementError, match=r"out of GPU memory while loading .* raise measurement.memory_gb"):
        measured_by("native", llama, load_text(llama, text_file), tmp_path, **limit)


def test_finite_means_every_value(monkeypatch):
    monkeypatch.setattr(weights, "_BLOCK", 10)
    values = torch.zeros(5, 7, dtype=torch.bfloat16)
    assert weights.all_finite(values)
    for at, value in ((0, float("nan")), (34, float("inf"))):
        broken = values.clone()
        broken.view(-1)[at] = value
        assert not weights.all_finite(broken)
    assert weights.all_finite(torch.zeros(0))
