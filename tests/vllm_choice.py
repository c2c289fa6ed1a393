"""In vLLM's Python: which kernel its own code chooses for each format, `python vllm_choice.py CAPABILITY...`, as JSON.

vLLM is imported for the CPU; then its platform is made to answer as a CUDA GPU of that compute capability would, with
what the CUDA wheel brings: FlashInfer, DeepGEMM, Humming. What csrc answers is stated here, the rest is vLLM's code.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
import vllm._custom_ops as operations
import vllm.model_executor.kernels.linear as linear
import vllm.model_executor.layers.quantization.utils.quant_utils as keys
import vllm.utils.deep_gemm as deep_gemm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear.scaled_mm import cutlass
from vllm.model_executor.layers.quantization import modelopt
from vllm.model_executor.layers.quantization.compressed_tensors import schemes
from vllm.model_executor.layers.quantization.utils import w8a8_utils
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.scalar_type import scalar_types
from vllm.utils import flashinfer

KERNELS = Path(__file__).parents[1] / "src" / "bitladder" / "runtimes" / "vllm" / "child_kernels.py"
SHAPE = (1024, 1024)
# csrc/quantization/w8a8/cutlass/scaled_mm_entry.cu, csrc/quantization/fp4/nvfp4_scaled_mm_entry.cu
CSRC = {
    "cutlass_scaled_mm_supports_fp8": lambda capability: capability >= 89,
    "cutlass_scaled_mm_supports_block_fp8": lambda capability: capability >= 90,
    "cutlass_scaled_mm_supports_fp4": lambda capability: capability >= 100,
}
ABSTRACT = ("CompressedTensorsScheme", "QuantizationConfig")
ONLY_ON_HOPPER = "has_flashinfer_fp8_blockscale_gemm"  # asks for 9.0


def pretend(capability: int) -> None:
    """Have vLLM's platform be a CUDA GPU of this compute capability."""
    sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")
    sys.modules["vllm._C_stable_libtorch"].__spec__ = importlib.machinery.ModuleSpec("vllm._C_stable_libtorch", None)
    from vllm.platforms import cuda

    class Pretended(cuda.NonNvmlCudaPlatform):  # type: ignore[misc]
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*divmod(capability, 10))

    current_platform.__class__ = Pretended
    cutlass.CUTLASS_BLOCK_FP8_SUPPORTED = CSRC["cutlass_scaled_mm_supports_block_fp8"](capability)
    brought: dict[str, Any] = {
        **CSRC,
        **{name: lambda *_: True for name in dir(flashinfer) if name.startswith("has_flashinfer")},
        ONLY_ON_HOPPER: lambda: capability == 90,
        "has_humming": lambda: True,
        "has_deep_gemm": lambda: True,
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm."):
            for one in brought.keys() & vars(module).keys():
                setattr(module, one, brought[one])
    deep_gemm._fp8_gemm_nt_impl, deep_gemm._lazy_init = object(), lambda: None


def scaled(possible: Any, weight: Any, inputs: Any) -> str:
    """Return the kernel of an FP8 format."""
    config = linear.FP8ScaledMMLinearLayerConfig(
        weight_quant_key=weight,
        activation_quant_key=inputs,
        input_dtype=torch.bfloat16,
        out_dtype=torch.bfloat16,
        weight_shape=SHAPE,
    )
    return linear.choose_scaled_mm_linear_kernel(config, possible, quantization="any").__name__


def int8() -> str:
    """Return the kernel of int8, per channel and dynamic per token."""
    config = linear.Int8ScaledMMLinearLayerConfig(
        is_channelwise=True, is_static_input_scheme=False, input_symmetric=True
    )
    return linear.choose_scaled_mm_linear_kernel(config, linear._POSSIBLE_INT8_KERNELS, quantization="any").__name__


def packed(kind: Any, group_size: int, *, zero_points: bool = False) -> str:
    """Return the kernel of packed integers with 16-bit inputs."""
    config = linear.MPLinearLayerConfig(
        full_weight_shape=SHAPE,
        partition_weight_shape=SHAPE,
        weight_type=kind,
        act_type=torch.bfloat16,
        group_size=group_size,
        zero_points=zero_points,
    )
    return linear.choose_mp_linear_kernel(config).__name__


def choice() -> dict[str, str | None]:
    """Return the kernel of each format; None: there is none."""
    fp8, block = linear._POSSIBLE_FP8_KERNELS, linear._POSSIBLE_FP8_BLOCK_KERNELS
    asked = {
        "fp8": lambda: scaled(fp8, keys.kFp8StaticTensorSym, keys.kFp8StaticTensorSym),
        "fp8_pc_pt": lambda: scaled(fp8, keys.kFp8StaticTokenSym, keys.kFp8DynamicTokenSym),
        "fp8_block": lambda: scaled(block, keys.kFp8Static128BlockSym, keys.kFp8Dynamic128Sym),
        "carried fp8": lambda: scaled(
            linear._POSSIBLE_WFP8A16_KERNELS, keys.kFp8StaticTensorSym, keys.kFp8StaticTensorSym
        ),
        "mxfp8": lambda: type(linear.init_mxfp8_linear_kernel(weight_shape=SHAPE)).__name__,
        "nvfp4": lambda: type(linear.init_nvfp4_linear_kernel()).__name__,
        "nvfp4_w4a16": lambda: type(linear.init_nvfp4_linear_kernel(use_a16=True)).__name__,
        "int8": int8,
        "int4_w4a16": lambda: packed(scalar_types.uint4b8, 128),
        "int4_w4a16_g64": lambda: packed(scalar_types.uint4b8, 64),
        "int4_w4a16_asym": lambda: packed(scalar_types.uint4, 128, zero_points=True),
        "int4_w4a16_asym_g64": lambda: packed(scalar_types.uint4, 64, zero_points=True),
        "int8_w8a16": lambda: packed(scalar_types.uint8b128, 128),
        "int8_w8a16_g64": lambda: packed(scalar_types.uint8b128, 64),
    }
    for kernels in linear._POSSIBLE_NVFP4_KERNELS.values():  # which is chosen is asked, not that it is made
        for kernel in kernels:
            kernel.__init__ = lambda self, *_: None
    found: dict[str, str | None] = {}
    for name, ask in asked.items():
        try:
            found[name] = ask()
        except ValueError:  # vLLM: Failed to find a kernel, or a forced one isn't supported
            found[name] = None
    return {**found, "powers of two": deep_gemm.is_deep_gemm_e8m0_used()}


def least() -> dict[str, int]:
    """Return the least compute capability of every class that takes a checkpoint or a layer of it."""
    classes = [one for one in {**vars(modelopt), **vars(schemes)}.values() if isinstance(one, type)]
    return {
        one.__name__: one.get_min_capability()
        for one in classes
        if "get_min_capability" in vars(one) and one.__name__ not in ABSTRACT
    }


def child_kernels() -> Any:
    """Return the child scripts' module, loaded as they load it."""
    spec: Any = importlib.util.spec_from_file_location("child_kernels", KERNELS)
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    return kernels


def with_amx() -> dict[str, dict[str, str | None]]:
    """Return the choice on a CPU whose AMX has no FP8: vLLM's, without the kernel that stops, in the child scripts."""
    torch.cpu._is_amx_tile_supported = lambda: True
    operations._supports_cpu_fp8_w8a16, operations.cpu_has_amx_fp8 = True, lambda: False
    found = {"alone": choice()}
    os.environ["VLLM_DISABLED_KERNELS"] = "CPUFp8PerTensorScaledMMLinearKernel"
    found["disabled"] = choice()
    del os.environ["VLLM_DISABLED_KERNELS"]
    child_kernels()
    return {**found, "probed": choice()}


def requantised() -> dict[str, bool | None]:
    """Return whether FP8 codes stay as they are where vLLM quantises a fused layer anew on a CPU; None: it stops."""
    kernels = child_kernels()
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()].reshape(2, -1)
    found: dict[str, bool | None] = {}
    for name, scales in {"equal": (0.003, 0.003), "unequal": (0.003, 0.004)}.items():
        with kernels.keeping_scales():
            try:
                _, left = w8a8_utils.requantize_with_max_scale(codes.clone(), torch.tensor(scales), [1, 1])
                found[name] = torch.equal(left.float(), codes.float())
            except RuntimeError:
                found[name] = None
    return found


def main() -> None:
    """Print the choice on this CPU, and on each pretended GPU, a process each: vLLM remembers what it was told."""
    config = VllmConfig()
    text = types.SimpleNamespace(model_type="llama")
    config.model_config = types.SimpleNamespace(dtype=torch.bfloat16, hf_text_config=text)
    with set_current_vllm_config(config):
        for capability in map(int, sys.argv[1:]):
            if os.fork() == 0:
                pretend(capability)
                print(json.dumps({str(capability): choice()}), flush=True)
                os._exit(0)
            os.wait()
        if os.fork() == 0:
            print(json.dumps({"amx": with_amx()}), flush=True)
            os._exit(0)
        os.wait()
        print(json.dumps({"cpu": choice(), "least": least(), "requantised": requantised()}))


if __name__ == "__main__":
    main()
