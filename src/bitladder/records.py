"""The files that the steps exchange, as frozen types: what was measured, planned, exported, verified and evaluated.

Every record is JSON with a `schema_version`; tensors lie beside it in safetensors; nothing is pickled. A record is
identified by its `fingerprint`: the SHA-256 of its content without the fields that two equal runs may differ in
(times, memory, hardware). Its file ends with the SHA-256 of all of it, so that an edit or a flipped bit is found.
`docs/records.md` describes every field.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from bitladder.errors import MeasurementError, RecordError
from bitladder.reading import read_json
from bitladder.storage import atomic_write, sha256_of_bytes

SCHEMA_VERSION = 2
CONTENT_DIGEST = "content_sha256"  # key of a record's file: the digest of everything else in it
BF16 = "bf16"  # the format of a group that a scheme leaves alone, whatever 16-bit dtype the source has
BF16_BITS = 16
ASSISTANT_TURNS: Literal["assistant turns"] = "assistant turns"  # which tokens of conversations count
ALL_TOKENS: Literal["all tokens"] = "all tokens"
Counted = Literal["assistant turns", "all tokens"]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that a record may hold")


class Part(BaseModel):
    """A frozen piece of a record; unknown fields, NaN and Inf are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Record(Part):
    """A frozen record with one file on disk."""

    # Fields that two runs with the same result may differ in; they don't count for the fingerprint.
    volatile: ClassVar[frozenset[str]] = frozenset()

    schema_version: int = SCHEMA_VERSION

    def fingerprint(self) -> str:
        """Return the hex SHA-256 of the record's content without its volatile fields."""
        return _digest_of_json(self.model_dump(mode="json", exclude=set(self.volatile)))

    def write(self, path: Path) -> None:
        """Write the record to `path` as indented JSON that ends with the digest of its content, atomically."""
        content = self.model_dump(mode="json")
        content[CONTENT_DIGEST] = _digest_of_json(content)
        atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the record at `path`.

        Raises:
            RecordError: the file is missing, isn't JSON, isn't such a record, or isn't what was written; the message
                names the remedy.
        """
        kind = cls.__name__
        try:
            content = read_json(path, parse_constant=_refuse_constant)
        except FileNotFoundError:
            raise RecordError(f"{path} does not exist; run the step that writes this {kind} first") from None
        except (OSError, ValueError) as error:  # not UTF-8, not JSON, NaN, nested without end
            raise RecordError(f"{path} can't be read as JSON ({error}); delete it and run the step again") from error
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise RecordError(
                f"{path} has schema_version {version!r}, this Bitladder reads {SCHEMA_VERSION}; "
                f"if it is a {kind}, delete it and run the step again"
            )
        if content.pop(CONTENT_DIGEST, None) != _digest_of_json(content):
            raise RecordError(
                f"{path} was changed since it was written: its content is not what its {CONTENT_DIGEST} says; "
                "delete it and run the step again"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "(top level)"
            raise RecordError(f"{path} is not a {kind}: {where}: {first['msg']}; run the step again") from error

    @classmethod
    def read_if_whole(cls, path: Path) -> Self | None:
        """Return the record at `path`; None where there is none, or a damaged one that is to be made again."""
        try:
            return cls.read(path) if path.exists() else None
        except RecordError:
            return None


class FileDigest(Part):
    """One file: its path relative to the directory, its size in bytes, its SHA-256."""

    name: str
    bytes: int
    sha256: str


class ModelSource(Part):
    """Which model this is, down to the bytes of its weights."""

    path: str
    revision: str | None = None
    architecture: str
    model_type: str
    sha256: str = Field(description="SHA-256 over the names and digests of the config and weight files")
    files: tuple[FileDigest, ...] = ()
    provenance: str | None = Field(default=None, description="where the weights come from, by its file PROVENANCE")

    @model_serializer(mode="wrap")
    def _without_unknown_provenance(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        if self.provenance is None:  # digests stay what they were before there was such a file
            content.pop("provenance", None)
        return content


class DataSummary(Part):
    """What a data set gave: enough to make it again and to see that it is the same.

    Several sets in one have `kind: mixed`; `samples`, `tokens` and `sample_ids` are those of all, `sequence_length` and
    `batch_size` the greatest, `seed` the first one's.
    """

    source: str
    kind: str
    sha256: str = Field(description="SHA-256 of the token ids and masks (and pixels) that the model is given")
    samples: int
    tokens: int = Field(description="positions that count for the loss")
    sequence_length: int
    batch_size: int
    seed: int
    sample_ids: tuple[str, ...] = Field(default=(), description="digest of each sample's source, to prove a split")
    parts: tuple["DataSummary", ...] = Field(default=(), description="the sets of a mixture, without sample_ids")
    counted: Counted | None = Field(default=None, description="kind messages only: which tokens count for the loss")
    null_rows: int = Field(default=0, description="rows of a data set that were read and left out, as they hold null")

    @model_serializer(mode="wrap")
    def _without_empty_parts(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        if not self.parts:  # a single set keeps its bytes and digests of before there were several
            content.pop("parts", None)
        if self.counted is None:
            content.pop("counted", None)
        if not self.null_rows:
            content.pop("null_rows", None)
        return content


class PhaseCost(Part):
    """What one phase took."""

    phase: str
    seconds: float
    peak_rss_bytes: int
    peak_gpu_bytes: int | None = None


class RunInfo(Part):
    """Where and how a step ran; never part of a fingerprint."""

    started: str
    hardware: str
    threads: int
    workers: int = Field(default=0, description="processes that shared the work through Ray; 0: this one did it alone")
    versions: dict[str, str]
    phases: tuple[PhaseCost, ...] = ()


class QuantModule(Part):
    """One linear module: its path in the loaded model, and its weight's tensor name in the source files."""

    name: str
    tensor: str | None = Field(default=None, description="None where only a published manifest is known")
    shape: tuple[int, int] | None = Field(default=None, description="[out_features, in_features]")


class QuantGroup(Part):
    """Modules that the runtime fuses (q/k/v, gate/up), so that they share one format and its scales."""

    name: str
    modules: tuple[QuantModule, ...]
    weight_elements: int = Field(gt=0)


class UntouchedModule(Part):
    """A linear module that isn't searched, and why."""

    name: str
    checkpoint_name: str = Field(description="its weight's tensor name in the source files, without `.weight`")
    reason: str


class Candidate(Part):
    """One format of one group: what it costs, and what it did to the loss or the output in every scoring batch."""

    group: str
    format: str
    weight_bits: int = Field(description="all weights of the group together, in bits")
    scores: tuple[float, ...] = Field(description="raw, one per scoring batch")
    image_scores: tuple[float, ...] = Field(
        default=(), description="the part of each score that image-token positions carry; empty where it isn't known"
    )


class RoundedModule(Part):
    """What one module's compensated codes do, on the calibration tokens that they were made from."""

    name: str
    codes_sha256: str = Field(description="of the codes, row by row, one byte an element")
    largest_shift: float = Field(description="largest |code · scale - weight|, in units of the scale")
    output_error: float = Field(description="|X (W - Q)| / |X W|, every token's input at unit length")
    nearest_output_error: float = Field(description="the same with the nearest codes")


class Rounding(Part):
    """How the codes were chosen where they are not the nearest ones."""

    method: Literal["compensated"]
    damping: float
    samples: int = Field(description="calibration samples")
    scored: bool = Field(description="whether the scores are those of these codes; else of the nearest ones")
    files: tuple[FileDigest, ...] = Field(description="codes, one file a decoder layer, in the directory `codes`")
    modules: tuple[RoundedModule, ...]


class Measurement(Record):
    """One sensitivity measurement: everything that planning and exporting need.

    A group's sensitivity is Σ_batches `score_weights[b]` × `scores[b]`; see `sensitivity`.
    """

    volatile = frozenset({"run"})

    model: ModelSource
    calibration: DataSummary
    engine: str
    method: str
    fused_scales_shared: bool
    compute_dtype: str
    score_unit: str
    score_weights: tuple[float, ...]
    formats: tuple[str, ...]
    groups: tuple[QuantGroup, ...]
    candidates: tuple[Candidate, ...]
    untouched: tuple[UntouchedModule, ...]
    amax_sha256: str | None = Field(description="SHA-256 of measurement.safetensors; None: no amax, so no export")
    rounding: Rounding | None = Field(default=None, description="None: every weight to its nearest code")
    settings_sha256: str = Field(default="", description="digest of the recipe's settings that led here")
    run: RunInfo | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        groups = {group.name for group in self.groups}
        if len(groups) != len(self.groups):
            raise ValueError("two groups have the same name")
        seen = set()
        for candidate in self.candidates:
            if candidate.group not in groups:
                raise ValueError(f"candidate of unknown group {candidate.group}")
            if len(candidate.scores) != len(self.score_weights):
                raise ValueError(
                    f"{candidate.group}: {len(candidate.scores)} scores, {len(self.score_weights)} batches"
                )
            if candidate.image_scores and len(candidate.image_scores) != len(self.score_weights):
                raise ValueError(f"{candidate.group}: {len(candidate.image_scores)} image scores")
            seen.add((candidate.group, candidate.format))
        missing = [(g, f) for g in sorted(groups) for f in self.formats if (g, f) not in seen]
        if missing or len(seen) != len(self.candidates):
            raise ValueError(f"candidates don't cover every group and format once: {missing[:3]}")
        return self

    @property
    def searched_weights(self) -> int:
        """Number of weight elements in the searched groups: the denominator of effective bits and coverage."""
        return sum(group.weight_elements for group in self.groups)

    def sensitivity(self, candidate: Candidate, image_weight: float = 1.0) -> float:
        """Return the candidate's predicted damage in `score_unit`: the weighted sum of its raw batch scores.

        Args:
            candidate: one of this measurement's.
            image_weight: what image-token positions count for; text positions count for 1.

        Raises:
            MeasurementError: `image_weight` isn't 1, and the scores of image positions are not known apart.
        """
        return math.fsum(
            w * s for w, s in zip(self.score_weights, self.batch_scores(candidate, image_weight), strict=True)
        )

    def batch_scores(self, candidate: Candidate, image_weight: float = 1.0) -> tuple[float, ...]:
        """Return the candidate's raw score of each batch, image-token positions weighted; see `sensitivity`."""
        if image_weight == 1.0:
            return candidate.scores
        if not candidate.image_scores:
            raise MeasurementError(
                f"image_weight {image_weight:g} was asked for, but this measurement ({self.engine}, {self.method}) has "
                "no scores of image positions apart; measure on image+text with method: fisher, or leave it at 1"
            )
        return tuple(
            (score - image) + image_weight * image
            for score, image in zip(candidate.scores, candidate.image_scores, strict=True)
        )

    def weigh_images(self, image_weight: float) -> "Measurement":
        """Return this measurement with image-token positions weighted; see `sensitivity`. Its fingerprint differs.

        Raises:
            MeasurementError: the scores of image positions are not known apart.
        """
        if image_weight == 1.0:
            return self
        weighed = tuple(
            candidate.model_copy(update={"scores": self.batch_scores(candidate, image_weight), "image_scores": ()})
            for candidate in self.candidates
        )
        return self.model_copy(update={"candidates": weighed})

    def by_group(self) -> dict[str, dict[str, Candidate]]:
        """Return the candidates as `{group name: {format: candidate}}`, in the order of `groups`."""
        table: dict[str, dict[str, Candidate]] = {group.name: {} for group in self.groups}
        for candidate in self.candidates:
            table[candidate.group][candidate.format] = candidate
        return table


class Scheme(Record):
    """The format of every quant group, and what it costs and is predicted to do."""

    # Depends on which other schemes there are: one more of them must not make this one's checkpoint stale.
    volatile = frozenset({"nested_in"})

    name: str
    measurement_sha256: str
    asked: dict[str, Any] = Field(description="the recipe's entry for this scheme")
    formats: dict[str, str] = Field(description="group name -> format; `bf16` is left as in the source")
    effective_bits: float = Field(description="Σ weight bits / Σ weights over the searched groups")
    coverage: float = Field(description="share of the searched weight elements that are quantised")
    searched_weights: int
    weight_bits: int
    weight_bytes: int = Field(description="the searched weights and their scales on disk")
    predicted_score: float
    score_unit: str
    exclude_modules: tuple[str, ...] = Field(
        description="exact checkpoint names of the linear modules left alone, and of fused layers that vLLM asks for"
    )
    kv_cache_format: str | None = Field(default=None, description="None: 16 bits")
    nested_in: tuple[str, ...] = Field(default=(), description="schemes that quantise all of its groups and more")

    def quantised_groups(self) -> frozenset[str]:
        """Return the names of the groups that this scheme quantises."""
        return frozenset(group for group, format_name in self.formats.items() if format_name != BF16)


class ModuleRecord(Part):
    """One quantised module in a checkpoint: scales are multipliers that restore a value from its code."""

    name: str
    tensor: str
    format: str
    dtype: str
    weight_scale: float
    input_scale: float
    rounding: Literal["nearest", "compensated"] = "nearest"


class KvScale(Part):
    """The scale of one layer's cached keys or values: a multiplier that restores a value from its code."""

    tensor: str
    scale: float


class CheckpointManifest(Record):
    """What an exported directory holds, written last; `bitladder_manifest.json` in that directory."""

    FILE_NAME: ClassVar[str] = "bitladder_manifest.json"
    CARD_NAME: ClassVar[str] = "README.md"  # the model card, which every report writes again; not among `files`

    scheme: str
    scheme_sha256: str
    measurement_sha256: str
    source_sha256: str
    files: tuple[FileDigest, ...]
    modules: tuple[ModuleRecord, ...]
    kv_cache_format: str | None = None
    kv_scales: tuple[KvScale, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of all files listed."""
        return sum(file.bytes for file in self.files)


class Finding(Part):
    """One thing that is wrong with a checkpoint, where, and what to do."""

    file: str
    tensor: str | None
    problem: str
    remedy: str


class CheckpointVerification(Part):
    """The verdict on one checkpoint."""

    scheme: str
    manifest_sha256: str
    tensors_checked: int
    codes_checked: int = Field(description="FP8 codes compared with the source weight")
    bytes_identical: int = Field(description="bytes outside the scheme that equal the source's")
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


class PairDifference(Part):
    """How two schemes' checkpoints differ."""

    first: str
    second: str
    modules_expected: int = Field(description="modules whose format differs between the two schemes")
    modules_differing: int = Field(description="modules whose tensors differ between the two directories")
    findings: tuple[Finding, ...] = ()


class Verification(Record):
    """All checkpoints of one run, each against its scheme and against each other."""

    checkpoints: tuple[CheckpointVerification, ...]
    pairs: tuple[PairDifference, ...]
    times_trusted: bool = Field(
        default=False,
        description="True: by `run`, which keeps it while sizes and times stay; False: all bytes were read",
    )

    @property
    def ok(self) -> bool:
        """Whether no checkpoint and no pair has a finding."""
        return all(c.ok for c in self.checkpoints) and not any(p.findings for p in self.pairs)

    def matches(self, scheme: str) -> bool | None:
        """Return whether nothing speaks against a scheme's checkpoint; None: it wasn't checked.

        What is wrong with a pair speaks against both, unless one of them has findings of its own.
        """
        own = {check.scheme: check.ok for check in self.checkpoints}
        if not own.get(scheme, False):
            return own.get(scheme)
        return not any(
            pair.findings and own.get(pair.first) and own.get(pair.second)
            for pair in self.pairs
            if scheme in (pair.first, pair.second)
        )


KL = "kl"  # the main metric: of the original's next-token distribution to the checkpoint's


class EvalResult(Part):
    """One number about one checkpoint, or about the original where `checkpoint_sha256` is None."""

    metric: str = Field(description="kl, perplexity, top1_agreement, task_accuracy")
    split: str = Field(description="name of the held-out set")
    unit: str
    value: float
    standard_error: float | None
    samples: int
    noise_floor: float | None = Field(description="the same metric for the original in BF16 instead of float32")
    reference: float | None = Field(default=None, description="the same metric for the original, where it has one")


class Evaluation(Record):
    """One checkpoint on every held-out set, against the original."""

    volatile = frozenset({"run"})

    scheme: str
    manifest_sha256: str = Field(description="fingerprint of the checkpoint's manifest")
    model_sha256: str
    data: dict[str, DataSummary] = Field(min_length=1, description="name of the held-out set -> its samples")
    arithmetic: str
    settings_sha256: str = ""
    results: tuple[EvalResult, ...]
    run: RunInfo | None = None

    @model_validator(mode="after")
    def _of_known_sets(self) -> Self:
        seen = [(result.split, result.metric) for result in self.results]
        unknown = sorted({split for split, _ in seen} - set(self.data))
        if unknown:
            raise ValueError(f"result on unknown held-out set {unknown[0]}")
        if len(set(seen)) != len(seen):
            raise ValueError("two results have the same metric and held-out set")
        return self

    def result(self, metric: str, split: str | None = None) -> EvalResult | None:
        """Return the metric's result on the held-out set `split` (None: the first set), or None."""
        wanted = (metric, next(iter(self.data)) if split is None else split)
        return next((result for result in self.results if (result.metric, result.split) == wanted), None)


class ControlArm(Part):
    """Another choice of groups at a scheme's bits, and what it does."""

    scheme: Scheme = Field(description="`asked` says which control it is, and beside which scheme it stands")
    results: tuple[EvalResult, ...]


class SimulatedKls(Record):
    """KLs of simulated schemes on the scored calibration samples, each kept as soon as it is known."""

    settings_sha256: str = Field(description="digest of the measurement, the samples and the arithmetic")
    kl: dict[str, float] = Field(description="digest of a scheme's formats -> nats per token")


class KlPoint(Part):
    """A scheme that was simulated to learn which KL its predicted score means."""

    name: str
    score: float = Field(description="predicted, in the measurement's unit")
    kl: float = Field(description="measured, in nats per token")


class KlPoints(Record):
    """What maps predicted scores to KL: a few schemes, simulated on the scored calibration samples."""

    volatile = frozenset({"run"})

    measurement_sha256: str
    settings_sha256: str
    data: DataSummary = Field(description="calibration data: held-out data must not choose a scheme")
    samples: int = Field(description="of it that were used, the first ones")
    points: tuple[KlPoint, ...]
    run: RunInfo | None = None


class Refinement(Part):
    """What refining one scheme in context came to."""

    scheme: str
    planned_sha256: str = Field(description="fingerprint of the scheme as planned")
    kl_planned: float = Field(description="nats per token, on calibration samples")
    kl_refined: float = Field(description="nats per token, on the same")
    evaluations: int = Field(description="simulated schemes that it took")
    changes: dict[str, str] = Field(description="group -> format, where it isn't the planned one")


class Refinements(Record):
    """Schemes whose groups were swapped at their edge while the KL on the scored calibration samples fell."""

    volatile = frozenset({"run"})

    measurement_sha256: str
    settings_sha256: str
    data: DataSummary = Field(description="calibration data: held-out data must not choose a scheme")
    samples: int = Field(description="of it that were used, the first ones")
    refinements: tuple[Refinement, ...]
    run: RunInfo | None = None


class Evidence(Record):
    """What the search is worth: control arms beside the schemes, evaluated in memory on the same held-out sets."""

    volatile = frozenset({"run"})

    measurement_sha256: str
    settings_sha256: str
    data: dict[str, DataSummary] = Field(min_length=1, description="name of the held-out set -> its samples")
    arithmetic: str
    arms: tuple[ControlArm, ...]
    left_out: tuple[str, ...] = Field(default=(), description="arms for which there was no time")
    run: RunInfo | None = None


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


class ServedMemory(Part):
    """What a served checkpoint takes; what the runtime doesn't tell is None."""

    weight_bytes: int | None = Field(description="of all parameters, as they lie on the GPU")
    kv_cache_dtype: str | None
    kv_cache_bytes: int | None = Field(description="of the pool, which vLLM makes as large as the memory that is left")
    kv_cache_tokens: int | None = Field(description="that fit into it")
    peak_gpu_bytes: int | None


class ProbeResult(Record):
    """What one runtime, in one version, does with one checkpoint, as far as `stage`."""

    volatile = frozenset({"run", "traceback"})

    checkpoint: str = Field(description="the directory's name")
    scheme: str | None = Field(description="from the manifest; None: the checkpoint has none")
    manifest_sha256: str | None
    runtime: str = Field(description="vllm, sglang, tensorrt_llm")
    version: str = Field(description="of the runtime; at preflight that of the rules that are reproduced")
    stage: Stage = Field(description="what was asked")
    reached: str = Field(description="the last step that was finished, in the runtime's words")
    device: str | None = Field(description="None: no device was needed")
    layers: tuple[ProbedLayer, ...] = ()
    findings: tuple[ProbeFinding, ...] = ()
    answers: tuple[ServedAnswer, ...] = ()
    log_probs: tuple[LogProbDifference, ...] = ()
    throughput: tuple[Throughput, ...] = ()
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


class RunState(Record):
    """What a run directory belongs to, and what its steps took; `run.json`, which marks the directory as ours."""

    FILE_NAME: ClassVar[str] = "run.json"

    recipe: dict[str, Any] = Field(description="the recipe with every default filled in")
    phases: dict[str, tuple[PhaseCost, ...]] = Field(default={}, description="step -> what its phases took")
    measured_with: dict[str, Any] = Field(default={}, description="those of its sections that decide the measurement")
    digests: dict[str, tuple[int, int, str]] = Field(
        default={}, description="file -> size, modification time (ns), SHA-256: spares hashing it again"
    )


def _digest_of_json(content: Mapping[str, Any]) -> str:
    """Return the hex SHA-256 of a JSON object, however it is laid out."""
    return sha256_of_bytes(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def digest_of(parts: Iterable[str]) -> str:
    """Return the hex SHA-256 over `parts`, each ended by a newline."""
    return sha256_of_bytes("".join(f"{part}\n" for part in parts).encode())
