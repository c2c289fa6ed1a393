"""What an FP8 KV cache does to a model, a layer at a time: the KL of rounding one layer's keys and values alone.

It is exact: a layer runs a second time with its keys and values rounded where it hands them to its cache, and what that
gives goes through the layers behind it beside the original, as `kl` does with groups, but sample by sample: a single
token can carry most of a layer's mean, so that layers are better ordered by their medians.

All of it is in float32, as evaluation is: BF16 alone would move the output as far as some layers' caches do. Every
cached layer stands in the job as a group that holds the module of its keys, so that `kl` scores it without knowing what
it is. Nothing is compiled: a layer's number reaches its cache, so that every layer would be compiled for itself.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from bitladder.data.batches import Batch
from bitladder.device import resolve_device
from bitladder.errors import EngineError
from bitladder.formats import grids
from bitladder.measured import Amax
from bitladder.measuring import native
from bitladder.measuring.decoder import Pass, counted, named
from bitladder.measuring.job import BatchScores, Job
from bitladder.measuring.kl import KlScorer, States
from bitladder.measuring.layers import DeviceMemory, Layers, open_layers, why_not_by_layers
from bitladder.measuring.partial import Partial
from bitladder.models.kv_layers import CACHE_KEYWORDS, CachedLayer, cached_layers, check_layers
from bitladder.models.target import Target
from bitladder.recipe import MeasureSpec
from bitladder.records import LayerKl, QuantGroup
from bitladder.runinfo import Progress, no_progress

STEP = "measure the KV cache"
_INSTEAD = "set kv_cache: fp8 or none"
_REMEDY = f"a KV cache chosen by layer needs one, {_INSTEAD}"
_FORMAT = "fp8"  # of the cache; the format of the groups that stand for its layers
_Function = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


class _Through(DynamicCache):  # type: ignore[misc]
    """Hands a layer's keys and values through a function, and keeps none."""

    def __init__(self, config: Any, function: _Function) -> None:
        super().__init__(config=config)
        self.function = function

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, ...]:
        """Return what the function makes of keys and values [rows, heads, tokens, head size]."""
        return self.function(key_states, value_states)


class _CacheScorer(KlScorer):
    """KL with the keys and values of one layer rounded."""

    def __init__(self, layers: Layers, job: Job, cached: Sequence[CachedLayer], amax: Amax) -> None:
        super().__init__(layers, job, amax, plain=True)
        self.scales = {
            layer.attention: [grids.scale_of(amax[name].to(job.device)) for name in layer.amax_names]
            for layer in cached
        }

    def _batch_scores(self, current: Pass, states: list[States]) -> Callable[[], BatchScores]:
        """Return a function that waits for the KL of every variant, a number a row of the batch."""
        counts = current.batch.predicted.sum(-1).tolist()
        rows = torch.split(counted(current.output, current), counts)
        others = [
            torch.split(counted(part, current), counts)
            for each in states
            for part in each.hidden.chunk(len(each.variants))
        ]
        by_row = [self._kl(row, list(same)) for row, *same in zip(rows, *others, strict=True)]
        found = [variant for each in states for variant in each.variants]
        values = dict(zip(found, (torch.stack(own) for own in zip(*by_row, strict=True)), strict=True))
        variants = self.job.variants
        return partial(named, torch.stack([values[group.name, name] for group, name in variants]), variants)

    @contextlib.contextmanager
    def _in_format(self, group: QuantGroup, name: str) -> Iterator[None]:
        """Let the attention that a group stands for read its keys and values back as they would be stored."""
        attention, seen = self.layers.model.get_submodule(group.name), []
        taken = inspect.signature(attention.forward).parameters
        keyword = next((one for one in CACHE_KEYWORDS if one in taken), None)

        def rounded(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            seen.append(name)
            scales = self.scales[group.name]
            return tuple(grids.fake_quantise(one, scale) for one, scale in zip(states, scales, strict=True))

        cache = _Through(self.layers.model.config, rounded)

        def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, str(keyword): cache}

        handle = None if keyword is None else attention.register_forward_pre_hook(give, with_kwargs=True)
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
        if not seen:
            raise EngineError(f"{type(attention).__name__} ({group.name}) hands nothing to a cache; {_INSTEAD}")


def check_by_layer(target: Target) -> None:
    """Check that the damage of a KV cache can be measured layer by layer, before anything is.

    Raises:
        UnsupportedModel: no layer caches what can be scaled. EngineError: its layers can't be run one by one.
    """
    check_layers(target.groups)
    problem = why_not_by_layers(target, _REMEDY)
    if problem is not None:
        raise EngineError(problem)


def layer_kls(
    directory: Path,
    target: Target,
    batches: Sequence[Batch],
    amax: Amax,
    spec: MeasureSpec,
    done: Partial,
    progress: Progress = no_progress,
) -> tuple[LayerKl, ...]:
    """Return the KL of an FP8 KV cache in each attention layer alone, sample by sample; layers in network order.

    Args:
        directory: the model's files.
        target: what was searched.
        batches: what the KL is taken on.
        amax: of keys and values, by `CachedLayer.amax_names`; a layer that has none is left out.
        spec: device and memory.
        done: what is done so far of it; it is removed in the end.
        progress: told of every batch.

    Raises:
        EngineError: keys and values can't be got at. MeasurementError: out of memory.
    """
    cached = cached_layers(target.groups)
    groups = tuple(QuantGroup(name=one.attention, modules=(one.key,), weight_elements=1) for one in cached)
    device = resolve_device(spec.device)
    job = Job(
        dataclasses.replace(target, groups=groups),
        tuple(batches),
        tuple(batch.labels.shape for batch in batches),
        spec.model_copy(update={"formats": (_FORMAT,)}),
        device,
        lambda _, done, total: progress(STEP, done, total),
    )
    layers = open_layers(directory, job, torch.float32, DeviceMemory(device, spec.memory_gb), _REMEDY)
    with native.ready(layers, job):
        native.score(_CacheScorer(layers, job, cached, amax), layers, job, done)
    found = [done.scores(batch) or {} for batch in range(len(batches))]
    done.remove()
    return tuple(
        LayerKl(layer=one.name, kl=tuple(row for batch in found for row in batch[one.name][_FORMAT])) for one in groups
    )
