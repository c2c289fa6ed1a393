"""A whole run: what is done is skipped, what depends on a change is redone, a killed run ends with the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import bitladder
import warm
from bitladder import planning
from bitladder.data import samples
from bitladder.errors import (
    BitladderError,
    DataError,
    DuplicateSchemes,
    InfeasibleTarget,
    OutputError,
    RecordError,
    StaleRecord,
    VerificationFailed,
)
from bitladder.planning import controls
from bitladder.planning.pricing import parts_by_format
from bitladder.recipe import CONTROL_KINDS as KINDS
from bitladder.recipe import SchemeSpec, parse_recipe
from bitladder.records import (
    CheckpointManifest,
    Evaluation,
    Evidence,
    KlPoints,
    Measurement,
    Refinements,
    Scheme,
    Verification,
)
from bitladder.steps import data, workspace
from bitladder.steps.evaluate import evaluate
from bitladder.steps.export import export
from bitladder.steps.look import look
from bitladder.steps.plan import plan
from bitladder.steps.report import make_report
from bitladder.steps.run import run
from bitladder.steps.verify import verify
from bitladder.steps.workspace import Workspace
from bitladder.storage import TEMPORARY_PREFIX
from conftest import make_text


@pytest.fixture(scope="module")
def files(llama, text_file, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "held_out.txt"
    other.write_text(make_text(300, seed=9))
    return llama, text_file, other


def recipe_of(files, output, **changes):
    model, text, other = files
    content = {
        "model": {"path": str(model)},
        "calibration": {
            "data": {"kind": "text", "path": str(text)},
            "samples": 6,
            "sequence_length": 24,
            "batch_size": 2,
        },
        "held_out": {
            "data": {"kind": "text", "path": str(other)},
            "samples": 4,
            "sequence_length": 24,
            "batch_size": 2,
        },
        "schemes": [{"name": "top50", "coverage": 0.5}, {"name": "full", "coverage": 1.0}],
        "output": str(output),
    }
    return parse_recipe({**content, **changes}, "recipe")


def work_of(files, output, progress=lambda *_: None, **changes):
    recipe = recipe_of(files, output, **changes)
    return Workspace(recipe, output, progress)


def bytes_of(directory):
    """Content of every file of a run that must not depend on when or how often it was started."""
    found = {}
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory).as_posix()
        if path.is_file() and relative.startswith(("checkpoints/", "schemes/", "measurement.safetensors")):
            found[relative] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    work = work_of(files, output)
    run(work)
    assert work.done == ["measure", "plan", "export", "verify", "preflight", "evaluate", "controls"]
    return output


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, with the same modification times."""
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    return output


def test_everything_is_written(finished):
    assert sorted(path.name for path in finished.iterdir() if not path.name.startswith(".")) == [
        "checkpoints",
        "evaluations",
        "evidence.json",
        "measurement.json",
        "measurement.safetensors",
        "probes",
        "report.html",
        "report.json",
        "report.md",
        "run.json",
        "schemes",
        "verification.json",
    ]
    measurement = json.loads((finished / "run.json").read_text())["recipe"]["measurement"]
    assert (measurement["engine"], measurement["method"]) == ("native", "fisher")
    report = (finished / "report.md").read_text()
    for word in ("top50", "full", "held-out KL", "verified"):
        assert word in report
    for name in ("top50", "full"):  # the model card comes after the checks, which let it be
        card = (finished / "checkpoints" / name / CheckpointManifest.CARD_NAME).read_text()
        assert f", {name}\n" in card
        assert "checked: they match" in card


def test_a_second_run_does_nothing(files, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    work = work_of(files, finished)
    run(work)
    assert work.done == []
    changed = {p.name for p in finished.rglob("*") if p.is_file() and before.get(p) != p.stat().st_mtime_ns}
    assert changed <= {".lock", "report.html", "report.md", "report.json", "README.md"}


def test_refined_schemes_are_kept_and_not_refined_again(files, copied):
    planned = {scheme.name: scheme for scheme in plan(work_of(files, copied))}
    refine = {"evaluations": 12, "marginal": 2}
    work = work_of(files, copied, refine=refine)
    schemes = {scheme.name: scheme for scheme in plan(work)}
    assert "refine schemes" in work.done
    found = {r.scheme: r for r in Refinements.read(copied / "refinements.json").refinements}
    assert set(found) == {"top50"}  # the other one leaves no choice
    changes = found["top50"].changes
    assert schemes["top50"].formats == {**planned["top50"].formats, **changes}
    assert schemes["top50"].weight_bits <= planned["top50"].weight_bits
    assert found["top50"].kl_refined <= found["top50"].kl_planned
    assert (found["top50"].kl_refined < found["top50"].kl_planned) == bool(changes)
    assert 5 <= found["top50"].evaluations <= 12
    assert schemes["full"].formats == planned["full"].formats
    again = work_of(files, copied, refine=refine)
    assert plan(again) == tuple(schemes.values())
    assert again.done == []


def test_another_scheme_redoes_only_what_depends_on_it(files, copied):
    schemes = [
        {"name": "top50", "coverage": 0.5},
        {"name": "bits11", "effective_bits": 11.0},
        {"name": "full", "coverage": 1.0},
    ]
    paths = [copied / part for name in ("top50", "full") for part in written_for(name)]
    kept = [path.stat().st_ino for path in paths]
    work = work_of(files, copied, schemes=schemes)
    run(work)
    assert work.done == ["plan", "export", "verify", "preflight", "evaluate", "controls"]
    assert {scheme.name: scheme.nested_in for scheme in work.schemes()}["top50"] == ("bits11", "full")
    assert [path.stat().st_ino for path in paths] == kept
    assert all((copied / part).exists() for part in written_for("bits11"))


def written_for(name):
    return f"checkpoints/{name}/model.safetensors", f"evaluations/{name}.json"


def test_other_held_out_data_redoes_only_the_evaluation(files, copied):
    model, text, other = files
    held_out = {"data": {"kind": "text", "path": str(other)}, "samples": 5, "sequence_length": 24, "batch_size": 2}
    work = work_of(files, copied, held_out=held_out)
    run(work)
    assert work.done == ["evaluate", "controls"]


def test_a_further_held_out_set_redoes_only_the_evaluation(files, copied):
    model, text, other = files
    rows = {"sequence_length": 24, "batch_size": 2}
    first = {"data": {"kind": "text", "path": str(other)}, "samples": 4, **rows}
    before = json.loads((copied / "evaluations/full.json").read_text())
    sets = [first, {"name": "left_over", "samples": 5, **rows}]
    work = work_of(files, copied, held_out=sets)
    report = run(work)
    assert work.done == ["evaluate", "controls"]
    after = json.loads((copied / "evaluations/full.json").read_text())
    assert after["data"]["held_out"] == before["data"]["held_out"]
    assert after["results"][:3] == before["results"]
    assert [(r["metric"], r["split"], r["samples"]) for r in after["results"][3:]] == [
        ("kl", "left_over", 5),
        ("perplexity", "left_over", 5),
        ("top1_agreement", "left_over", 5),
    ]
    calibration = json.loads((copied / "measurement.json").read_text())["calibration"]
    assert after["data"]["left_over"]["source"] == calibration["source"]
    assert not set(after["data"]["left_over"]["sample_ids"]) & set(calibration["sample_ids"])
    assert report.splits == ("held_out", "left_over")
    assert "left_over" in (copied / "report.md").read_text()
    work = work_of(files, copied, held_out=sets)
    run(work)
    assert work.done == []
    for changed in ([first, {**sets[1], "samples": 6}], [first, {**sets[1], "name": "rest"}], sets[::-1]):
        work = work_of(files, copied, held_out=changed)
        run(work)
        assert work.done == ["evaluate", "controls"]


def measured_with_images(directory):
    """The measurement of a run, as if image positions carried all that the first half of the groups' scores hold."""
    measurement = Measurement.read(directory / "measurement.json")
    half = len(measurement.candidates) // 2
    candidates = tuple(
        c.model_copy(update={"image_scores": c.scores if i < half else tuple(0.0 for _ in c.scores)})
        for i, c in enumerate(measurement.candidates)
    )
    return measurement.model_copy(update={"candidates": candidates})


def test_groups_that_change_when_only_text_positions_count(finished):
    plain, measurement = Measurement.read(finished / "measurement.json"), measured_with_images(finished)
    text_alone = {"name": "text", "coverage": 0.5, "image_weight": 0.0}
    entries = [{"name": "both", "coverage": 0.5}, {"name": "full", "coverage": 1.0}, text_alone]
    specs = [SchemeSpec.model_validate(entry) for entry in entries]
    schemes = [planning.plan(measurement, spec) for spec in specs]
    both, _, text = schemes
    differing = sum(both.formats[group] != text.formats[group] for group in text.formats)
    assert differing > 0
    changes = {one.name: one.text_only_changes for one in planning.remarked(measurement, schemes)}
    assert changes == {"both": differing, "full": 0, "text": 0}
    assert {one.text_only_changes for one in planning.remarked(plain, [both])} == {None}


def test_a_bound_that_text_alone_cannot_meet(finished):
    """A score of less than 0 is attainable only with the image positions, which are made to be negative."""
    measurement = Measurement.read(finished / "measurement.json")
    candidates = tuple(
        c.model_copy(update={"scores": tuple(-s for s in c.scores), "image_scores": tuple(-2 * s for s in c.scores)})
        for c in measurement.candidates
    )
    measurement = measurement.model_copy(update={"candidates": candidates})
    scheme = planning.plan(measurement, SchemeSpec(name="a", max_predicted_score=0.0))
    assert planning.remarked(measurement, [scheme])[0].text_only_changes == "unattainable"


def test_a_scheme_asked_for_by_its_kl_is_compared_at_its_bits(finished):
    measurement = measured_with_images(finished)
    both = planning.plan(measurement, SchemeSpec(name="a", effective_bits=12.0))
    by_kl = both.model_copy(update={"asked": SchemeSpec(name="a", max_kl=1.0)})
    by_bits = both.model_copy(update={"asked": SchemeSpec(name="a", effective_bits=both.effective_bits)})
    chosen = both.model_copy(update={"asked": SchemeSpec(name="a", effective_bits=12.0, chosen_by="kl")})
    from_kl, from_bits, from_map = planning.remarked(measurement, [by_kl, by_bits, chosen])
    assert from_kl.text_only_changes == from_bits.text_only_changes > 0
    assert from_map.text_only_changes is None  # a map goes by all positions together


def test_standard_errors_are_those_of_the_score_that_was_planned(finished):
    measurement = measured_with_images(finished)
    text = planning.plan(measurement, SchemeSpec(name="text", coverage=1.0, image_weight=0.0))
    both = planning.plan(measurement, SchemeSpec(name="both", coverage=1.0))
    for_text, for_both = (one.standard_error for one in planning.remarked(measurement, [text, both]))
    assert for_both == planning.standard_error(measurement, both.formats)
    assert for_text == planning.standard_error(measurement.weigh_images(0.0), text.formats) != for_both


def test_what_is_said_of_a_scheme_is_planned_and_the_report_reads_it(files, finished, copied):
    scheme = Scheme.read(finished / "schemes" / "top50.json")
    measurement = Measurement.read(finished / "measurement.json")
    assert scheme.standard_error == planning.standard_error(measurement, scheme.formats) > 0
    unsaid = scheme.model_copy(update={"standard_error": None})
    assert unsaid.fingerprint() == scheme.fingerprint()  # its checkpoint stays
    unsaid.write(copied / "schemes" / "top50.json")
    reported = {one.name: one.predicted_standard_error for one in make_report(work_of(files, copied)).schemes}
    assert reported["top50"] is None
    work = work_of(files, copied)
    run(work)
    assert work.done == ["plan"]
    assert Scheme.read(copied / "schemes" / "top50.json") == scheme


def test_control_arms_stand_beside_each_scheme(files, finished, copied):
    evidence = Evidence.read(finished / "evidence.json")
    assert {arm.scheme.asked.beside for arm in evidence.arms} == {"top50"}  # full leaves no choice
    # Every batch has as many tokens, so ModelOpt would choose what the scheme has: that isn't repeated.
    measurement = Measurement.read(finished / "measurement.json")
    top50 = Scheme.read(finished / "schemes" / "top50.json")
    assert controls._modelopt_choice(measurement, top50) == top50.formats
    others = {arm.asked.control for arm in controls.arms(measurement, top50, kinds=KINDS, seeds=3)}
    assert {"random", "inverse", "first_last", "largest"} <= others <= set(KINDS) - {"modelopt"}
    assert {arm.scheme.asked.control for arm in evidence.arms} == others
    assert evidence.left_out == ()
    report = make_report(work_of(files, copied))
    assert {found.control for found in report.control_comparisons} == others
    assert len(report.prediction.points) == 2 + len(evidence.arms)


def test_controls_can_be_capped_or_left_out(files, copied):
    work = work_of(files, copied, controls={"max_seconds": 0})
    run(work)
    assert work.done == ["controls"]
    evidence = Evidence.read(copied / "evidence.json")
    assert evidence.arms == ()
    assert "top50.random0" in evidence.left_out
    work = work_of(files, copied, controls={"kinds": []})
    report = run(work)
    assert work.done == []
    assert not (copied / "evidence.json").exists()
    assert report.controls == ()


def test_a_scheme_asked_for_by_its_kl(files, copied):
    full = Evaluation.read(copied / "evaluations/full.json").result("kl").value
    schemes = [{"name": "half_kl", "max_kl": full / 2}, {"name": "full", "coverage": 1.0}]
    work = work_of(files, copied, schemes=schemes)
    run(work)
    assert work.done[:2] == ["measure KL of a few schemes", "plan"]
    points = KlPoints.read(copied / "kl_points.json")
    assert len(points.points) >= 5
    assert points.data == Measurement.read(copied / "measurement.json").calibration
    kl = Evaluation.read(copied / "evaluations/half_kl.json").result("kl").value
    assert 0 < kl < full
    scheme = work.schemes()[0]
    measurement = Measurement.read(copied / "measurement.json")
    kl_map = planning.kl_map_of(copied / "kl_points.json", measurement)
    assert kl_map.predict(parts_by_format(measurement, scheme.formats)).value <= full / 2
    assert work_again_is_idle(files, copied, schemes)
    with pytest.raises(InfeasibleTarget, match=r"within a predicted KL of 1e-30; attainable .* nats per token"):
        run(work_of(files, copied, schemes=[{"name": "none", "max_kl": 1e-30}]))


def work_again_is_idle(files, output, schemes):
    work = work_of(files, output, schemes=schemes)
    run(work)
    return work.done == []


def test_another_method_redoes_everything(files, copied):
    before = bytes_of(copied)
    work = work_of(files, copied, measurement={"method": "kl_div"})
    run(work)
    assert work.done == ["measure", "plan", "export", "verify", "preflight", "evaluate", "controls"]
    assert bytes_of(copied) != before


def test_a_damaged_checkpoint_is_exported_again(files, copied):
    before = bytes_of(copied)
    path = copied / "checkpoints/full/model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    work = work_of(files, copied)
    run(work)
    assert work.done == ["export"]  # the same bytes again: verification and evaluation still hold
    assert bytes_of(copied) == before


def test_a_deleted_measurement_is_made_again_with_the_same_result(files, copied):
    before = bytes_of(copied)
    (copied / "measurement.json").unlink()
    work = work_of(files, copied)
    run(work)
    assert work.done == ["measure"]
    assert bytes_of(copied) == before


def test_corrupt_records_are_refused_by_name(files, copied):
    (copied / "measurement.json").write_text('{"schema_version": 1, "groups":')
    with pytest.raises(RecordError, match=r"measurement\.json can't be read as JSON.*`bitladder measure RECIPE` again"):
        run(work_of(files, copied))


def test_changed_weights_make_the_measurement_stale(files, copied, tmp_path):
    model = tmp_path / "changed"
    shutil.copytree(files[0], model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    work = work_of((model, *files[1:]), copied)
    for step in (plan, export, verify, evaluate):
        with pytest.raises(StaleRecord, match="other weights"):
            step(work)
    assert (copied / "checkpoints/full/model.safetensors").exists()


def test_steps_without_their_input_say_what_to_run(files, tmp_path):
    work = work_of(files, tmp_path / "out")
    for step in (plan, export, verify, evaluate, make_report):
        with pytest.raises(RecordError, match="`bitladder (measure|plan|export) RECIPE` writes it"):
            step(work)


def test_the_output_holds_something_else(files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match="didn't write"):
        work_of(files, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        work_of(files, tmp_path / "file")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"


def test_two_equal_schemes_stop_before_the_export(files, tmp_path):
    schemes = [{"name": "all", "coverage": 1.0}, {"name": "eight", "effective_bits": 8.0}]
    with pytest.raises(DuplicateSchemes, match="all.*eight"):
        run(work_of(files, tmp_path / "out", schemes=schemes))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_an_fp8_kv_cache_needs_no_new_measurement(files, copied):
    work = work_of(files, copied, kv_cache="fp8")
    run(work)
    assert work.done == ["plan", "export", "verify", "preflight", "evaluate", "controls"]
    assert {manifest.kv_cache_format for manifest in work.manifests().values()} == {"fp8"}
    schemes = [{"name": "full", "coverage": 1.0, "kv_cache": "none"}, {"name": "full_kv", "coverage": 1.0}]
    work = work_of(files, copied, kv_cache="fp8", schemes=schemes)
    run(work)
    assert {name: manifest.kv_cache_format for name, manifest in work.manifests().items()} == {
        "full": None,
        "full_kv": "fp8",
    }


def test_two_processes_in_one_directory(files, copied):
    first, second = work_of(files, copied), work_of(files, copied)
    with first.locked(), pytest.raises(OutputError, match="another bitladder process"), second.locked():
        pass


def test_a_lock_names_its_process_and_only_where_the_file_is_a_locks(files, copied):
    lock = copied / ".lock"
    with work_of(files, copied).locked():
        assert lock.read_text() == str(os.getpid())
        other = work_of(files, copied)
        with (
            pytest.raises(OutputError, match=rf"wait for it \(process {os.getpid()}\), or end it: kill {os.getpid()}"),
            other.locked(),
        ):
            pass
    assert lock.read_text() == ""
    lock.write_text("kept")
    with work_of(files, copied).locked():
        pass
    assert lock.read_text() == "kept"


def test_a_refused_process_has_written_nothing(files, copied):
    with work_of(files, copied).locked():
        held = (copied / "run.json").read_bytes()
        other = work_of(files, copied, schemes=[{"name": "other", "coverage": 0.3}])
        with pytest.raises(OutputError), other.locked():
            pass
        assert (copied / "run.json").read_bytes() == held


def test_the_lock_follows_no_link(files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError), work_of(files, tmp_path / "out").locked():
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_run_that_was_killed_at_its_very_start_goes_on(files, tmp_path):
    output = tmp_path / "out"
    (output / f"{TEMPORARY_PREFIX}1234-run.json").mkdir(parents=True)
    (output / ".lock").touch()
    with work_of(files, output).locked():
        assert (output / "run.json").exists()
    assert not list(output.glob(f"{TEMPORARY_PREFIX}*"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="didn't write"):
        work_of(files, tmp_path / "foreign")


def flip(path, offset=-100):
    """Change one byte of a file, and neither its size nor its modification time."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_verify_reads_every_byte_whatever_the_times_say(files, copied, name):
    flip(copied / "checkpoints/full" / name)
    with pytest.raises(VerificationFailed, match=f"full: {name}"):
        verify(work_of(files, copied))
    work = work_of(files, copied)
    run(work)  # which knows of it now, and mends it
    assert "export" in work.done
    assert verify(work_of(files, copied)).ok


def test_verify_says_whether_it_trusted_times(files, copied):
    assert Verification.read(copied / "verification.json").times_trusted
    assert not verify(work_of(files, copied)).times_trusted
    make_report(work_of(files, copied))
    assert "every byte of the original" in (copied / "report.md").read_text()
    work = work_of(files, copied)
    run(work)
    assert work.done == []  # verified by reading everything is good enough


@pytest.mark.parametrize("name", ["zz.safetensors", "extra/notes.txt"])
def test_a_file_too_many_is_noticed(files, copied, name):
    path = copied / "checkpoints/full" / name
    path.parent.mkdir(exist_ok=True)
    save_file({"model.norm.weight": torch.zeros(64)}, path)
    with pytest.raises(VerificationFailed, match="not listed in the manifest"):
        verify(work_of(files, copied))
    work = work_of(files, copied)
    run(work)
    assert "export" in work.done
    assert not path.exists()


def test_only_the_damaged_one_of_a_pair_is_blamed_everywhere(files, copied):
    """In the record, the exit line, the report and its verdict, and both model cards; and mended, nobody is."""
    tensors = load_file(copied / "checkpoints/full/model.safetensors")
    swapped = load_file(copied / "checkpoints/top50/model.safetensors")
    name = next(n for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn and swapped[n].dtype == torch.bfloat16)
    tensors[name] = swapped[name]  # as in the other, from which it should differ
    save_file(tensors, copied / "checkpoints/full/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationFailed) as raised:
        verify(work_of(files, copied))
    assert "the first: full: model.safetensors" in str(raised.value)
    assert "top50" not in str(raised.value).split(" (all in ")[0]
    record = Verification.read(copied / "verification.json")
    assert {check.scheme: check.ok for check in record.checkpoints} == {"top50": True, "full": False}
    (pair,) = record.pairs
    assert (pair.modules_differing, pair.findings) == (pair.modules_expected - 1, ())
    make_report(work_of(files, copied))
    report = (copied / "report.md").read_text()
    assert f"{pair.modules_expected} | {pair.modules_differing} | not judged: see the findings of full |" in report
    assert "`full` doesn't match its scheme" in report
    assert "`top50` doesn't match" not in report
    assert "`top50`" in json.loads((copied / "report.json").read_text())["verdict"]
    cards = {n: (copied / "checkpoints" / n / CheckpointManifest.CARD_NAME).read_text() for n in ("top50", "full")}
    assert "checked: they match" in cards["top50"]
    assert "**they do not match**" in cards["full"]
    run(work_of(files, copied))
    report = (copied / "report.md").read_text()
    assert f"{pair.modules_expected} | {pair.modules_expected} | 0 |" in report
    assert "not judged" not in report


def test_what_a_finished_measurement_left_is_removed(files, copied):
    (copied / "measuring").mkdir()
    (copied / "measuring" / "scores-00000.json").write_text("{}")
    run(work_of(files, copied))
    assert not (copied / "measuring").exists()


def test_verification_failures_name_file_tensor_and_remedy(files, copied):
    """A checkpoint that was wrong when it was sealed: its digests match, its content doesn't."""
    directory = copied / "checkpoints/full"
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name, t in tensors.items() if t.dtype == torch.float8_e4m3fn)
    tensors[name] = (tensors[name].view(torch.uint8) ^ 0x40).view(torch.float8_e4m3fn)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    from bitladder.storage import sha256_of_file

    manifest = CheckpointManifest.read(directory / CheckpointManifest.FILE_NAME)
    digest = sha256_of_file(directory / "model.safetensors")
    size = (directory / "model.safetensors").stat().st_size
    entries = tuple(
        entry.model_copy(update={"sha256": digest, "bytes": size}) if entry.name == "model.safetensors" else entry
        for entry in manifest.files
    )
    manifest.model_copy(update={"files": entries}).write(directory / CheckpointManifest.FILE_NAME)
    with pytest.raises(VerificationFailed, match=f"full: .*{name}.*export this scheme again"):
        run(work_of(files, copied))
    assert "full" in (copied / "verification.json").read_text()


def test_share_files(files, tmp_path):
    output = tmp_path / "out"
    run(work_of(files, output, export={"share_files": True}))
    assert (output / "checkpoints/top50/tokenizer.json").samefile(output / "checkpoints/full/tokenizer.json")
    work = work_of(files, output, export={"share_files": True})
    run(work)
    assert work.done == []


def test_held_out_rows_of_the_calibration_file(files, tmp_path):
    output = tmp_path / "out"
    held_out = {"samples": 4, "sequence_length": 24, "batch_size": 2}
    work = work_of(files, output, held_out=held_out)
    run(work)
    content = json.loads((output / "evaluations/full.json").read_text())
    calibration = json.loads((output / "measurement.json").read_text())["calibration"]
    data = content["data"]["held_out"]
    assert data["source"] == calibration["source"]
    assert not set(data["sample_ids"]) & set(calibration["sample_ids"])


CHILD = """
import os
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_pipeline
from bitladder.steps.run import run
from bitladder.steps.workspace import Workspace
from bitladder.recipe import Recipe

print(os.getpid(), file=sys.__stdout__, flush=True)

def progress(phase, done, total):
    print(phase, done, file=sys.__stdout__, flush=True)
    if (phase, done) == {moment!r}:
        sys.stdin.read()  # until it is killed

run(Workspace(Recipe.model_validate_json({recipe!r}), Path({output!r}), progress))
"""


@pytest.mark.parametrize(
    "moment", [("calibrate", 1), ("score", 1), ("export full", 0), ("export full", 1), ("evaluate full", 1)]
)
def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(moment, files, finished, tmp_path):
    output = tmp_path / "out"
    recipe = recipe_of(files, output)
    code = CHILD.format(
        tests=str(Path(__file__).parent), moment=moment, recipe=recipe.model_dump_json(), output=str(output)
    )
    with subprocess.Popen(
        [warm.python(), "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
    ) as child:
        number = int(child.stdout.readline())  # of the process that works: `child` ends when that has ended
        for line in child.stdout:
            if line.strip() == f"{moment[0]} {moment[1]}":
                time.sleep(0.05)
                os.kill(number, signal.SIGKILL)
                break
        else:
            pytest.fail("the child ended before the moment came")
    assert child.returncode == -signal.SIGKILL
    work = work_of(files, output)
    run(work)
    assert "evaluate" in work.done
    assert bytes_of(output) == bytes_of(finished)
    assert not list(output.rglob(f"{TEMPORARY_PREFIX}*"))


def too_long(kind, **data):
    """Rows of one token more than the tiny Llama has positions for."""
    return {"data": {"kind": kind, **data}, "samples": 4, "sequence_length": 513, "batch_size": 2}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"held_out": {"data": {"kind": "text", "path": "/nowhere/held_out.txt"}}}, "/nowhere/held_out.txt"),
        ({"calibration": {"data": {"kind": "text", "path": "/nowhere/seen.txt"}}}, "/nowhere/seen.txt"),
        ({"measurement": {"formats": ["fp9"]}}, "fp9"),
        ({"measurement": {"device": "cuda:7"}}, "cuda:7"),
        ({"runtimes": {"vllm": {"python": "/nowhere/python"}}}, "/nowhere/python"),
        ({"schemes": [{"name": "a", "include": ["*.q_prj"]}]}, r"'\*\.q_prj' matches no group .* the nearest is"),
        (
            {"schemes": [{"name": "a", "coverage": 0.5, "exclude": ["*.layers.9.*"]}]},
            r"scheme a: pattern '\*\.layers\.9\.\*' matches no group",
        ),
        ({"schemes": [{"name": "a", "include": ["lm_head"]}]}, "matches only modules that no scheme quantises"),
        ({"calibration": too_long("text", path=__file__)}, "513 is more than the 512 positions .* at most 512"),
        ({"calibration": too_long("generated")}, "513 is more than the 512 positions"),
        ({"held_out": too_long("text", path=__file__)}, "513 is more than the 512 positions"),
    ],
)
def test_mistakes_are_found_before_the_model_is_hashed(files, tmp_path, monkeypatch, changes, says):
    hashed = []
    monkeypatch.setattr(workspace, "model_source", lambda *_, **__: hashed.append(1))
    with pytest.raises(BitladderError, match=says):
        run(work_of(files, tmp_path / "out", **changes))
    assert not hashed


@pytest.mark.parametrize("kind", ["messages", "image_text"])
def test_samples_longer_than_the_model_has_positions_are_found_before_it_is_hashed(files, tmp_path, monkeypatch, kind):
    """Their `sequence_length` is only a bound; what they really have is looked at."""
    monkeypatch.setattr(workspace, "model_source", lambda *_, **__: pytest.fail("hashed"))
    model = tmp_path / "model"
    if kind == "messages":
        shutil.copytree(files[0], model)
        (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
        row, asked = {"messages": [{"role": "user", "content": make_text(80)}]}, "set sequence_length: 30"
    else:
        shutil.copytree(Path(bitladder.__file__).parent / "demo" / "qwen2_5_vl_digits", model)
        Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
        row, asked = {"image": "a.png", "text": "word " * 40}, "use smaller pictures or shorter texts"
    content = json.loads((model / "config.json").read_text())
    content.get("text_config", content)["max_position_embeddings"] = 30
    (model / "config.json").write_text(json.dumps(content))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    data = {"data": {"kind": kind, "path": str(path)}, "samples": 1, "sequence_length": 600, "batch_size": 1}
    with pytest.raises(DataError, match=f"has [0-9]+ tokens, more than the 30 positions .*; {asked}"):
        run(work_of((model, *files[1:]), tmp_path / "out", calibration=data))


def test_a_model_without_a_language_model_is_found_before_it_is_hashed(files, tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "model_source", lambda *_, **__: pytest.fail("hashed"))
    shutil.copytree(files[0], tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "architectures": ["NoSuchModel"]}))
    with pytest.raises(BitladderError, match="NoSuchModel"):
        run(work_of((tmp_path / "model", *files[1:]), tmp_path / "out"))


def test_nulls_of_a_data_set_are_told(files, tmp_path):
    datasets.Dataset.from_dict({"text": [None, None, make_text(200)]}).save_to_disk(str(tmp_path / "rows"))
    source = {"kind": "huggingface", "path": str(tmp_path / "rows")}
    work = work_of(files, tmp_path / "out", calibration={"data": source, "samples": 4, "sequence_length": 24})
    work.tell = (told := []).append
    look(work)
    assert told == [f"{tmp_path / 'rows'}: 2 of the rows that were read hold null and are left out"]


def test_each_set_is_read_once_by_a_run(files, tmp_path, monkeypatch):
    read, load = [], samples.load_data
    monkeypatch.setattr(data, "load_data", lambda source, *a, **k: read.append(source) or load(source, *a, **k))
    run(work_of(files, tmp_path / "out", controls={"kinds": []}))
    assert len(read) == 2


def test_a_report_is_not_written_into_a_checkpoint(files, tmp_path):
    with pytest.raises(OutputError, match="lies in the checkpoint"):
        run(work_of(files, tmp_path / "out", layout={"report": "checkpoints/full/README.md"}))
