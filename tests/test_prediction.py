"""The map from scores to KL: exact where the law holds, honest about its spread, not fitted on what it predicts."""

import math
import random

import numpy as np
import pytest
from scipy.stats import t as t_of_scipy

from bitladder.planning.prediction import LEVEL, KlMap, leave_one_out, students_t

SCORES = [1e-4, 3e-4, 1e-3, 4e-3, 2e-2]


def test_an_exact_law_is_found():
    fitted = KlMap.fit(SCORES, [2.5 * s**0.9 for s in SCORES])
    assert fitted.factor == pytest.approx(2.5)
    assert fitted.exponent == pytest.approx(0.9)
    predicted = fitted.predict(7e-3)
    assert predicted.value == pytest.approx(2.5 * 7e-3**0.9)
    assert predicted.low == pytest.approx(predicted.value)
    assert predicted.high == pytest.approx(predicted.value)


def test_it_is_the_least_squares_line_in_logarithms():
    generator = random.Random(0)
    kls = [1.3 * s**1.1 * math.exp(generator.gauss(0, 0.2)) for s in SCORES]
    slope, intercept = np.polyfit(np.log(SCORES), np.log(kls), 1)
    fitted = KlMap.fit(SCORES, kls)
    assert fitted.exponent == pytest.approx(slope)
    assert math.log(fitted.factor) == pytest.approx(intercept)


def test_intervals_hold_as_often_as_they_say():
    generator = random.Random(1)
    inside = trials = 0
    for _ in range(400):
        scores = [math.exp(generator.uniform(-9, -4)) for _ in range(9)]
        kls = [2 * s**0.95 * math.exp(generator.gauss(0, 0.15)) for s in scores]
        predicted = KlMap.fit(scores[:8], kls[:8]).predict(scores[8])
        inside += predicted.low <= kls[8] <= predicted.high
        trials += 1
    # three standard errors of a share
    assert abs(inside / trials - LEVEL) < 3 * math.sqrt(LEVEL * (1 - LEVEL) / trials)


def test_a_point_does_not_predict_itself():
    kls = [2 * s for s in SCORES]
    kls[2] *= 10
    guesses = leave_one_out(SCORES, kls)
    assert guesses[2].value == pytest.approx(2 * SCORES[2])
    assert guesses[1].value != pytest.approx(2 * SCORES[1])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_points_give_no_map(count):
    assert KlMap.fit(SCORES[:count], SCORES[:count]) is None
    assert leave_one_out(SCORES[: count + 1], SCORES[: count + 1]) == [None] * (count + 1)


def test_scores_that_are_not_positive_are_left_out():
    fitted = KlMap.fit([0.0, -1e-9, *SCORES], [5.0, 5.0, *(2 * s for s in SCORES)])
    assert fitted.points == 5
    assert fitted.exponent == pytest.approx(1)
    assert fitted.predict(0.0) is None
    assert KlMap.fit([1e-3] * 6, [1e-3] * 6) is None


@pytest.mark.parametrize("level", [0.1, 0.5, LEVEL, 0.99])
def test_students_t_is_scipys(level):
    for freedom in (*range(1, 40), 99, 100, 1001):
        assert students_t(level, freedom) == pytest.approx(t_of_scipy.ppf((1 + level) / 2, freedom), rel=1e-12)
