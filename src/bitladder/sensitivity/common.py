"""What both engines do alike: the score itself, image-token positions, and the amax of keys and values."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from bitladder.calibration import Batch
from bitladder.errors import EngineError
from bitladder.kv_cache import AmaxCache, cached_layers, layer_index
from bitladder.sensitivity import Amax
from bitladder.targets import Target

OUT_OF_MEMORY = "out of GPU memory while measuring; lower calibration.batch_size or calibration.sequence_length"
_LARGEST_PRODUCT = 1e10  # ModelOpt's own bound on gradient times error


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
    # Few passes over memory bound the time: the product in the tensors' own dtype (its rounding averages out over
    # the elements), then one reduction that squares in float32.
    product = torch.mul(gradient, difference).clamp_(-_LARGEST_PRODUCT, _LARGEST_PRODUCT)
    scores = torch.linalg.vector_norm(product, dim=-1, dtype=torch.float32).double().square_()
    total = scores.sum()
    if images is None:
        return torch.stack([total, torch.zeros_like(total)])
    if scores.shape != images.shape:
        raise EngineError(
            f"a module's output has shape {list(product.shape)}, [rows, tokens, features] was expected: "
            "image positions can't be told apart"
        )
    return torch.stack([total, scores[images].sum()])


def image_positions(batch: Batch, image_tokens: Sequence[int]) -> torch.Tensor | None:
    """Return the mask [rows, tokens] of image-token positions, or None where the batch has none."""
    ids = batch.inputs["input_ids"]
    mask = torch.isin(ids, torch.tensor(image_tokens, dtype=ids.dtype, device=ids.device))
    return mask if bool(mask.any()) else None


def kv_cache_amax(model: nn.Module, target: Target, cache: AmaxCache) -> Amax:
    """Return the amax of every layer's keys and values, or nothing where some layer's modules aren't searched."""
    layers = cached_layers(target.groups)
    amax: Amax = {}
    for layer in layers:
        seen = cache.amax.get(layer_index(model, layer.key.name))
        if seen is not None:
            amax.update(zip(layer.amax_names, (value.cpu() for value in seen), strict=True))
    return amax if len(amax) == 2 * len(layers) == 2 * len(cache.amax) else {}


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Leave cuDNN's attention out: it builds a plan for every new shape, and image+text batches each have their own."""
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
