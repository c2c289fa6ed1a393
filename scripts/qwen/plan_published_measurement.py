"""Writes docs/examples/qwen2_5_vl_3b/: what the published sensitivity of Qwen2.5-VL-3B-Instruct says.

    scripts/qwen/plan_published_measurement.py [MANIFEST] [DIRECTORY]

`schemes/*.json` are the plans, `order.csv` the order in which quant groups go to FP8, and `README.md` what they say.
Everything follows from the manifest; a test compares what is committed with what this script writes.
"""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from bitladder import planning
from bitladder.planning import importing
from bitladder.recipe import SchemeSpec, parse_schemes
from bitladder.records import Candidate, Measurement, QuantGroup, QuantModule, Scheme

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "tests" / "data" / "qwen2_5_vl_3b_instruct_fp8_autoquant_manifest.json"
EXAMPLE = ROOT / "docs" / "examples" / "qwen2_5_vl_3b"
SHARES = tuple(range(10, 101, 10))  # percent of the searched weights
BITS = (9, 10, 11, 12, 14)
FORMAT = "fp8"
KINDS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
DEPTHS = ((0, 3), (4, 26), (27, 35))  # first and last layer of each range
SHOWN = 12  # groups shown


def asked() -> tuple[SchemeSpec, ...]:
    """Return what is planned."""
    shares = [{"name": f"top{share}", "coverage": share / 100} for share in SHARES]
    return parse_schemes([*shares, *({"name": f"bits{bits}", "effective_bits": float(bits)} for bits in BITS)])


def all_groups(manifest: Path, language_model: Measurement) -> Measurement:
    """Return the measurement over every group that ModelOpt searched, the vision tower's among them."""
    entries = json.loads(manifest.read_text(encoding="utf-8"))["layer_sensitivity"]
    groups, candidates = [], []
    for key, entry in entries.items():
        name, elements = key.removesuffix(".quant_recipe"), int(max(entry["costs"]))
        score = entry["scores"][entry["costs"].index(min(entry["costs"]))]
        groups.append(QuantGroup(name=name, modules=(QuantModule(name=name),), weight_elements=elements))
        candidates.append(Candidate(group=name, format=FORMAT, weight_bits=8 * elements, scores=(score,)))
    return language_model.model_copy(update={"groups": tuple(groups), "candidates": tuple(candidates), "untouched": ()})


def kind_of(group: str) -> str:
    """Return the last part of a group's name."""
    return group.rpartition(".")[2]


def layer_of(group: str) -> int:
    """Return the number of a group's layer."""
    return int(group.split(".")[2])


def short(group: str) -> str:
    """Return a group's name without what all have in common."""
    return group.removeprefix("language_model.layers.")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Facts:
    """A measurement by group: size, score, and the order in which the groups go to FP8."""

    def __init__(self, measurement: Measurement) -> None:
        by_group = measurement.by_group()
        self.weights = measurement.searched_weights
        self.size = {group.name: group.weight_elements for group in measurement.groups}
        self.first = {group.name: group.modules[0].name for group in measurement.groups}
        self.score = {name: measurement.sensitivity(row[FORMAT]) for name, row in by_group.items()}
        self.total = math.fsum(self.score.values())
        self.order = planning.density_order(measurement, FORMAT)

    def shares(self, groups: Sequence[str]) -> tuple[float, float]:
        """Return the share that these groups have of the weights, and of the summed score."""
        size = sum(self.size[group] for group in groups)
        return size / self.weights, math.fsum(self.score[group] for group in groups) / self.total


def order_csv(facts: Facts) -> str:
    """Return the order by predicted damage per bit saved, with the sums so far."""
    lines = ["place,group,weights,score,score_per_saved_bit,coverage,effective_bits,predicted_score"]
    sizes = accumulate(facts.size[group] for group in facts.order)
    scores = accumulate(facts.score[group] for group in facts.order)
    for place, (group, size, score) in enumerate(zip(facts.order, sizes, scores, strict=True), start=1):
        own, weights = facts.score[group], facts.size[group]
        coverage = size / facts.weights
        lines.append(
            f"{place},{group},{weights},{own:.6g},{own / (8 * weights):.6g},"
            f"{coverage:.6f},{16 - 8 * coverage:.6f},{score:.6g}"
        )
    return "\n".join(lines) + "\n"


PAGE = """\
# Plans from a published sensitivity of Qwen2.5-VL-3B-Instruct

Source: [the published manifest](../../../tests/data/README.md) of a ModelOpt AutoQuantize search (gradient method, FP8,
{samples} scoring samples of COCO 2017), imported by `bitladder import`. No weights are needed:
`scripts/qwen/plan_published_measurement.py` writes this page, [order.csv](order.csv) and `schemes/`.

The language model's {groups} quant groups are searched, {weights} weights. The *score* is ModelOpt's own number, a
diagonal-Fisher estimate of the damage: it ranks, its unit is not that of KL. The manifest has no batches (so there are
no intervals) and no amax values: good for planning, not for export.

## The ladder
{ladder}

`topNN` takes the groups of least score per bit saved; `bitsN` has the least score within N effective bits.
top50 costs {half} of the damage of all FP8; what top90 leaves out costs {tail}.

## What is fragile
By block type. *Density* is the share of the score over the share of the weights; *place* is the mean place in the order
of all {groups}, the least sensitive per bit first.

{kinds}

By depth:

{depths}

The {shown} groups of the largest score; the last column adds up:

{fragile}

A few groups carry most of it: `{worst}` alone {worst_share}, the first three {three_score} with {three_weights} of the
weights. Layers {layers} have {layers_score} of the score. Per weight q/k/v is the most fragile type, gate/up the least.
The type alone doesn't decide: down_proj goes in earliest on average, and has the two largest scores of the MLPs; o_proj
has the first place of all (`{first}`) and some of the last. The very last is `{last}`.

## The order in which groups go in
Groups of each type (of 36) that a scheme has in FP8; [order.csv](order.csv) has all places. Hardly any q/k/v goes in
before the last fifth of the weights; gate/up and down go in side by side, most of o_proj at 60% to 80%.

{entering}

## ModelOpt's own choice at 11.0 bits
ModelOpt searched {all_groups} groups, the vision tower's and its patch embedding among them: {all_weights} weights.

| | effective bits | score |
| --- | --- | --- |
| published: ModelOpt's choice | {published_bits} | {published_score} |
| the exact optimum within 11.0 bits, same scores | {optimal_bits} | {optimal_score} |

The difference is {difference}: with one format, ModelOpt's gradient solver found the optimum. The manifest doesn't list
what was chosen; the optimum has {chosen} groups of the language model in FP8 and {vision} of the vision tower.

What 11.0 bits means depends on the denominator. With the vision tower in it, the language model alone is at
{inside_bits} bits ({inside_coverage} coverage, score {optimal_short}). Over the language model alone, 11.0 bits are
{eleven_groups} groups, {eleven_coverage} coverage, score {eleven_score}.
"""


def page(facts: Facts, schemes: Sequence[Scheme], everywhere: Scheme, published: dict[str, float]) -> str:
    """Return README.md; `everywhere` is the optimum at 11.0 bits over all that ModelOpt searched."""
    by_name = {scheme.name: scheme for scheme in schemes}
    ladder = [
        [
            f"[{scheme.name}](schemes/{scheme.name}.json)",
            str(len(scheme.quantised_groups())),
            f"{scheme.coverage:.2%}",
            f"{scheme.effective_bits:.4f}",
            f"{scheme.predicted_score:.6f}",
            f"{scheme.predicted_score / facts.total:.1%}",
        ]
        for scheme in sorted(schemes, key=lambda scheme: scheme.coverage)
    ]
    kinds, depths = [], []
    for kind in KINDS:
        weights, score = facts.shares([group for group in facts.order if kind_of(group) == kind])
        places = [place for place, group in enumerate(facts.order, start=1) if kind_of(group) == kind]
        mean = sum(places) / len(places)
        kinds.append([kind, f"{weights:.1%}", f"{score:.1%}", f"{score / weights:.2f}", f"{mean:.0f}"])
    for first, last in DEPTHS:
        weights, score = facts.shares([group for group in facts.order if first <= layer_of(group) <= last])
        depths.append([f"{first} to {last}", f"{weights:.1%}", f"{score:.1%}", f"{score / weights:.2f}"])
    worst = sorted(facts.score, key=lambda group: -facts.score[group])[:SHOWN]
    fragile = []
    for count, group in enumerate(worst, start=1):
        (weights, score), (_, so_far) = facts.shares([group]), facts.shares(worst[:count])
        fragile.append([short(group), f"{weights:.2%}", f"{score:.1%}", f"{so_far:.1%}"])
    entering = []
    for share in SHARES:
        inside = [kind_of(group) for group in by_name[f"top{share}"].quantised_groups()]
        entering.append([f"top{share}", *(str(inside.count(kind)) for kind in KINDS)])
    chosen = everywhere.quantised_groups()
    language = [size for name, size in modelopt_sizes(facts).items() if name in chosen]
    coverage = sum(language) / facts.weights
    eleven = by_name["bits11"]
    by_layer = {layer_of(group): 0.0 for group in facts.order}
    for group, score in facts.score.items():
        by_layer[layer_of(group)] += score
    heaviest = sorted(by_layer, key=lambda layer: -by_layer[layer])[:3]
    three_weights, three_score = facts.shares(worst[:3])
    return PAGE.format(
        samples=f"{published['samples']:g}",
        groups=len(facts.order),
        weights=f"{facts.weights:,}",
        ladder=table(["scheme", "groups", "coverage", "effective bits", "score", "of all FP8"], ladder),
        half=f"{by_name['top50'].predicted_score / facts.total:.0%}",
        tail=f"{1 - by_name['top90'].predicted_score / facts.total:.0%}",
        kinds=table(["group", "weights", "score", "density", "place"], kinds),
        depths=table(["layers", "weights", "score", "density"], depths),
        shown=SHOWN,
        fragile=table(["group", "weights", "score", "so far"], fragile),
        worst=short(worst[0]),
        worst_share=f"{facts.shares(worst[:1])[1]:.0%}",
        three_score=f"{three_score:.0%}",
        three_weights=f"{three_weights:.1%}",
        first=short(facts.order[0]),
        last=short(facts.order[-1]),
        layers=", ".join(str(layer) for layer in heaviest[:2]) + f" and {heaviest[2]}",
        layers_score=f"{facts.shares([g for g in facts.order if layer_of(g) in heaviest])[1]:.0%}",
        entering=table(["scheme", *KINDS], entering),
        all_groups=len(everywhere.formats),
        all_weights=f"{everywhere.searched_weights:,}",
        published_bits=repr(published["effective_bits"]),
        published_score=repr(published["score"]),
        optimal_bits=repr(everywhere.effective_bits),
        optimal_score=repr(everywhere.predicted_score),
        difference=f"{published['score'] - everywhere.predicted_score:g}",
        chosen=len(language),
        vision=len(chosen) - len(language),
        inside_bits=f"{16 - 8 * coverage:.4f}",
        inside_coverage=f"{coverage:.2%}",
        optimal_short=f"{everywhere.predicted_score:.6f}",
        eleven_groups=len(eleven.quantised_groups()),
        eleven_coverage=f"{eleven.coverage:.2%}",
        eleven_score=f"{eleven.predicted_score:.6f}",
    )


def modelopt_sizes(facts: Facts) -> dict[str, int]:
    """Return the weights of each group of the language model under ModelOpt's name, that of its first module."""
    return {facts.first[name]: size for name, size in facts.size.items()}


def write(manifest: Path, directory: Path) -> None:
    """Write everything below `directory`."""
    measurement = importing.import_manifest(manifest)
    schemes = planning.plan_all(measurement, asked())
    everywhere = planning.plan(all_groups(manifest, measurement), SchemeSpec(name="everywhere", effective_bits=11.0))
    content = json.loads(manifest.read_text(encoding="utf-8"))
    state = content["autoquant_state"]
    published = {
        "score": state["score"],
        "effective_bits": state["constraints"]["effective_bits"],
        "samples": content["scheme"]["auto_quantize_score_size"],
    }
    facts = Facts(measurement)
    for scheme in schemes:
        scheme.write(directory / "schemes" / f"{scheme.name}.json")
    (directory / "order.csv").write_text(order_csv(facts), encoding="utf-8")
    (directory / "README.md").write_text(page(facts, schemes, everywhere, published), encoding="utf-8")


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    write(*(given + [MANIFEST, EXAMPLE][len(given) :]))
