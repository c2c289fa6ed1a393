"""Runs over what is there already: what is said, what is kept, what is made again and what a kill costs."""

import json
import shutil

import pytest

from bitladder.errors import OutputError, PlanError, RecipeError, RecordError
from bitladder.evaluation import simulation
from bitladder.measuring import measure as measuring
from bitladder.measuring.measure import settings_sha256
from bitladder.recipe import MeasureSpec
from bitladder.records import Evaluation, Evidence, Measurement, RunState, Verification, digest_of
from bitladder.steps.measure import measure, take_over
from bitladder.steps.run import run
from bitladder.steps.workspace import KL_POINTS_FILE, LOCK_FILE, REFINEMENTS_FILE, SIMULATED_FILE, Workspace
from conftest import load_text, source_of
from test_pipeline import bytes_of, copied, files, finished, recipe_of  # noqa: F401  # its fixtures

KL_SCHEMES = [{"name": "near", "max_kl": 1e-3}]


def told_by(files, output, **changes):  # noqa: F811
    """Run once more, and return what the user is told."""
    lines = []
    work = Workspace(recipe_of(files, output, **changes), output, tell=lines.append)
    run(work)
    return lines, work


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"calibration": {"samples": 5}}, "measuring again: calibration.samples 6 → 5"),
        ({"measurement": {"method": "gradient"}}, "measuring again: measurement.method fisher → gradient"),
    ],
    ids=["samples", "method"],
)
def test_what_changed_is_said_and_the_old_results_stay_until_then(files, copied, changes, said):  # noqa: F811
    changes = {
        name: recipe_of(files, copied).model_dump(mode="json")[name] | value
        if name == "measurement"
        else {"data": {"kind": "text", "path": str(files[1])}, "sequence_length": 24, "batch_size": 2} | value
        for name, value in changes.items()
    }
    before, seen = bytes_of(copied), []

    def progress(phase, done, total):
        if phase == "score":
            seen.append(bytes_of(copied) == before)

    lines = []
    work = Workspace(recipe_of(files, copied, **changes), copied, progress, lines.append)
    run(work)
    assert lines == [said]
    assert seen
    assert all(seen)
    assert "measure" in work.done
    assert told_by(files, copied, **changes)[0] == []


def test_the_order_of_the_formats_decides_nothing(files, tmp_path):  # noqa: F811
    usual, turned = ("fp8", "fp8_pc_pt", "nvfp4"), ("nvfp4", "fp8_pc_pt", "fp8")
    lines, records = [], []

    def measured(output, formats, **changes):
        changes = {"measurement": {"formats": list(formats), **changes}}
        work = Workspace(recipe_of(files, output, **changes), output, tell=lines.append)
        records.append(measure(work))
        return work

    assert measured(tmp_path / "a", usual).done == ["measure"]
    assert measured(tmp_path / "a", turned).done == []
    assert lines == []
    assert measured(tmp_path / "b", turned).done == ["measure"]
    assert [one.formats for one in records] == [usual] * 3
    assert len({one.fingerprint() for one in records}) == 1
    assert measured(tmp_path / "b", usual, method="gradient").done == ["measure"]
    assert lines == ["measuring again: measurement.method fisher → gradient"]


def test_a_measurement_of_formats_in_their_usual_order_has_the_key_that_it_always_had(llama, text_file):
    data, spec = load_text(llama, text_file), MeasureSpec(formats=("fp8", "nvfp4"))
    written = spec.model_copy(update={"damping": 0.1}).model_dump_json(exclude={"memory_gb"})  # which was its default
    known = digest_of([source_of(llama).sha256, data.summary.sha256, written])
    assert settings_sha256(source_of(llama), data, spec) == known
    other = MeasureSpec(formats=("fp8", "nvfp4_w4a16"))
    assert settings_sha256(source_of(llama), data, other) != known


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_how_codes_are_made_is_part_of_the_key_of_compensated_ones(llama, text_file, monkeypatch, rounding):
    data, spec = load_text(llama, text_file), MeasureSpec(rounding=rounding)
    known = settings_sha256(source_of(llama), data, spec)
    monkeypatch.setattr(measuring, "_CODES", "in another way")
    assert (settings_sha256(source_of(llama), data, spec) == known) == (rounding == "nearest")


def test_samples_that_changed_in_their_file_are_said(files, copied, tmp_path):  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text(files[1].read_text()[::-1])
    lines, _ = told_by((files[0], text, files[2]), copied)
    assert len(lines) == 1
    assert lines[0].startswith("measuring again: calibration.data.path ")


def test_a_missing_amax_file_is_said(files, copied):  # noqa: F811
    before = bytes_of(copied)
    (copied / "measurement.safetensors").unlink()
    lines, _ = told_by(files, copied)
    assert lines == ["measuring again: measurement.safetensors is missing or damaged"]
    assert bytes_of(copied) == before


def test_orphans_are_listed_and_kept(files, copied):  # noqa: F811
    lines, _ = told_by(files, copied, schemes=[{"name": "full", "coverage": 1.0}])
    assert lines == [
        "of schemes that the recipe doesn't have any more, to be removed by you: "
        "schemes/top50.json, checkpoints/top50, evaluations/top50.json"
    ]
    assert (copied / "checkpoints/top50/model.safetensors").exists()
    for name in ("schemes/top50.json", "evaluations/top50.json"):
        (copied / name).unlink()
    shutil.rmtree(copied / "checkpoints/top50")
    assert told_by(files, copied, schemes=[{"name": "full", "coverage": 1.0}])[0] == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("run.json", RunState),
        ("verification.json", Verification),
        ("evaluations/full.json", Evaluation),
        ("evidence.json", Evidence),
    ],
)
@pytest.mark.parametrize("how", ["edited", "cut"])
def test_damaged_records_are_made_again_by_name(name, kind, how, files, copied):  # noqa: F811
    path, before = copied / name, bytes_of(copied)
    whole = kind.read(path)
    text = path.read_text(encoding="utf-8")
    if how == "edited":
        digit = next(index for index, sign in enumerate(text) if sign in "1234567" and index > 40)
        path.write_text(text[:digit] + str(int(text[digit]) + 1) + text[digit + 1 :], encoding="utf-8")
    else:
        path.write_text(text[: len(text) // 2], encoding="utf-8")
    lines, _ = told_by(files, copied)
    assert len(lines) == 1
    assert lines[0].startswith(f"made again: {path}")
    if kind is not RunState:
        assert kind.read(path).fingerprint() == whole.fingerprint()
    assert bytes_of(copied) == before


def test_an_edited_measurement_is_refused_and_the_remedy_works(files, copied):  # noqa: F811
    path, before = copied / "measurement.json", bytes_of(copied)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["candidates"][0]["scores"][0] *= 300
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=r"measurement\.json was changed since it was written.*delete it"):
        told_by(files, copied)
    path.unlink()
    told_by(files, copied)
    assert bytes_of(copied) == before


def test_a_run_without_its_run_json_is_known_by_its_measurement(files, copied, tmp_path):  # noqa: F811
    (copied / "run.json").unlink()
    _, work = told_by(files, copied)
    assert "measure" not in work.done
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "measurement.json").write_text("{}")
    with pytest.raises(OutputError, match="didn't write"):
        Workspace(recipe_of(files, tmp_path), tmp_path / "foreign")
    assert Measurement.read(copied / "measurement.json")


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_killed_run_simulates_no_scheme_twice(after, files, copied, tmp_path, monkeypatch):  # noqa: F811
    whole = tmp_path / "whole"
    shutil.copytree(copied, whole)
    settings = {"schemes": KL_SCHEMES, "refine": {"evaluations": 6, "marginal": 1}, "controls": {"seeds": 1}}
    simulated, real = [], simulation.Simulation.results

    def results(self, references, scheme):
        if len(simulated) == limit:
            raise Killed
        found = real(self, references, scheme)
        simulated.append(scheme.name)
        return found

    monkeypatch.setattr(simulation.Simulation, "results", results)
    limit = None
    told_by(files, whole, **settings)
    needed = len(simulated)
    simulated, limit = [], after
    with pytest.raises(Killed):
        told_by(files, copied, **settings)
    limit = needed - 2  # in the control arms
    with pytest.raises(Killed):
        told_by(files, copied, **settings)
    limit = None
    told_by(files, copied, **settings)
    assert len(simulated) == needed
    assert (copied / "schemes/near.json").read_bytes() == (whole / "schemes/near.json").read_bytes()
    assert not (copied / "simulated.json").exists()
    assert Evidence.read(copied / "evidence.json").fingerprint() == Evidence.read(whole / "evidence.json").fingerprint()
    simulated = []
    told_by(files, copied, **settings)
    assert simulated == []


def test_too_few_evaluations_for_refining_are_refused_with_the_recipe(files, tmp_path):  # noqa: F811
    with pytest.raises(RecipeError, match="give at least 14"):
        recipe_of(files, tmp_path, refine={"evaluations": 13})
    assert recipe_of(files, tmp_path, refine={"evaluations": 14}).refine.evaluations == 14


def test_what_cannot_be_exported_is_refused_before_it_is_measured(files, tmp_path):  # noqa: F811
    recipe = recipe_of(files, tmp_path, measurement={"share_fused_scales": False})
    with pytest.raises(
        RecipeError, match=r"false is for comparison only, .*: run `bitladder measure`, or leave it out"
    ):
        run(Workspace(recipe, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert not measure(Workspace(recipe, tmp_path / "out")).fused_scales_shared  # as it says


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ({"include": ["*"]}, "names no format for what it includes; set `format` to one of these: fp8, fp8_pc_pt"),
        ({"effective_bits": 9, "format": "fp8"}, "`format` goes with coverage or include"),
        ({"coverage": 0.5, "exclude": ["*"]}, r"exclude \['\*'\] leaves no group; exclude less"),
        ({"include": ["*.0.*"], "exclude": ["*"], "format": "fp8"}, "leaves no group; exclude less"),
        ({"include": ["*.0.*"], "exclude": ["*.0.*"], "format": "fp8"}, "leaves no group; include more"),
    ],
)
def test_schemes_that_no_measurement_gives_are_refused_before_it_is_made(scheme, words, files, tmp_path):  # noqa: F811
    formats = {"formats": ["fp8", "fp8_pc_pt"]}
    recipe = recipe_of(files, tmp_path, measurement=formats, schemes=[{"name": "x", **scheme}])
    with pytest.raises(PlanError, match=words):
        run(Workspace(recipe, tmp_path / "out"))
    assert not (tmp_path / "out" / "measurement.json").exists()


@pytest.mark.parametrize("how", ["exchanged", "a copy", "another record", "another's file"])
def test_only_what_lies_where_it_belongs_is_a_probe(how, files, copied):  # noqa: F811
    probes = copied / "probes"
    first, second = sorted(probes.glob("full--*.json"))[0], sorted(probes.glob("top50--*.json"))[0]
    before = {path.name: path.read_bytes() for path in probes.iterdir()}
    report = (copied / "report.json").read_bytes()
    stray = probes / "zz.json"
    if how == "exchanged":
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    elif how == "another's file":
        stray.write_text("{}")
    else:
        shutil.copy(first if how == "a copy" else copied / "verification.json", stray)
    told, _ = told_by(files, copied)
    assert not any("zz.json" in line for line in told)  # nothing makes it again
    found = {path.name: path.read_bytes() for path in probes.iterdir() if path != stray}
    assert {name: json.loads(content)["findings"] for name, content in found.items()} == {
        name: json.loads(content)["findings"] for name, content in before.items()
    }
    assert [json.loads(content)["scheme"] for content in found.values()] == [
        json.loads(content)["scheme"] for content in before.values()
    ]
    assert json.loads((copied / "report.json").read_bytes())["probes"] == json.loads(report)["probes"]
    assert stray.exists() == (how != "exchanged")


def test_control_arms_of_other_settings_are_no_answer(files, copied):  # noqa: F811
    short = {"kinds": ["random"], "seeds": 1, "max_seconds": 1e-9}
    told_by(files, copied, controls=short)
    before = Evidence.read(copied / "evidence.json")
    assert (len(before.arms), len(before.left_out)) == (0, 1)
    told_by(files, copied, controls={**short, "max_seconds": 600})
    after = Evidence.read(copied / "evidence.json")
    assert (len(after.arms), len(after.left_out)) == (1, 0)


def test_no_layout_may_lie_over_what_a_run_keeps(files, finished, tmp_path):  # noqa: F811
    kept = {path.name for path in finished.iterdir() if not path.name.startswith(".")} - {"checkpoints"}
    kept |= {SIMULATED_FILE, KL_POINTS_FILE, REFINEMENTS_FILE, LOCK_FILE}
    for name in sorted(kept):
        with pytest.raises(RecipeError, match="keeps its own"):
            recipe_of(files, tmp_path, layout={"checkpoints": f"{name}/{{scheme}}"})


def test_what_another_run_measured_is_not_taken_for_this_recipe(files, finished, copied):  # noqa: F811
    assert RunState.read(copied / "run.json").measured_with
    (copied / "measurement.json").unlink()
    work = Workspace(recipe_of(files, copied), copied)
    take_over(work, finished / "measurement.json")
    assert RunState.read(copied / "run.json").measured_with == {}
