"""Pre-flight: every broken checkpoint is noticed, no good one is; exclusions match as vLLM's own matcher does."""

import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import broken_checkpoints as broken
from bitladder.errors import BitladderError, ModelError
from bitladder.models.families import architecture
from bitladder.models.families.qwen_vl import QWEN2_VL_RENAMES
from bitladder.runtimes.files import _SCAN_BYTES, Tensor, _tensors_in
from bitladder.runtimes.preflight import RUNTIMES, preflight
from bitladder.runtimes.vllm.rules import VllmRules
from conftest import TEXT, llama_config, llava_config, qwen2_5_vl_config, qwen2_vl_config, qwen3_vl_config, save_model

ALL = (*broken.GOOD, *broken.CASES)
BY_NAME = {case.name: case for case in ALL}


@pytest.fixture
def made(good, tmp_path):
    """Return a function that makes a case; its directory is removed afterwards."""

    def make(name):
        case = BY_NAME[name]
        case.make(good[case.base], tmp_path / name)
        return tmp_path / name

    yield make
    shutil.rmtree(tmp_path)


def by_vllm(directory, **options):
    (result,) = preflight(directory, ("vllm",), **options)
    return result


def classes(result, severity):
    return {finding.error_class for finding in result.findings if finding.severity == severity}


def test_there_are_enough_cases_with_different_names():
    assert len(broken.CASES) >= 36
    assert len(BY_NAME) == len(ALL)


@pytest.mark.parametrize("case", broken.GOOD, ids=lambda case: case.name)
def test_nothing_is_found_in_a_good_checkpoint(case, made):
    directory = made(case.name)
    for read_weights in (False, True):
        result = by_vllm(directory, read_weights=read_weights)
        assert result.findings == ()
        assert result.reached == ("weights" if read_weights else "scales")


@pytest.mark.parametrize("case", broken.CASES, ids=lambda case: case.name)
def test_a_broken_checkpoint_is_noticed(case, made):
    directory = made(case.name)
    quick, thorough = by_vllm(directory), by_vllm(directory, read_weights=True)
    assert thorough.verdict == (case.preflight or "ok"), thorough.findings
    assert quick.verdict == ("ok" if case.needs_weights else thorough.verdict)
    assert set(case.preflight_warnings) <= classes(quick, "warning")
    assert case.preflight is not None or case.preflight_warnings or case.name == "narrow_mlp", "nothing is odd about it"
    for finding in thorough.findings:
        assert "\n" not in finding.problem + finding.remedy
        assert finding.where
        assert finding.remedy


def test_no_broken_checkpoint_passes_both_levels():
    harmless = {case.name for case in broken.CASES if case.preflight is None and case.load is None}
    assert harmless == {
        "lm_head_tied",
        "bf16_scales",
        "unequal_input_scales",
        "exclude_of_nothing",
        "configs_disagree",
        "stale_index",
        "no_chat_template",
        "narrow_mlp",
    }


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["source", "top25", "top50", "full", "kv_full", "sharded", "new_names", "config_only"])
def test_what_is_exported_suits_every_runtime(made, name, runtime):
    (result,) = preflight(made(name), (runtime,))
    assert result.findings == ()
    assert result.runtime == runtime


@pytest.mark.parametrize(
    ("name", "sglang", "tensorrt_llm"),
    [
        # TensorRT-LLM matches the names as they are written; its language model has no `model.language_model`
        ("excludes_in_new_names", "ok", "wrong_format"),
        ("lower_case_algorithm", "unsupported_format", "unsupported_format"),
        # its vision tower is never quantised, whatever is excluded
        ("vision_fp8", "ok", "wrong_format"),
        ("vision_bf16_not_excluded", "wrong_format", "ok"),
        # one excluded module of a fused layer is enough there
        ("exclude_names_q_only", "mixed_group", "ok"),
        # substrings match in vLLM only, whole parts of names in SGLang too
        ("prefix_hits_later_layers", "ok", "wrong_format"),
        ("substring_hits_mlp", "ambiguous_exclude", "ok"),
        ("wildcard_hits_later_layers", "ambiguous_exclude", "ambiguous_exclude"),
        # hf_quant_config.json wins there
        ("configs_disagree", "ok", "wrong_format"),
        ("configs_disagree_config_wrong", "wrong_format", "ok"),
        ("kv_scheme_in_one_config", "config_mismatch", "ok"),
        # and its matrix product doesn't pad
        ("narrow_mlp", "ok", "unsupported_format"),
        ("twelve_layers", "ok", "ok"),
    ],
)
def test_where_the_runtimes_differ(made, name, sglang, tensorrt_llm):
    results = preflight(made(name), ("sglang", "tensorrt_llm"))
    assert [result.verdict for result in results] == [sglang, tensorrt_llm]


@pytest.mark.parametrize(
    ("exclude", "verdicts"),
    [
        ("model.layers.0.self_attn.*_proj", {"vllm": "ok", "sglang": "ok", "tensorrt_llm": "ok"}),
        # a wildcard is held against `qkv_proj` in vLLM and SGLang, against q_proj, k_proj and v_proj in TensorRT-LLM
        (
            "model.layers.0.self_attn.[qkvo]_proj",
            {"vllm": "wrong_format", "sglang": "wrong_format", "tensorrt_llm": "ok"},
        ),
        # SGLang takes it for a regular expression; as one, this is none
        ("model.layers.0.self_attn.*(", dict.fromkeys(RUNTIMES, "wrong_format")),
    ],
)
def test_wildcards_are_read_as_each_runtime_does(made, exclude, verdicts):
    directory = made("layer0_bf16")
    attention = [name for name in broken.linears_of(0) if "self_attn" in name]
    broken.edit_excludes(directory, lambda listed: [exclude, *broken.without(*attention)(listed)])
    assert {result.runtime: result.verdict for result in preflight(directory)} == verdicts


def test_every_linear_is_listed_with_what_the_manifest_promises(made):
    result = by_vllm(made("layer0_bf16"))
    assert len(result.layers) == 7 * broken.LAYERS + 5 * broken.BLOCKS + 2
    assert {layer.format for layer in result.layers if layer.name in broken.linears_of(0)} == {"bf16"}
    assert all(layer.promised == layer.format for layer in result.layers)
    up = next(layer for layer in result.layers if layer.name == "model.layers.3.mlp.up_proj")
    assert up.runtime_name == "language_model.model.layers.3.mlp.gate_up_proj"
    assert (up.format, up.method) == ("fp8", "ModelOptLinearMethod")
    assert result.scheme == "layer0_bf16"
    assert result.manifest_sha256


def test_names_are_those_of_the_checkpoint(made):
    directory = made("new_names")
    broken.edit_tensors(directory, broken.remove("model.language_model.layers.2.mlp.down_proj.weight_scale"))
    (finding,) = by_vllm(directory).findings
    assert finding.where == "model.language_model.layers.2.mlp.down_proj.weight_scale"


def test_the_same_problem_in_many_places_is_one_finding(made):
    (finding,) = by_vllm(made("layer_missing")).findings
    assert finding.where.startswith("model.layers.5.")
    assert "the same in 11 more" in finding.problem


def test_without_a_manifest_nothing_is_promised(made):
    result = by_vllm(made("without_manifest"))
    assert (result.scheme, result.manifest_sha256) == (None, None)
    assert {layer.promised for layer in result.layers} == {None}


def test_a_damaged_manifest_is_said(made):
    directory = made("full")
    (directory / "bitladder_manifest.json").write_text("{}")
    result = by_vllm(directory)
    assert (result.verdict, result.reached) == ("missing_file", "files")


def test_another_method_of_quantisation_is_not_judged(made):
    directory = made("full")
    config = broken.read_json(directory, broken.CONFIG)
    config["quantization_config"]["quant_method"] = "compressed-tensors"
    broken.write_json(directory, broken.CONFIG, config)
    result = by_vllm(directory)
    assert (result.verdict, result.reached, result.layers) == ("ok", "configuration", ())
    assert classes(result, "warning") == {"unsupported_format"}


def test_another_algorithm_than_the_files_is_told(made):
    directory = made("unknown_algorithm")
    for name, verdict in (
        ("FP8_PER_CHANNEL_PER_TOKEN", "unsupported_format"),
        ("NVFP4", "unsupported_format"),
        ("mxfp8", "unsupported_format"),
    ):
        config = broken.read_json(directory, broken.CONFIG)
        config["quantization_config"]["quant_algo"] = name
        broken.write_json(directory, broken.CONFIG, config)
        assert by_vllm(directory).verdict == verdict
    broken.edit_tensors(directory, broken.per_channel(broken.O))
    result = by_vllm(directory)  # something isn't of the format that all else is of: each is looked at
    assert (result.verdict, result.reached) == ("wrong_format", "scales")


def test_an_unknown_architecture_is_checked_as_far_as_it_goes(made):
    directory = made("unknown_architecture")
    broken.edit_tensors(directory, broken.remove("model.layers.3.self_attn.k_proj.bias"))
    broken.edit_excludes(directory, broken.with_names(broken.O))
    result = by_vllm(directory)
    assert result.verdict == "wrong_format"
    assert ("missing_tensor", "model.layers.3.self_attn.k_proj.bias") in {
        (finding.error_class, finding.where) for finding in result.findings
    }


@pytest.mark.parametrize("value", ["lm_head", [1, 2], {"lm_head": True}])
def test_exclusions_are_a_list_of_names(made, value):
    directory = made("config_only")
    config = broken.read_json(directory, broken.CONFIG)
    config["quantization_config"]["ignore"] = value
    broken.write_json(directory, broken.CONFIG, config)
    assert {result.verdict for result in preflight(directory)} == {"unsupported_format"}


def paths_in(content, path=()):
    for key, value in content.items() if isinstance(content, dict) else ():
        yield (*path, key)
        yield from paths_in(value, (*path, key))


@pytest.mark.parametrize("name", [broken.CONFIG, broken.QUANT_CONFIG, broken.INDEX])
def test_nonsense_in_a_json_file_is_no_exception(made, name):
    directory = made("sharded")
    text = (directory / name).read_text()
    paths = list(paths_in(json.loads(text)))
    for path in random.Random(0).sample(paths, min(25, len(paths))):
        for value in (None, [], "x", -3, 1.5, {}, True, [1]):
            content = json.loads(text)
            broken.set_in(*path, value=value)(content)
            broken.write_json(directory, name, content)
            assert len(preflight(directory)) == len(RUNTIMES)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": "F32", "data_offsets": [0, 4]},
        "F32",
    ],
)
def test_a_header_that_contradicts_itself_is_a_damaged_file(made, entry):
    directory = made("top25")
    text = json.dumps({"x": entry}).encode()
    (directory / broken.WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    assert by_vllm(directory).verdict == "missing_file"


def test_what_is_no_directory_and_what_is_no_runtime(tmp_path):
    with pytest.raises(ModelError, match="no directory"):
        preflight(tmp_path / "absent")
    with pytest.raises(BitladderError, match="choose of vllm, sglang, tensorrt_llm"):
        preflight(tmp_path, ("llama.cpp",))


# --- what architectures need -----------------------------------------------------------------------------------------

UNTIED = {**TEXT, "tie_word_embeddings": False}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, lambda: llama_config()),
    "llama_with_biases": (
        transformers.LlamaForCausalLM,
        lambda: llama_config(attention_bias=True, mlp_bias=True, tie_word_embeddings=False, head_dim=48),
    ),
    "mistral": (transformers.MistralForCausalLM, lambda: transformers.MistralConfig(**UNTIED)),
    "qwen2": (transformers.Qwen2ForCausalLM, lambda: transformers.Qwen2Config(**UNTIED)),
    "qwen3": (transformers.Qwen3ForCausalLM, lambda: transformers.Qwen3Config(**UNTIED, head_dim=16)),
    "qwen2_vl": (transformers.Qwen2VLForConditionalGeneration, qwen2_vl_config),
    "qwen2_5_vl": (transformers.Qwen2_5_VLForConditionalGeneration, qwen2_5_vl_config),
    "qwen3_vl": (transformers.Qwen3VLForConditionalGeneration, qwen3_vl_config),
    "llava": (transformers.LlavaForConditionalGeneration, llava_config),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function that saves one of `MODELS`, with its side files."""
    saved = {}

    def save(name):
        if name not in saved:
            cls, config = MODELS[name]
            saved[name] = save_model(cls, config(), tmp_path_factory.mktemp(name))
            for file in ("preprocessor_config.json", "chat_template.jinja"):
                (saved[name] / file).write_text("{}")
        return saved[name]

    return save


@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_that_transformers_writes_are_those_that_are_needed(models, name):
    directory = models(name)
    assert by_vllm(directory, read_weights=True).findings == ()
    tensors = load_file(directory / broken.WEIGHTS)
    need = architecture(broken.read_json(directory, broken.CONFIG), {n: tuple(t.shape) for n, t in tensors.items()})
    assert need.known
    assert {need.rename(tensor) for tensor in tensors} == set(need.tensors)
    assert not [shape for shape in need.tensors.values() if None in shape]


@pytest.mark.parametrize("name", MODELS)
def test_every_missing_tensor_is_noticed(models, name, tmp_path):
    broken.copy(models(name), tmp_path / name)
    tensors = load_file(tmp_path / name / broken.WEIGHTS)
    needed = [tensor for tensor in tensors if not tensor.startswith("vision_tower.")]
    for lost in random.Random(0).sample(needed, 8):
        rest = {key: value for key, value in tensors.items() if key != lost}
        save_file(rest, tmp_path / name / broken.WEIGHTS, metadata={"format": "pt"})
        result = by_vllm(tmp_path / name)
        assert (result.verdict, result.findings[0].where) == ("missing_tensor", lost)


def test_a_configuration_without_sections_is_read_too(models, tmp_path):
    """Qwen2.5-VL's own config.json has the language model's sizes at its top, and calls the channels in_chans."""
    broken.copy(models("qwen2_5_vl"), tmp_path / "flat")
    config = broken.read_json(tmp_path / "flat", broken.CONFIG)
    vision = config["vision_config"]
    vision["in_chans"] = vision.pop("in_channels")
    text = config.pop("text_config")
    text.pop("tie_word_embeddings", None)
    broken.write_json(tmp_path / "flat", broken.CONFIG, {**text, **config})
    assert by_vllm(tmp_path / "flat").findings == ()
    for section, key in ((vision, "depth"), (vision, "patch_size"), (text, "num_hidden_layers"), (text, "hidden_size")):
        section.pop(key)
    broken.write_json(tmp_path / "flat", broken.CONFIG, {**text, **config, "vision_config": vision})
    assert by_vllm(tmp_path / "flat").findings == ()


@pytest.mark.parametrize("runtime", ["sglang", "tensorrt_llm"])
def test_a_model_whose_names_a_runtime_has_otherwise_is_said(models, runtime):
    (result,) = preflight(models("llava"), (runtime,))
    assert (result.verdict, result.layers) == ("ok", ())
    assert classes(result, "warning") == {"unsupported_model"}


# --- what is read ----------------------------------------------------------------------------------------------------


def full_size(directory: Path, good: Path) -> None:
    """Write a checkpoint with the sizes of Qwen2.5-VL-3B, all FP8; the weights are a hole in a sparse file."""
    directory.mkdir()
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja", broken.QUANT_CONFIG):
        shutil.copyfile(good / name, directory / name)
    config = broken.read_json(good, broken.CONFIG)
    config["text_config"] |= dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, vocab_size=151936)
    config["text_config"] |= dict(num_attention_heads=16, num_key_value_heads=2)
    config["vision_config"] |= dict(depth=32, hidden_size=1280, intermediate_size=3420, out_hidden_size=2048)
    need = architecture(config, {})
    vision = [name for name in need.linears if name.startswith("visual.")]
    config["quantization_config"]["ignore"] = [*vision, "lm_head", "model.embed_tokens"]
    (directory / broken.QUANT_CONFIG).unlink()
    broken.write_json(directory, broken.CONFIG, config)
    fp8 = [name for name in need.linears if name not in vision]
    header, offset = {}, 0
    scales = {f"{name}.{leaf}": ("F32", (), 4) for name in fp8 for leaf in ("weight_scale", "input_scale")}
    weights = {
        name: ("F8_E4M3", shape, math.prod(shape))
        if name.removesuffix(".weight") in fp8
        else ("BF16", shape, 2 * math.prod(shape))
        for name, shape in need.tensors.items()
    }
    for name, (dtype, shape, size) in {**scales, **weights}.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (directory / broken.WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + struct.pack("<f", 0.01) * len(scales))
        file.truncate(8 + len(text) + offset)


def test_only_headers_and_scales_are_read_unless_asked(good, tmp_path, monkeypatch):
    full_size(tmp_path / "full_size", good["full"])
    assert (tmp_path / "full_size" / broken.WEIGHTS).stat().st_size > 4e9
    monkeypatch.setattr(Tensor, "finite", lambda _: pytest.fail("a weight was read"))
    for result in preflight(tmp_path / "full_size"):
        assert result.findings == ()
        assert len(result.layers) == 7 * 36 + 5 * 32 + 2
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "fine", "odd"),
    [
        (torch.bfloat16, 3.3e38, float("inf")),
        (torch.bfloat16, -3.3e38, float("nan")),
        (torch.float16, -65504.0, float("-inf")),
        (torch.float32, 3.4e38, float("nan")),
        (torch.float64, 3.4e38, float("inf")),
        (torch.float8_e4m3fn, -448.0, float("nan")),
    ],
)
def test_nan_and_infinity_are_found_anywhere(tmp_path, dtype, fine, odd):
    """Also where a block of the scan ends, and the largest finite number isn't taken for one."""
    size = 3 * _SCAN_BYTES + 24
    for place in (0, _SCAN_BYTES - 1, size // 2, size - 1):
        values = torch.zeros(size, dtype=torch.float32)
        values[place] = fine
        for value, finite in ((fine, True), (odd, False)):
            values[place] = value
            save_file({"x": values.to(dtype)}, tmp_path / "x.safetensors")
            (tensor,) = _tensors_in(tmp_path / "x.safetensors")
            assert tensor.finite() == finite


def test_it_runs_without_torch_and_without_a_runtime():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'vllm', 'sglang', 'tensorrt_llm'))); "
        "from pathlib import Path; from bitladder.runtimes.preflight import preflight; "
        "print([result.verdict for result in preflight(Path(sys.argv[1]))])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(broken.SOURCE)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['ok', 'ok', 'ok']"


# --- vLLM's own matcher ----------------------------------------------------------------------------------------------

MATCH = """
import importlib, json, sys
from vllm.model_executor.layers.quantization.modelopt import ModelOptFp8Config
answers = []
for job in json.load(sys.stdin):
    model = getattr(importlib.import_module("vllm.model_executor.models." + job["module"]), job["architecture"])
    config = ModelOptFp8Config("FP8", True, None, job["excludes"])
    # a model adds its own, then its language model, which is built before the layers are matched
    text = getattr(importlib.import_module("vllm.model_executor.models." + job["text_module"]), job["text"])
    config.packed_modules_mapping = {**model.packed_modules_mapping, **text.packed_modules_mapping}
    if model.hf_to_vllm_mapper is not None:
        config.apply_vllm_mapper(model.hf_to_vllm_mapper.get_rename_mapper())
    found = []
    for name in job["layers"]:
        try:
            found.append("excluded" if config.is_layer_excluded(name) else "quantised")
        except ValueError:
            found.append("mixed")
    answers.append(found)
print("ANSWERS", json.dumps(answers))
"""
# of MODELS -> vLLM's module of it, and of its language model
VLLM_MODULES = {
    "llama": ("llama", "llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "qwen3", "Qwen3ForCausalLM"),
    "qwen2_vl": ("qwen2_vl", "qwen2", "Qwen2ForCausalLM"),
    "qwen2_5_vl": ("qwen2_5_vl", "qwen2", "Qwen2ForCausalLM"),
    "qwen3_vl": ("qwen3_vl", "qwen3", "Qwen3ForCausalLM"),
    "llava": ("llava", "llama", "LlamaForCausalLM"),
}


def random_excludes(need, pick):
    """Return exclusions as a scheme has them, and some that a hand might write."""
    groups = {}
    for name in need.linears:
        parent, _, leaf = name.rpartition(".")
        fused = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
        groups.setdefault((parent, fused.get(leaf, leaf)), []).append(name)
    chosen = [name for group in groups.values() if pick.random() < 0.5 for name in group]
    spelt = pick.choice([lambda name: name, *(_respelt(old, new) for old, new in need.renames)])
    written = [spelt(name) for name in chosen]
    by_hand = [
        "lm_head",
        "*attn*",
        "mlp",
        "visual*",
        "model.visual.*",
        "model.layers.1*",
        "model.layers.1",
        "*.layers.1.mlp.*",
        "model.language_model.layers.0.*",
        "*.self_attn.qkv_proj",
        "model.layers.0.mlp.gate_up_proj",
        "*q_proj",
        spelt(pick.choice([name for name in need.linears if name.endswith(("k_proj", "gate_proj"))])),
        "layers.[01].self_attn.o_proj",
        "*o_pro?",
        written[0] if written else "lm_head",
        f"{written[-1]}*" if written else "*",
    ]
    return [*written, *pick.sample(by_hand, pick.choice([0, 0, 1, 3]))]


def _respelt(old, new):
    return lambda name: old + name.removeprefix(new) if name.startswith(new) else name


def test_exclusions_match_as_in_vllms_own_matcher(models, vllm_warm):
    pick = random.Random(7)
    jobs, ours = [], []
    for name, (module, text_module, text) in VLLM_MODULES.items():
        config = broken.read_json(models(name), broken.CONFIG)
        need = architecture(config, {})
        for _ in range(60):
            listed = random_excludes(need, pick)
            rules = VllmRules(need, listed)
            layers = [layer.name for layer in rules.layers]
            model = {"module": module, "architecture": config["architectures"][0]}
            jobs.append({**model, "text_module": text_module, "text": text, "excludes": listed, "layers": layers})
            ours.append([rules.decide(layer).outcome for layer in rules.layers])
    done = subprocess.run(
        [str(vllm_warm), "-c", MATCH],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    assert "ANSWERS" in done.stdout, done.stderr[-3000:]
    theirs = json.loads(done.stdout.rpartition("ANSWERS")[2])
    assert {outcome for found in theirs for outcome in found} == {"quantised", "excluded", "mixed"}
    for job, mine, real in zip(jobs, ours, theirs, strict=True):
        assert mine == real, (job["architecture"], job["excludes"], list(zip(job["layers"], mine, real, strict=True)))


def test_names_are_mapped_as_by_vllms_mapper():
    need = architecture(broken.read_json(broken.SOURCE, broken.CONFIG), {})
    assert need.renames == QWEN2_VL_RENAMES
    for name, mapped in (
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("model.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("lm_head", "lm_head"),
    ):
        assert need.rename(name) == mapped


@pytest.mark.parametrize("name", ["zz.bin", "codes/layer-00000.safetensors", ".cache/other/x"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_that_the_manifest_does_not_list_is_refused(made, name, runtime):
    directory = made("top50")
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(b"")
    (result,) = preflight(directory, (runtime,))
    assert [(f.error_class, f.where) for f in result.findings] == [("unexpected_file", name)]
    (directory / name).unlink()  # the remedy
    assert preflight(directory, (runtime,))[0].findings == ()


def test_a_tensor_in_two_files_is_refused_with_and_without_an_index(made):
    for name in ("sharded", "top50"):
        directory = made(name)
        file = next(path for path in sorted(directory.glob("*.safetensors")))
        tensor, value = next(iter(load_file(file).items()))
        save_file({tensor: value}, directory / "zz.safetensors", metadata={"format": "pt"})
        result = by_vllm(directory)
        assert result.verdict == "unexpected_tensor"
        assert (result.findings[0].where, "zz.safetensors" in result.findings[0].problem) == (tensor, True)
        assert "unexpected_file" in classes(result, "error")
