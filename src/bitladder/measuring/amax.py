"""The largest magnitudes of tensors, over everything that a model computes: what scales are made of."""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

import torch

from bitladder.measured import Amax
from bitladder.records import QuantGroup

Key = TypeVar("Key", bound=Hashable)


class RunningAmax(Generic[Key]):
    """The largest of the magnitudes that were seen of each key.

    On a GPU small batches are bound by launches: what is seen of many keys is compared at once, as soon as one of them
    comes again.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Key, ...], torch.Tensor] = {}  # keys that were seen together -> of each, [keys]
        self._fresh: dict[Key, torch.Tensor] = {}  # seen since, as they were given
        self._many: dict[Key, torch.Tensor] = {}  # of keys that have several numbers, of rows or of blocks

    def see(self, key: Key, amax: torch.Tensor) -> None:
        """Take one more magnitude of a key, of any floating-point dtype; all must be on one device.

        It is a scalar, or always of the same shape, where rows or blocks have magnitudes of their own.
        """
        if amax.dim():
            seen = amax.float()
            self._many[key] = torch.maximum(self._many[key], seen) if key in self._many else seen
            return
        if key in self._fresh:
            self._settle()
        self._fresh[key] = amax

    def _settle(self) -> None:
        keys = tuple(self._fresh)
        seen = torch.stack(list(self._fresh.values())).float()
        self._known[keys] = torch.maximum(self._known[keys], seen) if keys in self._known else seen
        self._fresh = {}

    def values(self) -> dict[Key, torch.Tensor]:
        """Return each key's largest magnitude, float32 on the CPU."""
        if self._fresh:
            self._settle()
        found = {key: amax.cpu() for key, amax in self._many.items()}
        for keys, amax in self._known.items():
            for key, value in zip(keys, amax.cpu(), strict=True):
                found[key] = torch.maximum(found[key], value) if key in found else value.clone()
        return found


def shared(amax: Amax, groups: Iterable[QuantGroup]) -> Amax:
    """Return the amax of each group's weights and inputs as its modules share them: the largest one."""
    found: Amax = {}
    for group in groups:
        for kind in ("weight_amax", "input_amax"):
            keys = [f"{module.name}.{kind}" for module in group.modules if f"{module.name}.{kind}" in amax]
            found |= dict.fromkeys(keys, torch.stack([amax[key] for key in keys]).amax()) if keys else {}
    return found
