"""The largest keys and values that a model's cache saw."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from bitladder.formats.grids import amax_of
from bitladder.measured import Amax
from bitladder.measuring.amax import RunningAmax
from bitladder.models.kv_layers import cached_layers, layer_index
from bitladder.models.target import Target


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


def kv_cache_amax(model: nn.Module, target: Target, cache: AmaxCache) -> Amax:
    """Return the amax of every layer's keys and values, or nothing where some layer's modules aren't searched."""
    layers, found = cached_layers(target.groups), cache.amax()
    amax: Amax = {}
    for layer in layers:
        seen = found.get(layer_index(model, layer.key.name))
        if seen is not None:
            amax.update(zip(layer.amax_names, seen, strict=True))
    return amax if len(amax) == 2 * len(layers) == 2 * len(found) else {}
