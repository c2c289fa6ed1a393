"""Our own engine: the scores of ModelOpt's AutoQuantize, by gradient or by KL, without ModelOpt; and a better gradient.

`gradient`:

1. A forward pass, cut before every decoder layer: a layer's input is a leaf. The model's own norm and head follow for
   some rows at a time (all logits of a batch at once are large), and give the gradient by the last layer's output.
2. Backward, layer by layer, by activations alone. On every searched module's output y stands a tap, which kept the
   module's input in FP8. As soon as the gradient by y is known, the module's FP8 output less y is the error, and the
   sum of (gradient x error)^2 is the module's score.

No gradient of a weight is computed. What a layer's backward pass needs is kept from the forward pass as long as
memory lasts; the other layers run again from their inputs, to the same bits. On GPUs that multiply FP8 numbers the
error comes from such a product; elsewhere from weights and inputs that are rounded through FP8. A constant that is
added between two layers (Qwen3-VL's deepstack) changes no gradient. Whole batches of text on a GPU run as one CUDA
graph: launched one by one, a step's kernels take as long for one row as for eight.

`fisher`: the same two passes estimate the KL itself, in nats. To second order it is half the variance, over labels
that the model draws itself, of the directional derivative of the loss along what FP8 changes. So the backward pass
begins with a random gradient of the logits that has the covariance of such labels' (diag p - p pT), and a group's score
is the sum over tokens of half the square of gradient times error, summed over the group's outputs. Tokens count as
independent. `benchmarks/signals.py` compares.

`kl_div`: a group in FP8 changes nothing before its own layer. So its layer runs a second time with the group in FP8,
and what that gives goes through the layers behind it beside the original: half a forward pass a group on average. What
a model adds between two layers would be lost, so a model that does so is refused.

A model that doesn't fit the device is streamed (`layers`): every batch at hand goes through a layer before the next one
is loaded, and hidden states lie on the host. On a CPU its scores are the same, to the last bit.
"""

import contextlib
import dataclasses
import importlib.util
import inspect
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial as bound
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bitladder.calibration import Batch
from bitladder.errors import EngineError, MeasurementError
from bitladder.kv_cache import AmaxCache
from bitladder.records import QuantGroup
from bitladder.runinfo import Meter
from bitladder.sensitivity import Amax, BatchScores, Codes, Job, Partial, check_amax, compensation
from bitladder.sensitivity.common import (
    LEAST_LOG,
    OUT_OF_MEMORY,
    LayerCall,
    LayerRecorder,
    by_position,
    deterministic,
    hidden_of,
    image_positions,
    kv_cache_amax,
    layer_of,
    without_cudnn_attention,
)
from bitladder.sensitivity.layers import Layers, batches_at_once
from bitladder.sensitivity.taps import FORMAT, Fp8, InFp8, LastInput, Tapped, fp8_of, taken
from bitladder.storage import sha256_of_bytes
from bitladder.targets import image_token_ids

_KERNEL_ROWS_AT_ONCE = 1024  # of logits where kernels take them as they are: 311 MB, twice
_ROWS_AT_ONCE = 256  # of logits: 151,936 a row in float32 make 156 MB, and a loss or KL needs several of them
_SAME_LOGITS = 0.02  # of the largest logit: BF16 rounds to 0.004, a softcap or a factor changes more
_GRAPHED_FROM = 4  # batches from which capturing a CUDA graph is worth it
_COMPILED_FROM = 500_000  # tokens from which a dozen seconds of compiling layers for gradient steps are worth it
_KL_COMPILED_FROM = 16_000  # the same for KL steps, for each shape of a batch
_COMPILED_FORMS = 64  # of a layer at most: alone and with each of its groups in FP8, for every type of layer and shape
_TOKENS_TOGETHER = 16384  # of states that go through a layer together: larger products are faster, up to a size
_COPIES_LEFT = 3e9  # bytes of memory that FP8 copies of all searched weights must leave, to be kept
_GROWTH = 40  # times a layer's input: what its backward pass needs, before it was seen
_LAYERS_LEFT = 4  # of the memory that a kept layer takes: for the head, the backward pass, and the estimate's error
REMEDY = "engine: native needs one, use engine: modelopt"


@dataclass
class _Pass:
    """One batch on its way through the layers."""

    batch: Batch
    host: Batch | None = None  # the batch before it came to the device
    images: torch.Tensor | None = None  # mask [rows, tokens] of image-token positions
    whole: bool = False  # every token's next token counts: text without padding
    calls: list[LayerCall] = field(default_factory=list)  # of each layer; its hidden states are the layer's input
    copies: dict[int, list[LayerCall]] = field(default_factory=dict)  # number -> calls for so many copies of the batch
    output: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # of the last layer that ran
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # layer -> leaf, its output
    sinks: dict[str, torch.Tensor] = field(default_factory=dict)  # module -> whose gradient will be its scores
    scores: dict[str, torch.Tensor] = field(default_factory=dict)  # module -> what each token adds, [rows, tokens]


class _Taps:
    """The searched modules of layers that run with gradients, each of which gives its scores too."""

    def __init__(self, model: nn.Module, job: Job, amax: Amax, codes: Codes | None) -> None:
        self.model, self.amax, self.codes = model, amax, codes
        self.shared = {"directional": job.spec.method != "gradient", "last_input": LastInput()}

    def on(self, groups: Iterable[QuantGroup]) -> ExitStack:
        """Tap the modules of these groups, whose weights must be at hand, until the context is left."""
        stack = ExitStack()
        for group in groups:
            for name, fp8 in fp8_of(self.model, group, self.amax, self.codes).items():
                stack.enter_context(taken(self.model.get_submodule(name), Tapped, fp8=fp8, sink=None, **self.shared))
        return stack

    def give_sinks(self, current: _Pass, groups: Iterable[QuantGroup]) -> None:
        """Give every module of a layer's groups, before the layer runs with gradients, where its scores will arrive."""
        labels = current.batch.labels
        zeros = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
        for group in groups:
            for module in group.modules:
                current.sinks[module.name] = sink = zeros.detach().requires_grad_()
                tapped: Any = self.model.get_submodule(module.name)
                tapped.sink = sink


def _read(current: _Pass, groups: Sequence[QuantGroup], method: str) -> torch.Tensor:
    """Return each group's score and what of it lies at image-token positions, [groups, 2]; modules in their order.

    Raises:
        MeasurementError: a module that no gradient reached.
    """
    found = []
    for group in groups:
        missing = [module.name for module in group.modules if module.name not in current.scores]
        if missing:
            raise MeasurementError(f"{missing[0]}: no gradient of the loss reaches this module")
        tokens = torch.stack([current.scores[module.name] for module in group.modules]).sum(0)
        found.append(by_position(tokens if method == "gradient" else tokens.square() / 2, current.images))
    return torch.stack(found)


def _named(values: torch.Tensor, groups: Sequence[QuantGroup]) -> BatchScores:
    """Return a batch's scores from [groups, 1 or 2], which are waited for."""
    rows = zip(groups, values.cpu().tolist(), strict=True)
    return {group.name: {FORMAT: tuple(row)} for group, row in rows}


class _CutRecorder(LayerRecorder):
    """Makes each layer's input a leaf and keeps what its backward pass needs, as long as memory lasts.

    Args:
        layers: whose memory it is.
        first: the first layer that needs a gradient.
        before: told the number of a layer that will be kept, before it runs; None: nothing is kept.
    """

    def __init__(self, layers: Layers, first: int, before: Callable[[int], None] | None) -> None:
        self.memory, self.first, self.before = layers.memory, first, before
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._leaf: torch.Tensor | None = None
        self._before = self._growth = 0.0  # bytes: taken before the layer at hand, and by one that was kept
        super().__init__(layers.layers)

    def _keep_call(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        super()._keep_call(layer, args, kwargs)
        hidden = self.calls[-1].hidden.detach()
        self._leaf = None
        if self.before is not None and len(self.calls) > self.first and self._has_room(hidden):
            self._leaf = hidden = hidden.requires_grad_()
            self.before(len(self.calls) - 1)
        self._before = self._allocated(hidden)
        return (hidden, *args[1:]) if args else args, kwargs if args else {**kwargs, "hidden_states": hidden}

    def _keep_output(self, layer: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        if self._leaf is not None:
            self.kept[len(self.calls) - 1] = self._leaf, hidden
            self._growth = max(self._growth, self._allocated(hidden) - self._before)
        hidden = hidden.detach()  # so that the next layer's input doesn't lead back to this one
        output = (hidden, *output[1:]) if isinstance(output, tuple) else hidden
        super()._keep_output(layer, args, output)
        return output

    def _has_room(self, hidden: torch.Tensor) -> bool:
        growth = self._growth or _GROWTH * hidden.numel() * hidden.element_size()
        return self.memory.free() > _LAYERS_LEFT * growth

    @staticmethod
    def _allocated(tensor: torch.Tensor) -> float:
        return torch.cuda.memory_allocated(tensor.device) if tensor.is_cuda else 0.0


class _Decoder:
    """The decoder layers of a model with the norm and head behind them, and batches on their way through."""

    def __init__(self, layers: Layers, job: Job, compiled: bool = False) -> None:
        self.layers, self.model, self.compiled = layers, layers.model, compiled
        self.norm = getattr(self.model.get_submodule(layers.path.rpartition(".")[0]), "norm", None)
        if self.norm is None or "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            raise EngineError(
                f"{type(self.model).__name__} has no `norm` beside its layers or takes no `logits_to_keep`; "
                "engine: native needs both, use engine: modelopt"
            )
        self.groups: dict[int, list[QuantGroup]] = {}
        for group in job.target.groups:
            self.groups.setdefault(layer_of(group), []).append(group)
        self.first = min(self.groups)  # layers before it need no gradient
        self.generator = torch.Generator(layers.device)  # of the signs
        self.call = _fused(_call, compiled)
        self.by_loss, self.by_signs = _fused(_by_loss, compiled), _fused(_by_signs, compiled)

    def record(self, current: _Pass, before: Callable[[int], None] | None = None) -> None:
        """Run the model, and keep of every layer what it is called with, and its graph where memory lasts.

        `before` is told the number of a layer whose graph will be kept, before it runs; without it none is kept.

        Raises:
            EngineError: norm and head don't make the model's logits of the last layer's output.
        """
        with torch.enable_grad(), _CutRecorder(self.layers, self.first, before) as seen:
            # No cache: it would be filled again when layers run again. One position: all logits are large.
            logits = self.model(**current.batch.inputs, use_cache=False, logits_to_keep=1).logits[:, -1:].detach()
        self._check_head(seen.output, logits)
        current.calls, current.output, current.kept = seen.calls, seen.output, seen.kept

    @torch.no_grad()
    def begin(self, current: _Pass, **options: Any) -> None:
        """Put a batch before the first layer.

        Raises:
            EngineError: as `record`, or the model changes hidden states between two layers.
        """
        try:
            current.calls, logits = self.layers.calls(current.batch, **options)
        except EngineError as error:
            raise EngineError(
                f"{error}; use method: fisher with the whole model in memory, or engine: modelopt"
            ) from error
        hidden = current.calls[0].hidden
        self._check_head(hidden, logits)
        current.output = hidden.to(self.layers.home)

    @torch.no_grad()
    def _check_head(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        ours = self.logits(hidden[:, -1:])
        if float((ours - logits).abs().max()) > _SAME_LOGITS * float(logits.abs().max()):
            raise EngineError(
                f"{type(self.model).__name__} does more than norm and head behind its layers; engine: native can't "
                "score it, use engine: modelopt"
            )

    @torch.no_grad()
    def run(self, layer: nn.Module, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Return what a layer makes of hidden states [rows, tokens, hidden], called as `call` was; both at home."""
        return self.call(layer, hidden.to(self.layers.device), call.args, call.kwargs).to(self.layers.home)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., vocabulary] of what the last layer gives, [..., hidden]."""
        assert self.norm is not None
        logits: torch.Tensor = self.model.get_output_embeddings()(self.norm(hidden))
        return logits

    def loss_gradient(self, current: _Pass) -> torch.Tensor:
        """Return the gradient of the batch's mean loss by the last layer's output, [rows, tokens, hidden]."""
        tokens = current.batch.labels[:, 1:].numel() if current.whole else current.batch.loss_tokens

        def by_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.by_loss(logits, labels, 1 / tokens)

        return self._gradient(current, by_logits)

    def probe_gradient(self, current: _Pass) -> torch.Tensor:
        """Return the gradient of the summed loss with labels of the model's own, as random signs stand for them.

        The signs are those that `seed` set.

        Returns:
            [rows, tokens, hidden], by the last layer's output.
        """

        def by_logits(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            signs = torch.randint(0, 2, logits.shape, generator=self.generator, device=logits.device, dtype=torch.int8)
            return self.by_signs(logits, signs)

        return self._gradient(current, by_logits)

    def seed(self, current: _Pass) -> None:
        """Let the next signs be those of the batch's tokens: whoever scores a batch draws the same ones."""
        ids = (current.batch if current.host is None else current.host).inputs["input_ids"].cpu().contiguous()
        self.generator.manual_seed(int(sha256_of_bytes(ids.view(torch.uint8).numpy().data)[:15], 16))

    def _gradient(
        self, current: _Pass, by_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return the gradient by the last layer's output from that by the logits [some counted tokens, vocabulary]."""
        output, labels = current.output.to(self.layers.device), current.batch.labels[:, 1:]
        hidden = _counted(output, current)
        labels = labels.flatten() if current.whole else labels[current.batch.predicted]
        count = len(labels)
        missing = -count % _ROWS_AT_ONCE if self.compiled else 0  # for parts of one shape, which is compiled once
        hidden, labels = functional.pad(hidden, (0, 0, 0, missing)), functional.pad(labels, (0, missing))
        parts: list[torch.Tensor] = []
        for start in range(0, len(labels), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            leaf = hidden[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = self.logits(leaf)
                parts += torch.autograd.grad(logits, leaf, by_logits(logits.detach(), labels[rows]))
        gradient, found = torch.zeros_like(output), torch.cat(parts)[:count]
        if current.whole:
            gradient[:, :-1] = found.view_as(output[:, :-1])
        else:
            gradient[:, :-1][current.batch.predicted] = found
        return gradient.to(self.layers.home)


def _call(layer: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the hidden states [rows, tokens, hidden] that a decoder layer makes of others."""
    return hidden_of(layer(hidden, *args, **kwargs))


def _by_loss(logits: torch.Tensor, labels: torch.Tensor, weight: float) -> torch.Tensor:
    """Return the gradient of the labels' loss times `weight` by the logits [rows, vocabulary]: softmax less labels."""
    p = logits.softmax(-1, dtype=torch.float32)
    there = labels[:, None] == torch.arange(logits.shape[-1], device=labels.device)
    return ((p - there.float()) * weight).to(logits.dtype)


def _by_signs(logits: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Return a random gradient by the logits [rows, vocabulary], made of as many random signs, given as 0 and 1.

    With signs z and probabilities p, sqrt(p) z - p sum(sqrt(p) z) has the covariance of the gradient by one drawn
    label, diag(p) - p p^T, without its rare large values.
    """
    p = logits.softmax(-1, dtype=torch.float32)
    root = p.sqrt() * (2 * signs - 1)
    return (root - p * root.sum(-1, keepdim=True)).to(logits.dtype)


def _counted(hidden: torch.Tensor, current: _Pass) -> torch.Tensor:
    """Return the rows [counted tokens, hidden] of [rows, tokens, hidden] whose next token counts."""
    before = hidden[:, :-1]
    return before.flatten(0, 1) if current.whole else before[current.batch.predicted.to(hidden.device)]


@torch.no_grad()
def calibrate(layers: Layers, job: Job) -> Amax:
    """Return the amax of every searched module's weight and input, and of every layer's keys and values; unchecked."""
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
    amax: Amax = {}
    with ExitStack() as stack:
        for name in modules:
            stack.callback(layers.model.get_submodule(name).register_forward_pre_hook(observe(name)).remove)
        stack.callback(last.clear)
        if layers.streamed:
            amax = _calibrate_streamed(layers, job, cache)
        else:
            for index, batch in enumerate(job.batches):
                job.progress("calibrate", index, total)
                layers.model(**batch.to(job.device).inputs, past_key_values=cache, use_cache=True)
                last.clear()
            amax = _weight_amax(layers.model, job.target.groups)
    job.progress("calibrate", total, total)
    amax |= {f"{name}.input_amax": value for name, value in seen.items()}
    if job.spec.share_fused_scales:
        for group in job.target.groups:
            for kind in ("weight_amax", "input_amax"):
                keys = [f"{module.name}.{kind}" for module in group.modules if f"{module.name}.{kind}" in amax]
                amax |= dict.fromkeys(keys, torch.stack([amax[key] for key in keys]).amax()) if keys else {}
    amax = {key: value.reshape(()).cpu().clone() for key, value in amax.items()}
    return amax | kv_cache_amax(layers.model, job.target, cache)


def _weight_amax(model: Any, groups: Iterable[QuantGroup]) -> Amax:
    """Return the amax of the weights of these groups."""
    names = [module.name for group in groups for module in group.modules]
    return {f"{name}.weight_amax": model.get_parameter(f"{name}.weight").abs().amax().float() for name in names}


def _calibrate_streamed(layers: Layers, job: Job, cache: AmaxCache) -> Amax:
    """Show every batch to the observers, a layer at a time, and return the amax of the weights."""
    decoder, amax = _Decoder(layers, job), Amax()
    passes: list[_Pass] = []
    for start, chunk in _chunks(list(range(len(job.batches))), layers, job.batches, states=1):
        job.progress("calibrate", start, len(job.batches))
        passes = [_Pass(job.batches[number].to(job.device)) for number in chunk]
        for current in passes:
            decoder.begin(current, past_key_values=cache, use_cache=True)
        for index in range(len(layers)):
            with layers.loaded(index) as layer:
                amax |= _weight_amax(layers.model, decoder.groups.get(index, ()))
                for current in passes:
                    current.output = decoder.run(layer, current.output, current.calls[index])
    return amax


def _chunks(
    wanted: list[int], layers: Layers, batches: Sequence[Batch], states: int
) -> Iterator[tuple[int, list[int]]]:
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


def run(layers: Layers, job: Job, partial: Partial, meter: Meter) -> None:
    """Calibrate and score; amax values and each batch's scores go to `partial`.

    Raises:
        MeasurementError: NaN or Inf in activations, or out of memory. EngineError: a model that it can't score.
    """
    model = layers.model
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        with without_cudnn_attention():
            amax = partial.amax()
            if amax is None:
                with meter.phase("calibrate"):
                    amax = calibrate(layers, job)
                    check_amax(amax, job.target)
                partial.keep_amax(amax)
            codes = None
            if job.spec.rounding == "compensated":
                compensation.run(layers, job, partial, amax, meter)
                codes = partial.codes()
            with meter.phase("score"):
                _score(layers, job, partial, amax, codes)
    except torch.OutOfMemoryError as error:
        raise MeasurementError(OUT_OF_MEMORY) from error


def scorer(
    layers: Layers, job: Job, amax: Amax, codes: Codes | None
) -> AbstractContextManager["_GradientScorer | _KlScorer"]:
    """Return what scores batches: a context, within which `.scores(batches)` takes some, on the job's device."""
    return (_KlScorer if job.spec.method == "kl_div" else _GradientScorer)(layers, job, amax, codes)


def _score(layers: Layers, job: Job, partial: Partial, amax: Amax, codes: Codes | None) -> None:
    missing = [index for index in range(job.score_batches) if partial.scores(index) is None]
    job.progress("score", job.score_batches - len(missing), job.score_batches)
    with scorer(layers, job, amax, codes) as scoring:
        before: list[tuple[int, Callable[[], BatchScores]]] = []  # whose scores the GPU is still at

        def settle() -> None:
            for index, wait in before:
                partial.keep_scores(index, wait())
                job.progress("score", index + 1, job.score_batches)
            before.clear()

        for _, chunk in _chunks(missing, layers, job.batches, scoring.states):
            found = scoring.scores([job.batches[index] for index in chunk])
            settle()
            before += zip(chunk, found, strict=True)
        settle()
    job.progress("score", job.score_batches, job.score_batches)


def _is_whole(batch: Batch) -> bool:
    """Return whether every token's next token counts."""
    return bool(batch.predicted.all()) and bool(batch.inputs["attention_mask"].all())


class _Graph:
    """A function of a batch before the first layer, as one CUDA graph: launching its kernels one by one takes longer.

    Args:
        function: what the graph does; it takes the pass apart.
        current: a batch like all that will follow, before the first layer.
        generator: of the random numbers that the function draws.
    """

    def __init__(self, function: Callable[[_Pass], torch.Tensor], current: _Pass, generator: torch.Generator) -> None:
        self.static = [tensor.clone() for tensor in _tensors_of(current)]
        place = dict(zip(map(id, _tensors_of(current)), self.static, strict=True))

        def fresh() -> _Pass:
            """Return the pass with the graph's own tensors in the batch's place."""
            calls = [
                LayerCall(place[id(call.hidden)], _mapped(call.args, place), _mapped(call.kwargs, place))
                for call in current.calls
            ]
            batch = Batch(current.batch.inputs, place[id(current.batch.labels)])
            return dataclasses.replace(
                current, batch=batch, calls=calls, output=place[id(current.output)], kept={}, scores={}
            )

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what libraries set up at their first call can't be captured
            function(fresh())
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph):
            self.result = function(fresh())

    def replay(self, current: _Pass) -> torch.Tensor:
        """Return what the function gives for a batch before the first layer."""
        for static, tensor in zip(self.static, _tensors_of(current), strict=True):
            static.copy_(tensor)
        self.graph.replay()
        return self.result.clone()


def _tensors_of(current: _Pass) -> list[torch.Tensor]:
    """Return the tensors that a pass before the first layer is made of, each once."""
    found: dict[int, torch.Tensor] = {}

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.setdefault(id(value), value)
        elif isinstance(value, tuple | list):
            for part in value:
                walk(part)
        elif isinstance(value, dict):
            walk(list(value.values()))

    walk([current.batch.labels, current.output, *((call.hidden, call.args, call.kwargs) for call in current.calls)])
    return list(found.values())


def _mapped(value: Any, place: dict[int, torch.Tensor]) -> Any:
    """Return the value with other tensors in the place of its own, by their ids."""
    if isinstance(value, torch.Tensor):
        return place[id(value)]
    if isinstance(value, tuple | list):
        return type(value)(_mapped(part, place) for part in value)
    if isinstance(value, dict):
        return {key: _mapped(part, place) for key, part in value.items()}
    return value


def _copies_fit(layers: Layers, job: Job) -> bool:
    """Return whether all searched weights are kept in FP8 too: making a layer's anew for every batch takes time."""
    copies = sum(group.weight_elements for group in job.target.groups)
    copies *= 1 if layers.memory.is_gpu else next(layers.model.parameters()).element_size()
    return not layers.streamed and layers.memory.free() > copies + _COPIES_LEFT


class _GradientScorer(ExitStack):
    """Scores by `gradient` or `fisher`; a context manager, within which the searched modules are tapped."""

    def __init__(self, layers: Layers, job: Job, amax: Amax, codes: Codes | None) -> None:
        super().__init__()
        self.layers, self.job = layers, job
        self.decoder = _Decoder(layers, job, compiled=_is_worth_compiling(layers, job, _COMPILED_FROM))
        self.taps = _Taps(layers.model, job, amax, codes)
        self.states = len(layers) + 1  # of each batch: every layer's input
        self.image_tokens = image_token_ids(layers.model.config)
        self.graphs: dict[torch.Size, _Graph] = {}  # by the shape of the batch; one at a time
        self.callback(self.graphs.clear)
        self.tapped = _copies_fit(layers, job)
        if self.tapped:
            self.enter_context(self.taps.on(job.target.groups))
        self.room = layers.memory.free()  # for graphs
        self.side: Any = None  # the stream of what comes before the first layer
        if job.device.startswith("cuda"):
            self.side = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def scores(self, batches: Sequence[Batch]) -> list[Callable[[], BatchScores]]:
        """Return for each batch a function that waits for its scores, while the next batches may already come.

        All batches go through a layer before the next one is loaded.
        """
        groups = self.job.target.groups
        if len(batches) == 1:
            current = self._begun(batches[0])
            if current is not None:
                with _compiling(self.decoder):
                    return [bound(_named, self._replayed(current), groups)]
        passes = [self._pass(batch) for batch in batches]
        self._forward(passes)
        gradients = []
        for current in passes:
            self._seed(current)
            gradients.append(self._gradient(current))
        for index in range(len(self.layers) - 1, self.decoder.first - 1, -1):
            with self.layers.loaded(index) as layer, self._tapped(index):
                for number, current in enumerate(passes):
                    gradients[number] = self._backward(layer, index, current, gradients[number])
        return [bound(_named, _read(current, groups, self.job.spec.method), groups) for current in passes]

    def _pass(self, batch: Batch) -> _Pass:
        """Return a batch on the device."""
        moved = batch.to(self.job.device)
        return _Pass(moved, batch, image_positions(moved, self.image_tokens), _is_whole(batch))

    def _begun(self, batch: Batch) -> _Pass | None:
        """Return a batch before the first layer if a CUDA graph scores it; the GPU may be at the batch before."""
        if not self._is_graphed(batch):
            return None
        with contextlib.nullcontext() if self.side is None else torch.cuda.stream(self.side):
            current = self._pass(batch)
            try:
                self.decoder.begin(current)
            except EngineError:
                return None  # layers that can't be run one after another: the model itself has to run them
        if self.side is not None:
            main = torch.cuda.current_stream()
            main.wait_stream(self.side)
            for tensor in _tensors_of(current):
                tensor.record_stream(main)
        return current

    def _seed(self, current: _Pass) -> None:
        if self.job.spec.method != "gradient":
            self.decoder.seed(current)

    def _gradient(self, current: _Pass) -> torch.Tensor:
        """Return the gradient by the last layer's output that the method begins with."""
        by_loss = self.job.spec.method == "gradient"
        return self.decoder.loss_gradient(current) if by_loss else self.decoder.probe_gradient(current)

    def _is_graphed(self, batch: Batch) -> bool:
        """Return whether a batch is scored by a CUDA graph: it is like others, and nothing of it has to run again.

        What decides is the batch and the job, not which batches came before: workers then score alike.
        """
        if not self.tapped or not self.layers.memory.is_gpu or self.job.score_batches < _GRAPHED_FROM:
            return False
        if not _is_whole(batch) or set(batch.inputs) != {"input_ids", "attention_mask"}:
            return False
        embedding: Any = self.layers.model.get_input_embeddings()
        state = batch.labels.numel() * embedding.weight.shape[1] * embedding.weight.element_size()
        return bool(self.room > _GROWTH * state * (len(self.layers) + _LAYERS_LEFT))

    def _replayed(self, current: _Pass) -> torch.Tensor:
        """Return the scores [groups, 2] of a batch before the first layer by the CUDA graph of its shape."""
        shape = current.batch.labels.shape
        if shape not in self.graphs:
            self.graphs.clear()  # each holds the memory of a whole step
            self.graphs[shape] = _Graph(self._scores, current, self.decoder.generator)
        self._seed(current)
        return self.graphs[shape].replay(current)

    def _scores(self, current: _Pass) -> torch.Tensor:
        """Return the scores [groups, 2] of a batch before the first layer, without waiting for the GPU anywhere."""
        with deterministic() if self.decoder.compiled else contextlib.nullcontext():  # a compiled backward pass asks
            for index, call in enumerate(current.calls):
                self._run_kept(index, current, call, current.output, self.decoder.call)
                current.output = current.kept[index][1].detach()
            gradient = self._gradient(current)
            for index in range(len(self.layers) - 1, self.decoder.first - 1, -1):
                gradient = self._backward(self.layers.layers[index], index, current, gradient)
        return _read(current, self.job.target.groups, self.job.spec.method)

    def _give_sinks(self, index: int, current: _Pass) -> None:
        self.taps.give_sinks(current, self.decoder.groups.get(index, ()))

    def _run_kept(
        self,
        index: int,
        current: _Pass,
        call: LayerCall,
        hidden: torch.Tensor,
        run: Callable[..., torch.Tensor] = _call,
    ) -> None:
        """Run a layer, and keep what its backward pass needs, unless it has none."""
        leaf = hidden.detach().requires_grad_(index >= self.decoder.first)
        if leaf.requires_grad:
            self._give_sinks(index, current)
        with torch.enable_grad():
            output = run(self.layers.layers[index], leaf, call.args, call.kwargs)
        current.kept[index] = leaf, output

    def _backward(self, layer: nn.Module, index: int, current: _Pass, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient by a layer's input from that by its output, [rows, tokens, hidden]; last layer first."""
        call = current.calls.pop()
        if index not in current.kept:
            self._run_kept(index, current, call, call.hidden.to(self.layers.device))
        leaf, output = current.kept.pop(index)
        names = [module.name for group in self.decoder.groups.get(index, ()) for module in group.modules]
        sinks = [current.sinks.pop(name) for name in names]
        with deterministic():
            found, *scores = torch.autograd.grad(
                output, [leaf, *sinks], gradient.to(self.layers.device), allow_unused=True
            )
        current.scores |= {name: score for name, score in zip(names, scores, strict=True) if score is not None}
        return found.to(self.layers.home)

    def _tapped(self, index: int) -> ExitStack:
        """Tap a layer's modules where they aren't all the time."""
        return ExitStack() if self.tapped else self.taps.on(self.decoder.groups.get(index, ()))

    def _forward(self, passes: Sequence[_Pass]) -> None:
        """Bring the batches behind the last layer, with every layer's input."""
        if not self.layers.streamed:
            for current in passes:
                self.decoder.record(current, bound(self._give_sinks, current=current) if self.tapped else None)
            return
        for current in passes:
            self.decoder.begin(current)
        for index in range(len(self.layers)):
            with self.layers.loaded(index) as layer:
                for current in passes:
                    call = dataclasses.replace(current.calls[index], hidden=current.output)
                    current.calls[index] = call
                    current.output = self.decoder.run(layer, call.hidden, call)


@dataclass
class _States:
    """Hidden states of a batch with one of these groups in FP8, for each of them: [groups x rows, tokens, hidden]."""

    groups: list[str]
    hidden: torch.Tensor


class _KlScorer(ExitStack):
    """KL scores: nats, added up over the batch's counted tokens."""

    def __init__(self, layers: Layers, job: Job, amax: Amax, codes: Codes | None) -> None:
        super().__init__()
        self.layers, self.job, self.amax, self.codes = layers, job, amax, codes
        self.decoder = _Decoder(layers, job, compiled=_is_worth_compiling(layers, job, _KL_COMPILED_FROM))
        self.states = len(job.target.groups) + 1  # of each batch: the original's, and with every group in FP8
        self.forms: dict[str, dict[str, Fp8]] = {}  # group -> its modules in FP8, where all of them fit
        if _copies_fit(layers, job):
            self.forms = {group.name: fp8_of(layers.model, group, amax, codes) for group in job.target.groups}
        if self.decoder.compiled:
            config: Any = torch._dynamo.config
            self.enter_context(config.patch(recompile_limit=_COMPILED_FORMS))
        self.normalisers, self.kl, self.rows = _normalisers, _kl_of_rows, _ROWS_AT_ONCE
        if _can_compile(job.device):
            from bitladder.sensitivity import kernels

            self.normalisers, self.kl, self.rows = kernels.normalisers, kernels.kl_of_rows, _KERNEL_ROWS_AT_ONCE

    @torch.no_grad()
    def scores(self, batches: Sequence[Batch]) -> list[Callable[[], BatchScores]]:
        """Return for each batch a function that waits for its scores.

        All batches go through a layer before the next one is loaded.
        """
        passes = [_Pass(batch.to(self.job.device), whole=_is_whole(batch)) for batch in batches]
        for current in passes:
            self.decoder.begin(current)
        needed = self.states * sum(current.output.numel() * current.output.element_size() for current in passes)
        if needed > self.layers.memory.free() / 2:
            self.layers.home = "cpu"
        with _compiling(self.decoder):
            states = self._through(passes)
        return [self._batch_scores(current, known) for current, known in zip(passes, states, strict=True)]

    def _through(self, passes: Sequence[_Pass]) -> list[list[_States]]:
        """Bring the batches behind the last layer, and return each one's hidden states with every group in FP8.

        What the groups of a layer give goes through the layers behind it together, as one larger batch.
        """
        states: list[list[_States]] = [[] for _ in passes]
        sizes = [self._together(current) for current in passes]
        for index in range(len(self.layers)):
            with self.layers.loaded(index) as layer:
                fresh: list[dict[str, torch.Tensor]] = [{} for _ in passes]
                for group in self.decoder.groups.get(index, ()):
                    with self._in_fp8(group):
                        for current, found in zip(passes, fresh, strict=True):
                            found[group.name] = self.decoder.run(layer, current.output, current.calls[index])
                for current, known, found, size in zip(passes, states, fresh, sizes, strict=True):
                    for each in known:
                        each.hidden = self.decoder.run(layer, each.hidden, self._call(current, len(each.groups), index))
                    current.output = self.decoder.run(layer, current.output, current.calls[index])
                    names = list(found)
                    for start in range(0, len(names), size):
                        together = names[start : start + size]
                        known.append(_States(together, torch.cat([found[name] for name in together])))
        return states

    def _together(self, current: _Pass) -> int:
        """Return how many groups' hidden states at most go through a layer together."""
        is_text = set(current.batch.inputs) == {"input_ids", "attention_mask"}
        return max(1, _TOKENS_TOGETHER // current.batch.labels.numel()) if is_text else 1

    def _call(self, current: _Pass, copies: int, index: int) -> LayerCall:
        """Return what a layer is called with for so many copies of a batch."""
        if copies == 1:
            return current.calls[index]
        if copies not in current.copies:
            inputs = {name: torch.cat([value] * copies) for name, value in current.batch.inputs.items()}
            calls, _ = self.layers.calls(Batch(inputs, torch.cat([current.batch.labels] * copies)))
            nothing = torch.empty(0)
            current.copies[copies] = [dataclasses.replace(call, hidden=nothing) for call in calls]
        return current.copies[copies][index]

    @contextlib.contextmanager
    def _in_fp8(self, group: QuantGroup) -> Iterator[None]:
        """Let the group's modules give what they would in FP8."""
        forms = self.forms.get(group.name) or fp8_of(self.layers.model, group, self.amax, self.codes)
        with ExitStack() as stack:
            for name, fp8 in forms.items():
                stack.enter_context(taken(self.layers.model.get_submodule(name), InFp8, fp8=fp8))
            yield

    def _batch_scores(self, current: _Pass, states: list[_States]) -> Callable[[], BatchScores]:
        original = _counted(current.output, current)
        names = [group for each in states for group in each.groups]
        others = [_counted(part, current) for each in states for part in each.hidden.chunk(len(each.groups))]
        values = dict(zip(names, self._kl(original, others), strict=True))
        groups = self.job.target.groups
        return bound(_named, torch.stack([values[group.name] for group in groups])[:, None], groups)

    def _kl(self, original: torch.Tensor, others: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return KL(original || other) in nats, added up over the rows, for each of `others` [counted, hidden]."""
        device = self.layers.device
        sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in others]
        for start in range(0, len(original), self.rows):
            rows = slice(start, start + self.rows)
            logits = self.decoder.logits(original[rows].to(device))
            normaliser = self.normalisers(logits)
            for total, other in zip(sums, others, strict=True):
                total += self.kl(logits, normaliser, self.decoder.logits(other[rows].to(device))).sum()
        return sums


def _normalisers(logits: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the sum of exponentials of each row of [rows, vocabulary]: [rows] in float32."""
    return logits.float().logsumexp(-1)


def _kl_of_rows(logits: torch.Tensor, normaliser: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(logits) || softmax(others)) in nats for each row of [rows, vocabulary]: [rows] in float64.

    With d = log q - log p it is the sum of p (exp(d) - 1 - d), which equals the sum of -p d for exact distributions
    and takes the float32 rounding of the two normalisers out (as in `evaluation`). For small d a term's error is d
    times float32's precision. No term is negative, so that adding them up in float32 loses nothing that counts.
    """
    log_p = (logits.float() - normaliser[:, None]).clamp_min_(LEAST_LOG)
    d = (others.float() - _normalisers(others)[:, None]) - log_p
    return (log_p.exp() * (d.expm1() - d)).sum(-1).double()


def _is_worth_compiling(layers: Layers, job: Job, tokens: int) -> bool:
    """Return whether layers are compiled for a job, of which at least so many tokens have a batch of the same shape."""
    many = sum(shape.numel() for shape in job.scored) >= tokens * len(set(job.scored))
    return many and _can_compile(job.device) and not layers.streamed


def _can_compile(device: str) -> bool:
    """Return whether functions are compiled there: on a GPU, with Triton and the C compiler that it needs."""
    has_triton = importlib.util.find_spec("triton") is not None
    return device.startswith("cuda") and has_triton and any(map(shutil.which, ("cc", "gcc", "clang")))


def _fused(function: Callable[..., torch.Tensor], compiled: bool) -> Callable[..., torch.Tensor]:
    """Return the function with its element-wise work in few GPU kernels, which are chosen without trying them out."""
    return torch.compile(function, dynamic=False, options={"deterministic": True}) if compiled else function


@contextlib.contextmanager
def _compiling(decoder: _Decoder) -> Iterator[None]:
    """Say what to do where torch can't compile a model's layers."""
    if not decoder.compiled:
        yield
        return
    errors: Any = torch._dynamo.exc
    try:
        yield
    except errors.TorchDynamoException as error:
        reason = " ".join(str(error).split("\n", 2)[:2])  # who raised, and what
        raise EngineError(
            f"torch can't compile the layers of {type(decoder.model).__name__} ({reason}); "
            "set TORCH_COMPILE_DISABLE=1 to measure without"
        ) from error
