"""A model's decoder layers: what each is called with, and which of them holds a group."""

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from bitladder.errors import EngineError
from bitladder.models.target import Target
from bitladder.records import QuantGroup

_LAYER = re.compile(r"(.+?)\.(\d+)\.")  # path of the list of decoder layers, and the number in it


@dataclass(frozen=True)
class LayerCall:
    """What a decoder layer was called with; the hidden states are apart."""

    hidden: torch.Tensor  # [rows, tokens, hidden]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Self:
        """Return the call that a forward pre-hook of the layer saw."""
        hidden = args[0] if args else kwargs["hidden_states"]
        return cls(hidden, args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"})


class LayerRecorder(ExitStack):
    """Keeps what every decoder layer is called with, and what the last one gave; a context for one forward pass.

    calls: in the order of the layers. output: of the last layer that ran, [rows, tokens, hidden]. changed_before: the
    last layer whose input is not what the one before gave; 0: there is none.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.calls: list[LayerCall] = []
        self.output = torch.empty(0)
        self.changed_before = 0
        for layer in layers:
            self.callback(layer.register_forward_pre_hook(self._keep_call, with_kwargs=True).remove)
            self.callback(layer.register_forward_hook(self._keep_output).remove)

    def _keep_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = LayerCall.of(args, kwargs)
        if self.calls and call.hidden is not self.output:
            self.changed_before = len(self.calls)
        self.calls.append(call)

    def _keep_output(self, _: nn.Module, __: Any, output: Any) -> Any:
        self.output = hidden_of(output)


def layers_path(target: Target, remedy: str) -> str:
    """Return the path of the one list of decoder layers that holds all searched modules.

    Raises:
        EngineError: there are several, or none; the message ends with `remedy`.
    """
    paths = {found[1] for group in target.groups for m in group.modules if (found := _LAYER.match(m.name))}
    if len(paths) != 1:
        listed = ", ".join(sorted(paths)) or "none"
        raise EngineError(f"the searched modules lie in {len(paths)} lists of layers ({listed}); {remedy}")
    return paths.pop()


def layer_of(group: QuantGroup) -> int:
    """Return the number of the decoder layer that holds a group."""
    found = _LAYER.match(group.modules[0].name)
    assert found is not None
    return int(found[2])


def by_layer(groups: Iterable[QuantGroup]) -> dict[int, list[QuantGroup]]:
    """Return the groups of every decoder layer that has some, under the layer's number."""
    found: dict[int, list[QuantGroup]] = {}
    for group in groups:
        found.setdefault(layer_of(group), []).append(group)
    return found


def hidden_of(output: Any) -> torch.Tensor:
    """Return the hidden states [rows, tokens, hidden] that a decoder layer gave."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden
