"""The table of kernels: held to what vLLM's own code chooses, to what is scored for a device, and to the page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bitladder.formats import FORMATS
from bitladder.formats.base import AS_STORED, POWERS_OF_TWO
from bitladder.formats.targets import TARGETS
from bitladder.runtimes.vllm.kernels import CARRIED_KERNELS, KERNELS
from bitladder.runtimes.vllm.rules import VllmRules

ROOT = Path(__file__).parents[1]
CAPABILITIES = {"80": "ampere", "86": "ampere", "89": "ada", "90": "hopper", "100": "blackwell", "120": "blackwell_rtx"}
ENDS = ("ScaledMMLinearKernel", "LinearKernel", "Kernel")


def short(kernel):
    """Return a kernel's class as the table names it."""
    return kernel.removesuffix(next(end for end in ENDS if kernel.endswith(end)))


@pytest.fixture(scope="module")
def chosen(vllm_python):
    """{compute capability or "cpu": {format: kernel}}, and "least": {class: compute capability}."""
    script = [str(vllm_python), str(ROOT / "tests" / "vllm_choice.py"), *CAPABILITIES]
    result = subprocess.run(script, capture_output=True, text=True, check=True, timeout=300)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {key: value for line in lines for key, value in line.items()}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_table_has_the_kernels_that_vllm_chooses(chosen, capability):
    target, found = CAPABILITIES[capability], dict(chosen[capability])
    assert short(found.pop("carried fp8")) == CARRIED_KERNELS["fp8"].kernel
    rounded = found.pop("powers of two")
    assert {name: short(kernel) for name, kernel in found.items()} == {
        name: KERNELS[VllmRules.version][name].cells[target].kernel for name in FORMATS
    }
    block = KERNELS[VllmRules.version]["fp8_block"].cells[target]
    assert rounded == (block.arithmetic == POWERS_OF_TWO)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("told", "fp8", "fp8_block"),
    [("alone", "cpu_amx", "cpu_amx"), ("disabled", "cpu", "cpu_amx"), ("probed", "cpu", "cpu")],
)
def test_a_cpu_with_amx_is_probed_as_one_without(chosen, told, fp8, fp8_block):
    found, rows = chosen["amx"][told], KERNELS[VllmRules.version]
    assert short(found["fp8"]) == rows["fp8"].cells[fp8].kernel
    assert found["fp8_block"] is None or short(found["fp8_block"]) == rows["fp8_block"].cells[fp8_block].kernel
    assert (found["fp8_block"] is None) == (fp8_block == "cpu")


@pytest.mark.timeout(400)
def test_the_classes_ask_for_the_capability_that_the_rules_say(chosen):
    least = chosen["least"]
    for row in VllmRules.CARRIED.values():
        assert least[row.method] == row.capability
    configs = {"fp8": "Fp8", "fp8_pc_pt": "Fp8", "fp8_block": "Fp8", "mxfp8": "MxFp8"}
    for name, row in VllmRules.SUPPORT.items():
        assert least[f"ModelOpt{configs.get(name, 'NvFp4')}Config"] == row.capability
    assert least["ModelOptMixedPrecisionConfig"] == 75
    assert least["CompressedTensorsW8A16Fp8"] == 75


@pytest.mark.timeout(400)
def test_cpus_quantise_anew_where_nothing_changes_and_stop_where_something_would(chosen):
    assert chosen["requantised"] == {"equal": True, "unequal": None}


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_scored_for_a_device_is_what_its_kernels_compute(target):
    known = TARGETS[target]
    for name, row in KERNELS[VllmRules.version].items():
        cell = row.cells[target]
        lent = cell.note is not None and "lends" in cell.note and cell.kernel is None
        assert (name in known.unsupported) == (cell.arithmetic is None and not lent), name
        if cell.arithmetic is not None:
            assert known.arithmetic.get(name, AS_STORED) == cell.arithmetic, name


def test_every_format_and_device_has_a_cell():
    assert KERNELS[VllmRules.version].keys() == FORMATS.keys()
    for rows in KERNELS.values():
        for row in rows.values():
            assert tuple(row.cells) == tuple(TARGETS)
            assert row.source
            for cell in row.cells.values():
                assert cell.arithmetic is not None or cell.note
                assert cell.seen is None or (ROOT / cell.seen).exists()


def test_the_page_shows_the_tables():
    result = subprocess.run(
        [sys.executable, "scripts/runtime_tables.py"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (ROOT / "docs" / "runtimes.md").read_text() == result.stdout, "run `make docs`"
