"""What engines and rounding do alike: the score, image-token positions, amax of keys and values, decoder layers."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from bitladder.calibration import Batch
from bitladder.errors import EngineError
from bitladder.kv_cache import AmaxCache, cached_layers, layer_index
from bitladder.records import QuantGroup
from bitladder.sensitivity import Amax
from bitladder.targets import Target

OUT_OF_MEMORY = "out of GPU memory while measuring; lower calibration.batch_size or calibration.sequence_length"
LEAST_LOG = -87.0  # of a probability that counts: its exponential is just above the least normal number of float32
_LARGEST_PRODUCT = 1e10  # ModelOpt's own bound on gradient times error
_LAYER = re.compile(r"(.+?)\.(\d+)\.")  # path of the list of decoder layers, and the number in it


@dataclass(frozen=True)
class LayerCall:
    """What a decoder layer was called with; the hidden states are apart."""

    hidden: torch.Tensor  # [rows, tokens, hidden]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Self:
        """Return the call that a forward pre-hook of the layer saw."""
        hidden = args[0] if args else kwargs["hidden_states"]
        return cls(hidden, args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"})


class LayerRecorder(ExitStack):
    """Keeps what every decoder layer is called with, and what the last one gave; a context for one forward pass.

    calls: in the order of the layers. output: of the last layer that ran, [rows, tokens, hidden]. changed_before: the
    last layer whose input is not what the one before gave; 0: there is none.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.calls: list[LayerCall] = []
        self.output = torch.empty(0)
        self.changed_before = 0
        for layer in layers:
            self.callback(layer.register_forward_pre_hook(self._keep_call, with_kwargs=True).remove)
            self.callback(layer.register_forward_hook(self._keep_output).remove)

    def _keep_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = LayerCall.of(args, kwargs)
        if self.calls and call.hidden is not self.output:
            self.changed_before = len(self.calls)
        self.calls.append(call)

    def _keep_output(self, _: nn.Module, __: Any, output: Any) -> Any:
        self.output = hidden_of(output)


def layers_path(target: Target, remedy: str) -> str:
    """Return the path of the one list of decoder layers that holds all searched modules.

    Raises:
        EngineError: there are several, or none; the message ends with `remedy`.
    """
    paths = {found[1] for group in target.groups for m in group.modules if (found := _LAYER.match(m.name))}
    if len(paths) != 1:
        listed = ", ".join(sorted(paths)) or "none"
        raise EngineError(f"the searched modules lie in {len(paths)} lists of layers ({listed}); {remedy}")
    return paths.pop()


def layer_of(group: QuantGroup) -> int:
    """Return the number of the decoder layer that holds a group."""
    found = _LAYER.match(group.modules[0].name)
    assert found is not None
    return int(found[2])


def by_layer(groups: Iterable[QuantGroup]) -> dict[int, list[QuantGroup]]:
    """Return the groups of every decoder layer that has some, under the layer's number."""
    found: dict[int, list[QuantGroup]] = {}
    for group in groups:
        found.setdefault(layer_of(group), []).append(group)
    return found


def hidden_of(output: Any) -> torch.Tensor:
    """Return the hidden states [rows, tokens, hidden] that a decoder layer gave."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden


def gradient_score(gradient: torch.Tensor, difference: torch.Tensor, images: torch.Tensor | None) -> torch.Tensor:
    """Return ModelOpt's gradient score of one module's output, and what of it lies at image-token positions: [2].

    Args:
        gradient: of the loss by the module's output, [rows, tokens, features].
        difference: the quantised output less the original one, of the same shape.
        images: mask [rows, tokens] of image-token positions; None: there are none.

    Raises:
        EngineError: the output's shape is another, so that positions can't be told apart.

    Source: modelopt.torch.quantization.algorithms._get_auto_quantize_score.
    """
    return by_position(token_scores(gradient, difference), images)


def token_scores(gradient: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """Return what every token adds to a module's gradient score: [rows, tokens] in float64."""
    # Few passes over memory bound the time: the product in the tensors' own dtype (its rounding averages out over
    # the elements), then one reduction that squares in float32.
    product = torch.mul(gradient, difference).clamp_(-_LARGEST_PRODUCT, _LARGEST_PRODUCT)
    lengths: torch.Tensor = torch.linalg.vector_norm(product, dim=-1, dtype=torch.float32)
    return lengths.double().square_()


def token_directions(gradient: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """Return how the loss changes with every token's output, to first order: [rows, tokens] in float64."""
    return torch.mul(gradient, difference).sum(-1, dtype=torch.float32).double()


def by_position(scores: torch.Tensor, images: torch.Tensor | None) -> torch.Tensor:
    """Return the sum of the tokens' scores [rows, tokens], and that over image-token positions: [2].

    Raises:
        EngineError: the shape is another than that of `images`, so that positions can't be told apart.
    """
    total = scores.sum()
    if images is None:
        return torch.stack([total, torch.zeros_like(total)])
    if scores.shape != images.shape:
        raise EngineError(
            f"a module's output has positions {list(scores.shape)}, [rows, tokens] was expected: "
            "image positions can't be told apart"
        )
    return torch.stack([total, scores[images].sum()])


def image_positions(batch: Batch, image_tokens: Sequence[int]) -> torch.Tensor | None:
    """Return the mask [rows, tokens] of image-token positions, or None where the batch has none."""
    ids = batch.inputs["input_ids"]
    mask = torch.isin(ids, torch.tensor(image_tokens, dtype=ids.dtype, device=ids.device))
    return mask if bool(mask.any()) else None


def shared(amax: Amax, groups: Iterable[QuantGroup]) -> Amax:
    """Return the amax of each group's weights and inputs as its modules share them: the largest one."""
    found: Amax = {}
    for group in groups:
        for kind in ("weight_amax", "input_amax"):
            keys = [f"{module.name}.{kind}" for module in group.modules if f"{module.name}.{kind}" in amax]
            found |= dict.fromkeys(keys, torch.stack([amax[key] for key in keys]).amax()) if keys else {}
    return found


def kv_cache_amax(model: nn.Module, target: Target, cache: AmaxCache) -> Amax:
    """Return the amax of every layer's keys and values, or nothing where some layer's modules aren't searched."""
    layers, found = cached_layers(target.groups), cache.amax()
    amax: Amax = {}
    for layer in layers:
        seen = found.get(layer_index(model, layer.key.name))
        if seen is not None:
            amax.update(zip(layer.amax_names, seen, strict=True))
    return amax if len(amax) == 2 * len(layers) == 2 * len(found) else {}


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Leave cuDNN's attention out: it builds a plan for every new shape, and image+text batches each have their own."""
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let sums have a fixed order: flash attention's gradient otherwise adds up as it comes."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch insists; it matters for several streams only
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill
