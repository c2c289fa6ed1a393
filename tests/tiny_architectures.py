"""Tiny random models of every decoder architecture that the installed transformers names.

`architectures()` is the list: one entry a model class of the auto mappings for causal, image-text and multimodal
language models, and the variants of `VARIANTS`. `build()` makes one of them: the configuration class's own defaults,
with every field that is a size made small by its name, then what `OVERRIDES` says of that class, where sizes hang
together in ways that names don't tell.
"""

import copy
import inspect
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

import bitladder
from bitladder.recipe import read_recipe
from bitladder.steps.workspace import Workspace

EMBEDDED = Path(bitladder.__file__).parent / "demo" / "qwen2_5_vl_digits"  # its tokenizer serves all of them
DATA = {"kind": "text", "path": "package:demo/data/captions.txt"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
VOCABULARY = 1088  # that tokenizer has 1024
SPECIAL = 1024  # pictures, sounds and the like: ids from here on, which the tokenizer never gives
HIDDEN, INNER, HEADS, HEAD, LAYERS, RANK = 64, 128, 4, 16, 2, 32
MAX_PARAMETERS = 50_000_000  # above it, a size that no rule knows was left as it was


class NotBuilt(Exception):
    """The architecture has no tiny random model; `str(error)` says why."""


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers. `model_types` are those that the auto mappings lead to it."""

    name: str
    model_types: tuple[str, ...]


def architectures() -> dict[str, Architecture]:
    """Return every class that transformers' auto mappings name for text or image-text decoding, by its name."""
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, list[str]] = {}
    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        for model_type, classes in mapping.items():
            for name in (classes,) if isinstance(classes, str) else classes:
                found.setdefault(name, []).append(model_type)
    found |= {variant: found[variant.partition(":")[0]] for variant in VARIANTS}
    return {name: Architecture(name, tuple(dict.fromkeys(found[name]))) for name in sorted(found, key=str.lower)}


# Sizes by their names, wherever in a configuration they stand.
_NAMES: tuple[tuple[float, str], ...] = (
    (HIDDEN, "hidden_size d_model n_embd embed_dim dim out_hidden_size projection_dim word_embed_proj_dim hidden_dim"),
    (HIDDEN, "lru_width encoder_hidden_size vision_output_dim projector_hidden_size output_dim embedding_size emb_dim"),
    (HIDDEN, "mamba_d_ssm text_hidden_size output_hidden_size d_embed lm_hidden_size proj_hidden_size decoder_dim"),
    (INNER, "intermediate_size ffn_dim ffn_hidden_size d_ff encoder_ffn_dim decoder_ffn_dim ffn_intermediate_size dff"),
    (INNER, "shared_intermediate_size intermediate_size_mlp mlp_dim dense_intermediate_size mlp_intermediate_size"),
    (INNER, "shared_expert_intermediate_size block_ff_dim n_inner"),
    (LAYERS, "num_hidden_layers n_layer num_layers n_layers depth encoder_layers decoder_layers resampler_depth"),
    (LAYERS, "num_global_layers num_transformer_layers num_encoder_layers num_decoder_layers"),
    (HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    (HEADS, "attention_heads resampler_n_heads linear_num_value_heads"),
    (HEAD, "head_dim global_head_dim qk_nope_head_dim v_head_dim qk_rope_head_dim mamba_d_head mamba_head_dim d_kv"),
    (
        HEAD,
        "linear_key_head_dim linear_value_head_dim resampler_head_dim attention_head_dim index_head_dim kv_channels",
    ),
    (HEAD, "query_pre_attn_scalar swa_head_dim swa_v_head_dim qk_head_dim hidden_size_per_layer_input"),
    (HEAD, "mamba_d_state ssm_state_size state_size mamba_state_size num_position_embeddings"),
    (RANK, "q_lora_rank kv_lora_rank o_lora_rank laurel_rank"),
    (RANK, "moe_intermediate_size expert_ffn_hidden_size moe_ffn_hidden_size"),
    (8, "mamba_num_heads mamba_n_heads n_mamba_heads"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts n_experts"),
    (4, "num_query_tokens resampler_n_latents"),
    (2, "num_experts_per_tok moe_topk num_experts_per_token top_k_experts moe_k linear_num_key_heads"),
    (1, "mamba_n_groups n_groups mamba_ngroups num_mem_blocks"),
    (1, "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace"),
    (0, "num_kv_shared_layers"),
    (512, "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length"),
    (512, "max_source_positions max_target_positions"),
    (16, "sliding_window attention_window_size local_attention sliding_window_size"),
    (28, "image_size input_image_size"),
    (14, "patch_size"),
    (VOCABULARY, "vocab_size text_vocab_size vocab_size_per_layer_input padded_vocab_size unpadded_vocab_size"),
    (0.1, "initializer_range"),  # wide enough that the logits of two tokens differ
)
_SIZES = {name: size for size, names in _NAMES for name in names.split()}
_HEADS_OF_KEYS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_head_kv",
    "num_global_key_value_heads",
    "swa_num_key_value_heads",
)
_PER_LAYER = ("layer_types", "block_types", "layers_block_type", "mlp_layer_types")
_TOKEN_IDS = ("image", "video", "audio", "vision", "boi", "eoi", "boa", "eoa", "speech", "begin", "end", "im_")

_COMPASS = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 64,
    "hc_lowrank": RANK,
}
_ENCODER = {"num_filters": 2, "depths": [1] * 7}
# What a class needs beside small sizes, by its name.
OVERRIDES: dict[str, dict[str, Any]] = {
    "Apertus1p5ForConditionalGeneration": {
        "image_token_offset": SPECIAL,
        "audio_token_offset": SPECIAL + 16,
        "vision_config": {"codebook_size": 16, "base_channels": 32, "num_res_blocks": 1},
        "audio_config": {"codebook_size": 16, "codebook_dim": HIDDEN},
    },
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "BltForCausalLM": {"encoder_hash_byte_group_vocab": 64},
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": SPECIAL}, "vq_config": {"base_channels": 32}},
    "CodeGenForCausalLM": {"rotary_dim": 8},
    "CohereCompassForCausalLM": {"rope_parameters": _COMPASS},
    "CohereCompassForConditionalGeneration": {"text_config": {"rope_parameters": _COMPASS}},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 10000.0}},
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
    },
    "DoryForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 1),
    },
    "Dots1ForCausalLM": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Dots3NoteForConditionalGeneration": {
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": SPECIAL}, "vq_config": {"base_channels": 32}},
    "Ernie4_5_VLMoeForConditionalGeneration": {"text_config": {"moe_num_experts": 4, "moe_k": 2}},
    "FalconForCausalLM": {"alibi": False, "new_decoder_architecture": False, "multi_query": True, "num_kv_heads": 1},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "Florence2ForConditionalGeneration": {
        "vision_config": {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1]}
        | {"patch_prenorm": [False, True], "num_groups": [4, 4], "embed_dim": [HIDDEN, HIDDEN], "num_heads": [4, 4]}
    },
    "FunAsrNanoForConditionalGeneration": {"adaptor_config": {"intermediate_size": HIDDEN // 4}},
    "Gemma3nForCausalLM": {
        "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": [INNER, INNER],
        "altup_num_inputs": 2,
    },
    "Glm46VForConditionalGeneration": {"text_config": {"rope_parameters": _COMPASS["full_attention"]}},
    "GPTJForCausalLM": {"rotary_dim": 8},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "GPTNeoXForCausalLM": {"rotary_pct": 1.0},
    "Granite4VisionForConditionalGeneration": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "downsample_rate": "1/2",
    },
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "JanusForConditionalGeneration": {"vq_config": {"base_channels": 32, "latent_channels": 32}},
    "KyutaiSpeechToTextForConditionalGeneration": {"codec_config": {"upsample_groups": HIDDEN}},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "Molmo2ForConditionalGeneration": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "MuseSparkForConditionalGeneration": {
        "audio_config": {"patch_sizes": [16, 6], "hidden_sizes": [32, 64], "depths": [1, 1], "num_hidden_layers": 2}
    },
    "Nemotron3_5TranscribeForConditionalGeneration": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": HIDDEN}}},
        "word_timestamp_config": {"blank_token_id": VOCABULARY - 1},
    },
    "NemotronH_Omni_Reasoning_V3": {"vision_config": {"video_temporal_patch_size": 2}},
    "Qwen2_5OmniForConditionalGeneration": {
        "token2wav_config": {"bigvgan_config": {"upsample_initial_channel": 64}, "dit_config": {"ff_mult": 1}}
    },
    "Qwen3OmniMoeForConditionalGeneration": {
        "talker_config": {"text_config": {"shared_expert_intermediate_size": RANK, "num_experts": 4}}
    },
    "Qwen4ExpForCausalLM": _INDEXER,
    "Qwen4ExpForConditionalGeneration": {"text_config": _INDEXER},
    "VibeVoiceAsrForConditionalGeneration": {
        "acoustic_tokenizer_encoder_config": _ENCODER,
        "semantic_tokenizer_encoder_config": _ENCODER,
    },
    "Qwen3NextForCausalLM": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "ReformerModelWithLMHead": {
        "is_decoder": True,
        "local_num_chunks_after": 0,
        "lsh_num_chunks_after": 0,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [32, 32],
    },
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "num_hidden_layers": 2},
    "xLSTMForCausalLM": {"qk_dim_factor": 1.0},
    "ZambaForCausalLM": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}
# The same class in a kind that its defaults don't show: mixtures without experts, other blocks, odd shapes.
VARIANTS: dict[str, dict[str, Any]] = {
    "DeepseekV3ForCausalLM:dense": {"mlp_layer_types": ["dense", "dense"], "first_k_dense_replace": 2},
    "FalconForCausalLM:new": {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
    "FalconForCausalLM:alibi": {"alibi": True, "multi_query": False, "num_kv_heads": HEADS},
    "GraniteMoeHybridForCausalLM:dense": {
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": ["mamba", "attention"],
        "num_hidden_layers": 2,
    },
    "JambaForCausalLM:dense": {"num_experts": 1, "num_experts_per_tok": 1},
    "Lfm2ForCausalLM:plain": {"block_auto_adjust_ff_dim": False},
    "Llama4ForCausalLM:dense": {"moe_layers": [], "interleave_moe_layer_step": 100},
    "LlamaForCausalLM:biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "LlamaForCausalLM:odd-heads": {"head_dim": 24, "num_key_value_heads": 1},
    "LlamaForCausalLM:odd-mlp": {"intermediate_size": 132},
    "NemotronHForCausalLM:dense": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
    "Qwen3NextForCausalLM:dense": {"num_experts": 0, "mlp_only_layers": [0, 1]},
}
NOT_DECODERS: dict[str, str] = {
    "Gemma4AssistantForCausalLM": "drafts tokens from another model's keys and values: doesn't run alone",
    "Gemma4UnifiedAssistantForCausalLM": "drafts tokens from another model's keys and values: doesn't run alone",
    "DiffusionGemmaForBlockDiffusion": "writes blocks of tokens by diffusion: no causal head",
    "PI0ForConditionalGeneration": "writes a robot's actions: no causal head",
    "VisionEncoderDecoderModel": "an encoder-decoder of two models of one's choice",
}


def tiny_values(config: Any) -> dict[str, Any]:
    """Return the keyword arguments of a small configuration like `config`."""
    values = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    small: dict[str, Any] = {}
    for key, value in values.items():
        if key in (config.sub_configs or {}) and value is not None:
            small[key] = tiny_values(value)
            small[key]["model_type"] = value.model_type
        elif key in ("head_dim", *_HEADS_OF_KEYS) and value is None:
            small[key] = HEAD if key == "head_dim" else HEADS
        elif key in _SIZES and value is not None:
            small[key] = _like(value, _SIZES[key])
        elif key in _HEADS_OF_KEYS and isinstance(value, int):
            heads = next((values[k] for k in ("num_attention_heads", "n_head", "n_heads") if values.get(k)), None)
            small[key] = HEADS if value == heads else 1 if value == 1 else 2
        elif key.endswith(("token_id", "token_index")) and key.startswith(_TOKEN_IDS) and isinstance(value, int):
            small[key] = SPECIAL + sum(map(ord, key)) % 64
    layers = [key for key in _PER_LAYER if isinstance(values.get(key), list | tuple)]
    if layers:
        kinds = list(dict.fromkeys(zip(*(values[key] for key in layers), strict=False)))
        kinds = kinds if len(kinds) > 1 else kinds * LAYERS
        small.update({key: [kind[i] for kind in kinds] for i, key in enumerate(layers)})
        small.update({key: len(kinds) for key in ("num_hidden_layers", "num_layers") if key in small})
    if "rope_parameters" in values:
        small["rope_parameters"] = copy.deepcopy(values["rope_parameters"])
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "max_window_layers": LAYERS}
    small.update({key: value for key, value in special.items() if isinstance(values.get(key), int | list)})
    return small


def _like(value: Any, size: Any) -> Any:
    """Return `size` in the shape of `value`: a number, or a list for as many layers or sides; zero stays."""
    if isinstance(value, list | tuple):
        return [size] * min(len(value), LAYERS)
    return size if isinstance(value, int | float) and not isinstance(value, bool) and value else value


def _with_rope_sections(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with sections of multimodal rotary embeddings that fit the small heads."""
    rope = dict(values["rope_parameters"])
    half = int(HEAD * rope.get("partial_rotary_factor", 1.0)) // 2
    if half < 3:  # every section has something
        rope["partial_rotary_factor"], half = 1.0, HEAD // 2
    rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return {**values, "rope_parameters": rope}


def _merge(small: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `small` with what `over` says; `None` in place of a nested configuration leaves it out."""
    merged = dict(small)
    for key, value in over.items():
        merged[key] = (
            _merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        )
    return merged


def configure(name: str) -> Any:
    """Return the tiny configuration of an architecture.

    Raises:
        NotBuilt: it has none.
    """
    if name in NOT_DECODERS:
        raise NotBuilt(NOT_DECODERS[name])
    class_name, kind = name.partition(":")[0], model_class(name).config_class
    values = _defaults(kind)
    if "mrope_section" in inspect.getsource(sys.modules[model_class(name).__module__]):
        text = values.get("text_config") or values
        if text.get("rope_parameters"):
            text.update(_with_rope_sections(text))
    values = _merge(_merge(values, OVERRIDES.get(class_name, {})), VARIANTS.get(name, {}))
    return kind(**values)


def _defaults(kind: Any) -> dict[str, Any]:
    """Return the small values of a configuration class."""
    values = tiny_values(kind())
    if isinstance(getattr(kind(), "is_decoder", None), bool):  # BERT and its like see what follows otherwise
        values["is_decoder"] = True
    return values


def model_class(name: str) -> Any:
    """Return the transformers class of an architecture.

    Raises:
        NotBuilt: there is none.
    """
    cls = getattr(transformers, name.partition(":")[0], None)
    if cls is None:
        raise NotBuilt("transformers names it, but has no such class")
    return cls


def build(name: str, directory: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a tiny random model of an architecture, with the embedded model's tokenizer, and return its directory.

    Raises:
        NotBuilt: it can't be built tiny, or isn't a decoder.
    """
    config = configure(name)
    torch.manual_seed(0)
    cls = model_class(name)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    if parameters > MAX_PARAMETERS:
        raise NotBuilt(f"{parameters / 1e6:.0f} million parameters: a size that no rule makes small")
    model = cls(config).to(dtype).eval()
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    sees = any("vision" in key for key in config.sub_configs or {})
    for file in (*TOKENIZER_FILES, *(("preprocessor_config.json",) if sees else ())):
        shutil.copy(EMBEDDED / file, directory / file)
    return directory


def why_it_does_not_run(name: str, directory: Path) -> str | None:
    """Return in one line why transformers can't run the model in `directory` on text alone, or None: it does."""
    try:
        with torch.no_grad():
            model = model_class(name).from_pretrained(directory, dtype=torch.float32).eval()
            model(input_ids=torch.arange(64).reshape(2, 32) + 16)
    except Exception as error:  # whatever its code raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def workspace(model: Path, output: Path, engine: str) -> Workspace:
    """Return the workspace of a short recipe on text: half of the searched weights in FP8, and all."""
    samples = {"data": DATA, "samples": 8, "sequence_length": 32, "batch_size": 4}
    recipe = {
        "model": {"path": str(model.resolve())},
        "calibration": samples,
        "held_out": samples,
        "measurement": {"engine": engine},
        "schemes": [{"name": "half", "coverage": 0.5}, {"name": "full", "coverage": 1.0}],
        "controls": {"kinds": []},
        "output": str(output.resolve()),
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return Workspace(read_recipe(path), output)
