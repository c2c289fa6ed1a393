"""Text and image+text samples as batches, with a fingerprint, and a held-out split that is proved to be one.

Text is tokenised and cut into rows of `sequence_length` tokens: no padding, every position counts. An image+text pair
goes through the processor's chat template as a user's picture and prompt and the assistant's answer; only the answer's
tokens carry a label. Labels follow the convention of transformers: `labels[b, t] = input_ids[b, t]` where the token
counts, -100 elsewhere; the model predicts it from position t - 1.

Several sets become one (`interleaved`): every batch is of one set, and the first batches are a fair mixture of all.
"""

import base64
import hashlib
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from bitladder.errors import DataError, ModelError
from bitladder.recipe import GENERATED, PAIR_KINDS, DataSpec
from bitladder.records import DataSummary, digest_of
from bitladder.storage import sha256_of_bytes

IGNORED_LABEL = -100
GENERATED_SOURCE = "the model itself"  # of data of kind generated, which has no path
MIXED = "mixed"  # the kind of several sets in one


@dataclass(frozen=True)
class Sample:
    """One image+text pair."""

    image: str  # absolute path, or a `data:` URI
    prompt: str
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 over image reference, prompt and answer."""
        return digest_of([self.image, self.prompt, self.text])

    def load_image(self) -> Image.Image:
        """Return the picture in RGB.

        Raises:
            DataError: missing or not an image.
        """
        try:
            if self.image.startswith("data:"):
                raw: Any = io.BytesIO(base64.b64decode(self.image.partition(",")[2]))
            else:
                raw = self.image
            with Image.open(raw) as image:
                return image.convert("RGB")
        except (OSError, UnidentifiedImageError, ValueError) as error:
            shown = self.image if len(self.image) < 200 else self.image[:60] + "…"
            raise DataError(f"image {shown} can't be read ({error}); fix or remove the sample") from error


@dataclass(frozen=True)
class Batch:
    """What the model is given, and which tokens count.

    inputs: `input_ids` [rows, tokens], `attention_mask` [rows, tokens], and what the processor adds for images.
    labels: [rows, tokens], -100 where a token doesn't count.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor

    @property
    def predicted(self) -> torch.Tensor:
        """Boolean mask [rows, tokens - 1] of the positions whose next token counts."""
        return self.labels[:, 1:] != IGNORED_LABEL

    @property
    def loss_tokens(self) -> int:
        """Number of tokens that count."""
        return int(self.predicted.sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with all tensors on `device`."""
        return Batch({key: value.to(device) for key, value in self.inputs.items()}, self.labels.to(device))


@dataclass(frozen=True)
class DataSet:
    """Batches, what they came from, and the pairs themselves, in the order of the rows (one image+text set alone)."""

    batches: tuple[Batch, ...]
    summary: DataSummary
    samples: tuple[Sample, ...] = ()


def load_processor(directory: Path) -> Any:
    """Return the model's processor where it takes images, else its tokenizer.

    Without torchvision, transformers can't build the video half of some processors; pictures don't need it, so it is
    left out then.

    Raises:
        ModelError: the directory has no usable tokenizer or processor.
    """
    from transformers import AutoProcessor, AutoTokenizer

    takes_images = (directory / "preprocessor_config.json").exists() or (directory / "processor_config.json").exists()
    try:
        if not takes_images:
            return AutoTokenizer.from_pretrained(directory)
        try:
            return AutoProcessor.from_pretrained(directory)
        except ImportError as error:
            if "orchvision" not in str(error):
                raise
            return _image_processor_only(directory)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{directory} has no usable tokenizer or processor: {reason}") from error


def _image_processor_only(directory: Path) -> Any:
    """Return the model's processor without its video half."""
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer

    name = json.loads((directory / "preprocessor_config.json").read_text()).get("processor_class", "")
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ModelError(f"{directory / 'preprocessor_config.json'} names no processor_class that transformers has")

    class ImagesOnly(cls):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    tokenizer = AutoTokenizer.from_pretrained(directory)
    image_processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    return ImagesOnly(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=tokenizer.chat_template,
    )


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer inside a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist; check the recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data file {path} can't be read as UTF-8 text ({error})") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSONL file."""
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON ({error.msg}); one object a line is expected") from error
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number} is not a JSON object")
        yield number, row


def _documents(spec: DataSpec) -> list[str]:
    """Return the texts of a `text`, `jsonl` or `huggingface` source."""
    if spec.kind == "text":
        return [_read_text(Path(spec.path))]
    if spec.kind == "jsonl":
        texts = []
        for number, row in _jsonl_rows(Path(spec.path)):
            if not isinstance(row.get(spec.text_field), str):
                raise DataError(
                    f"{spec.path} line {number} has no text in '{spec.text_field}'; it has {', '.join(row)}; "
                    "set data.text_field"
                )
            texts.append(row[spec.text_field])
        return texts
    try:
        import datasets
    except ImportError:
        raise DataError("data of kind huggingface needs 'datasets': pip install 'bitladder[data]'") from None
    try:
        rows = datasets.load_dataset(spec.path, spec.subset, split=spec.split or "train")
    except Exception as error:  # `datasets` raises whatever its readers and the network raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"data set {spec.path} (split {spec.split or 'train'}) can't be loaded: {reason}") from error
    if spec.text_field not in rows.column_names:
        raise DataError(
            f"data set {spec.path} has no column '{spec.text_field}'; it has {', '.join(rows.column_names)}; "
            "set data.text_field"
        )
    return [str(text) for text in rows[spec.text_field]]


def _token_rows(spec: DataSpec, tokenizer: Any, length: int) -> torch.Tensor:
    """Return all rows of `length` tokens in the source, [rows, length]; documents are separated by the EOS token."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    documents = _documents(spec)
    for index, text in enumerate(documents):
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if index + 1 < len(documents):
            stream += separator
    rows = len(stream) // length
    return torch.tensor(stream[: rows * length], dtype=torch.long).view(rows, length)


def _coco_samples(spec: DataSpec) -> list[Sample]:
    """Return one pair an image of a COCO directory, in the order of the image ids: its caption of the lowest id.

    Source: cocodataset.org, caption annotations: `images[].{id, file_name}`, `annotations[].{id, image_id, caption}`.
    """
    root, split = Path(spec.path), spec.split or "train2017"
    if not root.is_dir():
        raise DataError(
            f"COCO directory {root} does not exist; it holds <split>/*.jpg and annotations/captions_<split>.json"
        )
    path = root / (spec.annotations or f"annotations/captions_{split}.json")
    try:
        content = json.loads(_read_text(path))
        names = {entry["id"]: str(entry["file_name"]) for entry in content["images"]}
        captions: dict[Any, str] = {}
        for entry in sorted(content["annotations"], key=lambda entry: entry["id"]):
            captions.setdefault(entry["image_id"], str(entry["caption"]).strip())
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a file of COCO captions ({type(error).__name__}: {error})") from error
    images = root / split
    if not images.is_dir():
        found = ", ".join(sorted(entry.name for entry in root.iterdir() if entry.is_dir())) or "nothing"
        raise DataError(f"COCO directory {root} has no images in {split}/; it has {found}: set data.split")
    return [
        Sample(image=str(images / names[image]), prompt=spec.prompt, text=captions[image])
        for image in sorted(set(names) & set(captions))
        if captions[image]
    ]


def _samples(spec: DataSpec) -> list[Sample]:
    """Return the image+text pairs of a JSONL file or a COCO directory."""
    if spec.kind == "coco":
        return _coco_samples(spec)
    path = Path(spec.path)
    samples = []
    for number, row in _jsonl_rows(path):
        for field in ("image", spec.text_field):
            if not isinstance(row.get(field), str) or not row[field]:
                raise DataError(
                    f"{path} line {number} has no '{field}'; an image_text line is "
                    f'{{"image": path or data: URI, "prompt": question (optional), "{spec.text_field}": answer}}'
                )
        image = row["image"]
        if not image.startswith("data:"):
            image = str(path.parent / image)
        samples.append(Sample(image=image, prompt=row.get("prompt", spec.prompt), text=row[spec.text_field]))
    return samples


def _messages(sample: Sample, *, with_answer: bool) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.prompt}]}
    ]
    if with_answer:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": sample.text}]})
    return turns


def _encode(samples: Sequence[Sample], processor: Any, *, with_answer: bool, padding_side: str) -> dict[str, Any]:
    """Return the processor's tensors for `samples`, padded on one side."""
    texts = [
        processor.apply_chat_template(
            _messages(sample, with_answer=with_answer), tokenize=False, add_generation_prompt=not with_answer
        )
        for sample in samples
    ]
    encoded = processor(
        text=texts,
        images=[sample.load_image() for sample in samples],
        padding=True,
        padding_side=padding_side,
        return_tensors="pt",
    )
    return dict(encoded)


def prompt_inputs(samples: Sequence[Sample], processor: Any) -> dict[str, torch.Tensor]:
    """Return the model's inputs up to the assistant's turn, left-padded, for generating the answers."""
    return _encode(samples, processor, with_answer=False, padding_side="left")


def _pair_batch(samples: Sequence[Sample], processor: Any, length: int) -> Batch:
    """Return one right-padded batch of pairs; only the answer's tokens carry a label."""
    inputs = _encode(samples, processor, with_answer=True, padding_side="right")
    prompts = _encode(samples, processor, with_answer=False, padding_side="right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    labels = ids.clone()
    labels[mask == 0] = IGNORED_LABEL
    for row, sample in enumerate(samples):
        prompt_length = int(prompts["attention_mask"][row].sum())
        total = int(mask[row].sum())
        if total > length:
            raise DataError(
                f"an image+text pair ({sample.text[:40]!r}) has {total} tokens, sequence_length is {length}; "
                "raise it or use smaller images"
            )
        if not torch.equal(ids[row, :prompt_length], prompts["input_ids"][row, :prompt_length]):
            raise DataError("the chat template changes the prompt when an answer follows; labels can't be placed")
        labels[row, :prompt_length] = IGNORED_LABEL
    return Batch(inputs, labels)


def _fingerprint(batches: Sequence[Batch]) -> str:
    """Return the hex SHA-256 over every tensor that the model is given, with names, dtypes and shapes."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in [*sorted(batch.inputs.items()), ("labels", batch.labels)]:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
) -> DataSet:
    """Return `samples` samples of a source as batches, chosen by a shuffle with `seed`.

    Args:
        spec: where they come from.
        processor: the model's processor or tokenizer (`load_processor`).
        samples: rows of tokens, or image+text pairs.
        sequence_length: tokens a row; the most that a pair may have.
        batch_size: rows a batch.
        seed: of the shuffle.
        avoid: samples of this data set are passed over, so that held-out data is what calibration never saw.
        written: the rows [samples, sequence_length] of a source of kind generated (`generation`).

    Raises:
        DataError: missing, malformed, empty or too short data; the message says how much there is.
    """
    avoided = set(avoid.sample_ids) if avoid is not None else set()
    pairs: list[Sample] = []
    rows = torch.empty(0)
    if spec.kind in PAIR_KINDS:
        if not hasattr(processor, "image_processor"):
            raise DataError("the model takes no images; calibrate it on text")
        pairs = _samples(spec)
        ids = [sample.digest for sample in pairs]
        unit = "image+text pairs"
    else:
        if spec.kind == GENERATED:
            if written is None:
                raise DataError("data of kind generated is written by the model: give its rows")
            rows = written
        else:
            rows = _token_rows(spec, tokenizer_of(processor), sequence_length)
        ids = [sha256_of_bytes(row.numpy().tobytes()) for row in rows]
        unit = f"rows of {sequence_length} tokens"
    order = list(range(len(ids)))
    random.Random(seed).shuffle(order)
    chosen = [index for index in order if ids[index] not in avoided][:samples]
    if len(chosen) < samples:
        if spec.kind == GENERATED:
            raise DataError(f"what the model writes with seed {seed} is used already; give this set another seed")
        left = f", {len(chosen)} of them not used for calibration" if avoided else ""
        raise DataError(
            f"{spec.path} holds {len(ids)} {unit}{left}; {samples} were asked for: "
            "ask for fewer samples, shorten sequence_length, or give more data"
        )
    if spec.kind in PAIR_KINDS:
        # Pairs of similar length share a batch: less padding, and padding is calibrated on too.
        chosen.sort(key=lambda index: len(pairs[index].prompt) + len(pairs[index].text))
        picked = [pairs[index] for index in chosen]
        batches = tuple(
            _pair_batch(picked[start : start + batch_size], processor, sequence_length)
            for start in range(0, samples, batch_size)
        )
    else:
        picked = []
        batches = tuple(
            _text_batch(rows[chosen[start : start + batch_size]]) for start in range(0, samples, batch_size)
        )
    tokens = [batch.loss_tokens for batch in batches]
    if min(tokens) == 0:
        raise DataError(f"{spec.path}: a batch has no token that counts for the loss; its texts are empty")
    summary = DataSummary(
        source=spec.path or GENERATED_SOURCE,
        kind=spec.kind,
        sha256=_fingerprint(batches),
        samples=samples,
        tokens=sum(tokens),
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        sample_ids=tuple(ids[index] for index in chosen),
    )
    return DataSet(batches, summary, tuple(picked))


def interleaved(sets: Sequence[DataSet]) -> DataSet:
    """Return several sets as one; a single set as it is.

    A batch stands where its middle lies in its own set, as a share of the set's samples. So the first N batches hold
    about the same share of every set, and the same sets give the same order.

    Args:
        sets: at least one; each keeps its batches, in their order.
    """
    if len(sets) == 1:
        return sets[0]
    places: list[tuple[Fraction, int, Batch]] = []
    for index, one in enumerate(sets):
        before = 0
        for batch in one.batches:
            rows = len(batch.labels)
            places.append((Fraction(2 * before + rows, 2 * one.summary.samples), index, batch))
            before += rows
    batches = tuple(place[2] for place in sorted(places, key=lambda place: place[:2]))
    parts = [one.summary for one in sets]
    summary = DataSummary(
        source=" + ".join(part.source for part in parts),
        kind=MIXED,
        sha256=_fingerprint(batches),
        samples=sum(part.samples for part in parts),
        tokens=sum(part.tokens for part in parts),
        sequence_length=max(part.sequence_length for part in parts),
        batch_size=max(part.batch_size for part in parts),
        seed=parts[0].seed,
        sample_ids=tuple(sample for part in parts for sample in part.sample_ids),
        parts=tuple(part.model_copy(update={"sample_ids": ()}) for part in parts),
    )
    return DataSet(batches, summary)


def _text_batch(rows: torch.Tensor) -> Batch:
    return Batch({"input_ids": rows, "attention_mask": torch.ones_like(rows)}, rows.clone())
