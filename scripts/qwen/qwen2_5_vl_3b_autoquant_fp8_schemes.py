"""Checkpoints of Qwen2.5-VL-3B-Instruct by sensitivity, FP8 or a mix: one measurement, any number of schemes.

    scripts/qwen/qwen2_5_vl_3b_autoquant_fp8_schemes.py --schemes top25,top50,full
    scripts/qwen/qwen2_5_vl_3b_autoquant_fp8_schemes.py --scheme-name fp8_12bits --auto-quantize-bits 12
    scripts/qwen/qwen2_5_vl_3b_autoquant_fp8_schemes.py --formats nvfp4,fp8 --auto-quantize-bits 4.5

The flags become a recipe, which `bitladder.steps` runs. A later call keeps the schemes of the calls before it, and
what it isn't told it takes from them: the measurement, above all. `docs/guide.md`, "Qwen2.5-VL-3B-Instruct".
"""

import argparse
import copy
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from rich.console import Console
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from bitladder.cli.arguments import names_in
from bitladder.errors import BitladderError, RecipeError
from bitladder.measured import MEASUREMENT_FILE
from bitladder.recipe import PAIR_KINDS, SCHEME_PLACE, Recipe, parse_recipe
from bitladder.records import Measurement, RunState
from bitladder.report import closing_table
from bitladder.steps.run import run as run_step
from bitladder.steps.workspace import Workspace

DATA = Path(__file__).resolve().parents[2] / "recipes" / "data"
OUT_ROOT = Path("models/qwen2_5_vl_3b_instruct")
MODEL_DIR = OUT_ROOT / "checkpoints" / "Qwen2.5-VL-3B-Instruct"
PREFIX, SUFFIX = "fp8_autoquant_", "_coco2017"  # of a scheme's name, where no formats are given; of its directory
FORMATS = ("fp8",)
RECORDS = "autoquant"  # the run's own directory in the out-root
LADDER = "top25,top50,full"
CALIBRATION_SAMPLES = 48
TEXT_TOKENS, PAIR_TOKENS = 512, 1024  # a row; the most of a pair (an image of 640 × 640 has 529)
KEPT = ("model", "calibration", "held_out", "measurement", "export")  # sections of the calls before
# Flags that say what is measured and how; where none is given, the measurement that is there is used again.
MEASURING = (
    "model_dir",
    "captions",
    "calib_size",
    "calib_seq_len",
    "batch_size",
    "score_size",
    "auto_quantize_method",
    "engine",
)
_NAMED = re.compile(r"(?P<prefix>\w+_autoquant_)?(?P<short>top(?P<percent>\d{1,3})|full)")
_KEYS = {"measurement.formats": "--formats", "export.carrier: ": "--carrier "}  # in errors: what a flag says here


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the flags; what isn't given is None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_argument_group("schemes")
    which.add_argument("--schemes", metavar="NAME,…", help=f"topNN, full, or {PREFIX}…; default {LADDER}")
    which.add_argument("--scheme-name", metavar="NAME", help="one scheme; topNN and full say their own coverage")
    target = which.add_mutually_exclusive_group()
    target.add_argument(
        "--coverage", type=float, metavar="SHARE", help="of the searched weights, least sensitive first"
    )
    target.add_argument(
        "--auto-quantize-bits",
        type=float,
        metavar="BITS",
        help="effective bits, at most; from all in the smallest format (fp8: 8, nvfp4: 4.5) to below 16",
    )
    which.add_argument(
        "--formats",
        metavar="NAME,…",
        help="candidates beside bf16 of these schemes; what isn't measured yet is measured, beside what is; default "
        "all that are measured, at first fp8",
    )
    which.add_argument(
        "--carrier",
        choices=["modelopt", "compressed-tensors"],
        help="whose layout all checkpoints have; default modelopt",
    )
    which.add_argument("--kv-cache", choices=["none", "fp8"], default="none", help="of these schemes; default none")
    measure = parser.add_argument_group("measurement")
    measure.add_argument("--measurement", type=Path, metavar="FILE", help="use this measurement.json: don't measure")
    measure.add_argument(
        "--auto-quantize-method",
        choices=["fisher", "gradient", "kl_div"],
        help="default fisher; with --engine modelopt, which hasn't it, gradient",
    )
    measure.add_argument("--engine", choices=["native", "modelopt"], help="who scores; default native")
    measure.add_argument("--score-size", type=int, metavar="N", help="samples scored; default all")
    measure.add_argument("--calib-size", type=int, metavar="N", help="samples: rows of tokens, or pairs; default 48")
    measure.add_argument("--calib-seq-len", type=int, metavar="TOKENS", help="default 512; for pairs at most, 1024")
    measure.add_argument("--batch-size", type=int, metavar="N", help="default 4")
    measure.add_argument(
        "--captions",
        type=Path,
        metavar="PATH",
        help="a text file, a .jsonl of image+text pairs, a COCO directory, or its captions .json; "
        "default recipes/data/coco2017_captions.txt",
    )
    measure.add_argument("--images", type=Path, metavar="DIR", help="COCO images; default the split's, beside them")
    data = parser.add_argument_group("evaluation")
    data.add_argument("--held-out", type=Path, action="append", metavar="PATH", help="as --captions; may be repeated")
    data.add_argument("--held-out-size", type=int, metavar="N", help="samples of each held-out set; default 16")
    places = parser.add_argument_group("places")
    places.add_argument("--model-dir", type=Path, metavar="DIR", help=f"default {MODEL_DIR}")
    places.add_argument("--out-root", type=Path, metavar="DIR", default=OUT_ROOT, help=f"default {OUT_ROOT}")
    return parser.parse_args(arguments)


def schemes_of(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the recipe's entries of the schemes asked for.

    Raises:
        RecipeError: a name that says no target, without a target.
    """
    target = {"coverage": flags.coverage, "effective_bits": flags.auto_quantize_bits}
    target = {key: value for key, value in target.items() if value is not None}
    if flags.schemes is not None and (flags.scheme_name is not None or target):
        raise RecipeError("--schemes goes without --scheme-name, --coverage and --auto-quantize-bits; give one kind")
    formats = None if flags.formats is None else names_in(flags.formats)
    prefix = PREFIX if formats is None else f"{'_'.join(formats)}_autoquant_"
    if flags.scheme_name is None and target:
        share, bits = flags.coverage, flags.auto_quantize_bits
        names = [f"{prefix}{bits:g}bits" if share is None else f"{prefix}top{100 * share:g}"]
    elif flags.scheme_name is not None:
        names = [flags.scheme_name]
    else:
        names = (flags.schemes or LADDER).split(",")
    entries = []
    for name in (name.strip().removesuffix(SUFFIX) for name in names):
        found = _NAMED.fullmatch(name)
        percent = 0 if found is None else int(found["percent"] or 100)
        if not target and not 0 < percent <= 100:
            raise RecipeError(
                f"scheme name {name!r} says no target: use {PREFIX}top1 to {PREFIX}top100 or {PREFIX}full, or give "
                "--coverage or --auto-quantize-bits"
            )
        full_name = f"{found['prefix'] or prefix}{found['short']}" if found is not None and percent else name
        entry = {"name": full_name, **(target or {"coverage": percent / 100}), "kv_cache": flags.kv_cache}
        entries.append(entry if formats is None else {**entry, "formats": formats})
    return entries


def with_formats(
    kept: list[dict[str, Any]], asked: list[dict[str, Any]], earlier: dict[str, Any], known: Measurement | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return all schemes and the formats to measure: those of the calls before, and those asked for beside them.

    A scheme that may have all of them names none. Those of the calls before keep the candidates that they had.

    Args:
        kept: entries of the calls before.
        asked: entries of this call.
        earlier: the recipe of the calls before; empty: there were none.
        known: a measurement that is used instead of measuring.
    """
    before = list(earlier.get("measurement", {}).get("formats") or FORMATS) if earlier else []
    own = {entry["name"]: entry.get("formats") for entry in earlier.get("schemes", ())}
    for entry in asked:
        if "formats" not in entry and own.get(entry["name"]):
            entry["formats"] = list(own[entry["name"]])
    if known is not None:
        measured = list(known.formats)
    else:
        wanted = [name for entry in asked for name in entry.get("formats") or ()]
        measured = list(dict.fromkeys([*before, *wanted])) or list(FORMATS)
    kept = [{**entry, "formats": entry.get("formats") or before} for entry in kept]
    schemes = [*kept, *asked]
    for entry in schemes:
        if set(entry.get("formats") or measured) == set(measured):
            entry.pop("formats", None)
    return schemes, measured


def data_of(path: Path, images: Path | None = None) -> dict[str, Any]:
    """Return the recipe's entry of a data set, told by what `path` is."""
    path = path.expanduser().resolve()
    if not path.is_dir() and path.suffix != ".json":
        if images is not None:
            raise RecipeError(f"--images goes with a COCO directory or its captions .json, not with {path.name}")
        return {"kind": "image_text" if path.suffix == ".jsonl" else "text", "path": str(path)}
    if path.is_dir():
        splits = [s for s in ("train2017", "val2017") if (path / "annotations" / f"captions_{s}.json").exists()]
        images = images or path / (splits[0] if splits else "train2017")
        path = path / "annotations" / f"captions_{images.name}.json"
    else:
        images = images or path.parent.parent / path.stem.removeprefix("captions_")
    images = images.expanduser().resolve()
    return {"kind": "coco", "path": str(images.parent), "split": images.name, "annotations": str(path)}


def recipe_of(flags: argparse.Namespace, records: Path, earlier: dict[str, Any]) -> Recipe:
    """Return the recipe that the flags ask for, filled up from that of the earlier calls (empty: there were none).

    Raises:
        RecipeError: flags that contradict each other. RecordError: `--measurement` names no measurement.
    """
    quantised = flags.out_root.expanduser().resolve() / "quantized"
    schemes = schemes_of(flags)
    again = {scheme["name"] for scheme in schemes}
    kept = [
        entry
        for entry in earlier.get("schemes", ())
        if entry["name"] not in again and (quantised / (entry["name"] + SUFFIX)).exists()
    ]
    content: dict[str, Any] = {
        "model": {"path": str(MODEL_DIR.resolve())},
        "calibration": {
            "data": data_of(DATA / "coco2017_captions.txt"),
            "samples": CALIBRATION_SAMPLES,
            "sequence_length": TEXT_TOKENS,
        },
        "measurement": {},
        **{key: earlier[key] for key in KEPT if key in earlier},
    }
    calibration, measurement = content["calibration"], content["measurement"]
    if flags.model_dir is not None:
        content["model"] = {"path": str(flags.model_dir.expanduser().resolve())}
    if flags.images is not None and flags.captions is None:
        raise RecipeError("--images goes with --captions, which says what is on them")
    given = {"samples": flags.calib_size, "sequence_length": flags.calib_seq_len, "batch_size": flags.batch_size}
    given = {key: value for key, value in given.items() if value is not None}
    if isinstance(calibration, list):  # a recipe with several sets has run here
        if given and flags.captions is None:
            raise RecipeError(
                f"the measurement here is calibrated on {len(calibration)} sets: --calib-size, --calib-seq-len and "
                "--batch-size go with --captions then, which takes their place; or change the recipe"
            )
        if flags.captions is not None:
            calibration = content["calibration"] = {"samples": CALIBRATION_SAMPLES}
    if flags.captions is not None:
        calibration["data"] = data_of(flags.captions, flags.images)
        calibration["sequence_length"] = PAIR_TOKENS if calibration["data"]["kind"] in PAIR_KINDS else TEXT_TOKENS
    if given:
        calibration.update(given)
    if flags.engine == "modelopt" and measurement.get("method") == "fisher":
        del measurement["method"]  # of an earlier call; ModelOpt's engine has a default of its own
    given = {"method": flags.auto_quantize_method, "score_samples": flags.score_size, "engine": flags.engine}
    measurement.update({key: value for key, value in given.items() if value is not None})
    known = None if flags.measurement is None else known_measurement(flags)
    if known is not None:
        measurement.update(method=known.method)
        if known.engine in ("modelopt", "native"):
            measurement.update(engine=known.engine)
    every, measurement["formats"] = with_formats(kept, schemes, earlier, known)
    if flags.carrier is not None:
        content["export"] = {**content.get("export", {}), "carrier": flags.carrier}
    if flags.held_out or flags.captions is not None or "held_out" not in content:
        content["held_out"] = held_out_of(flags.held_out or [], calibration)
    for entry in content["held_out"]:
        size = {} if flags.held_out_size is None else {"samples": flags.held_out_size}
        entry.update({**size, "sequence_length": entry_tokens(entry, calibration)})
    return parse_recipe(
        {
            **content,
            "schemes": every,
            "layout": {
                "checkpoints": f"../quantized/{SCHEME_PLACE}{SUFFIX}",
                "manifests": True,
                "report": "../reports/report-fp8-autoquant-schemes.md",
            },
            "output": str(records),
        },
        "flags",
    )


def known_measurement(flags: argparse.Namespace) -> Measurement:
    """Return the measurement that `--measurement` names.

    Raises:
        RecipeError: other flags ask for what it isn't. RecordError: it is none.
    """
    if any(flag is not None for flag in (flags.auto_quantize_method, flags.score_size, flags.engine)):
        raise RecipeError(
            "--measurement goes without --auto-quantize-method, --score-size and --engine: nothing is measured"
        )
    known = Measurement.read(flags.measurement)
    missing = [name for name in names_in(flags.formats or ",".join(known.formats)) if name not in known.formats]
    if missing:
        raise RecipeError(
            f"--formats {missing[0]} is not in {flags.measurement}, which has {', '.join(known.formats)}; choose among "
            "these, or leave --measurement out to measure it"
        )
    return known


def held_out_of(paths: list[Path], calibration: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the recipe's held-out sets: those given, or what calibration leaves over (and prose, beside images)."""
    if paths:
        return [{"name": path.stem, "data": data_of(path), "samples": 16} for path in paths]
    pairs = calibration["data"]["kind"] in PAIR_KINDS
    rest = {"name": "image_text" if pairs else "captions", "samples": 16}
    prose = {"name": "prose", "data": data_of(DATA / "emma.txt"), "samples": 16}
    return [rest, prose] if pairs else [rest]


def entry_tokens(entry: dict[str, Any], calibration: dict[str, Any] | list[dict[str, Any]]) -> int:
    """Return the tokens of a held-out sample: calibration's, where (the first set of) it is of the same kind."""
    sets = calibration if isinstance(calibration, list) else [calibration]
    pairs = (entry.get("data") or sets[0]["data"])["kind"] in PAIR_KINDS
    alike = (one for one in sets if pairs == (one["data"]["kind"] in PAIR_KINDS))
    return int(next(alike, {"sequence_length": PAIR_TOKENS if pairs else TEXT_TOKENS})["sequence_length"])


def run(flags: argparse.Namespace) -> None:
    """Run the recipe, and say where things are.

    Raises:
        BitladderError: the first step that fails.
    """
    records = flags.out_root.expanduser().resolve() / RECORDS
    state = records / RunState.FILE_NAME
    earlier = RunState.read(state).recipe if state.exists() else {}
    recipe = recipe_of(flags, records, copy.deepcopy(earlier))
    measurement = flags.measurement
    own = records / MEASUREMENT_FILE
    told = any(getattr(flags, name) is not None for name in MEASURING)
    if measurement is None and own.exists() and not told:
        measured = earlier.get("measurement", {}).get("formats") or FORMATS
        measurement = own if tuple(measured) == recipe.measurement.formats else None
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        tasks: dict[str, Any] = {}

        def progress(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        work = Workspace(recipe, records, progress)
        try:
            result = run_step(work, measurement)
        except BitladderError:
            if "measure" not in work.done:  # what was refused is no setting for the next call
                work.state = work.state.model_copy(update={"recipe": earlier})
                work.save()
            raise
    Console(width=160).print(closing_table(result), crop=False)
    for scheme in recipe.schemes:
        print(f"Checkpoint: {work.checkpoint_directory(scheme.name)}")
    print(f"Measurement: {own}")
    print(f"Report: {records.parent / 'reports' / 'report-fp8-autoquant-schemes.md'}")


def main() -> None:
    """Run; exit status 0, or 2 with one line that says what to do."""
    flags = parse()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()  # transformers' own
    try:
        run(flags)
    except BitladderError as error:
        line = str(error)
        for key, flag in _KEYS.items():
            line = line.replace(key, flag)
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on where it stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
