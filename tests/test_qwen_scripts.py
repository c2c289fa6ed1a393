"""The entry points of scripts/qwen: names, flags and places, on the embedded model; plans of the published scores."""

import base64
import copy
import importlib.util
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

import warm
from bitladder.errors import DataError, MeasurementError, ModelError, OutputError, RecipeError, RecordError, StaleRecord
from bitladder.recipe import parse_recipe, read_recipe
from bitladder.records import CheckpointManifest, Evaluation, Measurement, RunState, Scheme

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts" / "qwen"
DRIVER = SCRIPTS / "qwen2_5_vl_3b_autoquant_fp8_schemes.py"
DEMO = ROOT / "src" / "bitladder" / "demo"
MANIFEST = Path(__file__).parent / "data" / "qwen2_5_vl_3b_instruct_fp8_autoquant_manifest.json"
TINY = ["--calib-size", "4", "--calib-seq-len", "64", "--batch-size", "2", "--held-out-size", "4"]


def load(name):
    """Return a script as a module."""
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


driver = load("qwen2_5_vl_3b_autoquant_fp8_schemes")
published = load("plan_published_measurement")


def call(*command):
    environment = {**os.environ, "PYTHON": str(warm.python()), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=environment, cwd=ROOT)


def run_driver(root, *flags):
    return call(warm.python(), DRIVER, "--out-root", root, *flags)


def here(root, *flags):
    """Run the driver in this process."""
    driver.run(driver.parse(["--out-root", str(root), *map(str, flags)]))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An out-root where two schemes were asked for, calibrated on image+text pairs."""
    root = tmp_path_factory.mktemp("qwen")
    where = ["--model-dir", DEMO / "qwen2_5_vl_digits", "--captions", DEMO / "data" / "calibration.jsonl"]
    held_out = ["--held-out", DEMO / "data" / "heldout.jsonl", "--held-out", DEMO / "data" / "captions.txt"]
    result = run_driver(root, *where, *held_out, *TINY, "--schemes", "top25,fp8_autoquant_full")
    assert result.returncode == 0, result.stderr
    assert str(root / "reports" / "report-fp8-autoquant-schemes.md") in result.stdout
    return root


def digests(root):
    """Name, modification time and bytes of the measurement's files."""
    files = [root / "autoquant" / name for name in ("measurement.json", "measurement.safetensors")]
    return [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]


def test_checkpoints_manifests_and_report_are_where_the_plan_says(root):
    for name, share in (("fp8_autoquant_top25", 0.25), ("fp8_autoquant_full", 1.0)):
        directory = root / "quantized" / f"{name}_coco2017"
        assert (directory / "config.json").exists()
        assert (directory / "chat_template.jinja").exists()
        content = json.loads((root / "quantized" / f"{name}_coco2017.manifest.json").read_text())
        assert Scheme.model_validate(content["scheme"]).asked.coverage == share
        inside = CheckpointManifest.read(directory / CheckpointManifest.FILE_NAME)
        assert CheckpointManifest.model_validate(content["checkpoint"]) == inside
    report = (root / "reports" / "report-fp8-autoquant-schemes.md").read_text()
    assert report == (root / "autoquant" / "report.md").read_text()
    assert "fp8_autoquant_top25" in report
    assert not (root / "autoquant" / "checkpoints").exists()


def test_a_second_call_uses_the_measurement_again_and_keeps_the_first_schemes(root):
    before = digests(root)
    result = run_driver(root, "--scheme-name", "fp8_autoquant_top50")
    assert result.returncode == 0, result.stderr
    assert digests(root) == before
    assert (root / "quantized" / "fp8_autoquant_top50_coco2017" / "model.safetensors").exists()
    report = (root / "reports" / "report-fp8-autoquant-schemes.md").read_text()
    assert all(f"fp8_autoquant_{name}" in report for name in ("top25", "top50", "full"))


def test_the_baseline_script_passes_flags_on(root):
    before = digests(root)
    result = call("bash", SCRIPTS / "quantize_qwen2_5_vl_3b_fp8_coco2017.sh", "--out-root", root)
    assert result.returncode == 0, result.stderr
    assert "qwen2_5_vl_3b_autoquant_fp8_schemes.py" in result.stderr
    assert digests(root) == before
    directory = root / "quantized" / "fp8_fp8_coco2017"
    assert json.loads((directory / "hf_quant_config.json").read_text())["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_bits_out_of_reach_are_refused_in_one_line(root):
    before = RunState.read(root / "autoquant" / "run.json").recipe
    result = run_driver(root, "--auto-quantize-bits", "4.5")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "4.5 effective bits" in result.stderr
    assert "attainable 8.00 to 16.00" in result.stderr
    assert RunState.read(root / "autoquant" / "run.json").recipe == before


def test_what_was_refused_is_no_setting_of_the_next_call(root):
    before = RunState.read(root / "autoquant" / "run.json").recipe
    with pytest.raises(DataError, match="nowhere"):
        here(root, "--captions", "nowhere.txt")
    with pytest.raises(ModelError, match="nowhere"):
        here(root, "--model-dir", "nowhere")
    assert RunState.read(root / "autoquant" / "run.json").recipe == before


def test_a_measurement_of_another_place_is_taken_over(root, tmp_path):
    where = ["--model-dir", DEMO / "qwen2_5_vl_digits", "--captions", DEMO / "data" / "captions.txt"]
    here(
        tmp_path / "other",
        *where,
        *TINY,
        *("--measurement", root / "autoquant" / "measurement.json", "--scheme-name", "nine", "--auto-quantize-bits", 9),
    )
    assert [content for _, content in digests(tmp_path / "other")] == [content for _, content in digests(root)]
    scheme = Scheme.read(tmp_path / "other" / "autoquant" / "schemes" / "nine.json")
    assert scheme.effective_bits <= 9
    before = digests(tmp_path / "other")
    here(tmp_path / "other", "--coverage", 0.3)  # nothing is measured now, either
    assert digests(tmp_path / "other") == before
    assert (tmp_path / "other" / "quantized" / "fp8_autoquant_top30_coco2017").exists()


def test_a_measurement_that_does_not_fit_is_refused(root, llama, tmp_path):
    own = root / "autoquant" / "measurement.json"
    text = ["--captions", DEMO / "data" / "captions.txt", "--out-root", tmp_path / "out"]
    with pytest.raises(StaleRecord, match="other weights"):
        here(tmp_path / "out", "--model-dir", llama, *text, "--measurement", own)
    alone = tmp_path / "measurement.json"
    alone.write_bytes(own.read_bytes())
    demo = ["--model-dir", DEMO / "qwen2_5_vl_digits"]
    with pytest.raises(RecordError, match="copy both"):
        here(tmp_path / "out", *demo, *text, "--measurement", alone)
    with pytest.raises(RecordError, match="does not exist"):
        here(tmp_path / "out", *demo, *text, "--measurement", tmp_path / "nowhere.json")
    published.importing.import_manifest(MANIFEST).write(tmp_path / "imported.json")
    with pytest.raises(MeasurementError, match="planning only"):
        here(tmp_path / "out", *demo, *text, "--measurement", tmp_path / "imported.json")


def test_a_directory_of_others_is_not_replaced(root, tmp_path):
    theirs = tmp_path / "out" / "quantized" / "fp8_autoquant_top25_coco2017"
    theirs.mkdir(parents=True)
    (theirs / "model.safetensors").write_text("precious")
    flags = ["--model-dir", DEMO / "qwen2_5_vl_digits", "--captions", DEMO / "data" / "captions.txt", *TINY]
    with pytest.raises(OutputError, match="didn't write"):
        here(tmp_path / "out", *flags, "--measurement", root / "autoquant" / "measurement.json", "--schemes", "top25")
    assert (theirs / "model.safetensors").read_text() == "precious"


def schemes(*flags):
    return driver.schemes_of(driver.parse(list(flags)))


def test_a_scheme_s_name_says_its_target():
    assert [(e["name"], e["coverage"]) for e in schemes()] == [
        ("fp8_autoquant_top25", 0.25),
        ("fp8_autoquant_top50", 0.5),
        ("fp8_autoquant_full", 1.0),
    ]
    entry = {"name": "fp8_autoquant_top50", "coverage": 0.5, "kv_cache": "none"}
    assert schemes("--scheme-name", "fp8_autoquant_top50") == schemes("--scheme-name", "top50") == [entry]
    assert schemes("--scheme-name", "fp8_autoquant_top50_coco2017") == [entry]
    assert schemes("--scheme-name", "mine", "--coverage", "0.3", "--kv-cache", "fp8") == [
        {"name": "mine", "coverage": 0.3, "kv_cache": "fp8"}
    ]
    assert schemes("--auto-quantize-bits", "11.5")[0]["name"] == "fp8_autoquant_11.5bits"


def test_formats_name_the_schemes_that_are_given_no_name():
    names = [entry["name"] for entry in schemes("--formats", "nvfp4,fp8")]
    assert names == ["nvfp4_fp8_autoquant_top25", "nvfp4_fp8_autoquant_top50", "nvfp4_fp8_autoquant_full"]
    (entry,) = schemes("--formats", "nvfp4, fp8,bf16", "--auto-quantize-bits", "4.5")
    assert entry == {
        "name": "nvfp4_fp8_autoquant_4.5bits",
        "effective_bits": 4.5,
        "kv_cache": "none",
        "formats": ["nvfp4", "fp8"],
    }
    (entry,) = schemes("--scheme-name", "nvfp4_fp8_autoquant_top75_coco2017")
    assert entry == {"name": "nvfp4_fp8_autoquant_top75", "coverage": 0.75, "kv_cache": "none"}
    assert schemes("--formats", "fp8", "--schemes", "top25")[0]["name"] == "fp8_autoquant_top25"
    with pytest.raises(RecipeError, match="names no format to quantise to"):
        schemes("--formats", "bf16,")


def test_formats_that_are_not_measured_yet_are_measured_beside_the_others(tmp_path):
    out = tmp_path / "quantized"

    def recipe_of(earlier, *flags):
        flags = driver.parse([*flags, "--out-root", str(tmp_path)])
        return driver.recipe_of(flags, tmp_path / "autoquant", copy.deepcopy(earlier))

    def asked(recipe):
        return {scheme.name: scheme.formats for scheme in recipe.schemes}

    def exported(recipe):
        for scheme in recipe.schemes:
            (out / f"{scheme.name}_coco2017").mkdir(parents=True, exist_ok=True)
        return recipe.model_dump(mode="json")

    first = recipe_of({}, "--schemes", "top25")
    assert first.measurement.formats == ("fp8",)
    assert asked(first) == {"fp8_autoquant_top25": None}  # as it was before there were formats
    assert recipe_of({}, "--schemes", "top25", "--formats", "fp8") == first
    second = recipe_of(exported(first), "--formats", "nvfp4,fp8", "--auto-quantize-bits", "4.5")
    assert second.measurement.formats == ("fp8", "nvfp4")
    assert asked(second) == {"fp8_autoquant_top25": ("fp8",), "nvfp4_fp8_autoquant_4.5bits": None}
    third = recipe_of(exported(second), "--formats", "fp8_block,fp8", "--auto-quantize-bits", "9")
    assert third.measurement.formats == ("fp8", "nvfp4", "fp8_block")
    assert asked(third) == {
        "fp8_autoquant_top25": ("fp8",),
        "nvfp4_fp8_autoquant_4.5bits": ("fp8", "nvfp4"),
        "fp8_block_fp8_autoquant_9bits": ("fp8_block", "fp8"),
    }
    again = recipe_of(exported(third), "--scheme-name", "fp8_block_fp8_autoquant_9bits", "--auto-quantize-bits", "9")
    assert again.schemes[-1] == third.schemes[-1]  # what it isn't told it takes from the calls before
    assert again.measurement == third.measurement
    carried = recipe_of(exported(first), "--carrier", "compressed-tensors")
    assert carried.export.carrier == "compressed-tensors"
    assert recipe_of(exported(carried), "--schemes", "top50").export.carrier == "compressed-tensors"


def test_a_mix_from_one_measurement_by_the_driver(root, tmp_path):
    where = ["--model-dir", DEMO / "qwen2_5_vl_digits", "--captions", DEMO / "data" / "captions.txt"]
    out = tmp_path / "out"
    here(out, *where, *TINY, "--formats", "nvfp4,fp8", "--auto-quantize-bits", "4.5")
    before = digests(out)
    record = Measurement.read(out / "autoquant" / "measurement.json")
    assert set(record.formats) == {"nvfp4", "fp8"}
    here(out, "--formats", "fp8", "--auto-quantize-bits", "12")  # one of those measured: nothing is measured again
    here(out, "--auto-quantize-bits", "5.4", "--scheme-name", "mix")
    assert digests(out) == before
    plans = {path.stem: Scheme.read(path) for path in (out / "autoquant" / "schemes").iterdir()}
    assert set(plans) == {"nvfp4_fp8_autoquant_4.5bits", "fp8_autoquant_12bits", "mix"}
    assert "nvfp4" not in plans["fp8_autoquant_12bits"].formats.values()
    assert {"nvfp4", "fp8"} <= set(plans["mix"].formats.values())
    report = (out / "reports" / "report-fp8-autoquant-schemes.md").read_text()
    assert "At the floor: `nvfp4_fp8_autoquant_4.5bits`: 4.50 effective bits is the floor of these formats" in report
    result = run_driver(out, "--auto-quantize-bits", "4.2")
    assert result.returncode == 2
    assert "add int4_w4a16 or int4_w4a16_asym to --formats with --carrier compressed-tensors" in result.stderr
    with pytest.raises(RecipeError, match="--formats mxfp8 is not in .*which has fp8, nvfp4; choose among these"):
        here(out, "--measurement", out / "autoquant" / "measurement.json", "--formats", "mxfp8")


@pytest.mark.parametrize("name", ["fp8_mine", "top0", "top101", "fp8_autoquant_half", ""])
def test_a_name_without_a_target_is_refused(name):
    with pytest.raises(RecipeError, match="says no target"):
        schemes("--scheme-name", name)


def test_flags_that_contradict_each_other(tmp_path):
    with pytest.raises(RecipeError, match="--schemes goes without"):
        schemes("--schemes", "top25", "--coverage", "0.5")
    with pytest.raises(RecipeError, match="--images goes with"):
        here(tmp_path, "--images", "x")
    for flag in (("--score-size", "4"), ("--auto-quantize-method", "kl_div"), ("--engine", "native")):
        with pytest.raises(RecipeError, match="nothing is measured"):
            here(tmp_path, "--measurement", "m.json", *flag)


def test_what_captions_may_be(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2017.json").write_text("{}")
    annotations = str(tmp_path / "annotations" / "captions_val2017.json")
    coco = {"kind": "coco", "path": str(tmp_path), "split": "val2017", "annotations": annotations}
    assert driver.data_of(tmp_path) == driver.data_of(Path(annotations)) == coco
    elsewhere = driver.data_of(Path(annotations), tmp_path / "pictures" / "few")
    assert elsewhere == {**coco, "path": str(tmp_path / "pictures"), "split": "few"}
    assert driver.data_of(tmp_path / "pairs.jsonl")["kind"] == "image_text"
    assert driver.data_of(tmp_path / "captions.txt")["kind"] == "text"
    with pytest.raises(RecipeError, match="--images"):
        driver.data_of(tmp_path / "captions.txt", tmp_path)


def test_the_engine_brings_its_method_unless_told_otherwise(tmp_path):
    def settings(earlier, *flags):
        flags = driver.parse([*flags, "--out-root", str(tmp_path)])
        found = driver.recipe_of(flags, tmp_path / "autoquant", copy.deepcopy(earlier)).measurement
        return found.engine, found.method

    assert settings({}) == ("native", "fisher")
    assert settings({}, "--engine", "modelopt") == ("modelopt", "gradient")
    assert settings({}, "--auto-quantize-method", "kl_div") == ("native", "kl_div")
    text = {"data": {"kind": "text", "path": "captions.txt"}, "sequence_length": 512}
    common = {"model": {"path": "m"}, "calibration": text, "held_out": [{"name": "captions"}]}
    fisher = {**common, "measurement": {"engine": "native", "method": "fisher"}}
    assert settings(fisher, "--engine", "modelopt") == ("modelopt", "gradient")
    gradient = {**common, "measurement": {"engine": "modelopt", "method": "gradient"}}
    assert settings(gradient) == ("modelopt", "gradient")  # a run of before keeps what it has
    assert settings(gradient, "--engine", "native") == ("native", "gradient")
    with pytest.raises(RecipeError, match="fisher needs engine: native"):
        settings(gradient, "--auto-quantize-method", "fisher")


def test_coco_pairs_get_room_and_a_second_set_of_plain_text(tmp_path):
    flags = driver.parse(["--captions", str(tmp_path), "--out-root", str(tmp_path)])
    recipe = driver.recipe_of(flags, tmp_path / "autoquant", {})
    assert recipe.calibration[0].sequence_length == 1024
    assert [(s.name, s.sequence_length) for s in recipe.held_out] == [("image_text", 1024), ("prose", 512)]


def test_a_recipe_with_several_calibration_sets_ran_here_before(tmp_path):
    text = {"kind": "text", "path": str(tmp_path / "text.txt")}
    sets = [
        {"data": {"kind": "image_text", "path": str(tmp_path / "pairs.jsonl")}, "sequence_length": 600},
        {"data": text, "sequence_length": 200},
    ]
    recipe = {"model": {"path": "m"}, "calibration": sets, "held_out": [{"name": "a", "data": text}], "measurement": {}}
    recipe = parse_recipe({**recipe, "schemes": [{"name": "x", "coverage": 1}], "output": "o"}, "recipe")
    earlier = recipe.model_dump(mode="json")

    def recipe_of(*flags):
        flags = driver.parse([*flags, "--out-root", str(tmp_path)])
        return driver.recipe_of(flags, tmp_path / "autoquant", copy.deepcopy(earlier))

    kept = recipe_of()
    assert [spec.sequence_length for spec in kept.calibration] == [600, 200]
    assert [spec.sequence_length for spec in kept.held_out] == [200]
    with pytest.raises(RecipeError, match="calibrated on 2 sets: --calib-size"):
        recipe_of("--calib-size", "4")
    (one,) = recipe_of("--captions", str(tmp_path / "other.txt"), "--batch-size", "2").calibration
    assert (one.samples, one.sequence_length, one.batch_size) == (48, 512, 2)


def test_coco_directory_from_end_to_end(tmp_path):
    pairs = [json.loads(line) for line in (DEMO / "data" / "heldout.jsonl").read_text().splitlines()[:10]]
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    (tmp_path / "coco" / "val2017").mkdir()
    names = [f"{index:012d}.png" for index in range(len(pairs))]
    for name, pair in zip(names, pairs, strict=True):
        (tmp_path / "coco" / "val2017" / name).write_bytes(base64.b64decode(pair["image"].partition(",")[2]))
    content = {
        "images": [{"id": index, "file_name": name} for index, name in enumerate(names)],
        "annotations": [{"id": i, "image_id": i, "caption": pair["text"]} for i, pair in enumerate(pairs)],
    }
    (tmp_path / "coco" / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    where = ["--model-dir", DEMO / "qwen2_5_vl_digits", "--captions", tmp_path / "coco"]
    here(tmp_path / "out", *where, *TINY, "--schemes", "top50", "--kv-cache", "fp8")
    record = Measurement.read(tmp_path / "out" / "autoquant" / "measurement.json")
    assert record.calibration.kind == "coco"
    assert all(candidate.image_scores for candidate in record.candidates)  # image positions apart
    evaluation = Evaluation.read(tmp_path / "out" / "autoquant" / "evaluations" / "fp8_autoquant_top50.json")
    assert list(evaluation.data) == ["image_text", "prose"]


def test_the_recipe_is_what_the_driver_does_by_default(monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = read_recipe(ROOT / "recipes" / "qwen2_5_vl_3b_fp8_coco2017.yaml")
    assert driver.recipe_of(driver.parse([]), Path(recipe.output), {}) == recipe


def test_serving_says_what_is_missing(tmp_path):
    script = SCRIPTS / "run_qwen2_5_vl_3b_vllm_fp8.py"
    result = call(warm.python(), script, "--out-root", tmp_path, "--scheme-name", "fp8_autoquant_top50")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'quantized' / 'fp8_autoquant_top50_coco2017'} holds no checkp")
    (tmp_path / "config.json").write_text("{}")
    result = call(warm.python(), script, "--model-dir", tmp_path, "--image", tmp_path / "nowhere.png")
    assert result.returncode == 2
    assert "nowhere.png does not exist" in result.stderr
    without = tmp_path / "python"
    without.write_text("#!/bin/sh\necho\n")  # an interpreter that finds no vLLM
    without.chmod(0o755)
    for python in (tmp_path / "nowhere", without):
        result = call(warm.python(), script, "--model-dir", tmp_path, "--python", python)
        assert result.returncode == 2
        assert "make vllm-env" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def files_of(directory):
    return {path.relative_to(directory): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_the_plans_of_the_published_measurement_are_what_the_script_writes(tmp_path):
    published.write(MANIFEST, tmp_path)
    assert files_of(tmp_path) == files_of(published.EXAMPLE)
    assert len(list((tmp_path / "schemes").iterdir())) == 15


def test_modelopts_own_choice_is_the_optimum_by_another_solver():
    content = json.loads(MANIFEST.read_text())
    entries = list(content["layer_sensitivity"].values())
    elements = np.array([max(entry["costs"]) for entry in entries])
    scores = np.array([max(entry["scores"]) for entry in entries])
    saved = LinearConstraint(8 * elements[None], lb=5 * elements.sum())  # 16 bits less 8 of what is chosen: 11 at most
    result = milp(
        scores, integrality=np.ones(len(scores)), bounds=Bounds(0, 1), constraints=saved, options=dict(mip_rel_gap=0)
    )
    chosen = result.x > 0.5
    bits = 16 - 8 * elements[chosen].sum() / elements.sum()
    state = content["autoquant_state"]
    assert state["score"] == pytest.approx(scores[chosen].sum(), rel=1e-12)
    assert state["constraints"]["effective_bits"] == pytest.approx(bits, rel=1e-12)
    assert len(entries) == 275
