"""The original's log-probabilities on a set, against which everything else is compared."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file

from bitladder.data.batches import DataSet
from bitladder.errors import ModelError
from bitladder.evaluation.metrics import EXPORT_AGAIN, Sums, add_rows, check_nll
from bitladder.evaluation.reading import cached
from bitladder.evaluation.task import Task
from bitladder.models.loading import load_model
from bitladder.reading import read_tensors
from bitladder.recipe import DEFAULT_SPLIT
from bitladder.runinfo import Progress, no_progress, told
from bitladder.storage import scratch_directory

# The original's log-probabilities are kept in memory up to this size, and in a temporary directory beyond.
MAX_REFERENCE_BYTES_IN_MEMORY = 2 << 30
_GPU_SHARE = 0.25  # of its free memory that the original's log-probabilities may take


def _log_probabilities(model: Any, batch: Any, device: str, what: str) -> torch.Tensor:
    """Return the log-probabilities [counted tokens, vocabulary] of a batch in float32, on the model's device.

    Raises:
        ModelError: NaN or Inf in the logits.
    """
    moved = batch.to(device)
    logits = model(**moved.inputs, **cached(model)).logits[:, :-1][moved.predicted].float()
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"{what} gives NaN or Inf; {EXPORT_AGAIN}, or check the original")
    return torch.log_softmax(logits, -1)


def on_split(split: str) -> str:
    """Return what the name of a phase adds for a held-out set with a name of its own."""
    return "" if split == DEFAULT_SPLIT else f" on {split}"


class _Store:
    """The original's log-probabilities, batch by batch: on the GPU where they fit, in memory, or in files."""

    def __init__(self, total_bytes: int, device: str) -> None:
        self.memory: list[torch.Tensor] = []
        self.count = 0
        on_gpu = device.startswith("cuda") and total_bytes < _GPU_SHARE * torch.cuda.mem_get_info(device)[0]
        self.device = device if on_gpu else "cpu"
        large = not on_gpu and total_bytes > MAX_REFERENCE_BYTES_IN_MEMORY
        self._stack = ExitStack()
        self.directory = self._stack.enter_context(scratch_directory()) if large else None

    def add(self, values: torch.Tensor) -> None:
        values = values.to(self.device)
        if self.directory is None:
            self.memory.append(values)
        else:
            save_file({"values": values}, self.directory / f"{self.count}.safetensors")
        self.count += 1

    def get(self, index: int) -> torch.Tensor:
        if self.directory is None:
            return self.memory[index]
        values: torch.Tensor = read_tensors(self.directory / f"{index}.safetensors")["values"]
        return values

    def close(self) -> None:
        self.memory = []
        self._stack.close()


def compare_with(
    model: Any, data: DataSet, store: _Store, device: str, what: str, progress: Progress, phase: str
) -> Sums:
    """Return the sums of KL(original ‖ model), the model's own NLL and the agreement, row by row."""
    sums = Sums()
    for index, batch in enumerate(data.batches):
        progress(phase, index, len(data.batches))
        ours = _log_probabilities(model, batch, device, f"{what}, batch {index},")
        add_rows(sums, batch, store.get(index), ours)
    progress(phase, len(data.batches), len(data.batches))
    check_nll(sums, what)
    return sums


@dataclass
class Reference:
    """What the original gives on one held-out set, in float32 and (as the noise floor) in BF16 arithmetic.

    A context manager: leaving it frees what is kept of the original's outputs.
    """

    data: DataSet
    device: str
    task: Task | None
    store: _Store
    perplexity: float
    bf16: Sums
    right: str | None  # the task's answers, a digit each
    bf16_right: str | None
    split: str = DEFAULT_SPLIT

    @classmethod
    @torch.no_grad()
    def compute(
        cls,
        directory: Path,
        data: DataSet,
        *,
        task: Task | None = None,
        split: str = DEFAULT_SPLIT,
        device: str = "cpu",
        progress: Progress = no_progress,
    ) -> Self:
        """Run the original on the data.

        Args:
            directory: the original.
            data: the samples of the set.
            task: what is answered beside.
            split: the name of the set.
            device: where everything runs.
            progress: told of every batch.

        Raises:
            ModelError: it can't be loaded, or gives NaN or Inf.
        """
        with told(progress, "load original"):
            model = load_model(directory, torch.float32, device)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        store = _Store(4 * data.summary.tokens * vocabulary, device)
        on = on_split(split)
        try:
            own = Sums()
            for index, batch in enumerate(data.batches):
                progress(f"evaluate original{on}", index, len(data.batches))
                values = _log_probabilities(model, batch, device, f"the original {directory}, batch {index},")
                store.add(values)
                add_rows(own, batch, values, values)
            progress(f"evaluate original{on}", len(data.batches), len(data.batches))
            check_nll(own, f"the original {directory}")
            right = task.right(model, device, progress, f"answer: original{on}") if task else None
            del model  # one model in memory at a time
            with told(progress, "load original in BF16"):
                model = load_model(directory, torch.bfloat16, device)
            phase = f"evaluate original in BF16{on}"
            bf16 = compare_with(model, data, store, device, f"{directory} in BF16", progress, phase)
            bf16_right = task.right(model, device, progress, f"answer: original in BF16{on}") if task else None
        except BaseException:  # a kill too: gigabytes in the temporary directory
            store.close()
            raise
        return cls(data, device, task, store, own.perplexity()[0], bf16, right, bf16_right, split)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()
