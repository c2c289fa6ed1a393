"""Serving probe: does vLLM's engine run a checkpoint, and does it compute what its files say? `probe(directory, ...)`.

The child (`child_serve.py`) serves the checkpoint in vLLM's environment: answers to questions, log-probabilities of
given sequences, seconds. The original goes through the same in a child of its own, once for all checkpoints, so that
ratios are of one run. Judging (`judge`, with `serve_judging.py`) is pure.

What is wrong output. NaN anywhere. Log-probabilities farther from our evaluation of the same files than `tolerance`.
Without an evaluation: real text that is `MAX_LOSS` less likely than under the original. An answer that is one token
over and over where the original's isn't: that is what greedy decoding makes of NaN logits, of which `argmax` always
takes the same one.

What this can't prove: that every layer is right. A layer that hardly matters to these tokens may be wrong within the
tolerance; the loader check (`load.py`) looks at each layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bitladder.errors import ModelError, ProbeFailed
from bitladder.formats import CODE_NAMES
from bitladder.models.families import section_of
from bitladder.models.headers import read_header
from bitladder.reading import read_json
from bitladder.records import (
    BF16,
    CheckpointManifest,
    ErrorClass,
    ProbedLayer,
    ProbeFinding,
    ProbeResult,
    RunInfo,
    ServedAnswer,
    ServedMemory,
)
from bitladder.runinfo import Meter
from bitladder.runtimes.child import VLLM_ENVIRONMENT, installed_version, run_child
from bitladder.runtimes.config import skips_of
from bitladder.runtimes.files import read_manifest
from bitladder.runtimes.findings import Findings
from bitladder.runtimes.vllm.exceptions import advice, classify, classify_exit, exit_words, said
from bitladder.runtimes.vllm.formats import fitting, packing_of, plain_format
from bitladder.runtimes.vllm.job import LogProbs, ServeJob
from bitladder.runtimes.vllm.serve_judging import (
    answer_findings,
    format_findings,
    log_prob_differences,
    score_findings,
    speed_findings,
    throughput,
)
from bitladder.runtimes.vllm.served import NOT_INSTALLED, Layer, Probes, Run, Served

SCRIPT: Final = Path(__file__).with_name("child_serve.py")
RUNTIME: Final = "vllm"
# Without a process of its own for the engine an error arrives with its traceback.
ENVIRONMENT: Final = {**VLLM_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
MAX_TOKENS_IN_CONTEXT: Final = 4096  # prompt and answer, unless the job needs more; bounds what vLLM plans memory for
MAX_REQUESTS_AT_ONCE: Final = 256  # vLLM's own default for offline use (vllm/engine/arg_utils.py)
# What must be free at the start where the cache's size is given: vLLM then takes what it needs, whatever this says.
SHARED_GPU_UTILIZATION: Final = 0.05
GPU_MEMORY_UTILIZATION: Final = 0.9  # vLLM's long-standing default; the share of the GPU that it may take
_REMEDIES: Final[Mapping[ErrorClass, str]] = {
    "timeout": "give it more time (--timeout), or find out what it waits for",
    "out_of_memory": "free memory on the device, or use a larger one",
    "no_device": "run it on a machine with a device that this build of vLLM is made for",
    "no_runtime": "name the interpreter of an environment that has vLLM (`make vllm-env` makes .venv-vllm/bin/python)",
    "unsupported_model": "use a version of vLLM that knows the architecture",
}


def check_checkpoint(directory: Path) -> None:
    """Check that a directory can be a checkpoint at all.

    Raises:
        ModelError: it has no config.json.
    """
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} holds no checkpoint (no config.json); export it first, or name another one")


def most_tokens(directory: Path) -> int | None:
    """Return how many tokens a model's configuration says that it holds; None: it says nothing, or isn't JSON."""
    try:
        config = read_json(directory / "config.json")
    except ValueError:
        return None  # vLLM says what is wrong with the file
    most = {**config, **config.get("text_config", {})}.get("max_position_embeddings")
    return None if most is None else int(most)


def _kv_skips(directory: Path) -> tuple[str, ...]:
    """Return the numbers of the layers whose KV cache a checkpoint wants in 16 bits, which vLLM has to be told."""
    try:
        config = read_json(directory / "config.json")
    except ValueError:
        return ()  # vLLM says what is wrong with the file
    return skips_of(section_of(config, "quantization_config"))


def _context(directory: Path, needed: int) -> int:
    """Return the tokens that a prompt and its answer may have together.

    Raises:
        ModelError: the model can't hold what the job needs.
    """
    most = most_tokens(directory)
    if most is None:
        return max(MAX_TOKENS_IN_CONTEXT, needed)
    if needed > most:
        raise ModelError(
            f"{directory / 'config.json'}: the model holds {most} tokens, the job needs {needed}; ask for shorter "
            "sequences or fewer tokens"
        )
    return min(most, max(MAX_TOKENS_IN_CONTEXT, needed))


def _modules(directory: Path) -> list[str]:
    """Return the modules whose weight, or codes, are a matrix, by the files' headers; damaged ones are left to vLLM."""
    modules = []
    for path in sorted(directory.glob("*.safetensors")):
        try:
            tensors = read_header(path)
        except ModelError:
            continue
        split = ((name.rpartition("."), info) for name, info in tensors.items())
        modules += [module for (module, _, leaf), info in split if leaf in CODE_NAMES and len(info.shape) == 2]
    return modules


def child_job(directory: Path, job: ServeJob) -> dict[str, Any]:
    """Return the job as the child reads it.

    Args:
        directory: a checkpoint, or the original.
        job: what is asked.

    Raises:
        ModelError: the model can't hold the job's sequences.
    """
    return {
        "model": str(directory.resolve()),
        "modules": _modules(directory),
        "questions": [asdict(question) for question in job.questions],
        "sequences": [{"prompt_ids": one.prompt_ids, "image": one.image} for one in job.sequences],
        "rows": [{"prompt_ids": row, "image": None} for row in job.rows],
        "max_tokens": job.max_tokens,
        "chat": job.chat,
        "kv_cache_dtype": job.kv_cache_dtype,
        "kv_cache_skips": _kv_skips(directory),
        "max_model_len": _context(directory, job.tokens_in_context),
        "max_num_seqs": min(job.requests, MAX_REQUESTS_AT_ONCE),
        "kv_cache_bytes": job.kv_cache_bytes,
        "gpu_memory_utilization": SHARED_GPU_UTILIZATION if job.kv_cache_bytes else GPU_MEMORY_UTILIZATION,
        "speed": None if job.speed is None else asdict(job.speed),
    }


def serve(directory: Path, python: Path, job: ServeJob, *, timeout: float = 1800.0) -> Served:
    """Serve a checkpoint in a child process, and return what it found out.

    Args:
        directory: a checkpoint, or the original.
        python: the interpreter of vLLM's environment.
        job: what is asked.
        timeout: seconds.

    Raises:
        ModelError: there is no checkpoint, or it can't hold the job's sequences. BitladderError: no such interpreter.
    """
    check_checkpoint(directory)
    words = child_job(directory, job)
    return Served.parse(run_child(python, SCRIPT, words, timeout=timeout, environment=ENVIRONMENT))


def answer(directory: Path, python: Path, job: ServeJob, *, timeout: float = 1800.0) -> tuple[str, ...]:
    """Return the greedy answers to the job's questions.

    Raises:
        ModelError: there is no checkpoint. ProbeFailed: vLLM doesn't serve it; says why in one line.
    """
    served = serve(directory, python, job, timeout=timeout)
    failure = failure_finding(served)
    if failure is not None:
        raise ProbeFailed(f"{failure.where}: {failure.problem} ({failure.error_class}); {failure.remedy}")
    return tuple(one.text for one in served.answers)


def failure_finding(served: Served) -> ProbeFinding | None:
    """Return the finding of a child that didn't finish its job; None: it did."""
    if not served.failed:
        return None
    where = f"vLLM (last step finished: {served.reached})"
    if served.error is not None and not served.timed_out:
        error_class = classify(served.error.type, served.error.message or served.error.line)
        problem = f"{served.error.type}: {said(served.error.message, served.error.line)}"
    else:
        error_class = classify_exit(served.returncode, timed_out=served.timed_out)
        ended = exit_words(served.returncode)
        problem = "killed at the time limit" if served.timed_out else f"the process ended with {ended}"
    message = "" if served.error is None else served.error.message
    remedy = _REMEDIES.get(error_class) or advice(error_class, message)
    return ProbeFinding(error_class=error_class, where=where, problem=problem, remedy=remedy)


def _running_format(layer: Layer) -> str:
    """Return our name of the format that a layer runs in."""
    if layer.dtype is None:
        return "unknown"
    plain = plain_format(layer.dtype)
    packing = packing_of(layer.bits, layer.group_size, layer.symmetric)
    found = fitting(layer.dtype, spread=layer.spread, dynamic_input=layer.dynamic_input, **packing)
    return plain or (found[0] if found else f"{layer.dtype} with other scales than any known format's")


def probed_layers(served: Served, manifest: CheckpointManifest | None) -> tuple[ProbedLayer, ...]:
    """Return one row per linear module of the checkpoint, as vLLM runs it."""
    promised = {} if manifest is None else {m.tensor.removesuffix(".weight"): m.format for m in manifest.modules}
    rows = []
    for module, name in served.names.items():
        layer = served.layers[name]
        rows.append(
            ProbedLayer(
                name=module,
                runtime_name=name,
                promised=None if manifest is None else promised.get(module, BF16),
                format=_running_format(layer),
                method=layer.method,
                kernel=layer.kernel,
                dtype=layer.dtype,
            )
        )
    return tuple(rows)


def _run_info(served: Served, started: RunInfo) -> RunInfo:
    """Return where and how a child ran; the parent's torch may not see the GPU that vLLM used."""
    runtime = served.runtime
    if runtime is None:
        return started
    hardware = started.hardware.replace("no GPU", runtime.device) if runtime.gpu else started.hardware
    return started.model_copy(
        update={
            "hardware": hardware,
            "threads": runtime.threads,
            "versions": runtime.versions,
            "phases": served.phases,
        }
    )


def judge(
    run: Run,
    job: ServeJob,
    *,
    checkpoint: str,
    version: str,
    manifest: CheckpointManifest | None = None,
    source: Run | None = None,
    info: RunInfo | None = None,
) -> ProbeResult:
    """Return the result of serving one checkpoint.

    Args:
        run: of the checkpoint.
        job: what it was asked.
        checkpoint: the directory's name.
        version: of vLLM.
        manifest: what the checkpoint promises; None: it has none.
        source: the original's answers to the same job; None: it wasn't served.
        info: when and where this happened.
    """
    served = run.served
    layers = probed_layers(served, manifest)
    failure = failure_finding(served)
    findings = [] if failure is None else [failure]
    findings += [*format_findings(layers), *score_findings(run, job, source), *answer_findings(run, job, source)]
    findings += speed_findings(run, job)
    text = served.error.traceback if served.error is not None else served.output
    return ProbeResult(
        checkpoint=checkpoint,
        scheme=None if manifest is None else manifest.scheme,
        manifest_sha256=None if manifest is None else manifest.fingerprint(),
        runtime=RUNTIME,
        version=version,
        stage="generate",
        reached=served.reached,
        device=None if served.runtime is None else served.runtime.device,
        layers=layers,
        findings=tuple(findings),
        answers=tuple(
            ServedAnswer(prompt=q.prompt, image=q.image is not None, text=one.text, token_ids=one.token_ids)
            for q, one in zip(job.questions, served.answers, strict=False)
        ),
        log_probs=log_prob_differences(run, job, source),
        throughput=throughput(run, job, source),
        memory=None if served.runtime is None else _memory(served),
        traceback=text or None,
        run=None if info is None else _run_info(served, info),
    )


def _memory(served: Served) -> ServedMemory:
    peaks = [phase.peak_gpu_bytes for phase in served.phases if phase.peak_gpu_bytes is not None]
    return ServedMemory(
        weight_bytes=served.weight_bytes,
        kv_cache_dtype=served.kv_cache_dtype,
        kv_cache_bytes=served.kv_cache_bytes,
        kv_cache_tokens=served.kv_cache_tokens,
        peak_gpu_bytes=max(peaks, default=None),
    )


def probe_one(
    directory: Path,
    python: Path,
    job: ServeJob,
    *,
    original: Run | None = None,
    expected: LogProbs | None = None,
    timeout: float = 1800.0,
) -> tuple[Run, ProbeResult]:
    """Serve one checkpoint, and judge it beside an original that was served before; a failure is a result.

    Args:
        directory: the checkpoint.
        python: the interpreter of vLLM's environment.
        job: what it is asked.
        original: what the original answered to the same job; None: it wasn't served.
        expected: what our evaluation of the checkpoint's files gives the job's sequences.
        timeout: seconds.

    Raises:
        ModelError: the directory holds no checkpoint. BitladderError: there is no such interpreter.
    """
    check_checkpoint(directory)
    version, info, damage = installed_version(python), Meter().info(), Findings()
    served = NOT_INSTALLED if version is None else serve(directory, python, job, timeout=timeout)
    run = Run(served, expected)
    result = judge(
        run,
        job,
        checkpoint=directory.name,
        version=version or "not installed",
        manifest=read_manifest(directory, damage),
        source=original,
        info=info,
    )
    return run, result.model_copy(update={"findings": (*result.findings, *damage.records())})


def serve_all(
    directories: Sequence[Path],
    python: Path,
    job: ServeJob,
    *,
    source: Path | None = None,
    expected: Mapping[Path, LogProbs] | None = None,
    timeout: float = 1800.0,
) -> Probes:
    """Serve the original and then each checkpoint, a child process each; a failure is a result and stops nothing.

    Args:
        directories: checkpoints.
        python: the interpreter of vLLM's environment.
        job: what all of them are asked.
        source: the original in 16 bits, served once before them.
        expected: what our evaluation of the files gives the job's sequences, by directory, the original's too
            (`bitladder.evaluation.logprobs`).
        timeout: seconds for each.

    Raises:
        ModelError: a directory holds no checkpoint. BitladderError: there is no such interpreter.
    """
    for directory in [*directories, *([] if source is None else [source])]:
        check_checkpoint(directory)
    served: dict[Path, Served] = {}

    def one(directory: Path, original: Run | None) -> tuple[Run, ProbeResult]:
        own = (expected or {}).get(directory)
        run, result = probe_one(directory, python, job, original=original, expected=own, timeout=timeout)
        served[directory] = run.served
        return run, result

    original, first = (None, None) if source is None else one(source, None)
    results = tuple(one(directory, original)[1] for directory in directories)
    return Probes(source=first, results=results, served=served)


def probe(
    directory: Path,
    python: Path,
    job: ServeJob,
    *,
    source: Path | None = None,
    expected: Mapping[Path, LogProbs] | None = None,
    timeout: float = 1800.0,
) -> ProbeResult:
    """Serve one checkpoint (and its original before it); arguments and errors are those of `serve_all`."""
    return serve_all([directory], python, job, source=source, expected=expected, timeout=timeout).results[0]
