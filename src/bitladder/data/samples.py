"""Text and image+text samples as batches, with a fingerprint, and a held-out split that is proved to be one.

Text is tokenised and cut into rows of `sequence_length` tokens: no padding, every position counts. A row begins with
what the tokenizer puts before a text by itself (BOS), as in service. An image+text pair goes
through the processor's chat template as a user's picture and prompt and the assistant's answer; only the answer's
tokens carry a label. Conversations go through the template too (`messages`). Labels follow the convention of
transformers: `labels[b, t] = input_ids[b, t]` where the token counts, -100 elsewhere; the model predicts it from
position t - 1.

Several sets become one (`interleaved`): every batch is of one set, and the first batches are a fair mixture of all.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch

from bitladder.data.batches import IGNORED_LABEL, Batch, DataSet, fingerprint
from bitladder.data.messages import load_conversations
from bitladder.data.pairs import Sample, check_samples, encode, samples_of
from bitladder.data.processors import tokenizer_of
from bitladder.data.special import check_ids, check_pictured, prefix_of
from bitladder.data.text import token_rows
from bitladder.errors import DataError
from bitladder.recipe import GENERATED, MESSAGES, PAIR_KINDS, DataSpec
from bitladder.records import DataSummary
from bitladder.storage import sha256_of_bytes

GENERATED_SOURCE = "the model itself"  # of data of kind generated, which has no path


def load_data(
    spec: DataSpec,
    processor: Any,
    *,
    samples: int,
    sequence_length: int,
    batch_size: int,
    seed: int,
    avoid: DataSummary | None = None,
    written: torch.Tensor | None = None,
    vocabulary: int | None = None,
    image_tokens: Sequence[int] = (),
) -> DataSet:
    """Return `samples` samples of a source as batches, chosen by a shuffle with `seed`.

    Args:
        spec: where they come from.
        processor: the model's processor or tokenizer (`load_processor`).
        samples: rows of tokens, conversations, or image+text pairs.
        sequence_length: tokens a row; the most that a pair may have; what a conversation is cut to.
        batch_size: rows a batch.
        seed: of the shuffle.
        avoid: samples of this data set are passed over, so that held-out data is what calibration never saw.
        written: the rows [samples, sequence_length] of a source of kind generated (`generation`).
        vocabulary: rows of the model's embedding, which every token id must be among; None: not checked.
        image_tokens: ids that stand for pieces of pictures in the model, one of which every pair must have.

    Raises:
        DataError: missing, malformed, empty or too short data; the message says how much there is.
    """
    avoided = set(avoid.sample_ids) if avoid is not None else set()
    if spec.kind == MESSAGES:
        return load_conversations(
            spec,
            processor,
            samples=samples,
            sequence_length=sequence_length,
            batch_size=batch_size,
            seed=seed,
            avoided=frozenset(avoided),
            vocabulary=vocabulary,
        )
    pairs: list[Sample] = []
    rows, nulls = torch.empty(0), 0
    if spec.kind in PAIR_KINDS:
        if not hasattr(processor, "image_processor"):
            raise DataError(
                "the model takes no images, or its preprocessor_config.json is missing; add that file, or calibrate it "
                "on text"
            )
        pairs = samples_of(spec)
        ids = [sample.digest for sample in pairs]
        unit = "image+text pairs"
    else:
        if spec.kind == GENERATED:
            if written is None:
                raise DataError("data of kind generated is written by the model: give its rows")
            rows = written
        else:
            rows, nulls = token_rows(spec, processor, sequence_length, samples, len(avoided))
        ids = [sha256_of_bytes(row.numpy().tobytes()) for row in rows]
        unit = f"rows of {sequence_length} tokens"
    order = list(range(len(ids)))
    random.Random(seed).shuffle(order)
    chosen = [index for index in order if ids[index] not in avoided][:samples]
    if len(chosen) < samples:
        if spec.kind == GENERATED:
            raise DataError(f"what the model writes with seed {seed} is used already; give this set another seed")
        left = f", {len(chosen)} of them not used by other sets" if avoided else ""
        raise DataError(
            f"{spec.path} holds {len(ids)} {unit}{left}; {samples} were asked for: "
            f"ask for fewer samples, {'' if spec.kind in PAIR_KINDS else 'shorten sequence_length, '}or give more data"
        )
    if spec.kind in PAIR_KINDS:
        # Pairs of similar length share a batch: less padding, and padding is calibrated on too.
        chosen.sort(key=lambda index: len(pairs[index].prompt) + len(pairs[index].text))
        picked = [pairs[index] for index in chosen]
        check_samples(picked, processor)
        batches = tuple(
            _pair_batch(picked[start : start + batch_size], processor, sequence_length)
            for start in range(0, samples, batch_size)
        )
    else:
        picked = []
        begin = len(prefix_of(tokenizer_of(processor)))
        batches = tuple(
            _text_batch(rows[chosen[start : start + batch_size]], begin) for start in range(0, samples, batch_size)
        )
    for batch in batches:
        check_ids(batch.inputs["input_ids"], vocabulary, tokenizer_of(processor), spec.path or GENERATED_SOURCE)
        if spec.kind in PAIR_KINDS:
            check_pictured(batch.inputs["input_ids"], image_tokens)
    tokens = [batch.loss_tokens for batch in batches]
    if min(tokens) == 0:
        raise DataError(f"{spec.path}: a batch has no token that counts for the loss; its texts are empty")
    summary = DataSummary(
        source=spec.path or GENERATED_SOURCE,
        kind=spec.kind,
        sha256=fingerprint(batches),
        samples=samples,
        tokens=sum(tokens),
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        sample_ids=tuple(ids[index] for index in chosen),
        null_rows=nulls,
    )
    return DataSet(batches, summary, tuple(picked))


def _pair_batch(samples: Sequence[Sample], processor: Any, length: int) -> Batch:
    """Return one right-padded batch of pairs; only the answer's tokens carry a label."""
    inputs = encode(samples, processor, with_answer=True, padding_side="right")
    prompts = encode(samples, processor, with_answer=False, padding_side="right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = ids.clone()
    labels[mask == 0] = IGNORED_LABEL
    for row, sample in enumerate(samples):
        prompt_length = int(prompts["attention_mask"][row].sum())
        total = int(mask[row].sum())
        if total > length:
            raise DataError(
                sample.located(
                    f"an image+text pair ({sample.text[:40]!r}) has {total} tokens, sequence_length is {length}; "
                    "raise it or use smaller images"
                )
            )
        if not torch.equal(ids[row, :prompt_length], prompts["input_ids"][row, :prompt_length]):
            raise DataError(
                "the chat template or the processor changes the prompt when an answer follows, so labels can't be "
                "placed; calibrate the model on text"
            )
        labels[row, :prompt_length] = IGNORED_LABEL
    return Batch(inputs, labels)


def _text_batch(rows: torch.Tensor, begin: int) -> Batch:
    """Return rows of text as a batch; of the `begin` tokens that the tokenizer puts first none counts."""
    labels = rows.clone()
    labels[:, 1:begin] = IGNORED_LABEL  # the first position never counts
    return Batch({"input_ids": rows, "attention_mask": torch.ones_like(rows)}, labels)
