"""What the child that loads saw, parsed."""

import math
from typing import Any

from pydantic import BaseModel, ConfigDict


class _Fact(BaseModel):
    """A part of the child's result; fields that a later child may add are refused, so that both sides stay equal."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Failure(_Fact):
    """An exception: in which step, its type and text, the line of code that raised it."""

    step: str
    type: str
    message: str
    line: str
    traceback: str


class Copy(_Fact):
    """One checkpoint tensor copied into the elements `begin` to `end` (excluded) of a parameter."""

    tensor: str
    begin: int
    end: int


class Parameter(_Fact):
    """One of vLLM's parameters, after loading and before post-processing."""

    dtype: str
    shape: tuple[int, ...]
    copies: tuple[Copy, ...] = ()
    unloaded: tuple[tuple[int, int], ...] = ()
    values: tuple[float, ...] = ()  # of scales, if they aren't too many; others: empty
    odd: tuple[tuple[int, float], ...] = ()  # of very many scales: the first in each copy that can't be one, its place
    nan: int = 0
    inf: int = 0

    @property
    def elements(self) -> int:
        """How many it has."""
        return math.prod(self.shape)


class Layer(_Fact):
    """One of vLLM's layers with a quant method; `shards` and `widths` (output features) where it fuses modules."""

    name: str
    type: str
    method: str
    shards: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    created_dtype: str | None
    rounds_input: bool = True
    bits: int | None = None  # of packed integers, and how many share a scale
    group_size: int | None = None
    symmetric: bool | None = None  # whether packed integers have no zero points
    kernel: str | None = None
    dtype: str | None = None


class Attention(_Fact):
    """One attention layer: the dtype and scales of its KV cache, as vLLM will use them."""

    name: str
    kv_cache_dtype: str
    k_scale: float
    v_scale: float


class Cast(_Fact):
    """Values of a tensor that changed their dtype where one of the two is an FP8 one."""

    tensor: str
    parameter: str | None
    before: str
    after: str


class Tensor(_Fact):
    """A tensor as the checkpoint stores it."""

    dtype: str
    shape: tuple[int, ...]


class Tokenizer(_Fact):
    """The tokenizer that vLLM makes: how many tokens it knows, and how many it makes of a plain sentence."""

    vocabulary: int
    text_tokens: int


class Facts(_Fact):
    """What the child found out about one checkpoint."""

    directory: str
    reached: str
    done: bool = False
    errors: tuple[Failure, ...] = ()
    config: dict[str, Any] = {}
    layers: tuple[Layer, ...] = ()
    parameters: dict[str, Parameter] = {}
    tensors: dict[str, Tensor] = {}
    unused: tuple[str, ...] = ()
    last_tensor: str | None = None
    tokenizer: Tokenizer | None = None
    casts: tuple[Cast, ...] = ()
    requantised: tuple[tuple[int, ...], ...] = ()
    attention: tuple[Attention, ...] = ()
    seconds: dict[str, float] = {}

    @property
    def loaded(self) -> bool:
        """Whether vLLM's weight loader came to its end."""
        return "weights" in self.seconds and not any(failure.step in UP_TO_WEIGHTS for failure in self.errors)


UP_TO_WEIGHTS = ("configuration", "loader", "model", "weights")
