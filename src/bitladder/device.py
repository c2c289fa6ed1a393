"""Where and in which dtype a model runs, and what makes its arithmetic repeat itself."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from bitladder.errors import MeasurementError
from bitladder.recipe import MeasureSpec, WorkersSpec


def resolve_device(device: str) -> str:
    """Return the device to run on; `auto` is a GPU where there is one.

    Raises:
        MeasurementError: a GPU was asked for that isn't there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise MeasurementError(f"device {device} was asked for, but torch sees no GPU; use device: cpu")
        count = torch.cuda.device_count()
        if (torch.device(device).index or 0) >= count:
            raise MeasurementError(f"device {device} was asked for, but torch sees {count} GPUs, from cuda:0 on")
    return device


def measuring_device(spec: MeasureSpec, workers: WorkersSpec) -> str:
    """Return the device that measuring runs on; a cluster's GPUs need not be in this machine.

    Raises:
        MeasurementError: as `resolve_device`.
    """
    elsewhere = workers.count and workers.address and spec.device == "cuda"
    return "cuda" if elsewhere else resolve_device(spec.device)


def capability(device: str) -> tuple[int, int] | None:
    """Return a GPU's compute capability; None: of a CPU.

    Raises:
        MeasurementError: the GPUs are those of a cluster, of which nothing is known here.
    """
    if not device.startswith("cuda"):
        return None
    if not torch.cuda.is_available():
        raise MeasurementError("the GPUs that measure aren't in this machine; say with serve_on which kind will serve")
    return torch.cuda.get_device_capability(device)


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """Return the arithmetic to score in: float32 on a CPU, bfloat16 on a GPU, unless the recipe says otherwise."""
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


OUT_OF_MEMORY = "out of GPU memory while measuring; lower calibration.batch_size or calibration.sequence_length"


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
def tf32_products() -> Iterator[None]:
    """Multiply float32 matrices on a GPU by their first 11 bits, in float32 sums: several times as fast."""
    products: Any = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


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
