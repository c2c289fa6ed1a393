"""Refining a scheme in context: what interacts is found, budgets are kept, and nothing gets worse."""

import random

import pytest

from bitladder import planning
from bitladder.errors import PlanError
from bitladder.planning.refinement import refine
from bitladder.recipe import SchemeSpec
from bitladder.records import BF16
from test_planning import measurement_of, random_measurement


def additive(measurement):
    table = measurement.by_group()
    return lambda scheme: sum(
        measurement.sensitivity(table[group][name]) for group, name in scheme.formats.items() if name != BF16
    )


def with_pairs(measurement, extra):
    """A KL that also counts pairs of groups which are quantised together."""
    base = additive(measurement)

    def kl(scheme):
        taken = scheme.quantised_groups()
        return base(scheme) + sum(value for pair, value in extra.items() if set(pair) <= taken)

    return kl


@pytest.fixture
def measurement():
    return measurement_of([16] * 8, [{"fp8": float(score)} for score in range(1, 9)])


@pytest.fixture
def half(measurement):
    return planning.plan(measurement, SchemeSpec(name="half", coverage=0.5))


def test_without_interactions_the_plan_stays(measurement, half):
    refined = refine(measurement, half, additive(measurement), evaluations=100, marginal=4)
    assert refined.scheme == half
    assert (refined.before, refined.after, refined.swapped) == (10.0, 10.0, ())
    assert refined.evaluations == 1 + 8  # one round, whose choice is the plan's own


def test_groups_that_are_worse_together_are_parted(measurement, half):
    kl = with_pairs(measurement, {("layers.2", "layers.3"): 5.0})
    refined = refine(measurement, half, kl, evaluations=100, marginal=4)
    assert refined.before == 15.0
    assert refined.scheme.quantised_groups() == {"layers.0", "layers.1", "layers.2", "layers.4"}
    assert refined.after == kl(refined.scheme) == 11.0
    assert refined.swapped == ("layers.3", "layers.4")
    assert refined.scheme.weight_bits <= half.weight_bits


def test_what_helps_alone_and_harms_together_is_not_kept(measurement, half):
    kl = with_pairs(
        measurement,
        {
            ("layers.2", "layers.3"): 1.5,
            ("layers.2", "layers.4"): 9.0,
            ("layers.3", "layers.4"): 9.0,
            ("layers.0", "layers.4"): 0.0,
        },
    )
    refined = refine(measurement, half, kl, evaluations=100, marginal=2)
    assert refined.after <= refined.before


@pytest.mark.parametrize("seed", range(8))
def test_it_never_gets_worse_nor_spends_more(seed):
    pick = random.Random(seed)
    measurement = random_measurement(pick, 12)
    names = [group.name for group in measurement.groups]
    extra = {tuple(pick.sample(names, 2)): pick.uniform(-0.2, 0.4) for _ in range(30)}
    kl, calls = with_pairs(measurement, extra), []
    scheme = planning.plan(measurement, SchemeSpec(name="s", effective_bits=12.0))
    refined = refine(measurement, scheme, lambda s: (calls.append(s), kl(s))[1], evaluations=40, marginal=3)
    assert refined.after <= refined.before == kl(scheme)
    assert refined.after == kl(refined.scheme)
    assert refined.evaluations == len(calls) <= 40
    assert refined.scheme.weight_bits <= scheme.weight_bits
    assert refined.scheme.asked == scheme.asked


def test_a_full_scheme_has_nothing_to_swap(measurement):
    full = planning.plan(measurement, SchemeSpec(name="full", coverage=1.0))
    assert refine(measurement, full, additive(measurement), evaluations=20, marginal=4).evaluations == 1


def test_too_few_evaluations_are_refused(measurement, half):
    with pytest.raises(PlanError, match="9 evaluations don't suffice for a round with 4 groups on each side; .* 10"):
        refine(measurement, half, additive(measurement), evaluations=9, marginal=4)
