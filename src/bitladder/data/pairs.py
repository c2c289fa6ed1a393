"""Image+text pairs: where they come from, and what a processor makes of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bitladder.data import pictures
from bitladder.data.files import check_pair, coco_captions, coco_images, jsonl_rows, read_text
from bitladder.data.processors import has_template, template_of, tokenizer_of
from bitladder.data.special import begun_once, check_text, placeholders
from bitladder.errors import DataError, reason_of
from bitladder.reading import parse_json
from bitladder.recipe import DataSpec
from bitladder.records import digest_of

_PROBE = "aardvark"


@dataclass(frozen=True)
class Sample:
    """One image+text pair."""

    image: str  # absolute path, or a `data:` URI
    prompt: str
    text: str
    where: str = field(default="", compare=False)  # file and line, for messages

    @property
    def digest(self) -> str:
        """SHA-256 over image reference, prompt and answer."""
        return digest_of([self.image, self.prompt, self.text])

    def load_image(self) -> Image.Image:
        """Return the picture in RGB, as vLLM would hand it to the processor.

        Raises:
            DataError: missing, damaged, no picture, or one that vLLM would refuse or clip; it names file and line.
        """
        try:
            return pictures.open_picture(self.image)
        except DataError as error:
            raise DataError(self.located(str(error))) from error

    def located(self, message: str) -> str:
        """Return a message with the place of the sample before it."""
        return f"{self.where}: {message}" if self.where else message


def _coco_samples(spec: DataSpec) -> list[Sample]:
    """Return one pair an image of a COCO directory, in the order of the image ids: its caption of the lowest id.

    Source: cocodataset.org, caption annotations: `images[].{id, file_name}`, `annotations[].{id, image_id, caption}`.
    """
    path = coco_captions(spec)
    try:
        content = parse_json(read_text(path))
        names = {entry["id"]: str(entry["file_name"]) for entry in content["images"]}
        captions: dict[Any, str] = {}
        for entry in sorted(content["annotations"], key=lambda entry: entry["id"]):
            captions.setdefault(entry["image_id"], str(entry["caption"]).strip())
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a file of COCO captions ({type(error).__name__}: {error})") from error
    images = coco_images(spec)
    return [
        Sample(str((images / names[image]).absolute()), spec.prompt, captions[image], where=f"{path} image {image}")
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
        where = f"{path} line {number}"
        check_pair(row, spec, where)
        prompt = row.get("prompt", spec.prompt)
        if not isinstance(prompt, str):
            raise DataError(f"{where}: 'prompt' is {json.dumps(prompt)[:40]}; make it a string, or leave it out")
        for text in (row["image"], prompt, row[spec.text_field]):
            check_text(text, where, frozenset())
        try:
            image = pictures.resolved(row["image"], path.parent)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        samples.append(Sample(image, prompt, row[spec.text_field], where))
    return samples


def _rendered(sample: Sample, processor: Any, *, with_answer: bool, with_image: bool = True) -> str:
    """Return a pair as the chat template writes it."""
    picture = [{"type": "image"}] if with_image else []
    turns = [{"role": "user", "content": [*picture, {"type": "text", "text": sample.prompt}]}]
    if with_answer:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": sample.text}]})
    template = template_of(processor)
    try:
        return str(
            processor.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=not with_answer
            )
        )
    except Exception as error:  # a template is a program: it raises what it likes
        raise DataError(
            sample.located(
                f"the model's chat template can't write a picture, a prompt and an answer ({_without_stop(error)}); "
                "calibrate the model on text, or mend chat_template.jinja"
            )
        ) from error


def check_samples(samples: Sequence[Sample], processor: Any) -> None:
    """Raise for pairs that can't be written: a template that passes pictures over, a text that names one or is none.

    Raises:
        DataError: it names file and line.
    """
    if not has_template(processor) and _ends_prompts(processor):
        raise DataError(
            "the model has no chat template, and its processor ends a prompt by itself, so that no template could "
            "place an answer behind it; calibrate the model on text"
        )
    forbidden = placeholders(processor)
    for sample in samples:
        for name, text in (("prompt", sample.prompt), ("answer", sample.text)):
            check_text(text, f"{sample.where}: the {name}", forbidden)
    written = _rendered(samples[0], processor, with_answer=False)
    without = _rendered(samples[0], processor, with_answer=False, with_image=False)
    if written == without or "'type': 'image'" in written:  # content passed over, or printed as a Python list
        raise DataError(
            "the model's chat template writes nothing for a picture; mend chat_template.jinja beside its weights, or "
            "calibrate it on text"
        )


def _ends_prompts(processor: Any) -> bool:
    """Return whether a processor writes something behind the text that it is given, as PaliGemma's does."""
    token = getattr(processor, "image_token", None)
    texts = [f"{token}{_PROBE}", f"{token}{_PROBE} {_PROBE}"]
    try:  # transformers >= 5.20 has this step apart
        first, second = (
            processor.prepare_inputs_layout(images=[[Image.new("RGB", (32, 32))]], text=[text])[1][0] for text in texts
        )
    except Exception:  # processors raise what they like
        return False
    return not str(second).startswith(str(first))


def encode(samples: Sequence[Sample], processor: Any, *, with_answer: bool, padding_side: str) -> dict[str, Any]:
    """Return the processor's tensors for `samples`, padded on one side.

    Raises:
        DataError: a picture or a prompt that the processor refuses; it names file and line.
    """
    try:
        return _encoded(samples, processor, with_answer=with_answer, padding_side=padding_side)
    except DataError:
        raise
    except Exception as error:  # processors raise what their arithmetic leads them to
        if len(samples) > 1:
            for sample in samples:
                encode([sample], processor, with_answer=with_answer, padding_side=padding_side)
            raise DataError(
                f"{samples[0].located('this pair')} and the next {len(samples) - 1} don't go into one batch "
                f"({_without_stop(error)}); set batch_size: 1"
            ) from error
        picture = samples[0].load_image()
        raise DataError(
            samples[0].located(
                f"the model's processor refuses picture {pictures.shown(samples[0].image)} of {picture.width} x "
                f"{picture.height} pixels with its prompt ({_without_stop(error)}); change or remove the sample"
            )
        ) from error


def _without_stop(error: Exception) -> str:
    return reason_of(error).rstrip(".")


def _encoded(samples: Sequence[Sample], processor: Any, *, with_answer: bool, padding_side: str) -> dict[str, Any]:
    texts = [_rendered(sample, processor, with_answer=with_answer) for sample in samples]
    encoded = processor(
        text=[begun_once(tokenizer_of(processor), text) for text in texts],
        add_special_tokens=False,  # BOS is there, once, whether the template writes it or not
        # A list a text: Gemma 3 takes a flat list for the pictures of one text; every processor takes this.
        images=[[sample.load_image()] for sample in samples],
        padding=True,
        padding_side=padding_side,
        return_tensors="pt",
    )
    for name, value in encoded.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"its {name} of these pictures is no tensor")
    return dict(encoded)


def prompt_inputs(samples: Sequence[Sample], processor: Any) -> dict[str, torch.Tensor]:
    """Return the model's inputs up to the assistant's turn, left-padded, for generating the answers."""
    return encode(samples, processor, with_answer=False, padding_side="left")
