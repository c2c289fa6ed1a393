#!/usr/bin/env bash
# The baseline: every searched linear of the language model in FP8, and an FP8 KV cache; the vision tower stays as it is.
# Writes models/qwen2_5_vl_3b_instruct/quantized/fp8_fp8_coco2017/. Flags are passed on (--help lists them).
#
# It takes no account of which layers suffer. The path that does is the AutoQuant driver, which this script calls:
#   scripts/qwen/qwen2_5_vl_3b_autoquant_fp8_schemes.py --schemes top25,top50,full
# Both use one measurement and one report; this checkpoint is the last rung of that ladder.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
driver="$here/qwen2_5_vl_3b_autoquant_fp8_schemes.py"
echo "All-FP8 baseline; by sensitivity: ${driver##*/} --schemes top25,top50,full" >&2
exec "${PYTHON:-python}" "$driver" --scheme-name fp8_fp8 --coverage 1.0 --formats fp8 --kv-cache fp8 "$@"
