"""The map from scores to KL: exact where the law holds, honest about its spread, not fitted on what it predicts."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy.stats import t as t_of_scipy

from bitladder import planning
from bitladder.errors import PlanError
from bitladder.planning.prediction import LEVEL, KlMap, leave_one_out, students_t
from bitladder.planning.pricing import scores_by_format
from bitladder.recipe import SchemeSpec
from test_asking import measurement_of

SCORES = [1e-4, 3e-4, 1e-3, 4e-3, 2e-2]
FORMATS = ("fp8", "nvfp4", "int8")


def alone(scores):
    """Return scores of one format as parts."""
    return [{"fp8": score} for score in scores]


def test_an_exact_law_is_found():
    fitted = KlMap.fit(alone(SCORES), [2.5 * s**0.9 for s in SCORES])
    assert fitted.factor == pytest.approx(2.5)
    assert fitted.exponent == pytest.approx(0.9)
    predicted = fitted.predict({"fp8": 7e-3})
    assert predicted.value == pytest.approx(2.5 * 7e-3**0.9)
    assert predicted.low == pytest.approx(predicted.value)
    assert predicted.high == pytest.approx(predicted.value)


def test_it_is_the_least_squares_line_in_logarithms():
    generator = random.Random(0)
    kls = [1.3 * s**1.1 * math.exp(generator.gauss(0, 0.2)) for s in SCORES]
    slope, intercept = np.polyfit(np.log(SCORES), np.log(kls), 1)
    fitted = KlMap.fit(alone(SCORES), kls)
    assert fitted.exponent == pytest.approx(slope)
    assert math.log(fitted.factor) == pytest.approx(intercept)


def test_intervals_hold_as_often_as_they_say():
    generator = random.Random(1)
    inside = trials = 0
    for _ in range(400):
        scores = [math.exp(generator.uniform(-9, -4)) for _ in range(9)]
        kls = [2 * s**0.95 * math.exp(generator.gauss(0, 0.15)) for s in scores]
        predicted = KlMap.fit(alone(scores[:8]), kls[:8]).predict({"fp8": scores[8]})
        inside += predicted.low <= kls[8] <= predicted.high
        trials += 1
    # three standard errors of a share
    assert abs(inside / trials - LEVEL) < 3 * math.sqrt(LEVEL * (1 - LEVEL) / trials)


def test_a_point_does_not_predict_itself():
    kls = [2 * s for s in SCORES]
    kls[2] *= 10
    guesses = leave_one_out(alone(SCORES), kls)
    assert guesses[2].value == pytest.approx(2 * SCORES[2])
    assert guesses[1].value != pytest.approx(2 * SCORES[1])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_points_give_no_map(count):
    assert KlMap.fit(alone(SCORES[:count]), SCORES[:count]) is None
    assert leave_one_out(alone(SCORES[: count + 1]), SCORES[: count + 1]) == [None] * (count + 1)


def test_scores_that_are_not_positive_are_left_out():
    fitted = KlMap.fit(alone([0.0, -1e-9, *SCORES]), [5.0, 5.0, *(2 * s for s in SCORES)])
    assert fitted.points == 5
    assert fitted.exponent == pytest.approx(1)
    assert fitted.predict({"fp8": 0.0}) is None
    assert KlMap.fit(alone([1e-3] * 6), [1e-3] * 6) is None


def mixed(count, generator):
    return [{name: math.exp(generator.uniform(-9, -4)) for name in FORMATS} for _ in range(count)]


def law(part, weights, exponent=0.93):
    return 0.4 * sum(weights[name] * part[name] for name in FORMATS) ** exponent


def test_what_a_score_means_in_each_format_is_found():
    weights = dict(zip(FORMATS, (1.0, 1.3, 0.6), strict=True))
    generator = random.Random(2)
    parts = mixed(14, generator)
    noise = [math.exp(generator.gauss(0, 0.01)) for _ in parts]
    fitted = KlMap.fit(parts, [law(part, weights) * n for part, n in zip(parts, noise, strict=True)])
    assert fitted.exponent == pytest.approx(0.93, abs=0.02)
    for first, second in itertools.pairwise(FORMATS):
        assert fitted.weights[second] / fitted.weights[first] == pytest.approx(
            weights[second] / weights[first], rel=0.1
        )
    for part in mixed(20, generator):
        assert fitted.predict(part).value == pytest.approx(law(part, weights), rel=0.05)


def test_intervals_of_mixes_hold_as_often_as_they_say():
    generator = random.Random(3)
    inside = trials = 0
    for _ in range(300):
        weights = {name: math.exp(generator.gauss(0, 0.3)) for name in FORMATS}
        parts = mixed(13, generator)
        kls = [law(part, weights) * math.exp(generator.gauss(0, 0.05)) for part in parts]
        predicted = KlMap.fit(parts[:12], kls[:12]).predict(parts[12])
        inside += predicted.low <= kls[12] <= predicted.high
        trials += 1
    assert abs(inside / trials - LEVEL) < 3 * math.sqrt(LEVEL * (1 - LEVEL) / trials)


def test_few_points_say_nothing_of_formats():
    parts = mixed(4, random.Random(4))
    kls = [law(part, dict.fromkeys(FORMATS, 1.0)) * (1.5 if index else 1.0) for index, part in enumerate(parts)]
    fitted, total = KlMap.fit(parts, kls), KlMap.fit(alone(sum(part.values()) for part in parts), kls)
    assert fitted.weights == pytest.approx(dict.fromkeys(FORMATS, 1.0), abs=1e-6)
    assert (fitted.factor, fitted.exponent) == pytest.approx((total.factor, total.exponent), rel=1e-6)
    one = {"fp8": 1e-3, "nvfp4": 2e-3, "int8": 0.0}
    assert fitted.predict(one).high == pytest.approx(total.predict({"fp8": 3e-3}).high, rel=1e-6)


def test_a_format_that_was_not_measured_counts_like_the_others():
    parts = [{"fp8": score, "nvfp4": 0.0} for score in SCORES]
    fitted = KlMap.fit(parts, [2 * score for score in SCORES])
    assert fitted.weights == pytest.approx({"fp8": 1.0, "nvfp4": 1.0})


def test_what_is_planned_within_a_kl_is_the_smallest_by_brute_force():
    measurement = measurement_of(FORMATS[:2], layers=2)
    weights = {"fp8": 1.4, "nvfp4": 0.7}
    parts = [{"fp8": a, "nvfp4": b} for a in SCORES for b in SCORES]
    fitted = KlMap.fit(parts, [sum(weights[name] * part[name] for name in part) for part in parts])
    found, table = [], measurement.by_group()
    for names in list(itertools.product(("bf16", *FORMATS[:2]), repeat=len(table)))[1:]:  # the first has nothing
        formats = dict(zip(table, names, strict=True))
        scheme = planning.price(measurement, "x", formats, SchemeSpec(name="x", include=("*",)))
        kl = fitted.predict(scores_by_format(measurement, formats))
        found.append((scheme.weight_bits, kl.value if kl else 0.0))
    for most in sorted({kl for _, kl in found})[3::9]:
        scheme = planning.plan(measurement, SchemeSpec(name="near", max_kl=most * (1 + 1e-9)), kl_map=fitted)
        assert scheme.weight_bits == min(bits for bits, kl in found if kl <= most)


@pytest.mark.parametrize("level", [0.1, 0.5, LEVEL, 0.99])
def test_students_t_is_scipys(level):
    for freedom in (*range(1, 40), 99, 100, 1001):
        assert students_t(level, freedom) == pytest.approx(t_of_scipy.ppf((1 + level) / 2, freedom), rel=1e-12)


def test_where_kl_does_not_grow_with_the_score_none_is_bounded():
    fitted = KlMap.fit(alone(SCORES), [1e-3 / score for score in SCORES])
    assert fitted.exponent == pytest.approx(-1)
    assert fitted.score_of(1e-3) is None
    fitted = KlMap.fit(alone(SCORES), [2 * score**2 for score in SCORES])
    assert fitted.score_of(fitted.kl_of(3e-3)) == pytest.approx(3e-3)


def test_a_kl_that_no_score_bounds_is_refused_with_ways_that_work():
    measurement = measurement_of(("fp8",), layers=2)
    flat = KlMap.fit(alone(SCORES), [1e-3 / score for score in SCORES])
    for most in (1e-9, 1.0):
        with pytest.raises(PlanError, match=f"the {len(SCORES)} schemes .* KL doesn't grow .* or effective_bits"):
            planning.plan(measurement, SchemeSpec(name="near", max_kl=most), kl_map=flat)
    for way in ({"coverage": 0.5}, {"effective_bits": 10}):
        assert planning.plan(measurement, SchemeSpec(name="near", **way), kl_map=flat).quantised_groups()


def test_scores_of_image_positions_are_weighed_like_all():
    """So that it makes no difference which of the two weights is applied first."""
    measurement = measurement_of(FORMATS[:2], layers=2, image=True)
    parts = [{"fp8": a, "nvfp4": b} for a in SCORES for b in SCORES]
    fitted = KlMap.fit(parts, [1.4 * part["fp8"] + 0.7 * part["nvfp4"] for part in parts])
    for one, other in zip(
        fitted.weigh(measurement).weigh_images(0.25).candidates,
        fitted.weigh(measurement.weigh_images(0.25)).candidates,
        strict=True,
    ):
        assert one.scores == pytest.approx(other.scores, rel=1e-12)


def test_a_negative_part_counts_for_nothing_beside_others():
    parts = [{"fp8": score, "nvfp4": 0.0} for score in SCORES]
    fitted = KlMap.fit(parts, [2 * score for score in SCORES])
    assert fitted.predict({"fp8": 1e-3, "nvfp4": -2e-4}).value == pytest.approx(2e-3)
    assert fitted.predict({"fp8": 1e-3, "nvfp4": -2e-3}) is None
