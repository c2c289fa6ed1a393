"""Control arms have their scheme's bits and nothing of its knowledge; a simulation equals the exported checkpoint."""

import pytest
import torch
import transformers

from bitladder import planning
from bitladder.checkpoints.export import export
from bitladder.errors import PlanError, StaleRecord
from bitladder.evaluation.evaluate import evaluate_checkpoint
from bitladder.evaluation.reference import Reference
from bitladder.evaluation.simulation import Simulation
from bitladder.measured import read_amax
from bitladder.models.loading import load_model
from bitladder.planning import controls
from bitladder.recipe import CONTROL_KINDS
from bitladder.records import BF16, Control
from conftest import llama_config, load_text, measure_text, save_model, spec


@pytest.fixture(scope="module")
def deep(tmp_path_factory, text_file):
    """(model directory, measurement, its directory) of a Llama of eight layers."""
    directory = tmp_path_factory.mktemp("deep")
    save_model(transformers.LlamaForCausalLM, llama_config(num_hidden_layers=8), directory)
    output = tmp_path_factory.mktemp("deep_measured")
    return directory, measure_text(directory, text_file, output, engine="modelopt", method="gradient"), output


def arms_of(deep, coverage=0.5, kinds=CONTROL_KINDS, seeds=3):
    measurement = deep[1]
    scheme = planning.plan(measurement, spec("half", coverage=coverage))
    return scheme, controls.arms(measurement, scheme, kinds=kinds, seeds=seeds)


def test_every_arm_has_its_schemes_bits(deep):
    largest = max(group.weight_elements for group in deep[1].groups)
    for coverage in (0.25, 0.5, 0.9):
        scheme, arms = arms_of(deep, coverage)
        assert [arm.asked.control for arm in arms] == [
            "random",
            "random",
            "random",
            "inverse",
            "first_last",
            "largest",
            "lowest_score",
        ]
        for arm in arms:
            assert scheme.weight_bits <= arm.weight_bits < scheme.weight_bits + 8 * largest
            assert arm.asked.beside == "half"
            assert arm.measurement_sha256 == scheme.measurement_sha256
        assert len({arm.name for arm in arms}) == len({tuple(arm.formats.items()) for arm in arms}) == len(arms)


def test_inverse_is_predicted_to_be_the_worst(deep):
    scheme, arms = arms_of(deep)
    by_kind = {arm.asked.control: arm.predicted_score for arm in arms}
    assert scheme.predicted_score < min(by_kind.values())
    assert max(by_kind, key=by_kind.get) == "inverse"


def test_first_and_last_layers_stay(deep):
    _, arms = arms_of(deep, kinds=("first_last",))
    formats = arms[0].formats
    for layer in (0, 7):
        assert {f for group, f in formats.items() if f".{layer}." in group} == {BF16}
    for layer in (3, 4):
        assert {f for group, f in formats.items() if f".{layer}." in group} == {"fp8"}


def test_largest_needs_the_fewest_groups(deep):
    _, arms = arms_of(deep)
    counts = {arm.name: len(arm.quantised_groups()) for arm in arms}
    assert min(counts, key=counts.get) == "half.largest"


def test_lowest_score_goes_by_damage_and_not_by_what_it_saves(deep):
    scheme, arms = arms_of(deep, kinds=("lowest_score",))
    table = deep[1].by_group()
    score = {group: deep[1].sensitivity(table[group]["fp8"]) for group in scheme.formats}
    assert max(score[group] for group in arms[0].quantised_groups()) < max(
        score[group] for group in scheme.quantised_groups()
    )


def test_modelopts_choice_keeps_the_bits_and_counts_every_batch_alike(deep):
    measurement = deep[1]
    scheme, arms = arms_of(deep, kinds=("modelopt",))
    assert arms == ()  # every batch has as many tokens: its choice is the scheme's own
    assert controls.modelopt_agrees(measurement, scheme)
    weights = (0.1,) * (len(measurement.score_weights) - 1) + (2.0,)
    reordered = [*measurement.candidates[1:], measurement.candidates[0]]  # each group with another one's last score
    candidates = tuple(
        one.model_copy(update={"scores": (*one.scores[:-1], other.scores[-1])})
        for one, other in zip(measurement.candidates, reordered, strict=True)
    )
    uneven = measurement.model_copy(update={"score_weights": weights, "candidates": candidates})
    even = uneven.model_copy(update={"score_weights": measurement.score_weights})
    other = planning.plan(uneven, spec("half", coverage=0.5))
    scheme = planning.plan(even, spec("half", coverage=0.5))
    assert other.quantised_groups() != scheme.quantised_groups()
    (arm,) = controls.arms(uneven, other, kinds=("modelopt",), seeds=1)
    assert not controls.modelopt_agrees(uneven, other)
    everything = planning.plan(uneven, spec("everything", coverage=1.0))
    assert not controls.modelopt_agrees(uneven, everything)  # there is no choice to agree on
    assert arm.quantised_groups() == scheme.quantised_groups()
    assert arm.weight_bits <= other.weight_bits
    assert arm.measurement_sha256 == other.measurement_sha256


def test_seeds_decide(deep):
    first, second = arms_of(deep, kinds=("random",))[1], arms_of(deep, kinds=("random",))[1]
    assert first == second
    assert [arm.asked.seed for arm in first] == [0, 1, 2]
    assert arms_of(deep, kinds=("inverse",))[1][0].asked == Control(control="inverse", beside="half")


def test_a_full_scheme_has_no_other_choice(deep):
    assert arms_of(deep, coverage=1.0)[1] == ()


def test_an_unknown_control_is_refused(deep):
    with pytest.raises(PlanError, match="control 'best' is unknown; known: random, inverse"):
        arms_of(deep, kinds=("best",))


@pytest.mark.parametrize("kv_cache", [None, "fp8"])
def test_a_simulated_scheme_equals_the_exported_checkpoint(deep, text_file, tmp_path, kv_cache):
    directory, measurement, output = deep
    amax = read_amax(measurement, output)
    data = load_text(directory, text_file, samples=4, avoid=measurement.calibration)
    simulation = Simulation(directory, measurement, amax)
    before = {name: module for name, module in simulation.model.named_modules()}
    with Reference.compute(directory, data) as reference:
        for name, target in (("some", {"coverage": 0.4}), ("all", {"coverage": 1.0})):
            scheme = planning.plan(measurement, spec(name, kv_cache=kv_cache, **target))
            export(scheme, measurement, amax, directory, tmp_path / name)
            exported = evaluate_checkpoint([reference], tmp_path / name)
            assert simulation.results([reference], scheme) == exported.results
        assert exported.results[0].value > 0
    assert {name: module for name, module in simulation.model.named_modules()} == before
    assert torch.equal(simulation.model.lm_head.weight, load_model(directory, torch.float32).lm_head.weight)


def test_a_scheme_of_another_measurement_is_refused(deep, measured):
    directory, measurement, output = deep
    simulation = Simulation(directory, measurement, read_amax(measurement, output))
    with pytest.raises(StaleRecord, match="another measurement"):
        simulation.results([], planning.plan(measured[0], spec("half", coverage=0.5)))
