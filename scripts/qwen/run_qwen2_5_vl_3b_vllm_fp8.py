"""Greedy answers from an exported checkpoint, by vLLM (`make vllm-env` builds an environment with it for CPUs).

    python scripts/qwen/run_qwen2_5_vl_3b_vllm_fp8.py --scheme-name fp8_autoquant_top50 --image cat.jpg

Runs in Bitladder's environment or in vLLM's: the checkpoint is served in a process of its own, by the interpreter that
`--python` names. `docs/guide.md`, "Qwen2.5-VL-3B-Instruct", says which versions and flags.
"""

import argparse
import sys
from pathlib import Path

from bitladder.errors import BitladderError, ModelError
from bitladder.runtimes.child import installed_version, vllm_version
from bitladder.runtimes.vllm.job import Question, ServeJob
from bitladder.runtimes.vllm.serve import answer, check_checkpoint

ROOT = Path(__file__).resolve().parents[2]
OUT_ROOT = Path("models/qwen2_5_vl_3b_instruct")
SUFFIX = "_coco2017"
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


def parse() -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--scheme-name", metavar="NAME", help=f"of a checkpoint in OUT_ROOT/quantized/NAME{SUFFIX}")
    which.add_argument("--model-dir", type=Path, metavar="DIR", help="any checkpoint's directory")
    parser.add_argument("--out-root", type=Path, metavar="DIR", default=OUT_ROOT, help=f"default {OUT_ROOT}")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated; default: describe")
    parser.add_argument("--image", type=Path, metavar="FILE", help="goes before each prompt")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of an answer; default 64")
    parser.add_argument("--kv-cache-dtype", default="auto", help="default auto: as the checkpoint asks")
    parser.add_argument(
        "--python",
        type=Path,
        metavar="FILE",
        help="interpreter of vLLM's environment; default: this one if it has vLLM, else .venv-vllm/bin/python",
    )
    return parser.parse_args()


def vllm_python(named: Path | None) -> Path:
    """Return the interpreter that vLLM runs under: the one that was named, this one, or that of `make vllm-env`.

    Raises:
        BitladderError: it isn't there, or has no vLLM.
    """
    own = Path(sys.executable)
    python = named or (own if installed_version(own) is not None else VLLM_PYTHON)
    vllm_version(python)
    return python


def answers(flags: argparse.Namespace, prompts: list[str]) -> tuple[str, ...]:
    """Return the answer to each prompt.

    Raises:
        BitladderError: the checkpoint, the image or vLLM is missing, or vLLM doesn't serve it.
    """
    directory = flags.model_dir
    if directory is None:
        directory = flags.out_root / "quantized" / f"{flags.scheme_name.removesuffix(SUFFIX)}{SUFFIX}"
    directory = directory.expanduser().resolve()
    check_checkpoint(directory)
    if flags.image is not None and not flags.image.is_file():
        raise ModelError(f"image {flags.image} does not exist")
    image = None if flags.image is None else str(flags.image.resolve())
    job = ServeJob(
        questions=tuple(Question(prompt, image) for prompt in prompts),
        max_tokens=flags.max_tokens,
        kv_cache_dtype=flags.kv_cache_dtype,
    )
    return answer(directory, vllm_python(flags.python), job)


def main() -> None:
    """Print prompts and answers; exit status 0, or 2 with one line that says what to do."""
    flags = parse()
    prompts = flags.prompt or ["Describe the image." if flags.image else "Describe a picture of a cat."]
    try:
        texts = answers(flags, prompts)
    except BitladderError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"> {prompt}\n{text}")


if __name__ == "__main__":
    main()
