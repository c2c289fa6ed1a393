import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bitladder.errors import ModelError, UnsupportedModel
from bitladder.models.loading import checkpoint_tensor_names, load_config, load_model, most_positions
from bitladder.models.target import find_target
from bitladder.models.weights import WeightFiles
from conftest import (
    llama_config,
    llava_config,
    qwen2_5_vl_config,
    qwen2_vl_config,
    qwen3_vl_config,
    save_model,
)

MODELS = {
    "qwen2_5_vl": (transformers.Qwen2_5_VLForConditionalGeneration, qwen2_5_vl_config, "model.language_model", 2),
    "qwen2_vl": (transformers.Qwen2VLForConditionalGeneration, qwen2_vl_config, "model.language_model", 2),
    "qwen3_vl": (transformers.Qwen3VLForConditionalGeneration, qwen3_vl_config, "model.language_model", 2),
    "llava": (transformers.LlavaForConditionalGeneration, llava_config, "model.language_model", 2),
    "llama": (transformers.LlamaForCausalLM, llama_config, "model", 3),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    cls, config, language_model, layers = MODELS[request.param]
    directory = save_model(cls, config(), tmp_path_factory.mktemp(request.param), tokenizer=False)
    return directory, language_model, layers


def test_groups_are_the_fused_modules_of_the_language_model(model):
    directory, language_model, layers = model
    target = find_target(directory)
    assert target.language_model == language_model
    assert len(target.groups) == 4 * layers
    first = {
        group.name.rpartition(".")[2]: [m.name.rpartition(".")[2] for m in group.modules] for group in target.groups
    }
    assert first == {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "o_proj": ["o_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
        "down_proj": ["down_proj"],
    }
    stored = WeightFiles.open(directory).tensors
    for group in target.groups:
        assert group.name.startswith(f"{language_model}.layers.")
        assert group.weight_elements == sum(m.shape[0] * m.shape[1] for m in group.modules)
        for module in group.modules:
            assert stored[module.tensor].shape == module.shape


def test_everything_else_is_listed_with_a_reason(model):
    directory, _, _ = model
    target = find_target(directory)
    searched = {module.name for group in target.groups for module in group.modules}
    loaded = load_model(directory, torch.bfloat16)
    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d, torch.nn.Conv3d)
    others = {name for name, module in loaded.named_modules() if isinstance(module, kinds)} - searched
    assert {module.name for module in target.untouched} == others
    assert all(module.reason for module in target.untouched)
    assert any("vocabulary head" in module.reason for module in target.untouched)


def test_tensor_names_lead_to_the_loaded_weights(model):
    directory, _, _ = model
    stored = {}
    for path in directory.glob("*.safetensors"):
        stored.update(load_file(path))
    loaded = load_model(directory, torch.bfloat16)
    names = checkpoint_tensor_names(loaded, stored)
    parameters = dict(loaded.named_parameters())
    assert set(names) == set(stored)
    assert all(torch.equal(stored[tensor], parameters[parameter]) for tensor, parameter in names.items())


REFUSED = {
    "image classifier": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
        ),
        "no language model",
    ),
    "encoder-decoder": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=384, d_model=64, d_ff=128, num_layers=1, num_heads=2, d_kv=32)
        ),
        "encoder-decoder",
    ),
    "mixture of experts": (
        lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                vocab_size=384,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=2,
            )
        ),
        "experts",
    ),
    "no linear modules": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=384, n_embd=64, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        ),
        "no torch.nn.Linear",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_reason(kind, tmp_path):
    build, reason = REFUSED[kind]
    build().to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=reason):
        find_target(tmp_path)


def test_awkward_shapes_are_left_alone_with_the_reason(tmp_path):
    save_model(transformers.LlamaForCausalLM, llama_config(intermediate_size=120), tmp_path, tokenizer=False)
    target = find_target(tmp_path)
    assert {group.name.rpartition(".")[2] for group in target.groups} == {"qkv_proj", "o_proj"}
    left = [module for module in target.untouched if module.name.endswith("up_proj")]
    assert "not divisible by 16" in left[0].reason


def test_float32_weights_are_refused(tmp_path):
    transformers.LlamaForCausalLM(llama_config()).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="is stored in F32 .*Cast it"):
        find_target(tmp_path)


def test_already_quantised_is_refused(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    with pytest.raises(UnsupportedModel, match="already quantised"):
        find_target(tmp_path)


def test_missing_and_damaged_files(llama, tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        find_target(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="neither"):
        find_target(tmp_path)
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    whole = (llama / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="truncated"):
        find_target(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole[:5])
    with pytest.raises(ModelError, match="truncated"):
        find_target(tmp_path)


def test_missing_shard(sharded_llama, tmp_path):
    for path in sharded_llama.iterdir():
        if not path.name.startswith("model-00002"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match="model-00002"):
        find_target(tmp_path)


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (llama_config(), 512),
        (llama_config(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}), 2048),
        (
            llama_config(
                rope_parameters={
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 128,
                }
            ),
            512,
        ),
        (transformers.GPT2Config(n_positions=77), 77),
        (transformers.Gemma3TextConfig(max_position_embeddings=300), 300),
        (qwen2_5_vl_config(), 32768),
        (transformers.FalconConfig(alibi=True), None),
        (transformers.FalconConfig(alibi=False, max_position_embeddings=99), 99),
        (transformers.BloomConfig(), None),
        (transformers.MambaConfig(), None),
    ],
)
def test_how_many_positions_a_model_has(config, most, tmp_path):
    """As vLLM derives them: a factor of linear scaling counts, YaRN's is in the limit already."""
    config.save_pretrained(tmp_path)
    assert most_positions(load_config(tmp_path)) == most


@pytest.mark.parametrize("section", [None, "text_config"])
def test_a_number_of_layers_that_no_model_has(llama, tmp_path, section):
    shutil.copytree(llama, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text())
    (content if section is None else content.setdefault(section, {}))["num_hidden_layers"] = 10**12
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="num_hidden_layers is 1000000000000, no model has so many; correct it"):
        load_config(tmp_path / "model")
