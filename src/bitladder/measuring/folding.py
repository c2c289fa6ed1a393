"""Sizes of channels moved from where they are made into the weights that read them: `fold_channels(...)`.

With four bits for an input, a channel that is much larger than the others of its block leaves these few values. With S
diagonal, W norm(x) = (W S) (norm(x) / S): the norm's own parameters are divided by S, the weights' columns multiplied
with it, and no runtime sees a difference. A channel's factor is the square root of its mean magnitude over calibration
tokens, halfway between even inputs and even weights. The inner channels of an MLP, act(gate x) · up x, are moved alike
out of the rows of `up`, where that is asked for.

Factors are powers of two, so that nothing is rounded: every product is what it was, in any floating-point arithmetic,
and so are the model's logits, to the bit. That is tried, too: a model whose logits change has something else that reads
a norm, or none that is linear in its parameters.

Norms of some families (Gemma, Qwen3-Next, Qwen3.5) multiply with 1 + w. There w becomes (1 + w) / 2^k - 1, which w's
dtype holds for some k alone: BF16 for every k from 0 to log2(1 + 2 w) where w is positive, since 1 + w - 2^k is a
multiple of w's last bit and no larger than w. All channels of a norm may be divided by one more factor, which changes
no block; so that one is taken with which the channels come nearest to what they should have.

Source: SmoothQuant (Xiao et al., 2022, arXiv:2211.10438), equation 4 with alpha 0.5, with means as in AWQ (Lin et al.,
2023, arXiv:2306.00978).
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn

from bitladder.data.batches import Batch
from bitladder.errors import EngineError
from bitladder.models.scaling import Scaling
from bitladder.runinfo import Progress

_EXPONENT = 0.5  # of a channel's mean magnitude in its factor
_SMALLEST = 2.0**-8  # a mean magnitude, over that of all channels, below which it isn't told apart
_EXPONENTS = range(-8, 9)  # of factors, and of the one that all channels of a norm share
_KEPT = 8  # outputs of norms, the last ones: they are read soon
_PROBED = 4  # tokens on which a fold is tried


@dataclass(frozen=True, eq=False)
class Fold:
    """Where channels are made, and what is moved from there.

    Attributes:
        source: the name of a norm, or of a linear module to whose outputs what is read is proportional.
        readers: the linear modules that read it.
        factors: of each channel, powers of two, float32 [features].
        raised: a norm's own parameters to which it adds 1.
        inner: whether they are the inner channels of an MLP.
    """

    source: str
    readers: tuple[str, ...]
    factors: torch.Tensor
    raised: tuple[str, ...] = ()
    inner: bool = False


@dataclass
class _Seen:
    """What the passes showed of channels that may be folded."""

    readers: set[str] = field(default_factory=set)
    magnitudes: torch.Tensor | None = None  # summed over tokens, each at unit length, [features]
    odd: bool = False  # they are made or read in a way that isn't understood
    given: torch.Tensor | None = None  # hidden states that an MLP was given, [1, tokens, features]

    def count(self, values: torch.Tensor, counted: torch.Tensor) -> None:
        """Add the tokens [rows, tokens, features] that a mask [rows, tokens] counts."""
        tokens = nn.functional.normalize(values[counted].float(), dim=-1).abs().sum(0)
        self.magnitudes = tokens if self.magnitudes is None else self.magnitudes + tokens


def fold_channels(
    model: Any,
    batches: Sequence[Batch],
    searched: Collection[str],
    stored: Mapping[str, torch.dtype],
    progress: Progress,
    *,
    mlp: bool = False,
) -> tuple[Fold, ...]:
    """Fold a loaded model, in place, and return what was done.

    A norm is folded where its channels are uneven, linear modules alone read it, one of which is searched, and it is
    linear in its parameters or in these and one.

    Args:
        model: loaded; changed.
        batches: calibration batches, on the model's device.
        searched: names of linear modules.
        stored: of the parameters that lie in the model's files as they are, the dtype there.
        progress: told of every batch.
        mlp: whether the inner channels of MLPs are folded as well.

    Raises:
        EngineError: nothing can be folded, or the logits of the first batch change.
    """
    with torch.no_grad():
        before = model(**batches[0].inputs).logits
        makers = _makers(model, searched) if mlp else {}
        with _Watch(model, makers) as watch:
            for number, batch in enumerate(batches):
                progress("fold", number, len(batches))
                watch.counted = batch.inputs["attention_mask"].bool()
                model(**batch.inputs)
        progress("fold", len(batches), len(batches))
        folds = []
        for name, seen in watch.seen.items():
            if _uneven(seen) and seen.readers & set(searched):
                folds += _folded_norm(model, name, seen, stored)
        for name, seen in watch.inner.items():
            if _uneven(seen):
                folds += _folded_mlp(model, name, makers[name], seen, stored)
        if not folds:
            raise EngineError(
                "no norm of this model can be folded: none has uneven channels, is read by linear modules alone, "
                "searched ones among them, and is linear in its parameters or in 1 + these; measure the model as it is"
            )
        if not torch.equal(model(**batches[0].inputs).logits, before):
            raise EngineError(
                "folding changes this model's logits, so something else reads a norm or a weight that was folded; "
                "measure the model as it is"
            )
    return tuple(folds)


def scalings_of(model: Any, fold: Fold) -> dict[str, Scaling]:
    """Return how each parameter that a fold changes is scaled."""
    source, by = model.get_submodule(fold.source), 1 / fold.factors
    own = {
        f"{fold.source}.{name}": Scaling(by.view(-1, *[1] * (parameter.dim() - 1)), float(name in fold.raised))
        for name, parameter in source.named_parameters()
    }
    return own | {f"{name}.weight": Scaling(fold.factors) for name in fold.readers}


def said(folds: Collection[Fold]) -> str:
    """Return what was folded, in words: `60 norms and the inner channels of 30 MLPs`."""
    mlps = sum(one.inner for one in folds)
    return f"{len(folds) - mlps} norms" + (f" and the inner channels of {mlps} MLPs" if mlps else "")


def _uneven(seen: _Seen) -> bool:
    return not seen.odd and seen.magnitudes is not None and bool(seen.magnitudes.any())


def _makers(model: Any, searched: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return linear modules beside each searched one that may make its inputs, of hidden states that both share."""
    found = {}
    for name in searched:
        own, parent = model.get_submodule(name), _parent(name)
        beside = [
            f"{parent}.{child}"
            for child, module in model.get_submodule(parent).named_children()
            if isinstance(module, nn.Linear) and module.weight.shape == own.weight.shape[::-1] and module is not own
        ]
        if beside and _takes_hidden_states_alone(model.get_submodule(parent)):
            found[name] = tuple(beside)
    return found


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _takes_hidden_states_alone(module: nn.Module) -> bool:
    """Return whether a module can be called with one argument."""
    try:
        inspect.signature(module.forward).bind(None)
    except TypeError:
        return False
    return True


class _Watch(ExitStack):
    """Hooks on every module that has no module in it; a context for passes.

    seen: by name, of each module that has vectors alone for parameters, as norms have.
    inner: by name, of the inputs of each module that was asked for.
    """

    def __init__(self, model: Any, inner: Collection[str]) -> None:
        super().__init__()
        self.seen: dict[str, _Seen] = {}
        self.inner = {name: _Seen() for name in inner}
        self.counted = torch.empty(0)  # mask [rows, tokens] of the batch at hand: all but padding
        self._made: dict[int, tuple[str, torch.Tensor]] = {}  # id of an output -> the norm, and the output itself
        self.callback(model.register_forward_hook(lambda *_: self._made.clear()).remove)
        for name, module in model.named_modules():
            if next(module.children(), None) is not None:
                continue
            self.callback(module.register_forward_pre_hook(self._reads(name), with_kwargs=True).remove)
            if name in self.inner:
                self.callback(module.register_forward_pre_hook(self._takes(name)).remove)
                mlp = model.get_submodule(_parent(name))
                self.callback(mlp.register_forward_pre_hook(self._is_given(name), with_kwargs=True).remove)
            shapes = {tuple(parameter.shape) for parameter in module.parameters()}
            if len(shapes) == 1 and len(shapes.pop()) == 1 and not isinstance(module, nn.Linear):
                self.seen[name] = _Seen()
                self.callback(module.register_forward_hook(self._makes(name), with_kwargs=True).remove)

    def _reads(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for value in (*args, *kwargs.values()):
                if id(value) in self._made:
                    seen = self.seen[self._made[id(value)][0]]
                    seen.readers.add(name)
                    seen.odd = seen.odd or not isinstance(module, nn.Linear)

        return hook

    def _is_given(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_states, *others = (*args, *kwargs.values())
            self.inner[name].given = hidden_states[:1, :_PROBED]
            self.inner[name].odd |= bool(others)

        return hook

    def _takes(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen = self.inner[name]
            if len(args) == 1 and args[0].shape[:-1] == self.counted.shape:
                seen.count(args[0], self.counted)
            else:
                seen.odd = True

        return hook

    def _makes(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen = self.seen[name]
            features = len(next(module.parameters()))
            shape = (*self.counted.shape, features)
            if len(args) != 1 or kwargs or not isinstance(output, torch.Tensor) or output.shape != shape:
                seen.odd = True
                return
            self._made[id(output)] = (name, output)
            if len(self._made) > _KEPT:
                del self._made[next(iter(self._made))]
            seen.count(output, self.counted)

        return hook


def _folded_norm(model: Any, name: str, seen: _Seen, stored: Mapping[str, torch.dtype]) -> list[Fold]:
    """Fold a norm; return that, or nothing, with all as it was."""
    norm = model.get_submodule(name)
    own = dict(norm.named_parameters())
    like = next(iter(own.values()))
    probe = torch.randn(1, _PROBED, len(like), generator=torch.Generator().manual_seed(0)).to(like)
    raised = _raised(norm, probe)
    if raised is None or not {f"{name}.{one}" for one in own} <= stored.keys():
        return []
    in_files = [own[one].to(stored[f"{name}.{one}"]) for one in raised]
    fold = Fold(name, tuple(sorted(seen.readers)), _factors(seen.magnitudes, in_files), raised)
    return [fold] if _applied(model, fold, stored, lambda: norm(probe)) else []


def _folded_mlp(
    model: Any, name: str, makers: Sequence[str], seen: _Seen, stored: Mapping[str, torch.dtype]
) -> list[Fold]:
    """Fold the inputs of a module into what makes them; return that, or nothing, with all as it was."""
    own, mlp = model.get_submodule(name), model.get_submodule(_parent(name))

    def made() -> torch.Tensor:
        inputs: list[torch.Tensor] = []
        with own.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
            mlp(seen.given)
        return inputs[0]

    for maker in makers:
        fold = Fold(maker, (name,), _factors(seen.magnitudes, ()), inner=True)
        if _applied(model, fold, stored, made):
            return [fold]
    return []


def _applied(model: Any, fold: Fold, stored: Collection[str], made: Callable[[], torch.Tensor]) -> bool:
    """Fold; return False, with all as it was, where channels are even or what is made isn't divided exactly by that."""
    scalings = scalings_of(model, fold)
    if bool((fold.factors == fold.factors[0]).all()) or not scalings.keys() <= set(stored):
        return False
    before, exact, kept = made(), True, {}
    for name, scaling in scalings.items():
        parameter = model.get_parameter(name)
        kept[name] = parameter.clone()
        exact = exact and bool(scaling.kept(parameter).all())
        parameter.copy_(scaling.applied(parameter))
    if exact and torch.equal(made() * fold.factors.to(before), before):
        return True
    for name, values in kept.items():
        model.get_parameter(name).copy_(values)
    return False


def _raised(norm: nn.Module, probe: torch.Tensor) -> tuple[str, ...] | None:
    """Return which of a norm's parameters it adds 1 to; None: nothing makes its output zero.

    That is those that have to be -1, where the others are 0, for the output to be zero whatever the input.
    """
    own = dict(norm.named_parameters())
    kept = {name: parameter.clone() for name, parameter in own.items()}
    found = None
    for values in product((0.0, -1.0), repeat=len(own)):
        for parameter, value in zip(own.values(), values, strict=True):
            parameter.fill_(value)
        if not norm(probe).any():
            found = tuple(name for name, value in zip(own, values, strict=True) if value)
            break
    for name, parameter in own.items():
        parameter.copy_(kept[name])
    return found


def _factors(magnitudes: torch.Tensor | None, raised: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the channels' factors.

    Args:
        magnitudes: of the channels, [features], in no unit.
        raised: parameters to which the norm adds 1, as the files hold them, [features].
    """
    assert magnitudes is not None
    alike = (magnitudes / magnitudes.mean()).clamp(_SMALLEST, 1 / _SMALLEST)
    wanted = torch.log2(alike) * _EXPONENT
    if not raised:
        return torch.exp2(torch.round(wanted))
    exponents = torch.tensor(_EXPONENTS, dtype=torch.float32, device=wanted.device)
    by = torch.exp2(-exponents)[:, None]
    held = torch.stack([Scaling(by, offset=1.0).kept(tensor) for tensor in raised]).all(0)  # [exponents, features]
    best, least = torch.zeros_like(wanted), torch.inf
    for shift in sorted(_EXPONENTS, key=abs):
        away = (exponents[:, None] - wanted - shift).square().masked_fill(~held, torch.inf)
        nearest, chosen = away.min(0)
        if float(nearest.sum()) < least:
            best, least = exponents[chosen], float(nearest.sum())
    return torch.exp2(best)
