"""Which part of a language model's linears one rank holds, where several share them (tensor parallelism).

vLLM's layers split a weight [out_features, in_features] by rows, where its outputs are shared out (q/k/v, gate/up), or
by columns, where its inputs already are (o, down). Rows of k and v are whole heads: where there are fewer of them than
ranks, several ranks hold the same one. All ranks' parts have the same shape.

Source: vllm 0.25.1 and 0.32.0, model_executor/layers/linear.py (ColumnParallelLinear, MergedColumnParallelLinear,
QKVParallelLinear, RowParallelLinear) and which of them its models make of the modules named here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from bitladder.errors import UnsupportedModel
from bitladder.models.families import section_of
from bitladder.models.families.base import number
from bitladder.records import QuantGroup

# own names of modules, by how vLLM's language models split them
BY_COLUMNS: Final = frozenset(
    ("o_proj", "down_proj", "out_proj", "fc2", "dense", "dense_4h_to_h", "c_proj", "wo", "w2")
)
BY_ROWS: Final = frozenset(("q_proj", "gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h"))
BY_KEY_HEADS: Final = frozenset(("k_proj", "v_proj"))
BY_ALL_HEADS: Final = frozenset(("qkv_proj", "query_key_value"))  # of q, k and v together


@dataclass(frozen=True)
class Split:
    """How a model is split.

    Attributes:
        ranks: that share it; 1: it isn't split.
        heads: of queries; None: the configuration doesn't say.
        key_heads: of keys and values.
    """

    ranks: int
    heads: int | None = None
    key_heads: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], ranks: int) -> Self:
        """Return how the model with this content of config.json is split among so many ranks."""
        text = section_of(config, "text_config") or config
        heads = number(text, "num_attention_heads", "n_head")
        keys = number(text, "num_key_value_heads", "num_kv_heads")
        return cls(ranks, heads, heads if keys is None else keys)

    @property
    def why_not(self) -> str | None:
        """Why the attention's heads can't be split so; None: they can."""
        if self.heads is None or self.key_heads is None or self.ranks == 1:
            return None
        if self.heads % self.ranks:
            return f"{self.heads} attention heads can't be split among {self.ranks} ranks"
        if self.key_heads % self.ranks and self.ranks % self.key_heads:
            return f"{self.key_heads} heads of keys and values can be neither split among nor repeated on {self.ranks} ranks"
        return None

    def part(self, module: str, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of what one rank holds of a module's weight.

        Raises:
            UnsupportedModel: the weight can't be split so, or nothing is known of how.
        """
        if self.ranks == 1:
            return shape
        rows, columns = shape
        leaf = module.rpartition(".")[2]
        if self.why_not is not None:
            raise UnsupportedModel(self.why_not)
        if leaf in BY_COLUMNS:
            return rows, self._share(columns, module)
        if leaf in BY_ROWS:
            return self._share(rows, module), columns
        if leaf in BY_KEY_HEADS | BY_ALL_HEADS and self.heads is not None and self.key_heads is not None:
            keys = self.key_heads
            if leaf in BY_KEY_HEADS:
                return rows // min(keys, self.ranks), columns
            own = self.heads // self.ranks + 2 * max(1, keys // self.ranks)
            return rows // (self.heads + 2 * keys) * own, columns
        raise UnsupportedModel(f"how {module} is split among ranks isn't known")

    def _share(self, size: int, module: str) -> int:
        if size % self.ranks:
            raise UnsupportedModel(f"{size} features of {module} can't be split among {self.ranks} ranks")
        return size // self.ranks

    def group(self, group: QuantGroup) -> QuantGroup:
        """Return a group as one rank holds it.

        Raises:
            UnsupportedModel: it can't be split so, or nothing is known of how.
        """
        if self.ranks == 1:
            return group
        shapes = [None if one.shape is None else self.part(one.name, one.shape) for one in group.modules]
        modules = tuple(one.model_copy(update={"shape": shape}) for one, shape in zip(group.modules, shapes, strict=True))
        return group.model_copy(update={"modules": modules})
