"""For the child scripts: FP4 layers on CPUs, for which vLLM registers no kernel. Loaded by its path, in vLLM's Python.

The layers run by vLLM's own emulation, in values that are rounded as its GPU kernels round them; with 16-bit inputs the
weights are restored by its own function. On other devices nothing changes.

Source: vllm 0.32.0, model_executor/kernels/linear/nvfp4/emulation.py, and __init__.py (init_nvfp4_linear_kernel).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_BLOCK = 16


@contextlib.contextmanager
def emulating() -> Iterator[None]:
    """Let layers that are made meanwhile have kernels that a CPU can run."""
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.platforms import current_platform

    original = getattr(modelopt, "init_nvfp4_linear_kernel", None)
    if original is None or not current_platform.is_cpu():
        yield
        return
    modelopt.init_nvfp4_linear_kernel = _kernel
    try:
        yield
    finally:
        modelopt.init_nvfp4_linear_kernel = original


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
