import errno
import json
import os
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from bitladder import planning
from bitladder.checkpoints.export import export as export_now
from bitladder.checkpoints.export import share_equal_files
from bitladder.errors import MeasurementError, OutputError, StaleRecord
from bitladder.measured import read_amax
from bitladder.models.loading import load_model
from bitladder.records import BF16, CheckpointManifest
from bitladder.storage import TEMPORARY_PREFIX, sha256_of_file
from bitladder.verification import verify
from conftest import (
    llava_config,
    measure_text,
    qwen2_5_vl_config,
    qwen2_vl_config,
    qwen3_vl_config,
    save_model,
    spec,
)


def tensors_of(directory):
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def modelopt_export(source, measurement, scheme, destination, dtype):
    """What ModelOpt itself exports for this assignment, with fused scales shared."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    amax = read_amax(measurement, destination.parent)
    model = load_model(source, dtype)
    quantised = {m.name: g for g in measurement.groups if scheme.formats[g.name] != BF16 for m in g.modules}
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            *(
                {
                    "quantizer_name": f"{name}.{kind}_quantizer",
                    "cfg": {"num_bits": (4, 3), "axis": None},
                    "enable": True,
                }
                for name in quantised
                for kind in ("weight", "input")
            ),
        ],
        "algorithm": "max",
    }
    ids = torch.arange(8).view(1, 8)
    mtq.quantize(model, config, forward_loop=lambda m: m(input_ids=ids))
    for name in quantised:
        linear = model.get_submodule(name)
        for kind in ("weight", "input"):
            quantizer = getattr(linear, f"{kind}_quantizer")
            quantizer.reset_amax()  # its buffer has the model's dtype; ours is float32
            quantizer.amax = amax[f"{name}.{kind}_amax"]
    for group in measurement.groups:
        if scheme.formats[group.name] != BF16 and len(group.modules) > 1:
            preprocess_linear_fusion([model.get_submodule(m.name) for m in group.modules])
    export_hf_checkpoint(model, dtype=dtype, export_dir=destination)


@pytest.fixture(scope="module")
def vl(tmp_path_factory, text_file):
    """(source, measurement, its directory) of a tiny random Qwen2.5-VL."""
    directory = save_model(
        transformers.Qwen2_5_VLForConditionalGeneration, qwen2_5_vl_config(), tmp_path_factory.mktemp("vl")
    )
    output = tmp_path_factory.mktemp("vl-measured")
    return directory, measure_text(directory, text_file, output), output


def export(source, measurement, directory, name="half", **target):
    scheme = planning.plan(measurement, spec(name, **(target or {"coverage": 0.5})))
    amax = read_amax(measurement, directory)
    destination = directory / "checkpoints" / name
    manifest = export_now(scheme, measurement, amax, source, destination)
    return scheme, destination, manifest


def test_equals_modelopts_export(vl):
    """Tensor by tensor, apart from codes that ModelOpt's BF16 division moves to the neighbour (docs/numerics.md)."""
    source, measurement, directory = vl
    scheme, ours, _ = export(source, measurement, directory)
    theirs = directory / "modelopt"
    shutil.rmtree(theirs, ignore_errors=True)
    modelopt_export(source, measurement, scheme, theirs, torch.bfloat16)
    mine, other = tensors_of(ours), tensors_of(theirs)
    assert set(mine) == set(other)
    original = tensors_of(source)
    moved = total = 0
    for name, tensor in mine.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        if tensor.dtype != torch.float8_e4m3fn:
            assert torch.equal(tensor, other[name]), name
            continue
        total += tensor.numel()
        different = tensor.view(torch.uint8) != other[name].view(torch.uint8)
        moved += int(different.sum())
        scale = mine[name.removesuffix("weight") + "weight_scale"]
        weight = original[name].float()
        error, their_error = ((t.float() * scale - weight).abs() for t in (tensor, other[name]))
        # where they differ, ours is the nearer code, up to float32 rounding
        assert bool((error <= their_error * (1 + 1e-5))[different].all())
        steps = tensor.view(torch.uint8).int() - other[name].view(torch.uint8).int()
        assert int(steps.abs().max()) <= 1
    assert 0 < moved < 0.05 * total


def test_equals_modelopts_export_exactly_in_float32(vl):
    """ModelOpt's own division in float32 gives our codes."""
    source, measurement, directory = vl
    _, ours, _ = export(source, measurement, directory)
    scheme = planning.plan(measurement, spec("half", coverage=0.5))
    theirs = directory / "modelopt32"
    shutil.rmtree(theirs, ignore_errors=True)
    modelopt_export(source, measurement, scheme, theirs, torch.float32)
    other = tensors_of(theirs)
    moved = total = 0
    for name, tensor in tensors_of(ours).items():
        if tensor.dtype == torch.float8_e4m3fn:
            total += tensor.numel()
            moved += int((tensor.view(torch.uint8) != other[name].view(torch.uint8)).sum())
    assert total > 0
    assert moved <= 1e-4 * total  # w / (amax / 448) against w · (448 / amax): ties may fall either way


def test_configs_agree_with_modelopts(vl):
    source, measurement, directory = vl
    scheme, ours, _ = export(source, measurement, directory)
    theirs = directory / "modelopt-config"
    shutil.rmtree(theirs, ignore_errors=True)
    modelopt_export(source, measurement, scheme, theirs, torch.bfloat16)
    mine, other = (json.loads((d / "config.json").read_text())["quantization_config"] for d in (ours, theirs))
    excluded, patterns = mine.pop("ignore"), other.pop("ignore")
    assert mine == other
    from fnmatch import fnmatchcase

    def hit(name):
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    quantised = [m.tensor.removesuffix(".weight") for g in measurement.groups for m in g.modules]
    for name in quantised:
        assert hit(name) == (name in excluded), name
    assert all(hit(name) for name in excluded)
    legacy = json.loads((ours / "hf_quant_config.json").read_text())["quantization"]
    assert legacy == {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": excluded}
    assert not any(character in name for name in excluded for character in "*?[")


def test_fused_scales_are_equal(vl):
    source, measurement, directory = vl
    _, ours, _ = export(source, measurement, directory, "full", coverage=1.0)
    tensors = tensors_of(ours)
    for group in measurement.groups:
        for kind in ("weight_scale", "input_scale"):
            scales = {float(tensors[m.tensor.removesuffix("weight") + kind]) for m in group.modules}
            assert len(scales) == 1


def test_shards_side_files_and_manifest(sharded_llama, text_file, tmp_path):
    (sharded_llama / CheckpointManifest.CARD_NAME).write_text("# The original's card, which speaks of the original")
    measurement = measure_text(sharded_llama, text_file, tmp_path)
    _, directory, manifest = export(sharded_llama, measurement, tmp_path)
    shards = sorted(path.name for path in sharded_llama.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in directory.glob("*.safetensors")) == shards
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "generation_config.json"):
        assert (directory / name).read_bytes() == (sharded_llama / name).read_bytes()
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(directory / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    stored = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert CheckpointManifest.CARD_NAME not in stored
    assert {entry.name for entry in manifest.files} == stored - {CheckpointManifest.FILE_NAME}
    for entry in manifest.files:
        assert entry.sha256 == sha256_of_file(directory / entry.name)
        assert entry.bytes == (directory / entry.name).stat().st_size
    assert CheckpointManifest.read(directory / CheckpointManifest.FILE_NAME) == manifest


def test_tensors_lie_aligned_as_safetensors_writes_them(vl):
    from bitladder.models.headers import read_header

    source, measurement, directory = vl
    _, ours, _ = export(source, measurement, directory)
    for info in read_header(ours / "model.safetensors").values():
        size = {"F32": 4, "BF16": 2}.get(info.dtype, 1)
        assert info.begin % size == 0


OTHERS = {
    "qwen2_vl": (transformers.Qwen2VLForConditionalGeneration, qwen2_vl_config),
    "qwen3_vl": (transformers.Qwen3VLForConditionalGeneration, qwen3_vl_config),
    "llava": (transformers.LlavaForConditionalGeneration, llava_config),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_vision_language_models(kind, text_file, tmp_path):
    """Measured, exported under the source's own tensor names, and verified."""
    cls, config = OTHERS[kind]
    source = save_model(cls, config(), tmp_path / "source")
    measurement = measure_text(source, text_file, tmp_path)
    scheme, directory, _ = export(source, measurement, tmp_path)
    names = {name for name in tensors_of(directory) if not name.endswith("_scale")}
    assert names == set(tensors_of(source))
    amax = read_amax(measurement, tmp_path)
    result = verify([scheme], measurement, amax, source, {scheme.name: directory})
    assert result.ok, result


def test_share_files(sharded_llama, text_file, tmp_path):
    measurement = measure_text(sharded_llama, text_file, tmp_path)
    first = export(sharded_llama, measurement, tmp_path, "top25", coverage=0.25)[1]
    second = export(sharded_llama, measurement, tmp_path, "top50", coverage=0.5)[1]
    before = {path.name: path.read_bytes() for path in second.iterdir()}
    saved = share_equal_files([first, second])
    assert saved > 0
    assert (first / "tokenizer.json").samefile(second / "tokenizer.json")
    assert not (first / "config.json").samefile(second / "config.json")
    assert {path.name: path.read_bytes() for path in second.iterdir()} == before
    assert share_equal_files([first, second]) == 0


def test_foreign_directory_is_kept(llama, measured, tmp_path):
    measurement, directory = measured
    scheme = planning.plan(measurement, spec("half", coverage=0.5))
    amax = read_amax(measurement, directory)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="didn't write"):
        export_now(scheme, measurement, amax, llama, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_no_space_keeps_the_old_checkpoint(llama, measured, tmp_path, monkeypatch):
    measurement, directory = measured
    scheme = planning.plan(measurement, spec("half", coverage=0.5))
    amax = read_amax(measurement, directory)
    destination = tmp_path / "half"
    export_now(scheme, measurement, amax, llama, destination)
    before = {path.name: path.read_bytes() for path in destination.iterdir()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        export_now(scheme, measurement, amax, llama, destination)
    assert {path.name: path.read_bytes() for path in destination.iterdir()} == before
    assert not list(tmp_path.glob(f"{TEMPORARY_PREFIX}*"))


def test_a_scheme_of_another_measurement_is_refused(llama, measured, tmp_path):
    measurement, directory = measured
    scheme = planning.plan(measurement, spec("half", coverage=0.5))
    amax = read_amax(measurement, directory)
    other = scheme.model_copy(update={"measurement_sha256": "0" * 64})
    with pytest.raises(StaleRecord, match="another measurement"):
        export_now(other, measurement, amax, llama, tmp_path / "x")


def test_an_imported_measurement_is_refused(llama, measured, tmp_path):
    measurement, directory = measured
    groups = tuple(
        group.model_copy(update={"modules": tuple(m.model_copy(update={"tensor": None}) for m in group.modules)})
        for group in measurement.groups
    )
    imported = measurement.model_copy(update={"groups": groups})
    scheme = planning.plan(imported, spec("half", coverage=0.5))
    with pytest.raises(MeasurementError, match="planning, not for export"):
        export_now(scheme, imported, read_amax(measurement, directory), llama, tmp_path / "x")


def test_memory_stays_within_two_shards_and_a_fixed_overhead(text_file, tmp_path):
    """Exporting ten shards of about 40 MB: the process grows by less than two of them and 64 MB."""
    import psutil

    from bitladder.runinfo import Meter
    from conftest import llama_config

    config = llama_config(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=4
    )
    source = save_model(transformers.LlamaForCausalLM, config, tmp_path / "source", max_shard_size="40MB")
    shards = [path.stat().st_size for path in source.glob("*.safetensors")]
    measurement = measure_text(source, text_file, tmp_path, samples=2)
    limit = 2 * max(shards) + 64e6
    assert sum(shards) > 2 * limit, "the model is too small to show anything"
    meter = Meter()
    before = psutil.Process().memory_info().rss
    with meter.phase("export"):
        export(source, measurement, tmp_path, "full", coverage=1.0)
    assert meter.phases[0].peak_rss_bytes - before < limit
