"""What a model's quantised layers are where several ranks share them (tensor parallelism): does each hold whole blocks?

A rank holds a part of a weight (`models/splitting.py`), and of its scales the same part. So a format that scales blocks
has to take the part's shape as it took the whole: no block may be cut. Where one is, vLLM's ModelOpt loader stops, or
gives a rank scales of other rows (square blocks); its loader of packed integers stops; of NVFP4 and MXFP8 in
compressed-tensors' layout ranks get other blocks' scales without a word. Kernels ask for no more: Marlin pads its tiles
(64 and 128), CUTLASS to 16, and where another takes no such shape, these do.

Source: vllm 0.25.1 and 0.32.0, model_executor/layers/quantization/: modelopt.py (create_weights of each format),
utils/fp8_utils.py (validate_fp8_block_shape), utils/marlin_utils.py (marlin_padded_nk), utils/quant_utils.py
(verify_group_size_divides_partition), compressed_tensors/schemes/; model_executor/kernels/linear/mixed_precision/
marlin.py (can_implement). Heads: config/model.py (verify_with_parallel_config). `tests/test_ranks.py` has these loaders
load every rank's part.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from bitladder.errors import UnsupportedModel
from bitladder.formats import get_format, most_like
from bitladder.models.families import Architecture
from bitladder.models.fusing import Layer
from bitladder.models.splitting import Split
from bitladder.records import BF16, ErrorClass
from bitladder.runtimes.base import Rules, Support
from bitladder.runtimes.config import CONFIG_FILE
from bitladder.runtimes.findings import Findings

_LAST_WORD = "let the runtime's own loader have the last word"


@dataclass(frozen=True)
class _Problem:
    """What doesn't fit: where, what, and the formats that would (`bf16` among them); none: no format does."""

    where: str
    problem: str
    formats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ranks:
    """One checkpoint's layers as ranks share them.

    Attributes:
        need: the model.
        rules: the runtime's, for it.
        formats: module -> the format in which it runs; without one: 16 bits.
        carried: whether the checkpoint is in compressed-tensors' layout.
        spelt: gives the checkpoint's name of a module.
    """

    need: Architecture
    rules: Rules
    formats: Mapping[str, str]
    carried: bool
    spelt: Callable[[str], str]

    def check(self, split: Split, findings: Findings) -> None:
        """Add what doesn't fit to the findings."""
        if not self.rules.splits:
            who = self.rules.runtime
            problem = f"how {who} shares a model among {split.ranks} ranks isn't known here, so that wasn't checked"
            findings.warn("unsupported_model", CONFIG_FILE, problem, _LAST_WORD)
            return
        able = (n for n in range(split.ranks - 1, 0, -1) if not any(self._problems(replace(split, ranks=n))))
        fewer = next(able, 1)
        for one in self._problems(split):
            kind: ErrorClass = "unsupported_format" if one.formats else "unsupported_model"
            other = f", or leave this layer in {' or '.join(one.formats)}" if one.formats else ""
            findings.error(kind, one.where, one.problem, f"serve it with tensor_parallel {fewer}{other}")
        for layer in self._layers() if split.why_not is None else ():
            if self._format(layer) != BF16 and any(split.rule(module) is None for module in layer.modules):
                problem = "is split among ranks in a way that isn't known here, so that wasn't checked"
                findings.warn("unsupported_model", self.spelt(layer.modules[0]), problem, _LAST_WORD)

    def _problems(self, split: Split) -> Iterator[_Problem]:
        """Yield what doesn't fit."""
        if split.why_not is not None:
            yield _Problem(CONFIG_FILE, split.why_not)
            return
        for layer in self._layers():
            where, name = self.spelt(layer.modules[0]), self._format(layer)
            try:
                parts = {module: part for module in layer.modules if (part := self._part(split, module)) is not None}
            except UnsupportedModel as error:
                yield _Problem(where, str(error))
                continue
            for module, part in parts.items():
                why = None if name == BF16 else get_format(name).why_no_part(part)
                if why is not None:
                    leaf = module.rpartition(".")[2]
                    problem = f"is {name}, and of {leaf} each of {split.ranks} ranks holds {list(part)}, which {why}"
                    yield _Problem(where, problem, (*self._others(name, parts.values()), BF16))
                    break

    def _others(self, name: str, parts: Iterable[tuple[int, int]]) -> list[str]:
        """Return the format most like one, that takes these shapes and that the runtime runs; [] where it runs none."""
        other = most_like(list(parts), get_format(name))
        support = (
            None if other is None else (self.rules.CARRIED if self.carried else self.rules.SUPPORT).get(other.name)
        )
        runs = isinstance(support, Support) and support.in_mix is True
        return [other.name] if other is not None and runs else []

    def _layers(self) -> Iterator[Layer]:
        """Yield the language model's layers."""
        return (one for one in self.rules.layers if one.modules[0].startswith(self.need.text))

    def _format(self, layer: Layer) -> str:
        return self.formats.get(layer.modules[0], BF16)

    def _part(self, split: Split, module: str) -> tuple[int, int] | None:
        """Return the shape of a rank's part of a module; None: its shape isn't known, or how it is split."""
        shape = self.need.tensors.get(f"{module}.weight", ())
        if len(shape) != 2 or shape[0] is None or shape[1] is None:
            return None
        own = (shape[0], shape[1])
        name = self.formats.get(module, BF16)
        if name != BF16 and f"{module}.".startswith(self.need.open_prefixes):  # as it is stored
            own = get_format(name).weight_shape(own)
        return split.part(module, own)
