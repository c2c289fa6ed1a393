"""A task with right answers: greedy answers, exactly matched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from bitladder.data.pairs import Sample, prompt_inputs
from bitladder.data.processors import tokenizer_of
from bitladder.evaluation.reading import cached
from bitladder.runinfo import Progress

_PROMPTS_AT_ONCE = 50


@dataclass(frozen=True)
class Task:
    """Questions about pictures, answered greedily; an answer counts when it is exactly the expected text."""

    samples: tuple[Sample, ...]
    prompts: Callable[[Sequence[Sample]], dict[str, torch.Tensor]]
    tokenizer: Any

    @classmethod
    def exact_match(cls, samples: Sequence[Sample], processor: Any) -> Self:
        """Return the task of answering every sample's prompt with its text."""
        return cls(tuple(samples), lambda some: prompt_inputs(some, processor), tokenizer_of(processor))

    @torch.no_grad()
    def correct(self, model: Any, device: str, progress: Progress, phase: str) -> int:
        """Return how many of the samples the model answers exactly."""
        longest = max(len(self.tokenizer(sample.text)["input_ids"]) for sample in self.samples)
        right = 0
        for start in range(0, len(self.samples), _PROMPTS_AT_ONCE):
            progress(phase, start, len(self.samples))
            some = self.samples[start : start + _PROMPTS_AT_ONCE]
            inputs = {key: value.to(device) for key, value in self.prompts(some).items()}
            output = model.generate(
                **inputs,
                **{**cached(model), "use_cache": True},  # token by token; without a cache of ours the model's own
                max_new_tokens=longest + 4,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            for sample, row in zip(some, output[:, inputs["input_ids"].shape[1] :], strict=True):
                answer = self.tokenizer.decode(row, skip_special_tokens=True)
                right += answer.strip() == sample.text.strip()
        progress(phase, len(self.samples), len(self.samples))
        return right
