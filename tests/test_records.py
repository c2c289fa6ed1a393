"""Records read back as they were written, refuse what isn't theirs, and are described in docs/records.md."""

import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from bitladder import records
from bitladder.cli import app
from bitladder.errors import OutputError, RecordError
from bitladder.recipe import SchemeSpec
from bitladder.records import (
    TASK_ACCURACY,
    Candidate,
    CheckpointManifest,
    CheckpointVerification,
    ControlArm,
    DataSummary,
    EngineSettings,
    EvalResult,
    Evaluation,
    Evidence,
    FileDigest,
    Finding,
    KlPoint,
    KlPoints,
    KvDamage,
    KvScale,
    LayerKl,
    LeftOut,
    LogProbDifference,
    Measurement,
    ModelSource,
    ModuleRecord,
    PairDifference,
    Paired,
    Part,
    PhaseCost,
    ProbedLayer,
    ProbeFinding,
    ProbeResult,
    Profile,
    QuantGroup,
    QuantModule,
    Record,
    Refinement,
    Refinements,
    RoundedModule,
    Rounding,
    RunInfo,
    RunState,
    Scheme,
    SearchedShape,
    ServedAnswer,
    ServedMemory,
    ServedTask,
    SimulatedKls,
    TaskSummary,
    Throughput,
    TimedCell,
    TimedLayer,
    TimedLoad,
    UntouchedModule,
    Verification,
    digest_of,
)
from bitladder.report import types
from bitladder.storage import sha256_of_bytes

DOCUMENTATION = Path(__file__).parent.parent / "docs" / "records.md"

PHASE = PhaseCost(phase="score", seconds=1.5, peak_rss_bytes=1 << 30)
RUN = RunInfo(started="2026-01-01T00:00:00+00:00", hardware="h", threads=2, versions={"torch": "2"}, phases=(PHASE,))
DATA = DataSummary(
    source="s", kind="text", sha256="a", samples=2, tokens=9, sequence_length=5, batch_size=1, seed=0, sample_ids=("x",)
)
GROUP = QuantGroup(name="g", modules=(QuantModule(name="g", tensor="g.weight", shape=(2, 4)),), weight_elements=8)
FILE = FileDigest(name="model.safetensors", bytes=3, sha256="b")
MEASUREMENT: dict[str, Any] = {
    "model": ModelSource(path="p", revision="r", architecture="A", model_type="t", sha256="c", files=(FILE,)),
    "calibration": DATA,
    "engine": "modelopt",
    "method": "gradient",
    "fused_scales_shared": True,
    "compute_dtype": "float32",
    "score_unit": "nats² per token",
    "score_weights": (0.1, 0.2),
    "formats": ("fp8", "nvfp4"),
    "arithmetic": {"nvfp4": "weight-only"},
    "left_out": (LeftOut(group="g", format="nvfp4", reason="r"),),
    "groups": (GROUP,),
    "candidates": (Candidate(group="g", format="fp8", weight_bits=64, scores=(1 / 3, -1e-30)),),
    "untouched": (UntouchedModule(name="lm_head", checkpoint_name="lm_head", reason="head"),),
    "amax_sha256": "d",
    "settings_sha256": "e",
    "run": RUN,
}
ROUNDED = Rounding(
    method="compensated",
    damping=0.1,
    samples=2,
    scored=True,
    files=(FILE,),
    modules=(
        RoundedModule(name="g", codes_sha256="f", largest_shift=1.5, output_error=0.01, nearest_output_error=0.03),
    ),
)
SCHEME = Scheme(
    name="top25",
    measurement_sha256="m",
    asked={"name": "top25", "coverage": 0.25, "exclude": ["*.0.*"]},
    formats={"g": "fp8", "h": "bf16"},
    effective_bits=12.0,
    coverage=0.5,
    searched_weights=16,
    weight_bits=192,
    weight_bytes=32,
    predicted_score=1e-5,
    score_unit="nats² per token",
    exclude_modules=("lm_head",),
    kv_cache_skips=("model.layers.0.self_attn",),
    nested_in=("full",),
)
FINDING = Finding(file="f", tensor=None, problem="p", remedy="r")
RESULT = EvalResult(
    metric="kl",
    split="text",
    unit="nats per token",
    value=1e-3,
    standard_error=None,
    samples=2,
    noise_floor=1e-4,
)
PAIRED = Paired(right="011", reference="110")
SAMPLES: list[Record] = [
    Measurement(**MEASUREMENT),
    SCHEME,
    CheckpointManifest(
        scheme="top25",
        scheme_sha256="s",
        measurement_sha256="m",
        source_sha256="c",
        files=(FILE,),
        modules=(
            ModuleRecord(
                name="g", tensor="g.weight", format="fp8", dtype="F8_E4M3", weight_scale=0.1, input_scale=1 / 7
            ),
        ),
        kv_cache_skips=("model.layers.0.self_attn",),
        kv_scales=(KvScale(tensor="k_proj.k_scale", scale=0.1),),
    ),
    Verification(
        checkpoints=(
            CheckpointVerification(
                scheme="top25",
                manifest_sha256="m",
                tensors_checked=1,
                codes_checked=8,
                bytes_identical=0,
                findings=(FINDING,),
            ),
        ),
        pairs=(PairDifference(first="a", second="b", modules_expected=1, modules_differing=0, findings=(FINDING,)),),
    ),
    Evaluation(
        scheme="top25",
        manifest_sha256="m",
        model_sha256="c",
        data={"text": DATA},
        tasks={"words": TaskSummary(source="s", sha256="q", samples=3, harness="h")},
        arithmetic="float32",
        results=(RESULT, RESULT.model_copy(update={"split": "words", "metric": TASK_ACCURACY, "paired": PAIRED})),
        run=RUN,
    ),
    SimulatedKls(settings_sha256="s", kl={"f": 1e-3}),
    KlPoints(
        measurement_sha256="m",
        settings_sha256="s",
        data=DATA,
        samples=2,
        points=(KlPoint(name="top50", scores={"fp8": 1e-5}, weights={"fp8": 64}, kl=1e-3),),
        run=RUN,
    ),
    KvDamage(
        measurement_sha256="m",
        settings_sha256="s",
        tokens=(7, 8),
        layers=(LayerKl(layer="model.layers.0.self_attn", kl=(1e-3, 2e-3)),),
        run=RUN,
    ),
    Refinements(
        measurement_sha256="m",
        settings_sha256="s",
        data=DATA,
        samples=2,
        refinements=(
            Refinement(
                scheme="top50",
                planned_sha256="p",
                kl_planned=2e-3,
                kl_refined=1e-3,
                evaluations=9,
                changes={"a": "fp8", "b": "bf16"},
            ),
        ),
        run=RUN,
    ),
    Evidence(
        measurement_sha256="m",
        settings_sha256="s",
        data={"text": DATA},
        arithmetic="float32",
        arms=(ControlArm(scheme=SCHEME, results=(RESULT,)),),
        left_out=("top50.random0",),
        run=RUN,
    ),
    ProbeResult(
        checkpoint="top25",
        scheme="top25",
        manifest_sha256="m",
        runtime="vllm",
        version="0.1",
        stage="generate",
        reached="generate",
        device="cpu",
        layers=(
            ProbedLayer(name="g", runtime_name="gh", promised="fp8", format="fp8", method="M", kernel="K", dtype=None),
        ),
        findings=(ProbeFinding(error_class="unequal_scales", severity="warning", where="g", problem="p", remedy="r"),),
        answers=(ServedAnswer(prompt="q", image=False, text="a", token_ids=(1, 2)),),
        log_probs=(LogProbDifference(split="text", tokens=9, mean_abs_difference=0.01, tolerance=0.1),),
        memory=ServedMemory(
            weight_bytes=None, kv_cache_dtype="fp8", kv_cache_bytes=1, kv_cache_tokens=2, peak_gpu_bytes=None
        ),
        throughput=(Throughput(phase="prefill", requests=4, tokens_per_second=1e5),),
        tasks=(ServedTask(task="words", sha256="q", answers=PAIRED),),
        traceback="t",
        run=RUN,
    ),
    Profile(
        model="m",
        searched=(SearchedShape(out_features=32, in_features=16, groups=2),),
        device="d",
        capability=(9, 0),
        driver="580",
        runtime="vllm",
        version="0.1",
        versions={"torch": "2"},
        engine=EngineSettings(
            compiled=False, graphs="FULL_DECODE_ONLY", graph_sizes=(1, 8), tokens_a_step=64, requests_at_once=8
        ),
        layers=(
            TimedLayer(
                format="fp8",
                out_features=32,
                in_features=16,
                method="M",
                kernel=None,
                chain=2,
                cells=(TimedCell(tokens=1, seconds=2e-6, low=1e-6, high=3e-6),),
            ),
        ),
        refused={"nvfp4": "no kernel"},
        loads=(TimedLoad(requests=1, prompt_tokens=2, output_tokens=3, one_token=(0.1,), all_tokens=(0.2,)),),
        run=RUN,
    ),
    RunState(recipe={"output": "o"}, phases={"measure": (PHASE,)}, measured_with={"a": 1}, digests={"f": (1, 2, "s")}),
    Measurement(**MEASUREMENT | {"rounding": ROUNDED}),
]
each_record = pytest.mark.parametrize("record", SAMPLES, ids=lambda record: type(record).__name__)


def types_of(module: Any) -> list[type[Part]]:
    """The records and parts that a module defines."""
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Part)]
    inside = (module.__name__, f"{module.__name__}.")
    return [v for v in found if (v.__module__ == inside[0] or v.__module__.startswith(inside[1])) and v is not Part]


def section_of(name: str) -> str:
    """The part of the documentation under the heading `### name`."""
    match = re.search(rf"^### {name}\n(.*?)(?=^##|\Z)", DOCUMENTATION.read_text(encoding="utf-8"), re.M | re.S)
    assert match, f"docs/records.md has no section '### {name}'"
    return match.group(1)


def read_error(kind: type[Record], path: Path) -> str:
    with pytest.raises(RecordError) as caught:
        kind.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert f"`bitladder {kind.written_by} RECIPE`" in message  # the remedy
    return message


def changed(record: Record, path: Path, **fields: Any) -> Path:
    """Write the record with other raw fields to `path`, and the digest that belongs to them."""
    content = record.model_dump(mode="json") | fields
    digest = sha256_of_bytes(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    path.write_text(json.dumps(content | {"content_sha256": digest}))
    return path


def edits_of(value: Any) -> Iterator[Any]:
    """Give every way to edit one leaf of a JSON value: another number, another string, one entry less."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield {name: part for name, part in value.items() if name != key}
            for edited in edits_of(part):
                yield value | {key: edited}
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield value[:index] + value[index + 1 :]
            for edited in edits_of(part):
                yield [*value[:index], edited, *value[index + 1 :]]
    elif isinstance(value, bool) or value is None:
        yield not value
    elif isinstance(value, int | float):
        yield value * 300 + 1
    else:
        yield f"{value} "


# --- the documentation -------------------------------------------------------------------------------------------


def test_there_is_a_sample_of_every_record() -> None:
    assert {type(record) for record in SAMPLES} == {
        kind for kind in types_of(records) if issubclass(kind, Record) and kind is not Record
    }


@pytest.mark.parametrize("kind", [*types_of(records), *types_of(types)], ids=lambda kind: kind.__name__)
def test_every_field_is_documented_in_the_section_of_its_class(kind: type[Part]) -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| ([^|]*)\|$", section_of(kind.__name__), re.M)
    documented = [name for name, type_, meaning, _ in rows if type_.strip() and meaning.strip()]
    fields = [name for name in kind.model_fields if kind is Record or name != "schema_version"]
    assert documented == fields


@pytest.mark.parametrize("kind", [*types_of(records), *types_of(types)], ids=lambda kind: kind.__name__)
def test_whether_a_field_may_be_null_is_documented(kind: type[Part]) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section_of(kind.__name__), re.M))
    nullable = {
        name
        for name, field in kind.model_fields.items()
        if "None" in str(field.annotation) or type(None) in get_args(field.annotation)
    }
    assert {name for name, type_ in rows.items() if "or null" in type_} == nullable


@pytest.mark.parametrize(
    "kind", [k for k in [*types_of(records), *types_of(types)] if issubclass(k, Record)], ids=lambda k: k.__name__
)
def test_volatile_fields_are_documented(kind: type[Record]) -> None:
    line = re.search(r"^Not in the fingerprint: (.*)\.$", section_of(kind.__name__), re.M)
    assert set(re.findall(r"`(\w+)`", line.group(1)) if line else ()) == kind.volatile
    assert kind.volatile <= set(kind.model_fields)


def test_links_in_the_documentation_lead_somewhere() -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    headings = {heading.lower() for heading in re.findall(r"^#+ (\w+)$", text, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_every_file_name_is_documented() -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    for kind in types_of(records):
        name = getattr(kind, "FILE_NAME", None)
        assert name is None or name in text


# --- reading and writing -----------------------------------------------------------------------------------------


@each_record
def test_round_trip(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    record.write(path)
    again = type(record).read(path)
    assert again == record
    assert again.fingerprint() == record.fingerprint()
    before = path.read_bytes()
    again.write(path)
    assert path.read_bytes() == before


@each_record
def test_files_say_their_schema_version_and_are_readable(record: Record, tmp_path: Path) -> None:
    record.write(tmp_path / "record.json")
    text = (tmp_path / "record.json").read_text(encoding="utf-8")
    assert json.loads(text)["schema_version"] == 2
    assert text.endswith("}\n")
    assert text.count("\n") > 3


@each_record
def test_records_are_frozen(record: Record) -> None:
    with pytest.raises(ValidationError):
        record.schema_version = 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_refused_in_memory(value: float) -> None:
    with pytest.raises(ValidationError):
        Candidate(group="g", format="fp8", weight_bits=64, scores=(value,))
    with pytest.raises(ValidationError):
        EvalResult(metric="kl", split="s", unit="u", value=value, standard_error=None, samples=1, noise_floor=None)


def test_a_result_is_that_of_the_first_held_out_set_unless_another_is_named() -> None:
    other = RESULT.model_copy(update={"split": "images", "value": 2.0})
    # Neither the order of the names nor that of the results: that of the sets.
    evaluation = SAMPLES[4].model_copy(update={"data": {"text": DATA, "images": DATA}, "results": (other, RESULT)})
    assert isinstance(evaluation, Evaluation)
    assert evaluation.result("kl") == evaluation.result("kl", "text") == RESULT
    assert evaluation.result("kl", "images") == other
    assert evaluation.result("perplexity") is evaluation.result("kl", "code") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": {"images": DATA}}, "unknown held-out set text"),
        ({"data": {}}, "at least 1 item"),
        ({"results": (RESULT, RESULT)}, "same metric and held-out set"),
    ],
)
def test_results_are_of_known_held_out_sets(fields: dict[str, Any], message: str) -> None:
    known = {name: getattr(SAMPLES[4], name) for name in Evaluation.model_fields}
    with pytest.raises(ValidationError, match=message):
        Evaluation(**known | fields)


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["effective_bits", "asked"])
def test_nan_is_refused_in_a_file(tmp_path: Path, name: str, field: str) -> None:
    value = float(name.replace("Infinity", "inf"))
    path = changed(SCHEME, tmp_path / "scheme.json", **{field: {"coverage": value} if field == "asked" else value})
    assert name in read_error(Scheme, path)


@each_record
@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b'{"schema_version": 1', b"\x00" * 100])
def test_corrupt_files_are_refused(record: Record, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(data)
    assert "can't be read as JSON" in read_error(type(record), path)


@each_record
def test_truncated_files_are_refused(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record.write(path)
    path.write_bytes(path.read_bytes()[:-3])
    assert f"delete it and run `bitladder {record.written_by} RECIPE` again" in read_error(type(record), path)


def test_missing_files_name_the_command(tmp_path: Path) -> None:
    assert "does not exist; `bitladder plan RECIPE` writes it" in read_error(Scheme, tmp_path / "absent.json")


def test_every_record_names_a_command_that_there_is() -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    kinds = [kind for kind in Record.__subclasses__() if kind.__module__.startswith("bitladder.")]
    assert {kind.written_by for kind in kinds} > {"measure", "plan", "run"}
    assert {kind.written_by for kind in kinds} <= commands


def test_directories_are_refused(tmp_path: Path) -> None:
    assert "can't be read" in read_error(Scheme, tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", '"text"', "null", "{}", '{"torch_dtype": "bfloat16"}'])
def test_foreign_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    assert "has schema_version None, this Bitladder reads 2" in read_error(Scheme, path)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, 2.5])
@each_record
def test_other_schema_versions_are_refused(record: Record, version: Any, tmp_path: Path) -> None:
    path = changed(record, tmp_path / "record.json", schema_version=version)
    assert f"has schema_version {version!r}" in read_error(type(record), path)


@each_record
def test_no_edit_of_a_record_is_read(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record.write(path)
    written = json.loads(path.read_text(encoding="utf-8"))
    edits = [edited for edited in edits_of(written) if edited.get("schema_version") == written["schema_version"]]
    assert len(edits) > 2
    for edited in edits:
        path.write_text(json.dumps(edited))
        assert "was changed since it was written" in read_error(type(record), path), edited
        assert type(record).read_if_whole(path) is None
    path.write_text(json.dumps(written))  # laid out otherwise: the same record
    assert type(record).read(path) == record


def test_a_record_nested_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text("[" * 100_000)
    assert "can't be read as JSON" in read_error(Scheme, path)


@each_record
def test_one_kind_is_not_read_as_another(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record.write(path)
    for other in SAMPLES:
        if type(other) is not type(record):
            assert f"is not a {type(other).__name__}" in read_error(type(other), path)


@each_record
def test_unknown_fields_are_refused(record: Record, tmp_path: Path) -> None:
    path = changed(record, tmp_path / "record.json", surprise=1)
    assert "surprise: " in read_error(type(record), path)


def test_a_wrong_field_deep_inside_is_named(tmp_path: Path) -> None:
    path = tmp_path / "measurement.json"
    measurement = Measurement(**MEASUREMENT)
    raw = measurement.model_dump(mode="json")
    raw["candidates"][0]["scores"][1] = "high"
    changed(measurement, path, candidates=raw["candidates"])
    assert "candidates.0.scores.1" in read_error(Measurement, path)


# --- the fingerprint ---------------------------------------------------------------------------------------------


@each_record
def test_fingerprint_follows_its_documented_rule(record: Record) -> None:
    raw = {name: value for name, value in record.model_dump(mode="json").items() if name not in record.volatile}
    text = json.dumps(raw, sort_keys=True, separators=(",", ":"))
    assert record.fingerprint() == sha256_of_bytes(text.encode())


def other_value(value: Any) -> Any:
    """Something of the same type that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, dict):
        return {}
    if isinstance(value, tuple):
        return ()
    if isinstance(value, Part | SchemeSpec):
        name = next(iter(type(value).model_fields))
        return value.model_copy(update={name: other_value(getattr(value, name))})
    return f"{value}x"


@each_record
def test_fingerprint_changes_with_every_field_but_the_volatile(record: Record) -> None:
    for name in type(record).model_fields:
        other = record.model_copy(update={name: other_value(getattr(record, name))})
        assert other != record, name
        assert (other.fingerprint() == record.fingerprint()) == (name in record.volatile), name


def test_a_probe_passes_with_warnings_and_says_the_class_of_its_first_error() -> None:
    result = next(record for record in SAMPLES if isinstance(record, ProbeResult))
    assert result.ok
    assert result.verdict == "ok"
    found = ProbeFinding(error_class="bad_scale", where="g", problem="p", remedy="r")
    broken = result.model_copy(update={"findings": (*result.findings, found)})
    assert not broken.ok
    assert broken.verdict == "bad_scale"


def test_fingerprint_ignores_when_and_where_it_ran() -> None:
    record = Measurement(**MEASUREMENT)
    later = RUN.model_copy(update={"started": "2027", "phases": ()})
    assert Measurement(**MEASUREMENT | {"run": later}).fingerprint() == record.fingerprint()
    assert Measurement(**MEASUREMENT | {"run": None}).fingerprint() == record.fingerprint()


def test_fingerprint_ignores_the_order_of_keys_and_lists_against_tuples() -> None:
    formats = dict(reversed(SCHEME.formats.items()))
    asked = SchemeSpec.model_validate({"exclude": ("*.0.*",), "coverage": 0.25, "name": "top25"})
    assert SCHEME.model_copy(update={"formats": formats, "asked": asked}).fingerprint() == SCHEME.fingerprint()


def test_digest_of_keeps_parts_apart() -> None:
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"])
    assert digest_of([]) != digest_of([""])


# --- crashes -----------------------------------------------------------------------------------------------------


@each_record
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_record(
    record: Record, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    record.write(path)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OutputError, match="no space left"):
            record.model_copy(update={"schema_version": 9}).write(path)
    assert type(record).read(path) == record
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_crash_while_writing_keeps_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    SCHEME.write(path)
    real = Path.write_bytes

    def half(self: Path, data: bytes) -> int:
        real(self, data[: len(data) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(KeyboardInterrupt):
            SCHEME.model_copy(update={"name": "other"}).write(path)
    assert Scheme.read(path) == SCHEME
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


# --- what the types compute --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"groups": (GROUP, GROUP)}, "same name"),
        ({"candidates": ()}, "don't cover"),
        ({"candidates": MEASUREMENT["candidates"] * 2}, "don't cover"),
        ({"formats": ("fp8", "nvfp4", "x")}, "don't cover"),
        ({"left_out": ()}, "don't cover"),
        ({"left_out": (LeftOut(group="g", format="fp8", reason="r"),)}, "don't cover"),
        ({"left_out": (LeftOut(group="z", format="nvfp4", reason="r"),)}, "unknown group z, or in a format"),
        ({"left_out": (LeftOut(group="g", format="x", reason="r"),)}, "unknown group g, or in a format"),
        ({"score_weights": (1.0,)}, "2 scores, 1 batches"),
        ({"candidates": (Candidate(group="z", format="fp8", weight_bits=1, scores=(0, 0)),)}, "unknown group z"),
    ],
)
def test_a_measurement_is_consistent(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        Measurement(**MEASUREMENT | fields)


def test_sensitivity_is_the_weighted_sum_of_raw_scores() -> None:
    measurement = Measurement(**MEASUREMENT)
    assert measurement.sensitivity(measurement.candidates[0]) == pytest.approx(0.1 / 3)
    assert measurement.searched_weights == 8
    assert measurement.by_group() == {"g": {"fp8": measurement.candidates[0]}}


def test_verdicts_and_lookups() -> None:
    verification = next(record for record in SAMPLES if isinstance(record, Verification))
    assert not verification.ok
    assert not verification.checkpoints[0].ok
    clean = verification.checkpoints[0].model_copy(update={"findings": ()})
    assert not verification.model_copy(update={"checkpoints": (clean,)}).ok  # the pair still has one
    assert verification.model_copy(update={"checkpoints": (clean,), "pairs": ()}).ok
    evaluation = next(record for record in SAMPLES if isinstance(record, Evaluation))
    assert evaluation.result("kl") == RESULT
    assert evaluation.result("perplexity") is None
    assert SCHEME.quantised_groups() == {"g"}
    assert next(r for r in SAMPLES if isinstance(r, CheckpointManifest)).total_bytes == 3
