"""The log-probabilities that a checkpoint's files imply, for comparison with what a runtime computes from them.

`sequences(data, ...)` makes the runtime's questions of a held-out set; `log_probs(directory, data)` answers them by our
own evaluation: float32, weights dequantised, inputs of quantised linears rounded with the stored scale. The original
goes through the same: its distance to the runtime is then the runtime's own noise, above all that of BF16 arithmetic.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from bitladder.data.batches import Batch, DataSet
from bitladder.errors import ModelError
from bitladder.evaluation.reading import cached, load_checkpoint
from bitladder.formats import Arithmetic
from bitladder.models.weights import read_config
from bitladder.runtimes.vllm.job import LogProbs, ScoredSequence

# What config.json calls the token that stands for a piece of a picture. Source: transformers, Qwen2_5_VLConfig
# (image_token_id), LlavaConfig (image_token_index in older files).
_IMAGE_TOKEN_KEYS = ("image_token_id", "image_token_index")


def _image_token(directory: Path) -> int | None:
    """Return the id of the placeholder of a picture; None: the model takes none."""
    config = read_config(directory)
    return next((int(config[key]) for key in _IMAGE_TOKEN_KEYS if config.get(key) is not None), None)


def _rows(batch: Batch) -> Iterator[tuple[list[int], list[int]]]:
    """Yield each row's token ids without its padding, and the positions of the tokens that count."""
    for ids, mask, labels in zip(
        batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.predicted, strict=True
    ):
        length = int(mask.sum())
        if not bool(mask[:length].all()):
            raise ModelError("rows must be padded on the right for their log-probabilities to be compared")
        yield ids[:length].tolist(), [int(position) + 1 for position in labels.nonzero()[:, 0]]


def _folded(ids: Sequence[int], placeholder: int | None) -> tuple[int, ...]:
    """Return the ids with each run of placeholders as one, which the runtime unfolds for its picture."""
    return tuple(t for i, t in enumerate(ids) if t != placeholder or i == 0 or ids[i - 1] != placeholder)


def sequences(data: DataSet, split: str, directory: Path) -> tuple[ScoredSequence, ...]:
    """Return one sequence a row of a held-out set.

    Args:
        data: text rows or image+text pairs.
        split: the name of the set.
        directory: the model or one of its checkpoints; its config.json names the placeholder of a picture.
    """
    placeholder = _image_token(directory) if data.samples else None
    images = [sample.image for sample in data.samples]
    rows = [row for batch in data.batches for row in _rows(batch)]
    return tuple(
        ScoredSequence(
            split=split,
            token_ids=tuple(ids),
            prompt_ids=_folded(ids, placeholder),
            counted=tuple(positions),
            image=images[index] if images else None,
        )
        for index, (ids, positions) in enumerate(rows)
    )


@torch.no_grad()
def log_probs(
    directory: Path,
    data: Sequence[DataSet],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    arithmetic: Mapping[str, Arithmetic] = MappingProxyType({}),
) -> LogProbs:
    """Return the log-probability in nats of each counted token: one tuple a row, over all sets, as `sequences` counts.

    Args:
        directory: a checkpoint in ModelOpt's FP8 layout, or the original.
        data: the held-out sets, in the order of the sequences.
        device: where it runs.
        dtype: of weights and arithmetic.
        arithmetic: format -> how the device that serves computes it, where that isn't as it is stored.

    Raises:
        ModelError: the files can't be used.
    """
    model = load_checkpoint(directory, dtype, device, arithmetic)
    rows = log_probs_of(model, data, device)
    if device.startswith("cuda"):
        del model
        torch.cuda.empty_cache()  # the runtime is served on the same GPU next, and asks for nearly all of it
    return rows


@torch.no_grad()
def log_probs_of(model: torch.nn.Module, data: Sequence[DataSet], device: str) -> LogProbs:
    """Return what a loaded checkpoint gives each counted token, as `log_probs` does."""
    return tuple(row for one in data for batch in one.batches for row in _batch_log_probs(model, batch.to(device)))


def _batch_log_probs(model: torch.nn.Module, batch: Batch) -> Iterator[tuple[float, ...]]:
    logits = model(**batch.inputs, **cached(model)).logits[:, :-1]
    for row, ids, counted in zip(logits, batch.inputs["input_ids"][:, 1:], batch.predicted, strict=True):
        own = torch.log_softmax(row[counted].float(), -1)
        yield tuple(own.gather(-1, ids[counted][:, None])[:, 0].tolist())
