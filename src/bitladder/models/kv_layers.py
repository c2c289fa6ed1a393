"""The layers of a model that cache keys and values."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn
from transformers import DynamicCache

from bitladder.errors import UnsupportedModel
from bitladder.records import QuantGroup, QuantModule

KEY_MODULE, VALUE_MODULE = "k_proj", "v_proj"
CACHE_KEYWORDS = ("cache", "past_key_values")  # transformers 5.24 renamed the second to the first


@dataclass(frozen=True)
class CachedLayer:
    """The modules that make one attention layer's keys and values."""

    key: QuantModule
    value: QuantModule

    @property
    def attention(self) -> str:
        """The module that holds both."""
        return self.key.name.rpartition(".")[0]

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
    """Return what a model is called with to use a cache; None, or a model that takes none of ours: none is used."""
    taken = inspect.signature(model.forward).parameters
    keyword = next((name for name in CACHE_KEYWORDS if name in taken), None)
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
