"""Answers from a checkpoint by vLLM, in vLLM's own environment (`make vllm-env`): `answer(...) -> list[str]`.

vLLM pins another torch than ModelOpt, so this module is imported there with nothing of ours but `errors`. Images go
through the checkpoint's own processor and chat template.
"""

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitladder.errors import BitladderError, ModelError

# What is set unless the caller's environment says otherwise. A checkpoint is a local directory, so no hub is needed;
# without a second process an error arrives here with its traceback. The KV cache is in GiB, read on CPUs only.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
MAX_TOKENS_IN_CONTEXT = 4096  # prompt and answer; a longer context takes more KV cache than 1 GiB gives


def _vllm() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise BitladderError(
            "vLLM is not installed in this Python environment; on a GPU host `pip install vllm`, on a CPU "
            "`make vllm-env` and run this with .venv-vllm/bin/python"
        ) from None


def _context(directory: Path) -> int:
    """Return the tokens that a prompt and its answer may have together."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    text = {**config, **config.get("text_config", {})}
    return min(MAX_TOKENS_IN_CONTEXT, int(text.get("max_position_embeddings", MAX_TOKENS_IN_CONTEXT)))


def answer(
    directory: Path,
    prompts: Sequence[str],
    *,
    image: Path | None = None,
    max_tokens: int = 64,
    kv_cache_dtype: str = "auto",
) -> list[str]:
    """Return the greedy answer to each prompt, asked through the chat template.

    Args:
        directory: the checkpoint.
        prompts: what the user says.
        image: a picture that goes before each prompt.
        max_tokens: the most that an answer may have.
        kv_cache_dtype: `auto` is what the checkpoint asks for.

    Raises:
        ModelError: there is no checkpoint, or no such image. BitladderError: vLLM is not installed.
    """
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} holds no checkpoint (no config.json); export it first, or name another one")
    if image is not None and not image.is_file():
        raise ModelError(f"image {image} does not exist")
    vllm = _vllm()
    import torch

    content: list[dict[str, Any]] = []
    if image is not None:
        from PIL import Image

        content = [{"type": "image_pil", "image_pil": Image.open(image).convert("RGB")}]
    model = vllm.LLM(
        model=str(directory),
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=_context(directory),
        enforce_eager=not torch.cuda.is_available(),  # compiling for a CPU takes minutes
    )
    conversations = [[{"role": "user", "content": [*content, {"type": "text", "text": text}]}] for text in prompts]
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=max_tokens)
    outputs = model.chat(conversations, sampling_params=greedy, use_tqdm=False)
    return [str(output.outputs[0].text) for output in outputs]
