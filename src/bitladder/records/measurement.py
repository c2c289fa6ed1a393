"""Records of a measurement: model, data, groups, scores."""

import math
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from bitladder.errors import MeasurementError
from bitladder.records.base import BF16_BITS, FileDigest, Grown, Part, Record, RunInfo

Counted = Literal["assistant turns", "all tokens"]


class ModelSource(Grown):
    """Which model this is, down to the bytes of its weights."""

    later = frozenset({"provenance"})

    path: str
    revision: str | None = None
    architecture: str
    model_type: str
    sha256: str = Field(description="SHA-256 over the names and digests of the config and weight files")
    files: tuple[FileDigest, ...] = ()
    provenance: str | None = Field(default=None, description="where the weights come from, by its file PROVENANCE")


class DataSummary(Grown):
    """What a data set gave: enough to make it again and to see that it is the same.

    Several sets in one have `kind: mixed`; `samples`, `tokens` and `sample_ids` are those of all, `sequence_length` and
    `batch_size` the greatest, `seed` the first one's.
    """

    later = frozenset({"parts", "counted", "null_rows"})

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

    @property
    def fused_shape(self) -> tuple[int, int] | None:
        """[out_features, in_features] of the one layer that a runtime makes of its modules; None: not known."""
        shapes = [module.shape for module in self.modules if module.shape is not None]
        if len(shapes) < len(self.modules):
            return None
        return sum(rows for rows, _ in shapes), shapes[0][1]

    def bits_saved(self, candidate: "Candidate") -> int:
        """Return how many bits one of the group's candidates saves against 16."""
        return self.weight_elements * BF16_BITS - candidate.weight_bits


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


class LeftOut(Part):
    """A format that a group can't have, though others of the measurement it can; it is no candidate."""

    group: str
    format: str
    reason: str


class RoundedModule(Grown):
    """What one module's compensated codes in a format do, on calibration rows that they weren't made from.

    Errors are means over the calibration sets. In measurements of an earlier version tokens count alike, or the rows
    are those that the codes were made from.
    """

    later = frozenset({"format", "scales_sha256", "nearest_taken"})

    name: str
    format: str = Field(default="", description="empty: the only one of a measurement that an earlier version made")
    codes_sha256: str = Field(description="of the codes, row by row, as they are stored")
    scales_sha256: dict[str, str] = Field(default_factory=dict, description="of the scales that were chosen, by part")
    largest_shift: float = Field(description="largest |code · scale - weight|, in units of the scale")
    output_error: float = Field(description="|X (W - Q)| / |X W|, inputs weighed by what they matter")
    nearest_output_error: float = Field(description="the same with the nearest codes")
    nearest_taken: bool = Field(
        default=False, description="the codes are the nearest ones: on a calibration set the others did worse"
    )


class Rounding(Part):
    """How the codes were chosen where they are not the nearest ones."""

    method: Literal["compensated"]
    damping: float
    samples: int = Field(description="calibration samples")
    scored: bool = Field(description="whether the scores are those of these codes; else of the nearest ones")
    files: tuple[FileDigest, ...] = Field(description="codes, one file a decoder layer, in the directory `codes`")
    modules: tuple[RoundedModule, ...]


class Measurement(Grown, Record):
    """One sensitivity measurement: everything that planning and exporting need.

    A group's sensitivity is Σ_batches `score_weights[b]` × `scores[b]`; see `measuring`.
    """

    written_by = "measure"
    volatile = frozenset({"run"})
    later = frozenset({"left_out", "arithmetic"})

    model: ModelSource
    calibration: DataSummary
    engine: str
    method: str
    fused_scales_shared: bool
    compute_dtype: str
    score_unit: str
    score_weights: tuple[float, ...]
    formats: tuple[str, ...]
    arithmetic: dict[str, Literal["weight-only", "powers of two"]] = Field(
        default_factory=dict, description="format -> how it was scored, where not as it is stored; see `serve_on`"
    )
    groups: tuple[QuantGroup, ...]
    candidates: tuple[Candidate, ...]
    left_out: tuple[LeftOut, ...] = Field(default=(), description="formats that a group's shape doesn't allow")
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
        for one in self.left_out:
            if one.group not in groups or one.format not in self.formats:
                raise ValueError(f"left_out of unknown group {one.group}, or in a format {one.format} not measured")
        seen |= {(one.group, one.format) for one in self.left_out}
        missing = [(g, f) for g in sorted(groups) for f in self.formats if (g, f) not in seen]
        if missing or len(seen) != len(self.candidates) + len(self.left_out):
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
        """Return the candidate's raw score of each batch, image-token positions weighted; see `measuring`."""
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
        """Return this measurement with image-token positions weighted; see `measuring`. Its fingerprint differs.

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

    def only(self, formats: Sequence[str] | None) -> "Measurement":
        """Return this measurement as if only these formats were measured, in its own order; its fingerprint differs.

        Args:
            formats: of those measured; None: all.

        Raises:
            MeasurementError: one isn't measured.
        """
        if formats is None or set(formats) == set(self.formats):
            return self
        unknown = [name for name in formats if name not in self.formats]
        if unknown:
            raise MeasurementError(f"format {unknown[0]} is not measured; measured: {', '.join(self.formats)}")
        return self.model_copy(
            update={
                "formats": tuple(name for name in self.formats if name in formats),
                "candidates": tuple(one for one in self.candidates if one.format in formats),
                "left_out": tuple(one for one in self.left_out if one.format in formats),
            }
        )

    def without(self, left_out: Sequence[LeftOut]) -> "Measurement":
        """Return this measurement as if groups couldn't have some of their formats; its fingerprint differs.

        Args:
            left_out: which, candidates until now, and why.
        """
        if not left_out:
            return self
        gone = {(one.group, one.format) for one in left_out}
        kept = tuple(one for one in self.candidates if (one.group, one.format) not in gone)
        return self.model_copy(update={"candidates": kept, "left_out": (*self.left_out, *left_out)})

    def by_group(self) -> dict[str, dict[str, Candidate]]:
        """Return the candidates as `{group name: {format: candidate}}`, in the order of `groups`."""
        table: dict[str, dict[str, Candidate]] = {group.name: {} for group in self.groups}
        for candidate in self.candidates:
            table[candidate.group][candidate.format] = candidate
        return table
