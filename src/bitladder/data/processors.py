"""A model's tokenizer or processor, as its files describe it, and the chat template that it is served with."""

import importlib.util
import inspect
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from bitladder.errors import DataError, ModelError, reason_of
from bitladder.models.sources import check_side_files
from bitladder.reading import read_json

# What transformers says where the video half of a processor is what can't be built.
_VIDEO_HALF = ("orchvision", "VIDEO_PROCESSOR", "video processor")
_CONFIGS = ("processor_config.json", "preprocessor_config.json")
_CLOCK = datetime(2025, 1, 1)  # what chat templates are told that it is
_ASKS_THE_DATE = re.compile(r"""\bstrftime_now\(\s*(?:format\s*=\s*)?(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")


def load_processor(directory: Path) -> Any:
    """Return the model's processor where it takes images, else its tokenizer.

    Without torchvision, transformers can't build the video half of some processors; pictures don't need it, so it is
    left out then. A processor whose tokenizer has no padding token pads with EOS: what is padded is masked.

    Raises:
        ModelError: the directory has no usable tokenizer or processor.
    """
    from transformers import AutoProcessor, AutoTokenizer

    check_side_files(directory)
    try:
        if not any((directory / name).exists() for name in _CONFIGS):
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
            _check_vocabulary(tokenizer, directory)
            return tokenizer
        try:
            processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
        except (ImportError, AttributeError, ValueError) as error:  # which one depends on the class that is named
            if not any(words in str(error) for words in _VIDEO_HALF):
                raise
            processor = _image_processor_only(directory)
    except (MemoryError, ModelError):
        raise
    except Exception as error:  # what the readers of tokenizers and processors raise has no common class
        raise ModelError(f"{directory} has no usable tokenizer or processor: {_reason(error, directory)}") from error
    tokenizer = tokenizer_of(processor)
    _check_vocabulary(tokenizer, directory)
    if getattr(tokenizer, "pad_token", "") is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def _check_vocabulary(tokenizer: Any, directory: Path) -> None:
    """Raise for a tokenizer that turns text into nothing, or that lacks the BOS which a server puts first.

    transformers builds the class that tokenizer_config.json names without any vocabulary, and what it makes of
    Mistral's tekken.json puts no BOS, though mistral-common, by which vLLM reads that file, does.
    """
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ModelError(
            f"{directory} has a tokenizer without a vocabulary; fetch its tokenizer.json or tokenizer.model"
        )
    if _only_tekken(directory) and ids[0] != tokenizer.bos_token_id:
        raise ModelError(
            f"{directory} has its tokenizer in tekken.json alone, which transformers reads without BOS, unlike vLLM; "
            "copy tokenizer.json and tokenizer_config.json of a model with the same vocabulary beside it"
        )


def _only_tekken(directory: Path) -> bool:
    return (directory / "tekken.json").exists() and not (directory / "tokenizer.json").exists()


def _reason(error: Exception, directory: Path) -> str:
    words = str(error)
    if not (directory / "tokenizer.json").exists():
        if list(directory.glob("*.model")) and importlib.util.find_spec("sentencepiece") is None:
            return "its vocabulary is SentencePiece's alone, which needs sentencepiece: pip install sentencepiece"
        if _only_tekken(directory):
            return f"tekken.json is damaged ({type(error).__name__}: {reason_of(error)}); fetch it again"
    if "trust_remote_code" in words:
        return "it needs Python code of its own (auto_map), which is never run; use a model that transformers knows"
    if "backend tokenizer" in words:
        return "no tokenizer.json, and no vocabulary that transformers turns into one; fetch the tokenizer's files"
    if "orchvision" in words:
        return "it needs torchvision: pip install torchvision"
    return reason_of(error)


def _image_processor_only(directory: Path) -> Any:
    """Return the model's processor without its video half."""
    from transformers import AutoTokenizer

    cls = _processor_class(directory)

    class ImagesOnly(cls):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    # The settings beside the parts (tokens an image, patch size) and the template, wherever they stand.
    settings, _ = cls.get_processor_dict(directory)
    known = set(inspect.signature(cls.__init__).parameters) - {"image_processor", "tokenizer", "video_processor"}
    options = {name: value for name, value in settings.items() if name in known}
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    options["chat_template"] = options.get("chat_template") or tokenizer.chat_template
    return ImagesOnly(image_processor=_image_processor(directory), tokenizer=tokenizer, video_processor=None, **options)


def _configs(directory: Path) -> list[dict[str, Any]]:
    """Return what the processor's files hold, in the order in which transformers asks them."""
    paths = [directory / name for name in (*_CONFIGS, "tokenizer_config.json")]
    contents = [read_json(path) for path in paths if path.exists()]
    return [content for content in contents if isinstance(content, dict)]


def _processor_class(directory: Path) -> Any:
    """Return the class that the files name, else the one that transformers has for the model's type."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    named = [content["processor_class"] for content in _configs(directory) if content.get("processor_class")]
    config = directory / "config.json"
    if not named and config.exists():
        model_type = read_json(config).get("model_type")
        named = [name for name in [PROCESSOR_MAPPING_NAMES.get(model_type)] if name]
    cls = getattr(transformers, named[0], None) if named else None
    if cls is None:
        found = f"processor_class {named[0]}" if named else "no processor_class"
        raise ModelError(
            f"{directory}: the processor's files name {found}, which transformers doesn't have; correct it"
        )
    return cls


def _image_processor(directory: Path) -> Any:
    """Return the image processor on Pillow, whatever the backend of the class that the files name."""
    import transformers
    from transformers import AutoImageProcessor

    for content in _configs(directory):
        part = content.get("image_processor") or content
        name = str(part.get("image_processor_type", "")).removesuffix("Fast")
        cls = getattr(transformers, f"{name}Pil", None) if name else None
        if cls is not None:  # "…Fast" is torchvision's; its settings are the same
            return cls.from_pretrained(directory)
    return AutoImageProcessor.from_pretrained(directory, backend="pil", trust_remote_code=False)


def tokenizer_of(processor: Any) -> Any:
    """Return the tokenizer inside a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def has_template(processor: Any) -> bool:
    """Return whether a model's files hold a chat template."""
    return any(_templates(processor))


def _templates(processor: Any) -> list[Any]:
    """Return the processor's chat template and its tokenizer's, None where there is none or an empty one."""
    found = [getattr(one, "chat_template", None) for one in (processor, tokenizer_of(processor))]
    return [None if isinstance(one, str) and not one.strip() else one for one in found]


def _dated(template: str) -> str:
    """Return a template whose clock stands still.

    Llama's and Mistral's write today's date into the system's turn: the same recipe would give other rows tomorrow, and
    a measurement of today would be stale. transformers lets no function be given to a template.

    Source: transformers, utils/chat_template_utils.py, `strftime_now`.
    """
    return _ASKS_THE_DATE.sub(lambda found: json.dumps(_CLOCK.strftime(found["format"])), template)


def template_of(processor: Any) -> str:
    """Return the chat template that a conversation is written with: the processor's, else its tokenizer's.

    Of several named ones it is "default", as in transformers and vLLM. Where it writes the date, it is always the same.

    Raises:
        DataError: there is none, or none of them is the default.
    """
    found = _templates(processor)
    for template in found:
        if isinstance(template, str):
            return _dated(template)
        if template and not isinstance(template, dict):
            raise DataError(
                f"the model's chat template is {json.dumps(template, default=str)[:40]}, not text; put the one that it "
                "is served with into chat_template.jinja beside its weights, or calibrate it on text"
            )
        if template and isinstance(template.get("default"), str):
            return _dated(template["default"])
    names = ", ".join(sorted({str(name) for template in found if template for name in template}))
    if names:
        raise DataError(
            f"the model has chat templates named {names}, and none named default; put the one that it is served with "
            "into chat_template.jinja beside its weights, or calibrate it on text"
        )
    raise DataError(
        "the model has no chat template, so what it is asked can't be written as it expects it; put one into "
        "chat_template.jinja beside its weights, or calibrate it on text"
    )
