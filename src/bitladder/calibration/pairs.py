"""Image+text pairs: where they come from, and what a processor makes of them."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from bitladder.calibration.processors import tokenizer_of
from bitladder.calibration.special import begun_once
from bitladder.calibration.text import jsonl_rows, read_text
from bitladder.errors import DataError
from bitladder.recipe import DataSpec
from bitladder.records import digest_of


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
        content = json.loads(read_text(path))
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


def samples_of(spec: DataSpec) -> list[Sample]:
    """Return the image+text pairs of a JSONL file or a COCO directory."""
    if spec.kind == "coco":
        return _coco_samples(spec)
    path = Path(spec.path)
    samples = []
    for number, row in jsonl_rows(path):
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


def encode(samples: Sequence[Sample], processor: Any, *, with_answer: bool, padding_side: str) -> dict[str, Any]:
    """Return the processor's tensors for `samples`, padded on one side."""
    rendered = [
        processor.apply_chat_template(
            _messages(sample, with_answer=with_answer), tokenize=False, add_generation_prompt=not with_answer
        )
        for sample in samples
    ]
    texts = [begun_once(tokenizer_of(processor), text) for text in rendered]
    encoded = processor(
        text=texts,
        add_special_tokens=False,  # BOS is there, once, whether the template writes it or not
        images=[sample.load_image() for sample in samples],
        padding=True,
        padding_side=padding_side,
        return_tensors="pt",
    )
    return dict(encoded)


def prompt_inputs(samples: Sequence[Sample], processor: Any) -> dict[str, torch.Tensor]:
    """Return the model's inputs up to the assistant's turn, left-padded, for generating the answers."""
    return encode(samples, processor, with_answer=False, padding_side="left")
