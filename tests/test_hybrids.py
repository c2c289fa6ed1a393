"""Hybrids: layers of attention beside linear attention, state spaces and convolutions, each with states of its own."""

import copy
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bitladder import planning
from bitladder.checkpoints.export import export
from bitladder.data import generation
from bitladder.errors import MeasurementError, UnsupportedModel
from bitladder.evaluation.evaluate import compare
from bitladder.evaluation.reading import cached
from bitladder.evaluation.reference import Reference
from bitladder.evaluation.simulation import Simulation
from bitladder.measured import read_amax
from bitladder.measuring.kv_amax import AmaxCache
from bitladder.models.kv_layers import cache_inputs
from bitladder.models.loading import image_token_ids, load_model
from bitladder.records import CheckpointManifest
from bitladder.runtimes.checks import subject
from bitladder.steps.measure import measure as measure_step
from bitladder.steps.plan import plan
from bitladder.verification import verify
from conftest import TEXT, load_text, measure_text, save_model, spec
from test_pipeline import work_of

LINEAR = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
BASE = {**TEXT, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.1}


def text(name, **changes):
    return lambda: getattr(transformers, name)(**{**BASE, **changes})


def qwen3_5_vl():
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "num_heads": 2,
        "num_position_embeddings": 16,
    }
    text_config = {**BASE, **LINEAR, "rope_parameters": rope}
    return transformers.Qwen3_5Config(text_config=text_config, vision_config=vision, image_token_id=5, video_token_id=6)


def lfm2_vl():
    vision = {"model_type": "siglip2_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_patches": 4}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    text_config = {**BASE, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]}
    text_config["block_auto_adjust_ff_dim"] = False
    return transformers.Lfm2VlConfig(text_config=text_config, vision_config=vision, image_token_id=5)


# name -> class, configuration, layers that have keys and values
HYBRIDS = {
    "qwen3_next": ("Qwen3NextForCausalLM", text("Qwen3NextConfig", num_experts=0, **LINEAR), {1}),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", text("Qwen3_5TextConfig", **LINEAR), {1}),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", qwen3_5_vl, {1}),
    "lfm2_vl": ("Lfm2VlForConditionalGeneration", lfm2_vl, {1}),
    "bamba": ("BambaForCausalLM", text("BambaConfig", attn_layer_indices=[1], **MAMBA), {1}),
    "falcon_h1": ("FalconH1ForCausalLM", text("FalconH1Config", mamba_d_ssm=128, head_dim=16, **MAMBA), {0, 1}),
    "granite_hybrid": (
        "GraniteMoeHybridForCausalLM",
        text(
            "GraniteMoeHybridConfig",
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=128,
            layer_types=["mamba", "attention"],
            **MAMBA,
        ),
        {1},
    ),
    "jamba": (
        "JambaForCausalLM",
        text("JambaConfig", num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8),
        {1},
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        text(
            "NemotronHConfig",
            hybrid_override_pattern="M-*-",
            num_hidden_layers=4,
            mamba_num_heads=8,
            mamba_head_dim=16,
            n_groups=1,
            ssm_state_size=16,
            head_dim=16,
        ),
        {2},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        text("RecurrentGemmaConfig", block_types=["recurrent", "attention"], lru_width=64, attention_window_size=16),
        {1},
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        text("Gemma3TextConfig", head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        {0, 1},
    ),
}


@pytest.fixture(scope="module", params=HYBRIDS)
def hybrid(request, tmp_path_factory):
    """(name, directory, layers that have keys and values) of a tiny random hybrid, or a model with sliding windows."""
    cls, config, attention = HYBRIDS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    return request.param, save_model(getattr(transformers, cls), config(), directory), attention


def two_batches():
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    return [
        {"input_ids": torch.randint(10, 380, (2, 20), generator=generator), "attention_mask": mask} for _ in range(2)
    ]


@torch.no_grad()
def test_looking_changes_nothing_and_nothing_is_left_for_the_next_batch(hybrid):
    _, directory, attention = hybrid
    model = load_model(directory, torch.float32)
    cache = AmaxCache(model.config)
    for inputs in two_batches():
        seen = model(**inputs, **cache_inputs(model, cache)).logits
        cache.forget()
        assert torch.equal(seen, model(**inputs, use_cache=False).logits)
    assert set(cache.amax()) == attention
    assert all(layer.keys is None for layer in cache.layers if hasattr(layer, "keys"))
    assert not any(any(layer.has_previous_state.values()) for layer in cache.layers if hasattr(layer, "conv_states"))


@torch.no_grad()
def test_token_by_token_an_fp8_cache_gives_what_whole_forwards_give(hybrid):
    """The rounding is that of the attention layers' keys and values; other states stay as they are."""
    _, directory, attention = hybrid
    model = load_model(directory, torch.float32)
    inputs = two_batches()[0]
    exact = model(**inputs, **cached(model)).logits
    cache = AmaxCache(model.config)
    model(**inputs, **cache_inputs(model, cache))
    model.kv_scales = {layer: (keys / 448, values / 448) for layer, (keys, values) in cache.amax().items()}
    model.kv_skips = set()
    rounded = model(**inputs, **cached(model)).logits
    assert 0 < float((rounded - exact).abs().max()) < 0.2 * float(exact.abs().max())
    ids = inputs["input_ids"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    steps = model.generate(input_ids=ids, attention_mask=mask, **{**cached(model), "use_cache": True}, **options)
    for _ in range(4):
        logits = model(input_ids=ids, **cached(model)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(steps, ids)


@torch.no_grad()
def test_rows_that_a_hybrid_writes_are_drawn_from_its_own_distribution(hybrid):
    """What it writes token by token, through its own cache, is what whole forwards would draw."""
    _, directory, _ = hybrid
    model = load_model(directory, torch.float32)
    writing = generation.Writing(2, 6, 0, 1.0, (3,), True, 384, "float32", "cpu")
    written = generation.rows(copy.deepcopy(model), writing)
    never = image_token_ids(model.config)
    numbers = torch.stack([generation._random_numbers(0, row, 5) for row in range(2)])
    draw = generation._Draw(numbers, writing, never, lambda _: None)
    ids = torch.full((2, 1), 3)
    for _ in range(5):
        scores = draw(ids, model(input_ids=ids, use_cache=False).logits[:, -1].float())
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(written, ids)


ENGINES = {"native": {"method": "fisher"}, "modelopt": {"method": "gradient"}}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_hybrid_is_measured_exported_verified_and_evaluated(hybrid, engine, text_file, tmp_path):
    _, source, attention = hybrid
    measurement = measure_text(source, text_file, tmp_path, samples=4, engine=engine, **ENGINES[engine])
    amax = read_amax(measurement, tmp_path)
    (scheme,) = planning.plan_all(measurement, [spec("full", coverage=1.0, kv_cache="fp8")])
    directory = tmp_path / "checkpoint"
    export(scheme, measurement, amax, source, directory)
    verdict = verify([scheme], measurement, amax, source, {"full": directory})
    assert verdict.ok, [finding for one in verdict.checkpoints for finding in one.findings]
    manifest = CheckpointManifest.read(directory / CheckpointManifest.FILE_NAME)
    assert len(manifest.kv_scales) == 2 * len(attention)
    held_out = load_text(source, text_file, samples=2, length=20)
    with Reference.compute(source, held_out) as reference:
        exported = compare(reference, directory, "full")[0]
        simulated = Simulation(source, measurement, amax).results([reference], scheme)
    assert [result.value for result in exported] == [result.value for result in simulated]
    kl = next(result for result in exported if result.metric == "kl")
    assert kl.noise_floor < kl.value < 1


def test_a_streamed_hybrid_has_the_same_bytes(text_file, tmp_path):
    cls, config, _ = HYBRIDS["qwen3_5_text"]
    source = save_model(getattr(transformers, cls), config(), tmp_path / "source")
    whole = measure_text(source, text_file, tmp_path / "whole", samples=4)
    streamed = measure_text(source, text_file, tmp_path / "streamed", samples=4, memory_gb=0.5)
    assert streamed.fingerprint() == whole.fingerprint()


@pytest.mark.parametrize(
    ("cls", "config"), [("MambaForCausalLM", text("MambaConfig")), ("BloomForCausalLM", text("BloomConfig", n_head=2))]
)
def test_an_fp8_cache_that_can_have_no_scales_is_refused_before_anything_is_measured(
    cls, config, text_file, tmp_path, monkeypatch
):
    """Mamba has no attention; Bloom makes keys and values with the queries, in one module."""
    source = save_model(getattr(transformers, cls), config(), tmp_path / "source")
    monkeypatch.setattr("bitladder.steps.measure.measure_now", lambda *_: pytest.fail("the model was measured"))
    work = work_of((source, text_file, text_file), tmp_path / "run", kv_cache="fp8")
    with pytest.raises(UnsupportedModel, match=r"kv_cache: fp8 was asked for, but no .* set kv_cache: none"):
        measure_step(work)


def test_an_fp8_cache_that_lacks_a_layers_scales_is_refused_before_anything_is_exported(llama, text_file, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    work = work_of((source, text_file, text_file), tmp_path / "run", kv_cache="fp8")
    measure_step(work)
    with pytest.raises(MeasurementError, match=r"kv_cache: fp8 .* set kv_cache: none"):
        plan(work)


@pytest.mark.parametrize("attention", ["model.layers.1.self_attn", "backbone.layers.2.mixer"])
def test_where_vllm_looks_for_an_attentions_scales(attention):
    """Nemotron-H's attention is called `mixer`."""
    assert subject._KV_SCALE.match(f"{attention}.k_proj.k_scale")["attention"] == attention
