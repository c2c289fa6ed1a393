"""The map from scores to KL: exact where the law holds, honest about its spread, not fitted on what it predicts."""

import itertools
import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.stats import t as t_of_scipy

from bitladder import planning
from bitladder.errors import InfeasibleTarget, PlanError
from bitladder.planning.prediction import LEVEL, KlMap, leave_one_out, students_t
from bitladder.planning.pricing import InFormat, cheapest_first, mean_scores, parts_by_format, predicted_score
from bitladder.recipe import SchemeSpec
from bitladder.records import KlPoint, KlPoints
from test_asking import measurement_of

SCORES = [1e-4, 3e-4, 1e-3, 4e-3, 2e-2]
FORMATS = ("fp8", "nvfp4", "int8")


def parts(scores):
    """Return scores by format as parts of groups that all score what their format does on average, 1 a weight."""
    return {name: InFormat(score, score) for name, score in scores.items()}


def alone(scores):
    """Return scores of one format as parts."""
    return [parts({"fp8": score}) for score in scores]


def fit(points, kls):
    """Return the map where a weight scores 1 on average in every format."""
    return KlMap.fit(dict.fromkeys(points[0], 1.0) if points else {}, points, kls)


def test_an_exact_law_is_found():
    fitted = fit(alone(SCORES), [2.5 * s**0.9 for s in SCORES])
    assert fitted.factor == pytest.approx(2.5)
    assert fitted.exponent == pytest.approx(0.9)
    predicted = fitted.predict(parts({"fp8": 7e-3}))
    assert predicted.value == pytest.approx(2.5 * 7e-3**0.9)
    assert predicted.low == pytest.approx(predicted.value)
    assert predicted.high == pytest.approx(predicted.value)


def test_it_is_the_least_squares_line_in_logarithms():
    generator = random.Random(0)
    kls = [1.3 * s**1.1 * math.exp(generator.gauss(0, 0.2)) for s in SCORES]
    slope, intercept = np.polyfit(np.log(SCORES), np.log(kls), 1)
    fitted = fit(alone(SCORES), kls)
    assert fitted.exponent == pytest.approx(slope)
    assert math.log(fitted.factor) == pytest.approx(intercept)


def test_intervals_hold_as_often_as_they_say():
    generator = random.Random(1)
    inside = trials = 0
    for _ in range(400):
        scores = [math.exp(generator.uniform(-9, -4)) for _ in range(9)]
        kls = [2 * s**0.95 * math.exp(generator.gauss(0, 0.15)) for s in scores]
        predicted = fit(alone(scores[:8]), kls[:8]).predict(parts({"fp8": scores[8]}))
        inside += predicted.low <= kls[8] <= predicted.high
        trials += 1
    # three standard errors of a share
    assert abs(inside / trials - LEVEL) < 3 * math.sqrt(LEVEL * (1 - LEVEL) / trials)


def test_a_point_does_not_predict_itself():
    kls = [2 * s for s in SCORES]
    kls[2] *= 10
    guesses = leave_one_out({"fp8": 1.0}, alone(SCORES), kls)
    assert guesses[2].value == pytest.approx(2 * SCORES[2])
    assert guesses[1].value != pytest.approx(2 * SCORES[1])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_points_give_no_map(count):
    assert fit(alone(SCORES[:count]), SCORES[:count]) is None
    assert leave_one_out({"fp8": 1.0}, alone(SCORES[: count + 1]), SCORES[: count + 1]) == [None] * (count + 1)


def test_scores_and_kls_that_are_not_positive_are_left_out():
    fitted = fit(alone([0.0, -1e-9, 1e-3, *SCORES]), [5.0, 5.0, 0.0, *(2 * s for s in SCORES)])
    assert fitted.points == 5
    assert fitted.exponent == pytest.approx(1)
    assert fitted.predict(parts({"fp8": 0.0})) is None
    assert fit(alone([1e-3] * 6), [1e-3] * 6) is None


@pytest.mark.parametrize("apart", [1e-15, 1e-9, 1e-3])
def test_scores_that_hardly_differ_give_no_map(apart):
    scores = [1e-6 * (1 + apart * index) for index in range(6)]
    kls = [1e-3 * (1 + 0.1 * index) for index in range(6)]
    assert fit(alone(scores), kls) is None
    assert leave_one_out({"fp8": 1.0}, alone(scores), kls) == [None] * 6


def test_a_law_so_steep_that_its_factor_is_no_number_is_none():
    assert fit(alone([1e-9, 1.01e-9, 1.02e-9, 1.03e-9]), [1e-6, 1e-3, 1.0, 1e3]) is None


def test_far_from_what_was_measured_predictions_are_numbers():
    fitted = fit(alone([1e-3, 1.01e-3, 1.02e-3, 1.03e-3]), [1e-3, 3e-3, 1e-3, 3e-3])
    for score in (1e-300, 1e-9, 1e9, 1e300):
        guess = fitted.predict(parts({"fp8": score}))
        assert 0 <= guess.low <= guess.value <= guess.high < math.inf


def test_many_mixes_are_predicted_in_a_moment():
    """As a report does, which leaves every point out once."""
    generator, formats = random.Random(8), [f"f{index}" for index in range(7)]
    points = [parts({name: math.exp(generator.uniform(-9, -4)) for name in formats}) for _ in range(60)]
    kls = [sum(part.score for part in point.values()) * math.exp(generator.gauss(0, 0.5)) for point in points]
    begun = time.process_time()
    assert None not in leave_one_out(dict.fromkeys(formats, 1.0), points, kls)
    assert time.process_time() - begun < 10  # a third of a second


def mixed(count, generator):
    return [parts({name: math.exp(generator.uniform(-9, -4)) for name in FORMATS}) for _ in range(count)]


def law(part, weights, exponent=0.93):
    return 0.4 * sum(weights[name] * part[name].score for name in FORMATS) ** exponent


def test_what_a_score_means_in_each_format_is_found():
    weights = dict(zip(FORMATS, (1.0, 1.3, 0.6), strict=True))
    generator = random.Random(2)
    points = mixed(14, generator)
    noise = [math.exp(generator.gauss(0, 0.01)) for _ in points]
    fitted = fit(points, [law(point, weights) * n for point, n in zip(points, noise, strict=True)])
    assert fitted.exponent == pytest.approx(0.93, abs=0.02)
    assert fitted.freedom == len(points) - 4  # the factor, the exponent, and two of three weights beside one another
    for first, second in itertools.pairwise(FORMATS):
        assert fitted.weights[second] / fitted.weights[first] == pytest.approx(
            weights[second] / weights[first], rel=0.1
        )
    for point in mixed(20, generator):
        assert fitted.predict(point).value == pytest.approx(law(point, weights), rel=0.05)


def test_intervals_of_mixes_hold_as_often_as_they_say():
    generator = random.Random(3)
    inside = trials = 0
    for _ in range(300):
        weights = {name: math.exp(generator.gauss(0, 0.3)) for name in FORMATS}
        points = mixed(13, generator)
        kls = [law(point, weights) * math.exp(generator.gauss(0, 0.05)) for point in points]
        predicted = fit(points[:12], kls[:12]).predict(points[12])
        inside += predicted.low <= kls[12] <= predicted.high
        trials += 1
    assert abs(inside / trials - LEVEL) < 3 * math.sqrt(LEVEL * (1 - LEVEL) / trials)


def test_few_points_say_nothing_of_formats():
    points = mixed(4, random.Random(4))
    kls = [law(point, dict.fromkeys(FORMATS, 1.0)) * (1.5 if index else 1.0) for index, point in enumerate(points)]
    fitted, total = fit(points, kls), fit(alone(sum(part.score for part in point.values()) for point in points), kls)
    assert fitted.weights == pytest.approx(dict.fromkeys(FORMATS, 1.0), abs=1e-6)
    assert (fitted.factor, fitted.exponent) == pytest.approx((total.factor, total.exponent), rel=1e-6)
    one = parts({"fp8": 1e-3, "nvfp4": 2e-3, "int8": 0.0})
    assert fitted.predict(one).high == pytest.approx(total.predict(parts({"fp8": 3e-3})).high, rel=1e-6)


def test_a_format_that_was_not_measured_counts_like_the_others():
    points = [parts({"fp8": score, "nvfp4": 0.0}) for score in SCORES]
    fitted = fit(points, [2 * score for score in SCORES])
    assert fitted.weights == pytest.approx({"fp8": 1.0, "nvfp4": 1.0})


SHARES = (0.1, 0.25, 0.4, 0.6, 0.8)  # of the weights


def shrunk(point, shrinkage, means=None):
    """Return twice the damage that groups do where their scores say more of them than there is to say."""
    means = means or dict.fromkeys(point, 1.0)
    return 2 * sum(
        (1 - shrinkage) * part.score + shrinkage * means[name] * part.weights for name, part in point.items()
    )


def chosen_and_random(generator):
    """Return plans, whose groups have low scores, and random choices, whose groups have what the format has."""
    luck = [*(0.3 for _ in SHARES), *(generator.uniform(0.9, 1.1) for _ in SHARES)]
    return [{"fp8": InFormat(share * lucky, share)} for share, lucky in zip(2 * SHARES, luck, strict=True)]


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 0.6])
def test_regression_to_the_mean_is_found(shrinkage):
    points = chosen_and_random(random.Random(5))
    fitted = fit(points, [shrunk(point, shrinkage) for point in points])
    assert fitted.shrinkage == pytest.approx(shrinkage, abs=0.03)
    assert fitted.exponent == pytest.approx(1, abs=0.02)
    for lucky in (0.5, 1.5):
        point = {"fp8": InFormat(0.5 * lucky, 0.5)}
        assert fitted.predict(point).value == pytest.approx(shrunk(point, shrinkage), rel=0.03)
    alike = points[:5]  # plans alone, all as lucky, say nothing of it
    assert fit(alike, [shrunk(point, shrinkage) for point in alike]).shrinkage == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("shrinkage", "kept"), [(-0.4, 0.0), (1.3, 0.9)])
def test_shrinkage_stays_in_its_range(shrinkage, kept):
    """Beyond it KL would fall with a group's own score, or rise with what others score less."""
    points = chosen_and_random(random.Random(6))
    fitted = fit(points, [shrunk(point, shrinkage) for point in points])
    assert fitted.shrinkage == pytest.approx(kept)
    if kept == 0:  # the line through the points, as if there were nothing but the scores
        line = np.polyfit(np.log([one["fp8"].score for one in points]), np.log([shrunk(p, -0.4) for p in points]), 1)
        assert (fitted.exponent, math.log(fitted.factor)) == pytest.approx(tuple(line), rel=1e-6)


def by_scipy(points, kls, pull):
    """Return the logarithms of factor and weights, the exponent and the shrinkage that minimise what is minimised."""
    own, even = (np.array([[part[index] for part in one.values()] for one in points]) for index in (0, 1))

    def left(at):
        sums = ((1 - at[-1]) * own + at[-1] * even) @ np.exp(at[2:-1])
        return np.concatenate([np.log(kls) - at[0] - at[1] * np.log(sums), math.sqrt(pull) * at[2:]])

    free, start = [np.inf] * (2 + own.shape[1]), [0.0, 1.0, *[0.0] * own.shape[1], 0.1]
    exact = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15}
    return least_squares(left, start, bounds=([-one for one in free] + [0], [*free, 0.9]), **exact).x


@pytest.mark.parametrize("shrinkage", [-0.4, 0.0, 0.3, 0.7, 1.3])
@pytest.mark.parametrize("noise", [0.02, 0.2])
def test_the_fit_is_the_least_sum_of_squares(shrinkage, noise):
    generator = random.Random(9)
    points = [
        {name: InFormat(score * math.exp(generator.gauss(-0.2, 0.4)), score) for name, (score, _) in point.items()}
        for point in mixed(40, generator)
    ]
    weights = dict(zip(FORMATS, (1.0, 1.6, 0.5), strict=True))
    kls = []
    for point in points:
        own = {name: max(shrunk({name: part}, shrinkage), 1e-6) for name, part in point.items()}
        damage = sum(weights[name] * own[name] for name in FORMATS)
        kls.append(damage**0.8 * math.exp(generator.gauss(0, noise)))
    fitted, found = fit(points, kls), by_scipy(points, kls, 0.03)
    assert [math.log(fitted.factor), fitted.exponent] == pytest.approx(list(found[:2]), abs=1e-4)
    assert [math.log(weight) for weight in fitted.weights.values()] == pytest.approx(list(found[2:-1]), abs=1e-4)
    assert fitted.shrinkage == pytest.approx(found[-1], abs=1e-4)


def test_an_interval_is_the_line_s_where_there_is_no_shrinkage():
    """That of a regression line for one more point, with n - 2 degrees of freedom."""
    generator = random.Random(10)
    points = chosen_and_random(generator)
    kls = [shrunk(point, -0.4) * math.exp(generator.gauss(0, 0.02)) for point in points]
    fitted, count = fit(points, kls), len(points)
    assert (fitted.shrinkage, fitted.freedom) == (0.0, count - 2)
    x, y = np.log([one["fp8"].score for one in points]), np.log(kls)
    slope, level = np.polyfit(x, y, 1)
    spread = math.sqrt(np.sum((y - level - slope * x) ** 2) / (count - 2))
    at = math.log(0.05)
    error = spread * math.sqrt(1 + 1 / count + (at - x.mean()) ** 2 / np.sum((x - x.mean()) ** 2))
    guess = fitted.predict({"fp8": InFormat(0.05, 0.3)})
    assert math.log(guess.high / guess.value) == pytest.approx(t_of_scipy.ppf((1 + LEVEL) / 2, count - 2) * error)


def test_intervals_hold_where_scores_regress_to_the_mean():
    generator = random.Random(7)
    inside = trials = 0
    for _ in range(300):
        shrinkage = generator.uniform(0.2, 0.6)
        points = chosen_and_random(generator) + chosen_and_random(generator)
        generator.shuffle(points)
        kls = [shrunk(point, shrinkage) * math.exp(generator.gauss(0, 0.05)) for point in points]
        predicted = fit(points[1:], kls[1:]).predict(points[0])
        inside += predicted.low <= kls[0] <= predicted.high
        trials += 1
    assert abs(inside / trials - LEVEL) < 3 * math.sqrt(LEVEL * (1 - LEVEL) / trials)


def test_the_mean_is_of_all_groups_that_can_have_a_format():
    left_out = ("model.layers.0.down", "nvfp4")
    measurement = measurement_of(FORMATS[:2], layers=2, without=[left_out])
    means, sizes = mean_scores(measurement), {group.name: group.weight_elements for group in measurement.groups}
    for name in FORMATS[:2]:
        groups = [group for group in sizes if (group, name) != left_out]
        everything = parts_by_format(measurement, {group: name for group in groups})
        assert everything[name].weights == sum(sizes[group] for group in groups)
        assert means[name] * everything[name].weights == pytest.approx(everything[name].score)
    nowhere = measurement_of(FORMATS[:2], layers=2, without=[(group, "nvfp4") for group in sizes])
    assert mean_scores(nowhere) == {"fp8": means["fp8"], "nvfp4": 0.0}


def with_shrinkage(measurement, weights, shrinkage):
    """Return a map with these weights and this shrinkage, that has KL = weighed sum of scores; means are positive."""
    return KlMap.fit(mean_scores(measurement), *points_of(measurement, weights, shrinkage))


def points_of(measurement, weights, shrinkage):
    """Return scores by format, of plans and of random choices, and the KL that they have so."""
    means = mean_scores(measurement)
    points = [
        {name: InFormat(score, score * luck / mean) for (name, mean), score in zip(means.items(), pair, strict=True)}
        for pair in itertools.product(SCORES, repeat=len(means))
        for luck in (0.4, 1.0, 2.5)
    ]

    def kl(point):
        return sum(
            weights[name] * ((1 - shrinkage) * part.score + shrinkage * means[name] * part.weights)
            for name, part in point.items()
        )

    return points, [kl(point) for point in points]


def test_a_map_is_fitted_on_the_weights_that_simulated_schemes_have_in_each_format(tmp_path):
    measurement = measurement_of(FORMATS[:2], layers=2)
    points = [
        KlPoint(
            name=f"{index}",
            scores={name: part.score for name, part in point.items()},
            weights={name: round(part.weights) for name, part in point.items()},
            kl=kl,
        )
        for index, (point, kl) in enumerate(zip(*points_of(measurement, {"fp8": 1.4, "nvfp4": 0.7}, 0.3), strict=True))
    ]
    KlPoints(
        measurement_sha256=measurement.fingerprint(),
        settings_sha256="0",
        data=measurement.calibration,
        samples=1,
        points=tuple(points),
    ).write(tmp_path / "kl_points.json")
    fitted = planning.kl_map_of(tmp_path / "kl_points.json", measurement)
    assert fitted.shrinkage == pytest.approx(0.3, abs=0.01)
    assert fitted.weights["fp8"] / fitted.weights["nvfp4"] == pytest.approx(2, rel=0.02)


def with_negative_scores(measurement):
    """Return a measurement that has every third score, as one of nearly no damage may be, a little below zero."""
    changed = [
        one.model_copy(update={"scores": tuple(-0.2 * score for score in one.scores)}) if index % 3 == 0 else one
        for index, one in enumerate(measurement.candidates)
    ]
    return measurement.model_copy(update={"candidates": tuple(changed)})


@pytest.mark.parametrize("shrinkage", [0.0, 0.4])
def test_what_is_weighed_adds_up_to_what_is_predicted(shrinkage):
    """With batches that count differently, and a format whose scores are below zero on average."""
    whole = measurement_of(FORMATS, layers=2)
    candidates = [
        one.model_copy(update={"scores": tuple(score * (-2 if one.format == "int8" else 1) for score in one.scores)})
        for one in whole.candidates
    ]
    measurement = whole.model_copy(update={"candidates": tuple(candidates), "score_weights": (0.5, 3.0)})
    fitted = replace(
        with_shrinkage(whole, dict(zip(FORMATS, (1.4, 0.7, 0.9), strict=True)), shrinkage),
        means=mean_scores(measurement),
    )
    assert fitted.means["int8"] < 0
    weighed, groups = fitted.weigh(measurement), [group.name for group in measurement.groups]
    for names in itertools.product(("bf16", *FORMATS), repeat=len(groups)):
        formats = dict(zip(groups, names, strict=True))
        score = predicted_score(weighed, formats)
        guess = fitted.predict(parts_by_format(measurement, formats))
        assert (guess is None) == (score <= 0)
        assert guess is None or guess.value == pytest.approx(fitted.kl_of(score))


@pytest.mark.parametrize("changed", [lambda same: same, with_negative_scores], ids=["positive", "negative"])
@pytest.mark.parametrize("without", [(), [("model.layers.0.down", "nvfp4")]], ids=["all", "one-left-out"])
def test_what_is_planned_within_a_kl_is_the_smallest_by_brute_force(changed, without):
    measurement = changed(measurement_of(FORMATS[:2], layers=2, without=without))
    fitted = with_shrinkage(measurement, {"fp8": 1.4, "nvfp4": 0.7}, 0.3)
    assert fitted.shrinkage == pytest.approx(0.3, abs=0.01)
    found, table = [], measurement.by_group()
    for names in list(itertools.product(("bf16", *FORMATS[:2]), repeat=len(table)))[1:]:  # the first has nothing
        formats = dict(zip(table, names, strict=True))
        if any((group, name) in without for group, name in formats.items()):
            continue
        scheme = planning.price(measurement, "x", formats, SchemeSpec(name="x", include=("*",)))
        kl = fitted.predict(parts_by_format(measurement, formats))
        found.append((scheme.weight_bits, kl.value if kl else 0.0))
    for most in sorted({kl for _, kl in found})[3::9]:
        scheme = planning.plan(measurement, SchemeSpec(name="near", max_kl=most * (1 + 1e-9)), kl_map=fitted)
        assert scheme.weight_bits == min(bits for bits, kl in found if kl <= most)
        guess = fitted.predict(parts_by_format(measurement, scheme.formats))
        assert guess is None or guess.value <= most * (1 + 2e-9)


@pytest.mark.parametrize("changed", [lambda same: same, with_negative_scores], ids=["positive", "negative"])
def test_a_plan_that_is_chosen_by_kl_has_the_least_predicted_kl_of_its_size_by_brute_force(changed):
    """And other plans chosen by scores beside it are what they were."""
    measurement = changed(measurement_of(FORMATS[:2], layers=2))
    fitted = with_shrinkage(measurement, {"fp8": 5.0, "nvfp4": 0.1}, 0.4)
    weighed, groups, found = fitted.weigh(measurement), [group.name for group in measurement.groups], []
    for names in list(itertools.product(("bf16", *FORMATS[:2]), repeat=len(groups)))[1:]:
        formats = dict(zip(groups, names, strict=True))
        scheme = planning.price(measurement, "x", formats, SchemeSpec(name="x", include=("*",)))
        found.append((scheme.effective_bits, predicted_score(weighed, formats)))
    differ = 0
    for bits in (5.5, 7.0, 8.5, 10.0, 12.0):
        specs = [SchemeSpec(name=way, effective_bits=bits, chosen_by=way) for way in ("score", "kl")]
        by_score, by_kl = (planning.plan(measurement, spec, kl_map=fitted) for spec in specs)
        assert by_score == planning.plan(measurement, specs[0])
        assert by_kl.effective_bits <= bits
        least = min(score for size, score in found if size <= bits)
        assert predicted_score(weighed, by_kl.formats) == pytest.approx(least, rel=1e-9, abs=1e-12)
        assert by_kl.predicted_score == pytest.approx(predicted_score(measurement, by_kl.formats))  # not weighed
        if by_kl.formats != by_score.formats:
            differ += 1
            assert predicted_score(weighed, by_kl.formats) < predicted_score(weighed, by_score.formats)
            both = planning.plan_all(measurement, specs, fitted)  # one planner keeps both trade-offs
            assert [one.formats for one in both] == [by_score.formats, by_kl.formats]
            edge = planning.Solver(measurement)  # of scores
            assert planning.plan(measurement, specs[1], kl_map=fitted, frontier=edge).formats == by_kl.formats
    assert differ > 2


def test_a_share_that_is_chosen_by_kl_is_a_prefix_by_what_the_map_says():
    measurement = measurement_of(FORMATS[:2], layers=3)
    fitted = with_shrinkage(measurement, {"fp8": 5.0, "nvfp4": 0.1}, 0.6)
    order = cheapest_first(fitted.weigh(measurement))
    assert list(order) != list(cheapest_first(measurement))
    for share in (0.2, 0.5, 0.8):
        spec = SchemeSpec(name="share", coverage=share, chosen_by="kl")
        scheme = planning.plan(measurement, spec, kl_map=fitted)
        taken = list(order)[: len(scheme.quantised_groups())]
        assert {group: scheme.formats[group] for group in taken} == {group: order[group] for group in taken}
        assert scheme.coverage <= share


def test_a_frontier_of_another_measurement_is_refused_whatever_chooses():
    measurement, other = (measurement_of(FORMATS[:2], layers=layers) for layers in (2, 3))
    kl_map, edge = with_shrinkage(measurement, {"fp8": 5.0, "nvfp4": 0.1}, 0.4), planning.Solver(other)
    for way in ("score", "kl"):
        spec = SchemeSpec(name="near", effective_bits=8, chosen_by=way)
        with pytest.raises(PlanError, match="the frontier given is of another measurement"):
            planning.plan(measurement, spec, kl_map=kl_map, frontier=edge)


def test_a_choice_by_kl_without_a_map_or_with_one_that_falls_is_refused_with_ways_that_work():
    measurement = measurement_of(("fp8",), layers=2)
    falling = fit(alone(SCORES), [1e-3 / score for score in SCORES])
    for asked in ({"coverage": 0.5}, {"effective_bits": 10}):
        by_kl = SchemeSpec(name="near", chosen_by="kl", **asked)
        with pytest.raises(PlanError, match="near: chosen_by: kl needs KL measured .* here ask by scores: coverage"):
            planning.plan(measurement, by_kl)
        with pytest.raises(PlanError, match="near: max_kl needs KL measured .* here ask by scores: coverage"):
            planning.plan(measurement, SchemeSpec(name="near", max_kl=0.1))
        with pytest.raises(PlanError, match="KL doesn't grow .* ask for coverage or effective_bits, chosen by scores"):
            planning.plan(measurement, by_kl, kl_map=falling)
        assert planning.plan(measurement, SchemeSpec(name="near", **asked)).quantised_groups()


@pytest.mark.parametrize("level", [0.1, 0.5, LEVEL, 0.99])
def test_students_t_is_scipys(level):
    for freedom in (*range(1, 40), 99, 100, 1001):
        assert students_t(level, freedom) == pytest.approx(t_of_scipy.ppf((1 + level) / 2, freedom), rel=1e-12)


def test_where_kl_does_not_grow_with_the_score_none_is_bounded():
    fitted = fit(alone(SCORES), [1e-3 / score for score in SCORES])
    assert fitted.exponent == pytest.approx(-1)
    assert fitted.score_of(1e-3) is None
    fitted = fit(alone(SCORES), [2 * score**2 for score in SCORES])
    assert fitted.score_of(fitted.kl_of(3e-3)) == pytest.approx(3e-3)


def test_where_kl_hardly_grows_with_the_score_any_above_is_bounded():
    measurement = measurement_of(("fp8",), layers=2)
    flat = fit(alone(SCORES), [1e-3 * (1 + 1e-4 * index) for index in range(5)])
    scheme = planning.plan(measurement, SchemeSpec(name="near", max_kl=1e-2), kl_map=flat)
    assert len(scheme.quantised_groups()) == len(measurement.groups)
    with pytest.raises(InfeasibleTarget, match=r"within a predicted KL of 0\.0001"):
        planning.plan(measurement, SchemeSpec(name="near", max_kl=1e-4), kl_map=flat)


def test_a_kl_that_no_score_bounds_is_refused_with_ways_that_work():
    measurement = measurement_of(("fp8",), layers=2)
    flat = fit(alone(SCORES), [1e-3 / score for score in SCORES])
    for most in (1e-9, 1.0):
        with pytest.raises(PlanError, match=f"the {len(SCORES)} schemes .* KL doesn't grow .* or effective_bits"):
            planning.plan(measurement, SchemeSpec(name="near", max_kl=most), kl_map=flat)
    for way in ({"coverage": 0.5}, {"effective_bits": 10}):
        assert planning.plan(measurement, SchemeSpec(name="near", **way), kl_map=flat).quantised_groups()


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_scores_of_image_positions_are_weighed_like_all(shrinkage):
    """So that it makes no difference which of the two weights is applied first."""
    measurement = measurement_of(FORMATS[:2], layers=2, image=True)
    fitted = with_shrinkage(measurement, {"fp8": 1.4, "nvfp4": 0.7}, shrinkage)
    assert fitted.shrinkage == pytest.approx(shrinkage, abs=0.01)
    for one, other in zip(
        fitted.weigh(measurement).weigh_images(0.25).candidates,
        fitted.weigh(measurement.weigh_images(0.25)).candidates,
        strict=True,
    ):
        assert one.scores == pytest.approx(other.scores, rel=1e-12)


def test_a_scheme_is_predicted_within_the_kl_that_it_asks_for():
    measurement = measurement_of(FORMATS[:2], image=True)
    fitted = with_shrinkage(measurement, {"fp8": 1.4, "nvfp4": 0.7}, 0.3)
    for most in (0.005, 0.02, 0.05):
        scheme = planning.plan(measurement, SchemeSpec(name="near", max_kl=most), kl_map=fitted)
        assert 0.75 * most < fitted.of_scheme(measurement, scheme).value <= most * (1 + 1e-9)


@pytest.mark.parametrize("image_weight", [0.0, 0.25, 2.0])
def test_the_same_formats_have_the_same_kl_whatever_image_positions_counted_for_when_they_were_chosen(image_weight):
    measurement = measurement_of(FORMATS[:2], image=True)
    fitted = with_shrinkage(measurement, {"fp8": 1.4, "nvfp4": 0.7}, 0.3)
    weighed, plain = (
        planning.plan(measurement, SchemeSpec(name="all", coverage=1.0, formats=["fp8"], image_weight=weight))
        for weight in (image_weight, 1.0)
    )
    assert weighed.formats == plain.formats
    assert weighed.predicted_score != plain.predicted_score
    assert fitted.of_scheme(measurement, weighed) == fitted.of_scheme(measurement, plain)


def test_a_negative_part_counts_for_nothing_where_the_map_is_fitted_and_is_added_where_it_predicts():
    """What predicts has to agree with what plans, which adds up groups one by one."""
    points = [parts({"fp8": score, "nvfp4": -score / 3}) for score in SCORES]
    fitted = fit(points, [2 * score for score in SCORES])
    assert (fitted.factor, fitted.exponent) == pytest.approx((2, 1))
    assert fitted.predict(parts({"fp8": 1e-3, "nvfp4": -2e-4})).value == pytest.approx(1.6e-3)
    assert fitted.predict(parts({"fp8": 1e-3, "nvfp4": -2e-3})) is None
