"""Sizes of channels moved from a norm into the weights that read it: `fold_norms(...) -> tuple[Fold, ...]`.

With four bits for an input, a channel that is much larger than the others of its block leaves these few values. With S
diagonal, W norm(x) = (W S) (norm(x) / S): the norm's own parameters are divided by S, the weights' columns multiplied
with it, and no runtime sees a difference. A channel's factor is the square root of its mean magnitude over calibration
tokens, halfway between even inputs and even weights.

Factors are powers of two, so that nothing is rounded: every product is what it was, in any floating-point arithmetic,
and so are the model's logits, to the bit. That is tried, too: a model whose logits change has something else that reads
a norm, or none that is linear in its parameters.

Source: SmoothQuant (Xiao et al., 2022, arXiv:2211.10438), equation 4 with alpha 0.5, with means as in AWQ (Lin et al.,
2023, arXiv:2306.00978).
"""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bitladder.data.batches import Batch
from bitladder.errors import EngineError
from bitladder.runinfo import Progress

_EXPONENT = 0.5  # of a channel's mean magnitude in its factor
_SMALLEST = 2.0**-8  # a mean magnitude, over that of all channels, below which it isn't told apart
_KEPT = 8  # outputs of norms, the last ones: they are read soon
_PROBED = 4  # rows of random numbers on which a norm is tried


@dataclass(frozen=True, eq=False)
class Fold:
    """One norm, the linear modules that read it, and each channel's factor, powers of two, float32 [features]."""

    norm: str
    readers: tuple[str, ...]
    factors: torch.Tensor


@dataclass
class _Seen:
    """What the passes showed of a module that may be a norm."""

    readers: set[str] = field(default_factory=set)
    magnitudes: torch.Tensor | None = None  # summed over tokens, each at unit length, [features]
    odd: bool = False  # it is called or read in a way that isn't understood


def fold_norms(
    model: Any, batches: Sequence[Batch], searched: Collection[str], stored: Collection[str], progress: Progress
) -> tuple[Fold, ...]:
    """Fold the norms of a loaded model, in place, and return what was done.

    A norm is folded where its channels are uneven, linear modules alone read it, one of which is searched, and it is
    linear in its parameters.

    Args:
        model: loaded; changed.
        batches: calibration batches, on the model's device.
        searched: names of linear modules.
        stored: names of parameters that lie in the model's files as they are.
        progress: told of every batch.

    Raises:
        EngineError: no norm can be folded, or the logits of the first batch change.
    """
    with torch.no_grad():
        before = model(**batches[0].inputs).logits
        with _Watch(model) as watch:
            for number, batch in enumerate(batches):
                progress("fold", number, len(batches))
                watch.counted = batch.inputs["attention_mask"].bool()
                model(**batch.inputs)
        progress("fold", len(batches), len(batches))
        folds = [
            Fold(name, tuple(sorted(seen.readers)), _factors(seen.magnitudes))
            for name, seen in watch.seen.items()
            if seen.magnitudes is not None and seen.magnitudes.any() and not seen.odd and seen.readers & set(searched)
        ]
        folds = [fold for fold in folds if parameters_of(model, fold).keys() <= set(stored) and _applied(model, fold)]
        if not folds:
            raise EngineError(
                "no norm of this model can be folded: none has uneven channels, is read by linear modules alone, "
                "searched ones among them, and is linear in its parameters; measure the model as it is"
            )
        if not torch.equal(model(**batches[0].inputs).logits, before):
            raise EngineError(
                "folding changes this model's logits, so something else reads a norm or a weight that was folded; "
                "measure the model as it is"
            )
    return tuple(folds)


def parameters_of(model: Any, fold: Fold) -> dict[str, torch.Tensor]:
    """Return what each parameter is multiplied with along its last dimension, `{name: [features] float32}`."""
    own = (f"{fold.norm}.{name}" for name, _ in model.get_submodule(fold.norm).named_parameters())
    weights = (f"{name}.weight" for name in fold.readers)
    return dict.fromkeys(own, 1 / fold.factors) | dict.fromkeys(weights, fold.factors)


class _Watch(ExitStack):
    """Hooks on every module that has no module in it; a context for passes.

    seen: by name, of each module that has vectors alone for parameters, as norms have.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.seen: dict[str, _Seen] = {}
        self.counted = torch.empty(0)  # mask [rows, tokens] of the batch at hand: all but padding
        self._made: dict[int, tuple[str, torch.Tensor]] = {}  # id of an output -> the norm, and the output itself
        self.callback(model.register_forward_hook(lambda *_: self._made.clear()).remove)
        for name, module in model.named_modules():
            if next(module.children(), None) is not None:
                continue
            self.callback(module.register_forward_pre_hook(self._reads(name), with_kwargs=True).remove)
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
            tokens = nn.functional.normalize(output[self.counted].float(), dim=-1).abs().sum(0)
            seen.magnitudes = tokens if seen.magnitudes is None else seen.magnitudes + tokens

        return hook


def _factors(magnitudes: torch.Tensor) -> torch.Tensor:
    """Return the channels' factors from their magnitudes, [features], in no unit."""
    alike = (magnitudes / magnitudes.mean()).clamp(_SMALLEST, 1 / _SMALLEST)
    return torch.exp2(torch.round(torch.log2(alike) * _EXPONENT))


def _applied(model: Any, fold: Fold) -> bool:
    """Fold a norm; return False, with all as it was, where it is even or its output isn't divided exactly by that."""
    if bool((fold.factors == fold.factors[0]).all()):
        return False
    norm = model.get_submodule(fold.norm)
    like = next(norm.parameters())
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, _PROBED, len(fold.factors), generator=generator).to(like)
    before, exact = norm(probe), True
    kept = {}
    for name, factors in parameters_of(model, fold).items():
        parameter = model.get_parameter(name)
        kept[name] = parameter.clone()
        by = factors.to(parameter)
        parameter.mul_(by)
        exact = exact and torch.equal(parameter / by, kept[name])
    exact = exact and torch.equal(norm(probe) * fold.factors.to(like), before)
    if not exact:
        for name, values in kept.items():
            model.get_parameter(name).copy_(values)
    return exact
