"""Our own engine: the gradient scores of ModelOpt's AutoQuantize, without ModelOpt.

A batch is scored in two passes:

1. Forward without gradients. The input of every decoder layer is kept, [rows, tokens, hidden]. After the last layer
   gradients are switched on, so that the model's own norm, head and loss give the gradient by that layer's output.
2. Backward, layer by layer. Each layer is run again from its input with gradients by activations alone. On every
   searched module's output y stands a tap: what the module gives in FP8 less y is the error, and as soon as the
   gradient by y is known, the sum of (gradient x error)^2 is the module's score.

So no gradient of a weight is computed, and the activations of one layer live at a time. On GPUs that multiply FP8
numbers the error comes from such a product; elsewhere from weights and inputs that are rounded through FP8.

It trades a second forward pass for memory. Layers must follow one another, each taking the hidden states that the one
before gives; a constant that is added between two layers (Qwen3-VL's deepstack) changes no gradient.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bitladder import numerics
from bitladder.calibration import Batch
from bitladder.errors import EngineError, MeasurementError
from bitladder.kv_cache import AmaxCache
from bitladder.records import QuantModule
from bitladder.runinfo import Meter
from bitladder.sensitivity import Amax, BatchScores, Job, Partial, check_amax
from bitladder.sensitivity.common import (
    OUT_OF_MEMORY,
    gradient_score,
    image_positions,
    kv_cache_amax,
    without_cudnn_attention,
)
from bitladder.targets import image_token_ids

_LAYER = re.compile(r"(.+?)\.(\d+)\.")  # path of the list of decoder layers, and the number in it
_FP8_CAPABILITY = (8, 9)  # of the first NVIDIA GPUs that multiply FP8 numbers
_FP8_MULTIPLE = 16  # torch._scaled_mm takes matrices whose sides are multiples of this
FORMAT = "fp8"


@dataclass(frozen=True)
class _LayerCall:
    """What a decoder layer was called with; the hidden states are apart."""

    hidden: torch.Tensor  # [rows, tokens, hidden]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Fp8Linear:
    """What one searched module would give in FP8."""

    def __init__(self, linear: nn.Linear, weight_amax: torch.Tensor, input_amax: torch.Tensor) -> None:
        self.linear = linear
        self.input_amax = input_amax.to(linear.weight.device)
        self.input_scale = numerics.scale_of(self.input_amax)
        self.weight_scale = numerics.scale_of(weight_amax.to(linear.weight.device))
        self.native = _multiplies_fp8(linear)
        codes = numerics.quantise(linear.weight, weight_amax.to(linear.weight.device))
        self.weight = codes if self.native else numerics.dequantise(codes, self.weight_scale, linear.weight.dtype)

    def input_of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the module's input as it is multiplied: FP8 codes, or values rounded through FP8."""
        if self.native:
            return numerics.quantise(x.reshape(-1, x.shape[-1]), self.input_amax)
        return numerics.fake_quantise(x, self.input_scale)

    def output_of(self, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Return the module's output of `shape` from what `input_of` gave."""
        if not self.native:
            return functional.linear(x, self.weight, self.linear.bias)
        dtype = self.linear.weight.dtype
        product = torch._scaled_mm(
            x,
            self.weight.t(),
            scale_a=self.input_scale,
            scale_b=self.weight_scale,
            bias=self.linear.bias,
            out_dtype=dtype,
        )
        return product.view(shape)


def _multiplies_fp8(linear: nn.Linear) -> bool:
    weight = linear.weight
    return (
        weight.is_cuda
        and weight.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(weight.device) >= _FP8_CAPABILITY
        and all(size % _FP8_MULTIPLE == 0 for size in weight.shape)
    )


class _Taps:
    """Scores every searched module of the layer that is run with gradients."""

    def __init__(self, model: nn.Module, job: Job, amax: Amax) -> None:
        self.images: torch.Tensor | None = None  # positions of the batch at hand
        self.scores: dict[str, torch.Tensor] = {}  # module -> [2], of the batch at hand
        self._shared: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.modules = [module for group in job.target.groups for module in group.modules]
        self.linears = {
            module.name: _Fp8Linear(
                model.get_submodule(module.name),  # type: ignore[arg-type]
                amax[f"{module.name}.weight_amax"],
                amax[f"{module.name}.input_amax"],
            )
            for module in self.modules
        }

    def begin(self, images: torch.Tensor | None) -> None:
        """Forget the scores of the batch before."""
        self.images, self.scores, self._shared = images, {}, None

    def hook(self, module: QuantModule) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        """Return the forward hook of a searched module."""

        def tap(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not output.requires_grad:
                return  # the first pass
            with torch.no_grad():
                linear = self.linears[module.name]
                error = linear.output_of(self._input(linear, inputs[0]), output.shape) - output
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._add(module.name, gradient, error)
            )

        return tap

    def _input(self, linear: _Fp8Linear, x: torch.Tensor) -> torch.Tensor:
        """Return the FP8 input; modules that are fused by the runtime share one, and its scale."""
        if self._shared is None or self._shared[0] is not x or not torch.equal(self._shared[1], linear.input_amax):
            self._shared = x, linear.input_amax, linear.input_of(x)
        return self._shared[2]

    @torch.no_grad()
    def _add(self, name: str, gradient: torch.Tensor, error: torch.Tensor) -> None:
        if name in self.scores:
            raise EngineError(f"{name} runs twice in one pass; engine: native can't score it, use engine: modelopt")
        self.scores[name] = gradient_score(gradient, error, self.images)

    def read(self, job: Job) -> BatchScores:
        """Return the batch's scores, each group's modules added up in their order."""
        missing = [module.name for module in self.modules if module.name not in self.scores]
        if missing:
            raise MeasurementError(f"{missing[0]}: no gradient of the loss reaches this module")
        rows = torch.stack([self.scores[module.name] for module in self.modules]).cpu().tolist()
        values = {module.name: row for module, row in zip(self.modules, rows, strict=True)}
        return {
            group.name: {
                FORMAT: (
                    sum(values[module.name][0] for module in group.modules),
                    sum(values[module.name][1] for module in group.modules),
                )
            }
            for group in job.target.groups
        }


class _Decoder:
    """The decoder layers of a model, and what each was called with in the last forward pass."""

    def __init__(self, model: nn.Module, job: Job) -> None:
        paths = {found[1] for group in job.target.groups for m in group.modules if (found := _LAYER.match(m.name))}
        if len(paths) != 1:
            raise EngineError(
                f"the searched modules lie in {len(paths)} lists of layers ({', '.join(sorted(paths)) or 'none'}); "
                "engine: native needs one, use engine: modelopt"
            )
        self.layers: Any = model.get_submodule(paths.pop())
        numbers = [int(found[2]) for g in job.target.groups for m in g.modules if (found := _LAYER.match(m.name))]
        self.first = min(numbers)  # layers before it need no gradient
        self.calls: dict[int, _LayerCall] = {}
        self.output: torch.Tensor | None = None  # of the last layer, a leaf

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what every layer is called with, and switch gradients on after the last one."""
        self.calls, self.output = {}, None
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                handle = layer.register_forward_pre_hook(self._keep(index), with_kwargs=True)
                stack.callback(handle.remove)
            stack.callback(self.layers[-1].register_forward_hook(self._open).remove)
            with torch.no_grad():
                yield

    def _keep(self, index: int) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            hidden = args[0] if args else kwargs["hidden_states"]
            self.calls[index] = _LayerCall(hidden.detach(), args[1:], others)

        return keep

    def _open(self, _: nn.Module, __: Any, output: Any) -> Any:
        """Make the last layer's output a leaf that wants a gradient, and let what follows build a graph."""
        hidden = _hidden_of(output)
        self.output = hidden.detach().requires_grad_()
        torch.set_grad_enabled(True)  # until the surrounding no_grad() ends
        return (self.output, *output[1:]) if isinstance(output, tuple) else self.output

    def backward(self) -> None:
        """Run the layers again, last to first, each with the gradient by its output."""
        assert self.output is not None
        gradient = self.output.grad
        if gradient is None:
            raise MeasurementError("no gradient of the loss reaches the last decoder layer")
        for index in range(len(self.layers) - 1, self.first - 1, -1):
            call = self.calls.pop(index)
            hidden = call.hidden.requires_grad_()
            with torch.enable_grad():
                output = _hidden_of(self.layers[index](hidden, *call.args, **call.kwargs))
            torch.autograd.backward(output, gradient)
            gradient = hidden.grad


def _hidden_of(output: Any) -> torch.Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden


@torch.no_grad()
def calibrate(model: nn.Module, job: Job) -> Amax:
    """Return the amax of every searched module's weight and input, and of every layer's keys and values.

    Raises:
        MeasurementError: NaN, Inf, or zeros alone.
    """
    device = torch.device(job.device)
    seen: dict[str, torch.Tensor] = {}
    last: list[tuple[torch.Tensor, torch.Tensor]] = []  # the input seen last, and its amax

    def observe(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if not last or last[0][0] is not inputs[0]:
                last[:] = [(inputs[0], torch.linalg.vector_norm(inputs[0], torch.inf).float())]
            seen[name] = torch.maximum(seen[name], last[0][1]) if name in seen else last[0][1]

        return hook

    modules = [module.name for group in job.target.groups for module in group.modules]
    cache, total = AmaxCache(), len(job.batches)
    with ExitStack() as stack:
        for name in modules:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(observe(name)).remove)
        for index, batch in enumerate(job.batches):
            job.progress("calibrate", index, total)
            model(**batch.to(device).inputs, past_key_values=cache, use_cache=True)
            last.clear()
    job.progress("calibrate", total, total)
    amax = {f"{name}.input_amax": value for name, value in seen.items()}
    amax |= {f"{name}.weight_amax": model.get_parameter(f"{name}.weight").abs().amax().float() for name in modules}
    if job.spec.share_fused_scales:
        for group in job.target.groups:
            for kind in ("weight_amax", "input_amax"):
                keys = [f"{module.name}.{kind}" for module in group.modules if f"{module.name}.{kind}" in amax]
                amax |= dict.fromkeys(keys, torch.stack([amax[key] for key in keys]).amax()) if keys else {}
    amax = {key: value.reshape(()).cpu().clone() for key, value in amax.items()}
    check_amax(amax, job.target)
    return amax | kv_cache_amax(model, job.target, cache)


def run(model: nn.Module, job: Job, partial: Partial, meter: Meter) -> None:
    """Calibrate and score; amax values and each batch's scores go to `partial`.

    Raises:
        MeasurementError: NaN or Inf in activations, or out of memory. EngineError: a model that it can't score.
    """
    model.config.use_cache = False  # type: ignore[union-attr]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        with without_cudnn_attention():
            amax = partial.amax()
            if amax is None:
                with meter.phase("calibrate"):
                    amax = calibrate(model, job)
                partial.keep_amax(amax)
            with meter.phase("score"):
                _score(model, job, partial, amax)
    except torch.OutOfMemoryError as error:
        raise MeasurementError(OUT_OF_MEMORY) from error


def _score(model: nn.Module, job: Job, partial: Partial, amax: Amax) -> None:
    decoder, taps = _Decoder(model, job), _Taps(model, job, amax)
    image_tokens = image_token_ids(model.config)
    with ExitStack() as stack:
        for module in taps.modules:
            linear = model.get_submodule(module.name)
            stack.callback(linear.register_forward_hook(taps.hook(module)).remove)
        for index in range(job.score_batches):
            job.progress("score", index, job.score_batches)
            if partial.scores(index) is None:
                batch = job.batches[index].to(job.device)
                taps.begin(image_positions(batch, image_tokens))
                _backward(model, batch, decoder)
                partial.keep_scores(index, taps.read(job))
    job.progress("score", job.score_batches, job.score_batches)


def _backward(model: nn.Module, batch: Batch, decoder: _Decoder) -> None:
    with decoder.recorded():
        # A cache would be filled again when the layers are run again.
        loss = model(**batch.inputs, labels=batch.labels, use_cache=False).loss
        loss.backward()
    decoder.backward()
