"""Which kernel vLLM multiplies a format with on each generation of devices, and in which arithmetic.

Read in vLLM's own choice: `tests/vllm_choice.py` runs it for a pretended GPU of each compute capability, with all that
the CUDA wheel brings (FlashInfer, DeepGEMM, Humming) and without the extra `b12x`, for BF16 and widths that are
multiples of 128; `tests/test_kernels.py` holds this table to what it answers. `docs/runtimes.md` shows it.

Source: vllm 0.32.0 and 0.25.1, model_executor/kernels/linear/__init__.py (choose_scaled_mm_linear_kernel,
choose_mp_linear_kernel, init_nvfp4_linear_kernel, init_mxfp8_linear_kernel); of CUTLASS' abilities csrc
(cutlass_scaled_mm_supports_fp8 from 8.9, _block_fp8 from 9.0, _fp4 from 10.0).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from bitladder.formats.base import AS_STORED, POWERS_OF_TWO, WEIGHT_ONLY, Arithmetic


@dataclass(frozen=True)
class Cell:
    """What vLLM makes of a format on a generation.

    Attributes:
        kernel: its class without `LinearKernel`, `ScaledMMLinearKernel` or `Kernel` at the end; None: there is none.
        arithmetic: how that multiplies; None: it doesn't run, or wasn't read.
        note: why, or when.
        seen: what showed it; None: it was read, and not run here.
    """

    kernel: str | None
    arithmetic: Arithmetic | None = AS_STORED
    note: str | None = None
    seen: str | None = None


@dataclass(frozen=True)
class Row:
    """A format on each generation, by the names of `bitladder.formats.targets`; `source`: what else was read."""

    cells: Mapping[str, Cell]
    source: str


_GPUS: Final = ("ampere", "ada", "hopper", "blackwell", "blackwell_rtx")
_CPUS: Final = ("cpu", "cpu_amx")
_TESTS, _H100 = "tests/test_serve_mixes.py", "benchmarks/results/serving_full_size.json"
_MIXES = "benchmarks/results/served_mixes.json"
_UNREAD = Cell(None, None, "not checked")
_NO_KERNEL = Cell(None, None, "no kernel")
_LENT = "no kernel; `probe` lends vLLM's emulation, as stored"
_EMULATED = (Cell(None, None, _LENT, _TESTS), Cell(None, None, _LENT))
_MARLIN, _MARLIN4, _MARLIN_MX = (
    Cell("MarlinFP8", WEIGHT_ONLY),
    Cell("MarlinNvFp4", WEIGHT_ONLY),
    Cell("MarlinMxfp8", WEIGHT_ONLY),
)
_CUTLASS, _FLASHINFER = Cell("CutlassFP8"), Cell("FlashInferFP8")
_IN_A_MIX = Cell("MarlinFP8", WEIGHT_ONLY, "in a mix; alone refused below 8.9")
_SWITCH = "unless `VLLM_USE_DEEP_GEMM_E8M0=0`"
_DEEPGEMM = Cell("DeepGemmFp8BlockScaledMM", POWERS_OF_TWO, _SWITCH)
_DEEPGEMM_90 = Cell("FlashInferFp8DeepGEMMDynamicBlockScaled", POWERS_OF_TWO, _SWITCH)
_INT8 = Cell("CutlassInt8")
# csrc/quantization/w8a8/cutlass/c3x/scaled_mm_helper.hpp: "Int8 not supported on SM120 … run on older arch (SM < 100)"
_NO_INT8 = Cell("CutlassInt8", None, "loads, and stops at the first product")
_PACKED, _PACKED_90 = Cell("Marlin"), Cell("Machete")
_SCALED, _FOUR, _MIXED = "scaled_mm/", "nvfp4/", "mixed_precision/"


def _row(gpus: tuple[Cell, ...], cpus: tuple[Cell, ...], source: str) -> Row:
    return Row(dict(zip((*_GPUS, *_CPUS), (*gpus, *cpus), strict=True)), source)


_INT4_CPUS = (
    Cell("CPUWNA16", note="with AVX-512; without, `probe` lends another, which was run"),
    Cell("CPUWNA16", note="with `VLLM_CPU_INT4_W4A8=0`, as `probe` sets it; else inputs in int8"),
)
_INT4 = _row((_PACKED, _PACKED, _PACKED_90, _PACKED, _PACKED), _INT4_CPUS, f"{_MIXED}marlin.py, machete.py, cpu.py")
_INT8_WEIGHTS = _row(
    (_PACKED, _PACKED, _PACKED_90, _PACKED, _PACKED),
    (Cell(None, None, "no kernel", "tests/test_carriers_runtimes.py"), _NO_KERNEL),
    f"{_MIXED}marlin.py, machete.py, cpu.py (uint4 alone)",
)
_CARRIED_FP8 = Cell("HummingFP8", WEIGHT_ONLY, "as CompressedTensorsW8A16Fp8")

KERNELS: Final[Mapping[str, Mapping[str, Row]]] = {
    "0.32.0": {
        "fp8": _row(
            (_MARLIN, _CUTLASS, _CUTLASS, _FLASHINFER, _FLASHINFER),
            (
                Cell("PerTensorTorchFP8", seen=_TESTS),
                Cell("CPUFp8PerTensor", WEIGHT_ONLY, "as stored where AMX has FP8"),
            ),
            f"{_SCALED}marlin.py, cutlass.py, flashinfer.py, cpu.py, pytorch.py",
        ),
        "fp8_pc_pt": _row(
            (_MARLIN, _CUTLASS, _CUTLASS, _CUTLASS, _CUTLASS),
            (Cell("ChannelWiseTorchFP8", seen=_TESTS), Cell("ChannelWiseTorchFP8")),
            f"{_SCALED}flashinfer.py and cpu.py (both ask for one scale a tensor)",
        ),
        "fp8_block": _row(
            (_MARLIN, _MARLIN, _DEEPGEMM_90, _DEEPGEMM, _DEEPGEMM),
            (_NO_KERNEL, Cell("CPUFp8BlockScaledMM", WEIGHT_ONLY, "as stored where AMX has FP8")),
            "_POSSIBLE_FP8_BLOCK_KERNELS (Marlin before Triton); quantization/utils/fp8_utils.py "
            "(deepgemm_post_process_fp8_weight_block)",
        ),
        "mxfp8": _row(
            (
                _MARLIN_MX,
                _MARLIN_MX,
                Cell("HummingMxfp8", WEIGHT_ONLY),
                Cell("FlashInferCutedslMxfp8"),
                Cell("FlashInferCutlassMxfp8"),
            ),
            (_NO_KERNEL, _NO_KERNEL),
            "mxfp8/; quantization/utils/humming/priority.py, schema.py (check_and_fallback_input_schema: in groups "
            "inputs stay in 16 bits below 12.0)",
        ),
        "nvfp4": _row(
            (
                _MARLIN4,
                _MARLIN4,
                Cell("HummingNvFp4", WEIGHT_ONLY),
                Cell("FlashInferCuteDslNvFp4"),
                Cell("FlashInferCutlassNvFp4"),
            ),
            _EMULATED,
            "nvfp4/; humming-kernels 0.1.17, schema/humming.py (is_humming_schema_compatible: FP4 from 10.0 on, FP8 "
            "inputs with groups of 32)",
        ),
        "nvfp4_w4a16": _row(
            (
                Cell("MarlinNvFp4"),
                Cell("MarlinNvFp4"),
                Cell("HummingNvFp4"),
                Cell("FlashInferCuteDslNvFp4W4A16"),
                Cell("MarlinNvFp4"),
            ),
            _EMULATED,
            "init_nvfp4_linear_kernel(use_a16=True)",
        ),
        "int8": _row(
            (_INT8, _INT8, _INT8, _NO_INT8, _NO_INT8),
            (
                Cell("CPUInt8", note="without VNNI sums of two products saturate at 16 bits", seen=_TESTS),
                Cell("CPUInt8"),
            ),
            f"{_SCALED}cutlass.py, cpu.py; csrc, cutlass/c3x/scaled_mm_helper.hpp",
        ),
        **dict.fromkeys(("int4_w4a16", "int4_w4a16_g64", "int4_w4a16_asym", "int4_w4a16_asym_g64"), _INT4),
        **dict.fromkeys(("int8_w8a16", "int8_w8a16_g64"), _INT8_WEIGHTS),
    },
    "0.25.1": {
        "fp8": _row(
            (_IN_A_MIX, _CUTLASS, Cell("CutlassFP8", seen=_H100), _FLASHINFER, _FLASHINFER),
            (_UNREAD, _UNREAD),
            f"{_SCALED}; modelopt.py (get_min_capability)",
        ),
        "fp8_pc_pt": _row(
            (Cell(None, None, "refused below 8.9"), _CUTLASS, _CUTLASS, _CUTLASS, _CUTLASS),
            (_UNREAD, _UNREAD),
            f"{_SCALED}; alone: in a mix it is taken for 16 bits",
        ),
        "fp8_block": _row(
            (Cell(None, None, "refused below 8.9"), Cell("TritonFp8BlockScaledMM"), _DEEPGEMM_90, _DEEPGEMM, _DEEPGEMM),
            (_UNREAD, _UNREAD),
            f"{_SCALED}; alone: in a mix it is taken for 16 bits",
        ),
        "mxfp8": _row(
            (
                _MARLIN_MX,
                _MARLIN_MX,
                _MARLIN_MX,
                Cell("FlashInferCutedslMxfp8"),
                Cell("FlashInferCutlassMxfp8"),
            ),
            (_UNREAD, _UNREAD),
            "mxfp8/",
        ),
        "nvfp4": _row(
            (
                _MARLIN4,
                _MARLIN4,
                replace(_MARLIN4, seen=_MIXES),
                Cell("FlashInferCuteDslNvFp4"),
                Cell("FlashInferCutlassNvFp4"),
            ),
            (_UNREAD, _UNREAD),
            _FOUR,
        ),
        "nvfp4_w4a16": _row(
            (*(Cell("MarlinNvFp4"),) * 2, Cell("MarlinNvFp4", seen=_MIXES), *(Cell("MarlinNvFp4"),) * 2),
            (_UNREAD, _UNREAD),
            _FOUR,
        ),
    },
}
# In compressed-tensors' layout another class takes FP8 below 8.9 (compressed_tensors.py, _get_scheme_from_parts).
CARRIED_KERNELS: Final[Mapping[str, Cell]] = dict.fromkeys(("fp8", "fp8_pc_pt", "fp8_block"), _CARRIED_FP8)
