"""From gradients and errors to scores, by token and by position."""

from collections.abc import Sequence

import torch

from bitladder.data.batches import Batch
from bitladder.errors import EngineError

LEAST_LOG = -87.0  # of a probability that counts: its exponential is just above the least normal number of float32
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
    return by_position(token_scores(gradient, difference), images)


def token_scores(gradient: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """Return what every token adds to a module's gradient score: [rows, tokens] in float64."""
    # Few passes over memory bound the time: the product in the tensors' own dtype (its rounding averages out over
    # the elements), then one reduction that squares in float32.
    product = torch.mul(gradient, difference).clamp_(-_LARGEST_PRODUCT, _LARGEST_PRODUCT)
    return token_lengths(product)


def token_directions(gradient: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """Return how the loss changes with every token's output, to first order: [rows, tokens] in float64."""
    return torch.mul(gradient, difference).sum(-1, dtype=torch.float32).double()


def token_lengths(gradient: torch.Tensor) -> torch.Tensor:
    """Return every token's squared length of a gradient [rows, tokens, features]: [rows, tokens] in float64."""
    lengths: torch.Tensor = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32)
    return lengths.double().square_()


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
