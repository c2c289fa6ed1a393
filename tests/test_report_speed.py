"""What a report says of predicted speed: beside bits, in plain words, along the frontier, and in the verdict."""

import pytest

from bitladder import planning, report
from bitladder.recipe import SchemeSpec, SpeedSpec
from bitladder.records import BF16
from bitladder.report.frontier import frontier_of, spec_of
from bitladder.report.speeds import fastest
from bitladder.report.types import PredictedSpeed
from conftest import spec
from test_asking import measurement_of
from test_speed import ASKED, LAYERS, every_choice, model_of, served

NAMES = ("fp8", "nvfp4")


def report_with_speeds():
    """A measurement, schemes of it, and their report with a profile."""
    measurement = measurement_of(NAMES, layers=LAYERS, seed=4)
    model = model_of(measurement)
    asked = [
        spec("all_fp8", coverage=1.0, format="fp8"),
        spec("all_nvfp4", coverage=1.0, format="nvfp4"),
        spec("fast", speed=SpeedSpec(prefill=1.2)),
    ]
    schemes = planning.plan_all(measurement, asked, speed=model)
    return measurement, schemes, report.build_report({}, measurement, schemes, {}, None, {}, [], speed=model)


@pytest.fixture(scope="module")
def made():
    return report_with_speeds()


def row_of(markdown, name):
    section = markdown.partition("## Speed, as predicted")[2]
    line = next(line for line in section.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_every_scheme_has_its_speeds_beside_its_bits(made):
    measurement, schemes, found = made
    markdown = report.render_markdown(found)
    plain = served([BF16] * 2 * LAYERS, ASKED)
    for scheme in schemes:
        prefill, decode = served(list(scheme.formats.values()), ASKED)
        row = row_of(markdown, scheme.name)
        assert row[1] == f"{scheme.effective_bits:.2f}"
        assert row[3:] == [
            f"{round(64 * 256 / prefill):,}",
            f"{plain[0] / prefill:.2f}",
            f"{round(64 / decode):,}",
            f"{plain[1] / decode:.2f}",
        ]
    assert row_of(markdown, "original")[3] == f"{round(64 * 256 / plain[0]):,}"
    assert "64 requests given at once, of 256 tokens, answered with 33, on Invented GPU" in markdown


def test_it_is_said_plainly(made):
    _, schemes, found = made
    plain = served([BF16] * 2 * LAYERS, ASKED)
    prefill, decode = served(["nvfp4"] * 2 * LAYERS, ASKED)
    assert plain[0] < prefill  # NVFP4 is slow at prefill on the invented device
    line = (
        f"On Invented GPU, as predicted, `all_nvfp4` is {1 - plain[0] / prefill:.0%} slower than 16 bits at prefill "
        f"and {plain[1] / decode - 1:.0%} faster than 16 bits at decoding, and 72% smaller."  # 4.5 of 16 bits
    )
    assert line in report.render_markdown(found)
    page = report.render_html(found)
    assert "slower than 16 bits at prefill" in page
    assert '<section id="speed">' in page
    assert '<a href="#speed">' in page


def test_points_of_the_frontier_are_the_least_damage_at_their_speed(made):
    measurement, _, found = made
    plain = served([BF16] * 2 * LAYERS, ASKED)
    choices = [(served(formats, ASKED), score) for formats, score in every_choice(measurement, NAMES)]
    assert {point.phase for point in found.speeds.frontier} == {"prefill", "decode"}
    for point in found.speeds.frontier:
        place = ("prefill", "decode").index(point.phase)
        limit = plain[place] / point.ratio * (1 + 1e-6)
        assert point.predicted_score == pytest.approx(min(s for t, s in choices if t[place] <= limit), rel=1e-12)
    ends = [
        max(point.ratio for point in found.speeds.frontier if point.phase == phase) for phase in ("prefill", "decode")
    ]
    assert ends == pytest.approx([plain[i] / min(t[i] for t, _ in choices) for i in (0, 1)], rel=1e-6)


def test_a_frontier_that_is_too_large_does_not_stop_a_report(made, monkeypatch):
    measurement, schemes, whole = made
    monkeypatch.setattr("bitladder.planning.points.MAX_FRONTIER_CHOICES", 0)
    found = report.build_report({}, measurement, schemes, {}, None, {}, [], speed=model_of(measurement))
    assert set(found.speeds.frontier) < set(whole.speeds.frontier)
    assert len(found.speeds.schemes) == len(schemes)


def test_which_is_fastest_is_told_for_each_aim():
    def speed(name, prefill, decode):
        return PredictedSpeed(scheme=name, prefill=1, decode=1, prefill_ratio=prefill, decode_ratio=decode)

    assert fastest([speed("a", 1.5, 1.2), speed("b", 0.5, 0.9)], "X") == (
        "predicted to be fastest in everything on X is `a`, 1.50 times 16 bits at prefill and 1.20 times 16 bits at "
        "decoding"
    )
    assert fastest([speed("a", 1.5, 1.2), speed("b", 0.5, 1.9)], "X") == (
        "predicted to be fastest on X is at prefill `a`, 1.50 times 16 bits and at decoding `b`, 1.90 times 16 bits"
    )
    assert fastest([speed("a", 0.5, 0.9)], "X") == "none is predicted to be faster than 16 bits on X"


def test_a_scheme_without_times_is_named_and_not_guessed():
    measurement = measurement_of(NAMES, layers=LAYERS)
    model = model_of(measurement, formats=(BF16, "fp8"), refused={"nvfp4": "no kernel"})
    schemes = planning.plan_all(measurement, [spec("fp8", coverage=1.0, format="fp8"), spec("mix", effective_bits=6)])
    found = report.build_report({}, measurement, schemes, {}, None, {}, [], speed=model)
    assert [one.scheme for one in found.speeds.schemes] == ["fp8"]
    assert (
        "No speed is predicted of `mix`: the profile of Invented GPU has no times of nvfp4"
        in report.render_markdown(found)
    )


def test_without_a_profile_nothing_is_said_of_speed():
    measurement = measurement_of(NAMES, layers=LAYERS)
    schemes = planning.plan_all(measurement, [spec("fp8", coverage=1.0, format="fp8")])
    found = report.build_report({}, measurement, schemes, {}, None, {}, [])
    assert found.speeds is None
    assert "Speed, as predicted" not in report.render_markdown(found) + report.render_html(found)


def test_the_planner_has_the_speed_of_every_plan_and_goes_along_it(made):
    measurement, _, found = made
    model, letters = model_of(measurement), found.frontier.letters
    plain = served([BF16] * 2 * LAYERS, ASKED)
    curves = {(curve.formats, curve.along): curve for curve in found.frontier.curves}
    along = [(NAMES, phase) for phase in ("prefill", "decode")]
    assert list(curves) == [(NAMES, "bits"), (("fp8",), "bits"), (("nvfp4",), "bits"), *along]
    for curve in curves.values():
        for point in curve.points:
            times = served([letters[letter] for letter in point.formats], ASKED)
            ratios = [before / now for before, now in zip(plain, times, strict=True)]
            assert [point.prefill_ratio, point.decode_ratio] == pytest.approx(ratios, rel=1e-6)
    for key in along:
        points = curves[key].points
        assert len(points) > 4
        assert [point.target for point in points] == sorted({point.target for point in points})
        for point in points:
            asked = SchemeSpec.model_validate(spec_of(curves[key], point.target, NAMES))
            scheme = planning.plan(measurement, asked, speed=model)
            assert list(scheme.formats.values()) == [letters[letter] for letter in point.formats]
            assert getattr(point, f"{key[1]}_ratio") >= point.target


def test_the_planner_knows_no_speed_of_what_was_not_timed():
    measurement = measurement_of(NAMES, layers=LAYERS)
    model = model_of(measurement, formats=(BF16, "fp8"), refused={"nvfp4": "no kernel"})
    frontier = frontier_of(measurement, None, model)
    nvfp4 = next(letter for letter, name in frontier.letters.items() if name == "nvfp4")
    points = [point for curve in frontier.curves for point in curve.points]
    assert {(point.decode_ratio is None, nvfp4 in point.formats) for point in points} == {(True, True), (False, False)}
    assert {curve.formats for curve in frontier.curves if curve.along != "bits"} == {("fp8",)}
    assert all(curve.along == "bits" for curve in frontier_of(measurement, None).curves)
