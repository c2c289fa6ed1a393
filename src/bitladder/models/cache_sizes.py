"""What each attention layer caches of a token, from the searched modules and the configuration alone; without torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bitladder.models.families import section_of
from bitladder.records import QuantGroup, UntouchedModule, layer_number

_KEYS, _VALUES = "k_proj", "v_proj"
_LATENTS = "kv_a_proj_with_mqa"  # makes what multi-head latent attention caches for all heads
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
_WHOLE = "full_attention"


@dataclass(frozen=True)
class CachedNumbers:
    """What one attention layer caches."""

    attention: str
    numbers: int  # of a token
    window: int | None  # tokens of a sequence that it keeps at most; None: all


def cached_numbers(
    config: Mapping[str, Any], groups: Iterable[QuantGroup], untouched: Iterable[UntouchedModule]
) -> tuple[CachedNumbers, ...]:
    """Return what each attention layer caches, in network order; empty where some layer's isn't known.

    It is known where keys and values are made by searched modules of their own, or latents of both cached. A layer of
    which the configuration doesn't say how many tokens it keeps is taken to keep all.

    Args:
        config: of the model.
        groups: searched.
        untouched: linear modules that aren't.

    Source: vllm 0.32.0, v1/kv_cache_interface.py, AttentionSpec and MLAAttentionSpec, whose sizes these are.
    """
    text = section_of(config, "text_config") or config
    kinds = text.get("layer_types") or ()
    shared = text.get("num_kv_shared_layers") or 0  # the last ones, which read the cache of others
    own = int(text.get("num_hidden_layers") or 0) - int(shared)
    rows = {m.name: m.shape[0] for group in groups for m in group.modules if m.shape is not None}
    left = [one.name for one in untouched if _beside(one.name, rows)]
    if any(name.rpartition(".")[2] == _KEYS for name in left):
        return ()
    found = []
    for name in (*rows, *left):
        attention, _, leaf = name.rpartition(".")
        number = layer_number(name) if leaf in (_KEYS, _LATENTS) else own
        kind = kinds[number] if number < len(kinds) else _WHOLE
        if number >= own or (kind != _WHOLE and kind not in _WINDOWS):
            continue
        if leaf == _LATENTS:
            numbers = int(text["kv_lora_rank"]) + int(text["qk_rope_head_dim"])
        else:
            numbers = rows[name] + rows.get(f"{attention}.{_VALUES}", rows[name])
        found.append(CachedNumbers(attention, numbers, text.get(_WINDOWS[kind]) if kind in _WINDOWS else None))
    return tuple(found)


def _beside(name: str, searched: Mapping[str, int]) -> bool:
    """Return whether a module lies in the list of layers in which the searched ones do."""
    layers = {one.partition(".layers.")[0] for one in searched}
    return name.partition(".layers.")[0] in layers


def unknown_window(config: Mapping[str, Any]) -> int | None:
    """Return the tokens that some layers may keep at most, where the configuration doesn't say which; None: it does."""
    text = section_of(config, "text_config") or config
    window = text.get("sliding_window")
    told = text.get("layer_types") or text.get("use_sliding_window") is False
    return None if told or window is None else int(window)
