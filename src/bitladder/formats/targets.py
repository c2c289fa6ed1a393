"""What devices make of a format's files: the arithmetic in which vLLM multiplies them there.

A file says how numbers are stored; a device without units for them computes otherwise. What a search scores, and what
an evaluation reads, is the product of the device that will serve.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bitladder.formats.base import POWERS_OF_TWO, WEIGHT_ONLY, Arithmetic


@dataclass(frozen=True)
class Generation:
    """A generation of devices.

    Attributes:
        title: what it is, in words.
        capability: least compute capability of its GPUs; None: no GPU.
        arithmetic: format -> how it is computed, where that isn't as it is stored.
        unsupported: formats that vLLM doesn't run there, which are scored as they are stored.
    """

    title: str
    capability: tuple[int, int] | None
    arithmetic: Mapping[str, Arithmetic] = field(default_factory=dict)
    unsupported: frozenset[str] = frozenset()


# Source: vllm 0.32.0, model_executor/kernels/linear; docs/runtimes.md has the kernel of every cell.
TARGETS: Mapping[str, Generation] = {
    "ampere": Generation(
        "NVIDIA Ampere", (8, 0), dict.fromkeys(("fp8", "fp8_pc_pt", "fp8_block", "mxfp8", "nvfp4"), WEIGHT_ONLY)
    ),
    "ada": Generation("NVIDIA Ada", (8, 9), dict.fromkeys(("fp8_block", "mxfp8", "nvfp4"), WEIGHT_ONLY)),
    "hopper": Generation(
        "NVIDIA Hopper", (9, 0), {"fp8_block": POWERS_OF_TWO, "mxfp8": WEIGHT_ONLY, "nvfp4": WEIGHT_ONLY}
    ),
    "blackwell": Generation(
        "NVIDIA Blackwell of data centres", (10, 0), {"fp8_block": POWERS_OF_TWO}, frozenset({"int8"})
    ),
    "blackwell_rtx": Generation(
        "NVIDIA Blackwell of workstations", (12, 0), {"fp8_block": POWERS_OF_TWO}, frozenset({"int8"})
    ),
    "cpu": Generation("CPU without AMX", None, {}, frozenset({"fp8_block", "mxfp8", "int8_w8a16", "int8_w8a16_g64"})),
    "cpu_amx": Generation(
        "CPU with AMX",
        None,
        dict.fromkeys(("fp8", "fp8_block"), WEIGHT_ONLY),
        frozenset({"mxfp8", "int8_w8a16", "int8_w8a16_g64"}),
    ),
}


def served(formats: Iterable[str], target: str) -> dict[str, Arithmetic]:
    """Return how a target computes these formats, of those that it doesn't compute as they are stored."""
    known = TARGETS[target].arithmetic
    return {name: known[name] for name in formats if name in known}


def target_of(capability: tuple[int, int] | None) -> str:
    """Return the target that a device of this compute capability is.

    Args:
        capability: of a GPU; None: a CPU, taken for one that computes as files are stored, with AMX or without.
    """
    if capability is None:
        return "cpu"
    known = [name for name, one in TARGETS.items() if one.capability is not None and one.capability <= capability]
    return known[-1] if known else "ampere"
