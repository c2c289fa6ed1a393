"""What runtimes fuse into one layer, so that it must share a format and its scales: `Fusing.of(config).layers(names)`.

The one table is `fusing.json`: what vLLM fuses in every architecture that it has a class for. It is made by
`scripts/fusing_table.py` from vLLM's sources, and a test compares the two. Other runtimes fuse what vLLM fuses
(SGLang's quantization/utils.py, TensorRT-LLM's params_map: q/k/v and gate/up) or less, so its groups suit all of them.

- An architecture in the table fuses what its row says, and nothing else.
- A multimodal model holds a language model of another architecture; that one's row counts too, found by the model_type
  in `text_config`, then the usual fusions.
- Any other architecture gets the usual fusions: from the commonest on, without those that are a part of one before, or
  hold one before. That is a guess, so it needs all members: RWKV's key and value, without a query, are no fused layer.

Source: vllm, `packed_modules_mapping`, `stacked_params_mapping` and `orig_to_new_stacked` of its models.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Fusion:
    """One layer of a runtime that holds several modules.

    Attributes:
        name: the layer's own name, below the modules' parent.
        members: the modules' names below that parent, in the runtime's order.
        scope: how the parent's path must end; "": any parent.
        packed: whether vLLM's quantisation knows the members; otherwise it asks for the layer's own name alone.
    """

    name: str
    members: tuple[str, ...]
    scope: str = ""
    packed: bool = True

    def parent_of(self, module: str) -> tuple[str, str] | None:
        """Return (parent, member) where a module's path is that of a member of this layer."""
        for member in self.members:
            parent = module.removesuffix(member)
            if parent != module and (not parent or parent.endswith(".")):
                parent = parent.removesuffix(".")
                if f".{parent}".endswith(f".{self.scope}" if self.scope else ""):
                    return parent, member
        return None


@dataclass(frozen=True)
class Layer:
    """One layer of a runtime and the modules in it.

    Attributes:
        name: the module's path, or that of the layer in which it is fused.
        modules: paths of the modules that are there, in the runtime's order.
        shards: paths of all that the layer could hold, those that the model hasn't included; () where nothing is fused.
        packed: see `Fusion`.
    """

    name: str
    modules: tuple[str, ...]
    shards: tuple[str, ...] = ()
    packed: bool = True


class _Row(NamedTuple):
    fusions: tuple[Fusion, ...]
    multimodal: bool
    asked: Mapping[str, str]


def _fusion(name: str, members: Iterable[str], packed: bool) -> Fusion:
    """Return a fusion of the table; what its name and all its members begin with is its scope."""
    scope, _, leaf = name.rpartition(".")
    listed = tuple(members)
    if scope and all(member.startswith(f"{scope}.") for member in listed):
        return Fusion(leaf, tuple(member.removeprefix(f"{scope}.") for member in listed), scope, packed)
    return Fusion(name, listed, packed=packed)


@cache
def _table() -> dict[str, _Row]:
    """Return architecture -> what vLLM fuses in it."""
    content = json.loads(files(__package__).joinpath("fusing.json").read_text(encoding="utf-8"))
    return {
        architecture: _Row(tuple(_fusion(**fused) for fused in kind["fuses"]), kind["multimodal"], kind["asked"])
        for kind in content["kinds"]
        for architecture in kind["architectures"]
    }


@cache
def usual() -> tuple[Fusion, ...]:
    """Return the fusions that an unknown architecture gets; none of them lies within another."""
    counts = Counter((fusion.members, fusion.name) for row in _table().values() for fusion in row.fusions)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return _with((), (Fusion(name, members) for (members, name), _ in ordered))


def _with(found: Iterable[Fusion], more: Iterable[Fusion]) -> tuple[Fusion, ...]:
    """Return fusions and, after them, those of `more` that are neither part of one before nor have one as a part."""
    kept = list(found)
    for fusion in more:
        members = set(fusion.members)
        if not any(members <= set(other.members) or members >= set(other.members) for other in kept):
            kept.append(fusion)
    return tuple(kept)


def _plain(name: str) -> str:
    """Return a model_type or an architecture in a form in which they can be compared: `qwen3_5_text` -> `qwen35`."""
    return name.lower().replace("_", "").removesuffix("forcausallm").removesuffix("text")


@cache
def _by_model_type() -> dict[str, _Row]:
    return {_plain(name): row for name, row in _table().items() if name.endswith("ForCausalLM") and not row.multimodal}


@dataclass(frozen=True)
class Fusing:
    """What is fused in one architecture.

    Attributes:
        fusions: its layers that hold several modules.
        asked: (a module's own name, the name by which its layers ask vLLM's quantisation), where these differ.
        guessed: whether no runtime is known to have the architecture: what is fused in it is then the usual.
    """

    fusions: tuple[Fusion, ...]
    asked: tuple[tuple[str, str], ...] = ()
    guessed: bool = False

    @classmethod
    def usual(cls) -> "Fusing":
        """Return what is fused in an architecture of which nothing is known."""
        return cls(usual())

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Fusing":
        """Return what is fused in the model with this content of config.json."""
        names = config.get("architectures")
        row = _table().get(str(names[0])) if isinstance(names, list) and names else None
        if row is not None and not row.multimodal:
            return cls(row.fusions, tuple(row.asked.items()))
        text = config.get("text_config")
        inner = _by_model_type().get(_plain(str(text.get("model_type")))) if isinstance(text, dict) else None
        own = row.fusions if row is not None else ()
        known = {fusion.members for fusion in own}
        own += tuple(fusion for fusion in (inner.fusions if inner else ()) if fusion.members not in known)
        asked = tuple(inner.asked.items()) if inner else ()
        return cls(_with(own, usual()), asked, guessed=row is None and inner is None)

    def asked_as(self, name: str) -> str:
        """Return the path by which vLLM's quantisation is asked for a layer: `0.mamba.in_proj` -> `0.mixer.in_proj`."""
        asked = dict(self.asked)
        return ".".join(asked.get(part, part) for part in name.split("."))

    def layers(self, modules: Iterable[str]) -> list[Layer]:
        """Return the runtime's layers that hold these modules, in the order of their first modules.

        A fused layer is one as soon as two of its members are there below one parent: q and k without v still are one,
        up without gate is a layer of its own; a guess needs all members.
        A module that is fused on disk already is one too, under its own name.
        """
        listed = list(dict.fromkeys(modules))
        layer_of: dict[str, Layer] = {}
        for fusion, parent, present in self._candidates(listed):
            enough = len(fusion.members) if self.guessed else 2
            if len(present) >= enough and not any(module in layer_of for module in present.values()):
                layer = Layer(
                    _below(parent, fusion.name),
                    tuple(present[member] for member in fusion.members if member in present),
                    tuple(_below(parent, member) for member in fusion.members),
                    fusion.packed,
                )
                layer_of.update(dict.fromkeys(layer.modules, layer))
        return list(dict.fromkeys(layer_of.get(module) or Layer(module, (module,)) for module in listed))

    def _candidates(self, modules: Iterable[str]) -> list[tuple[Fusion, str, dict[str, str]]]:
        """Return (fusion, parent, {member: module} that are there); narrow scopes, then the fullest layers first."""
        found: dict[tuple[Fusion, str], dict[str, str]] = {}
        for module in modules:
            for fusion in self.fusions:
                if place := fusion.parent_of(module):
                    found.setdefault((fusion, place[0]), {})[place[1]] = module
        candidates = [(fusion, parent, present) for (fusion, parent), present in found.items()]
        return sorted(candidates, key=lambda c: (not c[0].scope, -len(c[2]), len(c[0].members)))


def _below(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name
