"""A model's decoder layers with norm and head behind them, and batches on their way through: what the scorers share."""

import contextlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bitladder.data.batches import Batch
from bitladder.errors import EngineError
from bitladder.formats import group_bits
from bitladder.measuring.calls import LayerCall, LayerRecorder, by_layer, hidden_of
from bitladder.measuring.job import BatchScores, Job, Variant
from bitladder.measuring.layers import Layers, last_position
from bitladder.measuring.tail import Tail
from bitladder.storage import sha256_of_bytes

ROWS_AT_ONCE = 256  # of logits: 151,936 a row in float32 make 156 MB, and a loss or KL needs several of them
_SAME_LOGITS = 0.02  # of the largest logit: BF16 rounds to 0.004, a softcap or a factor changes more
_COPIES_LEFT = 3e9  # bytes of memory that copies of all searched weights must leave, to be kept
GROWTH = 40  # times a layer's input: what its backward pass needs, before it was seen
LAYERS_LEFT = 4  # of the memory that a kept layer takes: for the head, the backward pass, and the estimate's error


@dataclass
class Pass:
    """One batch on its way through the layers."""

    batch: Batch
    images: torch.Tensor | None = None  # mask [rows, tokens] of image-token positions
    whole: bool = False  # every token's next token counts: text without padding
    calls: list[LayerCall] = field(default_factory=list)  # of each layer; its hidden states are the layer's input
    copies: dict[int, list[LayerCall]] = field(default_factory=dict)  # number -> calls for so many copies of the batch
    output: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # of the last layer that ran
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # layer -> leaf, its output
    sinks: dict[str, torch.Tensor] = field(default_factory=dict)  # module -> whose gradient will be its scores
    scores: dict[str, torch.Tensor] = field(default_factory=dict)  # module -> what each token adds, [rows, tokens]


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
        growth = self._growth or GROWTH * hidden.numel() * hidden.element_size()
        return self.memory.free() > LAYERS_LEFT * growth

    @staticmethod
    def _allocated(tensor: torch.Tensor) -> float:
        return torch.cuda.memory_allocated(tensor.device) if tensor.is_cuda else 0.0


class Decoder:
    """The decoder layers of a model with the norm and head behind them, and batches on their way through."""

    def __init__(self, layers: Layers, job: Job, compiled: bool = False) -> None:
        self.layers, self.model, self.compiled = layers, layers.model, compiled
        if layers.anatomy.problem is not None:
            raise EngineError(f"{type(self.model).__name__} {layers.anatomy.problem}; use engine: modelopt")
        self.tail = Tail(layers)
        self.groups = by_layer(job.target.groups)
        self.first = min(self.groups)  # layers before it need no gradient
        self.generator = torch.Generator(layers.device)  # of the signs
        self.call = fused(run_layer, compiled)
        self.by_loss, self.by_signs = fused(_by_loss, compiled), fused(_by_signs, compiled)

    def record(self, current: Pass, before: Callable[[int], None] | None = None) -> None:
        """Run the model, and keep of every layer what it is called with, and its graph where memory lasts.

        `before` is told the number of a layer whose graph will be kept, before it runs; without it none is kept.

        Raises:
            EngineError: the model's logits depend on more than the last layer's output.
        """
        with torch.enable_grad(), last_position(self.model), _CutRecorder(self.layers, self.first, before) as seen:
            # No cache: it would be filled again when layers run again. One position: all logits are large.
            logits = self.model(**current.batch.inputs, use_cache=False).logits[:, -1:].detach()
        self._check_head(seen.output, logits)
        current.calls, current.output, current.kept = seen.calls, seen.output, seen.kept

    @torch.no_grad()
    def begin(self, current: Pass, **options: Any) -> None:
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
                f"{type(self.model).__name__} makes its logits from more than the last decoder layer's hidden "
                "states; engine: native can't score it, use engine: modelopt"
            )

    @torch.no_grad()
    def run(self, layer: nn.Module, hidden: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Return what a layer makes of hidden states [rows, tokens, hidden], called as `call` was; both at home."""
        return self.call(layer, hidden.to(self.layers.device), call.args, call.kwargs).to(self.layers.home)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., vocabulary] of what the last layer gives, [..., hidden]."""
        return self.tail.logits(hidden)

    def loss_gradient(self, current: Pass) -> torch.Tensor:
        """Return the gradient of the batch's mean loss by the last layer's output, [rows, tokens, hidden]."""
        tokens = current.batch.labels[:, 1:].numel() if current.whole else current.batch.loss_tokens

        def by_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.by_loss(logits, labels, 1 / tokens)

        return self._gradient(current, by_logits)

    def probe_gradient(self, current: Pass) -> torch.Tensor:
        """Return the gradient of the summed loss with labels of the model's own, as random signs stand for them.

        The signs are those that `seed` set.

        Returns:
            [rows, tokens, hidden], by the last layer's output.
        """

        def by_logits(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            signs = torch.randint(0, 2, logits.shape, generator=self.generator, device=logits.device, dtype=torch.int8)
            return self.by_signs(logits, signs)

        return self._gradient(current, by_logits)

    def seed(self, batch: Batch) -> None:
        """Let the next signs be those of the batch's tokens: whoever scores a batch draws the same ones.

        A batch on the host spares waiting for the GPU.
        """
        ids = batch.inputs["input_ids"].masked_fill(~batch.inputs["attention_mask"].bool(), 0).cpu().contiguous()
        self.generator.manual_seed(int(sha256_of_bytes(ids.view(torch.uint8).numpy().data)[:15], 16))

    def _gradient(self, current: Pass, by_logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the gradient by the last layer's output from that by the logits [some counted tokens, vocabulary]."""
        output, labels = current.output.to(self.layers.device), current.batch.labels[:, 1:]
        hidden = counted(output, current)
        labels = labels.flatten() if current.whole else labels[current.batch.predicted]
        count = len(labels)
        missing = -count % ROWS_AT_ONCE if self.compiled else 0  # for parts of one shape, which is compiled once
        hidden, labels = functional.pad(hidden, (0, 0, 0, missing)), functional.pad(labels, (0, missing))
        parts: list[torch.Tensor] = []
        for start in range(0, len(labels), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
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


def run_layer(layer: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
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


def counted(hidden: torch.Tensor, current: Pass) -> torch.Tensor:
    """Return the rows [counted tokens, hidden] of [rows, tokens, hidden] whose next token counts."""
    before = hidden[:, :-1]
    return before.flatten(0, 1) if current.whole else before[current.batch.predicted.to(hidden.device)]


def named(values: torch.Tensor, variants: Sequence[Variant]) -> BatchScores:
    """Return a batch's scores from [variants, 1 or 2], which are waited for."""
    scores: BatchScores = {}
    for (group, name), row in zip(variants, values.cpu().tolist(), strict=True):
        scores.setdefault(group.name, {})[name] = tuple(row)
    return scores


def is_whole(batch: Batch) -> bool:
    """Return whether every token's next token counts."""
    return bool(batch.predicted.all()) and bool(batch.inputs["attention_mask"].all())


def copies_fit(layers: Layers, job: Job) -> bool:
    """Return whether all searched weights are kept in their formats too: making a layer's anew takes time."""
    size = next(layers.model.parameters()).element_size()
    copies = sum(
        group_bits(group, format_.name) // 8 if layers.memory.is_gpu else group.weight_elements * size
        for group in job.target.groups
        for format_ in job.served(group)
        if format_.weight_like not in job.formats_of(group)
    )
    return not layers.streamed and layers.memory.free() > copies + _COPIES_LEFT


def is_worth_compiling(layers: Layers, job: Job, tokens: int) -> bool:
    """Return whether layers are compiled for a job, of which at least so many tokens have a batch of the same shape."""
    many = sum(shape.numel() for shape in job.scored) >= tokens * len(set(job.scored))
    return many and can_compile(job.device) and not layers.streamed


def can_compile(device: str) -> bool:
    """Return whether functions are compiled there: on a GPU, with Triton and the C compiler that it needs."""
    has_triton = importlib.util.find_spec("triton") is not None
    return device.startswith("cuda") and has_triton and any(map(shutil.which, ("cc", "gcc", "clang")))


def fused(function: Callable[..., torch.Tensor], compiled: bool) -> Callable[..., torch.Tensor]:
    """Return the function with its element-wise work in few GPU kernels, which are chosen without trying them out."""
    return torch.compile(function, dynamic=False, options={"deterministic": True}) if compiled else function


@contextlib.contextmanager
def compiling(decoder: Decoder) -> Iterator[None]:
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
