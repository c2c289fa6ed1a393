"""Has a runtime profile the device that it runs on, for one model: no recipe, and no measurement, is needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitladder.formats import FORMATS, in_order
from bitladder.models.target import find_target
from bitladder.records import Profile
from bitladder.runtimes.vllm import profiling


def profile(
    directory: Path,
    python: Path,
    *,
    formats: Sequence[str] | None = None,
    engine: Mapping[str, Any] | None = None,
    tensor_parallel: int = 1,
    timeout: float = 1800.0,
) -> Profile:
    """Return the times of a model's layers and of its engine in 16 bits, as vLLM runs them here; see `profiling`.

    Raises:
        ModelError: the model can't be searched, or not be split among so many ranks. RecipeError: an unknown format.
        ProbeFailed: vLLM doesn't serve it.
    """
    wanted = None if formats is None else in_order(formats)
    target = find_target(directory, tuple(FORMATS) if wanted is None else wanted)
    return profiling.profile(
        directory,
        target.groups,
        python,
        model=target.name,
        formats=wanted,
        engine=engine,
        tensor_parallel=tensor_parallel,
        timeout=timeout,
    )
