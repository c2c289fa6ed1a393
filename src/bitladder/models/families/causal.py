"""Language models: Llama, Mistral, Qwen2, Qwen3.

Source: vllm 0.32.0, model_executor/models: llama.py, mistral.py, qwen2.py, qwen3.py; for what a configuration omits,
transformers' configuration classes.
"""

from collections.abc import Mapping
from typing import Any

from bitladder.models.families.base import Architecture, Family, TextKind, number, product

TEXT_KINDS = {
    "llama": TextKind(qkv_bias=None),
    "mistral": TextKind(qkv_bias=False),
    "qwen2": TextKind(qkv_bias=True),
    "qwen3": TextKind(qkv_bias=None, qk_norm=True, head_dim=128),
}
FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral"),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
}


def add_text(need: Architecture, text: Mapping[str, Any], kind: TextKind, layers: int) -> None:
    """Add the language model's tensors."""
    hidden, inner = number(text, "hidden_size"), number(text, "intermediate_size")
    heads = number(text, "num_attention_heads")
    kv_heads = number(text, "num_key_value_heads") or heads
    head = number(text, "head_dim") or kind.head_dim
    if head is None and hidden and heads:
        head = hidden // heads
    queries, keys = product(heads, head), product(kv_heads, head)
    attention_bias = bool(text.get("attention_bias", False))
    qkv_bias = attention_bias if kind.qkv_bias is None else kind.qkv_bias
    o_bias, mlp_bias = kind.qkv_bias is None and attention_bias, bool(text.get("mlp_bias", False))
    need.add(f"{need.text}embed_tokens.weight", number(text, "vocab_size"), hidden)
    need.add(f"{need.text}norm.weight", hidden)
    for layer in range(layers):
        prefix = f"{need.text}layers.{layer}"
        need.add(f"{prefix}.input_layernorm.weight", hidden)
        need.add(f"{prefix}.post_attention_layernorm.weight", hidden)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            need.linear(f"{prefix}.self_attn.{name}_proj", rows, hidden, qkv_bias)
        need.linear(f"{prefix}.self_attn.o_proj", hidden, queries, o_bias)
        for name in ("q_norm", "k_norm") if kind.qk_norm else ():
            need.add(f"{prefix}.self_attn.{name}.weight", head)
        for name in ("gate_proj", "up_proj"):
            need.linear(f"{prefix}.mlp.{name}", inner, hidden, mlp_bias)
        need.linear(f"{prefix}.mlp.down_proj", hidden, inner, mlp_bias)
    if not need.tied:
        need.linear(need.head, number(text, "vocab_size"), hidden, bias=False)
