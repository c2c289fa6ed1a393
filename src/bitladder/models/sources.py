"""A model's directory as people bring it: which files are the model, which come along, and what makes it unusable.

The weights are what the index names, or `model.safetensors`; whatever else lies there (an adapter, `consolidated.*`, a
stray shard) is neither measured nor copied. What later steps need of the other files is looked at here, so that a
damaged one is found before anything is computed.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from bitladder.errors import ModelError, UnsupportedModel, foreign
from bitladder.formats import SCALE_NAMES
from bitladder.models.weights import INDEX_FILE, PROVENANCE_FILE, WeightFiles
from bitladder.reading import check_regular, read_json
from bitladder.records import CheckpointManifest
from bitladder.storage import scratch_directory

# Files that come along with a model, by name: tokenizer, processor, templates, generation, code, licence and notices.
_SIDE_FILES = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|tekken|preprocessor|processor|video_preprocessor|image_processor|"
    r"feature_extractor|audio_tokenizer|chat_template|generation_config)[\w.\-]*"
    r"|[\w.\-]+\.(jinja|tiktoken|model|spm|bpe|py)"
    r"|(LICEN[CS]E|NOTICE|COPYING|COPYRIGHT|USE_POLICY|USAGE_POLICY|THIRD[_-]PARTY|[\w\-]*TERMS)[\w.\- ]*"
    rf"|{PROVENANCE_FILE}",
    re.IGNORECASE,
)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json")
_TEMPLATE_DIRECTORY = "additional_chat_templates"  # transformers keeps named chat templates there
# JSON objects that transformers reads with the model, its tokenizer or its processor.
_JSON_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
_TEXT_FILES = (  # others that it opens by itself
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    PROVENANCE_FILE,
)
# Last parts of names that only quantised models' tensors have, and whose they are.
_LEFT_OVER = {
    **dict.fromkeys(("qweight", "qzeros", "g_idx"), "GPTQ or AWQ"),
    **dict.fromkeys(("scales", "biases"), "MLX, GPTQ or AWQ"),
    **dict.fromkeys(("weight_packed", "weight_shape", "weight_zero_point"), "compressed-tensors"),
    **dict.fromkeys(SCALE_NAMES, "FP8, INT8 or FP4"),
    **dict.fromkeys(("absmax", "quant_map", "SCB"), "bitsandbytes"),
}
_QUANTISED_DTYPES = frozenset(  # of weights; 32 bits hold several that are packed
    ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4", "I8", "U8", "I32", "U32")
)
_GENERATION_FILE = "generation_config.json"
_ADAPTER_FILE = "adapter_config.json"


def side_files(directory: Path) -> tuple[str, ...]:
    """Return the files of a model that come along unchanged, by name; a link that leads elsewhere isn't one.

    The links of a hub's cache lead to its own `blobs`, and are followed.
    """
    names = [
        path.name
        for path in sorted(directory.iterdir())
        if _SIDE_FILES.fullmatch(path.name)
        and not path.name.endswith(_WEIGHT_SUFFIXES)
        and path.name != CheckpointManifest.CARD_NAME
        and _is_own_file(path, directory)
    ]
    templates = directory / _TEMPLATE_DIRECTORY
    if templates.is_dir() and not templates.is_symlink():
        names += [
            f"{_TEMPLATE_DIRECTORY}/{path.name}"
            for path in sorted(templates.iterdir())
            if path.suffix == ".jinja" and _is_own_file(path, directory)
        ]
    return tuple(names)


def _is_own_file(path: Path, directory: Path) -> bool:
    """Return whether a path is a file that lies in the directory, or in the `blobs` of the hub's cache around it."""
    if not path.is_file():
        return False
    real, home = path.resolve(), directory.resolve()
    in_cache = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    return in_cache or real.is_relative_to(home)


def check_side_files(directory: Path) -> None:
    """Check the JSON files that are read beside the weights.

    Raises:
        ModelError: one is damaged. UnsupportedModel: the directory holds an adapter, and no model.
    """
    if (directory / _ADAPTER_FILE).exists() and not WeightFiles.are_in(directory):
        raise UnsupportedModel(
            f"{directory} holds an adapter ({_ADAPTER_FILE}), not a model: merge it into its base model first "
            "(peft: model.merge_and_unload().save_pretrained(DIR)), and name that directory"
        )
    for name in _TEXT_FILES:
        try:
            if (directory / name).exists():
                check_regular(directory / name)
        except OSError as error:
            raise ModelError(f"{directory / name} can't be read ({error.strerror}); fetch it again") from error
    for name in _JSON_FILES:
        path = directory / name
        if not path.exists():
            continue
        try:
            content = read_json(path)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} is damaged ({error}); fetch it again") from error
        if not isinstance(content, dict):
            raise ModelError(f"{path} holds no JSON object; fetch it again")
        if name == _GENERATION_FILE:
            _check_generation(path, content)


def _check_generation(path: Path, content: dict[str, Any]) -> None:
    """Check that transformers, which reads it with the model, and vLLM with it, take every key's value.

    Raises:
        ModelError: one is refused; the message names the key.
    """
    from transformers import GenerationConfig

    def reason(keys: Iterable[str]) -> str | None:
        try:
            with foreign(ModelError, "refused"):
                GenerationConfig(**{key: content[key] for key in keys})
        except ModelError as error:
            return str(error).removeprefix("refused: ")
        return None

    why = reason(content)
    if why is None:
        _check_served(path, content)
        return
    others = {key: [other for other in content if other != key] for key in content}
    odd = [key for key in content if reason(others[key]) is None] or [key for key in content if reason([key])]
    raise ModelError(
        f"transformers can't take {path} ({why.rstrip('.')}); "
        + (f"remove {odd[0]} from it, or correct its value" if odd else "correct it")
    )


def _check_served(path: Path, content: dict[str, Any]) -> None:
    """Check what servers take of the file, and transformers looks at only when it generates.

    Raises:
        ModelError: tokens to stop at that are none, or a penalty that divides by no positive number.
    """
    ends = content.get("eos_token_id")
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [] if ends is None else [ends])):
        raise ModelError(
            f"{path}: eos_token_id is {json.dumps(ends)[:40]}; it must be a token's number, or a list of them"
        )
    penalty = content.get("repetition_penalty")
    if penalty is not None and (type(penalty) not in (int, float) or not 0 < penalty < math.inf):
        raise ModelError(f"{path}: repetition_penalty is {json.dumps(penalty)[:40]}; it must be a positive number")


@contextlib.contextmanager
def as_loaded(directory: Path) -> Iterator[Path]:
    """Yield a directory that holds nothing of a model but what transformers shall load: configuration and weights.

    transformers prefers `model.safetensors` to the shards of an index, one of which may be called so, and applies an
    adapter that lies beside them.
    """
    weights = WeightFiles.open(directory)
    indexed = (directory / INDEX_FILE).exists()
    called = {name: f"shard-{number}.safetensors" if indexed else name for number, name in enumerate(weights.files)}
    with scratch_directory() as scratch:
        for name in (*weights.files, "config.json", _GENERATION_FILE):
            if (directory / name).exists():
                (scratch / called.get(name, name)).symlink_to((directory / name).resolve())
        if indexed:  # of what the files hold, with the metadata that transformers insists on
            table = {name: called[info.file] for name, info in weights.tensors.items()}
            (scratch / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": table}), encoding="utf-8")
        yield scratch


def check_unquantised(weights: WeightFiles, table: Mapping[str, str]) -> None:
    """Check, by the headers alone, that weights which config.json calls unquantised are so.

    Args:
        weights: the model's files.
        table: which parameter each tensor becomes; see `check_fit`.

    Raises:
        UnsupportedModel: a tensor that only quantised models have, or a weight in 8 bits or fewer, or packed.
    """
    found = {name: _LEFT_OVER.get(name.rpartition(".")[2]) for name in weights.tensors if name not in table}
    if not any(found.values()):
        matrices = {name: info for name, info in weights.tensors.items() if len(info.shape) > 1}
        found = {
            name: f"stored as {info.dtype}"
            for name, info in matrices.items()
            if name.endswith(".weight") and info.dtype in _QUANTISED_DTYPES
        }
    for name, method in found.items():
        if method is not None:
            raise UnsupportedModel(
                f"{weights.directory} is already quantised ({name}: {method}), though config.json has no "
                "quantization_config; start from the original checkpoint"
            )


def check_fit(model: Any, weights: WeightFiles, table: dict[str, str]) -> None:
    """Check that configuration and weights belong together, by the headers alone.

    Args:
        model: built from the configuration, on the meta device.
        weights: its files.
        table: which parameter each tensor becomes (`models.loading.checkpoint_tensor_names`).

    Raises:
        ModelError: tensors are missing, left over or of another shape.
    """
    state = model.state_dict()
    odd = [name for name, made in table.items() if weights.tensors[name].shape != tuple(state[made].shape)]
    left = set(weights.tensors) - set(table)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = {name for name, _ in model.named_parameters()} - set(table.values()) - set(tied)
    if left and missing:
        converted = {
            name: made for name, (made, is_converted) in names_when_loaded(model, left).items() if is_converted
        }
        # What is merged or split becomes the parameters beside which it lies.
        parents = tuple(f"{made.rpartition('.')[0].rpartition('.')[0]}." for made in converted.values())
        missing = {name for name in missing if not name.startswith(parents)}
        left -= set(converted)
    found = SimpleNamespace(missing_keys=missing, unexpected_keys=left)
    model._adjust_missing_and_unexpected_keys(found)  # what this class doesn't mind
    wrong = sorted({*odd, *found.missing_keys, *found.unexpected_keys})
    if wrong:
        raise ModelError(
            f"{weights.directory}: {len(wrong)} tensors are missing, left over or of another shape, e.g. {wrong[0]}; "
            "config.json and the weights don't belong together"
        )


def names_when_loaded(model: Any, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Return what transformers calls each tensor of the files while it loads them, and whether it merges or splits it.

    Source: transformers.core_model_loading.convert_and_load_state_dict_in_model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state, prefix = model.state_dict(), getattr(model, "base_model_prefix", "")
    found = {name: rename_source_key(name, renamings, converters, prefix, state) for name in names}
    return {name: (renamed, by is not None) for name, (renamed, by) in found.items()}


def split_when_loaded(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the stored tensor that each parameter is a part of: transformers splits it, runtimes know it whole.

    Source: transformers.core_model_loading.WeightConverter: one source pattern, several targets.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    state = model.state_dict()
    several = [
        [pattern.strip("^$") for pattern in transform.target_patterns]
        for transform in get_model_conversion_mapping(model)
        if len(transform.source_patterns) == 1 < len(transform.target_patterns)
    ]
    return {
        part: name
        for name, (made, is_converted) in names_when_loaded(model, names).items()
        for targets in several
        if is_converted and targets[0] in made
        for target in targets
        if (part := made.replace(targets[0], target)) in state
    }


def check_head(model: Any, weights: WeightFiles, tensor_of: dict[str, str]) -> None:
    """Check that a vocabulary head that is stored and a configuration that ties it to the embedding agree.

    Runtimes tie where the configuration says so, and read no head then (vllm, `tie_word_embeddings` of its models);
    transformers takes a stored head that differs.

    Raises:
        ModelError: the stored head has other values than the embedding.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    wanted = [_tensor(module, model, tensor_of) for module in (head, embedding)]
    config = model.config
    flags = {bool(getattr(part, "tie_word_embeddings", False)) for part in (config, config.get_text_config())}
    if True not in flags or None in wanted or wanted[0] == wanted[1]:
        return
    first, second = (str(name) for name in wanted)
    if weights.tensors[first].shape == weights.tensors[second].shape and torch.equal(
        weights.load(first), weights.load(second)
    ):
        return
    raise ModelError(
        f"{weights.directory}: config.json says tie_word_embeddings: true, but {first} has other values than {second}: "
        "runtimes would use the latter for both; set tie_word_embeddings to false there (in text_config too) if the "
        f"stored head is right, or remove {first} from the files"
    )


def _tensor(module: nn.Module, model: Any, tensor_of: dict[str, str]) -> str | None:
    """Return the tensor that is stored as a module's weight."""
    path = next((name for name, candidate in model.named_modules() if candidate is module), None)
    return tensor_of.get(f"{path}.weight")
