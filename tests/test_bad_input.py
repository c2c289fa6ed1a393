"""What people and accidents bring: every kind is refused in one line with exit status 2, at once, or is understood."""

import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import transformers

import conftest
from bitladder import reading
from bitladder.data.processors import load_processor
from bitladder.errors import BitladderError, ModelError, OutputError, RecipeError, UnsupportedModel, foreign
from bitladder.models import weights
from bitladder.models.headers import read_header
from bitladder.models.loading import load_config
from bitladder.models.target import find_target
from bitladder.recipe import read_recipe
from bitladder.storage import atomic_write

RECIPE = """
model: {path: model}
calibration: {data: {kind: text, path: data.txt}, samples: 4, seed: 0}
schemes: [{name: half, coverage: 0.5}]
output: runs
"""


def recipe_with(tmp_path, old, new):
    assert old in RECIPE
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace(old, new), encoding="utf-8")
    return path


BOMB = "[&a0 [x,x,x,x,x,x,x,x,x,x], " + ", ".join(f"&a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)) + "]"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("coverage: 0.5", "coverage: yes", "coverage"),
        ("coverage: 0.5", "coverage: true", "not true"),
        ("seed: 0", "seed: true", "not true"),
        ("samples: 4", "samples: 1:30", "samples"),
        ("samples: 4", "samples: 2020-01-01", "samples"),
        ("samples: 4", "samples: " + "9" * 5000, "is not YAML"),
        ("seed: 0", "seed: " + BOMB, "aliases"),
        ("seed: 0", "seed: &a [*a]", "is not YAML"),
        ("path: model", "path: " + "[" * 5000 + "]" * 5000, "levels of nesting"),
        ("path: model", "path: " + "{a: " * 3000 + "1" + "}" * 3000, "levels of nesting"),
        ("path: model", 'path: "a\\0b"', "no name can have"),
        ("output: runs", 'output: "\\ud800"', "no name can have"),
        ("output: runs", "output: " + "a" * 300, "255 bytes"),
        ("path: model", "path: " + "a" * 300, "255 bytes"),
        ("path: model", "path: org/" + "a" * 300, "255 bytes"),
        ("path: data.txt", "path: ~nouser_zz/x", "can't be used"),
        ("name: half", "name: " + "n" * 101, "at most 100"),
        ("coverage: 0.5", "max_kl: 1e300", "max_kl"),
        ("output: runs", "output: runs\nmeasurement: {damping: 1e300}", "damping"),
    ],
)
def test_a_recipe_that_is_refused(tmp_path, old, new, words):
    path = recipe_with(tmp_path, old, new)
    started = time.process_time()
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert time.process_time() - started < 5
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("sign", ["\0", "\x07", "\ud800"], ids=["NUL", "bell", "surrogate"])
def test_characters_that_yaml_has_not_are_refused(sign, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(f"output: a{sign}b\n".encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)


def test_text_that_old_yaml_takes_for_something_else_is_text(tmp_path):
    schemes = "[{name: yes, coverage: 5e-1}, {name: 2020-13-45, coverage: 1}, {name: 'on', coverage: 0.25}]"
    recipe = read_recipe(recipe_with(tmp_path, "[{name: half, coverage: 0.5}]", schemes))
    assert [(s.name, s.coverage) for s in recipe.schemes] == [("yes", 0.5), ("2020-13-45", 1.0), ("on", 0.25)]
    assert read_recipe(recipe_with(tmp_path, "samples: 4", "samples: 010")).calibration[0].samples == 10


def special_files(tmp_path):
    """A pipe, a device and a socket."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    here = socket.socket(socket.AF_UNIX)
    here.bind(str(tmp_path / "s"))
    here.close()
    return [tmp_path / name for name in ("pipe", "zero", "s")]


def test_only_regular_files_are_opened(tmp_path):
    for path in special_files(tmp_path):
        with pytest.raises(OSError):
            reading.read_bytes(path)
        with pytest.raises(RecipeError, match="can't be read"):
            read_recipe(path)
        with pytest.raises(ModelError, match="can't be read"):
            read_header(path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
def test_a_pipe_in_a_model_is_refused_at_once(tmp_path, name):
    conftest.save_model(transformers.LlamaForCausalLM, conftest.llama_config(num_hidden_layers=1), tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError):
        find_target(tmp_path)
    if name != "model.safetensors":
        read = load_config if name == "config.json" else load_processor
        with pytest.raises(ModelError):
            read(tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    conftest.save_model(transformers.LlamaForCausalLM, conftest.llama_config(num_hidden_layers=1), directory)
    return directory


def changed(tiny, tmp_path, **changes):
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "x"},
        {"head_dim": 0},
        {"intermediate_size": -1},
        {"vocab_size": -1},
        {"rope_parameters": {"rope_type": "zzz"}},
        {"rope_parameters": -1},
        {"dtype": [1]},
        {"num_attention_heads": float("nan")},
        {"architectures": ["pipeline"]},
        {"architectures": ["LlamaConfig"]},
        {"architectures": ["__version__"]},
        {"architectures": ["Trainer"]},
        {"architectures": ["AutoModelForCausalLM"]},
        {"architectures": ["MixtralForCausalLM"]},
        {"attn_implementation": "evil/kernel"},
    ],
)
def test_a_configuration_that_transformers_trips_over_is_refused_in_one_line(tiny, tmp_path, changes):
    with pytest.raises(ModelError) as caught:
        find_target(changed(tiny, tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [None, {"a": -1}])
def test_a_tokenizer_that_cannot_be_read_is_refused_in_one_line(tiny, tmp_path, change):
    directory = changed(tiny, tmp_path)
    content = json.loads((directory / "tokenizer.json").read_text())
    model = change and {**content["model"], "vocab": {**content["model"]["vocab"], **change}}
    (directory / "tokenizer.json").write_text(json.dumps({**content, "model": model}))
    with pytest.raises(ModelError, match="no usable tokenizer") as caught:
        load_processor(directory)
    assert "\n" not in str(caught.value)


def rewritten(path, change):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = change(header, next(name for name in header if name != "__metadata__"))
    text = (json.dumps(header) if text is None else text).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h, n: h[n].update(dtype="XX"),
        lambda h, n: h[n].update(dtype="F4"),
        lambda h, n: h[n].update(dtype=["BF16"]),
        lambda h, n: h[n].update(shape=[-64, -64]),
        lambda h, n: h[n].update(data_offsets=[-8192, 0]),
        lambda h, n: h[n].update(data_offsets=[float(x) for x in h[n]["data_offsets"]]),
        lambda h, n: h[n].update(data_offsets=[x + 2 for x in h[n]["data_offsets"]]),
        lambda h, n: h.update(__metadata__={"format": 1}),
        lambda h, n: h.update(__metadata__=[1]),
        lambda h, n: '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_what_safetensors_refuses_is_refused_when_headers_are_read(tiny, tmp_path, change):
    path = changed(tiny, tmp_path) / "model.safetensors"
    rewritten(path, change)
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(path, framework="pt"):
        pass
    with pytest.raises(ModelError):
        weights.WeightFiles.open(tmp_path)


def test_a_tensor_that_is_described_twice_is_refused(tiny, tmp_path):
    path = changed(tiny, tmp_path) / "model.safetensors"
    rewritten(path, lambda h, n: f"{json.dumps(h)[:-1]}, {json.dumps(n)}: {json.dumps(h[n])}}}")
    with pytest.raises(ModelError, match="described twice"):
        weights.WeightFiles.open(tmp_path)


def test_tensors_are_those_that_safetensors_reads(tiny):
    files = weights.WeightFiles.open(tiny)
    with safetensors.safe_open(tiny / "model.safetensors", framework="pt") as reference:
        for name in files.tensors:
            wanted, got = reference.get_tensor(name), files.load(name)
            assert got.dtype == wanted.dtype
            assert got.equal(wanted)


def test_loading_a_tensor_does_not_parse_the_file_again(tiny, monkeypatch):
    files = weights.WeightFiles.open(tiny)
    monkeypatch.setattr(weights, "read_header", lambda path: pytest.fail("read again"))
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed again"))
    name = next(iter(files.tensors))
    files.load(name)
    before = files.load(name).clone()
    files.load(name).zero_()  # private: the file stays
    assert files.load(name).equal(before)


@pytest.mark.parametrize("path", ["/proc/x/y", "/dev/null/x", "a" * 300])
def test_an_output_that_cannot_be_written_is_one_error(path):
    with pytest.raises(OutputError):
        atomic_write(Path(path), "x")


def test_foreign_errors_become_ours_and_a_lack_of_memory_stays():
    for error in (KeyError("zzz"), ValueError(""), RecursionError("deep"), Exception("odd\nsecond line")):
        with pytest.raises(UnsupportedModel) as caught, foreign(UnsupportedModel, "it can't be read", "mend it"):
            raise error
        assert str(caught.value).startswith("it can't be read: ")
        assert "\n" not in str(caught.value)
    lacking = ("CUDA out of memory", "DefaultCPUAllocator: can't allocate memory", "can't start new thread")
    for error in (MemoryError(), *map(RuntimeError, lacking), BitladderError("ours")):
        with pytest.raises(type(error)), foreign(UnsupportedModel, "it can't be read"):
            raise error


def test_what_a_user_named_with_a_line_end_is_still_one_line(tmp_path):
    command = [sys.executable, "-m", "bitladder.cli", "inspect", str(tmp_path / "a\nb\u2028c")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: model directory ")
    assert "a\\nb\\nc" in line


def test_what_can_be_no_hub_id_is_not_asked_of_the_hub(tmp_path):
    command = [sys.executable, "-m", "bitladder.cli", "inspect", "a/b/c"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: model directory {tmp_path / 'a/b/c'} does not exist; check model.path\n"


@pytest.mark.parametrize("error", ["MemoryError()", 'RuntimeError("DefaultCPUAllocator: can\'t allocate memory")'])
def test_the_command_line_says_that_memory_is_lacking_with_status_2(error):
    code = (
        "import sys, bitladder.cli as c, bitladder.recipe as r\n"
        f"def fail(path): raise {error}\n"
        "r.read_recipe = fail\nsys.argv = ['bitladder', 'measure', 'x.yaml']\nc.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: out of memory; ")


def test_the_command_line_says_what_the_system_says_with_status_2(tmp_path):
    code = (
        "import sys, bitladder.cli as c, bitladder.recipe as r\n"
        "def fail(path): raise OSError(5, 'Input/output error', str(path))\n"
        "r.read_recipe = fail\nsys.argv = ['bitladder', 'measure', 'x.yaml']\nc.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: x.yaml: Input/output error")


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("{report: report.md}", "its own report.md"),
        ("{report: schemes/x.md}", "its own schemes"),
        ("{checkpoints: 'probes/{scheme}.json'}", "its own probes"),
        ("{checkpoints: 'x/../measuring/{scheme}'}", "its own measuring"),
        ("{checkpoints: '../{scheme}', manifests: true}", None),
        ("{checkpoints: 'elsewhere/{scheme}', report: elsewhere/page.md}", None),
    ],
)
def test_a_layout_that_collides_with_our_own_files_is_refused_before_work(tmp_path, layout, words):
    path = recipe_with(tmp_path, "output: runs", f"output: runs\nlayout: {layout}")
    if words is None:
        assert read_recipe(path).layout.checkpoints
        return
    with pytest.raises(RecipeError, match=words):
        read_recipe(path)


def test_a_scheme_whose_checkpoint_would_be_a_file_of_ours_is_refused(tmp_path):
    path = recipe_with(tmp_path, "name: half", "name: evaluations")
    path.write_text(path.read_text() + "layout: {checkpoints: '{scheme}'}\n")
    with pytest.raises(RecipeError, match="its own evaluations"):
        read_recipe(path)
