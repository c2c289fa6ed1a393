"""The serving probe: judging by itself, and vLLM's engine on the embedded model, on a CPU."""

import contextlib
import math
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

import broken_checkpoints
from bitladder.data.pairs import prompt_inputs
from bitladder.data.processors import load_processor, tokenizer_of
from bitladder.data.samples import load_data
from bitladder.errors import BitladderError, ModelError, ProbeFailed
from bitladder.evaluation import logprobs
from bitladder.evaluation.harness.tasks import Tasks
from bitladder.evaluation.reading import load_checkpoint
from bitladder.evaluation.reference import Reference
from bitladder.recipe import DataSpec
from bitladder.records import CheckpointManifest, ModuleRecord
from bitladder.runtimes.child import Outcome
from bitladder.runtimes.vllm import child_load, child_serve
from bitladder.runtimes.vllm.exceptions import classify, classify_exit
from bitladder.runtimes.vllm.job import Question, ScoredSequence, ServeJob, SpeedJob
from bitladder.runtimes.vllm.serve import answer, judge, probe, serve_all
from bitladder.runtimes.vllm.serve import serve as serve_now
from bitladder.runtimes.vllm.serve_judging import MAX_NOISE, MIN_REPEATED, TOLERANCE_FLOOR, tolerance
from bitladder.runtimes.vllm.served import Answer, Failure, Layer, Run, Runtime, Scores, Served, Timings

SOURCE, DATA = broken_checkpoints.SOURCE, broken_checkpoints.DEMO / "data"
CPU = Runtime(version="0.32.0", device="cpu", gpu=False, threads=2, versions={})
GPU = CPU.model_copy(update={"device": "NVIDIA H100", "gpu": True})
SEQUENCES = (
    ScoredSequence("prose", (5, 6, 7), (5, 6, 7), (1, 2)),
    ScoredSequence("prose", (8, 9, 9, 4), (8, 9, 4), (3,), "x.png"),
)
JOB = ServeJob(questions=(Question("Say it."),), sequences=SEQUENCES)
EXPECTED = ((-1.0, -2.0), (-0.5,))


# --- judging ---


def served(*values, **fields):
    """Return a finished child that gave the three counted tokens these log-probabilities."""
    first, second, third = values or (-1.0, -2.0, -0.5)
    scores = (
        Scores(token_ids=(5, 6, 7), log_probs=(first, second)),
        Scores(token_ids=(8, 9, 9, 4), log_probs=(-9.0, -9.0, third)),
    )
    defaults = {"reached": "scored", "runtime": CPU, "scores": scores, "kv_cache_dtype": "auto"}
    return Served(**{**defaults, "answers": (Answer(text="A cat.", token_ids=(1, 2, 3)),), **fields})


def judged(run, source=None, job=JOB, **options):
    return judge(run, job, checkpoint="x", version="0.32.0", source=source, **options)


def test_what_agrees_passes_and_says_how_far_it_is():
    result = judged(Run(served(-1.01, -2.0, -0.5), EXPECTED), Run(served(-1.0, -2.0, -0.503), EXPECTED))
    (difference,) = result.log_probs
    assert result.ok
    assert result.verdict == "ok"
    assert (difference.split, difference.tokens) == ("prose", 3)
    assert difference.mean_abs_difference == pytest.approx(0.01 / 3)
    assert difference.source_mean_abs_difference == pytest.approx(0.001)
    assert difference.tolerance == TOLERANCE_FLOOR
    assert [a.text for a in result.answers] == ["A cat."]
    assert result.stage == "generate"


def test_the_tolerance_is_a_multiple_of_the_originals_noise_that_has_an_end():
    assert tolerance(0.0045, cpu_fp8_kv=False) == pytest.approx(0.0225)
    assert tolerance(0.0045, cpu_fp8_kv=True) == pytest.approx(0.0675)
    assert tolerance(5.0, cpu_fp8_kv=False) == tolerance(MAX_NOISE, cpu_fp8_kv=False)
    assert tolerance(None, cpu_fp8_kv=True) == MAX_NOISE


@pytest.mark.parametrize(("runtime", "verdict"), [(CPU, "ok"), (GPU, "wrong_output")])
def test_cutting_off_bits_of_the_kv_cache_is_allowed_to_cpus_only(runtime, verdict):
    source = Run(served(-1.0, -2.0, -0.515), EXPECTED)  # noise 0.005
    run = Run(served(-1.0, -2.0, -0.65, kv_cache_dtype="fp8", runtime=runtime), EXPECTED)  # 0.05
    assert judged(run, source).verdict == verdict


def test_log_probabilities_of_another_model_are_wrong_output():
    source = Run(served(-1.0, -2.0, -0.503), EXPECTED)
    result = judged(Run(served(-1.1, -2.1, -0.5), EXPECTED), source)
    assert result.verdict == "wrong_output"
    assert "0.06667 nats per token, more than 0.01" in result.findings[0].problem
    alone = judged(Run(served(-1.1, -2.1, -0.5), EXPECTED))
    assert alone.ok  # without the original's noise no more than its largest can be asked for
    assert alone.log_probs[0].source_mean_abs_difference is None


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_nan_is_wrong_output_whatever_is_expected(value):
    for expected in (EXPECTED, None):
        result = judged(Run(served(-1.0, value, -0.5), expected))
        assert result.verdict == "wrong_output"
        assert "NaN or infinite log-probabilities in 1 of 2 sequences" in result.findings[0].problem
        assert not result.log_probs


def test_without_an_evaluation_gibberish_shows_beside_the_original():
    source = Run(served())
    result = judged(Run(served(-3.0, -4.0, -1.0)), source)
    assert result.verdict == "wrong_output"
    assert "1.50 nats per token less likely" in result.findings[0].problem
    assert judged(Run(served(-1.9, -2.9, -0.6)), source).ok
    assert judged(Run(served(-3.0, -4.0, -1.0))).ok  # nothing to compare with


def test_other_tokens_than_ours_are_not_compared_but_named():
    run = served()
    other = run.scores[1].model_copy(update={"token_ids": (8, 9, 9, 9, 4), "log_probs": (-9.0,) * 4})
    result = judged(Run(run.model_copy(update={"scores": (run.scores[0], other)}), EXPECTED))
    assert result.verdict == "wrong_output"
    assert "other tokens than our evaluation in 1 of 2 sequences" in result.findings[0].problem
    assert result.log_probs[0].tokens == 2


def test_one_token_over_and_over_is_an_error_only_where_the_original_says_something():
    stuck = Answer(text="!!!!!!!!", token_ids=(0,) * MIN_REPEATED)
    run = Run(served(answers=(stuck,)), EXPECTED)
    assert judged(run, Run(served(), EXPECTED)).verdict == "wrong_output"
    assert judged(run, Run(served(answers=(stuck,)), EXPECTED)).findings == ()
    (finding,) = judged(run).findings
    assert finding.severity == "warning"
    short = Answer(text="7 7", token_ids=(7,) * (MIN_REPEATED - 1))
    assert judged(Run(served(answers=(short,)), EXPECTED), Run(served(), EXPECTED)).findings == ()


def manifest(**formats):
    modules = [
        ModuleRecord(name=n, tensor=f"{n}.weight", format=f, dtype="F8_E4M3", weight_scale=1.0, input_scale=1.0)
        for n, f in formats.items()
    ]
    return CheckpointManifest(
        scheme="s", scheme_sha256="a", measurement_sha256="b", source_sha256="c", files=(), modules=tuple(modules)
    )


def test_layers_are_compared_with_the_manifest():
    kernel = Layer(method="ModelOptLinearMethod", kernel="Cutlass", dtype="float8_e4m3fn")
    plain = Layer(method="UnquantizedLinearMethod", kernel=None, dtype="bfloat16")
    layers, names = {"qkv": kernel, "o": plain}, {"q": "qkv", "k": "qkv", "o": "o"}
    run = Run(served(layers=layers, names=names), EXPECTED)
    result = judged(run, manifest=manifest(q="fp8", o="fp8"))
    assert [(row.name, row.runtime_name, row.promised, row.format, row.kernel) for row in result.layers] == [
        ("q", "qkv", "fp8", "fp8", "Cutlass"),
        ("k", "qkv", "bf16", "fp8", "Cutlass"),
        ("o", "o", "fp8", "bf16", None),
    ]
    assert [(f.error_class, f.where) for f in result.findings] == [("wrong_format", "k"), ("wrong_format", "o")]
    assert {row.promised for row in judged(run).layers} == {None}


def test_tokens_per_second_are_of_the_medians():
    job = ServeJob(speed=SpeedJob(requests=4, prompt_tokens=100, output_tokens=11, repeats=3))
    own = served(scores=(), timings=Timings(one_token=(2.0, 1.0, 9.0), all_tokens=(6.0, 7.0, 5.0)))
    theirs = served(scores=(), timings=Timings(one_token=(4.0,), all_tokens=(14.0,)))
    prefill, decode = judged(Run(own), Run(theirs), job).throughput
    assert (prefill.phase, prefill.tokens_per_second, prefill.source_tokens_per_second) == ("prefill", 200.0, 100.0)
    assert (decode.phase, decode.tokens_per_second, decode.source_tokens_per_second) == ("decode", 10.0, 4.0)
    nothing = served(scores=(), timings=Timings(one_token=(2.0,), all_tokens=(2.0,)))
    result = judged(Run(nothing), None, job)
    assert [speed.phase for speed in result.throughput] == ["prefill"]
    assert [f.severity for f in result.findings] == ["warning"]


def test_a_failed_child_keeps_what_it_knew_and_its_traceback():
    error = Failure(type="ValueError", message="ModelOpt currently only supports: []", line="raise", traceback="whole")
    result = judged(Run(served(reached="imported", scores=(), answers=(), error=error, returncode=1)))
    assert (result.verdict, result.reached, result.traceback) == ("unsupported_format", "imported", "whole")
    assert result.device == "cpu"
    assertion = Failure(type="AssertionError", message="", line="assert a.shape == b.shape", traceback="t")
    assert judged(Run(served(error=assertion, returncode=1))).verdict == "shape"


@pytest.mark.parametrize(
    ("returncode", "timed_out", "expected"),
    [
        (-signal.SIGKILL, True, "timeout"),
        (-signal.SIGKILL, False, "out_of_memory"),
        (-signal.SIGSEGV, False, "runtime_bug"),
        (3, False, "runtime_bug"),
    ],
)
def test_a_child_that_died_without_a_word(returncode, timed_out, expected):
    outcome = Outcome(result={}, returncode=returncode, timed_out=timed_out, output="x" * 9000 + "last words")
    result = judged(Run(Served.parse(outcome)))
    assert result.verdict == expected == classify_exit(returncode, timed_out=timed_out)
    assert result.traceback.endswith("last words")
    assert len(result.traceback) < 9000


# Types and messages as vLLM 0.32.0 and 0.25.1, torch and transformers gave them.
REAL_ERRORS = [
    ("torch.OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB.", "out_of_memory"),
    ("ValueError", "Free memory on device cuda:0 (1.2/79.1 GiB) on startup is less than desired", "out_of_memory"),
    ("ValueError", "No available memory for the cache blocks. Try increasing", "out_of_memory"),
    ("RuntimeError", "Failed to infer device type, please set the environment variable", "no_device"),
    ("ModuleNotFoundError", "No module named 'vllm'", "no_runtime"),
    ("ModuleNotFoundError", "No module named 'einops'", "runtime_bug"),
    (
        "ValidationError",
        "1 validation error for ModelConfig\n  Value error, Model architectures ['X'] are not supported for now.",
        "unsupported_model",
    ),
    ("ValueError", "Detected some but not all shards of a.qkv_proj are quantized. All shards", "mixed_group"),
    (
        "RuntimeError",
        "_C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 4 argument(s).",
        "unequal_scales",
    ),
    (
        "ValueError",
        "Quantization method specified in the model config (modelopt) does not match the quantization method "
        "specified in the `quantization` argument (fp8).",
        "config_mismatch",
    ),
    ("ValueError", "ModelOpt currently only supports: ['FP8'] quantizations in vLLM.", "unsupported_format"),
    ("OSError", "Can't load image processor for '/x'. If you were trying to load it", "missing_file"),
    ("RuntimeError", "Cannot find any model weights with `/x`", "missing_file"),
    (
        "SafetensorError",
        "Error while deserializing header: incomplete metadata, file not fully covered",
        "missing_file",
    ),
    ("ValueError", "Following weights were not initialized from checkpoint: {'a'}", "missing_tensor"),
    ("ValueError", "There is no module or parameter named 'a.input_scale' in B.", "unexpected_tensor"),
    ("KeyError", "'layers.0.self_attn.qkv_proj.weight_scale'", "unexpected_tensor"),
    ("KeyError", "'text_config'", "runtime_bug"),
    ("AssertionError", "Attempted to load weight (torch.Size([2])) into parameter (torch.Size([3]))", "shape"),
    ("AssertionError", "assert param_data.shape == loaded_weight.shape", "shape"),
    ("AssertionError", "assert self.is_monolithic", "runtime_bug"),
    ("TypeError", "unhashable type: 'list'", "runtime_bug"),
]


@pytest.mark.parametrize(("kind", "message", "expected"), REAL_ERRORS)
def test_real_errors_get_their_class(kind, message, expected):
    assert classify(kind, message) == expected


# --- the expected log-probabilities ---


def load(kind, name, samples):
    return load_data(
        DataSpec(kind=kind, path=str(DATA / name)),
        load_processor(SOURCE),
        samples=samples,
        sequence_length=64,
        batch_size=4,
        seed=1,
    )


@pytest.fixture(scope="module")
def sets():
    return {"digits": load("image_text", "heldout.jsonl", 8), "captions": load("text", "captions.txt", 8)}


@pytest.fixture(scope="module")
def job(sets):
    sequences = [s for split, data in sets.items() for s in logprobs.sequences(data, split, SOURCE)]
    pictures = [Question(sample.prompt, sample.image) for sample in sets["digits"].samples]
    return ServeJob(
        questions=(*pictures, Question("Describe a picture of a cat.")),
        sequences=tuple(sequences),
        rows=Tasks(("novel_endings",), 3, tokenizer_of(load_processor(SOURCE))).rows(),
        max_tokens=16,
        speed=SpeedJob(requests=4, prompt_tokens=32, output_tokens=8, repeats=1),
    )


def test_a_picture_is_one_placeholder_in_the_prompt_and_many_for_the_model(job):
    pictures = [sequence for sequence in job.sequences if sequence.image is not None]
    assert len(pictures) == 8
    for sequence in pictures:
        assert sequence.prompt_ids.count(6) == 1  # the embedded model's image_token_id
        assert sequence.token_ids.count(6) > 1
        assert [t for t in sequence.token_ids if t != 6] == [t for t in sequence.prompt_ids if t != 6]
    texts = [sequence for sequence in job.sequences if sequence.image is None]
    assert all(s.prompt_ids == s.token_ids and s.counted == tuple(range(1, 64)) for s in texts)


def test_log_probabilities_are_those_that_the_loss_is_made_of(job, sets):
    rows = logprobs.log_probs(SOURCE, list(sets.values()))
    assert [len(row) for row in rows] == [len(sequence.counted) for sequence in job.sequences]
    with Reference.compute(SOURCE, sets["captions"]) as reference:
        values = [value for row in rows[8:] for value in row]
        assert math.exp(-math.fsum(values) / len(values)) == pytest.approx(reference.perplexity, rel=1e-5)


def test_a_job_that_the_model_cannot_hold_is_refused(job, tmp_path):
    long = ServeJob(speed=SpeedJob(prompt_tokens=2000, output_tokens=100))
    with pytest.raises(ModelError, match="holds 2048 tokens, the job needs 2100"):
        serve_now(SOURCE, tmp_path, long)
    with pytest.raises(ModelError, match="no config.json"):
        probe(tmp_path, tmp_path, job)


# --- vLLM ---


@pytest.fixture(scope="module")
def schemes(good, tmp_path_factory):
    """Good checkpoints by the name of their scheme, one of them with compensated codes."""
    compensated = broken_checkpoints.make_compensated(tmp_path_factory.mktemp("compensated"))
    return {"top50": good["top50"], "compensated": compensated}


@pytest.fixture(scope="module")
def probes(vllm_warm, good, schemes, job, sets, tmp_path_factory):
    """The original, every scheme, and a checkpoint that runs to NaN, each served once."""
    broken = tmp_path_factory.mktemp("broken") / "o_scale_missing"
    case = next(case for case in broken_checkpoints.CASES if case.name == broken.name)
    case.make(good[case.base], broken)
    directories = list(schemes.values())
    data = list(sets.values())
    expected = {directory: logprobs.log_probs(directory, data) for directory in [SOURCE, *directories]}
    return serve_all([*directories, broken], vllm_warm, job, source=SOURCE, expected=expected, timeout=220)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_scheme_is_served_as_its_files_say(probes, schemes):
    assert probes.source.verdict == "ok", probes.source.findings
    assert [layer.format for layer in probes.source.layers].count("bf16") == len(probes.source.layers) > 42
    for name, result in zip(schemes, probes.results, strict=False):
        # On a busy machine no rate may come out; nothing else may be found.
        assert {(f.severity, f.where) for f in result.findings} <= {("warning", "prefill"), ("warning", "decode")}, name
        assert result.reached == "timed"
        assert result.scheme == name
        assert [d.split for d in result.log_probs] == ["digits", "captions"]
        for difference in result.log_probs:
            assert 0 < difference.mean_abs_difference <= difference.tolerance < MAX_NOISE
        assert all(layer.format == layer.promised for layer in result.layers)
        fast = [layer for layer in result.layers if layer.format == "fp8"]
        assert {layer.kernel for layer in fast} == {"PerTensorTorchFP8ScaledMMLinearKernel"}
        assert all(speed.tokens_per_second > 0 for speed in result.throughput)
    counts = [sum(layer.format == "fp8" for layer in result.layers) for result in probes.results]
    manifests = [CheckpointManifest.read(one / CheckpointManifest.FILE_NAME) for one in schemes.values()]
    assert counts[:2] == [len(manifest.modules) for manifest in manifests]
    assert counts[1] == 42
    assert {module.rounding for module in manifests[1].modules} == {"compensated"}


@pytest.mark.slow
def test_a_child_that_imports_vllm_itself_finds_the_same(vllm_python, probes, schemes, job):
    cold, warm = serve_now(schemes["top50"], vllm_python, job), probes.served[schemes["top50"]]
    assert cold.reached == "timed"
    varying = {"phases", "timings", "kv_cache_bytes", "kv_cache_tokens"}
    assert cold.model_dump(exclude=varying) == warm.model_dump(exclude=varying)


@pytest.mark.slow
def test_rows_of_tasks_are_scored_as_our_evaluation_scores_them(probes, schemes, job):
    for directory in schemes.values():
        model, rows = load_checkpoint(directory), probes.served[directory].rows
        assert tuple(row.token_ids for row in rows) == job.rows
        for row in rows:
            ids = torch.tensor([row.token_ids])
            with torch.no_grad():
                ours = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            difference = (ours - torch.tensor(row.log_probs)).abs().mean()
            assert difference < 0.05, "vLLM computes in 16 bits"


@pytest.mark.slow
def test_the_kv_cache_is_counted_and_its_dtype_said(probes):
    for served in probes.served.values():
        # keys and values of 6 layers, one head of 64 numbers, 2 bytes each
        assert served.kv_cache_tokens > 0
        assert served.kv_cache_bytes == served.kv_cache_tokens * 2 * 6 * 64 * 2
        assert served.kv_cache_dtype in ("auto", "bfloat16")


@pytest.mark.slow
def test_pictures_are_answered_as_by_our_own_evaluation(probes, schemes, sets):
    samples, processor = sets["digits"].samples, load_processor(SOURCE)
    inputs = prompt_inputs(samples, processor)
    for directory, result in zip(schemes.values(), probes.results, strict=False):
        model = load_checkpoint(directory)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        ours = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        served = [a.text for a in result.answers if a.image]
        assert [text.strip() for text in served] == [text.strip() for text in ours]
        assert sum(a == s.text for a, s in zip(map(str.strip, served), samples, strict=True)) > len(samples) / 2
        assert len(result.answers) == len(samples) + 1


@pytest.mark.slow
def test_nan_is_seen_in_scores_and_in_answers(probes):
    result = probes.results[-1]
    assert result.verdict == "wrong_output"
    assert any("NaN" in finding.problem for finding in result.findings)
    assert any("times the token 0" in finding.problem for finding in result.findings)
    assert not result.log_probs


def test_a_time_limit_is_a_result_with_what_was_printed(vllm_python, good):
    result = probe(good["full"], vllm_python, ServeJob(), timeout=0.5)
    assert (result.verdict, result.reached, result.scheme) == ("timeout", "started", "full")
    with pytest.raises(ProbeFailed, match="killed at the time limit"):
        answer(good["full"], vllm_python, ServeJob(), timeout=0.5)


def test_a_damaged_manifest_is_a_finding_and_stops_nothing(good, tmp_path):
    without = tmp_path / "python"
    without.write_text("#!/bin/sh\necho\n")
    without.chmod(0o755)
    damaged = tmp_path / "damaged"
    shutil.copytree(good["full"], damaged)
    (damaged / CheckpointManifest.FILE_NAME).write_text("{")
    first, second = serve_all([damaged, good["full"]], without, ServeJob()).results
    assert [f.where for f in first.findings if f.error_class == "missing_file"] == [CheckpointManifest.FILE_NAME]
    assert first.scheme is None
    assert second.scheme == "full"


def test_a_python_without_vllm_is_a_result_and_one_that_is_not_there_an_error(tmp_path):
    without = tmp_path / "python"
    without.write_text("#!/bin/sh\necho\n")
    without.chmod(0o755)
    probes = serve_all([SOURCE], without, ServeJob(), source=SOURCE)
    assert probes.results[0].verdict == probes.source.verdict == "no_runtime"
    assert "make vllm-env" in probes.results[0].findings[0].remedy
    with pytest.raises(BitladderError, match="no Python interpreter"):
        probe(SOURCE, tmp_path / "nowhere", ServeJob())


@pytest.mark.parametrize("child", [child_load.kernel_of, child_serve._kernel_of], ids=["load", "serve"])
@pytest.mark.parametrize(
    "path", ["kernel", "fp8_linear", "fp8_linear.kernel", "fp8_linear_op", "w8a8_block_fp8_linear"]
)
def test_a_kernel_is_found_wherever_a_release_keeps_it(child, path):
    class Kernel:
        pass

    found = Kernel()
    for name in reversed(path.split(".")):
        found = SimpleNamespace(**{name: found})
    assert child(found) == "Kernel"
    assert child(SimpleNamespace(scheme="w8a8")) is None


def test_a_job_may_say_more_to_the_engine_and_has_the_last_word(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=dict))
    lent = dict.fromkeys(("emulating", "keeping_scales"), contextlib.nullcontext)
    monkeypatch.setattr(child_serve, "_sibling", lambda _: SimpleNamespace(**lent))
    names = ("model", "kv_cache_dtype", "max_model_len", "max_num_seqs", "gpu_memory_utilization", "kv_cache_bytes")
    job = dict.fromkeys(names, 1)
    assert child_serve.build(job, True)["enforce_eager"] is False
    more = {"enforce_eager": True, "compilation_config": {"mode": 0}}
    assert child_serve.build({**job, "engine": more}, True) == {**child_serve.build(job, True), **more}
