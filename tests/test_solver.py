"""Single budgets are solved without the whole frontier, and come out as they do with it: to the bit, ties included."""

import hashlib
import json
import math
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from bitladder import formats, planning
from bitladder.cli import others
from bitladder.planning import importing, points, solver
from bitladder.planning.options import options_of
from bitladder.planning.relaxation import Relaxation
from bitladder.records import BF16
from conftest import format_like, spec
from test_planning import BITS, MANIFEST, brute_force, measurement_of

WIDTHS = {"a": 3, "b": 4, "c": 5, "d": 6, "e": 7, "fp8": 8, "g": 10, "h": 12}


@pytest.fixture(autouse=True)
def many_formats(monkeypatch):
    for name, bits in WIDTHS.items():
        monkeypatch.setitem(formats.FORMATS, name, format_like(name, bits))
        monkeypatch.setitem(BITS, name, bits)


SCORES = {
    "smooth": lambda rng: rng.random(),
    "equal": lambda rng: rng.choice([0.1, 0.2, 0.3]),
    "zero": lambda rng: rng.choice([0.0, 0.0, 0.5]),
    "whole": lambda rng: float(rng.randrange(4)),
    "far apart": lambda rng: 10 ** rng.uniform(-300, 3),
    "below zero": lambda rng: rng.gauss(0.3, 0.4),
}


def draw(rng, kind, groups, count, sizes=(16, 32, 48, 160)):
    """Return a random measurement; sizes: None for any."""
    names = tuple(rng.sample(list(WIDTHS), count))
    weights = [rng.choice(sizes) if sizes else rng.randrange(1, 5000) for _ in range(groups)]
    return measurement_of(weights, [{name: SCORES[kind](rng) for name in names} for _ in weights], names)


def budgets(rng, edge):
    """Return budgets in bits and in score: points of the frontier, just beside them, and anything."""
    some = [rng.randrange(len(edge.bits)) for _ in range(4)]
    bits = [int(edge.bits[i]) + beside for i in some for beside in (-1, 0, 1)]
    scores = [float(edge.scores[i]) for i in some]
    return bits, [x for s in scores for x in (s, math.nextafter(s, -math.inf), s * 1.001)] + [0.6, 1e300, -1e300]


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("sizes", [(16, 32, 48, 160), None, (16,)])
def test_a_single_budget_comes_out_as_on_the_whole_frontier(kind, sizes):
    rng = random.Random(f"{kind} {sizes}")
    for _ in range(12):
        measurement = draw(rng, kind, rng.randrange(1, 14), rng.randrange(1, 5), sizes)
        excluded = [group.name for group in measurement.groups if rng.random() < 0.15]
        edge, alone = planning.Frontier(measurement, excluded), planning.Solver(measurement, excluded)
        bits, scores = budgets(rng, edge)
        assert [alone.least_score(b) for b in bits] == [edge.least_score(b) for b in bits]
        assert [alone.fewest_bits(s) for s in scores] == [edge.fewest_bits(s) for s in scores]


def by_the_book(measurement):
    """Return the frontier's (bits, score, formats), with the documented choice among equal points."""
    table, found = measurement.by_group(), [(0, 0.0, ())]
    for group in measurement.groups:
        rows = [(BF16, group.weight_elements * 16, 0.0)]
        rows += [(f, table[group.name][f].weight_bits, table[group.name][f].scores[0]) for f in measurement.formats]
        grown = [(b + bits, s + score, (*names, name)) for name, bits, score in rows for b, s, names in found]
        found, least = [], math.inf
        for point in sorted(grown, key=lambda point: point[:2]):  # stable
            if point[1] < least:
                least = point[1]
                found.append(point)
    return found


@pytest.mark.parametrize("kind", SCORES)
def test_the_frontier_by_the_book(kind):
    rng = random.Random(kind)
    for _ in range(8):
        measurement = draw(rng, kind, rng.randrange(1, 9), rng.randrange(1, 5), (16, 32))
        edge = planning.Frontier(measurement)
        found = [tuple(edge.assignment(index).values()) for index in range(len(edge.bits))]
        assert list(zip(edge.bits.tolist(), edge.scores.tolist(), found, strict=True)) == by_the_book(measurement)


@pytest.mark.parametrize("kind", SCORES)
def test_equal_to_brute_force(kind):
    rng = random.Random(kind)
    for _ in range(6):
        measurement = draw(rng, kind, rng.randrange(1, 6), rng.randrange(1, 4))
        everything, alone = list(brute_force(measurement)), planning.Solver(measurement)
        full = sum(group.weight_elements for group in measurement.groups) * 16
        for _ in range(6):
            budget, limit = rng.choice(everything)[0], rng.choice(everything)[1]
            best = min(score for bits, score in everything if bits <= budget)
            assert priced(measurement, alone.least_score(budget))[1] == pytest.approx(best, rel=1e-12, abs=1e-300)
            fewest = min(bits for bits, score in everything if score <= limit)
            found = alone.fewest_bits(limit)
            assert (full if found is None else priced(measurement, found)[0]) == fewest


def priced(measurement, chosen):
    table = measurement.by_group()
    size = {group.name: group.weight_elements for group in measurement.groups}
    scores = [measurement.sensitivity(table[g][f]) for g, f in chosen.items() if f != BF16]
    return sum(size[g] * (16 if f == BF16 else BITS[f]) for g, f in chosen.items()), math.fsum(scores)


def test_first_searches_that_keep_little_change_nothing(monkeypatch):
    rng = random.Random(0)
    measurement = draw(rng, "smooth", 25, 3)
    edge = planning.Frontier(measurement)
    bits, scores = budgets(rng, edge)
    wanted = [edge.least_score(b) for b in bits], [edge.fewest_bits(s) for s in scores]
    for searches in ((), (1,), (2, 3)):
        monkeypatch.setattr(solver, "_FIRST_SEARCHES", searches)
        alone = planning.Solver(measurement)
        assert ([alone.least_score(b) for b in bits], [alone.fewest_bits(s) for s in scores]) == wanted


PUBLISHED = {
    8.5: "5eb1d5773f31",
    9.0: "4596554b8361",
    11.0: "489d6ce0916f",
    12.0: "63b44af99785",
    13.37: "3580737a6540",
    15.5: "ee7bd060732d",
}


def realistic(groups, count, seed=0):
    """Return a measurement as models have them: few sizes, scores that grow as bits get fewer."""
    rng = random.Random(seed)
    names = list(WIDTHS)[:count]
    sizes = [rng.choice([2048 * 2048, 2048 * 2560, 2048 * 11008]) + 16 * rng.randrange(9) for _ in range(groups)]
    base = [10 ** rng.uniform(-4, -1) for _ in range(groups)]
    rows = [{name: b * 4.0 ** (8 - WIDTHS[name]) * rng.lognormvariate(0, 0.3) for name in names} for b in base]
    return measurement_of(sizes, rows, tuple(names))


@pytest.mark.parametrize("target", [5.0, 9.37, 13.0])
def test_equal_to_highs_on_144_groups_of_8_formats(target):
    measurement = realistic(144, 8)
    choices = options_of(measurement)
    owner = np.repeat(np.arange(144), [len(one.names) for one in choices])
    score = np.concatenate([one.scores for one in choices])
    bits = np.concatenate([one.bits for one in choices])
    result = milp(
        score,
        integrality=np.ones(len(score)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint((owner == np.arange(144)[:, None]).astype(float), lb=1, ub=1),
            LinearConstraint(bits[None] / 2.0**20, ub=target * measurement.searched_weights / 2.0**20),
        ],
        options={"mip_rel_gap": 1e-7, "time_limit": 60},
    )
    assert result.success
    scheme = planning.plan(measurement, spec("x", effective_bits=target))
    assert scheme.predicted_score == pytest.approx(result.fun, rel=1e-6)
    assert scheme.weight_bits <= Fraction(str(target)) * measurement.searched_weights


def test_a_thousand_groups_need_no_frontier():
    measurement = realistic(1000, 4)
    scheme = planning.plan(measurement, spec("x", effective_bits=6.0))
    bound = relaxed(measurement, scheme.weight_bits)
    assert bound <= scheme.predicted_score <= bound * (1 + 1e-4)
    again = planning.plan(measurement, spec("y", max_predicted_score=scheme.predicted_score))
    assert again.weight_bits <= scheme.weight_bits
    assert again.predicted_score <= scheme.predicted_score


def relaxed(measurement, max_bits):
    """Return the score of the linear relaxation within so many bits."""
    relaxation = Relaxation.of(options_of(measurement))
    saved = np.cumsum(relaxation.saved)
    return float(np.interp(relaxation.start_bits - max_bits, saved, np.cumsum(relaxation.added)))


def test_options_that_another_one_betters_are_dropped():
    names = ("a", "b", "d", "fp8")  # 3, 4, 6 and 8 bits
    measurement = measurement_of(
        [16, 16], [{"a": 5.0, "b": 6.0, "d": 2.0, "fp8": 2.0}, dict.fromkeys(names, 0.0)], names
    )
    first, second = options_of(measurement)
    assert first.names == (BF16, "a", "d")  # b: more bits and more damage than a; fp8: more bits than d for nothing
    assert second.names == ("a",)  # nothing does damage: the fewest bits
    (left, _) = options_of(measurement, excluded=["layers.0"])
    assert left.names == (BF16,)


def test_of_equal_choices_the_first_format_wins(monkeypatch):
    monkeypatch.setitem(formats.FORMATS, "twin", format_like("twin"))
    monkeypatch.setitem(BITS, "twin", 8)
    for names in (("fp8", "twin"), ("twin", "fp8")):
        measurement = measurement_of([16] * 3, [{"fp8": 1.0, "twin": 1.0}] * 3, names)
        scheme = planning.plan(measurement, spec("x", effective_bits=8.0))
        assert set(scheme.formats.values()) == {names[0]}


def test_the_plans_of_the_published_manifest_stay():
    """Digests of what the whole frontier gave before there was a solver."""
    real = importing.import_manifest(Path(MANIFEST))
    found = {}
    for bits in (8.5, 9.0, 11.0, 12.0, 13.37, 15.5):
        scheme = planning.plan(real, spec("x", effective_bits=bits))
        again = planning.plan(real, spec("y", max_predicted_score=scheme.predicted_score))
        assert again.formats == scheme.formats
        found[bits] = hashlib.sha256(json.dumps(scheme.formats).encode()).hexdigest()[:12]
    assert found == PUBLISHED


@pytest.mark.parametrize("kind", SCORES)
def test_an_outline_lies_on_the_frontier(kind):
    measurement = draw(random.Random(kind), kind, 8, 3)
    edge = planning.Frontier(measurement)
    on_it = dict(zip(edge.bits.tolist(), edge.scores.tolist(), strict=True))
    for count in (0, 1, 7):
        found = planning.outline(measurement, count)
        assert found == sorted(found)
        assert [bits for bits, _ in found[:: max(1, len(found) - 1)]] == sorted({int(edge.bits[0]), int(edge.bits[-1])})
        for bits, score in found:
            assert score == pytest.approx(on_it[bits], rel=1e-12, abs=1e-300)


def test_the_command_says_where_the_frontier_is_too_large(tmp_path, monkeypatch, capsys):
    measurement = draw(random.Random(0), "smooth", 12, 1, None)
    measurement.write(tmp_path / "m.json")
    others.frontier(tmp_path / "m.json", 5)
    whole = capsys.readouterr()
    assert whole.err == ""
    monkeypatch.setattr(points, "MAX_FRONTIER_CHOICES", 100)
    for count, words in ((5, "these 5 are on it (evenly spaced in size)"), (0, "the corners of its convex hull")):
        others.frontier(tmp_path / "m.json", count)
        printed = capsys.readouterr()
        assert "12 groups with 1 formats has too many points to hold" in printed.err
        assert words in printed.err
        rows = printed.out.splitlines()
        assert rows[0] == "effective_bits,weight_bits,predicted_score"
        for mine, theirs in ((rows[1], whole.out.splitlines()[1]), (rows[-1], whole.out.splitlines()[-1])):
            assert mine.rpartition(",")[0] == theirs.rpartition(",")[0]
            assert float(mine.split(",")[2]) == pytest.approx(float(theirs.split(",")[2]), rel=1e-12)
