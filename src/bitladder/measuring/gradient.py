"""Scores by `gradient` and `fisher`.

`gradient`:

1. A forward pass, cut before every decoder layer: a layer's input is a leaf. The model's own norm and head follow for
   some rows at a time (all logits of a batch at once are large), and give the gradient by the last layer's output.
2. Backward, layer by layer, by activations alone. On every searched module's output y stands a tap, which kept the
   module's input quantised. As soon as the gradient by y is known, the module's FP8 output less y is the error, and the
   sum of (gradient x error)^2 is the module's score.

No gradient of a weight is computed. What a layer's backward pass needs is kept from the forward pass as long as
memory lasts; the other layers run again from their inputs, to the same bits. A constant that is added between two
layers (Qwen3-VL's deepstack) changes no gradient. Whole batches of text on a GPU run as one CUDA graph: launched one by
one, a step's kernels take as long for one row as for eight. What comes before the first layer runs on a stream of its
own, while the GPU is at the batch before.

`fisher`: the same two passes estimate the KL itself, in nats. To second order it is half the variance, over labels
that the model draws itself, of the directional derivative of the loss along what FP8 changes. So the backward pass
begins with a random gradient of the logits that has the covariance of such labels' (diag p - p pT), and a group's score
is the sum over tokens of half the square of gradient times error, summed over the group's outputs. Tokens count as
independent. `benchmarks/signals.py` compares.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial as bound
from typing import Any

import torch
from torch import nn

from bitladder.data.batches import Batch
from bitladder.device import deterministic
from bitladder.errors import EngineError, MeasurementError
from bitladder.measured import Amax, Codes
from bitladder.measuring.calls import LayerCall
from bitladder.measuring.candidates import Form, LastInput, Tapped, forms_in, taken
from bitladder.measuring.decoder import (
    GROWTH,
    LAYERS_LEFT,
    Decoder,
    Pass,
    compiling,
    copies_fit,
    is_whole,
    is_worth_compiling,
    named,
    run_layer,
)
from bitladder.measuring.job import BatchScores, Job
from bitladder.measuring.layers import Layers
from bitladder.measuring.scores import by_position, image_positions
from bitladder.models.anatomy import PLAIN
from bitladder.models.loading import image_token_ids
from bitladder.records import QuantGroup

_GRAPHED_FROM = 4  # batches from which capturing a CUDA graph is worth it
_COMPILED_FROM = 500_000  # tokens of a shape, times formats, from which a dozen seconds of compiling are worth it


class _Taps:
    """The searched modules of layers that run with gradients, each of which gives its scores too."""

    def __init__(self, layers: Layers, job: Job, amax: Amax, codes: Codes | None) -> None:
        self.model, self.job, self.amax, self.codes = layers.model, job, amax, codes
        self.anatomy = layers.anatomy
        self.shared = {"directional": job.spec.method != "gradient", "last_input": LastInput()}
        self.given: list[Any] = []  # modules that have a sink now

    def on(self, groups: Iterable[QuantGroup]) -> ExitStack:
        """Tap the modules of these groups, whose weights must be at hand, until the context is left."""
        stack = ExitStack()
        for group in groups:
            for name, forms in self._forms(group).items():
                linear, layout = self.model.get_submodule(name), self.anatomy.positions.get(name, PLAIN)
                if layout is None:
                    raise EngineError(f"{name}: its output doesn't say what belongs to which token; use method: kl_div")
                own = {"layout": layout, "copied": name in self.anatomy.overwritten}
                stack.enter_context(taken(linear, Tapped, name=name, forms=forms, sink=None, **own, **self.shared))
        return stack

    def _forms(self, group: QuantGroup) -> dict[str, tuple[Form, ...]]:
        """Return what each of a group's modules is in every format that the group can have."""
        found = forms_in(self.model, group, self.job.served(group), self.amax, self.codes).values()
        return {module.name: tuple(forms[module.name] for forms in found) for module in group.modules}

    def give_sinks(self, current: Pass, groups: Iterable[QuantGroup]) -> None:
        """Give every module of a layer's groups, before the layer runs with gradients, where its scores will arrive.

        Those of the layer before lose theirs: a module that runs in another layer than its own is noticed.
        """
        self.take_sinks()
        labels = current.batch.labels
        for group in groups:
            forms = len(self.job.formats_of(group)) or 1
            zeros = torch.zeros((forms, *labels.shape), dtype=torch.float64, device=labels.device)
            for module in group.modules:
                current.sinks[module.name] = sink = zeros.detach().requires_grad_()
                tapped: Any = self.model.get_submodule(module.name)
                tapped.sink = sink
                self.given.append(tapped)

    def take_sinks(self) -> None:
        """Leave no module a sink: its layer has run."""
        for tapped in self.given:
            tapped.sink = None
        self.given.clear()


def _by_module(current: Pass, group: QuantGroup) -> torch.Tensor:
    """Return what arrived in the sinks of a group's modules, [modules, forms, rows, tokens].

    Raises:
        MeasurementError: a module that no gradient reached.
    """
    missing = [module.name for module in group.modules if module.name not in current.scores]
    if missing:
        raise MeasurementError(f"{missing[0]}: no gradient of the loss reaches this module; use method: kl_div")
    return torch.stack([current.scores[module.name] for module in group.modules])


class GradientScorer(ExitStack):
    """Scores by `gradient` or `fisher`; a context manager, within which the searched modules are tapped."""

    def __init__(self, layers: Layers, job: Job, amax: Amax, codes: Codes | None) -> None:
        super().__init__()
        self.layers, self.job = layers, job
        formats = len(job.spec.formats)
        compiled = formats > 0 and is_worth_compiling(layers, job, _COMPILED_FROM // formats)
        self.decoder = Decoder(layers, job, compiled=compiled)
        self.taps = _Taps(layers, job, amax, codes)
        self.states = len(layers) + 1  # of each batch: every layer's input
        self.image_tokens = image_token_ids(layers.model.config)
        self.graphs: dict[torch.Size, _Graph] = {}  # by the shape of the batch; one at a time
        self.callback(self.graphs.clear)
        self.tapped = copies_fit(layers, job)
        if self.tapped:
            self.enter_context(self.taps.on(job.target.groups))
        self.room = layers.memory.free()  # for graphs
        self.side: Any = None  # the stream of what comes before the first layer
        self.capturing: Any = None  # the stream that captures graphs
        if layers.memory.is_gpu:
            self.side, self.capturing = _streams(torch.cuda.current_device())

    def scores(self, batches: Sequence[Batch]) -> list[Callable[[], BatchScores]]:
        """Return for each batch a function that waits for its scores, while the next batches may already come.

        All batches go through a layer before the next one is loaded.
        """
        with compiling(self.decoder):
            values = self._values(batches)
        return [bound(named, each, self.job.variants) for each in values]

    def _read(self, current: Pass) -> torch.Tensor:
        """Return the score of each group in each of its formats, and what of it lies at image-token positions.

        [variants, 2], in the order of `Job.variants`.
        """
        found = []
        for group in self.job.target.groups:
            tokens = _by_module(current, group).sum(0)
            for of_format in tokens if self.job.spec.method == "gradient" else tokens.square() / 2:  # [rows, tokens]
                found.append(by_position(of_format, current.images))
        return torch.stack(found)

    def _values(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Return what `_read` gives of each batch."""
        if len(batches) == 1:
            begun = self._begun(batches[0])
            if begun is not None:
                return [self._replayed(batches[0], begun)]
        passes = [self._pass(batch) for batch in batches]
        self._forward(passes)
        gradients = []
        for batch, current in zip(batches, passes, strict=True):
            self._seed(batch)
            gradients.append(self._gradient(current))
        for index in range(len(self.layers) - 1, self.decoder.first - 1, -1):
            with self.layers.loaded(index) as layer, self._tapped(index):
                for number, current in enumerate(passes):
                    gradients[number] = self._backward(layer, index, current, gradients[number])
        return [self._read(current) for current in passes]

    def _pass(self, batch: Batch) -> Pass:
        """Return a batch on the device."""
        moved = batch.to(self.job.device)
        return Pass(moved, image_positions(moved, self.image_tokens), is_whole(batch))

    def _begun(self, batch: Batch) -> Pass | None:
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

    def _seed(self, batch: Batch) -> None:
        if self.job.spec.method != "gradient":
            self.decoder.seed(batch)

    def _gradient(self, current: Pass) -> torch.Tensor:
        """Return the gradient by the last layer's output that the method begins with."""
        by_loss = self.job.spec.method == "gradient"
        return self.decoder.loss_gradient(current) if by_loss else self.decoder.probe_gradient(current)

    def _is_graphed(self, batch: Batch) -> bool:
        """Return whether a batch is scored by a CUDA graph: it is like others, and nothing of it has to run again.

        What decides is the batch and the job, not which batches came before: workers then score alike.
        """
        if (
            not self.tapped
            or not self.decoder.tail.plain
            or not self.layers.memory.is_gpu
            or self.job.score_batches < _GRAPHED_FROM
        ):
            return False
        if not is_whole(batch) or set(batch.inputs) != {"input_ids", "attention_mask"}:
            return False
        embedding: Any = self.layers.model.get_input_embeddings()
        state = batch.labels.numel() * embedding.weight.shape[1] * embedding.weight.element_size()
        return bool(self.room > GROWTH * state * (len(self.layers) + LAYERS_LEFT))

    def _replayed(self, batch: Batch, current: Pass) -> torch.Tensor:
        """Return what `_read` gives of a batch before the first layer, by the CUDA graph of its shape."""
        shape = batch.labels.shape
        if shape not in self.graphs:
            self.graphs.clear()  # each holds the memory of a whole step
            self.graphs[shape] = _Graph(self._at_once, current, self.decoder.generator, self.capturing)
        self._seed(batch)
        return self.graphs[shape].replay(current)

    def _at_once(self, current: Pass) -> torch.Tensor:
        """Return what `_read` gives of a batch before the first layer, without waiting for the GPU anywhere."""
        with deterministic() if self.decoder.compiled else contextlib.nullcontext():  # a compiled backward pass asks
            for index, call in enumerate(current.calls):
                self._run_kept(index, current, call, current.output, self.decoder.call)
                current.output = current.kept[index][1].detach()
            gradient = self._gradient(current)
            for index in range(len(self.layers) - 1, self.decoder.first - 1, -1):
                gradient = self._backward(self.layers.layers[index], index, current, gradient)
        return self._read(current)

    def _give_sinks(self, index: int, current: Pass) -> None:
        self.taps.give_sinks(current, self.decoder.groups.get(index, ()))

    def _run_kept(
        self,
        index: int,
        current: Pass,
        call: LayerCall,
        hidden: torch.Tensor,
        run: Callable[..., torch.Tensor] = run_layer,
    ) -> None:
        """Run a layer, and keep what its backward pass needs, unless it has none."""
        leaf = hidden.detach().requires_grad_(index >= self.decoder.first)
        if leaf.requires_grad:
            self._give_sinks(index, current)
        with torch.enable_grad():
            output = run(self.layers.layers[index], leaf, call.args, call.kwargs)
        self.taps.take_sinks()
        current.kept[index] = leaf, output

    def _backward(self, layer: nn.Module, index: int, current: Pass, gradient: torch.Tensor) -> torch.Tensor:
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

    def _forward(self, passes: Sequence[Pass]) -> None:
        """Bring the batches behind the last layer, with every layer's input."""
        if not self.layers.streamed:
            for current in passes:
                self.decoder.record(current, bound(self._give_sinks, current=current) if self.tapped else None)
                self.taps.take_sinks()
            return
        for current in passes:
            self.decoder.begin(current)
        for index in range(len(self.layers)):
            with self.layers.loaded(index) as layer:
                for current in passes:
                    call = dataclasses.replace(current.calls[index], hidden=current.output)
                    current.calls[index] = call
                    current.output = self.decoder.run(layer, call.hidden, call)


class TokenWeigher(GradientScorer):
    """How much it matters what a module gives for a token: the length of the gradient by its output.

    The gradient is that of `fisher`. A change of the output costs half the square of gradient times change. Layers are
    never compiled for it: streamed ones aren't, and codes are to be the same.
    """

    def __init__(self, layers: Layers, job: Job) -> None:
        spec = job.spec.model_copy(update={"method": "fisher", "formats": ()})
        shapes = tuple(batch.labels.shape for batch in job.batches)
        super().__init__(layers, dataclasses.replace(job, spec=spec, scored=shapes), {}, None)

    def lengths(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Return the lengths of each batch, [modules, rows, tokens] in float32, in the order of the target's groups.

        All batches go through a layer before the next one is loaded.
        """
        return self._values(batches)

    def _read(self, current: Pass) -> torch.Tensor:
        found = torch.cat([_by_module(current, group) for group in self.job.target.groups])
        return found.squeeze(1).sqrt().float()


@functools.cache
def _streams(device: int) -> tuple[Any, Any]:
    """Return two streams of a GPU: of what comes before the first layer, and that captures graphs.

    A product of matrices works in memory that belongs to its stream, in a graph to the stream that captured it: the two
    must differ, and streams come from a pool that begins again after 32, of which each keeps its memory.
    """
    with torch.cuda.device(device):
        return torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]


class _Graph:
    """A function of a batch before the first layer, as one CUDA graph: launching its kernels one by one takes longer.

    Args:
        function: what the graph does; it takes the pass apart.
        current: a batch like all that will follow, before the first layer.
        generator: of the random numbers that the function draws.
        stream: that captures it, and on which nothing else ever runs.
    """

    def __init__(
        self, function: Callable[[Pass], torch.Tensor], current: Pass, generator: torch.Generator, stream: Any
    ) -> None:
        self.static = [tensor.clone() for tensor in _tensors_of(current)]
        place = dict(zip(map(id, _tensors_of(current)), self.static, strict=True))

        def fresh() -> Pass:
            """Return the pass with the graph's own tensors in the batch's place."""
            calls = [
                LayerCall(place[id(call.hidden)], _mapped(call.args, place), _mapped(call.kwargs, place))
                for call in current.calls
            ]
            batch = Batch(current.batch.inputs, place[id(current.batch.labels)])
            return dataclasses.replace(
                current, batch=batch, calls=calls, output=place[id(current.output)], kept={}, sinks={}, scores={}
            )

        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what libraries set up at their first call can't be captured
            function(fresh())
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph, stream=stream):
            self.result = function(fresh())

    def replay(self, current: Pass) -> torch.Tensor:
        """Return what the function gives for a batch before the first layer."""
        for static, tensor in zip(self.static, _tensors_of(current), strict=True):
            static.copy_(tensor)
        self.graph.replay()
        return self.result.clone()


def _tensors_of(current: Pass) -> list[torch.Tensor]:
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
