"""The FP8 KV cache, as a checkpoint asks for it: what is stored of keys and values, and how it is read back.

transformers hands every layer's new keys and values (after the rotary embedding, as they would be cached) to
`Cache.update`, which returns what attention reads. `Fp8Cache` rounds them there, as a runtime does that reads back what
it stored; `measuring.kv_amax` looks at them there while calibrating. Queries stay as they are. A cache is made for the
model's configuration: layers of a hybrid that aren't attention keep states of other kinds in it.

In a measurement a layer's values lie beside those of its modules, as "<k_proj>.k_amax" and "<v_proj>.v_amax"; in a
checkpoint its scales lie beside the weights, as "<k_proj>.k_scale" and "<v_proj>.v_scale" (ModelOpt's names).
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import DynamicCache

from bitladder.errors import ModelError
from bitladder.formats import grids


class Fp8Cache(DynamicCache):  # type: ignore[misc]
    """A cache that rounds the keys and values that it stores through E4M3 with the scales of a checkpoint.

    Other states (of linear attention, state spaces, convolutions) stay as they are, as in a runtime.

    Args:
        config: of the model.
        scales: `{layer index: (key scale, value scale)}`.
        skips: indices of layers that store theirs in 16 bits all the same.
    """

    def __init__(
        self,
        config: Any,
        scales: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
        skips: Collection[int] = (),
    ) -> None:
        super().__init__(config=config)
        self.scales, self.skips = scales, skips

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values so far [batch, heads, tokens, head size], as they are read back."""
        if layer_idx in self.skips:
            as_they_are: tuple[torch.Tensor, torch.Tensor] = super().update(
                key_states, value_states, layer_idx, *args, **kwargs
            )
            return as_they_are
        if layer_idx not in self.scales:
            raise ModelError(f"the KV cache is FP8, but layer {layer_idx} has no scales; export this scheme again")
        key_scale, value_scale = self.scales[layer_idx]
        keys = grids.fake_quantise(key_states, key_scale)
        values = grids.fake_quantise(value_states, value_scale)
        read: tuple[torch.Tensor, torch.Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return read
