"""ModelOpt's best four-bit codes, alone and in the mixes that its AutoQuantize makes of them and FP8, beside ours.

    python benchmarks/modelopt_codes.py --scratch DIR [--recipe RECIPE] [--serve-on hopper] [--codes NAME]
                                                    # writes benchmarks/results/modelopt_codes.json; needs an NVIDIA GPU

For each of `CODES` ModelOpt calibrates {NVFP4, FP8}, scores them with these codes by `gradient`, and its own solver
chooses at 4.8 to 12 effective bits, modules that aren't searched left out of its count; and it quantises everything to
NVFP4. What is judged is its own model, as it computes with its own fake quantisation; on Hopper's account NVFP4's
inputs stay in 16 bits, also where it calibrates and scores. AWQ scales the inputs of every module by itself, which no
runtime here loads; it counts all the same. Its calibration rows are those of our measurement with compensated codes
(`mixes.py --compensated`, whose scratch directory serves): half a recipe's, and as many that the model writes itself.
Ours is planned with at most its bits from the same two formats and from all that are no integers, by `gradient`.

KL on the sets of `mixes.py`, in nats per token. What is finished is kept in the scratch directory; models, devices and
codes that aren't named keep their results.
"""

import copy
import json
from pathlib import Path

import mixes
import others

CODES = {
    "nearest": "NVFP4_DEFAULT_CFG",
    "mse": "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",  # of all scales of a block that with the least error
    "local_hessian": "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG",  # with the least error weighed by the inputs of the block
    "awq_lite": "NVFP4_AWQ_LITE_CFG",
}
NVFP4_BITS = 4.5  # ModelOpt counts static blocks as 4 bits where it isn't told
BITS = (*mixes.BITS, 10.0, 12.0)
SETS = {name: mixes.SETS[name] for name in ("same", "all")}


def preset_of(codes: str, serve_on: str) -> dict:
    """Return ModelOpt's configuration of NVFP4 with some codes, as the device that will serve computes it."""
    import modelopt.torch.quantization as mtq

    preset = copy.deepcopy(getattr(mtq, CODES[codes]))
    quantisers = {entry["quantizer_name"]: entry for entry in preset["quant_cfg"] if entry.get("cfg")}
    assert set(quantisers) == {"*weight_quantizer", "*input_quantizer"}
    if serve_on == "hopper":
        del quantisers["*input_quantizer"]
    quant_cfg = [{"quantizer_name": "*", "enable": False}, *quantisers.values()]
    return {**preset, "quant_cfg": quant_cfg, "effective_bits": NVFP4_BITS}


def for_modules(preset: dict, names: list[str]) -> dict:
    """Return a configuration for some modules.

    Others are never told of the format: a convolution of pictures rounds its weights to it even where it is disabled.
    """
    nothing, *quantisers = preset["quant_cfg"]
    own = [
        {**entry, "quantizer_name": f"{name}.{entry['quantizer_name'].removeprefix('*')}"}
        for name in names
        for entry in quantisers
    ]
    return {**preset, "quant_cfg": [nothing, *own]}


def all_in_nvfp4(work, measurement, preset: dict):
    """Return the model in float32 that ModelOpt quantises to NVFP4, all that is searched and nothing else."""
    import modelopt.torch.quantization as mtq
    import torch

    from bitladder.device import resolve_device
    from bitladder.models.loading import load_model
    from bitladder.steps.data import calibration_data

    device = resolve_device(work.recipe.measurement.device)
    model = load_model(work.model_directory, torch.float32, device)
    model.config.use_cache = False
    searched = {module.name for group in measurement.groups for module in group.modules}
    batches = [batch.to(device) for batch in calibration_data(work).batches]

    def forward_all(loaded) -> None:
        for batch in batches:
            loaded(**batch.inputs)

    with torch.no_grad():
        model = mtq.quantize(model, for_modules(preset, sorted(searched)), forward_all)
    quantised = {
        name.removesuffix(".weight_quantizer")
        for name, module in model.named_modules()
        if name.endswith(".weight_quantizer") and module.is_enabled
    }
    assert quantised == searched
    return model.eval()


def theirs(work, measurement, codes: str, serve_on: str, judge: others.Judge, scratch: Path) -> list[dict]:
    """Return a row for everything in NVFP4 and one for each of `BITS`: ModelOpt's choice, its bits and its KL."""
    from bitladder import planning
    from bitladder.formats import get_format
    from bitladder.recipe import SchemeSpec

    presets = {"fp8": get_format("fp8").modelopt_quantisation(), "nvfp4": preset_of(codes, serve_on)}
    origin = str(work.model_directory)
    uniform = judge.kl_of_model(
        f"{codes} {NVFP4_BITS:g}", origin, lambda: all_in_nvfp4(work, measurement, presets["nvfp4"])
    )
    rows = [{"codes": codes, "bits": NVFP4_BITS, "effective_bits": NVFP4_BITS, "kl": uniform}]
    for bits in BITS:
        chosen, key = scratch / f"{codes}-{bits:g}.json", f"{codes} {bits:g}"

        def load(bits=bits, chosen=chosen):
            model, choice_at = mixes.auto_quantized(
                work, measurement, "gradient", presets, bits, scratch / f"{codes}.pth"
            )
            chosen.write_text(json.dumps(choice_at(bits)))
            return model.eval()

        kl = judge.kl_of_model(key, origin, load)
        name = f"modelopt-{codes}-{bits:g}"
        scheme = planning.price(
            measurement, name, json.loads(chosen.read_text()), SchemeSpec(name=name, effective_bits=bits)
        )
        rows.append({"codes": codes, "bits": bits, "effective_bits": scheme.effective_bits, "kl": kl})
    return rows


def add_ours(rows: list[dict], work, measurement, cache: Path) -> None:
    """Add to the rows our choices with compensated codes at no more bits, and their KL over ModelOpt's."""
    import prediction

    schemes = {
        (number, label): mixes.planned(measurement, formats, f"plan{number}-{at}", row["effective_bits"])
        for number, row in enumerate(rows)
        for at, (label, formats) in enumerate(SETS.items())
    }
    kls = prediction.results_of(work, measurement, list(schemes.values()), cache)
    for (number, label), scheme in schemes.items():
        result, row = kls[scheme.fingerprint()], rows[number]
        ratio = {split: value[0] / row["kl"][split][0] for split, value in result.items()}
        row[label] = {"effective_bits": scheme.effective_bits, "kl": result, "ratio": ratio}


def compare(recipe: Path, scratch: Path, serve_on: str, wanted: list[str]) -> list[dict]:
    """Return the rows of some codes, with ours beside them."""
    from bitladder.runinfo import Meter
    from bitladder.steps.originals import Originals

    measurement, work = mixes.measured(scratch, recipe, "gradient", serve_on, compensated=True)
    own = scratch / "modelopt-codes"
    own.mkdir(exist_ok=True)
    rows = []
    with Originals(work) as originals:
        judge = others.Judge(work, own / "kl.json", originals.references(Meter()))
        for codes in wanted:
            rows += theirs(work, measurement, codes, serve_on, judge, own)
    add_ours(rows, work, measurement, own / "ours.json")
    return rows


def main() -> None:
    parser = mixes.parser_of(__doc__, "modelopt_codes.json")
    parser.add_argument("--codes", choices=CODES, action="append", help="all where none is named")
    arguments = parser.parse_args()
    if arguments.serve_on not in others.TARGETS:
        parser.error(f"--serve-on: NVFP4 is computed here as {' and '.join(others.TARGETS)} do")
    name, scratch = mixes.started(arguments)
    wanted = arguments.codes or list(CODES)
    found = compare(arguments.recipe, scratch, arguments.serve_on, wanted)
    models = mixes.known_models(arguments.result)
    kept = [row for row in models.get(name, {}).get("rows", []) if row["codes"] not in wanted]
    models[name] = {**mixes.measured_here(), "rows": kept + found}
    claim = "held-out KL of ModelOpt's best NVFP4 codes, alone and in its mixes with FP8, and of ours at no more bits"
    mixes.record(arguments.result, claim, models)


if __name__ == "__main__":
    main()
