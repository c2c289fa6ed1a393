"""The recipe as frozen types: sections, their keys and defaults, and what contradicts what in them."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, Self, get_args

from pydantic import (
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from bitladder.reading import twice
from bitladder.recipe.kv_cache import KvCache
from bitladder.recipe.rows import DataSpec, HeldOutSpec, OtherRowsSpec, SampleSpec, rows_problem
from bitladder.recipe.schemes import SchemeSpec
from bitladder.recipe.section import SIXTEEN_BITS, Section, beside_sixteen_bits, shortened
from bitladder.recipe.speed import LoadSpec
from bitladder.storage import TEMPORARY_PREFIX

ControlKind = Literal["random", "inverse", "first_last", "largest", "lowest_score", "modelopt"]
ServedOn = Literal["ampere", "ada", "hopper", "blackwell", "blackwell_rtx", "cpu", "cpu_amx"]
TaskName = Literal["novel_endings", "novel_words"]
CONTROL_KINDS: tuple[ControlKind, ...] = get_args(ControlKind)
SCHEME_PLACE = "{scheme}"  # in `layout.checkpoints`: where the scheme's name goes
# What lies in the output directory itself: a layout that names one of these would overwrite it.
_OURS = frozenset(
    [
        "run.json",
        "measurement.json",
        "measurement.safetensors",
        "simulated.json",
        "kl_points.json",
        "kv_damage.json",
        "refinements.json",
        "schemes",
        "verification.json",
        "evaluations",
        "evidence.json",
        "generated",
        "probes",
        "report.html",
        "report.md",
        "report.json",
        "figures",
        "measuring",
        "measuring_kv",
        "codes",
        ".lock",
        "run.log",
    ]
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


class ModelSpec(Section):
    """Which model: a local directory or a Hub id, and which part of it is searched."""

    path: str
    revision: str | None = None
    search: Literal["language_model"] = "language_model"


class TasksSpec(Section):
    """Tasks of lm-evaluation-harness that every checkpoint and the original are asked; their questions are packaged."""

    names: tuple[TaskName, ...] = Field(default=(), description="empty: none")
    samples: int = Field(default=500, gt=0, le=500, description="questions of each, the first ones")

    @field_validator("names")
    @classmethod
    def _each_once(cls, value: tuple[TaskName, ...]) -> tuple[TaskName, ...]:
        again = twice(value)
        if again:
            raise ValueError(f"task {again[0]} is given twice; name each once")
        return value


class MeasureSpec(Section):
    """How sensitivity is measured."""

    engine: Literal["modelopt", "native"] = Field(default="native", description="native: ours, without ModelOpt")
    method: Literal["gradient", "kl_div", "fisher"] = Field(
        default="fisher",
        description="fisher: KL to second order, at the price of a gradient; engine modelopt hasn't it, its default is "
        "gradient",
    )
    formats: tuple[str, ...] = Field(default=("fp8",), min_length=1)
    share_fused_scales: bool = Field(default=True, description="False only to compare with ModelOpt; not exportable")
    rounding: Literal["nearest", "compensated"] = Field(
        default="nearest", description="compensated: codes that make up for one another's errors (GPTQ)"
    )
    damping: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="of compensated rounding; more of it trusts the calibration tokens less. None: 0.1",
    )
    score_samples: int | None = Field(default=None, gt=0, description="samples scored; None: all calibration samples")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="arithmetic while scoring; auto: float32 on a CPU, bfloat16 on a GPU"
    )
    device: str = Field(default="auto", description="auto: a GPU where there is one")
    memory_gb: float | None = Field(
        default=None, gt=0, description="of the device, that measuring may take at most; None: what is free"
    )

    @model_validator(mode="before")
    @classmethod
    def _method_of_engine(cls, content: Any) -> Any:
        if isinstance(content, Mapping) and content.get("engine") == "modelopt":
            return {"method": "gradient", **content}
        return content

    @field_validator("formats")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        found = beside_sixteen_bits(value)
        if not found:
            raise ValueError(f"names no format beside {SIXTEEN_BITS}, which is always there; name one")
        return found

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError(f"device {shortened(value)} is none that is measured on; use auto, cpu, cuda or cuda:N")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.method == "fisher" and self.engine != "native":
            raise ValueError("method: fisher needs engine: native; ModelOpt has gradient and kl_div")
        if self.memory_gb is not None and self.engine != "native":
            raise ValueError("memory_gb needs engine: native; ModelOpt takes what it needs")
        if self.damping is not None and self.rounding != "compensated":
            raise ValueError(
                f"damping is of rounding: compensated, and {self.rounding} would pass it over; set rounding, or remove "
                f"it (got {self.damping:g})"
            )
        if self.rounding == "compensated" and not self.share_fused_scales:
            raise ValueError("rounding: compensated needs share_fused_scales: true")
        return self


class WorkersSpec(Section):
    """Processes that share a measurement, each with the model on a GPU of its own, through Ray.

    Not a part of `MeasureSpec`: how many measured changes neither the numbers nor what they belong to.
    """

    count: int = Field(default=0, ge=0, description="0: this process alone, without Ray")
    address: str | None = Field(default=None, description="of a Ray cluster; None: one is started on this machine")
    threads: int | None = Field(default=None, gt=0, description="of torch in each; None: this process's, shared out")

    @model_validator(mode="after")
    def _counted(self) -> Self:
        for name in ("address", "threads"):
            if not self.count and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is of workers, of which count: 0 has none; set count, or remove it (got "
                    f"{shortened(getattr(self, name))})"
                )
        return self

    def problem(self, measurement: MeasureSpec) -> str | None:
        """Return why these workers can't measure so, in one line, or None."""
        if self.count and measurement.engine != "native":
            return (
                f"workers.count is {self.count}, but measurement.engine: {measurement.engine} measures in one process; "
                "use engine: native, or leave workers out"
            )
        if self.count and ":" in measurement.device:
            return f"measurement.device: {measurement.device} names one GPU, workers take one each; use device: cuda"
        return None


class ExportSpec(Section):
    """How checkpoints are written."""

    carrier: Literal["modelopt", "compressed-tensors"] = Field(
        default="modelopt", description="whose layout they have; compressed-tensors' loads in transformers as it is"
    )
    share_files: bool = Field(default=False, description="hard-link files that are equal between schemes")


class LayoutSpec(Section):
    """Where, relative to `output`, what others read goes; all records lie in `output` itself."""

    checkpoints: str = Field(default="checkpoints/{scheme}", description="the directory of each scheme's checkpoint")
    manifests: bool = Field(default=False, description="also write `<checkpoint directory>.manifest.json` beside each")
    report: str | None = Field(default=None, description="also write the Markdown report to this file")

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.checkpoints.count(SCHEME_PLACE) != 1 or SCHEME_PLACE not in Path(self.checkpoints).name:
            raise ValueError(f"checkpoints {self.checkpoints!r}: the last part of the path needs {SCHEME_PLACE}, once")
        if self.report is not None and not self.report.endswith(".md"):
            raise ValueError(f"report {self.report!r}: it is Markdown; name a file that ends in .md")
        return self

    def problem(self, output: str, names: Sequence[str]) -> str | None:
        """Return which of the places collide with one another or with what lies in the output, or None."""
        root = PurePath(os.path.normpath(output))
        places: dict[PurePath, str] = {}
        for name in names:
            place = self.checkpoints.replace(SCHEME_PLACE, name)
            wanted = [(place, f"checkpoints of {name}")]
            wanted += [(f"{place}.manifest.json", f"manifests of {name}")] if self.manifests else []
            for path, what in wanted:
                whole = PurePath(os.path.normpath(root / path))
                near = (known for known in places if whole.is_relative_to(known) or known.is_relative_to(whole))
                inside = next(near, None)
                if inside is not None:
                    return f"layout puts {what} where {places[inside]} goes ({path}); name another place"
                places[whole] = what
        if self.report is not None:
            places.setdefault(PurePath(os.path.normpath(root / self.report)), "report")
        for whole, what in places.items():
            if root.is_relative_to(whole):
                return f"layout puts {what} where the output itself is ({whole}); name a directory in it"
            first = whole.relative_to(root).parts[0] if whole.is_relative_to(root) else ""
            if first in _OURS or first.startswith(TEMPORARY_PREFIX):
                return f"layout puts {what} at {whole}, where Bitladder keeps its own {first}; name another place"
        return None


class ControlSpec(Section):
    """Other choices of groups at each scheme's bits, evaluated beside it to show what the search is worth."""

    kinds: tuple[ControlKind, ...] = Field(default=CONTROL_KINDS, description="empty: none")
    seeds: int = Field(default=3, ge=1, description="random arms of each scheme")
    max_seconds: float = Field(default=300.0, ge=0, description="no arm is begun after so many seconds")


class RefineSpec(Section):
    """Groups at a scheme's edge scored again in context, and swapped while the KL on the samples that choose falls."""

    evaluations: int = Field(default=0, ge=0, description="schemes that may be simulated for each scheme; 0: off")
    marginal: int = Field(default=6, ge=1, description="groups on each side of the edge")

    @model_validator(mode="after")
    def _suffices_for_a_round(self) -> Self:
        least = 2 * self.marginal + 2
        if 0 < self.evaluations < least:
            raise ValueError(f"evaluations: {self.evaluations} don't suffice for a round, give at least {least}, or 0")
        return self


class CardSpec(Section):
    """What a checkpoint's model card says of the original, for a hub: its id and licence."""

    base_model: str | None = Field(default=None, description="id on the Hub; None: the model's, if it came from there")
    license: str | None = Field(default=None, description="id of a licence; None: what the original's own card says")

    @field_validator("base_model")
    @classmethod
    def _an_id(cls, value: str | None) -> str | None:
        if value is not None and not HUB_ID.fullmatch(value):
            raise ValueError(f"{shortened(value)} is no id of the Hub, as organisation/name")
        return value


class VllmSpec(Section):
    """The environment of vLLM in which checkpoints are probed, and how far."""

    python: str = Field(description="the interpreter of vLLM's environment, e.g. .venv-vllm/bin/python")
    stage: Literal["load", "generate"] = Field(
        default="load", description="load: vLLM's own loader, on any machine; generate: its engine as well"
    )
    timeout: float = Field(default=1800.0, gt=0, description="seconds for one checkpoint")


class RuntimesSpec(Section):
    """Runtimes in environments of their own. Pre-flight needs none, and is always done."""

    vllm: VllmSpec | None = None


class Recipe(Section):
    """Everything a run needs. Paths are absolute once the recipe is read."""

    model: ModelSpec
    calibration: tuple[SampleSpec, ...] = Field(min_length=1)
    validation: tuple[OtherRowsSpec, ...] = Field(
        default=(), description="rows on which schemes are chosen by KL; empty: calibration's scored ones"
    )
    held_out: tuple[HeldOutSpec, ...] = Field(default_factory=lambda: (HeldOutSpec(),), min_length=1)
    tasks: TasksSpec = Field(default_factory=TasksSpec)
    measurement: MeasureSpec = Field(default_factory=MeasureSpec)
    workers: WorkersSpec = Field(default_factory=WorkersSpec)
    schemes: tuple[SchemeSpec, ...] = Field(min_length=1)
    kv_cache: KvCache = "none"
    serve_on: ServedOn | None = Field(default=None, description="whose arithmetic is scored; None: that of the device")
    profile: str | None = Field(
        default=None, description="a profile.json of `bitladder profile`, or the name of one that comes with Bitladder"
    )
    tensor_parallel: int = Field(
        default=1, gt=0, description="GPUs that share the language model where it is served; the profile is of as many"
    )
    load: LoadSpec = Field(default_factory=LoadSpec, description="what speeds are predicted for")
    refine: RefineSpec = Field(default_factory=RefineSpec)
    controls: ControlSpec = Field(default_factory=ControlSpec)
    export: ExportSpec = Field(default_factory=ExportSpec)
    layout: LayoutSpec = Field(default_factory=LayoutSpec)
    card: CardSpec = Field(default_factory=CardSpec)
    runtimes: RuntimesSpec = Field(default_factory=RuntimesSpec)
    output: str

    @field_validator("calibration", "validation", "held_out", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, Mapping | SampleSpec | OtherRowsSpec):
            return (value,)
        if not isinstance(value, list | tuple):
            what = str(info.field_name).replace("_", "-")
            raise ValueError(f"give a {what} set or a list of them; got {shortened(value)}")
        return value

    @field_serializer("calibration")
    def _as_one_or_several(self, value: tuple[SampleSpec, ...]) -> Any:
        return value[0] if len(value) == 1 else value  # one set is written as it always was

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [scheme.name for scheme in self.schemes]
        again = twice(names)
        if again:
            raise ValueError(f"two schemes are named {again[0]}; rename one")
        calibrated, scored = sum(one.samples for one in self.calibration), self.measurement.score_samples
        if scored is not None and scored > calibrated:
            raise ValueError(
                f"measurement.score_samples is {scored}, calibration.samples is {calibrated}; score at most as many as "
                "are calibrated"
            )
        sets = [held_out.name for held_out in self.held_out]
        again = twice(sets)
        if again:
            raise ValueError(f"two held-out sets are named {again[0]}; give each a `name` of its own")
        both = sorted({*sets} & {*self.tasks.names})
        if both:
            raise ValueError(f"a held-out set has the name of the task {both[0]}; give it another `name`")
        problem = (
            self.layout.problem(self.output, names)
            or self.workers.problem(self.measurement)
            or self._slow()
            or rows_problem(self.calibration, self.validation, self.held_out)
        )
        if problem is not None:
            raise ValueError(problem)
        return self

    def _slow(self) -> str | None:
        """Return why schemes can't be asked for by speed so, in one line, or None."""
        by_speed = [scheme.name for scheme in self.schemes if scheme.by_speed]
        if by_speed and self.profile is None:
            return (
                f"scheme {by_speed[0]} asks for speed, which a profile of the device that serves predicts; name one as "
                "`profile` (`bitladder profile` makes it)"
            )
        if by_speed and self.refine.evaluations:
            return (
                f"scheme {by_speed[0]} asks for speed, and refining swaps groups at a scheme's bits; set "
                "refine.evaluations: 0"
            )
        return None

    @property
    def maps_kl(self) -> bool:
        """Whether a scheme is chosen by a map from scores to KL."""
        return any(scheme.by_kl for scheme in self.schemes)

    @property
    def shares_kv_cache(self) -> bool:
        """Whether a scheme has an FP8 KV cache in the layers that its own KL chooses."""
        return any(scheme.kv_share is not None for scheme in self.scheme_specs())

    @property
    def chooses_by_kl(self) -> bool:
        """Whether anything of its schemes is chosen by KL on validation or calibration samples."""
        return self.maps_kl or self.shares_kv_cache or self.refine.evaluations > 0

    def data_of(self, rows: OtherRowsSpec) -> DataSpec:
        """Return where validation or held-out rows come from: the first calibration set's data where they name none."""
        return rows.data or self.calibration[0].data

    def scheme_specs(self) -> tuple[SchemeSpec, ...]:
        """Return the schemes with what they leave to the recipe filled in."""
        if self.kv_cache == "none":
            return self.schemes
        return tuple(
            scheme if scheme.kv_cache else scheme.model_copy(update={"kv_cache": self.kv_cache})
            for scheme in self.schemes
        )
