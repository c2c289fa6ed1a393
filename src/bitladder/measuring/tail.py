"""What stands behind the last decoder layer, as a function of what that layer gives: norm, head, and all else.

Where the module `norm` beside the layers and the head make the model's logits bit for bit, these two are used. Else the
model's own code runs, with its layers passed through and the last one giving the hidden states: each row of them as a
text of one token, so that whatever the model does there (a scale, a softcap, a projection) is inside, and nothing
needs to be known by name.
"""

import contextlib
from typing import Any

import torch

from bitladder.errors import EngineError
from bitladder.measuring.layers import Layers, passed_through

_PROBES = 64  # random rows that show whether norm and head are all


class Tail:
    """Makes logits of the last layer's hidden states.

    plain: norm and head are all there is.
    """

    def __init__(self, layers: Layers) -> None:
        self.layers, self.model = layers, layers.model
        self.norm = getattr(self.model.get_submodule(layers.path.rpartition(".")[0]), "norm", None)
        self.head: Any = self.model.get_output_embeddings()
        self.token = _text_token(self.model.config)
        self.plain = self._is_plain()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., vocabulary] of what the last layer gives, [..., hidden]."""
        if self.plain:
            return self._by_head(hidden)
        return self._by_model(hidden.reshape(-1, 1, hidden.shape[-1])).view(*hidden.shape[:-1], -1)

    def _by_head(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.norm is not None
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits

    def _by_model(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits [texts, 1, vocabulary] of hidden states [texts, 1, hidden] by the model's own code."""
        ids = torch.full(hidden.shape[:2], self.token, device=hidden.device)
        last = len(self.layers) - 1
        with contextlib.ExitStack() as stack:
            for index, layer in enumerate(self.layers.layers):
                given = hidden if index == last else None
                stack.enter_context(passed_through(layer, index, self.layers.anatomy, given))
            logits: torch.Tensor = self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits
        return logits

    @torch.no_grad()
    def _is_plain(self) -> bool:
        if self.norm is None:
            return False
        weight = self.head.weight
        size = self.model.get_input_embeddings().weight.shape[-1]
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(_PROBES, 1, size, generator=generator).to(weight.device, weight.dtype)
        try:
            ours = self._by_head(probes)
        except RuntimeError:
            return False  # of another size: a norm of something else
        try:
            theirs = self._by_model(probes)
        except (RuntimeError, ValueError, TypeError) as error:
            text = " ".join(str(error).split())[:150]
            raise EngineError(
                f"{type(self.model).__name__} can't be run on text alone ({text}); use engine: modelopt"
            ) from error
        return torch.equal(ours, theirs)


def _text_token(config: Any) -> int:
    """Return a token id that stands for no picture, no sound and no padding."""
    taken = {
        value
        for part in (config, config.get_text_config())
        for name, value in part.to_dict().items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    return next(token for token in range(len(taken) + 1) if token not in taken)
