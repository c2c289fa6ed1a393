"""What a tokenizer puts before a text by itself (BOS), and what no row may hold.

A server tokenises a prompt with special tokens: Gemma's, Llama's and Mistral's then begin with BOS, Qwen's and
SmolLM2's don't. Models lean on that first token (attention rests on it), so every row that is measured begins as served
text does.
"""

from collections.abc import Sequence
from typing import Any

import torch

from bitladder.errors import DataError

_PROBES = ("a", "the", "1", " a")  # texts that every tokenizer knows; one is enough
# Attributes of processors and tokenizers that name the placeholder of a picture, a video or a sound.
_PLACEHOLDERS = ("image_token", "video_token", "audio_token", "boi_token", "eoi_token")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Return a text's token ids, without what the tokenizer puts around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def prefix_of(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before every text by itself: mostly BOS, or nothing.

    Found by tokenising a text both ways: attributes such as `add_bos_token` are missing or wrong in many files.

    Raises:
        DataError: a text isn't found again between its special tokens.
    """
    for probe in _PROBES:
        plain = ids_of(tokenizer, probe)
        whole = list(tokenizer(probe, add_special_tokens=True, verbose=False)["input_ids"])
        for start in range(len(whole) - len(plain) + 1) if plain else ():
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start])
    raise DataError(
        "the tokenizer gives a text other tokens when it adds its special ones; what rows begin with can't be told: "
        "check the model's tokenizer.json (post_processor)"
    )


def begun_once(tokenizer: Any, text: str) -> str:
    """Return a rendered chat that begins exactly once with what the tokenizer puts first, for use without adding any.

    Many chat templates write BOS themselves, some after white space; where one doesn't, the tokenizer would.

    Raises:
        DataError: the tokenizer doesn't know what it puts first where a text holds it.
    """
    prefix = prefix_of(tokenizer)
    before = "".join(tokenizer.convert_ids_to_tokens(list(prefix)))
    if prefix and tuple(ids_of(tokenizer, before)) != prefix:
        raise DataError(
            f"the tokenizer puts {before} before a text, but takes it for letters where a chat template writes it; "
            "declare it among the added_tokens of the model's tokenizer.json, or calibrate the model on text"
        )
    return text if text.lstrip().startswith(before) else before + text


def end_of_prefix(ids: Sequence[int], prefix: Sequence[int]) -> int:
    """Return the place behind a chat's prefix, which white space may stand before; 0: it has none."""
    size = len(prefix)
    places = range(len(ids) - size + 1) if size else ()
    return next((at + size for at in places if tuple(ids[at : at + size]) == tuple(prefix)), 0)


def document_ids(tokenizer: Any, text: str, prefix: Sequence[int]) -> list[int]:
    """Return a document's ids without a prefix that its own text wrote (chats that were rendered beforehand).

    It may stand there twice, as where a template wrote it and the tokenizer too, and behind white space.
    """
    size, whole = len(prefix), ids_of(tokenizer, text)
    inner = ids_of(tokenizer, text.lstrip()) if size and text[:1].isspace() else whole
    ids = inner if size and tuple(inner[:size]) == tuple(prefix) else whole
    while size and tuple(ids[:size]) == tuple(prefix):
        ids = ids[size:]
    return ids


def placeholders(processor: Any) -> frozenset[str]:
    """Return the tokens that stand for pictures, videos and sounds; empty: the model takes none."""
    if not hasattr(processor, "image_processor"):
        return frozenset()
    tokenizer = getattr(processor, "tokenizer", None)
    found = (getattr(owner, name, None) for owner in (processor, tokenizer) for name in _PLACEHOLDERS)
    return frozenset(str(getattr(one, "content", one)) for one in found if one)  # an AddedToken holds its word


def check_text(text: str, where: str, forbidden: frozenset[str]) -> None:
    """Check that a text can be tokenised, and that no part of it would be taken for a picture.

    Args:
        text: of one document, prompt, answer or turn.
        where: names the file and line.
        forbidden: see `placeholders`.

    Raises:
        DataError: half of a surrogate pair, or a placeholder; the message says what to do.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"{where} holds {code}, half of a surrogate pair, which is no character; remove it") from None
    held = next((token for token in sorted(forbidden) if token in text), None)
    if held is not None:
        raise DataError(
            f"{where} holds {held}, which the model takes for a picture; remove it (kind image_text places pictures)"
        )


def check_pictured(ids: torch.Tensor, image_tokens: Sequence[int]) -> None:
    """Raise where a pair has no token that the model takes for a piece of a picture, so that it would fail on it.

    Args:
        ids: of pairs, [pairs, tokens].
        image_tokens: those of the model's configuration; empty: it names none, nothing is checked.

    Raises:
        DataError: processor and configuration disagree.
    """
    if image_tokens and not torch.isin(ids, torch.tensor(image_tokens)).any(-1).all():
        named = ", ".join(map(str, image_tokens))
        raise DataError(
            f"the processor writes no token that config.json names for pictures ({named}: image_token_id or "
            "image_token_index); take config.json and the processor's files of one model"
        )


def check_ids(ids: torch.Tensor, vocabulary: int | None, tokenizer: Any, where: str) -> None:
    """Check that the model has an embedding for every token.

    Args:
        ids: of any shape.
        vocabulary: rows of the model's embedding; None: not known, nothing is checked.
        tokenizer: names the token.
        where: names the data.

    Raises:
        DataError: a token id beyond the embedding.
    """
    if vocabulary is None or ids.numel() == 0 or int(ids.max()) < vocabulary:
        return
    worst = int(ids.max())
    raise DataError(
        f"{where}: token {worst} ({tokenizer.convert_ids_to_tokens(worst)!r}) is beyond the model's embedding of "
        f"{vocabulary} tokens; remove it from the text, or take the tokenizer that belongs to the model"
    )
