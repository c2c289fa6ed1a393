"""What only a GPU does: products of FP8 numbers, CUDA graphs, compiled layers, streaming into its memory, the kernels.

`make test-gpu` runs these; other tests don't see a GPU.
"""

import collections
import os
import statistics

import pytest
import torch
import transformers

from bitladder.errors import MeasurementError
from bitladder.formats import FORMATS, POWERS_OF_TWO
from bitladder.measuring import candidates as taps
from bitladder.measuring import gradient, kl
from bitladder.measuring.layers import StreamedLayers
from bitladder.report.groups import rank_correlation
from conftest import llama_config, load_text, save_model
from test_native import WITHIN, measured_by, pairs
from test_positions import MODEL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("BITLADDER_TEST_GPU") != "1", reason="needs a GPU: make test-gpu"),
]
METHODS = ("gradient", "fisher", "kl_div")
BATCHES = 5  # one more than a CUDA graph is worth


@pytest.fixture
def text_job(llama, text_file):
    """A model's directory, and what it is measured on."""
    return llama, load_text(llama, text_file, samples=2 * BATCHES, batch=2)


@pytest.fixture(params=["text", "pictures"])
def job(request):
    """The same, and another with pictures: each batch of a shape of its own, which compiles all layers anew."""
    return request.getfixturevalue("text_job") if request.param == "text" else (MODEL, pairs(4, 2))


@pytest.fixture
def calls(monkeypatch):
    """How often each of these was called: a FP8 product, the replay of a CUDA graph, the loading of a layer."""
    found = collections.Counter()

    def counted(name, function):
        def call(*args, **options):
            found[name] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(torch, "_scaled_mm", counted("product", torch._scaled_mm))
    monkeypatch.setattr(gradient._Graph, "replay", counted("replay", gradient._Graph.replay))
    monkeypatch.setattr(StreamedLayers, "loaded", counted("load", StreamedLayers.loaded))
    return found


@pytest.fixture
def compiled(monkeypatch):
    """Compile layers for a job of any size."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(gradient, "_COMPILED_FROM", 0)
    monkeypatch.setattr(kl, "_COMPILED_FROM", 0)
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def measure(job, output, device="cuda", **settings):
    return measured_by("native", *job, output, device=device, **settings)


def assert_alike(one, other, within):
    """Compare sums over batches: of one batch's scores single tokens make a few per cent."""
    totals = [[found.sensitivity(candidate) for candidate in found.candidates] for found in (one, other)]
    assert totals[0] == pytest.approx(totals[1], rel=within)
    assert rank_correlation(*totals) >= 0.99


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_give_the_same_numbers(job, tmp_path, method):
    one, other = (measure(job, tmp_path / name, method=method) for name in ("one", "other"))
    assert one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize("method", METHODS)
def test_compiling_anew_gives_the_same_numbers(job, tmp_path, compiled, monkeypatch, method):
    found = []
    for name in ("one", "other"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"compiled-{name}"))
        torch._dynamo.reset()
        found.append(measure(job, tmp_path / name, method=method))
    assert compiled["unique_graphs"]
    assert found[0].fingerprint() == found[1].fingerprint()


@pytest.mark.parametrize("method", ["gradient", "kl_div"])  # fisher's signs are of another generator
def test_a_gpu_scores_as_a_cpu(job, tmp_path, method):
    gpu = measure(job, tmp_path / "gpu", method=method, dtype="float32")
    cpu = measure(job, tmp_path / "cpu", method=method, device="cpu")
    assert_alike(gpu, cpu, 0.05 if job[0] == MODEL else WITHIN["gradient"])


@pytest.mark.parametrize("method", METHODS)
def test_compiled_layers_score_as_others(job, tmp_path, request, method):
    plain = measure(job, tmp_path / "plain", method=method, dtype="float32")
    compiled = request.getfixturevalue("compiled")
    assert not compiled["unique_graphs"]
    within = (0.1 if method == "kl_div" else 0.05) if job[0] == MODEL else WITHIN["gradient"]
    assert_alike(measure(job, tmp_path / "compiled", method=method, dtype="float32"), plain, within)
    assert compiled["unique_graphs"]


OWN_SCALES = ("mxfp8", "fp8_block", "fp8_pc_pt", "int8")  # an input's


@pytest.mark.usefixtures("compiled")
def test_compiled_layers_round_inputs_as_others(tmp_path, text_file, monkeypatch):
    """In 16 bits, where a norm and the product behind it have one value in two kernels, rounded in one of them."""
    config = llama_config(hidden_size=256, intermediate_size=512, initializer_range=0.08)
    directory = save_model(transformers.LlamaForCausalLM, config, tmp_path / "model")
    job, found = (directory, load_text(directory, text_file, samples=4 * BATCHES, length=128, batch=4)), []
    for tokens in (0, 10**9):
        monkeypatch.setattr(gradient, "_COMPILED_FROM", tokens)
        one = measure(job, tmp_path / str(tokens), method="fisher", dtype="bfloat16", formats=OWN_SCALES)
        found.append({name: 0.0 for name in OWN_SCALES})
        for candidate in one.candidates:
            found[-1][candidate.format] += one.sensitivity(candidate)
    assert found[0] == pytest.approx(found[1], rel=0.15)  # 1.6 where codes and scales disagree


@pytest.mark.parametrize("method", ["gradient", "fisher"])
def test_a_graph_gives_the_bits_of_single_launches(text_job, tmp_path, calls, monkeypatch, method):
    graph = measure(text_job, tmp_path / "graph", method=method)
    assert calls["replay"] == BATCHES
    monkeypatch.setattr(gradient, "_GRAPHED_FROM", BATCHES + 1)
    single = measure(text_job, tmp_path / "single", method=method)
    assert calls["replay"] == BATCHES
    assert single.fingerprint() == graph.fingerprint()


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_kernel_rounds_as_torch(name):
    """A product that is subtracted at once has other last digits, which settle some codes."""
    from walk_kernels import check

    check(name, 256, 640, "cuda", least_equal=0.5)


def test_a_kernel_rounds_blocks_with_scales_of_powers_of_two_as_torch():
    from walk_kernels import check

    check("fp8_block", 256, 640, "cuda", least_equal=0.5, arithmetic=POWERS_OF_TWO)


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "int4_w4a16_asym_g64"])
def test_codes_of_a_gpu_do_what_those_of_a_cpu_do(text_job, tmp_path, name):
    settings = {"formats": (name,), "rounding": "compensated", "method": "gradient"}
    found = [measure(text_job, tmp_path / device, device, **settings).rounding.modules for device in ("cuda", "cpu")]
    # Of single modules, on the few rows that check them, other last digits of a product move it by some per cent.
    errors = [statistics.fmean(module.output_error for module in modules) for modules in found]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


@pytest.mark.parametrize("method", ["gradient", "kl_div"])
def test_fp8_products_score_as_values_rounded_through_fp8(text_job, tmp_path, calls, monkeypatch, method):
    products = measure(text_job, tmp_path / "products", method=method)
    assert calls["product"]
    calls.clear()
    monkeypatch.setattr(taps, "_multiplies", lambda *_: False)
    within = 0.1 if method == "kl_div" else 0.05
    assert_alike(products, measure(text_job, tmp_path / "rounded", method=method), within)
    assert not calls["product"]


@pytest.mark.parametrize("method", METHODS)
def test_a_streamed_model_gives_the_same_numbers(job, tmp_path, calls, method):
    whole = measure(job, tmp_path / "whole", method=method)
    assert not calls["load"]
    streamed = measure(job, tmp_path / "streamed", method=method, memory_gb=1.0)
    assert calls["load"]
    assert streamed.fingerprint() == whole.fingerprint()


def test_too_little_memory_is_said_in_one_line(text_job, tmp_path):
    with pytest.raises(MeasurementError, match="memory") as raised:
        measure(text_job, tmp_path, memory_gb=0.001)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("difference", [1e-2, 1.0, 30.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_give_the_exact_kl(difference, dtype):
    from kl_kernels import check

    generator = torch.Generator("cuda").manual_seed(0)
    logits, noise = torch.randn(2, 5, 151_936, generator=generator, device="cuda")
    logits, others = (5 * logits).to(dtype), (5 * logits + difference * noise).to(dtype)
    check(logits, others)
