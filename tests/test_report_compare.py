"""Two runs side by side: what differs is said, what can't be compared isn't."""

import pytest

from bitladder.errors import RecordError
from bitladder.report import build_report, compare_runs
from test_report import HELD_OUT, make_evaluation, make_manifest, make_measurement, make_report, make_scheme, tables

NAMES = ("text", "pairs")


def other_report(order=(7, 6, 5, 4, 3, 2, 1, 0), **evaluation):
    """A run whose groups have the scores of `make_measurement` in another order."""
    base = make_measurement()
    candidates = tuple(
        candidate.model_copy(update={"scores": base.candidates[order[index]].scores})
        for index, candidate in enumerate(base.candidates)
    )
    calibration = base.calibration.model_copy(update={"kind": "image_text"})
    measurement = make_measurement(candidates=candidates, calibration=calibration)
    schemes = [make_scheme(measurement, "top25", {6, 7}), make_scheme(measurement, "own", {5, 6, 7})]
    manifests = {scheme.name: make_manifest(scheme) for scheme in schemes}
    evaluations = {"top25": make_evaluation(manifests["top25"], 1.9e-3, 1e-4, **evaluation)}
    return build_report({}, measurement, schemes, manifests, None, evaluations, [])


def test_settings_schemes_and_ranks():
    page = compare_runs(make_report(), other_report(), NAMES)
    settings, schemes, moved = tables(page)
    assert ["calibration", "captions.txt (text)", "captions.txt (image_text)", "differs"] in settings
    assert next(row for row in settings if row[0] == "engine, method")[3] == ""
    assert [row[0] for row in schemes[2:]] == ["top25"]  # the only one that both have
    assert schemes[2][3:] == ["4", "2.800", "1.900"]
    assert len(moved) - 2 <= 10
    assert "over 8 common groups" in page


def test_equal_runs_have_no_moves():
    page = compare_runs(make_report(), make_report(), NAMES)
    assert "over 8 common groups: 1.000." in page
    assert "differs" not in page
    assert "whose rank differs" not in page
    assert [row[3] for row in tables(page)[1][2:]] == ["0", "0", "0"]


def test_kl_on_other_data_is_not_compared():
    data = {"data": {"held_out": HELD_OUT.model_copy(update={"sha256": "9" * 64})}}
    page = compare_runs(make_report(), other_report(**data), NAMES)
    assert tables(page)[1][2][4:] == ["other data", "other data"]


def test_nothing_in_common_is_refused():
    report = make_report()
    groups = tuple(group.model_copy(update={"name": f"x.{group.name}"}) for group in report.groups)
    schemes = tuple(scheme.model_copy(update={"name": f"x_{scheme.name}"}) for scheme in report.schemes)
    with pytest.raises(RecordError, match="text and pairs have neither a scheme nor a quant group"):
        compare_runs(report, report.model_copy(update={"groups": groups, "schemes": schemes}), NAMES)
