"""A model's tokenizer or processor, as its files describe it."""

import json
from pathlib import Path
from typing import Any

from bitladder.errors import ModelError


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
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        try:
            return AutoProcessor.from_pretrained(directory, trust_remote_code=False)
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

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
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
