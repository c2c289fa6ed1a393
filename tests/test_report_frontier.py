"""What else could be planned: every point of the report's frontier is what the planner makes of its recipe line."""

import itertools

import pytest

from bitladder.planning import plan
from bitladder.recipe import SchemeSpec
from bitladder.report import build_report
from bitladder.report.frontier import MAX_TARGETS, frontier_of, spec_of
from test_planning import measurement_of
from test_report import make_evaluation, make_manifest, make_measurement, make_scheme
from test_report_verdict import two_formats


def best_of(measurement, formats, target):
    """The least score within so many effective bits, by trying everything."""
    table = measurement.by_group()
    bits = {(c.group, c.format): c.weight_bits for c in measurement.candidates}
    best = None
    for choice in itertools.product(("bf16", *formats), repeat=len(measurement.groups)):
        pairs = list(zip(measurement.groups, choice, strict=True))
        cost = sum(16 * g.weight_elements if f == "bf16" else bits[g.name, f] for g, f in pairs)
        if cost <= target * measurement.searched_weights:
            score = sum(measurement.sensitivity(table[g.name][f]) for g, f in pairs if f != "bf16")
            best = min(score, best if best is not None else score)
    return best


def test_points_are_the_least_damage_within_their_bits():
    measurement = two_formats()
    frontier = frontier_of(measurement, None)
    assert [curve.formats for curve in frontier.curves] == [("fp8", "int4_w4a16"), ("fp8",), ("int4_w4a16",)]
    for curve in frontier.curves:
        assert 3 <= len(curve.points) <= MAX_TARGETS
        assert len({point.formats for point in curve.points}) == len(curve.points)
        assert [point.effective_bits for point in curve.points] == sorted(p.effective_bits for p in curve.points)
        for point in curve.points[:: max(1, len(curve.points) // 4)]:
            assert point.predicted_score == pytest.approx(best_of(measurement, curve.formats, point.target))
            assert point.effective_bits <= point.target


def test_the_recipe_line_of_every_point_makes_its_plan():
    measurement = two_formats()
    frontier = frontier_of(measurement, None)
    names = set()
    for curve in frontier.curves:
        for point in curve.points:
            entry = spec_of(curve, point.target, measurement.formats)
            names.add(entry["name"])
            scheme = plan(measurement, SchemeSpec.model_validate(entry))
            assert "".join(frontier_letter(frontier, name) for name in scheme.formats.values()) == point.formats
            assert scheme.effective_bits == point.effective_bits
            assert scheme.weight_bytes == point.weight_bytes
            assert scheme.predicted_score == point.predicted_score
    assert len(names) == sum(len(curve.points) for curve in frontier.curves)


def frontier_letter(frontier, name):
    return next(letter for letter, format_name in frontier.letters.items() if format_name == name)


def test_one_format_has_one_curve_and_its_floor_is_there():
    measurement = make_measurement()
    (curve,) = frontier_of(measurement, None).curves
    assert (curve.points[0].target, set(curve.points[0].formats)) == (8.0, {"1"})
    assert "formats" not in spec_of(curve, 8.0, measurement.formats)
    assert curve.points[0].kl is None  # gradient scores are no KL


def test_where_scores_are_kl_they_are_what_is_predicted():
    measurement = make_measurement(score_unit="nats per token")
    frontier = frontier_of(measurement, None)
    assert frontier.level is None
    for point in frontier.curves[0].points:
        assert (point.kl, point.low) == (point.predicted_score, None)


def test_measured_schemes_give_an_interval():
    measurement = make_measurement()
    chosen = {"a": {0}, "b": {0, 1}, "c": {0, 1, 2}, "d": {0, 1, 2, 3}, "full": set(range(8))}
    schemes = [make_scheme(measurement, name, groups) for name, groups in chosen.items()]
    manifests = {scheme.name: make_manifest(scheme) for scheme in schemes}
    noise = (1.1, 0.95, 1.0, 0.9, 1.05)
    evaluations = {
        s.name: make_evaluation(manifests[s.name], 2 * s.predicted_score * factor, 1e-5)
        for s, factor in zip(schemes, noise, strict=True)
    }
    report = build_report({}, measurement, schemes, manifests, None, evaluations, [])
    assert report.frontier.level == 0.9
    for point in report.frontier.curves[0].points:
        assert point.low < point.kl < point.high
        assert point.kl == pytest.approx(2 * point.predicted_score, rel=0.2)


def test_many_groups_take_no_time_and_steps_stay_few():
    sizes = [1600 + 64 * (i % 7) for i in range(200)]
    scores = [{"fp8": 1e-4 * (1 + (7 * i) % 31)} for i in range(200)]
    (curve,) = frontier_of(measurement_of(sizes, scores), None).curves
    assert 60 <= len(curve.points) <= MAX_TARGETS
    assert curve.left_out == ()
