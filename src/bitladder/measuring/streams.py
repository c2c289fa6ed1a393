"""The streams of a GPU beside the default one, for good."""

import functools
from typing import Any

import torch


@functools.cache
def gpu_streams(device: int) -> tuple[Any, Any]:
    """Return two streams of a GPU: of what comes before the first layer, and that captures graphs.

    A product of matrices works in memory that belongs to its stream, in a graph to the stream that captured it: the two
    must differ, and streams come from a pool that begins again after 32, of which each keeps its memory.
    """
    with torch.cuda.device(device):
        return torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]


@functools.cache
def lane_stream(device: int, lane: int) -> Any:
    """Return the stream of what is done side by side with other lanes."""
    with torch.cuda.device(device):
        return torch.cuda.Stream()  # type: ignore[no-untyped-call]
