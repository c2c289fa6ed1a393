"""How vLLM serves a scheme's checkpoint, in one line."""

import shlex
from typing import TYPE_CHECKING

from bitladder.report.kv_cache import skip_argument

if TYPE_CHECKING:
    from bitladder.report.types import Report, ReportedScheme

RANKS_ARGUMENT = "--tensor-parallel-size"  # of `vllm serve`


def serve_command(report: "Report", scheme: "ReportedScheme", directory: str) -> str:
    """Return the command: with the layers whose cache stays in 16 bits, and the GPUs that the recipe plans for."""
    ranks = report.settings.get("tensor_parallel", 1)
    shared = f" {RANKS_ARGUMENT} {ranks}" if ranks > 1 else ""
    return f"vllm serve {shlex.quote(directory)}{skip_argument(scheme.kv_cache_skips)}{shared}"
