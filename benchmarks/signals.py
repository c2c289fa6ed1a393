"""Signals side by side: what says best which groups FP8 harms, and how much, beside exact single-group KL.

    python benchmarks/signals.py --scratch DIR [--model NAME]     # writes benchmarks/results/signals.json

Every signal is a score per quant group from the same calibration batches, codes (nearest) and scales (fused ones
shared). With g the gradient of the summed loss by a module's output and e what FP8 changes in that output, the forms:

    element  Σ over elements (g e)²: ModelOpt's gradient score
    module   Σ over tokens and modules (Σ over features g e)²
    token    Σ over tokens (Σ over modules and features g e)²: how the loss changes when the group changes at one token
    block    Σ over blocks of 16 tokens (Σ over tokens, modules and features g e)²: with the terms between near tokens
    row      Σ over rows (Σ over tokens, modules and features g e)²: with all terms between tokens, and noisier

and the losses whose gradient it is, by what stands for the logits' gradient p - y at each position:

    data     y the data's label
    sampled  y drawn from p, the model's own distribution: the true Fisher information
    probed   √p z - p Σ √p z with random signs z: the same covariance p - p pᵀ without rare large draws

The last two are drawn once and four times (averaged). ½ · row of either is the second-order estimate of the KL, so all
scores are halved and read as nats per token. `kl` is the exact KL of each group alone (native engine, kl_div). Schemes
planned from every signal and control arms are simulated on held-out text. A GPU helps: about 4 minutes a model, and
`--reduced` is for two CPU cores. What is finished is kept in the scratch directory; a model that isn't named keeps its
results.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import choice
import ladder
import prediction
import quality
import torch

from bitladder.device import deterministic, without_cudnn_attention
from bitladder.formats import get_format
from bitladder.measuring import candidates as taps
from bitladder.measuring import native
from bitladder.measuring.calls import hidden_of
from bitladder.measuring.decoder import Decoder, Pass
from bitladder.measuring.layers import DeviceMemory, Layers

DRAWS = 4
BLOCK = 16  # tokens
FORMS = ("element", "module", "token", "block", "row")
COUNTS = (1, 2, 4, 8)  # batches that a signal is cut down to
NATIVE = "element data"  # what `method: gradient` gives


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    batches: int  # scored
    kl_batches: int  # scored by exact KL
    held_out: int | None  # samples of each held-out set; None: the recipe's
    bits: tuple[float, ...]
    arms: tuple[float, ...]  # coverage of the schemes that have control arms, beside that of 11 bits
    planned: tuple[str, ...]  # signals that schemes are planned from


BITS = (9.0, 10.0, 11.0, 12.0, 13.0, 14.0)
SIGNALS = tuple(
    f"{form} {loss}{draws}"
    for loss, counts in (("data", ("",)), ("sampled", (" x1", f" x{DRAWS}")), ("probed", (" x1", f" x{DRAWS}")))
    for draws in counts
    for form in FORMS
)
UNPLANNED = ("module sampled", "block sampled")  # close to `token sampled`
PLANNED = (*(signal for signal in SIGNALS if not signal.startswith(UNPLANNED)), "kl")
CUT = (NATIVE, "token data", "token sampled x1", "token probed x1", "token probed x4", "row probed x4", "kl")
SIZES = {
    "smollm2-135m-instruct": Size(8, 8, 16, BITS, prediction.COVERAGES, PLANNED),
    "gemma-3-270m": Size(8, 8, 8, BITS, prediction.COVERAGES, PLANNED),
    "embedded-qwen2.5-vl": Size(12, 12, None, BITS, prediction.COVERAGES, PLANNED),
}
REDUCED = Size(
    batches=4,
    kl_batches=1,
    held_out=4,
    bits=(10.0, 12.0),
    arms=(),
    planned=(NATIVE, "token data", "element sampled x4", "token sampled x4", "token probed x4", "row probed x4", "kl"),
)

LogitGradient = Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]


def by_data(p: torch.Tensor, labels: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    """Return the gradient [rows, vocabulary] of the cross entropy with the data's labels [rows] by the logits."""
    gradient = p.clone()
    gradient[torch.arange(len(labels), device=p.device), labels] -= 1
    return gradient


def sampled(p: torch.Tensor, _: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the same with labels drawn from the model's own distribution p [rows, vocabulary]."""
    return by_data(p, torch.multinomial(p, 1, generator=generator)[:, 0], generator)


def probed(p: torch.Tensor, _: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a draw of the same covariance, from random signs."""
    signs = torch.randint(0, 2, p.shape, generator=generator, device=p.device, dtype=torch.int8).mul_(2).sub_(1)
    root = p.sqrt() * signs
    return root - p * root.sum(-1, keepdim=True)


LOSSES: dict[str, tuple[LogitGradient, int]] = {
    "data": (by_data, 1),
    "sampled": (sampled, DRAWS),
    "probed": (probed, DRAWS),
}


class Taps(ExitStack):
    """Keeps, within its context, every module's Σ (g e)², and its Σ over features g e at each token, [rows, tokens]."""

    def __init__(self, model, job, amax) -> None:
        super().__init__()
        self.found: dict[str, tuple] = {}  # of the backward pass at hand
        for group in job.target.groups:
            for name, fp8 in taps.forms_of(model, group, get_format("fp8"), amax, None).items():
                self.callback(model.get_submodule(name).register_forward_hook(self._hook(name, fp8)).remove)

    def _hook(self, name: str, fp8: taps.Form):
        def tap(linear, inputs, output) -> None:
            if output.requires_grad:
                x, exact = inputs[0].detach(), output.detach()
                output.register_hook(lambda gradient: self._add(name, linear, fp8, x, exact, gradient))

        return tap

    @torch.no_grad()
    def _add(self, name, linear, fp8, x, exact, gradient) -> None:
        product = gradient * (fp8.output_of(x, linear.bias) - exact)
        self.found[name] = product.square().sum(dtype=torch.float64), product.sum(-1, dtype=torch.float64)


def forms_of(scores: dict, groups) -> dict[str, dict[str, float]]:
    """Return every form's score of every group from what `Taps` kept of a pass."""
    rows = []
    for group in groups:
        elements, each = zip(*(scores[module.name] for module in group.modules), strict=True)
        together = torch.stack(each).sum(0)
        blocks = torch.nn.functional.pad(together, (0, -together.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        sums = (torch.stack(each), together, blocks.sum(-1), together.sum(-1))
        rows.append(torch.stack([sum(elements), *(part.square().sum() for part in sums)]))
    values = torch.stack(rows).T.tolist()
    names = [group.name for group in groups]
    return {form: dict(zip(names, row, strict=True)) for form, row in zip(FORMS, values, strict=True)}


class Scorer(ExitStack):
    """All gradient signals of a batch from one forward pass; a context manager."""

    def __init__(self, layers, job, amax) -> None:
        super().__init__()
        self.job, self.decoder = job, Decoder(layers, job)
        self.taps = self.enter_context(Taps(layers.model, job, amax))

    def scores(self, batch, seed: int) -> tuple[dict[str, list[dict]], dict[str, float]]:
        """Return each loss's draws, each `{form: {group: score of the mean loss}}`, and seconds for a pass of each."""
        found, seconds, start = {}, {}, seconds_now()
        recorded = Pass(batch)
        self.decoder.record(recorded)
        seconds["forward"] = seconds_now() - start
        for loss, (logit_gradient, draws) in LOSSES.items():
            start = seconds_now()
            found[loss] = []
            for draw in range(draws):
                generator = torch.Generator(batch.labels.device).manual_seed(seed * DRAWS + draw)
                # Nothing is kept of the forward pass: its graph serves one backward pass, and there are several.
                gradient = gradient_of(self.decoder, recorded, logit_gradient, generator)
                for index in range(len(self.decoder.layers) - 1, self.decoder.first - 1, -1):
                    call = recorded.calls[index]
                    leaf = call.hidden.detach().requires_grad_()
                    output = hidden_of(self.decoder.layers.layers[index](leaf, *call.args, **call.kwargs))
                    with deterministic():
                        (gradient,) = torch.autograd.grad(output, leaf, gradient)
                found[loss].append(forms_of(self.taps.found, self.job.target.groups))
            seconds[loss] = (seconds_now() - start) / draws
        return found, seconds


def gradient_of(decoder, current, logit_gradient: LogitGradient, generator: torch.Generator) -> torch.Tensor:
    """Return the gradient by the last layer's output as `_Decoder.loss_gradient` does, of any of `LOSSES`."""
    tokens = current.batch.loss_tokens

    def by_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(logits.detach().float(), -1)
        return logit_gradient(p, labels, generator).div_(tokens).to(logits.dtype)

    return decoder._gradient(current, by_logits)


def seconds_now() -> float:
    """Return the time once the GPU, where there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(name: str, size: Size, scratch: Path) -> tuple:
    """Return the measurement by exact KL and its workspace."""
    from bitladder.steps.measure import measure
    from bitladder.steps.workspace import Workspace

    recipe = quality.recipe_of(name, "captions")
    per_batch = recipe.calibration[0].batch_size
    spec = recipe.measurement.model_copy(
        update={
            "engine": "native",
            "method": "kl_div",
            "rounding": "nearest",
            "score_samples": size.kl_batches * per_batch,
            "dtype": "float32",
        }
    )
    held_out = recipe.held_out
    if size.held_out is not None:
        held_out = tuple(part.model_copy(update={"samples": size.held_out, "batch_size": 8}) for part in held_out)
    work = Workspace(
        recipe.model_copy(update={"measurement": spec, "held_out": held_out}), scratch / f"kl-{size.kl_batches}"
    )
    return measure(work), work


def scored(work, measurement, batches: int, scratch: Path) -> list[dict]:
    """Return what every batch gave: tokens, seconds, the draws of each loss, and ModelOpt's score by our engine."""
    from bitladder.device import resolve_device
    from bitladder.measured import read_amax
    from bitladder.measuring.job import Job
    from bitladder.models.loading import load_model
    from bitladder.models.target import find_target
    from bitladder.steps.data import calibration_data
    from bitladder.storage import atomic_write

    paths = [scratch / f"signals-{index:05}.json" for index in range(batches)]
    if not all(path.exists() for path in paths):
        device = resolve_device(work.recipe.measurement.device)
        data = calibration_data(work)
        amax = read_amax(measurement, work.output)
        model = load_model(work.model_directory, torch.float32, device)
        model.config.use_cache = False
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        target = find_target(work.model_directory)
        spec = work.recipe.measurement.model_copy(update={"method": "gradient"})
        shapes = tuple(batch.labels.shape for batch in data.batches[:batches])
        job = Job(target, data.batches, shapes, spec, device, lambda *_: None)
        layers = Layers.of(model, target, DeviceMemory(device, None), native.REMEDY)
        for index, path in enumerate(paths):
            if path.exists():
                continue
            batch = data.batches[index].to(device)
            with without_cudnn_attention():
                with native.scorer(layers, job, amax, None) as reference:
                    start = seconds_now()
                    (wait,) = reference.scores([data.batches[index]])
                    ours = wait()
                    seconds = {"native": seconds_now() - start}
                with Scorer(layers, job, amax) as scorer:
                    losses, passes = scorer.scores(batch, index)
            content = {
                "tokens": batch.loss_tokens,
                "seconds": seconds | passes,
                "native": {group: formats[taps.FORMAT][0] for group, formats in ours.items()},
                "losses": losses,
            }
            atomic_write(path, json.dumps(content))
            print(path.name, content["seconds"], flush=True)
    return [json.loads(path.read_text()) for path in paths]


Table = dict[str, list[float]]  # group -> score of each batch, in nats over all of its tokens


def tables_of(rows: list[dict], measurement) -> dict[str, Table]:
    """Return every signal's scores."""
    groups = [group.name for group in measurement.groups]
    found: dict[str, Table] = {}
    for signal in SIGNALS:
        form, loss, draws = f"{signal} x1".split()[:3]
        found[signal] = {
            group: [
                0.5
                * row["tokens"] ** 2
                * statistics.fmean(draw[form][group] for draw in row["losses"][loss][: int(draws[1:])])
                for row in rows
            ]
            for group in groups
        }
    found["kl"] = {candidate.group: list(candidate.scores) for candidate in measurement.candidates}
    return found


def measurement_of(measurement, table: Table, tokens: Sequence[int], batches: Iterable[int]):
    """Return the measurement with a signal's scores of some batches."""
    batches = list(batches)
    total = sum(tokens[index] for index in batches)
    candidates = tuple(
        candidate.model_copy(update={"scores": tuple(table[candidate.group][index] for index in batches)})
        for candidate in measurement.candidates
    )
    weights = (1 / total,) * len(batches)
    return measurement.model_copy(update={"candidates": candidates, "score_weights": weights})


@torch.no_grad()
def held_out_kls(work, measurement, choices: Iterable[tuple[str, ...]], cache: Path) -> dict:
    """Return KL and standard error of each choice of groups on every held-out set: groups, joined -> set -> both.

    As `Simulation.results`, but all on the model's device: large log-probabilities take seconds to copy.
    """
    from bitladder.device import resolve_device
    from bitladder.evaluation.metrics import Sums, add_rows
    from bitladder.steps.originals import Originals
    from bitladder.steps.simulated import simulation_of
    from bitladder.storage import atomic_write

    known = json.loads(cache.read_text()) if cache.exists() else {}
    missing = {" ".join(groups): groups for groups in choices if " ".join(groups) not in known}
    if not missing:
        return known
    device = resolve_device(work.recipe.measurement.device)
    simulation = simulation_of(work, measurement, device)
    with Originals(work) as originals:
        data = {split: [batch.to(device) for batch in found.batches] for split, found in originals.data.items()}

    def log_p(batch) -> torch.Tensor:
        return torch.log_softmax(simulation.model(**batch.inputs, use_cache=False).logits[:, :-1][batch.predicted], -1)

    references = {split: [log_p(batch) for batch in batches] for split, batches in data.items()}
    start = time.perf_counter()
    for count, (key, groups) in enumerate(missing.items(), 1):
        known[key] = {}
        with simulation._quantised(quality.scheme_of(measurement, groups)):
            for split, batches in data.items():
                sums = Sums()
                for batch, reference in zip(batches, references[split], strict=True):
                    add_rows(sums, batch, reference, log_p(batch))
                known[key][split] = sums.ratio(sums.kl)
        atomic_write(cache, json.dumps(known))
        if count % 10 == 0 or count == len(missing):
            print(f"{count} of {len(missing)} schemes, {(time.perf_counter() - start) / count:.2f} s each", flush=True)
    return known


def arms_of(measurement, coverages: tuple[float, ...]) -> list[tuple[str, ...]]:
    """Return the schemes of `prediction.py`, planned by exact KL, and their control arms."""
    from bitladder import planning
    from bitladder.recipe import ControlSpec, SchemeSpec
    from bitladder.steps.known import control_arms

    specs = [SchemeSpec(name=f"top{100 * share:g}", coverage=share) for share in coverages]
    specs.append(SchemeSpec(name="bits", effective_bits=prediction.EFFECTIVE_BITS))
    schemes = planning.plan_all(measurement, specs)
    every = [*schemes, *control_arms(measurement, schemes, ControlSpec())]
    return [tuple(sorted(scheme.quantised_groups())) for scheme in every]


def off(ratios: Sequence[float]) -> dict[str, float]:
    """Return how far predicted over measured KL lies from one."""
    errors = [abs(ratio - 1) for ratio in ratios]
    return {"median_ratio": statistics.median(ratios), "median": statistics.median(errors), "largest": max(errors)}


def predictions(scores: dict[str, float], points: list[tuple[str, ...]], kls: list[float]) -> dict:
    """Return how well a signal's sums say the KL of the points: as they are, and fitted on all the others."""
    from bitladder.planning.pricing import InFormat

    sums = [sum(scores[group] for group in groups) for groups in points]
    parts = [{"fp8": InFormat(one, one)} for one in sums]  # no weight scores more than another: nothing to shrink to
    fitted = prediction.predicted({"fp8": 1.0}, parts, kls)
    return {
        "plain": off([value / kl for value, kl in zip(sums, kls, strict=True)]),
        "fitted": {key: fitted[key] for key in ("exponent", "median_error", "largest_error")},
    }


def result_of(name: str, size: Size, scratch: Path) -> dict:
    """Return everything about one model."""
    from bitladder.report.groups import rank_correlation
    from bitladder.runinfo import hardware, versions

    measurement, work = measured(name, size, scratch)
    rows = scored(work, measurement, size.batches, scratch)
    tokens = [row["tokens"] for row in rows]
    tables = tables_of(rows, measurement)
    groups = [group.name for group in measurement.groups]

    def cut(signal: str, batches: Iterable[int]):
        return measurement_of(measurement, tables[signal], tokens, batches)

    def sums(found) -> dict[str, float]:
        return {candidate.group: found.sensitivity(candidate) for candidate in found.candidates}

    count_of = {signal: size.kl_batches if signal == "kl" else size.batches for signal in tables}
    whole = {signal: cut(signal, range(count)) for signal, count in count_of.items()}
    plans = {signal: {bits: quality.planned(whole[signal], bits) for bits in size.bits} for signal in size.planned}
    first = {
        (signal, count): {bits: quality.planned(cut(signal, range(count)), bits) for bits in size.bits}
        for signal in CUT
        if signal in size.planned
        for count in COUNTS
        if count < count_of[signal]
    }
    arms = arms_of(measurement, size.arms)
    points = sorted({*arms, *(groups for row in plans.values() for groups in row.values())})
    every = [*points, *(groups for row in first.values() for groups in row.values())]
    known = held_out_kls(work, measurement, dict.fromkeys(every), scratch / f"simulated-{size.held_out}.json")
    splits = [part.name for part in work.recipe.held_out]

    def kl(chosen: tuple[str, ...], split: str) -> float:
        return known[" ".join(chosen)][split][0]

    def over_kl(row: dict[float, tuple[str, ...]], split: str) -> dict:
        ratios = [kl(chosen, split) / kl(plans["kl"][bits], split) for bits, chosen in row.items()]
        return {**choice.geometric_mean(ratios), "largest": max(ratios)}

    exact = sums(whole["kl"])
    kinds: dict[str, list[str]] = {}
    for group in groups:
        kinds.setdefault(group.rpartition(".")[2], []).append(group)
    signals: dict = {}
    for signal in tables:
        own = sums(whole[signal])
        entry = signals[signal] = {
            "spearman_with_kl": rank_correlation([own[g] for g in groups], [exact[g] for g in groups]),
            "sum_over_sum_of_kl": sum(own.values()) / sum(exact.values()),
            "by_kind": {
                kind: sum(own[g] for g in members) / sum(exact[g] for g in members) for kind, members in kinds.items()
            },
            "sets": {
                split: predictions(own, points, [kl(chosen, split) for chosen in points])
                | {"arms": predictions(own, arms, [kl(chosen, split) for chosen in arms])}
                for split in splits
            },
            "batches": {},
        }
        for split in splits if signal in plans else ():
            row = plans[signal]
            entry["sets"][split]["kl_over_that_of_kl_plans"] = over_kl(row, split)
            own_plans = [sum(own[group] for group in chosen) / kl(chosen, split) for chosen in row.values()]
            entry["sets"][split]["own_plans"] = off(own_plans)
        for count in COUNTS:
            parts = [cut(signal, range(s, s + count)) for s in range(0, count_of[signal] - count + 1, count)]
            scores = [sums(part) for part in parts]
            if not scores:
                continue
            ranks = [rank_correlation([one[g] for g in groups], [exact[g] for g in groups]) for one in scores]
            totals = [sum(one.values()) / sum(exact.values()) for one in scores]
            found = entry["batches"][count] = {
                "parts": len(parts),
                "spearman_with_kl": [min(ranks), statistics.fmean(ranks), max(ranks)],
                "sum_over_sum_of_kl": [min(totals), statistics.fmean(totals), max(totals)],
                "fitted_median_error": {
                    split: statistics.fmean(
                        predictions(one, points, [kl(c, split) for c in points])["fitted"]["median_error"]
                        for one in scores
                    )
                    for split in splits
                },
            }
            if (signal, count) in first:  # of the first part
                row = first[signal, count]
                found["kl_over_that_of_kl_plans"] = {split: over_kl(row, split) for split in splits}
    differences = [abs(row["losses"]["data"][0]["element"][g] / row["native"][g] - 1) for row in rows for g in groups]
    return {
        "hardware": hardware(),
        "versions": versions(),
        "size": asdict(size),
        "tokens": tokens,
        "seconds_a_batch": {key: statistics.median(row["seconds"][key] for row in rows) for key in rows[0]["seconds"]},
        "kl_seconds_a_batch": next(p.seconds for p in measurement.run.phases if p.phase == "score") / size.kl_batches,
        "largest_difference_to_native": max(differences),
        "signals": signals,
        "points": [
            {"bits": quality.scheme_of(measurement, chosen).effective_bits, "arm": chosen in arms}
            | {split: known[" ".join(chosen)][split] for split in splits}
            for chosen in points
        ],
    }


def table_of(result: dict) -> str:
    """Return the numbers that decide, a line for each signal."""
    lines = []
    for signal, entry in result["signals"].items():
        cells = [f"{signal:20} spearman {entry['spearman_with_kl']:.3f}"]
        for split, found in entry["sets"].items():
            plain, fitted = found["plain"], found["fitted"]
            cells.append(
                f"{split}: plain {plain['median_ratio']:.2f} off {plain['median']:.3f} {plain['largest']:.2f} "
                f"fitted {fitted['median_error']:.3f} {fitted['largest_error']:.2f}"
            )
            if "own_plans" in found:
                over, own = found["kl_over_that_of_kl_plans"], found["own_plans"]
                cells[-1] += (
                    f" own plans {own['median_ratio']:.2f}"
                    f" KL {over['geometric_mean']:.3f} ({over['low']:.3f} to {over['high']:.3f})"
                )
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--model", choices=SIZES, action="append", help="all where none is named")
    parser.add_argument("--reduced", action="store_true", help="fewer batches, schemes and held-out samples")
    parser.add_argument("--held-out", type=int, help="samples of each held-out set")
    parser.add_argument("--result", type=Path, default=ladder.ROOT / "benchmarks/results/signals.json")
    arguments = parser.parse_args()

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = arguments.result
    models = json.loads(path.read_text())["models"] if path.exists() else {}
    for name in arguments.model or SIZES:
        size = REDUCED if arguments.reduced else SIZES[name]
        if arguments.held_out is not None:
            size = replace(size, held_out=arguments.held_out)
        models[name] = result_of(name, size, arguments.scratch.resolve() / name)
        print(table_of(models[name]), flush=True)
        claim = "which signal predicts exact KL, the KL of whole schemes, and chooses groups of least held-out KL"
        path.write_text(json.dumps({"claim": claim, "models": models}, indent=1) + "\n")


if __name__ == "__main__":
    main()
