"""Our own engine: the scores of ModelOpt's AutoQuantize, by gradient or by KL, without ModelOpt.

Both begin with a forward pass without gradients that keeps every decoder layer's input, [rows, tokens, hidden]. The
model's own norm and head follow for some rows at a time: all logits of a batch at once are large.

`gradient`:

1. Norm, head and loss give the gradient by the last layer's output.
2. Backward, layer by layer. Each layer is run again from its input with gradients by activations alone. On every
   searched module's output y stands a tap: what the module gives in FP8 less y is the error, and as soon as the
   gradient by y is known, the sum of (gradient x error)^2 is the module's score.

So no gradient of a weight is computed, and the activations of one layer live at a time. On GPUs that multiply FP8
numbers the error comes from such a product; elsewhere from weights and inputs that are rounded through FP8.

It trades a second forward pass for memory. A constant that is added between two layers (Qwen3-VL's deepstack) changes
no gradient.

`kl_div`: a group in FP8 changes nothing before its own layer. So that layer's input is taken, and the layers from there
on run again with the group in FP8: half a forward pass on average. What a model adds between two layers would be lost,
so a batch where it does is refused.
"""

import inspect
import itertools
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bitladder import numerics
from bitladder.calibration import Batch
from bitladder.errors import EngineError, MeasurementError
from bitladder.formats import get_format
from bitladder.kv_cache import AmaxCache
from bitladder.records import QuantGroup, QuantModule
from bitladder.runinfo import Meter
from bitladder.sensitivity import Amax, BatchScores, Codes, Job, Partial, check_amax, codes_of, compensation
from bitladder.sensitivity.common import (
    OUT_OF_MEMORY,
    LayerCall,
    LayerRecorder,
    gradient_score,
    hidden_of,
    image_positions,
    kv_cache_amax,
    layer_of,
    layers_path,
    without_cudnn_attention,
)
from bitladder.targets import image_token_ids

_FP8_CAPABILITY = (8, 9)  # of the first NVIDIA GPUs that multiply FP8 numbers
_FP8_MULTIPLE = 16  # torch._scaled_mm takes matrices whose sides are multiples of this
_ROWS_AT_ONCE = 256  # of logits: 151,936 a row in float32 make 156 MB, and a loss or KL needs several of them
_LEAST_LOG = -87.0  # its exponential is just above the smallest normal number of float32
_SAME_LOGITS = 0.02  # of the largest logit: BF16 rounds to 0.004, a softcap or a factor changes more
FORMAT = "fp8"


class _Fp8Linear:
    """What one searched module would give in FP8."""

    def __init__(self, linear: nn.Linear, module: str, amax: Amax, codes: Codes | None) -> None:
        weight_amax, input_amax = amax[f"{module}.weight_amax"], amax[f"{module}.input_amax"]
        self.linear = linear
        self.input_amax_value = float(input_amax)  # from the CPU: reading it back from a GPU would wait for it
        self.input_amax = input_amax.to(linear.weight.device)
        self.input_scale = numerics.scale_of(self.input_amax)
        weight_amax = weight_amax.to(linear.weight.device)
        self.weight_scale = numerics.scale_of(weight_amax)
        self.native = _multiplies_fp8(linear)
        stored = codes_of(module, linear.weight, weight_amax, get_format(FORMAT), codes)
        self.weight = stored if self.native else numerics.dequantise(stored, self.weight_scale, linear.weight.dtype)

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

    def replace(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Return the output in FP8 instead; a forward hook of the module."""
        return self.output_of(self.input_of(inputs[0]), output.shape)


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

    def __init__(self, model: nn.Module, job: Job, amax: Amax, codes: Codes | None) -> None:
        self.images: torch.Tensor | None = None  # positions of the batch at hand
        self.scores: dict[str, torch.Tensor] = {}  # module -> [2], of the batch at hand
        self._shared: tuple[torch.Tensor, float, torch.Tensor] | None = None  # input, its amax, input in FP8
        self.modules = [module for group in job.target.groups for module in group.modules]
        self.linears = {
            module.name: _Fp8Linear(
                model.get_submodule(module.name),  # type: ignore[arg-type]
                module.name,
                amax,
                codes,
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
                error = linear.output_of(self._input(linear, inputs[0]), output.shape).sub_(output)
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._add(module.name, gradient, error)
            )

        return tap

    def _input(self, linear: _Fp8Linear, x: torch.Tensor) -> torch.Tensor:
        """Return the FP8 input; modules that are fused by the runtime share one, and its scale."""
        if self._shared is None or self._shared[0] is not x or self._shared[1] != linear.input_amax_value:
            self._shared = x, linear.input_amax_value, linear.input_of(x)
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
    """The decoder layers of a model, the norm and head behind them, and what each layer was last called with."""

    def __init__(self, model: Any, job: Job) -> None:
        path = layers_path(job.target, "engine: native needs one, use engine: modelopt")
        self.model = model
        self.layers: Any = model.get_submodule(path)
        self.norm = getattr(model.get_submodule(path.rpartition(".")[0]), "norm", None)
        if self.norm is None or "logits_to_keep" not in inspect.signature(model.forward).parameters:
            raise EngineError(
                f"{type(model).__name__} has no `norm` beside its layers or takes no `logits_to_keep`; engine: native "
                "needs both, use engine: modelopt"
            )
        self.first = min(layer_of(group) for group in job.target.groups)  # layers before it need no gradient
        self.calls: list[LayerCall] = []
        self.output = torch.empty(0)  # of the last layer, [rows, tokens, hidden]
        self.changed_before = 0  # the last layer whose input is not what the one before gave; 0: there is none

    @torch.no_grad()
    def record(self, batch: Batch) -> None:
        """Run the model, and keep what every layer is called with and what the last one gives.

        Raises:
            EngineError: norm and head don't make the model's logits of the last layer's output.
        """
        self.calls, self.output = [], torch.empty(0)  # those of the batch before free their memory
        with LayerRecorder(self.layers) as seen:
            # No cache: it would be filled again when layers run again. One position: all logits are large.
            logits = self.model(**batch.inputs, use_cache=False, logits_to_keep=1).logits[:, -1:]
        self.calls, self.output, self.changed_before = seen.calls, seen.output, seen.changed_before
        ours = self.logits(self.output[:, -1:])
        if float((ours - logits).abs().max()) > _SAME_LOGITS * float(logits.abs().max()):
            raise EngineError(
                f"{type(self.model).__name__} does more than norm and head behind its layers; engine: native can't "
                "score it, use engine: modelopt"
            )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., vocabulary] of what the last layer gives, [..., hidden]."""
        assert self.norm is not None
        logits: torch.Tensor = self.model.get_output_embeddings()(self.norm(hidden))
        return logits

    def loss_gradient(self, batch: Batch) -> torch.Tensor:
        """Return the gradient of the batch's mean loss by the last layer's output, [rows, tokens, hidden]."""
        hidden, labels = _counted(self.output, batch), batch.labels[:, 1:][batch.predicted]
        parts: list[torch.Tensor] = []
        for start in range(0, len(labels), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            leaf = hidden[rows].detach().requires_grad_()
            with torch.enable_grad():
                loss = functional.cross_entropy(self.logits(leaf).float(), labels[rows], reduction="sum") / len(labels)
            parts += torch.autograd.grad(loss, leaf)
        gradient = torch.zeros_like(self.output)
        gradient[:, :-1][batch.predicted] = torch.cat(parts)
        return gradient

    def backward(self, gradient: torch.Tensor) -> None:
        """Run the layers again, last to first, each with the gradient by its output."""
        for index in range(len(self.layers) - 1, self.first - 1, -1):
            call = self.calls.pop()
            hidden = call.hidden.detach().requires_grad_()
            with torch.enable_grad():
                output = hidden_of(self.layers[index](hidden, *call.args, **call.kwargs))
            (gradient,) = torch.autograd.grad(output, hidden, gradient)

    @torch.no_grad()
    def replay(self, first: int) -> torch.Tensor:
        """Return what the last layer gives when the layers from `first` on run again, [rows, tokens, hidden].

        Raises:
            EngineError: hidden states change between two layers, so that a layer's output isn't the next one's input.
        """
        if self.changed_before > first:
            raise EngineError(
                f"the model changes the hidden states before decoder layer {self.changed_before} (deepstack?); "
                "engine: native can't replay that for method: kl_div, use method: gradient or engine: modelopt"
            )
        hidden = self.calls[first].hidden
        for layer, call in zip(self.layers[first:], self.calls[first:], strict=True):
            hidden = hidden_of(layer(hidden, *call.args, **call.kwargs))
        return hidden


def _counted(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the rows [counted tokens, hidden] of [rows, tokens, hidden] whose next token counts."""
    return hidden[:, :-1][batch.predicted]


@torch.no_grad()
def calibrate(model: nn.Module, job: Job) -> Amax:
    """Return the amax of every searched module's weight and input, and of every layer's keys and values; unchecked."""
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
                    check_amax(amax, job.target)
                partial.keep_amax(amax)
            codes = None
            if job.spec.rounding == "compensated":
                compensation.run(model, job, partial, amax, meter)
                codes = partial.codes()
            with meter.phase("score"):
                _score(model, job, partial, amax, codes)
    except torch.OutOfMemoryError as error:
        raise MeasurementError(OUT_OF_MEMORY) from error


def scorer(
    model: nn.Module, job: Job, amax: Amax, codes: Codes | None
) -> AbstractContextManager["_GradientScorer | _KlScorer"]:
    """Return what scores batches: a context, within which `.scores(batch)` takes a batch on the job's device."""
    return (_GradientScorer if job.spec.method == "gradient" else _KlScorer)(model, job, amax, codes)


def _score(model: nn.Module, job: Job, partial: Partial, amax: Amax, codes: Codes | None) -> None:
    with scorer(model, job, amax, codes) as scoring:
        for index in range(job.score_batches):
            job.progress("score", index, job.score_batches)
            if partial.scores(index) is None:
                partial.keep_scores(index, scoring.scores(job.batches[index].to(job.device)))
    job.progress("score", job.score_batches, job.score_batches)


class _GradientScorer(ExitStack):
    """Gradient scores; a context manager, within which the searched modules are tapped."""

    def __init__(self, model: nn.Module, job: Job, amax: Amax, codes: Codes | None) -> None:
        super().__init__()
        self.job, self.decoder, self.taps = job, _Decoder(model, job), _Taps(model, job, amax, codes)
        self.image_tokens = image_token_ids(model.config)
        for module in self.taps.modules:
            self.callback(model.get_submodule(module.name).register_forward_hook(self.taps.hook(module)).remove)

    def scores(self, batch: Batch) -> BatchScores:
        """Return a batch's scores."""
        self.taps.begin(image_positions(batch, self.image_tokens))
        self.decoder.record(batch)
        self.decoder.backward(self.decoder.loss_gradient(batch))
        return self.taps.read(self.job)


class _KlScorer(ExitStack):
    """KL scores: nats, added up over the batch's counted tokens."""

    def __init__(self, model: nn.Module, job: Job, amax: Amax, codes: Codes | None) -> None:
        super().__init__()
        self.model, self.job, self.amax, self.codes, self.decoder = model, job, amax, codes, _Decoder(model, job)
        self.kl = _fused(_kl_sum, job.device)

    @torch.no_grad()
    def scores(self, batch: Batch) -> BatchScores:
        """Return a batch's scores."""
        self.decoder.record(batch)
        original = _counted(self.decoder.output, batch)
        groups = sorted(self.job.target.groups, key=layer_of)
        sums: dict[str, torch.Tensor] = {}
        for layer, members in itertools.groupby(groups, key=layer_of):
            # One layer's groups together: the original's distribution is made once for them.
            quantised = {group.name: _counted(self._replayed(group, layer), batch) for group in members}
            sums |= dict(zip(quantised, self._kl(original, list(quantised.values())), strict=True))
        values = torch.stack(list(sums.values())).cpu().tolist()
        scores = dict(zip(sums, values, strict=True))
        return {group.name: {FORMAT: (scores[group.name],)} for group in self.job.target.groups}

    def _replayed(self, group: QuantGroup, layer: int) -> torch.Tensor:
        """Return what the last layer gives with the group in FP8, [rows, tokens, hidden]."""
        with ExitStack() as stack:
            for module in group.modules:
                # Quantised here, where it is used once a batch: codes of the whole model would not fit as easily.
                linear: Any = self.model.get_submodule(module.name)
                fp8 = _Fp8Linear(linear, module.name, self.amax, self.codes)
                stack.callback(linear.register_forward_hook(fp8.replace).remove)
            return self.decoder.replay(layer)

    def _kl(self, original: torch.Tensor, others: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return KL(original || other) in nats, added up over the rows, for each of `others` [counted, hidden]."""
        sums = [torch.zeros((), dtype=torch.float64, device=original.device) for _ in others]
        for start in range(0, len(original), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            log_p = torch.log_softmax(self.decoder.logits(original[rows]), -1, dtype=torch.float32)
            log_p.clamp_min_(_LEAST_LOG)  # so that p exp(d) is never 0 times infinity
            for total, other in zip(sums, others, strict=True):
                total += self.kl(log_p, self.decoder.logits(other[rows]))
        return sums


def _kl_sum(log_p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(p || softmax(logits)) in nats, added up over the rows of [rows, vocabulary]; float64.

    With d = log q - log p it is the sum of p (exp(d) - 1 - d), which equals the sum of -p d for exact distributions
    and takes the float32 rounding of the two normalisers out (as in `evaluation`). For small d a term's error is d
    times float32's precision.
    """
    d = torch.log_softmax(logits, -1, dtype=torch.float32) - log_p
    return (log_p.exp() * (d.expm1() - d)).sum(dtype=torch.float64)


def _fused(function: Callable[..., torch.Tensor], device: str) -> Callable[..., torch.Tensor]:
    """Return the function as one GPU kernel where it can be compiled: on a GPU, with a C compiler (Triton's need)."""
    if device.startswith("cuda") and any(map(shutil.which, ("cc", "gcc", "clang"))):
        return torch.compile(function, dynamic=True)
    return function
