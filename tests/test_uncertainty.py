"""Rank intervals and flips: none where the batches agree, many where they don't, fewer with more data."""

import numpy as np
import pytest

from bitladder import planning
from bitladder.planning import uncertainty
from bitladder.records import Candidate, Measurement, QuantGroup, QuantModule
from conftest import spec
from test_report import make_measurement


def measurement_of(scores, elements=100):
    """A measurement of groups with these scores, [groups, batches]."""
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(len(scores))]
    groups = tuple(QuantGroup(name=n, modules=(QuantModule(name=n),), weight_elements=elements) for n in names)
    candidates = tuple(
        Candidate(group=n, format="fp8", weight_bits=8 * elements, scores=tuple(row))
        for n, row in zip(names, scores, strict=True)
    )
    batches = len(scores[0])
    changes = {"groups": groups, "candidates": candidates, "score_weights": (1 / batches,) * batches}
    return Measurement(**{**make_measurement().model_dump(), **changes})


def noisy(groups=20, batches=8, noise=0.5, seed=0):
    generator = np.random.default_rng(seed)
    means = np.linspace(1, 2, groups)
    return measurement_of((means[:, None] * generator.lognormal(0, noise, (groups, batches))).tolist())


def half(measurement):
    return planning.plan(measurement, spec("half", coverage=0.5))


def test_batches_that_agree_leave_nothing_open():
    measurement = measurement_of([[i + 1.0] * 4 for i in range(10)])
    assert uncertainty.rank_intervals(measurement, "fp8") == {
        group.name: (i + 1, i + 1) for i, group in enumerate(measurement.groups)
    }
    found = uncertainty.flips(measurement, half(measurement))
    assert found.share == {}
    assert set(found.expected.values()) == {0.0}
    assert found.enough == 1


def test_an_interval_holds_the_rank_and_grows_with_the_noise():
    quiet, loud = noisy(noise=0.1), noisy(noise=1.0)
    widths = []
    for measurement in (quiet, loud):
        ranks = {g: i + 1 for i, g in enumerate(planning.density_order(measurement, "fp8"))}
        intervals = uncertainty.rank_intervals(measurement, "fp8")
        assert sum(low <= ranks[g] <= high for g, (low, high) in intervals.items()) >= 18
        widths.append(sum(high - low for low, high in intervals.values()))
    assert widths[0] < widths[1]


def test_only_groups_near_the_edge_flip():
    measurement = noisy(noise=0.15)
    scheme = half(measurement)
    order = planning.density_order(measurement, "fp8")
    share = uncertainty.flips(measurement, scheme).share
    assert share
    assert order[0] not in share
    assert order[-1] not in share
    assert max(share, key=share.get) in order[6:14]


def test_more_data_would_flip_less():
    expected = uncertainty.flips(noisy(noise=0.5), half(noisy(noise=0.5))).expected
    counts = list(expected.values())
    assert tuple(expected) == uncertainty.MULTIPLES
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 1 > counts[-1]
    found = uncertainty.flips(noisy(noise=0.5), half(noisy(noise=0.5)))
    assert expected[found.enough] <= 1 < expected[found.enough // 2]


def test_two_batches_by_hand():
    """Two groups, two batches: drawing the second batch twice (probability 1/4) turns their order round."""
    measurement = measurement_of([[1.0, 2.2], [3.0, 2.0]])
    found = uncertainty.flips(measurement, half(measurement))
    assert set(found.share) == {group.name for group in measurement.groups}
    # three standard errors of a share of 1/4 among the draws
    assert found.expected[1] / 2 == pytest.approx(0.25, abs=3 * (0.25 * 0.75 / uncertainty.RESAMPLES) ** 0.5)


def test_what_cannot_be_said_is_none():
    measurement = noisy()
    assert uncertainty.flips(measurement, planning.plan(measurement, spec("full", coverage=1.0))) is None
    named = planning.plan(measurement, spec("named", include=("*.1.*",)))
    assert uncertainty.flips(measurement, named) is None
    single = measurement_of([[1.0], [2.0]])
    assert uncertainty.flips(single, half(single)) is None
    assert uncertainty.rank_intervals(single, "fp8") == {}
