"""A model directory -> configuration, model on the meta device or loaded, tensor names."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitladder.errors import ModelError, UnsupportedModel, foreign
from bitladder.models.sources import as_loaded, names_when_loaded
from bitladder.models.weights import read_config

_QUANTISATION_KEYS = ("quantization_config", "compression_config")
LEGACY_QUANTISATION = "hf_quant_config.json"  # of ModelOpt's exports
# Keys that say how attention is computed, and what they may say: other ways need packages, a GPU, or code of the Hub.
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
_ATTENTION_WAYS = ("eager", "sdpa")
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")  # keys of configurations
_MOST_LAYERS = 10_000


def model_class(config: Any) -> Any:
    """Return the transformers class that the configuration names.

    Raises:
        UnsupportedModel: transformers has no such class.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    if not names or not isinstance(names, list | tuple):
        raise UnsupportedModel(
            "config.json has no list of `architectures`; put the name of the model's transformers class there, "
            '"architectures": ["LlamaForCausalLM"] for example'
        )
    names = [str(name) for name in names]
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    raise UnsupportedModel(
        f"config.json names the architecture {', '.join(names)}, which transformers "
        f"{transformers.__version__} doesn't have as a model; upgrade transformers or use a model without remote code"
    )


def load_config(directory: Path) -> Any:
    """Return the transformers configuration of a model directory.

    Raises:
        ModelError: missing, damaged. UnsupportedModel: unknown to transformers, or already quantised.
    """
    import transformers
    from transformers import AutoConfig

    raw = read_config(directory)
    method = _quantised_by(raw, directory)
    if method is not None:
        raise UnsupportedModel(f"{directory} is already quantised ({method}); start from the original checkpoint")
    _check_layers(raw, directory)
    if not isinstance(raw.get("auto_map", {}), dict):
        raise ModelError(
            f"{directory / 'config.json'}: auto_map is no JSON object; remove it: code of a model's own is never run"
        )
    try:
        with foreign(UnsupportedModel, f"transformers can't read {directory / 'config.json'}", "correct it"):
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except UnsupportedModel as error:
        if "auto_map" in raw:
            raise UnsupportedModel(
                f"{directory} brings code of its own (model_type {raw.get('model_type')!r}), which isn't run; "
                f"architectures of transformers {transformers.__version__} are taken: upgrade it, or convert the model "
                "to one that it has"
            ) from error
        raise
    _check_how_it_runs(raw, config, directory)
    return _unquantised(config)


def _check_layers(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse a number of layers that no model has: transformers makes lists of that length.

    Raises:
        ModelError: there are more.
    """
    sections = [config, config.get("text_config"), config.get("vision_config")]
    for section in [section for section in sections if isinstance(section, dict)]:
        for key in _LAYER_COUNTS:
            number = section.get(key)
            if isinstance(number, int | float) and number > _MOST_LAYERS:
                raise ModelError(f"{directory / 'config.json'}: {key} is {number}, no model has so many; correct it")


def _check_how_it_runs(raw: Mapping[str, Any], config: Any, directory: Path) -> None:
    """Refuse keys of config.json that say how a model is run, not what it is, and that it can't be run with here.

    Args:
        raw: what the file says.
        config: what transformers makes of it.
        directory: the model's.

    Raises:
        UnsupportedModel: the model runs once the key is removed.
    """
    file = directory / "config.json"
    for key in _ATTENTION_KEYS:
        value = raw.get(key)
        ways = value.values() if isinstance(value, dict) else [value]
        if any(way is not None and way not in _ATTENTION_WAYS for way in ways):
            raise UnsupportedModel(
                f"{file}: {key} is {str(value)[:60]}; attention is computed by {' or '.join(_ATTENTION_WAYS)} here. "
                f"Remove {key} from it: the model stays the same"
            )
    if not (getattr(config, "return_dict", True) and getattr(config.get_text_config(), "return_dict", True)):
        raise UnsupportedModel(
            f"{file}: return_dict is false, so that the model's outputs have no names. Remove return_dict from it (in "
            "text_config too): the model stays the same"
        )


def _quantised_by(config: Mapping[str, Any], directory: Path) -> str | None:
    """Return how a model is quantised already, by its configuration; None: it isn't.

    Raises:
        ModelError: it says so in a form that nobody can read.
    """
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for key in _QUANTISATION_KEYS:
            value = section.get(key)
            if value is None:
                continue
            if not isinstance(value, dict):
                raise ModelError(
                    f"{directory / 'config.json'}: {key} is no JSON object; remove it if the weights aren't quantised"
                )
            return str(value.get("quant_method", "unknown method"))
    return LEGACY_QUANTISATION if (directory / LEGACY_QUANTISATION).exists() else None


def _unquantised(config: Any) -> Any:
    """Return the configuration without its section about quantisation, null included, which transformers trips over."""
    for section in (config, config.get_text_config()):
        for key in _QUANTISATION_KEYS:
            if hasattr(section, key):
                delattr(section, key)
    return config


def embedding_rows(config: Any) -> int | None:
    """Return how many tokens a model has embeddings for; None: its configuration doesn't say."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return None if size is None else int(size)


_NO_POSITIONS = ("alibi", "nope")  # by `position_embedding_type`
# Types whose max_position_embeddings holds what `factor` makes of it already.
_FACTOR_IS_IN = ("longrope", "llama3", "yarn", "su", "deepseek_yarn", "deepseek_llama_scaling")


def most_positions(config: Any) -> int | None:
    """Return how many tokens a sequence of a model may have; None: its configuration sets no limit, or it needs none.

    Source: vLLM 0.32, config/model.py, `_get_and_verify_max_len`: linear and dynamic scaling of rotary positions
    multiply the limit, but Gemma 3's holds it already.
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    free = getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) in _NO_POSITIONS
    if not isinstance(limit, int) or limit < 1 or free:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    sets = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    factors = [one.get("factor") or 1 for one in sets if one.get("rope_type") not in _FACTOR_IS_IN]
    return limit if "gemma3" in config.model_type else int(limit * max(factors, default=1))


def build_on_meta(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model without weights (meta device), for its structure; `dtype` is that of its parameters."""
    config = load_config(directory)
    cls = model_class(config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    remedy = "correct its architectures, model_type or sizes"
    try:
        with (
            foreign(UnsupportedModel, f"transformers can't build {cls.__name__} from {directory}/config.json", remedy),
            torch.device("meta"),
        ):
            return cls(config).eval()
    finally:
        torch.set_default_dtype(before)


def load_model(
    directory: Path | str, dtype: torch.dtype, device: str = "cpu", state_dict: dict[str, torch.Tensor] | None = None
) -> Any:
    """Return the model in evaluation mode, weights cast to `dtype`; `state_dict` takes the place of its files.

    Raises:
        ModelError: tensors are missing or left over.
    """
    from transformers import AutoConfig

    directory = Path(directory)
    if state_dict is None:
        config = load_config(directory)
    else:
        with foreign(ModelError, f"transformers can't read {directory / 'config.json'}"):
            config = _unquantised(AutoConfig.from_pretrained(directory, trust_remote_code=False))
    cls = model_class(config)
    with foreign(ModelError, f"transformers can't load {directory}"):
        if state_dict is None:
            with as_loaded(directory) as files:
                model, info = cls.from_pretrained(files, config=config, dtype=dtype, output_loading_info=True)
        else:
            model, info = cls.from_pretrained(
                None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
            )
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(str(key) for key in info["mismatched_keys"])]
    if wrong:
        raise ModelError(
            f"{directory}: {len(wrong)} tensors are missing, left over or of another shape, e.g. {sorted(wrong)[0]}; "
            "config.json and the weights don't belong together"
        )
    return model.to(device).eval()


def checkpoint_tensor_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return which parameter of the loaded model each tensor of the checkpoint becomes.

    transformers 5 renames tensors while loading (`visual.*` -> `model.visual.*`); this applies its own rules.

    Args:
        model: the loaded model, or one on the meta device.
        names: the tensors' names in the files.

    Returns:
        `{tensor name in the files: parameter name in the model}`, without tensors that are merged or split on loading.

    Source: transformers.core_model_loading.convert_and_load_state_dict_in_model.
    """
    state = model.state_dict()
    found = names_when_loaded(model, names).items()
    return {name: made for name, (made, is_converted) in found if not is_converted and made in state}


def image_token_ids(config: Any) -> list[int]:
    """Return the token ids that stand for pieces of pictures and videos in the model's input; none for plain text."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return sorted({int(value) for name in names if (value := getattr(config, name, None)) is not None})
