"""Parameters times powers of two, with nothing rounded: `Scaling(by, offset).applied(tensor)`."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Scaling:
    """What is done to a parameter p: it becomes p' with p' + offset = (p + offset) · by.

    Attributes:
        by: powers of two, float32, [features] along the last dimension, or [features, 1, ...] along the first.
        offset: what the model adds before it multiplies: 1 for the norms of Gemma, 0 for most parameters.
    """

    by: torch.Tensor
    offset: float = 0.0

    def applied(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the scaled parameter, in its own dtype and shape."""
        wide, by = self._wide(tensor)
        made = (wide + self.offset) * by - self.offset if self.offset else wide * by
        return made.to(tensor.dtype)

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return where nothing of a parameter is rounded when it is scaled, bool, in its shape."""
        wide, by = self._wide(tensor)
        made = self.applied(tensor).to(wide.dtype)
        return (made + self.offset) / by == wide + self.offset if self.offset else made / by == wide

    def _wide(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the parameter in the dtype in which models add the offset, float32 or wider, and the factors in it."""
        dtype = torch.promote_types(tensor.dtype, torch.float32) if self.offset else tensor.dtype
        return tensor.to(dtype), self.by.to(tensor.device, dtype)
