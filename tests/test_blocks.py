"""Decoders of every shape of block and head, by the native engine: against ModelOpt, and against whole models."""

from contextlib import ExitStack

import pytest
import torch
import transformers

import tiny_architectures
from bitladder import cli
from bitladder.cli import terminal
from bitladder.errors import EngineError, UnsupportedModel
from bitladder.formats import get_format
from bitladder.measured import read_amax
from bitladder.measuring import native
from bitladder.measuring.candidates import InForm, forms_of, taken
from bitladder.measuring.job import Job
from bitladder.measuring.layers import DeviceMemory, Layers
from bitladder.measuring.measure import check_engine
from bitladder.measuring.tail import Tail
from bitladder.models import anatomy
from bitladder.models.loading import load_model
from bitladder.models.target import BYPASSED, UNREACHED, find_target
from bitladder.recipe import MeasureSpec
from bitladder.steps.look import look
from bitladder.steps.measure import measure
from conftest import TEXT, load_text, save_model
from test_native import ARITHMETIC, assert_same_scores, measured_by, measured_by_both

LATENT = dict(
    q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=2
)
SHAPES = {
    "Cohere": {"logit_scale": 0.25},
    "Gemma2": {"head_dim": 32, "final_logit_softcapping": 1.0},
    "Granite": {"logits_scaling": 4.0},
    "GPTNeoX": {},
    "GPTJ": {"rotary_dim": 8, "n_embd": 64, "n_layer": 2, "n_head": 2},
    "OPT": {"ffn_dim": 128, "word_embed_proj_dim": 32, "max_position_embeddings": 256},
    "Phi": {},
    "DeepseekV3": {**LATENT, "first_k_dense_replace": 2, "n_routed_experts": 4},
    "Falcon": {"new_decoder_architecture": True, "num_kv_heads": 1, "ffn_hidden_size": 128},
    "Bloom": {"n_layer": 2, "n_head": 2},
    "Mpt": {"d_model": 64, "n_layers": 2, "n_heads": 2, "max_seq_len": 256, "expansion_ratio": 2},
    "Mamba": {},
}


def model_of(name, directory):
    config = getattr(transformers, f"{name}Config")(
        **{**TEXT, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.1, **SHAPES[name]}
    )
    return save_model(getattr(transformers, f"{name}ForCausalLM"), config, directory)


@pytest.mark.parametrize("name", SHAPES)
def test_gradient_scores_equal_modelopts(name, text_file, tmp_path):
    directory = model_of(name, tmp_path / "model")
    ours, theirs = measured_by_both(directory, load_text(directory, text_file), tmp_path)
    assert_same_scores(ours, theirs, 0.02)


def opened(name, directory):
    target = find_target(directory)
    job = Job(target, (), (), MeasureSpec(engine="native"), "cpu", lambda *_: None)
    model = load_model(directory, torch.float32, "cpu").requires_grad_(False)
    return Layers.of(model, target, DeviceMemory("cpu", None), native.REMEDY), job


@pytest.mark.parametrize("name", SHAPES)
def test_what_stands_behind_the_layers_is_the_models_own(name, tmp_path):
    layers, _ = opened(name, model_of(name, tmp_path))
    tail, ids = Tail(layers), torch.arange(10, 34).view(2, 12)
    seen = []

    def keep(_, __, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = layers.layers[-1].register_forward_hook(keep)
    logits = layers.model(input_ids=ids, use_cache=False).logits
    handle.remove()
    torch.testing.assert_close(tail.logits(seen[0]), logits, rtol=1e-5, atol=1e-6)
    assert tail.plain == (name == "DeepseekV3")


@pytest.mark.parametrize("name", ["Cohere", "Falcon", "OPT", "DeepseekV3"])
def test_kl_is_that_of_whole_models(name, text_file, tmp_path):
    directory = model_of(name, tmp_path / "model")
    data = load_text(directory, text_file)
    found = measured_by("native", directory, data, tmp_path / "out", method="kl_div", dtype="float32")
    amax = read_amax(found, tmp_path / "out")
    target, model = find_target(directory), load_model(directory, torch.float32, "cpu")
    batch = data.batches[0]
    with torch.no_grad():
        own = model(**batch.inputs, use_cache=False).logits[:, :-1][batch.predicted].double().log_softmax(-1)
        for group, candidate in zip(target.groups, found.candidates, strict=True):
            with ExitStack() as stack:
                for module, form in forms_of(model, group, get_format("fp8"), amax, None).items():
                    stack.enter_context(taken(model.get_submodule(module), InForm, form=form))
                other = model(**batch.inputs, use_cache=False).logits[:, :-1][batch.predicted].double().log_softmax(-1)
            kl = float((own.exp() * (own - other)).sum())
            assert candidate.scores[0] == pytest.approx(kl, rel=0.02), group.name


@pytest.mark.parametrize("method", ["fisher", "kl_div"])
@pytest.mark.parametrize("name", ["Falcon", "OPT", "Cohere"])  # DeepSeek-V3 isn't streamed: some of it is float32
def test_streamed_scores_are_the_same(name, method, text_file, tmp_path):
    directory = model_of(name, tmp_path / "model")
    data = load_text(directory, text_file)
    whole = measured_by("native", directory, data, tmp_path / "whole", method=method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceMemory, "fits", lambda *_: False)
        streamed = measured_by("native", directory, data, tmp_path / "streamed", method=method)
    assert_same_scores(streamed, whole, ARITHMETIC)


@pytest.mark.parametrize("name", ["OPT", "DeepseekV3", "Falcon", "Cohere"])
def test_codes_are_compensated(name, text_file, tmp_path):
    directory = model_of(name, tmp_path / "model")
    data = load_text(directory, text_file, samples=16)
    found = measured_by("native", directory, data, tmp_path / "out", rounding="compensated")
    assert all(candidate.scores for candidate in found.candidates)


def test_hidden_states_that_change_between_layers_are_noticed():
    model = targets_on_meta("Phi")
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    assert anatomy.look(model, "model.layers").problem == "changes the hidden states before decoder layer 1"


def targets_on_meta(name):
    with torch.device("meta"):
        return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**TEXT)).eval()


SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}


def test_where_native_refuses_the_remedy_that_is_printed_works(tmp_path, monkeypatch):
    """Gemma 4's last layers read the keys and values of others."""
    monkeypatch.setitem(tiny_architectures.VARIANTS, "Gemma4ForCausalLM:shared", SHARED)
    directory = tiny_architectures.build("Gemma4ForCausalLM:shared", tmp_path / "model")
    with terminal.console().capture() as shown:
        cli.app(["inspect", str(directory)], standalone_mode=False)
    assert shown.get().strip().endswith("(shared keys and values?); use engine: modelopt")
    with pytest.raises(EngineError, match="shared keys and values"):
        look(tiny_architectures.workspace(directory, tmp_path / "native", "native"))
    work = tiny_architectures.workspace(directory, tmp_path / "modelopt", "modelopt")
    look(work)
    assert measure(work).groups


@pytest.mark.parametrize("name", ["InstructBlipForConditionalGeneration", "VoxtralRealtimeForConditionalGeneration"])
def test_a_model_that_needs_more_than_text_is_refused_by_inspect(name, tmp_path):
    directory = tiny_architectures.build(name, tmp_path / "model")
    with pytest.raises(UnsupportedModel, match=f"{name} can't be run on text alone"):
        cli.app(["inspect", str(directory)], standalone_mode=False)


@pytest.mark.parametrize(
    "name", ["ModernBertDecoderForCausalLM", "Llama4ForCausalLM:dense", "GraniteSWAForCausalLM", "Gemma3nForCausalLM"]
)
def test_decoder_and_layers_are_found(name, tmp_path):
    assert find_target(tiny_architectures.build(name, tmp_path)).groups


@pytest.mark.parametrize(
    ("asked", "workers", "told", "instead"),
    [
        ({}, 0, "", {}),
        ({"method": "fisher"}, 0, " with method: gradient", {"method": "gradient"}),
        ({"rounding": "compensated", "damping": 0.5}, 0, " with rounding: nearest, no damping", {}),
        ({"memory_gb": 2}, 2, " with no memory_gb, no workers", {}),
        ({"formats": ["nvfp4", "fp8"]}, 0, " with formats among fp8, fp8_pc_pt, .*", {"formats": ["fp8"]}),
    ],
)
def test_where_only_modelopt_measures_all_that_has_to_change_is_said(asked, workers, told, instead, tmp_path):
    target = find_target(tiny_architectures.build("Gemma3nForCausalLM", tmp_path))
    with pytest.raises(EngineError, match=rf"Gemma3nForCausalLM gives .*; use engine: modelopt{told}$"):
        check_engine(MeasureSpec(**asked), target, "cpu", workers)
    check_engine(MeasureSpec(engine="modelopt", **instead), target, "cpu")
    with pytest.raises(
        EngineError, match="nvfp4 on NVIDIA GPUs alone.*; use formats that ModelOpt measures here: fp8,"
    ):
        check_engine(MeasureSpec(engine="modelopt", formats=("nvfp4",)), target, "cpu")


BART = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 128}


@pytest.mark.parametrize(
    ("name", "changes", "module", "reason"),
    [("Mamba", {}, "mixer.dt_proj", BYPASSED), ("Bart", BART, "encoder_attn.q_proj", UNREACHED)],
)
def test_modules_that_never_run_are_not_searched(name, changes, module, reason, text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, name, {**changes, "time_step_rank": 16})
    directory = model_of(name, tmp_path / "model")
    left = {each.name: each.reason for each in find_target(directory).untouched}
    assert {why for each, why in left.items() if each.endswith(module)} == {reason}
    found = measured_by("native", directory, load_text(directory, text_file), tmp_path / "out")
    assert not any(module in group.name for group in found.groups)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((11, 23), ("rows", "tokens")),
        ((11, 1, 23), ("rows", "other", "tokens")),
        ((253,), ("both",)),
        ((23, 11), ("tokens", "rows")),
        ((11, 23, 4), ("rows", "tokens", "other")),
        ((44, 23), None),
        ((11, 23, 23), None),
    ],
)
def test_a_layout_is_told_by_its_shape(shape, layout):
    assert anatomy._layout(torch.Size(shape)) == layout


def test_tokens_come_first():
    x, shape = torch.arange(6).view(2, 3), torch.Size((2, 3))
    for layout, given in (
        (("rows", "tokens"), x),
        (("rows", "other", "tokens"), x[:, None]),
        (("both",), x.flatten()),
        (("tokens", "rows"), x.t()),
    ):
        assert torch.equal(anatomy.tokens_first(given, layout, shape).reshape(2, 3), x), layout
