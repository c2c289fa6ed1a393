"""Text sources as rows of tokens."""

from typing import Any

import torch

from bitladder.data.files import documents, of_a_file
from bitladder.data.processors import tokenizer_of
from bitladder.data.special import check_text, document_ids, placeholders, prefix_of
from bitladder.errors import DataError
from bitladder.recipe import MESSAGES, DataSpec

_ROWS_PER_SAMPLE = 8  # rows of a data set that one sample is chosen from; what lies beyond isn't read


def pool_size(spec: DataSpec, samples: int, avoided: int) -> int | None:
    """Return from how many of a source's first rows samples are chosen; None: from all, a file is read whole."""
    streamed = spec.kind == "huggingface" or (spec.kind == MESSAGES and not of_a_file(spec))
    return _ROWS_PER_SAMPLE * samples + avoided if streamed else None


def token_rows(spec: DataSpec, processor: Any, length: int, samples: int, avoided: int = 0) -> tuple[torch.Tensor, int]:
    """Return the source's rows of `length` tokens, [rows, length], and how many nulls were left out.

    Documents are separated by the EOS token.

    Every row begins with what the tokenizer puts before a text by itself (`special.prefix_of`), and goes on with the
    next slice of the stream. Within a row it doesn't come again: one prompt holds it once, however many documents.

    Args:
        spec: where the texts come from.
        processor: the model's processor or tokenizer.
        length: tokens a row.
        samples: rows that are asked for.
        avoided: rows at most that won't be taken.

    Raises:
        DataError: malformed data, no text at all, or rows that are too short to hold any.
    """
    tokenizer, forbidden = tokenizer_of(processor), placeholders(processor)
    prefix, most = prefix_of(tokenizer), pool_size(spec, samples, avoided)
    taken = length - len(prefix)
    if taken < 1:
        raise DataError(f"sequence_length {length} holds only what the tokenizer puts first; use at least {length + 1}")
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    empty, nulls = True, 0
    for where, text in documents(spec):
        if text is None:
            nulls += 1
            continue
        check_text(text, where, forbidden)
        if not empty and stream[-1:] != separator:  # a text may end with it by itself
            stream += separator
        stream += document_ids(tokenizer, text, prefix)
        empty = False
        if most is not None and len(stream) >= most * taken:
            break
    if empty:
        nothing = "empty or null" if nulls else "empty"
        raise DataError(
            f"{spec.path} holds no text: every text in it is {nothing}, so it holds 0 rows of {length} tokens; "
            f"{samples} were asked for: give data with text in it"
        )
    rows = len(stream) // taken if most is None else min(most, len(stream) // taken)
    cut = torch.tensor(stream[: rows * taken], dtype=torch.long).view(rows, taken)
    begun = torch.cat([torch.tensor(prefix, dtype=torch.long).expand(rows, -1), cut], 1) if prefix else cut
    return begun, nulls
