"""For the child scripts: kernels on CPUs for layers for which vLLM registers none. Loaded by path, in vLLM's Python.

FP4 layers run by vLLM's own emulation, in values that are rounded as its GPU kernels round them; with 16-bit inputs the
weights are restored by its own function. MXFP8 and square blocks can be loaded. On other devices nothing changes.

Source: vllm 0.32.0, model_executor/kernels/linear/nvfp4/emulation.py, and __init__.py (init_nvfp4_linear_kernel).
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch

_BLOCK = 16
_ASKED = "init_nvfp4_linear_kernel"  # what the layers' classes ask for a kernel
# Where compressed-tensors checkpoints get their MXFP8 kernel from.
_CARRIED_MXFP8 = "vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_mxfp8"


@contextlib.contextmanager
def emulating() -> Iterator[None]:
    """Let layers that are made meanwhile have kernels that a CPU can run."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w4a4_nvfp4

    asking = [each for each in (modelopt, compressed_tensors_w4a4_nvfp4) if hasattr(each, _ASKED)]
    originals = [getattr(each, _ASKED) for each in asking]
    for each in asking:
        setattr(each, _ASKED, _kernel)
    try:
        yield
    finally:
        for each, original in zip(asking, originals, strict=True):
            setattr(each, _ASKED, original)


def _kernel(use_a16: bool = False) -> Any:
    from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearLayerConfig
    from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    class EmulationNvFp4W4A16LinearKernel(EmulationNvFp4LinearKernel):  # type: ignore[misc]
        """The same without rounding inputs."""

        def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            """Return the product with the weights that the codes restore."""
            weight: torch.Tensor = dequantize_to_dtype(
                layer.weight, layer.weight_scale, layer.weight_global_scale, x.dtype, _BLOCK, swizzle=False
            )
            return torch.nn.functional.linear(x, weight, bias)

    return (EmulationNvFp4W4A16LinearKernel if use_a16 else EmulationNvFp4LinearKernel)(NvFp4LinearLayerConfig())


@contextlib.contextmanager
def lending_blocks() -> Iterator[None]:
    """Let MXFP8 and square blocks load on CPUs, where vLLM has no kernel, or one for AMX alone; nothing elsewhere."""
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.platforms import current_platform

    original = getattr(modelopt, "init_mxfp8_linear_kernel", None)
    if original is None or not current_platform.is_cpu():
        yield
        return
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
    from vllm.model_executor.kernels.linear.mxfp8.Mxfp8LinearKernel import Mxfp8LinearLayerConfig
    from vllm.model_executor.kernels.linear.scaled_mm.pytorch import BlockWiseTorchFP8ScaledMMLinearKernel as Squares

    # vLLM's own for square blocks need AMX; whatever one does is the same until it multiplies, which loading doesn't
    able, known = Squares.is_supported, linear._POSSIBLE_FP8_BLOCK_KERNELS
    Squares.is_supported = classmethod(lambda *_: (True, None))
    linear._POSSIBLE_FP8_BLOCK_KERNELS = {
        platform: [*kernels, *([Squares] if platform == current_platform._enum else [])]
        for platform, kernels in known.items()
    }
    callers: list[Any] = [modelopt]
    with contextlib.suppress(ImportError):  # earlier releases read no such checkpoint
        callers.append(importlib.import_module(_CARRIED_MXFP8))
    for module in callers:
        module.init_mxfp8_linear_kernel = lambda weight_shape, **_: EmulationMxfp8LinearKernel(
            Mxfp8LinearLayerConfig(weight_shape=weight_shape)
        )
    try:
        yield
    finally:
        for module in callers:
            module.init_mxfp8_linear_kernel = original
        Squares.is_supported, linear._POSSIBLE_FP8_BLOCK_KERNELS = able, known
