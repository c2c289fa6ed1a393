"""A recipe whose checkpoints are in compressed-tensors' layout, from measuring to the report."""

import json

import pytest

from bitladder.errors import PlanError
from bitladder.records import CheckpointManifest
from bitladder.steps.run import run
from test_pipeline import files, work_of  # noqa: F401  (fixture)

CARRIED = {"carrier": "compressed-tensors"}
FORMATS = ["int8", "nvfp4_w4a16"]
SCHEMES = [{"name": "all8", "coverage": 1.0, "format": "int8"}, {"name": "mix", "effective_bits": 6.5}]


def recipe(files, output, export):  # noqa: F811
    measurement = {"formats": FORMATS, "engine": "native"}
    controls = {"kinds": ["random"], "seeds": 1}
    return work_of(files, output, measurement=measurement, schemes=SCHEMES, export=export, controls=controls)


def test_a_run_ends_with_checkpoints_that_transformers_reads(files, tmp_path):  # noqa: F811
    output = tmp_path / "out"
    run(recipe(files, output, CARRIED))
    assert json.loads((output / "verification.json").read_text())["checkpoints"][0]["findings"] == []
    for name in ("all8", "mix"):
        directory = output / "checkpoints" / name
        assert CheckpointManifest.read(directory / CheckpointManifest.FILE_NAME).carrier == "compressed-tensors"
        card = (directory / "README.md").read_text()
        assert "- compressed-tensors" in card
        assert "from_pretrained(directory" in card
        assert (output / "evaluations" / f"{name}.json").exists()
    (arm,) = json.loads((output / "evidence.json").read_text())["arms"]  # of the mix; of one format there is no other
    assert arm["scheme"]["name"] == "mix.random0"
    assert {result["metric"] for result in arm["results"]} >= {"kl"}
    assert "Against chance: `mix` has" in (output / "report.md").read_text()
    again = recipe(files, output, CARRIED)
    run(again)
    assert again.done == []
    with pytest.raises(PlanError, match=r"scheme all8: int8 is no format of modelopt .* export\.carrier: compressed"):
        run(recipe(files, output, {}))
