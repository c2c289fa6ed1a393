"""The decoder layers of a model, one after another: in memory, or streamed from the model's files.

A model that doesn't fit the device is opened without the weights of its decoder layers: embedding, vision tower, norm
and head are there, and a layer's weights come from the shards while it is needed (`loaded`) and go again. The next
layer's are read meanwhile by a thread, in the direction in which the last two were asked for. So the device holds one
layer's weights at a time, the host two. Whoever streams runs every batch through a layer before the next one is
loaded, and keeps hidden states on the host.

What each layer is called with (masks, positions) doesn't depend on hidden states, so `calls` finds it out without
running a layer.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from torch import nn

from bitladder.data.batches import Batch
from bitladder.errors import EngineError, MeasurementError, ModelError
from bitladder.measuring.calls import LayerCall, LayerRecorder, by_layer, layers_path
from bitladder.measuring.checks import check_weights
from bitladder.measuring.job import Job
from bitladder.models.anatomy import Anatomy
from bitladder.models.loading import build_on_meta, checkpoint_tensor_names, load_config, load_model
from bitladder.models.target import Target
from bitladder.models.weights import WeightFiles, all_finite

GB = 1e9
_CPU_SHARE = 0.8  # of the host's available memory that measuring on a CPU may take
_HOST_SHARE = 0.25  # of the host's available memory that hidden states of streamed layers may take
_WORKING_BYTES = 1.5e9  # what measuring takes beside weights, at least
_LAYER_TAKES = 60  # times a layer's input: what it needs while it runs and on its way back
_REMEDY = "raise measurement.memory_gb, so that the model needn't be streamed"


class DeviceMemory:
    """How much of a device's memory is left for measuring.

    Args:
        device: where measuring runs.
        limit_gb: what it may take of it at most, in GB; None: what is free.
    """

    def __init__(self, device: str, limit_gb: float | None) -> None:
        self.device, self.limit = device, None if limit_gb is None else limit_gb * GB
        self.is_gpu = device.startswith("cuda")

    def free(self) -> float:
        """Return the bytes that can still be taken."""
        if self.is_gpu:
            allocated = torch.cuda.memory_allocated(self.device)
            if self.limit is not None:
                return self.limit - allocated
            return torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) - allocated
        if self.limit is not None:
            return self.limit - psutil.Process().memory_info().rss
        return _CPU_SHARE * psutil.virtual_memory().available

    def fits(self, directory: Path, job: Job, dtype: torch.dtype) -> bool:
        """Return whether the whole model fits, and what scoring takes beside it: a layer in FP8, and at work."""
        total = sum(math.prod(info.shape) for info in WeightFiles.open(directory).tensors.values())
        searched = max(sum(group.weight_elements for group in layer) for layer in by_layer(job.target.groups).values())
        copies = searched * (1 if self.is_gpu else dtype.itemsize)
        state = max(shape.numel() for shape in job.scored) * load_config(directory).get_text_config().hidden_size
        working = max(_WORKING_BYTES, copies + _LAYER_TAKES * state * dtype.itemsize)
        room = self.free() if self.limit is None else self.limit
        return bool(dtype.itemsize * total + working <= room)

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Let a GPU refuse more than the limit."""
        if self.limit is None or not self.is_gpu:
            yield
            return
        index = torch.device(self.device).index
        index = torch.cuda.current_device() if index is None else index
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, self.limit / total), index)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, index)


def batches_at_once(bytes_a_batch: float) -> int:
    """Return how many batches' hidden states the host can keep, at least one."""
    return max(1, int(_HOST_SHARE * psutil.virtual_memory().available / max(bytes_a_batch, 1.0)))


class Layers:
    """The decoder layers of a model whose weights are in memory.

    model: the whole model. layers: its one list of decoder layers. home: where hidden states are kept between layers.
    anatomy: what the layers do with hidden states.
    """

    streamed = False

    def __init__(self, model: Any, path: str, memory: DeviceMemory, anatomy: Anatomy) -> None:
        self.model, self.path, self.memory, self.anatomy = model, path, memory, anatomy
        self.device = self.home = memory.device
        self.layers: Any = model.get_submodule(path)

    @classmethod
    def of(cls, model: Any, target: Target, memory: DeviceMemory, remedy: str) -> Self:
        """Return the layers of a loaded model.

        Raises:
            EngineError: its searched modules lie in several lists of layers, or none; the message ends with `remedy`.
        """
        return cls(model, layers_path(target, remedy), memory, target.anatomy)

    def __len__(self) -> int:
        return len(self.layers)

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Give a layer with its weights."""
        yield self.layers[index]

    @torch.no_grad()
    def calls(self, batch: Batch, **options: Any) -> tuple[list[LayerCall], torch.Tensor]:
        """Return what each layer is called with, without running one, and the logits without them.

        The hidden states are those that the first layer is given, in all calls; the logits are what the model makes
        of them at the last position, [rows, 1, vocabulary].

        Args:
            batch: on the model's device.
            options: what the model is called with beside the batch.

        Raises:
            EngineError: the model changes hidden states between two layers, or doesn't call all layers.
        """
        with contextlib.ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.enter_context(passed_through(layer, index, self.anatomy))
            seen = stack.enter_context(LayerRecorder(self.layers))
            stack.enter_context(last_position(self.model))
            logits = self.model(**{"use_cache": False, **batch.inputs, **options}).logits[:, -1:]
        name = type(self.model).__name__
        if len(seen.calls) != len(self.layers):
            raise EngineError(f"{name} doesn't call all of its layers, so that they can't be run one after another")
        if seen.changed_before:
            raise EngineError(
                f"{name} changes the hidden states before decoder layer {seen.changed_before} (deepstack?), so that "
                "its layers can't be run one after another"
            )
        return seen.calls, logits


def chunks(wanted: list[int], layers: Layers, batches: Sequence[Batch], states: int) -> Iterator[tuple[int, list[int]]]:
    """Give the batches that are at hand at once: one, or where layers are streamed as many as the host can keep.

    Args:
        wanted: numbers of the batches.
        layers: what they go through.
        batches: all of them.
        states: hidden states, each like a batch's, that are kept of it.
    """
    size = 1
    if layers.streamed and wanted:
        embedding: Any = layers.model.get_input_embeddings()
        tokens = max(batches[number].labels.numel() for number in wanted)
        size = batches_at_once(states * tokens * embedding.weight.shape[1] * embedding.weight.element_size())
    for start in range(0, len(wanted), size):
        yield wanted[start], wanted[start : start + size]


@contextlib.contextmanager
def passed_through(layer: nn.Module, index: int, anatomy: Anatomy, given: torch.Tensor | None = None) -> Iterator[None]:
    """Let the layer with this number give back the hidden states that it is given, or `given`."""

    def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return anatomy.give(index, hidden_states if given is None else given)

    known = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if known is None:
            del layer.forward
        else:
            layer.forward = known


@contextlib.contextmanager
def last_position(model: nn.Module) -> Iterator[None]:
    """Let the head see the last position alone: all logits of a batch are large."""

    def keep(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[:, -1:], *args[1:]) if hidden.dim() == 3 else args

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


def why_not_by_layers(target: Target, remedy: str) -> str | None:
    """Return why a model can't be taken apart into its decoder layers, or None; the message ends with `remedy`."""
    try:
        layers_path(target, remedy)
    except EngineError as error:
        return str(error)
    problem = target.anatomy.problem
    return None if problem is None else f"{target.name} {problem}; {remedy.partition(', ')[2]}"


def open_layers(directory: Path, job: Job, dtype: torch.dtype, memory: DeviceMemory, remedy: str) -> Layers:
    """Return a model's layers on the memory's device, streamed where the model doesn't fit; its weights are checked.

    Raises:
        ModelError: NaN or Inf in weights. MeasurementError: out of memory. EngineError: a model without one list of
            layers; the message ends with `remedy`.
    """
    problem = why_not_by_layers(job.target, remedy)
    if problem is not None:
        raise EngineError(problem)
    path = layers_path(job.target, remedy)
    if not memory.fits(directory, job, dtype):
        with _loading():
            return StreamedLayers.open(directory, job.target, dtype, memory)
    return Layers(load_whole(directory, job.target, dtype, memory.device), path, memory, job.target.anatomy)


def load_whole(directory: Path, target: Target, dtype: torch.dtype, device: str) -> Any:
    """Return the whole model, its weights checked against the files.

    Raises:
        ModelError: NaN or Inf in weights. MeasurementError: out of memory.
    """
    with _loading():
        model = load_model(directory, dtype, device)
        check_weights(model, directory, target)
    return model


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Say what to do where the GPU's memory doesn't suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MeasurementError(
            "out of GPU memory while loading the model (embedding, vision tower and head stay on the GPU where layers "
            "are streamed); raise measurement.memory_gb, free the GPU, or set measurement.device: cpu"
        ) from error


class StreamedLayers(Layers):
    """The decoder layers of a model whose weights come from its files, a layer at a time."""

    streamed = True

    def __init__(
        self, model: Any, path: str, memory: DeviceMemory, anatomy: Anatomy, dtype: torch.dtype, directory: Path
    ) -> None:
        super().__init__(model, path, memory, anatomy)
        self.home = "cpu"
        self.dtype, self.files = dtype, WeightFiles.open(directory)
        names = checkpoint_tensor_names(model, self.files.tensors)
        tensor_of = {parameter: tensor for tensor, parameter in names.items()}
        self.tensors = [
            {name: tensor_of[f"{path}.{index}.{name}"] for name, _ in layer.named_parameters()}
            for index, layer in enumerate(self.layers)
        ]
        self._checked: set[int] = set()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="bitladder-layers")
        self._ahead: tuple[int, Future[dict[str, torch.Tensor]]] | None = None
        self._last = -1

    @classmethod
    def open(cls, directory: Path, target: Target, dtype: torch.dtype, memory: DeviceMemory) -> "StreamedLayers":
        """Open a model without the weights of its decoder layers.

        Raises:
            ModelError: a tensor is missing, or holds NaN or Inf. EngineError: a model that can't be streamed.
        """
        path = layers_path(target, _REMEDY)
        model = open_without_layers(directory, path, dtype, memory.device)
        return cls(model, path, memory, target.anatomy, dtype, directory)

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        found = {name: self.files.load(tensor).to(self.dtype) for name, tensor in self.tensors[index].items()}
        return {name: value.pin_memory() for name, value in found.items()} if self.device != "cpu" else found

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Give a layer with its weights, which go again afterwards.

        Raises:
            ModelError: a weight holds NaN or Inf.
        """
        ahead = self._ahead
        weights = ahead[1].result() if ahead is not None and ahead[0] == index else self._read(index)
        following = index + (1 if index >= self._last else -1)
        self._last, self._ahead = index, None
        if 0 <= following < len(self.layers):
            self._ahead = following, self._reader.submit(self._read, following)
        layer = self.layers[index]
        for name, value in weights.items():
            moved = value.to(self.device, non_blocking=True)
            if index not in self._checked and not all_finite(moved):
                tensor = self.tensors[index][name]
                raise ModelError(f"{self.files.directory}: tensor {tensor} holds NaN or Inf; fetch the model again")
            _set(layer, name, nn.Parameter(moved, requires_grad=False))
        self._checked.add(index)
        del weights
        try:
            yield layer
        finally:
            for name, parameter in list(layer.named_parameters()):
                _set(layer, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, parameter)


@torch.no_grad()
def open_without_layers(directory: Path, path: str, dtype: torch.dtype, device: str) -> Any:
    """Return the model in evaluation mode; the decoder layers at `path` stay on the meta device.

    Raises:
        ModelError: a tensor is missing, or holds NaN or Inf. EngineError: a model that can't be opened so.
    """
    model = build_on_meta(directory, dtype)
    name = type(model).__name__
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        raise EngineError(f"{name} keeps some modules in float32, which streaming doesn't; {_REMEDY}")
    for module_name, module in model.named_modules():
        _fill_buffers(model, module_name, module, device)
    files = WeightFiles.open(directory)
    tensor_of = {parameter: tensor for tensor, parameter in checkpoint_tensor_names(model, files.tensors).items()}
    tied = model.all_tied_weights_keys or {}
    for parameter_name, _ in list(model.named_parameters()):
        if parameter_name.startswith(f"{path}.") or parameter_name in tied:
            continue
        if parameter_name not in tensor_of:
            raise ModelError(f"{directory}: no tensor becomes {parameter_name}; config.json is of another model")
        value = files.load(tensor_of[parameter_name]).to(device, dtype)
        if not all_finite(value):
            raise ModelError(f"{directory}: tensor {tensor_of[parameter_name]} holds NaN or Inf; fetch the model again")
        _set(model, parameter_name, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    return model


def _fill_buffers(model: Any, name: str, module: nn.Module, device: str) -> None:
    """Give a module the buffers that no file holds (rotary frequencies), as transformers itself does after loading."""
    missing = [key for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
    if not missing:
        return
    persistent = [key for key in missing if key not in module._non_persistent_buffers_set]
    if persistent:
        raise EngineError(f"{name} stores the buffer {persistent[0]}, which streaming doesn't load; {_REMEDY}")
    for key in missing:
        buffer = module.get_buffer(key)
        if buffer.dtype == torch.bool:
            raise EngineError(f"the buffer {name}.{key} is of {buffer.dtype}, which streaming can't make; {_REMEDY}")
        poison = torch.nan if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min
        module.register_buffer(key, torch.full(buffer.shape, poison, dtype=buffer.dtype), persistent=False)
    _owner(model, name)._init_weights(module)
    for key in missing:
        buffer = module.get_buffer(key)
        filled = torch.isfinite(buffer) if buffer.is_floating_point() else buffer != torch.iinfo(buffer.dtype).min
        if not bool(filled.all()):
            raise EngineError(f"transformers doesn't fill the buffer {name}.{key}; {_REMEDY}")
        module.register_buffer(key, buffer.to(device), persistent=False)


def _owner(model: Any, name: str) -> Any:
    """Return the innermost model of transformers' that holds a module: it knows how to fill its buffers."""
    from transformers import PreTrainedModel

    parts = name.split(".")
    holders = (model.get_submodule(".".join(parts[:count])) for count in range(len(parts), -1, -1))
    return next(holder for holder in holders if isinstance(holder, PreTrainedModel))
