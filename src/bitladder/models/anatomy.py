"""What a model's decoder layers do with hidden states, found by one pass without weights, before anything is computed.

The model is on the meta device, where tensors have shapes and no values; a pass of a large model takes a second. Its
batch has as many rows and tokens as hardly anything else in a model, so that a module's output says by its shape which
of its dimensions they are. Every layer's input is a leaf of autograd's graph, so that the graph of its output says
what else it was made from.

Scoring layer by layer needs that a layer's output depends on earlier layers by its hidden states alone (`Anatomy
.problem`), and what hidden states stand for which token (`Anatomy.positions`).
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

Layout = tuple[str, ...]  # of each dimension but the last: "rows", "tokens", "both" (flattened in this order), "other"

PLAIN: Layout = ("rows", "tokens")
ROWS, TOKENS = 11, 23  # primes that are seldom a number of heads


@dataclass
class Anatomy:
    """What one pass showed.

    extras: of what each layer gives beside hidden states, whether it is a tensor; None where it gives these alone.
    positions: of each linear module in the layers that ran, its dimensions; None where they can't be told.
    idle: linear modules that didn't run although their layer did.
    bypassed: those of them whose weights the layer's code uses by itself.
    overwritten: linear modules whose output the layer changes in place.
    problem: why layers can't be scored one by one; None: they can.
    fails: what the model's own code says when it is run on text; None: it runs.
    """

    extras: dict[int, tuple[bool, ...] | None] = field(default_factory=dict)
    positions: dict[str, Layout | None] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    bypassed: frozenset[str] = frozenset()
    overwritten: set[str] = field(default_factory=set)
    problem: str | None = None
    fails: str | None = None

    def give(self, index: int, hidden: torch.Tensor) -> Any:
        """Return hidden states as what a layer gives, with nothing in the place of what it gives beside them."""
        extras = self.extras.get(index)
        if extras is None:
            return hidden
        return (hidden, *(hidden.new_empty(0) if is_tensor else None for is_tensor in extras))


def tokens_first(x: torch.Tensor, layout: Layout, shape: torch.Size) -> torch.Tensor:
    """Return a module's input or output as [rows, tokens, others ..., what is behind its layout].

    Args:
        x: [as the layout says ..., others].
        layout: of the module, as `Anatomy.positions` has it.
        shape: (rows, tokens).
    """
    if layout == PLAIN:
        return x
    if "both" in layout:
        x = x.movedim(layout.index("both"), 0)
        return x.reshape(*shape, *x.shape[1:])
    return x.movedim((layout.index("rows"), layout.index("tokens")), (0, 1))


def look(model: Any, path: str) -> Anatomy:
    """Return what the decoder layers at `path` do, of a model on the meta device."""
    model.requires_grad_(False)
    layers: Any = model.get_submodule(path)
    with torch.enable_grad(), torch.device("meta"), _Answers(), _Watch(layers, path) as watch:  # type: ignore[no-untyped-call]
        ids = torch.zeros((ROWS, TOKENS), dtype=torch.long)
        try:
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except Exception as error:  # whatever a model's own code raises
            watch.found.fails = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
            watch.found.problem = f"can't be run on text ({watch.found.fails})"
            return watch.found
        watch.finish(getattr(output, "logits", None))
    return watch.found


class _Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what a model's code asks of values: masks hide nothing, so that checks of them are true."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


class _Watch(ExitStack):
    """Hooks on every layer and its linear modules; a context for one pass."""

    def __init__(self, layers: Any, path: str) -> None:
        super().__init__()
        self.layers, self.path, self.found = layers, path, Anatomy()
        self.order: list[int] = []
        self.changed = 0  # the first layer that isn't given what the one before it gave; 0: there is none
        self.owners: dict[torch.Tensor, int] = {}  # leaf -> layer whose input it is, or that gave it
        self.output = torch.empty(0)  # of the layer that ran last, as the model got it
        self.final = torch.empty(0)  # the leaf that it was made from
        self.ran: Counter[str] = Counter()
        self.outputs: list[tuple[str, torch.Tensor, int]] = []  # of the layer that runs: with what was written to it
        self.linears: dict[str, int] = {}
        self.weights: dict[torch.Tensor, str] = {}  # leaf -> linear module
        self.used: set[str] = set()  # linear modules whose weights a layer's output was made from
        for index, layer in enumerate(layers):
            before, after = self._before(index), self._after(index)
            self.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            self.callback(layer.register_forward_hook(after).remove)
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    self.linears[f"{path}.{index}.{name}"] = index
                    self.weights[module.weight.requires_grad_()] = f"{path}.{index}.{name}"
                    self.callback(module.register_forward_hook(self._linear(f"{path}.{index}.{name}")).remove)

    def _fail(self, problem: str) -> None:
        self.found.problem = self.found.problem or problem

    def _leaf(self, tensor: torch.Tensor, owner: int) -> torch.Tensor:
        leaf = tensor.detach().requires_grad_(tensor.is_floating_point())
        self.owners[leaf] = owner
        return leaf

    def _before(self, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, is_first = args[0] if args else kwargs.get("hidden_states"), not self.order
            self.order.append(index)
            if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3 or hidden.shape[:2] != (ROWS, TOKENS):
                self._fail(f"gives decoder layer {index} something else than hidden states [rows, tokens, features]")
                return None
            if not is_first and hidden is not self.output:
                self.changed = self.changed or index
            leaf = self._leaf(hidden, index)
            return (leaf, *args[1:]) if args else args, kwargs if args else {**kwargs, "hidden_states": leaf}

        return hook

    def _after(self, index: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            parts = output if isinstance(output, tuple) else (output,)
            if not parts or not isinstance(parts[0], torch.Tensor):
                return self._fail(f"gets something else than hidden states from decoder layer {index}")
            self.found.overwritten |= {name for name, made, version in self.outputs if made._version != version}
            self.outputs.clear()
            extras = tuple(isinstance(part, torch.Tensor) for part in parts[1:])
            self.found.extras[index] = extras if isinstance(output, tuple) else None
            for other in sorted(self._leads_to(parts[0]) - {index}):
                self._fail(
                    f"lets decoder layer {index} read what layer {other} made beside its hidden states "
                    "(shared keys and values?)"
                )
            self.final = self._leaf(parts[0], len(self.layers))
            self.output = self.final.clone()
            rest = tuple(self._leaf(part, index) if isinstance(part, torch.Tensor) else part for part in parts[1:])
            return (self.output, *rest) if isinstance(output, tuple) else self.output

        return hook

    def _linear(self, name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            layout = _layout(output.shape[:-1])
            self.found.positions[name] = layout if self.found.positions.get(name, layout) == layout else None
            self.ran[name] += 1
            self.outputs.append((name, output, output._version))

        return hook

    def _leads_to(self, tensor: torch.Tensor) -> set[int]:
        """Return the owners of the leaves that a tensor was made from."""
        pending, seen, owners = [tensor.grad_fn], set(), set()
        if tensor in self.owners:
            owners.add(self.owners[tensor])
        while pending:
            node: Any = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                if node.variable in self.weights:
                    self.used.add(self.weights[node.variable])
                else:
                    owners.add(self.owners[node.variable])
            pending += [following for following, _ in node.next_functions]
        return owners

    def finish(self, logits: Any) -> None:
        """Judge the whole pass."""
        if self.order != sorted(set(self.order)):  # some may run after pictures only
            self._fail("runs its decoder layers more than once, or in another order than they are listed in")
        if self.changed:
            self._fail(f"changes the hidden states before decoder layer {self.changed}")
        if not isinstance(logits, torch.Tensor):
            return self._fail("gives no logits")
        if self.found.problem is None and self._leads_to(logits) != {len(self.layers)}:
            self._fail("makes its logits from more than the last decoder layer's hidden states")
        self.found.idle = frozenset(n for n, i in self.linears.items() if i in self.order and not self.ran[n])
        self.found.bypassed = self.found.idle & self.used


def _layout(shape: torch.Size) -> Layout | None:
    """Return which dimensions are rows and tokens, or None where that can't be told."""
    if shape == (ROWS, TOKENS):
        return PLAIN
    known = {ROWS: "rows", TOKENS: "tokens", ROWS * TOKENS: "both"}
    if any(size not in known and (size % ROWS == 0 or size % TOKENS == 0) for size in shape):
        return None
    layout = tuple(known.get(size, "other") for size in shape)
    wanted = sorted(name for name in layout if name != "other")
    return layout if wanted in (["both"], ["rows", "tokens"]) else None
