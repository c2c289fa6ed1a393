"""A task with right answers: greedy answers, exactly matched."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from bitladder.data.pairs import Sample, prompt_inputs
from bitladder.data.processors import tokenizer_of
from bitladder.evaluation.reading import cached
from bitladder.records import TASK_ACCURACY, EvalResult, Paired
from bitladder.runinfo import Progress

_PROMPTS_AT_ONCE = 50


def _as_served(settings: Any) -> Any:
    """Return what a server takes of a model's generation settings when it answers greedily: where to stop, the penalty.

    With beams, a least length, or words to write or never to write, answers would be other ones, or none.

    Source: vLLM 0.32, config/model.py, `get_diff_sampling_param`; its temperature and top_k are those of sampling.
    """
    from transformers import GenerationConfig

    return GenerationConfig(eos_token_id=settings.eos_token_id, repetition_penalty=settings.repetition_penalty)


def digits(right: Iterable[bool]) -> str:
    """Return a digit an answer, 1 where it is right: as records hold them."""
    return "".join("1" if one else "0" for one in right)


def accuracy(split: str, right: str, reference: str, bf16: str) -> EvalResult:
    """Return the accuracy of a checkpoint beside the original's.

    Args:
        split: the name of the held-out set, or of the task.
        right: a digit an answer of the checkpoint's, as `digits` gives them.
        reference: of the original's.
        bf16: of the original's in BF16 arithmetic.
    """
    paired = Paired(right=right, reference=reference)
    return EvalResult(
        metric=TASK_ACCURACY,
        split=split,
        unit="share of samples",
        value=paired.accuracy,
        standard_error=paired.standard_error,
        samples=len(right),
        noise_floor=bf16.count("1") / len(bf16),
        reference=paired.original,
        paired=paired,
    )


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
    def right(self, model: Any, device: str, progress: Progress, phase: str) -> str:
        """Return a digit a sample: 1 where the model answers exactly. Its other generation settings are lost."""
        model.generation_config = _as_served(model.generation_config)
        longest = max(len(self.tokenizer(sample.text)["input_ids"]) for sample in self.samples)
        right = []
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
                right.append(answer.strip() == sample.text.strip())
        progress(phase, len(self.samples), len(self.samples))
        return digits(right)
