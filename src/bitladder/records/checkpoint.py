"""Records of checkpoints: manifest and verification."""

from typing import ClassVar, Literal

from pydantic import Field

from bitladder.records.base import FileDigest, Grown, Part, Record


class ModuleRecord(Grown):
    """One quantised module in a checkpoint: scales are multipliers that restore a value from its code."""

    later = frozenset({"weight_scale_2", "weight_zero_point_sha256"})

    name: str
    tensor: str
    format: str
    dtype: str
    weight_scale: float | None = Field(description="None: one a row or a block, of which the digest is kept")
    weight_scale_sha256: str | None = Field(default=None, description="of the scales of rows or blocks; else None")
    weight_scale_2: float | None = Field(default=None, description="of a weight whose blocks have scales; else None")
    weight_zero_point_sha256: str | None = Field(default=None, description="of the zero points of groups; else None")
    input_scale: float | None = Field(description="None: made of the input itself when it is served")
    rounding: Literal["nearest", "compensated"] = "nearest"


class KvScale(Part):
    """The scale of one layer's cached keys or values: a multiplier that restores a value from its code."""

    tensor: str
    scale: float


class CheckpointManifest(Grown, Record):
    """What an exported directory holds, written last; `bitladder_manifest.json` in that directory."""

    written_by = "export"
    FILE_NAME: ClassVar[str] = "bitladder_manifest.json"
    CARD_NAME: ClassVar[str] = "README.md"  # the model card, which every report writes again; not among `files`
    later = frozenset({"carrier", "kv_cache_skips"})

    scheme: str
    scheme_sha256: str
    measurement_sha256: str
    source_sha256: str
    files: tuple[FileDigest, ...]
    modules: tuple[ModuleRecord, ...]
    carrier: Literal["modelopt", "compressed-tensors"] = Field(default="modelopt", description="whose layout it has")
    kv_cache_format: str | None = None
    kv_cache_skips: tuple[str, ...] = Field(
        default=(), description="attention modules whose cache stays in 16 bits, if the runtime is told so"
    )
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

    written_by = "verify"

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

    @property
    def manifest_sha256(self) -> dict[str, str]:
        """What was verified: the fingerprint of each scheme's manifest."""
        return {check.scheme: check.manifest_sha256 for check in self.checkpoints}

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
