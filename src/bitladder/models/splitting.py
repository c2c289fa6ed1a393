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
        key_heads: of keys and values; None as `heads` are.
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
            return f"{self.key_heads} heads of keys and values can't be split among {self.ranks} ranks, nor repeated"
        return None

    def rule(self, module: str) -> frozenset[str] | None:
        """Return which of the lists above a module is in; None: in none, or it has heads of unknown number."""
        leaf = module.rpartition(".")[2]
        known = (BY_COLUMNS, BY_ROWS, *(() if self.heads is None else (BY_KEY_HEADS, BY_ALL_HEADS)))
        return next((names for names in known if leaf in names), None)

    def part(self, module: str, shape: tuple[int, int]) -> tuple[int, int] | None:
        """Return the shape of what one rank holds of a module's weight; None: it isn't known how that is split.

        Raises:
            UnsupportedModel: the weight can't be split so.
        """
        if self.why_not is not None:
            raise UnsupportedModel(self.why_not)
        (rows, columns), leaf, rule = shape, module.rpartition(".")[2], self.rule(module)
        if self.ranks == 1 or rule is None:
            return shape if self.ranks == 1 else None
        if rule is BY_COLUMNS:
            return rows, self._share(columns, leaf)
        if rule is BY_ROWS:
            return self._share(rows, leaf), columns
        assert self.heads is not None
        assert self.key_heads is not None
        if rule is BY_KEY_HEADS:
            return rows // min(self.key_heads, self.ranks), columns
        own = self.heads // self.ranks + 2 * max(1, self.key_heads // self.ranks)
        return rows // (self.heads + 2 * self.key_heads) * own, columns

    def _share(self, size: int, leaf: str) -> int:
        if size % self.ranks:
            raise UnsupportedModel(f"{size} features of {leaf} can't be split among {self.ranks} ranks")
        return size // self.ranks

    def group(self, group: QuantGroup) -> QuantGroup:
        """Return a group as one rank holds it.

        Raises:
            UnsupportedModel: it can't be split so, or it isn't known how.
        """
        if self.ranks == 1:
            return group
        modules = []
        for module in group.modules:
            try:
                part = None if module.shape is None else self.part(module.name, module.shape)
            except UnsupportedModel as error:
                raise UnsupportedModel(f"tensor_parallel: {error}; name another number") from error
            if part is None:
                raise UnsupportedModel(f"how {module.name} is split among ranks isn't known; use tensor_parallel 1")
            modules.append(module.model_copy(update={"shape": part}))
        return group.model_copy(update={"modules": tuple(modules)})


WHOLE: Final = Split(1)  # a model that one rank holds
