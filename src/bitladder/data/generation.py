"""Rows of tokens that a model writes itself, to calibrate on: `rows(...) -> [samples, sequence_length]`.

Every row begins with what the tokenizer puts before a text by itself (BOS). Where that is nothing, the model is given a
token that ends or begins texts, which no row keeps: served text has none at its start. What follows is drawn from the
model's own distribution: no top-k, no penalty, and an EOS token doesn't end a row. Tokens that stand for pictures, and
ids that the tokenizer doesn't know, are never drawn. Each row has random
numbers of its own, from the seed and its number, so that asking for more rows keeps the first ones.

Rows are written once and kept, since a GPU needn't give the same ones again and a measurement belongs to its samples:

    generated/<key>.safetensors    `tokens` [samples, sequence_length], int32; the key is the digest of what they depend
                                   on: model, seed, temperature, sizes, arithmetic
"""

import gc
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bitladder.data.special import prefix_of
from bitladder.device import resolve_device, resolve_dtype, without_cudnn_attention
from bitladder.errors import DataError, ModelError, RecordError
from bitladder.models.loading import image_token_ids, load_model
from bitladder.reading import open_safetensors
from bitladder.records import digest_of
from bitladder.runinfo import Progress, no_progress
from bitladder.storage import atomic_path, sha256_of_bytes

DIRECTORY = "generated"
PHASE = "write rows"
_TOKENS_AT_ONCE = 16_384  # in the KV cache; an 8B model's take 2 GB
_METHOD = "2"  # part of the key: raised when the same settings give other rows


@dataclass(frozen=True)
class Writing:
    """What the model is asked to write; `dtype` and `device` as in the recipe, which a measurement is known by too.

    samples, sequence_length: rows, and tokens a row. start: ids that the model is given first. kept: whether rows hold
    them. known_tokens: ids from this one on are not the tokenizer's.
    """

    samples: int
    sequence_length: int
    seed: int
    temperature: float
    start: tuple[int, ...]
    kept: bool
    known_tokens: int
    dtype: str
    device: str

    def key(self, model_sha256: str) -> str:
        """Return the digest of everything that decides the rows."""
        return digest_of([_METHOD, model_sha256, repr(self)])


def start_of(tokenizer: Any) -> tuple[tuple[int, ...], bool]:
    """Return the ids that the model is given before it writes, and whether rows hold them, as served text would.

    Raises:
        DataError: the tokenizer puts nothing before a text, and has no special token.
    """
    prefix = prefix_of(tokenizer)
    if prefix:
        return prefix, True
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, *tokenizer.all_special_ids):
        if token is not None:
            return (int(token),), False
    raise DataError("the tokenizer has no special token for a text to begin with; calibrate on text instead")


def file_of(output: Path, writing: Writing, model_sha256: str) -> Path:
    """Return where the rows are kept in a run's directory."""
    return output / DIRECTORY / f"{writing.key(model_sha256)}.safetensors"


def write(directory: Path, writing: Writing, path: Path, progress: Progress = no_progress) -> None:
    """Load the model in `directory`, have it write, and keep the rows at `path`.

    Raises:
        ModelError: it can't be loaded, or gives NaN or Inf. DataError: out of GPU memory.
        MeasurementError: there is no such device.
    """
    device = resolve_device(writing.device)
    model = load_model(directory, resolve_dtype(writing.dtype, device), device)
    try:
        tokens = rows(model, writing, progress).to(torch.int32)
    except torch.OutOfMemoryError as error:
        raise DataError(
            "out of GPU memory while the model writes rows of kind generated; shorten sequence_length, or set "
            "measurement.device: cpu"
        ) from error
    del model
    gc.collect()  # modules refer to each other: `del` frees nothing yet
    torch.cuda.empty_cache()
    with atomic_path(path) as temporary:
        save_file({"tokens": tokens}, temporary, metadata={"key": path.stem, "sha256": _digest(tokens)})


def read(path: Path, writing: Writing) -> torch.Tensor:
    """Return the rows that are kept at `path`, int64 [samples, sequence_length].

    Raises:
        RecordError: the file is damaged, or other rows than those asked for; the message says what to do.
    """
    try:
        with open_safetensors(path) as file:
            tokens: torch.Tensor = file.get_tensor("tokens")
            whole = file.metadata() == {"key": path.stem, "sha256": _digest(tokens)}
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} can't be read ({error}); delete it, and the model writes its rows again") from error
    if not whole or tuple(tokens.shape) != (writing.samples, writing.sequence_length):
        raise RecordError(f"{path} is not as it was written; delete it, and the model writes its rows again")
    return tokens.long()


def copy_rows(source: Path, destination: Path) -> None:
    """Copy the rows that one run's directory keeps, if any, to another's."""
    for path in sorted((source / DIRECTORY).glob("*.safetensors")):
        with atomic_path(destination / DIRECTORY / path.name) as temporary:
            shutil.copyfile(path, temporary)


def _digest(tokens: torch.Tensor) -> str:
    return sha256_of_bytes(tokens.contiguous().view(torch.uint8).numpy().data)


@torch.no_grad()
def rows(model: Any, writing: Writing, progress: Progress = no_progress) -> torch.Tensor:
    """Return what the model writes, int64 [samples, sequence_length] on the CPU. Its generation settings are lost.

    Raises:
        ModelError: its logits hold NaN or Inf.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    model.generation_config = GenerationConfig()  # a model's own has penalties and a token to stop at
    steps = writing.sequence_length - (len(writing.start) if writing.kept else 0)
    at_once = max(1, _TOKENS_AT_ONCE // writing.sequence_length)
    found = []
    for first in range(0, writing.samples, at_once):
        some = range(first, min(first + at_once, writing.samples))
        numbers = torch.stack([_random_numbers(writing.seed, row, steps) for row in some])

        def told(step: int, before: int = first, count: int = len(some)) -> None:
            progress(PHASE, before * steps + count * step, writing.samples * steps)

        ids = torch.tensor([writing.start] * len(some), device=model.device)
        draw = _Draw(numbers.to(model.device), writing, image_token_ids(model.config), told)
        with without_cudnn_attention():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=steps,
                do_sample=False,  # `_Draw` leaves one token to choose from
                logits_processor=LogitsProcessorList([draw]),
            )
        found.append(output[:, -writing.sequence_length :].cpu())
    progress(PHASE, writing.samples * steps, writing.samples * steps)
    return torch.cat(found)


def _random_numbers(seed: int, row: int, steps: int) -> torch.Tensor:
    """Return a row's random numbers [steps], uniform in [0, 1)."""
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(steps, generator=generator)


class _Draw:
    """Draws each row's next token; a logits processor that leaves the token drawn, and nothing else."""

    def __init__(self, numbers: torch.Tensor, writing: Writing, never: list[int], told: Callable[[int], None]) -> None:
        self.numbers, self.writing, self.never, self.told = numbers, writing, never, told

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [rows, vocabulary] that are 0 for the token drawn and -inf for all others.

        Args:
            input_ids: what is written so far, [rows, tokens].
            scores: the model's logits, [rows, vocabulary].
        """
        step = input_ids.shape[1] - len(self.writing.start)
        self.told(step)
        logits = scores.float() / self.writing.temperature
        logits[:, self.never] = -torch.inf
        logits[:, self.writing.known_tokens :] = -torch.inf
        shares = torch.softmax(logits, -1).cumsum(-1, dtype=torch.float64)
        if not bool(torch.isfinite(shares[:, -1]).all()):
            raise ModelError("the model gives NaN or Inf while it writes; check it, or set measurement.dtype: float32")
        # A random number has 24 bits and the sums 53, so that it stays below the last sum: what is drawn has a share.
        drawn = torch.searchsorted(shares, self.numbers[:, step, None].double() * shares[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)
