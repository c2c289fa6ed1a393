"""A fixed sample of the trials in `faults`; all of them: `make test-faults`.

A series that waits for a change elsewhere is expected to fail (strictly), with the reason.
"""

import dataclasses
import itertools
from pathlib import Path

import pytest

from faults import checkpoints, growth, interrupted, models, recipes, records, together, tree
from faults.hook import KILL, Fault
from faults.server import Outcome, Server
from faults.verdict import LEFTOVER, TOUCHED, WRONG, Failed, Trial
from faults.world import World

SEED = 20261127


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.make(tmp_path_factory.mktemp("faults") / "world")


@pytest.fixture(scope="module")
def server(world):
    with Server(world.environment) as server:
        yield server


def all_hold(results):
    failed = [f"{r.name}: {r.verdict}: {r.detail}" for r in results if not r.held]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(("name", "every"), [("fresh", 40), ("changed", 60), ("compensated", 60)])
def test_a_killed_run_goes_on_to_the_same_results(server, world, name, every):
    all_hold(interrupted.kills(server, world, every, [name]))


def test_a_run_killed_between_the_measurement_and_its_note_loses_neither(server, world):
    scenario = interrupted.Scenario(server, world, "fresh")
    _, operations = scenario.undisturbed
    renames = [(number, Path(o.path).name) for number, o in enumerate(operations) if o.event == "os.rename"]
    written = next(number for number, name in renames if name == "measurement.json")
    noted = next(number for number, name in renames if name == "run.json" and number > written)
    all_hold([interrupted.kill(scenario, noted)])


def test_a_failing_disk_is_told_in_a_line_and_loses_nothing(server, world):
    all_hold(interrupted.failures(server, world, 25))


def test_a_run_that_lacks_addresses_leaves_nothing_to_a_later_one(server, world):
    scenario = interrupted.Scenario(server, world, "fresh")
    all_hold([interrupted.few_addresses(scenario, mib << 20) for mib in (40, 400)])


def test_damaged_recipes(server, world):
    all_hold(recipes.mutants(server, world, SEED, 24))


def test_damaged_models(server, world):
    all_hold(models.mutants(server, world, SEED, 16))


def test_damaged_records(server, world):
    all_hold(records.mutants(server, world, SEED, 8))


def test_damaged_checkpoints(server, world):
    all_hold(checkpoints.mutants(server, world, SEED, 8))


def test_exporters_that_err(server, world):
    all_hold(checkpoints.exporters(server, world, SEED, 8))


def test_two_at_once(server, world):
    all_hold(together.pairs(server, world, (0.1,)))


def test_files_opened_grow_with_the_layers_and_not_faster(server, world):
    all_hold(growth.steps(server, world, 6, timed=False))


# The harness itself: each verdict is given where it should be.


def run_of(world, server, change):
    """Return the trial of a run after which `change` is done to the world, as if the run had done it."""
    world.clear()
    trial = Trial(server, world)
    world.out.mkdir()
    change()
    return trial


@pytest.mark.parametrize("victim", ["notes.txt", "private/key", "home/new"])
def test_a_touched_sentinel_is_seen(server, world, victim):
    path = world.around / victim
    before = path.read_bytes() if path.exists() else None
    trial = run_of(world, server, lambda: path.write_bytes(before or b"new"))  # the same content, another time
    try:
        with pytest.raises(Failed) as caught:
            trial.run("--version")
        assert caught.value.args[0] == TOUCHED
    finally:
        if before is None:
            path.unlink()


def test_a_write_outside_is_seen_though_it_leaves_no_trace(server, world):
    world.clear()
    allowed = (str(world.out / "nowhere"),)
    recipe = world.write(world.recipe())
    with pytest.raises(Failed) as caught:
        Trial(server, world).run("measure", recipe, allowed=allowed)
    assert caught.value.args[0] == TOUCHED


def test_other_results_and_leftovers_are_seen(server, world):
    trial = run_of(world, server, lambda: (world.out / "run.json").write_text('{"a": 1, "phases": 2}'))
    same = tree.result_tree(world.out)
    (world.out / "run.json").write_text('{"a": 1, "phases": 3}')
    trial.same_results(same)
    trial.no_leftovers()
    (world.out / "run.json").write_text('{"a": 2, "phases": 3}')
    with pytest.raises(Failed) as caught:
        trial.same_results(same)
    assert caught.value.args[0] == WRONG
    (world.out / ".bitladder-tmp-x").mkdir()
    with pytest.raises(Failed) as caught:
        trial.no_leftovers()
    assert caught.value.args[0] == LEFTOVER


@pytest.mark.parametrize(
    ("status", "output", "verdict"),
    [
        (1, "unexpected ValueError: x", "exit 1"),
        (2, "nothing", "not one clear line"),
        (2, "error: a\nerror: b", "not one clear line"),
        (2, "Traceback (most recent call last):\nerror: a", "traceback"),
    ],
)
def test_only_one_line_with_status_two_is_a_refusal(server, world, status, output, verdict):
    trial = run_of(world, server, lambda: None)
    outcome = Outcome(status, output, 0.0, False, False, ())
    with pytest.raises(Failed) as caught:
        trial.refused(outcome)
    assert caught.value.args[0] == verdict
    assert trial.refused(dataclasses.replace(outcome, status=2, output="progress\nerror: what to do"))
    assert not trial.refused(dataclasses.replace(outcome, status=0, output="done"))


def test_a_run_is_killed_at_the_operation_asked_for(server, world):
    scenario = interrupted.Scenario(server, world, "fresh")
    _, operations = scenario.undisturbed
    at = next(
        n for n, o in enumerate(operations) if (o.event, o.path) == ("os.rename", f"{world.out}/measurement.json")
    )
    recipe = scenario.prepare()
    outcome = Trial(server, world).run("run", recipe, fault=Fault(KILL, at))
    assert (outcome.status, outcome.struck) == (-9, True)
    assert not (world.out / "measurement.json").exists()
    assert (world.out / "measuring").is_dir()


def test_what_takes_too_long_is_ended(server, world):
    world.clear()
    outcome = server.run(world.job(["run", world.write(world.recipe())], seconds=0.1))[0]
    assert outcome.late


def test_the_second_reader_finds_a_wrong_checkpoint(server, world):
    from faults.reading import join, split, tensors, wrong_in_checkpoint

    scenario = interrupted.Scenario(server, world, "fresh")
    scenario.prepare()
    assert scenario.undisturbed
    checkpoint = world.out / "checkpoints" / "half"
    assert wrong_in_checkpoint(world.model, checkpoint) is None
    weights = checkpoint / "model.safetensors"
    header, data = split(weights)
    by_kind = {tensor.dtype: name for name, tensor in tensors(weights).items()}
    for name in (by_kind["F8_E4M3"], by_kind["BF16"]):
        changed = bytearray(data)
        changed[header[name]["data_offsets"][0]] ^= 0x40
        join(weights, header, changed)
        assert name in wrong_in_checkpoint(world.model, checkpoint)


def test_mutants_are_the_same_for_a_seed_and_others_for_another(world):
    import random

    def names(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [make(rng, world).name for make in itertools.chain(models._MAKERS, recipes._MAKERS)]

    assert names(1) == names(1) != names(2)


def test_the_page_has_the_figures_that_were_measured():
    from faults import figures

    if not figures.RESULTS.exists():
        pytest.skip("no figures yet: make test-faults")
    import json

    assert figures.table(json.loads(figures.RESULTS.read_text())) in Path(figures.PAGE).read_text()
