"""What the report says about the search: control arms, predicted against measured, and what calibration leaves open."""

import random

import pytest

from bitladder.errors import StaleRecord
from bitladder.records import ControlArm, Evidence, Refinement, Refinements
from bitladder.report import build_report, render_html, render_markdown
from test_report import (
    HELD_OUT,
    make_evaluation,
    make_manifest,
    make_measurement,
    make_report,
    make_scheme,
    section,
    tables,
)

ARMS = {"top25.random0": 6e-3, "top25.random1": 8e-3, "top25.inverse": 14e-3, "top50.random0": 9e-3}


def make_evidence(measurement, manifest, **changes):
    arms = []
    for index, (name, kl) in enumerate(ARMS.items()):
        beside, control = name.split(".")
        asked = {"control": control.rstrip("01"), "beside": beside}
        scheme = make_scheme(measurement, name, {index + 2, index + 3}, asked=asked)
        arms.append(ControlArm(scheme=scheme, results=make_evaluation(manifest, kl, 1e-4).results))
    fields = {
        "measurement_sha256": measurement.fingerprint(),
        "settings_sha256": "s",
        "data": {"held_out": HELD_OUT},
        "arithmetic": "float32",
        "arms": tuple(arms),
        "left_out": ("top50.random1",),
    }
    return Evidence(**fields | changes)


def report_with(**changes):
    measurement = make_measurement()
    schemes = [
        make_scheme(measurement, "top25", {0, 1}),
        make_scheme(measurement, "top50", {0, 1, 2}),
        make_scheme(measurement, "full", set(range(8))),
    ]
    manifests = {scheme.name: make_manifest(scheme) for scheme in schemes}
    kls = {"top25": 2.8e-3, "top50": 9.5e-3, "full": 29.7e-3}
    evaluations = {name: make_evaluation(manifests[name], kl, 1e-4) for name, kl in kls.items()}
    evidence = make_evidence(measurement, manifests["top25"], **changes)
    return build_report({}, measurement, schemes, manifests, None, evaluations, [], evidence=evidence)


def test_a_scheme_stands_beside_its_controls():
    markdown = render_markdown(report_with())
    rows = tables(section(markdown, "Is the search worth it?"))[0]
    assert rows[2:] == [
        ["top25", "random groups", "2", "2.80", "7.00", "6.00 to 8.00", "0.40"],
        ["top25", "most sensitive first", "1", "2.80", "14.00", "–", "0.20"],
        ["top50", "random groups", "1", "9.50", "9.00", "–", "1.06"],
    ]
    assert "1 arm left out for lack of time (`controls.max_seconds`): top50.random1." in markdown


def test_the_top_says_what_the_search_is_worth():
    top = render_markdown(report_with()).split("\n## ")[0]
    assert "- Against chance: `top25` has 0.40 times the KL of 2 random choices at its bits, less than each." in top
    assert "`top50` has 1.06 times the KL of 1 random choice at its bits; not each of them is worse." in top


def test_each_is_predicted_from_all_the_others():
    report = report_with()
    points = {point.name: point for point in report.prediction.points}
    assert set(points) == {"top25", "top50", "full", *ARMS}
    assert [name for name, point in points.items() if point.is_control] == list(ARMS)
    assert points["full"].measured == 29.7e-3
    assert points["full"].low < points["full"].predicted < points["full"].high
    rows = tables(section(render_markdown(report), "Predicted against measured"))[0][2:]
    assert [row[0] for row in rows] == sorted(points, key=lambda name: points[name].measured)
    errors = sorted(abs(point.predicted / point.measured - 1) for point in points.values())
    assert report.prediction.median_error == pytest.approx(errors[3])


@pytest.mark.parametrize(
    ("weights", "shrinkage", "told"),
    [
        ({"fp8": 1.0}, 0.0, ""),
        ({"fp8": 1.0}, 0.304, "Scores are taken 30% of the way to the mean of their format. "),
        ({"fp8": 0.8, "nvfp4": 1.25}, 0.0, "A score counts 0.80 in fp8, 1.25 in nvfp4. "),
        (
            {"fp8": 0.8, "nvfp4": 1.25},
            0.5,
            "A score counts 0.80 in fp8, 1.25 in nvfp4. Scores are taken 50% of the way to the mean of their format. ",
        ),
    ],
)
def test_what_scores_count_for_is_said_in_words(weights, shrinkage, told):
    report = report_with()
    prediction = report.prediction.model_copy(update={"weights": weights, "shrinkage": shrinkage})
    changed = report.model_copy(update={"prediction": prediction})
    for text in (render_markdown(changed), render_html(changed)):
        assert f"predicted {'here ' if text.startswith('#') else ''}from all the others. {told}Median error" in text


def test_arms_on_other_data_are_not_compared():
    report = report_with(data={"held_out": HELD_OUT.model_copy(update={"sha256": "x" * 64})})
    assert not report.comparable
    assert report.controls == report.control_comparisons == ()
    assert report.prediction is None


def test_arms_of_another_measurement_are_refused():
    with pytest.raises(StaleRecord, match="control arms are of another measurement"):
        report_with(measurement_sha256="0" * 64)


def test_without_controls_the_page_says_so():
    assert "not run: `controls` in the recipe asks for them" in render_markdown(make_report())


def test_groups_that_another_draw_would_change_are_marked():
    base = make_measurement()
    generator = random.Random(1)
    noisy = tuple(
        candidate.model_copy(update={"scores": tuple(generator.lognormvariate(-7, 2) for _ in range(4))})
        for candidate in base.candidates
    )
    measurement = make_measurement(candidates=noisy, score_weights=(0.25,) * 4)
    report = build_report({}, measurement, [make_scheme(measurement, "top50", {0, 1, 2, 3})], {}, None, {}, [])
    markdown = render_markdown(report)
    assert "More calibration would change about" in markdown
    assert "of 8 groups of `top50` (4 scoring batches, drawn again)" in markdown
    cells = [row[-1] for row in tables(section(markdown, "Sensitivity, group by group"))[0][2:]]
    marked = {group for group, share in report.schemes[0].unsettled.shares.items() if share >= 0.1}
    assert sum(cell.endswith(" ?") for cell in cells) == len(marked) > 0
    settled = render_markdown(make_report())
    assert "More calibration" not in settled


def test_what_refining_gained_is_said():
    found = {"scheme": "top50", "planned_sha256": "p", "kl_planned": 7.1e-3, "kl_refined": 6.5e-3, "evaluations": 27}
    refinements = Refinements(
        measurement_sha256="m",
        settings_sha256="s",
        data=HELD_OUT,
        samples=8,
        refinements=(Refinement(**found, changes={"a": "fp8", "b": "bf16"}),),
    )
    top = render_markdown(report_with().model_copy(update={"refinements": refinements.refinements})).split("\n## ")[0]
    assert "- Refined: `top50` has 2 groups in another format than planned; KL on the samples" in top
    assert "that chose it 7.10 → " in top
    assert "27 simulations" in top
