"""NVFP4 checkpoints that ModelOpt's tensor made: pre-flight by each runtime's rules, and vLLM's own loader."""

import pytest
import torch

import broken_checkpoints as broken
from bitladder.runtimes.registry import VERSIONS
from bitladder.runtimes.vllm.load import load_all
from test_runtime_formats import FP4, FP4_W, FP8, LINEARS, NAMES, PC_PT, found, make, manifest

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# attention in four bits on both sides, gate and up with 16-bit inputs, down in FP8; the second layer stays in BF16
MIX = {
    name: FP4 if name.endswith(ATTENTION) else FP8 if name.endswith("down_proj") else FP4_W
    for name in LINEARS
    if not name.startswith("model.layers.1.")
}
Q, K, OUT = broken.Q, broken.K, "model.layers.0.self_attn.o_proj"
KERNELS = {"nvfp4": "EmulationNvFp4LinearKernel", "nvfp4_w4a16": "EmulationNvFp4W4A16LinearKernel"}
GATE = "model.layers.0.mlp.gate_proj"


def put(name, value):
    return lambda tensors: tensors.update({name: value(tensors.get(name))})


@pytest.mark.parametrize("runtime", [*VERSIONS])
@pytest.mark.parametrize("algorithm", [FP4, FP4_W])
def test_a_uniform_checkpoint_passes_where_the_runtime_has_the_format(tmp_path, runtime, algorithm):
    result, seen = found(make(tmp_path / "x", dict.fromkeys(LINEARS, algorithm), mix=False), runtime)
    if runtime == "tensorrt_llm" and algorithm == FP4_W:
        assert [kind for kind, severity, _ in seen if severity == "error"] == ["unsupported_format"]
        assert "has no W4A16_NVFP4" in result.findings[0].problem
        return
    assert [one for one in seen if one[1] == "error"] == []
    formats = {layer.name: layer.format for layer in result.layers}
    assert {formats[name] for name in LINEARS} == {NAMES[algorithm]}
    support = VERSIONS[runtime].support(NAMES[algorithm])
    assert {layer.method for layer in result.layers if layer.format != "bf16"} == {support.method}


@pytest.mark.parametrize("runtime", ["vllm", "vllm==0.25.1", "sglang"])
def test_a_mix_passes_and_each_layer_runs_in_its_own_format(tmp_path, runtime):
    result, seen = found(make(tmp_path / "x", MIX, mix=True), runtime)
    assert [one for one in seen if one[1] == "error"] == []
    assert {layer.name: layer.format for layer in result.layers} == {
        layer.name: NAMES.get(MIX.get(layer.name), "bf16") for layer in result.layers
    }


def test_tensorrt_llm_refuses_what_it_has_no_algorithm_for(tmp_path):
    assert found(make(tmp_path / "x", MIX, mix=True), "tensorrt_llm")[0].verdict in (
        "unsupported_format",
        "wrong_format",
    )
    both = {name: FP4 if algorithm == FP4_W else algorithm for name, algorithm in MIX.items()}
    assert found(make(tmp_path / "y", both, mix=True), "tensorrt_llm")[0].verdict == "ok"


BROKEN = [
    ("no_blocks", lambda t: t.pop(f"{OUT}.weight_scale"), "missing_tensor", f"{OUT}.weight_scale"),
    ("no_scale_above", lambda t: t.pop(f"{OUT}.weight_scale_2"), "missing_tensor", f"{OUT}.weight_scale_2"),
    ("no_input_scale", lambda t: t.pop(f"{OUT}.input_scale"), "missing_tensor", f"{OUT}.input_scale"),
    ("blocks_in_float32", put(f"{OUT}.weight_scale", lambda s: s.float()), "bad_scale", f"{OUT}.weight_scale"),
    ("a_block_less", put(f"{OUT}.weight_scale", lambda s: s[:, 1:].contiguous()), "bad_scale", f"{OUT}.weight_scale"),
    ("transposed", put(f"{GATE}.weight_scale", lambda s: s.t().contiguous()), "bad_scale", f"{GATE}.weight_scale"),
    (
        "nan_block",
        put(f"{OUT}.weight_scale", lambda s: s.float().index_fill(0, torch.tensor(3), float("nan")).to(s.dtype)),
        "bad_scale",
        f"{OUT}.weight_scale",
    ),
    (
        "negative_block",
        put(f"{OUT}.weight_scale", lambda s: (-s.float()).to(s.dtype)),
        "bad_scale",
        f"{OUT}.weight_scale",
    ),
    ("zero_above", put(f"{OUT}.weight_scale_2", lambda s: s * 0), "bad_scale", f"{OUT}.weight_scale_2"),
    ("many_above", put(f"{OUT}.weight_scale_2", lambda s: s.repeat(3)), "bad_scale", f"{OUT}.weight_scale_2"),
    ("unequal_above", put(f"{K}.weight_scale_2", lambda s: s * 2), "unequal_scales", f"{Q}.weight_scale_2"),
    (
        "fp8_with_two",
        put("model.layers.0.mlp.down_proj.weight_scale_2", lambda _: torch.tensor(1.0)),
        "unexpected_tensor",
        "model.layers.0.mlp.down_proj.weight_scale_2",
    ),
    ("input_of_16_bits", put(f"{GATE}.input_scale", lambda _: torch.tensor(1.0)), "unexpected_tensor", None),
    (
        "unpacked",
        put(f"{OUT}.weight", lambda w: torch.stack((w & 15, w >> 4), -1).flatten(-2)),
        "shape",
        f"{OUT}.weight",
    ),
    ("fp8_codes", put(f"{OUT}.weight", lambda w: torch.zeros(len(w), 2 * w.shape[1]).to(broken.E4M3)), None, None),
    ("no_codes", lambda t: t.pop(f"{OUT}.weight"), "missing_tensor", f"{OUT}.weight"),
]


@pytest.mark.parametrize(("name", "change", "error", "where"), BROKEN, ids=[case[0] for case in BROKEN])
def test_what_is_not_as_the_format_has_it(tmp_path, name, change, error, where):
    _, seen = found(make(tmp_path / "x", MIX, mix=True, change=change))
    errors = [(kind, place) for kind, severity, place in seen if severity == "error"]
    assert errors
    assert error is None or error in {kind for kind, _ in errors}, errors
    assert where is None or where in {place for _, place in errors}, errors


LISTS = [
    ("not_listed", {name: one for name, one in MIX.items() if name != OUT}, ("wrong_format", "error", OUT)),
    ("as_fp8", {**MIX, OUT: FP8}, ("wrong_format", "error", OUT)),
    ("fp8_as_fp4", {**MIX, broken.DOWN: FP4}, ("wrong_format", "error", broken.DOWN)),
    ("sixteen_bits", {**MIX, "model.layers.1.self_attn.o_proj": FP4}, ("wrong_format", "error", None)),
    ("k_not_listed", {name: one for name, one in MIX.items() if name != K}, ("ambiguous_exclude", "warning", Q)),
    ("as_w4a16", {**MIX, OUT: FP4_W}, ("unexpected_tensor", "error", f"{OUT}.input_scale")),
]


@pytest.mark.parametrize(("name", "listed", "expected"), LISTS, ids=[case[0] for case in LISTS])
def test_lists_that_are_not_what_is_stored(tmp_path, name, listed, expected):
    _, seen = found(make(tmp_path / "x", MIX, mix=True, listed=listed))
    kind, severity, where = expected
    assert any((k, s) == (kind, severity) and where in (None, place) for k, s, place in seen), seen


def test_the_manifest_promises_one_of_the_formats_that_store_alike(tmp_path):
    directory = make(tmp_path / "x", MIX, mix=True)
    promised = {name: NAMES[algorithm] for name, algorithm in MIX.items()}
    manifest(directory, promised)
    assert [one for one in found(directory)[1] if one[1] == "error"] == []
    manifest(directory, {**promised, OUT: NAMES[FP4_W]})
    assert ("wrong_format", "error", OUT) in found(directory)[1]


def test_an_algorithm_alone_makes_no_fp4(tmp_path):
    """FP8 with one scale a tensor that calls itself NVFP4."""
    directory = make(tmp_path / "x", dict.fromkeys(LINEARS, FP8), mix=False, listed=dict.fromkeys(LINEARS, FP4))
    assert found(directory)[0].verdict == "unsupported_format"
    rows = make(tmp_path / "y", dict.fromkeys(LINEARS, PC_PT), mix=False, listed=dict.fromkeys(LINEARS, FP4))
    assert found(rows)[0].verdict != "ok"


# --- vLLM itself -----------------------------------------------------------------------------------------------------

OF_LOADER = (
    "no_blocks",
    "no_scale_above",
    "no_input_scale",
    "nan_block",
    "unequal_above",
    "zero_above",
    "unpacked",
    "no_codes",
)


def half_loaded(tensors):
    """One of the three modules that are fused lacks its codes."""
    del tensors[f"{K}.weight"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, vllm_warm):
    """`{name: result of vLLM's loader}`, through one child."""
    root = tmp_path_factory.mktemp("nvfp4")
    changes = {case[0]: case[1] for case in BROKEN}
    made = {
        "nvfp4": make(root / "nvfp4", dict.fromkeys(LINEARS, FP4), mix=False),
        "w4a16": make(root / "w4a16", dict.fromkeys(LINEARS, FP4_W), mix=False),
        "mix": make(root / "mix", MIX, mix=True),
        "promised": make(root / "promised", MIX, mix=True),
        "half": make(root / "half", MIX, mix=True, change=half_loaded),
    }
    manifest(made["promised"], {**{name: NAMES[one] for name, one in MIX.items()}, OUT: NAMES[FP4_W]})
    made |= {name: make(root / name, MIX, mix=True, change=changes[name]) for name in OF_LOADER}
    made["not_listed"] = make(root / "not_listed", MIX, mix=True, listed=LISTS[0][1])
    results = load_all([*made.values()], vllm_warm, isolated=False, timeout=60)
    return dict(zip(made, results, strict=True))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["nvfp4", "w4a16", "mix"])
def test_vllms_loader_runs_each_layer_in_its_format(loaded, name):
    result = loaded[name]
    assert [(f.error_class, f.where, f.problem) for f in result.findings] == []
    assert result.reached == "inspection"
    expected = {"nvfp4": dict.fromkeys(LINEARS, FP4), "w4a16": dict.fromkeys(LINEARS, FP4_W), "mix": MIX}[name]
    assert {layer.name: layer.format for layer in result.layers} == {
        layer.name: NAMES[expected[layer.name]] if layer.name in expected else "bf16" for layer in result.layers
    }
    kernels = {(layer.format, layer.kernel) for layer in result.layers if layer.format.startswith("nvfp4")}
    assert kernels <= KERNELS.items()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "verdict", "where"),
    [
        ("promised", "wrong_format", OUT),
        ("no_blocks", "missing_tensor", f"{OUT}.weight_scale"),
        ("no_scale_above", "missing_tensor", f"{OUT}.weight_scale_2"),
        ("no_input_scale", "missing_tensor", f"{OUT}.input_scale"),
        ("nan_block", None, f"{OUT}.weight_scale"),
        ("zero_above", "bad_scale", f"{OUT}.weight_scale_2"),
        ("unequal_above", "unequal_scales", None),
        ("unpacked", "shape", f"{OUT}.weight"),  # whose first half it would take without a word
        ("no_codes", "missing_tensor", f"{OUT}.weight"),  # packed codes that nothing loads
        ("half", "missing_tensor", f"{K}.weight"),  # a part of a fused weight
        ("not_listed", None, None),
    ],
)
def test_vllms_loader_and_what_is_wrong(loaded, name, verdict, where):
    result = loaded[name]
    assert result.verdict != "ok"
    assert verdict in (None, result.verdict), [(f.error_class, f.where, f.problem) for f in result.findings]
    assert where is None or where in {f.where for f in result.findings}
