"""Plans are exact: against brute force on small cases, against HiGHS on 144 real groups; never over budget."""

import itertools
import json
import math
import random
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from bitladder import formats, planning
from bitladder.errors import DuplicateSchemes, InfeasibleTarget, MeasurementError, PlanError
from bitladder.planning import importing, points
from bitladder.recipe import SchemeSpec
from bitladder.records import (
    BF16,
    Candidate,
    DataSummary,
    Measurement,
    ModelSource,
    QuantGroup,
    QuantModule,
    UntouchedModule,
)
from conftest import format_like, same_kl, spec

MANIFEST = Path(__file__).parent / "data" / "qwen2_5_vl_3b_instruct_fp8_autoquant_manifest.json"
BITS = {"fp8": 8, "int4": 4}


def measurement_of(sizes, scores, names=("fp8",), batches=1):
    """Return a measurement by hand: scores[group][format] is a number, or one per batch."""
    shapes = [(16, size // 16) if size % 256 == 0 else (1, size) for size in sizes]  # FP8 takes multiples of 16
    groups = tuple(
        QuantGroup(
            name=f"layers.{i}",
            modules=(QuantModule(name=f"layers.{i}.a", tensor=f"model.layers.{i}.a.weight", shape=shapes[i]),),
            weight_elements=size,
        )
        for i, size in enumerate(sizes)
    )
    candidates = tuple(
        Candidate(
            group=f"layers.{i}",
            format=name,
            weight_bits=sizes[i] * BITS[name],
            scores=tuple(row[name]) if isinstance(row[name], list | tuple) else (row[name],) * batches,
        )
        for i, row in enumerate(scores)
        for name in names
    )
    return Measurement(
        model=ModelSource(path="m", architecture="A", model_type="t", sha256="0" * 64),
        calibration=DataSummary(
            source="s", kind="text", sha256="0", samples=1, tokens=1, sequence_length=2, batch_size=1, seed=0
        ),
        engine="modelopt",
        method="gradient",
        fused_scales_shared=True,
        compute_dtype="float32",
        score_unit="nats",
        score_weights=(1.0,) * (len(candidates[0].scores)),
        formats=names,
        groups=groups,
        candidates=candidates,
        untouched=(UntouchedModule(name="lm_head", checkpoint_name="lm_head", reason="head"),),
        amax_sha256=None,
    )


def random_measurement(rng, groups, names=("fp8",)):
    sizes = [rng.choice([16, 32, 48, 160, 7 * 16]) for _ in range(groups)]
    scores = [{name: rng.random() * (5 if name == "int4" else 1) for name in names} for _ in range(groups)]
    return measurement_of(sizes, scores, names)


@pytest.fixture
def int4(monkeypatch):
    """A second format beside fp8, as a runtime with 4-bit weights would have it."""
    four = format_like("int4", 4)
    monkeypatch.setitem(formats.FORMATS, "int4", four)
    return ("fp8", "int4")


@pytest.fixture(scope="module")
def real():
    return importing.import_manifest(MANIFEST)


def brute_force(measurement):
    """Yield (bits, score) of every assignment."""
    table = measurement.by_group()
    options = []
    for group in measurement.groups:
        row = [(group.weight_elements * 16, 0.0)]
        row += [(c.weight_bits, measurement.sensitivity(c)) for c in table[group.name].values()]
        options.append(row)
    for choice in itertools.product(*options):
        yield sum(bits for bits, _ in choice), math.fsum(score for _, score in choice)


@pytest.mark.parametrize("seed", range(12))
def test_optimal_against_brute_force(seed, int4):
    rng = random.Random(seed)
    names = int4 if seed % 2 else ("fp8",)
    measurement = random_measurement(rng, 7, names)
    everything = list(brute_force(measurement))
    total = measurement.searched_weights
    lowest = min(bits for bits, _ in everything) / total
    for _ in range(10):
        target = round(rng.uniform(lowest + 0.01, 15.9), 2)
        scheme = planning.plan(measurement, spec("x", effective_bits=target))
        best = min(score for bits, score in everything if bits <= Fraction(str(target)) * total)
        assert scheme.predicted_score == pytest.approx(best, rel=1e-12)
        assert scheme.weight_bits <= Fraction(str(target)) * total
        limit = rng.uniform(best, best + 1)
        by_score = planning.plan(measurement, spec("y", max_predicted_score=limit))
        fewest = min(bits for bits, score in everything if score <= limit)
        assert by_score.weight_bits == fewest
        assert by_score.predicted_score <= limit


def test_frontier_is_every_pareto_point(int4):
    measurement = random_measurement(random.Random(5), 6, int4)
    edge = planning.frontier(measurement)
    best: dict[int, float] = {}
    for bits, score in brute_force(measurement):
        best[bits] = min(score, best.get(bits, math.inf))
    wanted, lowest = [], math.inf
    for bits in sorted(best):
        if best[bits] < lowest - 1e-12:
            lowest = best[bits]
            wanted.append((bits, lowest))
    assert [int(bits) for bits in edge.bits] == [bits for bits, _ in wanted]
    assert np.allclose(edge.scores, [score for _, score in wanted], rtol=1e-12)
    table = measurement.by_group()
    for index in range(len(edge.bits)):
        chosen = [table[g][f] for g, f in edge.assignment(index).items() if f != BF16]
        assert math.fsum(measurement.sensitivity(c) for c in chosen) == pytest.approx(edge.scores[index], abs=1e-12)


@pytest.mark.parametrize("target", [8.0, 8.5, 9.0, 10.0, 11.0, 12.0, 13.37, 14.0, 15.5])
def test_optimal_against_highs_on_144_real_groups(real, target):
    scheme = planning.plan(real, spec("x", effective_bits=target))
    table = real.by_group()
    saved = np.array([g.weight_elements * 8 for g in real.groups], dtype=float)
    score = np.array([real.sensitivity(table[g.name]["fp8"]) for g in real.groups])
    unit = 2.0**19
    needed = (16 - target) * real.searched_weights
    result = milp(
        score / score.max(),
        integrality=np.ones(len(score)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(saved[None] / unit, lb=needed / unit),
        options={"mip_rel_gap": 0},
    )
    assert result.success
    theirs = math.fsum(s for s, x in zip(score, result.x, strict=True) if x > 0.5)
    assert scheme.predicted_score == pytest.approx(theirs, rel=1e-6)
    assert scheme.weight_bits <= Fraction(str(target)) * real.searched_weights


def test_equals_modelopts_own_choice_over_all_275_groups(monkeypatch, tmp_path):
    """Its published scheme: the gradient method's LP at 11.0 bits, the vision tower in the denominator."""
    content = json.loads(MANIFEST.read_text())
    content["layers"]["visual.patch_embed.proj"] = {"quantized": True}
    (tmp_path / "all.json").write_text(json.dumps(content))
    monkeypatch.setattr(importing, "LANGUAGE_MODEL", re.compile(""))
    everything = importing.import_manifest(tmp_path / "all.json")
    assert len(everything.groups) == 275
    scheme = planning.plan(everything, spec("x", effective_bits=content["scheme"]["auto_quantize_bits"]))
    theirs = content["autoquant_state"]
    assert scheme.effective_bits == theirs["constraints"]["effective_bits"]
    assert scheme.predicted_score == pytest.approx(theirs["score"], rel=1e-12)


def test_never_over_budget_on_2000_feasible_problems():
    rng = random.Random(0)
    for _ in range(2000):
        measurement = random_measurement(rng, rng.randrange(2, 30))
        target = round(rng.uniform(8.01, 15.0), 2)
        scheme = planning.plan(measurement, spec("x", effective_bits=target))
        bits = sum(g.weight_elements * (8 if scheme.formats[g.name] == "fp8" else 16) for g in measurement.groups)
        assert bits == scheme.weight_bits
        assert bits <= Fraction(str(target)) * measurement.searched_weights


def test_deterministic_with_ties():
    measurement = measurement_of([16] * 8, [{"fp8": 1.0}] * 8)
    first = planning.plan(measurement, spec("x", effective_bits=12.0))
    assert all(planning.plan(measurement, spec("x", effective_bits=12.0)) == first for _ in range(3))
    assert first.coverage == 0.5
    # documented: among equal points the earlier choice, bf16, so that the last groups are quantised last
    assert first.quantised_groups() == {f"layers.{i}" for i in range(4)}


def test_the_order_of_the_candidates_does_not_matter(int4):
    measurement = measurement_of([16] * 5, [{"fp8": 1.0, "int4": 2.0}] * 5, int4)
    mixed = measurement.model_copy(update={"candidates": measurement.candidates[::-1]})
    for bits in (6.0, 9.0, 11.0, 13.0):
        wanted = spec("x", effective_bits=bits)
        assert planning.plan(measurement, wanted).formats == planning.plan(mixed, wanted).formats


def test_coverage_schemes_are_nested_and_optimal_at_their_size(real):
    shares = [i / 10 for i in range(1, 11)]
    schemes = planning.plan_all(real, [spec(f"top{round(100 * s)}", coverage=s) for s in shares])
    edge = planning.frontier(real)
    for share, scheme, following in zip(shares, schemes, [*schemes[1:], None], strict=True):
        assert scheme.coverage <= share
        assert scheme.predicted_score == pytest.approx(edge.scores[edge.within_bits(scheme.weight_bits)], rel=1e-9)
        if following is not None:
            assert scheme.quantised_groups() < following.quantised_groups()
            assert following.name in scheme.nested_in
    assert schemes[-1].effective_bits == 8.0
    assert schemes[-1].nested_in == ()


def test_least_sensitive_per_bit_goes_first_not_the_lowest_score():
    # a large group of a higher score, but the lowest score per weight
    measurement = measurement_of([160, 16, 16], [{"fp8": 1.0}, {"fp8": 0.5}, {"fp8": 0.6}])
    assert planning.density_order(measurement, "fp8") == ["layers.0", "layers.1", "layers.2"]
    assert planning.plan(measurement, spec("x", coverage=0.9)).quantised_groups() == {"layers.0"}


@pytest.mark.parametrize(("share", "groups"), [(0.25, 1), (0.2499, None), (0.5, 2), (0.7499, 2), (0.75, 3), (1, 4)])
def test_coverage_is_an_exact_ceiling(share, groups):
    measurement = measurement_of([16] * 4, [{"fp8": float(i + 1)} for i in range(4)])
    if groups is None:
        with pytest.raises(InfeasibleTarget, match=r"smallest attainable is 0\.25 \(layers\.0\)"):
            planning.plan(measurement, spec("x", coverage=share))
    else:
        assert len(planning.plan(measurement, spec("x", coverage=share)).quantised_groups()) == groups


def test_attainable_range_of_the_frontier(real):
    edge = planning.frontier(real)
    assert edge.effective_bits[0] == 8.0
    assert edge.effective_bits[-1] == 16.0
    assert (np.diff(edge.bits) > 0).all()
    assert (np.diff(edge.scores) < 0).all()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            {"effective_bits": 4.5},
            [
                "x: 4.5 effective bits",
                "minimum 8.00",
                "fp8, bf16: attainable 8.00 to 16.00",
                "knows: fp8",
                "add nvfp4 or nvfp4_w4a16 to",
            ],
        ),
        ({"effective_bits": 7.9999999}, ["7.9999999 effective bits", "minimum 8.00"]),
        ({"effective_bits": 2}, ["raise the target", "no known format"]),
        ({"effective_bits": 16}, ["quantise nothing", "8.00 to 16.00", "less than 16"]),
        ({"effective_bits": 40.0}, ["quantise nothing"]),
        ({"coverage": 0.0001}, ["smallest attainable"]),
        ({"max_predicted_score": 1e-12}, ["attainable", "raise it"]),
        ({"max_predicted_score": -1.0}, ["attainable"]),
    ],
)
def test_infeasible_targets_name_the_range(real, target, words):
    with pytest.raises(InfeasibleTarget) as caught:
        planning.plan(real, spec("x", **target))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_format_that_would_allow_it_is_named(real, int4):
    with pytest.raises(InfeasibleTarget, match=r"add nvfp4 or nvfp4_w4a16 or int4 to measurement\.formats"):
        planning.plan(real, spec("x", effective_bits=4.5))
    with pytest.raises(InfeasibleTarget, match="no known format reaches so few bits"):
        planning.plan(real, spec("x", effective_bits=3.9))


def test_what_is_excluded_counts_when_a_format_is_recommended(int4):
    """Half is excluded, which takes 8 of the effective bits: int4 reaches 10, fp8 12."""
    measurement = measurement_of([256] * 4, [{"fp8": 1.0}] * 4)
    exclude = ["layers.0", "layers.1"]
    with pytest.raises(InfeasibleTarget, match=r"minimum 12\.00.*add int4 to"):
        planning.plan(measurement, spec("x", effective_bits=10.1, exclude=exclude))
    with pytest.raises(InfeasibleTarget, match=r"minimum 12\.00.*exclude at most 12\.50% of"):
        planning.plan(measurement, spec("x", effective_bits=9.0, exclude=exclude))


@pytest.mark.parametrize("way", ["effective_bits", "coverage", "max_predicted_score", "max_kl"])
def test_the_edge_that_a_message_names_can_be_asked_for(way):
    """What is printed as attainable is rounded to the safe side."""
    rng, kl_map = random.Random(3), same_kl(("fp8", "nvfp4"))  # which loses a bit or two on the way
    for _ in range(60):
        groups = rng.randrange(2, 9)
        sizes = [rng.randrange(1, 1000) for _ in range(groups)]
        scores = [rng.choice((rng.random() / 7, rng.randrange(1, 200) * 1e-5)) for _ in sizes]  # or few digits
        measurement = measurement_of(sizes, [{"fp8": score} for score in scores])
        words = {
            "effective_bits": ("minimum ", 8.0001),
            "coverage": ("attainable is ", 1e-9),
            "max_predicted_score": ("attainable ", 1e-12),
            "max_kl": ("attainable ", 1e-12),
        }
        before, asked = words[way]
        with pytest.raises(InfeasibleTarget) as caught:
            planning.plan(measurement, spec("x", exclude=["layers.0"], **{way: asked}), kl_map=kl_map)
        named = float(str(caught.value).split(before)[1].split()[0])
        if way == "effective_bits" and named >= 16:
            continue
        scheme = planning.plan(measurement, spec("x", exclude=["layers.0"], **{way: named}), kl_map=kl_map)
        assert scheme.quantised_groups()


def test_a_score_is_met_exactly_in_spite_of_rounding():
    # 0.1 + 0.2 + 0.3 is 0.6000000000000001 when added up, and 0.6 by fsum
    measurement = measurement_of([16] * 3, [{"fp8": 0.1}, {"fp8": 0.2}, {"fp8": 0.3}])
    assert planning.plan(measurement, spec("x", max_predicted_score=0.6)).coverage == 1.0
    rng = random.Random(0)
    for _ in range(200):
        groups = rng.randrange(3, 12)
        sizes = [16 * rng.randrange(1, 4) for _ in range(groups)]
        measurement = measurement_of(sizes, [{"fp8": rng.randrange(1, 10) / 10} for _ in sizes])
        first = planning.plan(measurement, spec("x", effective_bits=rng.choice([9.0, 10.0, 12.0])))
        again = planning.plan(measurement, spec("y", max_predicted_score=first.predicted_score))
        assert again.predicted_score <= first.predicted_score
        assert again.weight_bits <= first.weight_bits


def test_points_of_the_frontier_outside_it_are_none(real):
    edge = planning.frontier(real)
    last = len(edge.bits) - 1
    assert edge.within_bits(int(edge.bits[0])) == 0
    assert edge.within_bits(int(edge.bits[0]) - 1) is None
    assert edge.within_bits(10**18) == last
    assert edge.within_score(math.inf) == 0
    assert edge.within_score(float(edge.scores[last])) == last
    assert edge.within_score(-1.0) is None


def test_a_shared_frontier_gives_the_same_plans(real):
    edge = planning.frontier(real)
    for target in ({"effective_bits": 11.0}, {"max_predicted_score": 0.002}):
        for exclude in ([], planning.density_order(real, "fp8")[:1]):
            wanted = spec("x", exclude=exclude, **target)
            assert planning.plan(real, wanted, frontier=edge) == planning.plan(real, wanted)
    other = measurement_of([16, 16], [{"fp8": 1.0}, {"fp8": 2.0}])
    with pytest.raises(PlanError, match="another measurement"):
        planning.plan(other, spec("x", effective_bits=12.0), frontier=edge)


def test_two_equal_schemes_are_named(real):
    with pytest.raises(DuplicateSchemes, match="all.*everything.*drop one or change its target"):
        planning.plan_all(real, [spec("all", coverage=1.0), spec("everything", effective_bits=8.0)])
    with pytest.raises(PlanError, match="two schemes are named same; rename one"):
        planning.plan_all(real, [spec("same", coverage=1.0), spec("same", coverage=0.5)])


def test_patterns():
    measurement = measurement_of([16] * 12, [{"fp8": float(i + 1)} for i in range(12)])
    by_group = planning.plan(measurement, spec("x", include=["layers.1"]))
    assert by_group.quantised_groups() == {"layers.1"}  # not layers.10 and layers.11
    by_module = planning.plan(measurement, spec("x", include=["*.2.a", "model.layers.3.a"]))
    assert by_module.quantised_groups() == {"layers.2", "layers.3"}
    assert planning.plan(measurement, spec("x", include=["*"], exclude=["layers.1*"])).coverage == pytest.approx(9 / 12)
    with pytest.raises(PlanError, match=r"'leyers\.1' matches no group.*nearest is '.*layers\.1'"):
        planning.plan(measurement, spec("x", include=["leyers.1"]))
    with pytest.raises(InfeasibleTarget, match="quantise nothing.*leaves no group; include more"):
        planning.plan(measurement, spec("x", include=["layers.1"], exclude=["layers.1"]))
    for target in ({"coverage": 1.0}, {"effective_bits": 12.0}, {"include": ["layers.1"]}):
        with pytest.raises(InfeasibleTarget, match="leaves no group; exclude less"):
            planning.plan(measurement, spec("x", exclude=["layers*"], **target))
    with pytest.raises(PlanError, match=r"only modules that no scheme quantises.*lm_head \(head\)"):
        planning.plan(measurement, spec("x", coverage=1.0, exclude=["lm_*"]))


def test_excluded_groups_stay_and_move_the_range():
    measurement = measurement_of([16] * 4, [{"fp8": float(i + 1)} for i in range(4)])
    for target in ({"coverage": 1.0}, {"effective_bits": 10.0}, {"max_predicted_score": 9.0}):
        scheme = planning.plan(measurement, spec("x", exclude=["layers.0"], **target))
        assert scheme.quantised_groups() == {"layers.1", "layers.2", "layers.3"}
    with pytest.raises(InfeasibleTarget, match=r"minimum 10\.00.*add nvfp4"):
        planning.plan(measurement, spec("x", effective_bits=9.0, exclude=["layers.0"]))
    three = ["layers.0", "layers.1", "layers.2"]
    with pytest.raises(InfeasibleTarget, match=r"minimum 14\.00.*exclude at most 62\.50% of"):
        planning.plan(measurement, spec("x", effective_bits=13.0, exclude=three))
    with pytest.raises(InfeasibleTarget, match=r"attainable is 0\.25 \(layers\.1\)"):
        planning.plan(measurement, spec("x", coverage=0.2, exclude=["layers.0"]))


def test_exclude_modules_are_in_network_order():
    measurement = measurement_of([16] * 12, [{"fp8": float(i + 1)} for i in range(12)])
    scheme = planning.plan(measurement, spec("x", include=["layers.0"]))
    assert scheme.exclude_modules == (*(f"model.layers.{i}.a" for i in range(1, 12)), "lm_head")


def test_what_is_named_by_hand_needs_a_format_where_there_are_several(int4):
    measurement = random_measurement(random.Random(1), 5, int4)
    with pytest.raises(PlanError, match="names no format.*fp8, int4$"):
        planning.plan(measurement, spec("x", include=["*"]))
    with pytest.raises(PlanError, match="`format` goes with coverage or include"):
        planning.plan(measurement, spec("x", effective_bits=12.0, format="fp8"))
    with pytest.raises(PlanError, match="format nvfp4 is not measured; measured: fp8, int4"):
        planning.density_order(measurement, "nvfp4")
    assert set(planning.plan(measurement, spec("x", coverage=0.8, format="int4")).formats.values()) == {"int4", BF16}
    with pytest.raises(PlanError, match="asks for format nvfp4"):
        planning.plan(measurement, spec("x", coverage=0.8, format="nvfp4"))
    everything = planning.plan(measurement, spec("x", effective_bits=4.0))
    assert set(everything.formats.values()) == {"int4"}


def test_nan_scores_are_refused():
    measurement = measurement_of([16, 16], [{"fp8": 1.0}, {"fp8": 2.0}])
    broken = Candidate.model_construct(group="layers.1", format="fp8", weight_bits=128, scores=(float("nan"),))
    poisoned = measurement.model_copy(update={"candidates": (measurement.candidates[0], broken)})
    for target in ({"coverage": 0.5}, {"effective_bits": 12.0}):
        with pytest.raises(MeasurementError, match=r"layers\.1 in fp8 is nan"):
            planning.plan(poisoned, spec("x", **target))


def test_bits_that_contradict_the_format_are_refused():
    measurement = measurement_of([16, 16], [{"fp8": 1.0}, {"fp8": 2.0}])
    cheap = measurement.candidates[1].model_copy(update={"weight_bits": 1})
    broken = measurement.model_copy(update={"candidates": (measurement.candidates[0], cheap)})
    for target in ({"coverage": 0.5}, {"effective_bits": 12.0}):
        with pytest.raises(MeasurementError, match=r"layers\.1 in fp8 is recorded with 1 bits.*16 weights take 128"):
            planning.plan(broken, spec("x", **target))


def test_a_measurement_of_nothing_is_refused():
    measurement = measurement_of([16], [{"fp8": 1.0}])
    empty = measurement.model_copy(update={"groups": (), "candidates": ()})
    with pytest.raises(MeasurementError, match="nothing to plan"):
        planning.plan(empty, spec("x", coverage=0.5))


def test_a_broken_plan_is_never_handed_out(monkeypatch):
    """The check in integers at the end can fail."""
    measurement = measurement_of([16] * 4, [{"fp8": 1.0}] * 4)
    costly = planning.Frontier(measurement).assignment(3)
    monkeypatch.setattr(planning.Solver, "least_score", lambda self, max_bits: costly)
    with pytest.raises(PlanError, match="exceeds its budget"):
        planning.plan(measurement, spec("x", effective_bits=9.0))


def test_negative_scores_are_welcome():
    """KL scores may be slightly negative by rounding; such a group is quantised first."""
    measurement = measurement_of([16, 16], [{"fp8": -1e-9}, {"fp8": 2.0}])
    assert planning.plan(measurement, spec("x", effective_bits=15.0)).quantised_groups() == {"layers.0"}
    assert planning.plan(measurement, spec("x", max_predicted_score=0.0)).quantised_groups() == {"layers.0"}


def test_the_scheme_record():
    measurement = measurement_of([16, 32], [{"fp8": (1.0, 3.0)}, {"fp8": (5.0, 5.0)}])
    scheme = planning.plan(measurement, spec("x", coverage=0.4))
    assert scheme.formats == {"layers.0": "fp8", "layers.1": BF16}
    assert scheme.exclude_modules == ("model.layers.1.a", "lm_head")
    assert scheme.weight_bits == 16 * 8 + 32 * 16
    assert scheme.weight_bytes == 16 + 64 + 8  # two float32 scales
    assert scheme.effective_bits == pytest.approx(640 / 48)
    assert scheme.coverage == pytest.approx(16 / 48)
    assert scheme.predicted_score == 4.0
    assert scheme.asked == SchemeSpec(name="x", coverage=0.4)
    # two batches of 1 and 3: mean 2, Σ(c - 2)² = 2, times 2 / 1
    assert planning.standard_error(measurement, scheme.formats) == pytest.approx(2.0)


def test_standard_error_weighs_the_batches(int4):
    measurement = measurement_of(
        [16, 16, 16],
        [{"fp8": (1.0, 3.0, 2.5), "int4": (4.0, 1.0, 0.0)}] * 2 + [{"fp8": (9.0, 9.0, 1.0), "int4": (1.0, 1.0, 1.0)}],
        int4,
    ).model_copy(update={"score_weights": (0.5, 0.25, 2.0)})
    formats_of = {"layers.0": "fp8", "layers.1": "int4", "layers.2": BF16}
    parts = np.array([0.5 * (1.0 + 4.0), 0.25 * (3.0 + 1.0), 2.0 * 2.5])
    assert planning.standard_error(measurement, formats_of) == pytest.approx(math.sqrt(3 * parts.var(ddof=1)))
    assert planning.standard_error(measurement, dict.fromkeys(formats_of, BF16)) is None


def test_one_batch_has_no_standard_error(real):
    scheme = planning.plan(real, spec("x", coverage=0.5))
    assert planning.standard_error(real, scheme.formats) is None


def test_a_frontier_too_large_is_refused(real, monkeypatch):
    monkeypatch.setattr(points, "MAX_FRONTIER_CHOICES", 30_000)
    with pytest.raises(PlanError, match=r"exact frontier of 144 groups with 1 formats exceeds.*plan single targets"):
        planning.frontier(real)
    assert planning.plan(real, spec("x", effective_bits=11.0)).effective_bits <= 11.0  # does without
    monkeypatch.setattr(points, "MAX_FRONTIER_CHOICES", 0)
    with pytest.raises(PlanError, match="exact choice among 144 groups.*use coverage or include"):
        planning.plan(real, spec("x", effective_bits=11.0))


@pytest.mark.parametrize("bits", [4.5, 3.0, 7.99, 16, 20.0])
def test_unattainable_bits_are_refused_before_measuring_as_after(real, bits):
    asked = spec("x", effective_bits=bits)
    with pytest.raises(InfeasibleTarget) as before:
        planning.refuse_unattainable([asked], real.formats)
    with pytest.raises(InfeasibleTarget) as after:
        planning.plan(real, asked)
    assert str(before.value) == str(after.value)
    planning.refuse_unattainable([spec("y", effective_bits=8.0), spec("z", coverage=0.1)], real.formats)
