"""Record of how fast a runtime multiplies a model's layers on one device."""

from typing import ClassVar

from pydantic import Field

from bitladder.records.base import Grown, Part, Record, RunInfo


class TimedCell(Part):
    """A layer's seconds for so many tokens of input; `low` and `high` bound the median with 96.5%."""

    tokens: int
    seconds: float = Field(description="median")
    low: float
    high: float


class TimedLayer(Part):
    """The runtime's layer of one shape in one format, rounding of its input included."""

    format: str
    out_features: int
    in_features: int
    method: str = Field(description="the runtime's class that runs the format")
    kernel: str | None = Field(description="its class that multiplies; None: the method has none of its own")
    chain: int = Field(description="layers that were timed one after the other, so that no cache holds their weights")
    cells: tuple[TimedCell, ...] = Field(min_length=1, description="by tokens, ascending")


class TimedLoad(Part):
    """Requests given at once to the engine of the model in 16 bits: seconds of each repetition."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    one_token: tuple[float, ...] = Field(min_length=1, description="with one token of output a request")
    all_tokens: tuple[float, ...] = Field(min_length=1, description="with all of them")


class EngineSettings(Part):
    """How the engine ran."""

    compiled: bool = Field(description="with torch.compile")
    graphs: str = Field(description="vLLM's word for what runs in CUDA graphs")
    graph_sizes: tuple[int, ...] = Field(description="batches that have a graph; others are padded to the next")
    tokens_a_step: int = Field(description="at most")
    requests_at_once: int


class SearchedShape(Part):
    """How many of the model's quant groups are layers of one shape."""

    out_features: int
    in_features: int
    groups: int


class Profile(Grown, Record):
    """Times of one model's layers in every format that a runtime runs on one device, and of its engine in 16 bits."""

    FILE_NAME: ClassVar[str] = "profile.json"
    volatile: ClassVar[frozenset[str]] = frozenset({"run"})
    later = frozenset({"tensor_parallel"})

    model: str = Field(description="what it is called; its architecture")
    searched: tuple[SearchedShape, ...]
    device: str
    capability: tuple[int, int] | None = Field(description="None: no GPU")
    driver: str | None
    runtime: str
    version: str
    versions: dict[str, str]
    tensor_parallel: int = Field(default=1, gt=0, description="ranks that share the model; shapes are one rank's part")
    engine: EngineSettings
    layers: tuple[TimedLayer, ...]
    refused: dict[str, str] = Field(description="format -> why the runtime has no times of it, in one line")
    loads: tuple[TimedLoad, ...] = Field(min_length=1)
    run: RunInfo | None = None

    @property
    def place(self) -> str:
        """The device, and how many of them share the model."""
        return self.device if self.tensor_parallel == 1 else f"{self.tensor_parallel} x {self.device}"

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats with times, in the order in which they were taken."""
        return tuple(dict.fromkeys(layer.format for layer in self.layers))
