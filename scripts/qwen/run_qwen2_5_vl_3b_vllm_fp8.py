"""Greedy answers from an exported checkpoint, by vLLM, in vLLM's environment (`make vllm-env` builds one for CPUs).

    .venv-vllm/bin/python scripts/qwen/run_qwen2_5_vl_3b_vllm_fp8.py --scheme-name fp8_autoquant_top50 --image cat.jpg

`docs/guide.md`, "Qwen2.5-VL-3B-Instruct", says which versions and flags.
"""

import argparse
import sys
from pathlib import Path

from bitladder.errors import BitladderError
from bitladder.runtimes import vllm

OUT_ROOT = Path("models/qwen2_5_vl_3b_instruct")
SUFFIX = "_coco2017"


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
    return parser.parse_args()


def main() -> None:
    """Print prompts and answers; exit status 0, or 2 with one line that says what to do."""
    flags = parse()
    directory = flags.model_dir
    if directory is None:
        directory = flags.out_root / "quantized" / f"{flags.scheme_name.removesuffix(SUFFIX)}{SUFFIX}"
    prompts = flags.prompt or ["Describe the image." if flags.image else "Describe a picture of a cat."]
    try:
        answers = vllm.answer(
            directory.expanduser().resolve(),
            prompts,
            image=flags.image,
            max_tokens=flags.max_tokens,
            kv_cache_dtype=flags.kv_cache_dtype,
        )
    except BitladderError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for prompt, text in zip(prompts, answers, strict=True):
        print(f"> {prompt}\n{text}")


if __name__ == "__main__":
    main()
