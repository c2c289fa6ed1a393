"""The FP8 KV cache: which modules make keys and values, and what the cache sees.

transformers hands every layer's new keys and values (after the rotary embedding, as they would be cached) to
`Cache.update`, which returns what attention reads. `AmaxCache` looks at them there while calibrating; `Fp8Cache` rounds
them there while evaluating, as a runtime does that reads back what it stored. Queries stay as they are. Both are made
for the model's configuration: layers of a hybrid that aren't attention keep states of other kinds in the same cache.

In a measurement a layer's values lie beside those of its modules, as "<k_proj>.k_amax" and "<v_proj>.v_amax"; in a
checkpoint its scales lie beside the weights, as "<k_proj>.k_scale" and "<v_proj>.v_scale" (ModelOpt's names).
"""

import copy
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn
from transformers import DynamicCache

from bitladder import numerics
from bitladder.amax import RunningAmax, amax_of
from bitladder.errors import ModelError, UnsupportedModel
from bitladder.records import QuantGroup, QuantModule

KEY_MODULE, VALUE_MODULE = "k_proj", "v_proj"


@dataclass(frozen=True)
class CachedLayer:
    """The modules that make one attention layer's keys and values."""

    key: QuantModule
    value: QuantModule

    @property
    def amax_names(self) -> tuple[str, str]:
        """What the keys' and the values' amax are called in a measurement."""
        return f"{self.key.name}.k_amax", f"{self.value.name}.v_amax"

    @property
    def scale_names(self) -> tuple[str, str]:
        """What their scales are called in a checkpoint; the modules' tensors must be known."""
        assert self.key.tensor is not None
        assert self.value.tensor is not None
        return (
            f"{self.key.tensor.removesuffix('.weight')}.k_scale",
            f"{self.value.tensor.removesuffix('.weight')}.v_scale",
        )


def cached_layers(groups: Iterable[QuantGroup]) -> tuple[CachedLayer, ...]:
    """Return the attention layers among the searched modules, in network order.

    A layer whose keys and values are not made by searched `k_proj` and `v_proj` modules isn't among them.
    """
    modules = {module.name: module for group in groups for module in group.modules}
    return tuple(
        CachedLayer(module, modules[value])
        for name, module in modules.items()
        if name.rpartition(".")[2] == KEY_MODULE
        and (value := f"{name.removesuffix(KEY_MODULE)}{VALUE_MODULE}") in modules
    )


def check_layers(groups: Iterable[QuantGroup]) -> None:
    """Check that an FP8 KV cache can be asked for, before anything is measured.

    Raises:
        UnsupportedModel: no layer's keys and values are made by modules of their own.
    """
    if not cached_layers(groups):
        raise UnsupportedModel(
            f"kv_cache: fp8 was asked for, but no searched layer makes keys and values by modules called {KEY_MODULE} "
            f"and {VALUE_MODULE}, beside which their scales would be stored; set kv_cache: none"
        )


def layer_index(model: nn.Module, module: str) -> int:
    """Return the number under which the attention that holds `module` (a dotted path) addresses the cache.

    Raises:
        UnsupportedModel: it has none.
    """
    attention = model.get_submodule(module.rpartition(".")[0])
    index = getattr(attention, "layer_idx", None)
    if index is None:
        raise UnsupportedModel(
            f"{type(attention).__name__} ({module}) has no layer_idx: its KV cache can't be told from other layers'; "
            "set kv_cache: none"
        )
    return int(index)


def cache_inputs(model: nn.Module, cache: DynamicCache | None) -> dict[str, Any]:
    """Return what a model is called with to use a cache; None, or a model that takes none of ours: none is used.

    Source: transformers 5.24 renamed `past_key_values` to `cache`.
    """
    taken = inspect.signature(model.forward).parameters
    keyword = next((name for name in ("cache", "past_key_values") if name in taken), None)
    if cache is None or keyword is None or not _may_be(taken[keyword].annotation, cache):
        return {"use_cache": False} if "use_cache" in taken else {}
    return {keyword: cache, "use_cache": True}


def _may_be(annotation: object, cache: DynamicCache) -> bool:
    """Return whether a parameter can be our cache: not where only a class of the model's own is asked for (xLSTM's).

    Models that take transformers' caches are annotated with `Cache`, with lists of tensors, or not at all.
    """
    classes = [kind for kind in (*get_args(annotation), annotation) if inspect.isclass(kind) and not get_args(kind)]
    own = [kind for kind in classes if kind.__name__.endswith("Cache")]
    return not own or any(isinstance(cache, kind) for kind in own)


class AmaxCache(DynamicCache):  # type: ignore[misc]
    """Keeps nothing but the largest magnitude of each layer's keys and values, over everything it is shown.

    A hybrid's other layers (linear attention, state space, convolution) find the states there that its configuration
    says; `forget` empties them before other samples come.

    Args:
        config: of the model.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self._empty = copy.deepcopy(self.layers)
        self._filled: set[int] = set()  # layers that hold states
        self._seen: RunningAmax[tuple[int, str]] = RunningAmax()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values [batch, heads, tokens, head size] as they are."""
        self._seen.see((layer_idx, "keys"), amax_of(key_states))
        self._seen.see((layer_idx, "values"), amax_of(value_states))
        return key_states, value_states

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the inputs of a layer's convolution, which it keeps until `forget`."""
        self._filled.add(layer_idx)
        read: torch.Tensor = super().update_conv_state(conv_states, layer_idx, *args, **kwargs)
        return read

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return a layer's recurrent state, which it keeps until `forget`."""
        self._filled.add(layer_idx)
        read: torch.Tensor = super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        return read

    def forget(self) -> None:
        """Empty the states of all layers; the magnitudes seen stay."""
        for index in self._filled:
            self.layers[index] = copy.deepcopy(self._empty[index])
        self._filled.clear()

    def amax(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Return the amax of the keys and of the values that each layer made: float32 scalars on the CPU."""
        values = self._seen.values()
        return {layer: (values[layer, "keys"], values[layer, "values"]) for layer, kind in values if kind == "keys"}


class Fp8Cache(DynamicCache):  # type: ignore[misc]
    """A cache that rounds the keys and values that it stores through E4M3 with the scales of a checkpoint.

    Other states (of linear attention, state spaces, convolutions) stay as they are, as in a runtime.

    Args:
        config: of the model.
        scales: `{layer index: (key scale, value scale)}`.
    """

    def __init__(self, config: Any, scales: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__(config=config)
        self.scales = scales

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values so far [batch, heads, tokens, head size], as they are read back."""
        if layer_idx not in self.scales:
            raise ModelError(f"the KV cache is FP8, but layer {layer_idx} has no scales; export this scheme again")
        key_scale, value_scale = self.scales[layer_idx]
        keys = numerics.fake_quantise(key_states, key_scale)
        values = numerics.fake_quantise(value_states, value_scale)
        read: tuple[torch.Tensor, torch.Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return read
