"""Architectures whose names pre-flight doesn't know: what is exported from any of them makes no false error.

Nothing is measured here: scores are made up, so that models count that an engine can't score.
"""

import json
import os
import random
import subprocess

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bitladder import verification
from bitladder.checkpoints.export import export
from bitladder.evaluation.evaluate import evaluate_checkpoint
from bitladder.evaluation.reference import Reference
from bitladder.measured import read_amax
from bitladder.models.families import architecture, uneven_layers
from bitladder.models.target import find_target
from bitladder.planning import plan
from bitladder.planning.pricing import _with_vllms_names
from bitladder.records import Candidate, DataSummary, Measurement
from bitladder.runtimes.preflight import RUNTIMES, preflight
from bitladder.runtimes.vllm.rules import VllmRules
from conftest import TEXT, load_text, measure_text, save_model, source_of, spec

LINEAR_ATTENTION = dict(
    head_dim=16,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    layer_types=["linear_attention", "full_attention"],
)
LATENT = dict(
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
    num_key_value_heads=2,
)
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
LISTS = dict(image_size=[28, 28], patch_size=[14, 14])
GEMMA = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=16)
GLM_ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6]))


def vision(model_type, **more):
    return dict(VISION, model_type=model_type, **more)


# name -> (class, its configuration's class, what is special)
TEXTS = {
    "phi3": ("Phi3", {}),
    "glm": ("Glm", dict(head_dim=16)),
    "glm4": ("Glm4", dict(head_dim=16)),
    "apertus": ("Apertus", {}),
    "arcee": ("Arcee", {}),
    "nemotron": ("Nemotron", {}),
    "stablelm": ("StableLm", {}),
    "gpt_neox": ("GPTNeoX", dict(rotary_pct=1.0)),
    "falcon": ("Falcon", dict(ffn_hidden_size=128, alibi=False)),
    "minicpm3": ("MiniCPM3", LATENT),
    "deepseek_v3": ("DeepseekV3", dict(LATENT, first_k_dense_replace=2, n_routed_experts=4, moe_intermediate_size=32)),
    "lfm2": ("Lfm2", dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)),
    "nemotron_h": (
        "NemotronH",
        dict(
            hybrid_override_pattern="M-*-", num_hidden_layers=4, mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16
        )
        | dict(n_groups=1, head_dim=16),
    ),
    "jamba": ("Jamba", dict(num_experts=1, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1)),
    "qwen3_5": ("Qwen3_5", LINEAR_ATTENTION),
    "falcon_h1": ("FalconH1", dict(mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, head_dim=16)),
}
VLMS = {
    "gemma3": ("Gemma3", dict(GEMMA), vision("siglip_vision_model"), dict(mm_tokens_per_image=1)),
    "mistral3": ("Mistral3", dict(model_type="mistral", head_dim=16), vision("pixtral", head_dim=16), {}),
    "internvl": ("InternVL", dict(model_type="qwen2"), dict(VISION, **LISTS), dict(image_seq_length=1)),
    "paligemma": ("PaliGemma", dict(GEMMA, model_type="gemma2"), vision("siglip_vision_model"), {}),
    "aya_vision": ("AyaVision", dict(model_type="cohere2", sliding_window=16), vision("siglip_vision_model"), {}),
    "llava_next": ("LlavaNext", dict(model_type="mistral"), vision("clip_vision_model"), {}),
    "llava_onevision": ("LlavaOnevision", dict(model_type="qwen2"), vision("siglip_vision_model"), {}),
    "vipllava": ("VipLlava", dict(model_type="llama"), vision("clip_vision_model"), dict(vision_feature_layers=[-1])),
    "glm4v": (
        "Glm4v",
        GLM_ROPE,
        dict(depth=2, hidden_size=32, intermediate_size=64, out_hidden_size=64, num_heads=2),
        {},
    ),
}


def text_model(name, directory):
    family, more = TEXTS[name]
    kind = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    config = kind(**{**TEXT, "pad_token_id": 0, **more})
    return save_model(getattr(transformers, f"{family}ForCausalLM"), config, directory)


def vlm(name, directory):
    family, text, tower, more = VLMS[name]
    config = getattr(transformers, f"{family}Config")(
        text_config={**TEXT, "pad_token_id": 0, **text}, vision_config=tower, **more
    )
    return save_model(getattr(transformers, f"{family}ForConditionalGeneration"), config, directory)


def made_up(source):
    """Return a measurement of random scores, and amax values that fit the weights."""
    target, pick = find_target(source), random.Random(0)
    tensors = load_file(source / "model.safetensors")
    amax = {}
    for group in target.groups:
        largest = max(tensors[module.tensor].abs().max().float() for module in group.modules)
        for module in group.modules:
            amax[f"{module.name}.weight_amax"], amax[f"{module.name}.input_amax"] = largest, torch.tensor(3.0)
    measurement = Measurement(
        model=source_of(source),
        calibration=DataSummary(
            source="none", kind="text", sha256="", samples=1, tokens=1, sequence_length=1, batch_size=1, seed=0
        ),
        engine="native",
        method="kl_div",
        fused_scales_shared=True,
        compute_dtype="float32",
        score_unit="nat",
        score_weights=(1.0,),
        formats=("fp8",),
        groups=target.groups,
        candidates=tuple(
            Candidate(group=g.name, format="fp8", weight_bits=8 * g.weight_elements, scores=(pick.random(),))
            for g in target.groups
        ),
        untouched=target.untouched,
        amax_sha256=None,
    )
    return measurement, amax


def exported(source, directory):
    measurement, amax = made_up(source)
    schemes = [plan(measurement, spec("half", coverage=0.5)), plan(measurement, spec("full", coverage=1.0))]
    places = {scheme.name: directory / scheme.name for scheme in schemes}
    for scheme in schemes:
        export(scheme, measurement, amax, source, places[scheme.name])
    found = verification.verify(schemes, measurement, amax, source, places)
    assert [finding for result in found.checkpoints for finding in result.findings] == []
    return measurement, places


def errors(directory, runtime):
    (result,) = preflight(directory, (runtime,))
    return [finding for finding in result.findings if finding.severity == "error"], result


@pytest.mark.parametrize("name", TEXTS)
def test_an_unknown_language_model_makes_no_false_error(name, tmp_path):
    _, places = exported(text_model(name, tmp_path / "source"), tmp_path)
    for place in places.values():
        for runtime in RUNTIMES:
            found, result = errors(place, runtime)
            assert found == []
            assert {layer.format for layer in result.layers if layer.promised != layer.format} == set()
            assert [f.error_class for f in result.findings if f.where != "chat_template.jinja"] == ["unsupported_model"]


GROUPS = {
    "phi3": {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_up_proj"]},  # fused on disk
    "glm4": {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_up_proj"]},
    "arcee": {"up_proj": ["up_proj"], "down_proj": ["down_proj"]},
    "qwen3_5": {"in_proj_qkvz": ["in_proj_qkv", "in_proj_z"], "gate_up_proj": ["gate_proj", "up_proj"]},
    "lfm2": {"w13": ["w1", "w3"], "w2": ["w2"]},
    "deepseek_v3": {"fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"], "q_b_proj": ["q_b_proj"]},
    "minicpm3": {"q_a_proj": ["q_a_proj"], "kv_a_proj_with_mqa": ["kv_a_proj_with_mqa"]},
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_what_is_fused_in_the_architecture(name, tmp_path):
    found = {}
    for group in find_target(text_model(name, tmp_path)).groups:
        found[group.name.rpartition(".")[2]] = [module.name.rpartition(".")[2] for module in group.modules]
    assert found == found | GROUPS[name]


def test_a_fused_layer_with_one_awkward_shape_stays_as_it_is(tmp_path):
    target = find_target(text_model("qwen3_5", tmp_path))  # four heads: in_proj_a is [4, 64]
    left = {m.name.rpartition(".")[2]: m.reason for m in target.untouched}
    assert "[4, 64] of model.layers.0.linear_attn.in_proj_b" in left["in_proj_a"]
    assert left["in_proj_a"] == left["in_proj_b"]
    assert not any("in_proj_ba" in group.name for group in target.groups)


@pytest.mark.parametrize("name", ["phi3", "glm", "glm4"])
def test_what_is_fused_on_disk_goes_all_the_way(name, text_file, tmp_path):
    source = text_model(name, tmp_path / "source")
    measurement = measure_text(source, text_file, tmp_path / "m")
    scheme = plan(measurement, spec("half", coverage=0.5))
    amax = read_amax(measurement, tmp_path / "m")
    export(scheme, measurement, amax, source, tmp_path / "half")
    (result,) = verification.verify([scheme], measurement, amax, source, {"half": tmp_path / "half"}).checkpoints
    assert result.findings == ()
    assert [errors(tmp_path / "half", runtime)[0] for runtime in RUNTIMES] == [[], [], []]
    held_out = load_text(source, text_file, samples=4)
    with Reference.compute(source, held_out) as reference:
        kl = evaluate_checkpoint([reference], tmp_path / "half").result("kl")
    assert 0 < kl.value < 1


def test_modelopts_engine_groups_as_the_runtime_does(text_file, tmp_path):
    source = text_model("deepseek_v3", tmp_path / "source")  # ModelOpt's own rules keep the down projections apart
    measurement = measure_text(source, text_file, tmp_path / "m", engine="modelopt", method="kl_div")
    amax = read_amax(measurement, tmp_path / "m")
    group = next(group for group in measurement.groups if group.name.endswith("layers.1.self_attn.fused_qkv_a_proj"))
    for which in ("weight_amax", "input_amax"):
        first, second = (amax[f"{module.name}.{which}"] for module in group.modules)
        assert first == second
    assert len([c for c in measurement.candidates if c.group == group.name]) == 1


MATCH = """
import importlib, json, sys
from vllm.model_executor.layers.quantization.modelopt import ModelOptFp8Config
from vllm.model_executor.models.registry import _VLLM_MODELS
answers = []
for job in json.load(sys.stdin):
    module, name = _VLLM_MODELS[job["architecture"]]
    model = getattr(importlib.import_module("vllm.model_executor.models." + module), name)
    config = ModelOptFp8Config("FP8", True, None, job["excludes"])
    config.packed_modules_mapping = getattr(model, "packed_modules_mapping", {})
    found = []
    for layer in job["layers"]:
        try:
            found.append("excluded" if config.is_layer_excluded(layer) else "quantised")
        except ValueError:
            found.append("mixed")
    answers.append(found)
print("ANSWERS", json.dumps(answers))
"""
MODULES = {
    "StableLmForCausalLM": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
    "Zamba2ForCausalLM": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "Gemma4ForCausalLM": ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"),
    "ApertusForCausalLM": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"),
    "GraniteMoeHybridForCausalLM": ("mamba.in_proj", "mamba.out_proj", "self_attn.q_proj", "self_attn.k_proj"),
    "Phi3ForCausalLM": ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "Lfm2ForCausalLM": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "conv.in_proj"),
    "Qwen3_5ForCausalLM": tuple(f"linear_attn.in_proj_{part}" for part in ("qkv", "z", "b", "a")),
}


def written(name):
    """Return what a scheme excludes that leaves the first layer in 16 bits and quantises the second."""
    names = [[f"model.layers.{layer}.{module}" for module in MODULES[name]] for layer in (0, 1)]
    return _with_vllms_names(name, names[0]), [name for layer in names for name in layer]


def test_what_is_excluded_is_excluded_by_vllms_own_matcher(vllm_warm):
    jobs, ours = [], []
    for name in MODULES:
        with_fused, modules = written(name)
        apart = [module for module in modules if ".0." in module]
        for excludes in (with_fused, apart):
            shapes = {f"{module}.weight": (16, 16) for module in modules}
            rules = VllmRules(architecture({"architectures": [name]}, shapes), excludes)
            asked = [rules.need.fusing.asked_as(layer.name) for layer in rules.layers]
            jobs.append({"architecture": name, "excludes": list(excludes), "layers": asked})
            ours.append([rules.decide(layer).outcome for layer in rules.layers])
            if excludes is with_fused:
                assert ours[-1] == ["excluded" if ".0." in layer.name else "quantised" for layer in rules.layers]
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
    for job, mine, real in zip(jobs, ours, theirs, strict=True):
        assert mine == real, job
    assert {"quantised", "mixed"} & {outcome for found in theirs[1::2] for outcome in found[:1]}  # without, it breaks


@pytest.mark.parametrize("name", VLMS)
def test_an_unknown_vision_language_model_makes_no_false_error(name, tmp_path):
    _, places = exported(vlm(name, tmp_path / "source"), tmp_path)
    for runtime in RUNTIMES:
        found, result = errors(places["half"], runtime)
        assert [finding.where for finding in found] == ["preprocessor_config.json"]  # it really isn't there
        said = [f.problem for f in result.findings if f.error_class == "unsupported_model"]
        assert len(said) == (1 if runtime == "vllm" else 2)
        assert all("isn't known here" in problem for problem in said)
        assert bool(result.layers) == (runtime == "vllm")


def uneven(layers, **config):
    return uneven_layers([f"l.{n}.{name}.weight" for n, names in enumerate(layers) for name in names], config)


def test_a_layer_is_compared_with_layers_of_its_kind():
    attention, conv = ["self_attn.q", "self_attn.k", "mlp.up"], ["conv.in", "mlp.up"]
    assert uneven([attention, conv, attention, conv]) == []
    assert uneven([attention, conv, attention[1:], conv]) == ["l.2.self_attn.q.weight"]
    assert uneven([attention, attention, ["mlp.up"]]) == ["l.2.self_attn.k.weight", "l.2.self_attn.q.weight"]
    mixers = [["mixer.q", "norm"], ["mixer.in", "norm"], ["mixer.in"]]  # Nemotron-H: one name for all kinds
    assert uneven(mixers, hybrid_override_pattern="*MM") == ["l.2.norm.weight"]
    assert uneven(mixers, text_config={"layers_block_type": ["attention", "mamba", "mamba"]}) == ["l.2.norm.weight"]
    assert uneven(mixers[:2], layer_types=7) == ["l.0.mixer.in.weight", "l.1.mixer.q.weight"]
