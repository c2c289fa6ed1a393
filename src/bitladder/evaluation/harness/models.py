"""lm-evaluation-harness itself: its tasks, and the two models of ours that answer them. Imports the harness."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from bitladder.evaluation.harness.questions import SPLIT
from bitladder.evaluation.reading import cached

Row = tuple[int, ...]  # token ids of a question with one of its answers
# Rows -> the log-probability in nats of each of their tokens but the first.
Score = Callable[[Sequence[Row]], Sequence[Sequence[float]]]
_SEQUENCES_AT_ONCE = 16


class Loaded(HFLM):  # type: ignore[misc]
    """A loaded checkpoint: the harness's own model, with the KV cache that the checkpoint asks for."""

    def __init__(self, model: Any, tokenizer: Any, told: Callable[[int], None]) -> None:
        """Take a model as `load_checkpoint` gives it; `told` gets the number of rows that it has read."""
        super().__init__(model, backend="causal", tokenizer=tokenizer, batch_size=_SEQUENCES_AT_ONCE)
        self._told, self._read = told, 0

    @torch.no_grad()
    def _model_call(self, inps: torch.Tensor, attn_mask: None = None, labels: None = None) -> torch.Tensor:
        """Return the logits of rows that are padded on the right, in float32 whatever the model's arithmetic."""
        self._read += len(inps)
        self._told(self._read)
        logits: torch.Tensor = self.model(input_ids=inps, **cached(self.model)).logits
        return logits.float()


class Elsewhere(TemplateLM):  # type: ignore[misc]
    """A model that runs elsewhere, known by what it gives whole rows."""

    def __init__(self, tokenizer: Any, score: Score) -> None:
        """Take the model's tokenizer, and what scores all rows at once."""
        super().__init__()
        self.tokenizer, self._score = tokenizer, score

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return a text's ids, with what the tokenizer puts before it by itself: as `HFLM` does, and a server."""
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each answer; whether it is the greedy one is not asked by any task here."""
        scored = self._score([(*context, *answer) for _, context, answer in requests])
        return [(sum(row[-len(answer) :]), False) for row, (_, _, answer) in zip(scored, requests, strict=True)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Raise: no task here asks for it."""
        raise NotImplementedError("tasks of whole texts can't be answered from scored rows")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Raise: no task here asks for it."""
        raise NotImplementedError("tasks of free answers can't be answered from scored rows")


def ask(model: TemplateLM, samples: Mapping[str, int]) -> dict[str, list[bool]]:
    """Return for every question of each task whether the model's answer is right.

    Args:
        model: the harness's.
        samples: task -> how many of its questions, the first ones.
    """
    known = TaskManager(include_path=str(Path(__file__).parent), include_defaults=False)
    return {name: list(_answers(model, known, name, count)) for name, count in samples.items()}


def _answers(model: TemplateLM, known: TaskManager, name: str, samples: int) -> Iterator[bool]:
    task = known.load([name])["tasks"][name]
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar, whatever it is told
        task.build_all_requests(limit=samples, rank=0, world_size=1)
    for asked, answer in zip(task.instances, model.loglikelihood(task.instances, disable_tqdm=True), strict=True):
        asked.resps.append(answer)
    task.apply_filters()
    by_question: dict[int, list[Any]] = {}
    for asked in task.instances:
        (found,) = asked.filtered_resps.values()
        by_question.setdefault(asked.doc_id, []).append(found)
    for index, question in enumerate(task.dataset[SPLIT].select(range(samples))):
        yield task.process_results(question, by_question[index])["acc"] == 1
