"""What the child that serves answers, parsed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from pydantic import BaseModel, ConfigDict

from bitladder.formats import Spread
from bitladder.records import PhaseCost, ProbeResult
from bitladder.runtimes.child import Outcome
from bitladder.runtimes.vllm.job import LogProbs

OUTPUT_KEPT: Final = 4000  # characters of a dead child's last output


class _Fact(BaseModel):
    """A part of the child's result; unknown fields are refused, so that both sides stay equal."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Failure(_Fact):
    """An exception in the child."""

    type: str
    message: str
    line: str
    traceback: str


class Runtime(_Fact):
    """Where the child ran."""

    version: str
    device: str
    gpu: bool
    threads: int
    versions: dict[str, str]


class Layer(_Fact):
    """One of vLLM's linear layers, as it runs."""

    method: str
    kernel: str | None
    dtype: str | None
    bits: int | None = None  # of packed integers, and how many share a scale
    group_size: int | None = None
    symmetric: bool | None = None  # whether packed integers have no zero points
    spread: Spread = "tensor"  # what its weight's scales are for
    dynamic_input: bool = False  # whether its inputs are scaled as they come


class Answer(_Fact):
    """One greedy answer."""

    text: str
    token_ids: tuple[int, ...]


class Scores(_Fact):
    """The token ids that vLLM gave the model, and the log-probability of each but the first."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]


class Timings(_Fact):
    """Seconds of each repetition of a batch: with one token of output a request, and with all of them."""

    one_token: tuple[float, ...]
    all_tokens: tuple[float, ...]


class Served(_Fact):
    """What the child found out about one checkpoint, as far as it came.

    Attributes:
        reached: the last step that was finished.
        names: the checkpoint's module -> vLLM's (fused) layer.
        weight_bytes: of all parameters and buffers, as they lie on the GPU; None: on a CPU, where they aren't all seen.
        kv_cache_bytes: of the pool, which vLLM makes as large as the memory that is left.
        kv_cache_tokens: that fit into it.
        returncode: the child's exit status; negative: the signal that ended it.
        output: the end of what it printed, where it died without an error of its own.
    """

    reached: str = "started"
    phases: tuple[PhaseCost, ...] = ()
    runtime: Runtime | None = None
    layers: dict[str, Layer] = {}
    names: dict[str, str] = {}
    weight_bytes: int | None = None
    kv_cache_dtype: str | None = None
    kv_cache_bytes: int | None = None
    kv_cache_tokens: int | None = None
    answers: tuple[Answer, ...] = ()
    scores: tuple[Scores, ...] = ()
    rows: tuple[Scores, ...] = ()
    timings: Timings | None = None
    error: Failure | None = None
    returncode: int = 0
    timed_out: bool = False
    output: str = ""

    @classmethod
    def parse(cls, outcome: Outcome) -> Self:
        """Return what came of a child."""
        died = outcome.returncode != 0 and "error" not in outcome.result
        return cls(
            **outcome.result,
            returncode=outcome.returncode,
            timed_out=outcome.timed_out,
            output=outcome.output[-OUTPUT_KEPT:] if died else "",
        )

    @property
    def failed(self) -> bool:
        """Whether the job wasn't finished."""
        return self.error is not None or self.returncode != 0 or self.timed_out


NOT_INSTALLED: Final = Served(
    error=Failure(type="ModuleNotFoundError", message="No module named 'vllm'", line="", traceback="")
)


@dataclass(frozen=True)
class Run:
    """A checkpoint's serving, and the log-probabilities that our evaluation of its files gives (None: not computed)."""

    served: Served
    expected: LogProbs | None = None


@dataclass(frozen=True)
class Probes:
    """What came of serving an original and its checkpoints.

    Attributes:
        source: of the original; None: it wasn't given.
        results: one a checkpoint, in their order.
        served: the children's own words, with timings and bytes, by directory.
    """

    source: ProbeResult | None
    results: tuple[ProbeResult, ...]
    served: Mapping[Path, Served] = field(default_factory=dict)
