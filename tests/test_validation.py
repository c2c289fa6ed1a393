"""Rows by which schemes are chosen: none of calibration's, none that judge the schemes, and used where KL decides."""

import pytest

from bitladder import planning
from bitladder.errors import DataError, PlanError, RecipeError, RecordError
from bitladder.recipe import SchemeSpec, parse_recipe, read_recipe
from bitladder.records import Evaluation, KlPoints, KvDamage, Measurement, Refinements
from bitladder.report import Report
from bitladder.steps.data import validation_data
from bitladder.steps.glance import glance
from bitladder.steps.plan import plan
from bitladder.steps.preview import preview
from bitladder.steps.run import run
from bitladder.steps.workspace import Workspace
from conftest import make_text
from test_records import changed as written_otherwise

ROWS = {"sequence_length": 24, "batch_size": 2}
BY_KL = [{"name": "near", "max_kl": 1.0}, {"name": "half", "coverage": 0.5, "kv_cache": {"fp8": 0.5}}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("texts")


def recipe_of(llama, text_file, output, **changes):
    """Return a recipe whose three kinds of rows are of one file."""
    content = {
        "model": {"path": str(llama)},
        "calibration": {"data": {"kind": "text", "path": str(text_file)}, "samples": 6, **ROWS},
        "validation": {"samples": 4, **ROWS},
        "held_out": {"samples": 4, **ROWS},
        "schemes": BY_KL,
        "refine": {"evaluations": 4, "marginal": 1},
        "controls": {"kinds": []},
        "output": str(output),
    }
    return parse_recipe({**content, **changes}, "recipe")


@pytest.fixture(scope="module")
def finished(llama, text_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    recipe = recipe_of(llama, text_file, output)
    run(Workspace(recipe, output))
    return recipe, output


def test_no_row_is_of_two_kinds(finished):
    recipe, output = finished
    measurement = Measurement.read(output / "measurement.json")
    choosing = validation_data(Workspace(recipe, output), measurement).summary
    judging = Evaluation.read(output / "evaluations/half.json").data["held_out"]
    kinds = [set(one.sample_ids) for one in (measurement.calibration, choosing, judging)]
    assert [len(kind) for kind in kinds] == [6, 4, 4]
    assert len(set.union(*kinds)) == 14


def test_no_row_is_of_two_sets(finished, llama, text_file):
    _, output = finished
    work = Workspace(recipe_of(llama, text_file, output, validation=[{"samples": n, **ROWS} for n in (3, 5)]), output)
    measurement = work.measurement()
    found = validation_data(work, measurement).summary.sample_ids
    assert len(found) == 8
    assert len({*found, *measurement.calibration.sample_ids}) == 14


def test_what_chooses_by_kl_does_so_on_them(finished):
    recipe, output = finished
    work = Workspace(recipe, output)
    summary = validation_data(work, work.measurement()).summary
    assert summary != work.measurement().calibration
    assert Report.read(output / "report.json").chosen_on == summary.model_copy(update={"sample_ids": ()})
    assert KlPoints.read(output / "kl_points.json").data == summary
    assert Refinements.read(output / "refinements.json").data == summary
    assert len(KvDamage.read(output / "kv_damage.json").tokens) == 4


def test_a_second_run_has_nothing_to_do_and_other_rows_choose_again(finished, llama, text_file, place):
    recipe, output = finished
    work = Workspace(recipe, output)
    run(work)
    assert work.done == []
    before = (output / "measurement.json").read_bytes()
    other = place / "others.txt"
    other.write_text(make_text(300, seed=11))
    sets = [{"samples": 3, **ROWS}, {"data": {"kind": "text", "path": str(other)}, "samples": 5, **ROWS}]
    as_many = {"seed": 1, "samples": 4, **ROWS}
    for changed in (as_many, sets):
        recipe = recipe_of(llama, text_file, output, validation=changed)
        ahead = {step.step: step.why for step in preview(Workspace(recipe, output))}
        assert ahead["plan"] == "KL isn't measured so: kl_points.json, kv_damage.json, refinements.json"
        assert ahead["evaluate"] == "follows from plan"
    work = Workspace(recipe, output)
    run(work)
    assert work.done[:3] == ["measure KL of a few schemes", "measure the KV cache", "refine schemes"]
    assert (output / "measurement.json").read_bytes() == before
    assert [step.step for step in preview(Workspace(recipe, output)) if step.why is not None] == ["report"]
    found = KlPoints.read(output / "kl_points.json").data
    assert (found.kind, [part.samples for part in found.parts]) == ("mixed", [3, 5])


def test_a_scheme_that_is_chosen_by_kl_is_planned_by_what_validation_rows_say(llama, text_file, tmp_path):
    mix = {"name": "mix", "effective_bits": 10, "chosen_by": "kl"}
    formats = {"measurement": {"formats": ["fp8", "nvfp4"]}, "refine": {}, "serve_on": "cpu"}

    def work_of(**changes):
        schemes = [mix, {"name": "full", "coverage": 1.0}]
        return Workspace(recipe_of(llama, text_file, tmp_path, schemes=schemes, **formats, **changes), tmp_path)

    work = work_of()
    report = run(work)
    assert work.done[:3] == ["measure", "measure KL of a few schemes", "plan"]
    measurement, path = work.measurement(), tmp_path / "kl_points.json"
    assert KlPoints.read(path).data == validation_data(work, measurement).summary
    kl_map = planning.kl_map_of(path, measurement)
    asked = SchemeSpec(**mix)
    assert work.schemes()[0].formats == planning.plan(measurement, asked, kl_map=kl_map).formats
    assert report.schemes[0].asked == mix
    assert report.chosen_on == KlPoints.read(path).data.model_copy(update={"sample_ids": ()})
    page = (tmp_path / "report.md").read_text()
    assert "| effective bits ≤ 10; chosen by KL |" in page
    assert f"- Chosen by KL on: `{text_file}` (text), 4 samples" in page
    assert "<li>Chosen by KL on: <code>" in (tmp_path / "report.html").read_text()
    again = work_of()
    run(again)
    assert again.done == []
    others = work_of(validation={"seed": 1, "samples": 4, **ROWS})
    ahead = {step.step: step.why for step in preview(others)}
    assert ahead["plan"] == "KL isn't measured so: kl_points.json"


@pytest.mark.parametrize(
    ("scheme", "told"),
    [
        ({"effective_bits": 16}, "16.0 effective bits would quantise nothing"),
        ({"effective_bits": 4}, "4.0 effective bits is below the minimum 8.00"),
        ({"effective_bits": 12, "exclude": ["nothing"]}, "nothing"),
        ({"coverage": 0.5, "exclude": ["nothing"]}, "nothing"),
    ],
)
def test_what_no_kl_allows_is_refused_before_any_is_measured(finished, llama, text_file, scheme, told):
    _, output = finished
    schemes = [{"name": "mix", "chosen_by": "kl", **scheme}]
    others = {"seed": 7, "samples": 4, **ROWS}  # of which no KL is known
    work = Workspace(recipe_of(llama, text_file, output, refine={}, schemes=schemes, validation=others), output)
    with pytest.raises(PlanError, match=told):
        plan(work)
    assert work.done == []


def test_points_of_another_measurement_are_no_map(finished):
    _, output = finished
    other = Measurement.read(output / "measurement.json").model_copy(update={"score_weights": (0.1, 0.2)})
    with pytest.raises(PlanError, match="is of another measurement; copy both from one run, or ask by scores"):
        planning.kl_map_of(output / "kl_points.json", other)


@pytest.mark.parametrize(
    ("validation", "told"),
    [
        ({"data": {"kind": "text", "path": "missing.txt"}, **ROWS}, r"missing\.txt"),
        ({"samples": 4000, **ROWS}, "of them not used by other sets; 4000 were asked for"),
        ({"sequence_length": 100_000}, "sequence_length 100000 is more than the"),
        ({"data": {"kind": "generated"}, "sequence_length": 100_000}, "sequence_length 100000 is more than the"),
    ],
)
def test_what_can_t_be_had_is_told_before_anything_is_measured(llama, text_file, tmp_path, validation, told):
    output = tmp_path / "out"
    with pytest.raises(DataError, match=told):
        run(Workspace(recipe_of(llama, text_file, output, validation=validation), output))
    assert not (output / "measurement.json").exists()


def test_a_missing_file_is_told_before_a_library_is_loaded(llama, text_file, tmp_path):
    validation = {"data": {"kind": "text", "path": "missing.txt"}, **ROWS}
    work = Workspace(recipe_of(llama, text_file, tmp_path, validation=validation), tmp_path)
    with pytest.raises(DataError, match=r"missing\.txt"):
        glance(work, held_out=True)


def test_rows_that_the_model_writes_may_choose(llama, text_file, tmp_path):
    output = tmp_path / "out"
    validation = {"data": {"kind": "generated"}, "samples": 4, **ROWS}
    recipe = recipe_of(llama, text_file, output, validation=validation, refine={}, schemes=BY_KL[:1])
    assert preview(Workspace(recipe, output))[0].why == "nothing is measured yet"
    run(Workspace(recipe, output))
    others = recipe_of(llama, text_file, output, validation={**validation, "seed": 1}, refine={}, schemes=BY_KL[:1])
    assert preview(Workspace(others, output))[1].why == "the model has to write the rows of kind generated"
    assert KlPoints.read(output / "kl_points.json").data.kind == "generated"
    assert all(step.why is None for step in preview(Workspace(recipe, output))[:-1])


@pytest.mark.parametrize(
    ("calibration", "told"),
    [
        ([{"data": {"kind": "text", "path": "a.txt"}}, {"data": {"kind": "text", "path": "b.txt"}}], "has 2 sets"),
        ({"data": {"kind": "generated"}}, "nothing is left over"),
    ],
)
def test_rows_that_calibration_leaves_need_one_set_that_leaves_some(llama, text_file, tmp_path, calibration, told):
    held_out = {"data": {"kind": "text", "path": str(text_file)}}
    with pytest.raises(RecipeError, match=rf"validation needs `data` of its own.*{told}"):
        recipe_of(llama, text_file, tmp_path, calibration=calibration, held_out=held_out)
    two = [{"data": {"kind": "text", "path": str(text_file)}}, {}]
    with pytest.raises(RecipeError, match=r"validation\.1 needs `data` of its own"):
        recipe_of(llama, text_file, tmp_path, calibration=calibration, held_out=held_out, validation=two)


@pytest.mark.parametrize("clash", ["validation", "held_out"])
def test_rows_that_the_model_writes_twice_are_refused_before_any_is_written(llama, text_file, tmp_path, clash):
    """Its rows are those of a seed, so that a second set of that seed would have no other ones."""
    generated = {"data": {"kind": "generated"}, "samples": 4, **ROWS}
    text = {"data": {"kind": "text", "path": str(text_file)}, "samples": 4, **ROWS}
    sets = {"calibration": [text, generated], "validation": text, "held_out": text}
    with pytest.raises(RecipeError, match=rf"{clash} would have the rows .* for calibration\.1; give it another `seed"):
        recipe_of(llama, text_file, tmp_path, **{**sets, clash: generated})
    hotter = {"data": {"kind": "generated", "temperature": 2.0}, **ROWS}
    for other in (hotter, {**generated, "seed": 1}, {**generated, "sequence_length": 12}):
        recipe_of(llama, text_file, tmp_path, **{**sets, clash: other})
    both = [{**generated, "seed": 1, "name": name} for name in ("a", "b")]  # held-out sets may have the same rows
    recipe_of(llama, text_file, tmp_path, **{**sets, "held_out": both})


def test_what_chooses_nothing_is_told(llama, text_file, tmp_path):
    """And where nothing could be refined there is no record to look for."""
    told = []
    chosen = {"schemes": [{"name": "all", "coverage": 1.0}]}
    recipe = recipe_of(llama, text_file, tmp_path, refine={}, **chosen)
    run(Workspace(recipe, tmp_path, tell=told.append))
    assert [
        line for line in told if line.startswith("validation: nothing is chosen by KL here (max_kl, chosen_by: kl, ")
    ]
    told.clear()
    recipe = recipe_of(llama, text_file, tmp_path, **chosen)
    run(Workspace(recipe, tmp_path, tell=told.append))
    assert not [line for line in told if line.startswith("validation")]
    assert [step.step for step in preview(Workspace(recipe, tmp_path)) if step.why is not None] == ["report"]


def test_records_of_before_are_made_again(llama, text_file, tmp_path):
    """`kl_points.json` without weights by format, which nothing can be fitted on now."""
    recipe = recipe_of(llama, text_file, tmp_path, refine={}, schemes=BY_KL[:1])
    run(Workspace(recipe, tmp_path))
    path = tmp_path / "kl_points.json"
    whole = KlPoints.read(path)
    written_otherwise(whole, path, points=[point.model_dump(exclude={"weights"}) for point in whole.points])
    with pytest.raises(RecordError, match=r"points\.0\.weights: Field required; run `bitladder run RECIPE` again"):
        planning.kl_map_of(path, Measurement.read(tmp_path / "measurement.json"))
    told = []
    assert preview(Workspace(recipe, tmp_path, tell=told.append))[1].why == "KL isn't measured so: kl_points.json"
    assert told == [f"made again: {path} is not a KlPoints: points.0.weights: Field required"]
    run(Workspace(recipe, tmp_path))
    assert KlPoints.read(path).fingerprint() == whole.fingerprint()


def test_a_dry_run_writes_no_rows_of_the_model(llama, text_file, tmp_path):
    """Where validation chooses nothing, its rows are still kept out of those that judge."""
    half = {"schemes": [{"name": "half", "coverage": 0.5}], "refine": {}}
    run(Workspace(recipe_of(llama, text_file, tmp_path, validation=[], **half), tmp_path))
    validation = {"data": {"kind": "generated"}, "samples": 4, **ROWS}
    work = Workspace(recipe_of(llama, text_file, tmp_path, validation=validation, **half), tmp_path)
    ahead = {step.step: step.why for step in preview(work)}
    assert (ahead["plan"], ahead["evaluate"]) == (None, "the model has to write the rows of kind generated")
    assert not (tmp_path / "generated").exists()


def test_its_paths_are_relative_to_the_recipe(llama, text_file, tmp_path):
    text = "{data: {kind: text, path: novel.txt}}"
    content = f"model: {{path: {llama}}}\ncalibration: {text}\nschemes: [{{name: a, coverage: 1}}]\noutput: out\n"
    (tmp_path / "r.yaml").write_text(f"{content}validation: [{text}, {{samples: 2}}]\n")
    named, left_over = read_recipe(tmp_path / "r.yaml").validation
    assert named.data.path == str(tmp_path / "novel.txt")
    assert left_over.data is None
