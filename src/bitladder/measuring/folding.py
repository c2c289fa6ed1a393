"""Sizes of channels moved from a norm into the weights that read it: `fold_norms(...) -> tuple[Fold, ...]`.

With four bits for an input, a channel that is much larger than the others of its block leaves these few values. With S
diagonal, W norm(x) = (W S) (norm(x) / S): the norm's own parameters are divided by S, the weights' columns multiplied
with it, and no runtime sees a difference. A channel's factor is the square root of its mean magnitude over calibration
tokens, halfway between even inputs and even weights.

Factors are powers of two, so that nothing is rounded: every product is what it was, in any floating-point arithmetic,
and so are the model's logits, to the bit. That is tried, too: a model whose logits change has something else that reads
a norm, or none that is linear in its parameters.

Norms of some families (Gemma, Qwen3-Next, Qwen3.5) multiply with 1 + w. There w becomes (1 + w) / 2^k - 1, which w's
dtype holds for some k alone: BF16 for every k from 0 to log2(1 + 2 w) where w is positive, since 1 + w - 2^k is a
multiple of w's last bit and no larger than w. A k has to do in the dtype of the files, in BF16 and in that of the model
at hand, so that whatever loads the files computes what it did. All channels of a norm may be divided by one more
factor, which changes no block; so that one is taken with which the channels come nearest to what they should have.

Source: SmoothQuant (Xiao et al., 2022, arXiv:2211.10438), equation 4 with alpha 0.5, with means as in AWQ (Lin et al.,
2023, arXiv:2306.00978).
"""

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
_PROBED = 4  # rows of random numbers on which a norm is tried


Stored = Mapping[str, Callable[[], torch.Tensor]]  # name of a parameter -> what reads it from the files


@dataclass(frozen=True, eq=False)
class Fold:
    """One norm and what is moved out of it.

    Attributes:
        norm: its name.
        readers: the linear modules that read it.
        factors: of each channel, powers of two, float32 [features].
        raised: the norm's own parameters to which it adds 1.
    """

    norm: str
    readers: tuple[str, ...]
    factors: torch.Tensor
    raised: tuple[str, ...] = ()


@dataclass
class _Seen:
    """What the passes showed of a module that may be a norm."""

    readers: set[str] = field(default_factory=set)
    magnitudes: torch.Tensor | None = None  # summed over tokens, each at unit length, [features]
    odd: bool = False  # it is called or read in a way that isn't understood


def fold_norms(
    model: Any,
    batches: Sequence[Batch],
    searched: Collection[str],
    stored: Stored,
    progress: Progress,
) -> tuple[Fold, ...]:
    """Fold the norms of a loaded model, in place, and return what was done.

    A norm is folded where its channels are uneven, linear modules alone read it, one of which is searched, and it is
    linear in its parameters or in these and one.

    Args:
        model: loaded; changed.
        batches: calibration batches, on the model's device.
        searched: names of linear modules.
        stored: gives each parameter that lies in the model's files as it is, as it lies there.
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
            fold
            for name, seen in watch.seen.items()
            if seen.magnitudes is not None and seen.magnitudes.any() and not seen.odd and seen.readers & set(searched)
            if (fold := _folded(model, name, tuple(sorted(seen.readers)), seen.magnitudes, stored)) is not None
        ]
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


def parameters_of(model: Any, fold: Fold) -> dict[str, Scaling]:
    """Return how each parameter that a fold changes is scaled."""
    own = {
        f"{fold.norm}.{name}": Scaling(1 / fold.factors, float(name in fold.raised))
        for name, _ in model.get_submodule(fold.norm).named_parameters()
    }
    return own | {f"{name}.weight": Scaling(fold.factors) for name in fold.readers}


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


def _folded(model: Any, name: str, readers: tuple[str, ...], magnitudes: torch.Tensor, stored: Stored) -> Fold | None:
    """Fold a norm; return None, with all as it was, where it is even, or isn't divided exactly by that."""
    norm = model.get_submodule(name)
    own = dict(norm.named_parameters())
    like = next(iter(own.values()))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, _PROBED, len(like), generator=generator).to(like)
    raised = _raised(norm, probe)
    changed = {f"{name}.{one}" for one in own} | {f"{one}.weight" for one in readers}
    if raised is None or not changed <= stored.keys():
        return None
    in_files = [stored[f"{name}.{one}"]().to(like.device) for one in raised]
    fold = Fold(name, readers, _factors(magnitudes, in_files, like.dtype), raised)
    scalings = parameters_of(model, fold)
    if bool((fold.factors == fold.factors[0]).all()):
        return None
    if not all(bool(scaling.kept(stored[changing]()).all()) for changing, scaling in scalings.items()):
        return None
    kept = {changing: model.get_parameter(changing).clone() for changing in scalings}
    before = norm(probe)
    for changing, scaling in scalings.items():
        model.get_parameter(changing).copy_(scaling.applied(kept[changing]))
    if torch.equal(norm(probe) * fold.factors.to(like), before):
        return fold
    for changing, values in kept.items():
        model.get_parameter(changing).copy_(values)
    return None


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


def _factors(magnitudes: torch.Tensor, raised: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the channels' factors.

    Args:
        magnitudes: of the channels, [features], in no unit.
        raised: parameters to which the norm adds 1, as the files hold them, [features].
        dtype: of the model at hand.
    """
    alike = (magnitudes / magnitudes.mean()).clamp(_SMALLEST, 1 / _SMALLEST)
    wanted = torch.log2(alike) * _EXPONENT
    if not raised:
        return torch.exp2(torch.round(wanted))
    exponents = torch.tensor(_EXPONENTS, dtype=torch.float32, device=wanted.device)
    by = torch.exp2(-exponents)[:, None]
    loaded = (None, torch.bfloat16, dtype)
    held = torch.stack([Scaling(by, offset=1.0).kept(one, as_) for one in raised for as_ in loaded]).all(0)
    best, least = torch.zeros_like(wanted), torch.inf
    for shift in sorted(_EXPONENTS, key=abs):
        away = (exponents[:, None] - wanted - shift).square().masked_fill(~held, torch.inf)
        nearest, chosen = away.min(0)
        if float(nearest.sum()) < least:
            best, least = exponents[chosen], float(nearest.sum())
    return torch.exp2(best)
