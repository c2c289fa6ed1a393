"""Parameters times powers of two, with nothing rounded: `Scaling(by, offset).applied(tensor)`."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Scaling:
    """What is done to a parameter p: it becomes p' with p' + offset = (p + offset) · by.

    Attributes:
        by: powers of two along the last dimension, float32 [features].
        offset: what the model adds before it multiplies: 1 for the norms of Gemma, 0 for most parameters.
    """

    by: torch.Tensor
    offset: float = 0.0

    def applied(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the scaled parameter, in its own dtype and shape."""
        wide, by = self._wide(tensor)
        made = (wide + self.offset) * by - self.offset if self.offset else wide * by
        return made.to(tensor.dtype)

    def kept(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return where nothing of a parameter is rounded when it is scaled, bool, in its shape.

        Args:
            tensor: the parameter as its file holds it.
            dtype: in which a runtime loads the file, which may round p and p' before the offset is added; None: the
                file's own.
        """
        loaded, by = self._wide(tensor.to(dtype or tensor.dtype))
        made, _ = self._wide(self.applied(tensor).to(dtype or tensor.dtype))
        return (made + self.offset) / by == loaded + self.offset

    def _wide(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the parameter and the factors in a dtype in which the sum with the offset isn't rounded."""
        dtype = torch.float64 if self.offset else tensor.dtype
        return tensor.to(dtype), self.by.to(tensor.device, dtype)
