"""What the command line says for scripts: JSON, how much is told, lines, the log, what lies ahead, drafted recipes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import bitladder as package
from bitladder.cli import telling
from bitladder.cli.app import ANYWHERE, app, moved_to_the_front
from bitladder.recipe import read_recipe
from bitladder.records import Evaluation, KlPoint, KlPoints, Measurement, Scheme, Verification
from bitladder.report import Report
from test_cli import MANIFEST, bitladder, recipe, refused  # noqa: F401

ROOT = Path(__file__).parents[1]
DEMO = Path(package.__file__).parent / "demo"


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):  # noqa: F811
    """The recipe of a finished run, and what `run --json` said."""
    directory = tmp_path_factory.mktemp("finished")
    path = recipe(directory)
    result = bitladder("run", path, "--json")
    assert result.returncode == 0, result.stderr
    return path, result


def test_run_answers_with_its_report_and_tells_all_else_on_standard_error(finished):
    path, result = finished
    said = json.loads(result.stdout)
    assert said["output"] == str(path.parent / "out")
    assert said["done"][:3] == ["measure", "plan", "export"]
    assert Report.model_validate(said["report"]) == Report.read(path.parent / "out" / "report.json")
    assert "calibrate: 2 done in" in result.stderr


RECORDS = {
    "plan": lambda said: [Scheme.model_validate(one) for one in said["schemes"]],
    "verify": lambda said: Verification.model_validate(said["verification"]),
    "evaluate": lambda said: [Evaluation.model_validate(one) for one in said["evaluations"].values()],
    "report": lambda said: Report.model_validate(said["report"]),
    "measure": lambda said: said["groups"] == 12,
    "export": lambda said: said["checkpoints"]["full"]["quantised_modules"] == 21 and said["checkpoints"]["top50"],
    "controls": lambda said: said["evidence"]["arms"],
    "preflight": lambda said: {one["runtime"] for one in said["results"]} == {"vllm", "sglang", "tensorrt_llm"},
}


@pytest.mark.parametrize("step", sorted(RECORDS))
def test_every_step_answers_in_json(step, finished):
    result = bitladder(step, finished[0], "--json")
    assert result.returncode == 0, result.stderr
    assert RECORDS[step](json.loads(result.stdout))


def test_other_commands_answer_in_json(finished, llama, tmp_path):
    output = finished[0].parent / "out"
    known = Measurement.read(output / "measurement.json")
    points = json.loads(bitladder("--json", "frontier", output / "measurement.json", "--points", 0).stdout)
    assert points["score_unit"] == known.score_unit
    assert points["points"][0]["effective_bits"] == 8
    assert points["points"][-1]["predicted_score"] == 0
    both = json.loads(bitladder("compare", output, output, "--json").stdout)
    assert both["page"].startswith("# ")
    assert both["first"] == both["second"]
    found = json.loads(bitladder("inspect", llama, "--json").stdout)
    assert (len(found["groups"]), found["searched_weights"]) == (12, 110_592)
    made = json.loads(bitladder("import", MANIFEST, tmp_path / "m.json", "--json").stdout)
    assert made == {"measurement": str(tmp_path / "m.json"), "groups": 144, "searched_weights": 2_774_532_096}


def test_a_failed_check_answers_in_json_too(finished, tmp_path):
    result = bitladder("preflight", finished[0].parent / "out" / "checkpoints" / "full", "--json")
    assert [one["verdict"] for one in json.loads(result.stdout)["results"]] == ["ok"] * 3
    refused(
        bitladder("plan", finished[0], "--output", tmp_path / "none", "--json"), "`bitladder measure RECIPE` writes it"
    )


def test_every_command_that_reports_answers_in_json():
    """A command that is added must, too: its source calls `answered`, or something that does."""
    ways = ("answered(", "close_probes(", "_run_all(")
    for command in app.registered_commands:
        source = Path(command.callback.__code__.co_filename).read_text()
        body = source[source.index(f"def {command.callback.__name__}(") :].split("\n\n\n")[0]
        assert any(way in body for way in (*ways, "_show_plan(", "_plan_from(")), command.callback.__name__


def test_options_of_the_program_may_stand_anywhere(finished):
    path = finished[0]
    assert moved_to_the_front(["run", "x", "--json", "-o", "y", "-q"]) == ["--json", "-q", "run", "x", "-o", "y"]
    assert moved_to_the_front(["run", "--", "--json"]) == ["run", "--", "--json"]
    declared = {name for one in app.registered_callback.callback.__annotations__.values() for name in _names(one)}
    assert set(ANYWHERE) == declared - {"--version"}
    quiet = bitladder("plan", path, "--quiet").stdout
    assert "Output:" not in quiet
    assert "predicted score" in quiet
    verbose = bitladder("plan", path, "-v").stdout
    assert f"working in {path.parent / 'out'}, as process" in verbose
    failed = bitladder("plan", path.parent / "nothing.yaml", "--debug")
    assert failed.returncode == 2
    assert "Traceback" in failed.stderr


def _names(annotation):
    return [name for one in getattr(annotation, "__metadata__", ()) for name in (one.default, *one.param_decls)]


def test_lines_tell_begin_now_and_then_and_end(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(telling.time, "monotonic", lambda: now[0])
    lines = telling.Lines(said.append, every=10)
    for seconds, done in ((0, 0), (4, 1), (11, 2), (12, 3), (20, 8), (21, 8)):
        now[0] = 100.0 + seconds
        lines("score", done, 8)
    assert said == ["score: 0 of 8", "score: 2 of 8 after 11.0 s, about 33 s left", "score: 8 done in 20.0 s"]
    said.clear()
    lines("load model", 0, 1)
    now[0] += 2.5
    lines("load model", 1, 1)
    lines("wait", 0, 0)
    assert said == ["load model: begun", "load model: done in 2.5 s", "wait: begun"]


def test_the_log_waits_until_the_directory_is_ours(tmp_path):
    path = tmp_path / "run.log"
    log = telling.Log(path)
    log.write("one\ntwo")
    assert not path.exists()
    log.begin()
    log.write("three")
    assert [line.split(" ", 1)[1] for line in path.read_text().splitlines()] == ["one", "two", "three"]
    elsewhere = tmp_path / "precious"
    elsewhere.write_text("precious")
    (tmp_path / "linked.log").symlink_to(elsewhere)
    linked = telling.Log(tmp_path / "linked.log")
    linked.begin()
    linked.write("never")
    assert elsewhere.read_text() == "precious"


def test_a_refused_run_writes_no_log(recipe, tmp_path):  # noqa: F811
    refused(bitladder("run", recipe(tmp_path, model={"path": "/nowhere"})), "/nowhere does not exist")
    assert not (tmp_path / "out").exists()


def test_an_error_is_in_the_log(finished):
    path = finished[0]
    content = yaml.safe_load(path.read_text())
    content["schemes"] = [{"name": "full", "coverage": 1.0}, {"name": "same", "effective_bits": 8}]
    other = path.with_name("equal.yaml")
    other.write_text(yaml.safe_dump(content))
    refused(bitladder("plan", other), "same")
    assert " error: " in (path.parent / "out" / "run.log").read_text().splitlines()[-1]


def test_a_dry_run_says_what_and_why_and_does_nothing(finished):
    path = finished[0]
    output = path.parent / "out"

    def ahead(file):
        said = json.loads(bitladder("run", file, "--dry-run", "--json").stdout)
        return {one["step"]: one for one in said["steps"]}

    before = {one: one.stat().st_mtime_ns for one in output.rglob("*") if one.is_file()}
    steps = ahead(path)
    assert [name for name, one in steps.items() if one["why"] is not None] == ["report"]
    assert steps["measure"]["seconds"] > 0
    content = yaml.safe_load(path.read_text())
    content["schemes"].append({"name": "top75", "coverage": 0.75})
    more = path.with_name("more.yaml")
    more.write_text(yaml.safe_dump(content))
    steps = ahead(more)
    assert steps["measure"]["why"] is None
    assert steps["plan"]["why"] == "not planned as asked: top75"
    assert steps["export"]["why"] == "follows from plan"
    content["calibration"]["samples"] = 2
    more.write_text(yaml.safe_dump(content))
    assert ahead(more)["measure"]["why"] == "calibration.samples 4 → 2"
    shown = bitladder("run", "--dry-run", path).stdout
    assert "no, it is done and valid" in shown
    assert {one: one.stat().st_mtime_ns for one in output.rglob("*") if one.is_file()} == before


def test_a_plan_by_score_and_by_kl(finished, tmp_path):
    output = finished[0].parent / "out"
    path = tmp_path / "measurement.json"
    known = Measurement.read(output / "measurement.json")
    known.write(path)
    worst = Scheme.read(output / "schemes" / "full.json").predicted_score
    asked = ("plan", "--measurement", path, "--json")
    (scheme,) = json.loads(bitladder(*asked, "--max-predicted-score", worst / 2).stdout)["schemes"]
    assert scheme["predicted_score"] <= worst / 2
    refused(
        bitladder(*asked, "--max-kl", 0.01), "kl_points.json isn't there", "--max-predicted-score"[2:].replace("-", "_")
    )
    shares = (0.1, 0.3, 0.5, 0.8, 1.0)  # KL is twice the score, exactly
    total = known.searched_weights
    points = [
        KlPoint(name=f"p{s}", scores={"fp8": worst * s}, weights={"fp8": round(total * s)}, kl=2 * worst * s)
        for s in shares
    ]
    data = known.calibration
    KlPoints(
        measurement_sha256=known.fingerprint(), settings_sha256="0", data=data, samples=4, points=points, run=None
    ).write(tmp_path / "kl_points.json")
    found = json.loads(bitladder(*asked, "--max-kl", worst).stdout)
    (by_kl,) = found["schemes"]
    assert by_kl["formats"] == scheme["formats"]
    predicted = found["predicted_kl"][by_kl["name"]]
    assert predicted["value"] == pytest.approx(2 * by_kl["predicted_score"])
    assert predicted["low"] <= predicted["value"] <= min(predicted["high"], worst)
    chosen = json.loads(bitladder(*asked, "--effective-bits", 12, "--chosen-by", "kl").stdout)
    (scheme,) = chosen["schemes"]
    assert scheme["asked"] == {"name": "bits12", "effective_bits": 12.0, "chosen_by": "kl"}
    assert scheme["effective_bits"] <= 12
    assert chosen["predicted_kl"]["bits12"]["value"] == pytest.approx(2 * scheme["predicted_score"])
    among = ("--formats", "fp8", "--effective-bits", 12, "--chosen-by", "kl")
    (scheme,) = json.loads(bitladder(*asked, *among).stdout)["schemes"]
    assert (scheme["asked"]["formats"], scheme["asked"]["chosen_by"]) == (["fp8"], "kl")
    beside = json.loads(bitladder(*asked, "--effective-bits", 12, "--max-kl", worst).stdout)
    assert sorted(beside["predicted_kl"]) == sorted(one["name"] for one in beside["schemes"])
    refused(
        bitladder(*asked, "--max-kl", worst, "--chosen-by", "kl"),
        "--chosen-by goes with --coverage and --effective-bits; ask for --max-kl or",
    )
    refused(bitladder("plan", finished[0], "--chosen-by", "kl"), "--chosen-by and --formats go with --measurement")
    told = bitladder(*asked[:-1], "--max-kl", worst).stdout
    assert f"{predicted['value']:.3g} (" in told
    assert "predicted KL of the weights in nats per token" in told
    assert "predicted_kl" not in told


def test_a_plan_of_a_recipe_tells_the_kl_that_it_predicts(finished, tmp_path):
    content = yaml.safe_load(finished[0].read_text())
    output = tmp_path / "out"
    shutil.copytree(finished[0].parent / "out", output)
    content |= {"schemes": [{"name": "mix", "effective_bits": 12, "chosen_by": "kl"}], "output": str(output)}
    path = finished[0].with_name("by_kl.yaml")
    path.write_text(yaml.safe_dump(content))
    told = json.loads(bitladder("plan", path, "--json").stdout)
    assert told["predicted_kl"]["mix"]["low"] <= told["predicted_kl"]["mix"]["value"]
    assert (output / "kl_points.json").exists()


def test_a_drafted_recipe_runs(llama, tmp_path):
    drafted = bitladder("init", llama, cwd=tmp_path)
    assert drafted.returncode == 0, drafted.stderr
    path = tmp_path / "recipe.yaml"
    path.write_text(drafted.stdout)
    asked = read_recipe(path)
    assert asked.model.path == str(llama)
    assert asked.serve_on == "cpu"
    assert [spec.data.kind for spec in (*asked.calibration, *asked.held_out)] == ["generated"] * 2
    assert (asked.measurement.formats, asked.measurement.rounding) == (("nvfp4", "fp8"), "compensated")
    result = bitladder("run", path)
    assert result.returncode == 0, result.stderr
    assert "by rules" in result.stdout


def test_a_drafted_recipe_takes_the_data_and_the_device_that_are_given(llama, tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = {"chat": {"messages": turns}, "plain": {"text": "a"}, "pairs": {"image": "a.png", "text": "b"}}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "book.txt").write_text("words\n")
    kinds = {"chat.jsonl": "messages", "plain.jsonl": "jsonl", "pairs.jsonl": "image_text", "book.txt": "text"}
    for name, kind in kinds.items():
        made = bitladder("init", llama, "--data", tmp_path / name, "--serve-on", "blackwell_rtx")
        content = yaml.safe_load(made.stdout)
        own = {"kind": kind, "path": str(tmp_path / name)}
        assert [one["data"] for one in content["calibration"]] == [own, {"kind": "generated"}]
        assert content["held_out"]["data"] == own
        assert content["serve_on"] == "blackwell_rtx"
    (tmp_path / "odd.jsonl").write_text('{"body": "a"}\n')
    refused(bitladder("init", llama, "--data", tmp_path / "odd.jsonl"), "its first row has body", "data.text_field")
    refused(bitladder("init", llama, "--serve-on", "toaster"), "'toaster' is unknown", "hopper")


def test_the_demo_is_the_recipe_of_the_embedded_model():
    shipped, shown = (
        yaml.safe_load(path.read_text()) for path in (DEMO / "recipe.yaml", ROOT / "recipes" / "demo.yaml")
    )
    assert {**shipped, "output": ""} == {**shown, "output": ""}


def test_completion_knows_the_commands():
    env = {**os.environ, "_BITLADDER_COMPLETE": "complete_bash", "COMP_WORDS": "bitladder pre", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['bitladder']; from bitladder.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert "preflight" in result.stdout
