"""For the child scripts: kernels on CPUs for layers for which vLLM registers none. Loaded by path, in vLLM's Python.

FP4 layers run by vLLM's own emulation, in values that are rounded as its GPU kernels round them; with 16-bit inputs the
weights are restored by its own function. Packed integers run without AVX-512. MXFP8 and square blocks can be loaded.
FP8 weights can be quantised anew, which vLLM does while loading. On other devices nothing changes.

vLLM is told that there is no AMX: its kernels for it (0.32.0) stop at FP8 layers with a bias, and where a machine has
AMX that a sandbox doesn't grant, those for packed integers end the process. So CPUs do alike. FP8 products aren't left
to oneDNN, which torch (2.13) asks where a CPU has AMX: unless that has FP8, it multiplies number by number.

Source: vllm 0.32.0, model_executor/kernels/linear/nvfp4/emulation.py, and __init__.py (init_nvfp4_linear_kernel).
"""

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch

_BLOCK = 16
_ASKED, _ASKED_MX = "init_nvfp4_linear_kernel", "init_mxfp8_linear_kernel"  # what layers' classes ask for a kernel
_MIDDLE = 8  # a four-bit code c without zero points stands for c - 8 (vllm/scalar_type.py, uint4b8)
torch.cpu._is_amx_tile_supported = lambda: False  # what vLLM asks, everywhere
_scaled_mm = torch._scaled_mm
# Where compressed-tensors checkpoints get their MXFP8 kernel from.
_CARRIED_MXFP8 = "vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_mxfp8"


@contextlib.contextmanager
def emulating() -> Iterator[None]:
    """Let layers that are made meanwhile have kernels that a CPU can run."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return
    torch._scaled_mm = _without_onednn  # for good: layers multiply after they were made
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w4a4_nvfp4

    asking = [each for each in (modelopt, compressed_tensors_w4a4_nvfp4) if hasattr(each, _ASKED)]
    with _in_place(asking, _ASKED, _kernel), _restoring_integers():
        yield


@contextlib.contextmanager
def _in_place(owners: Iterable[Any], name: str, other: Any) -> Iterator[None]:
    """Let modules or classes have something else under a name for a while."""
    with contextlib.ExitStack() as stack:
        for owner in owners:
            stack.enter_context(mock.patch.object(owner, name, other))
        yield


def _without_onednn(*given: Any, **named: Any) -> torch.Tensor:
    """Return the product of FP8 matrices as torch multiplies them on a CPU without AMX."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return _scaled_mm(*given, **named)
    finally:
        torch._C._set_mkldnn_enabled(before)


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
def _restoring_integers() -> Iterator[None]:
    """Let CPUs without AVX-512 run packed integers: vLLM chooses a kernel there whose operation that build lacks.

    Weights are restored in 16 bits once, as its kernel restores them for each product.

    Source: vllm 0.32.0, model_executor/kernels/linear/mixed_precision/cpu.py, platforms/cpu.py (import_kernels).
    """
    import vllm._custom_ops  # noqa: F401  (loads the operations of this CPU)

    try:
        from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
        from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
            compressed_tensors_wNa16 as asking,
        )
    except ImportError:  # earlier releases have other kernels
        yield
        return
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        yield
        return
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32 as unpack

    class EmulationWNA16LinearKernel(CPUWNA16LinearKernel):  # type: ignore[misc]
        """The same with weights that are restored when they are loaded."""

        def process_weights_after_loading(self, layer: Any) -> None:
            """Restore the weights, [out_features, in_features], from codes [out_features, in_features / 8]."""
            kind = self.config.weight_type
            codes = unpack(layer.weight_packed, kind, 1)
            columns, zeros = codes.shape[1] // layer.weight_scale.shape[1], torch.tensor([[_MIDDLE]])
            if self.config.zero_points:  # [out_features / 8, groups]
                zeros = unpack(layer.weight_zero_point, kind, 0).repeat_interleave(columns, 1)
            scales = layer.weight_scale.repeat_interleave(columns, 1)
            layer.restored = (codes - zeros).to(scales.dtype) * scales

        def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            """Return the product with them."""
            return torch.nn.functional.linear(x, layer.restored, bias)

    original = asking.choose_mp_linear_kernel

    def choose(config: Any, *others: Any, **named: Any) -> Any:
        chosen = original(config, *others, **named)
        return EmulationWNA16LinearKernel if chosen is CPUWNA16LinearKernel else chosen

    with _in_place([asking], "choose_mp_linear_kernel", choose):
        yield


@contextlib.contextmanager
def lending_blocks() -> Iterator[None]:
    """Let MXFP8 and square blocks load on CPUs, where vLLM has no kernel, or one for AMX alone; nothing elsewhere."""
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.platforms import current_platform

    if not hasattr(modelopt, _ASKED_MX) or not current_platform.is_cpu():
        yield
        return
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
    from vllm.model_executor.kernels.linear.mxfp8.Mxfp8LinearKernel import Mxfp8LinearLayerConfig
    from vllm.model_executor.kernels.linear.scaled_mm.pytorch import BlockWiseTorchFP8ScaledMMLinearKernel as Squares

    # vLLM's own for square blocks need AMX; whatever one does is the same until it multiplies, which loading doesn't
    kernels = {
        platform: [*known, *([Squares] if platform == current_platform._enum else [])]
        for platform, known in linear._POSSIBLE_FP8_BLOCK_KERNELS.items()
    }
    callers: list[Any] = [modelopt]
    with contextlib.suppress(ImportError):  # earlier releases read no such checkpoint
        callers.append(importlib.import_module(_CARRIED_MXFP8))

    def lent(weight_shape: Any, **_: Any) -> Any:
        return EmulationMxfp8LinearKernel(Mxfp8LinearLayerConfig(weight_shape=weight_shape))

    with (
        _in_place(callers, _ASKED_MX, lent),
        _in_place([Squares], "is_supported", classmethod(lambda *_: (True, None))),
        _in_place([linear], "_POSSIBLE_FP8_BLOCK_KERNELS", kernels),
    ):
        yield


@contextlib.contextmanager
def quantising(done: Callable[[torch.Tensor], None] = lambda _: None) -> Iterator[None]:
    """Let vLLM quantise FP8 weights anew on CPUs, whose build lacks the operation (`static_scaled_fp8_quant`).

    Args:
        done: is given each weight that is quantised anew, on any device.
    """
    import vllm._custom_ops as operations
    from vllm.platforms import current_platform

    original = operations.scaled_fp8_quant

    def quantise(tensor: torch.Tensor, scale: torch.Tensor | None = None, **options: Any) -> Any:
        done(tensor)
        if scale is None or not current_platform.is_cpu():
            return original(tensor, scale, **options)
        largest = torch.finfo(torch.float8_e4m3fn).max
        return (tensor.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn), scale

    with _in_place([operations], "scaled_fp8_quant", quantise):
        yield


@contextlib.contextmanager
def keeping_scales() -> Iterator[None]:
    """Let CPUs serve FP8 layers of compressed-tensors' layout, which vLLM quantises anew even to the same scale.

    Where the modules of a fused layer have different scales it stops as before: what runs isn't what is stored then.

    Source: vllm 0.32.0, quantization/utils/fp8_utils.py (process_fp8_weight_tensor_strategy), utils/w8a8_utils.py.
    """
    from vllm.model_executor.layers.quantization.utils import w8a8_utils
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return
    original = w8a8_utils.requantize_with_max_scale

    def requantise(weight: torch.Tensor, weight_scale: torch.Tensor, logical_widths: list[int]) -> Any:
        same = bool((weight_scale == weight_scale.max()).all())
        with quantising() if same else contextlib.nullcontext():
            return original(weight, weight_scale, logical_widths)

    with _in_place([w8a8_utils], "requantize_with_max_scale", requantise):
        yield
