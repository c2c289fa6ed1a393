"""What a model hub and those who load from it look for beside the weights: `lacking(directory)`."""

from collections.abc import Collection
from pathlib import Path

from bitladder.models.weights import read_config
from bitladder.reading import read_json

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model", "vocab.txt")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_SEEING = ("vision_config", "audio_config")  # keys of a configuration whose model takes more than text


def lacking(directory: Path) -> list[str]:
    """Return what a checkpoint lacks of the files that a hub's users need, each with what comes of it.

    Raises:
        ModelError: its configuration can't be read.
    """
    names = {path.name for path in directory.iterdir()}
    config = read_config(directory)
    found = []
    if not names.intersection(_TOKENIZERS):
        found.append("no tokenizer (tokenizer.json): runtimes can't read or write text")
    elif "tokenizer_config.json" not in names:
        found.append("no tokenizer_config.json: special tokens and the template are guessed")
    if any(key in config for key in _SEEING) and not names.intersection(_PROCESSORS):
        found.append("no processor (preprocessor_config.json): runtimes can't prepare pictures or sound")
    if "generation_config.json" not in names:
        found.append("no generation_config.json: runtimes take their own defaults for sampling and stopping")
    if not _has_template(directory, names):
        found.append("no chat template (chat_template.jinja): chats are refused; right for a base model")
    if not any(name.upper().startswith(("LICENSE", "LICENCE", "COPYING")) for name in names):
        found.append("no LICENSE: most licences must come with the files; add the original's")
    return found


def _has_template(directory: Path, names: Collection[str]) -> bool:
    if any(name in names for name in _TEMPLATES):
        return True
    path = directory / "tokenizer_config.json"
    return path.is_file() and "chat_template" in read_json(path)
