"""What a report holds, as records."""

from typing import Any, Literal

from pydantic import Field

from bitladder.recipe import Phase
from bitladder.records import (
    DataSummary,
    EvalResult,
    LogProbDifference,
    ModelSource,
    Part,
    PhaseCost,
    ProbeFinding,
    Record,
    Refinement,
    Rounding,
    ServedTask,
    Stage,
    TaskSummary,
    Throughput,
    Verification,
)
from bitladder.report.damage import Damage

WITHIN_NOISE_ERRORS = 2.0  # two values closer than so many standard errors of their difference aren't told apart


class FormatCount(Part):
    """How much of the searched part one scheme puts in one format."""

    format: str
    groups: int
    modules: int
    weight_elements: int
    groups_by_kind: dict[str, int] = Field(description="kind (qkv_proj, o_proj, …) -> groups; kinds with none are 0")


class Unsettled(Part):
    """What another draw of the scoring batches would change in a scheme (`bitladder.uncertainty`)."""

    expected_flips: float = Field(description="groups that change sides in a draw, on average")
    enough: int | None = Field(
        description="multiple of the scoring batches that leaves at most one group open; None: more than 32"
    )
    shares: dict[str, float] = Field(description="group -> share of the draws in which it changes sides, where any")


class ReportedScheme(Part):
    """One rung of the ladder: what was asked, what it costs, what it does."""

    name: str
    asked: dict[str, Any]
    coverage: float
    effective_bits: float
    weight_bytes: int = Field(description="searched weights and their scales")
    weight_file_bytes: int | None = Field(description="*.safetensors of the checkpoint; None: not exported")
    carrier: Literal["modelopt", "compressed-tensors"] = Field(
        default="modelopt", description="whose layout the checkpoint has"
    )
    checkpoint_bytes: int | None = Field(description="all files of the checkpoint; None: not exported")
    kv_cache_format: str | None = Field(description="None: 16 bits")
    kv_cache_skips: tuple[str, ...] = Field(default=(), description="attention modules whose cache stays in 16 bits")
    kv_cache_kl: float | None = Field(
        default=None, description="of the cache alone, as predicted, nats per token; None: not measured by layer"
    )
    predicted_score: float
    predicted_standard_error: float | None
    results: tuple[EvalResult, ...] | None = Field(description="None: not evaluated")
    damage: Damage | None = Field(default=None, description="in a word (`report.damage`); None: not evaluated")
    verified: bool | None = Field(description="None: not verified yet")
    format_counts: tuple[FormatCount, ...]
    nested_in: tuple[str, ...] = Field(description="schemes that quantise all of this one's groups alike, and more")
    unsettled: Unsettled | None = Field(description="None: one batch, everything quantised, or chosen by name")
    candidates: tuple[str, ...] = Field(default=(), description="the formats beside bf16 that its groups may have")
    floor: tuple[str, ...] = Field(
        default=(), description="the smallest formats, where its effective bits leave no choice; empty: they leave one"
    )

    def result(self, metric: str, split: str) -> EvalResult | None:
        """Return the metric's result on a held-out set, or None."""
        return next((r for r in self.results or () if (r.metric, r.split) == (metric, split)), None)


class GroupSensitivity(Part):
    """What one format does to one group."""

    format: str
    score: float = Field(description="sensitivity, in the report's `score_unit`")
    standard_error: float | None = Field(description="over the scoring batches; None: a single batch")
    score_per_bit_saved: float | None = Field(description="None: the format saves nothing")
    rank: int | None = Field(description="1 has the least score per bit saved, and is quantised first")
    rank_interval: tuple[int, int] | None = Field(description="90%, over draws of the scoring batches; None: one batch")


class ReportedGroup(Part):
    """One quant group, in network order."""

    name: str
    kind: str = Field(description="last part of the name: qkv_proj, o_proj, gate_up_proj, down_proj, …")
    modules: tuple[str, ...]
    weight_elements: int
    sensitivities: tuple[GroupSensitivity, ...]
    formats: dict[str, str] = Field(description="scheme -> format")


class MovedGroup(Part):
    """A group whose rank depends on whether image positions count."""

    group: str
    rank_text: int = Field(description="by score per bit saved, from text positions only")
    rank_both: int = Field(description="from text and image positions: the measurement's own")
    image_share: float | None = Field(description="of its score; None: the score is 0")


class PositionRanking(Part):
    """How the order of the groups in one format depends on image-token positions."""

    format: str
    image_share: float | None = Field(description="of the score summed over all groups; None: the sum is 0")
    rank_correlation: float | None = Field(
        description="Spearman's, of score per bit saved from text positions and from both; None: all are equal"
    )
    moved: tuple[MovedGroup, ...] = Field(description="the groups whose rank moves most, at most 10")


class Positions(Part):
    """Text and image positions apart: what each says about the groups."""

    rankings: tuple[PositionRanking, ...]
    scheme_changes: dict[str, int | None] = Field(
        description="scheme -> groups in another format if only text positions counted; None: it can't be met then"
    )


class Comparison(Part):
    """The KL on the first held-out set of two schemes that are neighbours in searched-weight bits."""

    first: str
    second: str
    difference: float = Field(description="KL of the second minus KL of the first")
    standard_error: float | None = Field(description="sqrt(se1² + se2²); None: an error is unknown")
    within_noise: bool | None = Field(description="|difference| < 2 standard errors; None: can't be said")


class Edge(Part):
    """Where a scheme stops: the most sensitive group that it takes, and the least sensitive one that it leaves."""

    scheme: str
    taken: str
    left: str
    difference: float = Field(description="score per bit saved, left minus taken")
    standard_error: float | None = Field(description="of the difference, batch by batch; None: a single batch")
    within_noise: bool | None


class ReportedEvaluation(Part):
    """On which held-out set, and in which arithmetic, one checkpoint was evaluated."""

    scheme: str
    split: str
    data: DataSummary = Field(description="without sample_ids")
    arithmetic: str
    samples_seen_in_calibration: int | None = Field(description="None: the samples carry no digests")


class NotSearched(Part):
    """Modules that are left alone for one reason."""

    reason: str
    modules: tuple[str, ...]


class ReportedArm(Part):
    """One control arm: another choice of groups at a scheme's bits."""

    name: str
    control: str = Field(description="random, inverse, first_last, largest, lowest_score or modelopt")
    beside: str = Field(description="the scheme at whose bits it stands")
    coverage: float
    effective_bits: float
    predicted_score: float
    results: tuple[EvalResult, ...]


class ControlComparison(Part):
    """A scheme's KL on the first held-out set beside that of its control arms of one kind."""

    scheme: str
    control: str
    arms: int
    kl: float | None = Field(description="of the scheme; None: not evaluated")
    mean: float = Field(description="of the arms' KL")
    least: float
    most: float

    @property
    def ratio(self) -> float | None:
        """The scheme's KL over the arms' mean, or None."""
        return None if self.kl is None or self.mean <= 0 else self.kl / self.mean


class PredictedPoint(Part):
    """A scheme or control arm: the KL that all the others predict for it, and its measured one."""

    name: str
    is_control: bool
    score: float = Field(description="predicted score, in the report's `score_unit`")
    measured: float
    predicted: float | None = Field(description="None: its score is not positive, or the others don't suffice")
    low: float | None
    high: float | None


class Prediction(Part):
    """How well predicted scores say the KL on the first held-out set, leaving one out.

    KL = factor · (Σ over formats of weight · ((1 - shrinkage) · score + shrinkage · mean))^exponent, where `mean` is
    what as many weights score on average.
    """

    factor: float
    exponent: float
    weights: dict[str, float] = Field(description="by format")
    shrinkage: float = Field(description="from groups' own scores to their format's mean, 0 to 0.9")
    level: float = Field(description="of the intervals")
    points: tuple[PredictedPoint, ...]
    median_error: float | None = Field(description="of |predicted / measured - 1|; None: no point is predicted")
    inside: float | None = Field(description="share of the measured values inside their intervals")


class PlannedPoint(Part):
    """What the least damage within so many bits, or at so much speed, is: a point of the exact frontier."""

    target: float = Field(description="effective bits or times the speed of 16 bits, as a recipe asks for them")
    effective_bits: float
    weight_bytes: int = Field(description="searched weights and their scales")
    predicted_score: float
    kl: float | None = Field(description="predicted, on the first held-out set; None: too little was measured")
    low: float | None = Field(description="of its interval; None: there is none")
    high: float | None
    prefill_ratio: float | None = Field(default=None, description="times 16 bits, as predicted; None: not known")
    decode_ratio: float | None = Field(default=None, description="times 16 bits, as predicted; None: not known")
    formats: str = Field(description="a letter a group, in network order: see `PlannedFrontier.letters`")


class PlannedCurve(Part):
    """The frontier of some formats."""

    formats: tuple[str, ...] = Field(description="beside bf16")
    along: Literal["bits", "prefill", "decode"] = Field(default="bits", description="what its targets are")
    points: tuple[PlannedPoint, ...] = Field(description="from the least target up, each another plan")
    left_out: tuple[float, ...] = Field(description="targets for which too many plans are as good as each other")


class PlannedFrontier(Part):
    """What else could be planned from the measurement."""

    letters: dict[str, str] = Field(description="letter -> format")
    level: float | None = Field(description="of the intervals of predicted KL; None: there are none")
    curves: tuple[PlannedCurve, ...] = Field(
        description="of all formats; then, of several, each alone; then, with a profile, all that it times, by speed"
    )


class Decision(Part):
    """Which scheme to take (`report.verdict`)."""

    take: str | None = Field(default=None, description="None: none can be advised")
    aim: Literal["nearly_lossless", "least_damage"] | None = None
    smallest: str | None = Field(default=None, description="for the smallest files; None: the same, or none")
    advice: str = ""
    alternative: str = Field(default="", description="when to take the smallest instead")
    notes: tuple[str, ...] = Field(default=(), description="what else speaks for or against schemes")


class ReportedProbe(Part):
    """What one runtime does with one scheme's checkpoint."""

    scheme: str
    runtime: str
    version: str
    stage: Stage
    device: str | None
    verdict: str = Field(description="ok, or the class of the first error")
    layers: dict[str, int] = Field(description="format -> linear modules that the runtime runs in it")
    as_promised: int = Field(description="linear modules that it runs in the format of the manifest")
    findings: tuple[ProbeFinding, ...]
    log_probs: tuple[LogProbDifference, ...]
    throughput: tuple[Throughput, ...]
    tasks: tuple[ServedTask, ...] = Field(default=(), description="its answers to tasks, beside the original's")


class PredictedSpeed(Part):
    """How fast one scheme is served, as a profile predicts it."""

    scheme: str
    prefill: float = Field(description="tokens of prompts per second")
    decode: float = Field(description="tokens of answers per second")
    prefill_ratio: float = Field(description="times 16 bits")
    decode_ratio: float = Field(description="times 16 bits")

    @property
    def ratios(self) -> dict[Phase, float]:
        """Times 16 bits, by phase."""
        return {"prefill": self.prefill_ratio, "decode": self.decode_ratio}


class AskedSpeed(Part):
    """How fast a scheme is at the load for which it was asked, where that isn't the recipe's."""

    scheme: str
    phase: Phase
    ratio: float = Field(description="times 16 bits")
    load: str = Field(description="in words")


class SpeedPoint(Part):
    """The least predicted damage that is so fast: a point of the frontier of damage against speed."""

    phase: Phase
    ratio: float = Field(description="times 16 bits")
    predicted_score: float
    effective_bits: float


class Speeds(Part):
    """Speeds of all schemes on the device that serves, as its profile predicts them."""

    device: str = Field(description="and how many of them, where they share the model")
    runtime: str
    version: str
    compiled: bool = Field(description="with torch.compile")
    tensor_parallel: int = Field(default=1, description="devices that share the model")
    requests: int = Field(description="given at once")
    prompt_tokens: int
    output_tokens: int
    speculative_tokens: int = Field(default=0, description="drafted for each request and step of decoding; 0: none")
    original_prefill: float = Field(description="tokens per second in 16 bits")
    original_decode: float = Field(description="tokens per second in 16 bits")
    schemes: tuple[PredictedSpeed, ...]
    asked: tuple[AskedSpeed, ...] = Field(default=(), description="of schemes with a load of their own")
    unknown: dict[str, str] = Field(description="scheme -> why there is no prediction")
    frontier: tuple[SpeedPoint, ...] = Field(
        description="from the least damage on, phase by phase; without what is too large to plan"
    )

    @property
    def place(self) -> str:
        """Where schemes are served, and with how many drafted tokens."""
        drafted = self.speculative_tokens
        return f"{self.device} with {drafted} drafted token{'' if drafted == 1 else 's'}" if drafted else self.device


class CachedLayer(Part):
    """What one attention layer caches, and what FP8 does to it."""

    layer: str = Field(description="the attention module")
    numbers: int = Field(description="that it caches of a token: keys and values, or latents of both")
    window: int | None = Field(description="tokens of a sequence that it keeps at most; None: all")
    kl: float | None = Field(description="of an FP8 cache in this layer alone, nats per token; None: not measured")
    median: float | None = Field(description="of the samples' KL, by which layers are chosen; None: not measured")
    standard_error: float | None


class CacheOfScheme(Part):
    """What a scheme's KV cache takes."""

    scheme: str = Field(description="empty: the original")
    fp8_layers: int
    bytes_a_token: int = Field(description="of the layers that keep every token")
    window_bytes: int = Field(description="of a sequence in the layers that keep a window, once that is full")
    served_tokens: int | None = Field(default=None, description="that vLLM held when it served it; None: it didn't")
    served_bytes: int | None = Field(default=None, description="in which it held them")
    served_on: str | None = None


class ReportedCache(Part):
    """The KV cache of the original and of every scheme."""

    layers: tuple[CachedLayer, ...] = Field(description="in network order")
    unknown_window: int | None = Field(
        description="tokens that some layers may keep at most, all being counted with every token; None: it is known"
    )
    damage_tokens: int | None = Field(description="on which the layers' KL was taken; None: it wasn't")
    original: CacheOfScheme
    schemes: tuple[CacheOfScheme, ...]


class Environment(Part):
    """Where some of the steps ran."""

    steps: tuple[str, ...]
    hardware: str
    threads: int
    versions: dict[str, str]
    started: str = Field(default="", description="when the first of them began, ISO 8601; empty: not recorded")


class Report(Record):
    """Everything that one run measured, planned, wrote, checked and evaluated."""

    written_by = "report"
    volatile = frozenset({"environments", "phases"})

    verdict: str = Field(default="", description="which scheme to take, in one sentence (`report.verdict`)")
    decision: Decision = Field(default_factory=lambda: Decision())  # built when it is first used
    measurement_sha256: str
    model: ModelSource
    source_weight_file_bytes: int | None = Field(description="the original's *.safetensors; None: not known")
    searched_weights: int
    searched_source_bytes: int = Field(description="the searched weights in 16 bits")
    calibration: DataSummary = Field(description="without sample_ids")
    chosen_on: DataSummary | None = Field(
        default=None, description="rows by whose KL schemes were chosen or refined, without sample_ids; None: none were"
    )
    engine: str
    method: str
    compute_dtype: str
    fused_scales_shared: bool
    rounding: Rounding | None = Field(default=None, description="None: every weight to its nearest code")
    formats: tuple[str, ...]
    arithmetic: dict[str, str] = Field(default_factory=dict, description="format -> how, where not as it is stored")
    score_unit: str
    score_batches: int
    schemes: tuple[ReportedScheme, ...] = Field(description="from most to fewest bits")
    nesting: tuple[tuple[str, ...], ...] = Field(description="chains of schemes, each holding the one before")
    comparable: bool = Field(description="all evaluations share data, model and arithmetic")
    splits: tuple[str, ...] = Field(description="names of the held-out sets; the first is compared")
    comparisons: tuple[Comparison, ...]
    below_noise_floor: tuple[str, ...] = Field(description="schemes whose KL is below that of BF16 arithmetic")
    edges: tuple[Edge, ...]
    groups: tuple[ReportedGroup, ...]
    positions: Positions | None = Field(description="None: scores of image positions are not known apart")
    evaluations: tuple[ReportedEvaluation, ...]
    tasks: dict[str, TaskSummary] = Field(default={}, description="name of the task -> its questions")
    verification: Verification | None
    probes: tuple[ReportedProbe, ...]
    controls: tuple[ReportedArm, ...]
    control_comparisons: tuple[ControlComparison, ...]
    refinements: tuple[Refinement, ...] = Field(default=(), description="schemes whose groups were swapped in context")
    controls_left_out: tuple[str, ...] = Field(description="control arms for which there was no time")
    modelopt_agrees: tuple[str, ...] = Field(
        default=(), description="schemes, beside which arms stand, that ModelOpt's solver would choose alike"
    )
    prediction: Prediction | None = Field(description="None: too few measured points")
    frontier: PlannedFrontier | None = Field(default=None, description="None: made by an earlier version")
    speeds: Speeds | None = Field(default=None, description="None: the recipe names no profile")
    kv_cache: ReportedCache | None = Field(default=None, description="None: what a layer caches isn't known")
    not_searched: tuple[NotSearched, ...]
    settings: dict[str, Any] = Field(description="the recipe with every default")
    environments: tuple[Environment, ...]
    phases: tuple[PhaseCost, ...]

    def first_result(self, metric: str, split: str) -> EvalResult | None:
        """Return the metric's result of the first scheme that has one: for its unit, reference and noise floor."""
        return next((found for scheme in self.schemes if (found := scheme.result(metric, split))), None)
