"""Records of what runtimes do with checkpoints."""

from typing import Literal

from pydantic import Field

from bitladder.records.base import Grown, Part, Record, RunInfo
from bitladder.records.evaluation import Paired

Stage = Literal["preflight", "load", "generate"]
ErrorClass = Literal[
    "missing_tensor",  # a tensor that the runtime needs isn't there
    "unexpected_tensor",  # a tensor that the runtime has no place for, or that is in two files
    "unexpected_file",  # a file that the manifest doesn't list
    "shape",  # a tensor of another shape than the runtime's parameter
    "bad_scale",  # NaN, infinite, zero, negative, or not one number
    "bad_weight",  # NaN or infinite weights
    "unequal_scales",  # the modules of a fused group have different scales: the runtime quantises again, or merges
    "mixed_group",  # the modules of a fused group have different formats
    "wrong_format",  # a layer would run in another format than it is stored in, or than the manifest promises
    "silent_cast",  # values are cast across the FP8 boundary without a scale
    "ambiguous_exclude",  # an exclusion that matches more, or less, than it says
    "config_mismatch",  # configuration files that disagree with each other
    "unsupported_format",  # the runtime doesn't know the format, or its kernel can't take the dimensions
    "unsupported_model",  # the runtime doesn't know the architecture
    "missing_file",  # tokenizer, processor, configuration or weight file isn't there, or can't be read
    "wrong_output",  # NaN, gibberish, or log-probabilities other than those measured
    "out_of_memory",
    "no_device",
    "no_runtime",  # the runtime isn't installed in the environment that was named
    "timeout",
    "runtime_bug",  # the runtime failed in a way that none of the above explains
]


class ProbeFinding(Part):
    """One thing that a runtime would trip over, or silently do otherwise than the checkpoint says."""

    error_class: ErrorClass
    severity: Literal["error", "warning"] = "error"
    where: str = Field(description="the module, tensor or file")
    problem: str
    remedy: str


class ProbedLayer(Part):
    """One linear module of the checkpoint, as a runtime treats it."""

    name: str = Field(description="the checkpoint's name of the module, without `.weight`")
    runtime_name: str = Field(description="the runtime's name of the (fused) layer that it is part of")
    promised: str | None = Field(description="the manifest's format; None: the checkpoint has no manifest")
    format: str = Field(description="what the runtime runs: fp8, bf16, ...")
    method: str = Field(description="the runtime's class that was, or by its rules would be, chosen")
    kernel: str | None = Field(default=None, description="the runtime's kernel; None: not known at this stage")
    dtype: str | None = Field(default=None, description="of the weight after loading; None: not loaded")


class ServedAnswer(Part):
    """One greedy answer."""

    prompt: str
    image: bool
    text: str
    token_ids: tuple[int, ...]


class ServedTask(Part):
    """What a runtime answers to a task of lm-evaluation-harness."""

    task: str
    sha256: str = Field(description="SHA-256 of the questions that are asked")
    answers: Paired = Field(description="beside those of the original in the same runtime")


class LogProbDifference(Part):
    """Prompt log-probabilities of the runtime against our evaluation of the same files."""

    split: str
    tokens: int
    mean_abs_difference: float = Field(description="nats per token")
    tolerance: float = Field(description="nats per token; beyond it the result is a finding")
    source_mean_abs_difference: float | None = Field(
        default=None, description="the same figure of the original in 16 bits: the runtime's own noise"
    )


class Throughput(Part):
    """Tokens per second of one phase of serving, against the original in the same run."""

    phase: Literal["prefill", "decode"]
    requests: int
    tokens_per_second: float
    source_tokens_per_second: float | None = None

    @property
    def ratio(self) -> float | None:
        """Times the original's tokens per second, or None."""
        return self.tokens_per_second / self.source_tokens_per_second if self.source_tokens_per_second else None


class ServedMemory(Part):
    """What a served checkpoint takes; what the runtime doesn't tell is None."""

    weight_bytes: int | None = Field(description="of all parameters, as they lie on the GPU")
    kv_cache_dtype: str | None
    kv_cache_bytes: int | None = Field(description="of the pool, which vLLM makes as large as the memory that is left")
    kv_cache_tokens: int | None = Field(description="that fit into it")
    peak_gpu_bytes: int | None


class ProbeResult(Grown, Record):
    """What one runtime, in one version, does with one checkpoint, as far as `stage`."""

    later = frozenset({"tasks", "tensor_parallel"})
    written_by = "probe"
    volatile = frozenset({"run", "traceback"})

    checkpoint: str = Field(description="the directory's name")
    scheme: str | None = Field(description="from the manifest; None: the checkpoint has none")
    manifest_sha256: str | None
    runtime: str = Field(description="vllm, sglang, tensorrt_llm")
    version: str = Field(description="of the runtime; at preflight that of the rules that are reproduced")
    stage: Stage = Field(description="what was asked")
    tensor_parallel: int = Field(default=1, gt=0, description="ranks that share the model")
    reached: str = Field(description="the last step that was finished, in the runtime's words")
    device: str | None = Field(description="None: no device was needed")
    layers: tuple[ProbedLayer, ...] = ()
    findings: tuple[ProbeFinding, ...] = ()
    answers: tuple[ServedAnswer, ...] = ()
    log_probs: tuple[LogProbDifference, ...] = ()
    throughput: tuple[Throughput, ...] = ()
    tasks: tuple[ServedTask, ...] = ()
    memory: ServedMemory | None = None
    traceback: str | None = None
    run: RunInfo | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing but warnings was found."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """Return `ok`, or the class of the first error."""
        return next((f.error_class for f in self.findings if f.severity == "error"), "ok")
