"""A wrong recipe is one line that names the key and the remedy; a right one has absolute paths."""

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import bitladder
from bitladder.errors import RecipeError
from bitladder.recipe import DataSpec, MeasureSpec, Recipe, parse_schemes, read_recipe, resolve_path

GOOD: dict[str, Any] = {
    "model": {"path": "./model"},
    "calibration": {"data": {"kind": "text", "path": "data/text.txt"}, "samples": 8},
    "held_out": {"data": {"kind": "jsonl", "path": "data/held.jsonl"}, "samples": 4},
    "schemes": [{"name": "top25", "coverage": 0.25}, {"name": "full", "coverage": 1}],
    "output": "runs/one",
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The good recipe with `value` at a dotted path."""
    recipe = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place: Any = recipe
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
    place[last] = value
    return recipe


def write(directory: Path, content: Any) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def error_of(path: Path) -> str:
    """The message of the RecipeError for this file, which is one line."""
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "pydantic" not in message
    return message


def test_the_good_recipe_is_read(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, GOOD))
    assert [scheme.name for scheme in recipe.schemes] == ["top25", "full"]
    assert recipe.measurement.formats == ("fp8",)
    assert recipe.kv_cache == "none"


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("modle", "model"),
        ("kv_cahce", "kv_cache"),
        ("model.pth", "path"),
        ("measurement.metod", "method"),
        ("export.share_file", "share_files"),
        ("calibration.sample", "samples"),
        ("calibration.data.textfield", "text_field"),
        ("held_out.data.pat", "path"),
        ("held_out.tasks", "task"),
        ("schemes.0.covrage", "coverage"),
        ("schemes.1.effective_bit", "effective_bits"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(tmp_path: Path, path: str, near: str) -> None:
    message = error_of(write(tmp_path, changed(path, "x")))
    assert f"unknown key '{path}'; did you mean '{near}'?" in message


def test_an_unknown_key_without_a_near_one_lists_the_known(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, changed("calibration.data.zzz", 1)))
    known = "kind, path, text_field, split, annotations, subset, prompt, temperature"
    assert f"unknown key 'calibration.data.zzz'; known here: {known}" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "r.yaml is empty; a recipe is a mapping of keys, of which model, calibration, schemes, output are needed"),
        ("- a\n", "r.yaml holds ['a']; a recipe is a mapping"),
        ("model: {path: m}\ndevice: cuda\n", "line 2: unknown key 'device'; it belongs further in: measurement.device"),
        ("samples: 4\n", "further in: calibration.samples or validation.samples or held_out.samples"),
        ("calibration:\n  kind: text\n", "'calibration.kind'; it belongs further in: calibration.data.kind"),
        ("schemes:\n- {name: a, device: cuda}\n", "'schemes.0.device'; it belongs elsewhere: measurement.device"),
        ("validation:\n  name: near\n", "unknown key 'validation.name'; known here: data, samples,"),
        ("model: m\n", "line 1: model: give a mapping of keys: path, revision, search (got 'm')"),
        ("\nschemes:\n  name: a\n", "line 2: schemes: give a list, a dash before each entry (got {'name': 'a'})"),
        ("measurement:\n  formats: fp8\n", "line 2: measurement.formats: give a list, as [a, b] (got 'fp8')"),
        ("schemes:\n- name: a\n  coverage: 25\n", "line 3: schemes.0.coverage: .*; got 25: did you mean 0.25?"),
        ("schemes:\n- {name: a, coverage: 1.5}\n", "line 2: schemes.0.coverage: .*less than or equal to 1"),
        ("calibration:\n- samples: 2\n- samples: 0\n", "line 3: calibration.1.samples: .*greater than 0"),
        ("model: {path: x\nfoo: [", "r.yaml is not YAML that can be read: line 2, column 4: expected ',' or '}'"),
    ],
)
def test_a_mistake_is_placed_and_answered(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert re.search(re.escape(words).replace(r"\.\*", ".*"), error_of(path))


def test_a_misspelt_key_is_named_rather_than_the_missing_one(tmp_path: Path) -> None:
    content = changed("model", {"pth": "./model"})
    assert "unknown key 'model.pth'; did you mean 'path'?" in error_of(write(tmp_path, content))
    content = changed("held_out.data", {"knd": "text", "path": "x"})
    assert "unknown key 'held_out.data.knd'; did you mean 'kind'?" in error_of(write(tmp_path, content))


def test_a_key_that_is_not_text(tmp_path: Path) -> None:
    assert "1" in error_of(write(tmp_path, {**GOOD, 1: 2}))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("calibration.samples", 0, "greater than 0 (got 0)"),
        ("calibration.samples", "many", "not the text 'many'"),
        ("calibration.sequence_length", 1, "greater than 1 (got 1)"),
        ("calibration.batch_size", -1, "(got -1)"),
        ("calibration.seed", 1.5, "(got 1.5)"),
        (
            "calibration.data.kind",
            "csv",
            "'text', 'jsonl', 'huggingface', 'image_text', 'coco', 'messages' or 'generated' (got 'csv')",
        ),
        ("calibration.data", None, "(got None)"),
        ("held_out.samples", 0, "(got 0)"),
        ("held_out.data.kind", "csv", "(got 'csv')"),
        ("measurement.method", "hessian", "'gradient', 'kl_div' or 'fisher' (got 'hessian')"),
        ("measurement.method", None, "(got None)"),
        ("measurement.engine", "own", "'modelopt' or 'native' (got 'own')"),
        ("measurement.formats", [], "(got [])"),
        ("measurement.dtype", "fp16", "'auto', 'float32' or 'bfloat16' (got 'fp16')"),
        ("measurement.score_samples", 0, "(got 0)"),
        ("model.search", "vision", "(got 'vision')"),
        ("schemes", [], "(got [])"),
        ("schemes.0.coverage", 0, "greater than 0 (got 0)"),
        ("schemes.0.coverage", 1.01, "less than or equal to 1 (got 1.01)"),
        ("schemes.0.coverage", float("nan"), "(got nan)"),
        ("schemes.0.exclude", "*.0.*", "(got '*.0.*')"),
        ("kv_cache", "int8", "give none, fp8, or the share of the layers that have it, as {fp8: 0.75}, not 'int8'"),
        ("kv_cache", None, "as {fp8: 0.75}, not nothing"),
        ("kv_cache", {"fp8": 0.5, "skip": 2}, "as {fp8: 0.75}, not {'fp8': 0.5, 'skip': 2}"),
        ("kv_cache", {"fp8": True}, "as {fp8: 0.75}, not {'fp8': True}"),
        ("kv_cache", {"fp8": 1}, "between 0 and 1, not 1; for all of them write kv_cache: fp8"),
        ("schemes.0.kv_cache", {"fp8": 0}, "between 0 and 1, not 0"),
        ("output", 3, "(got 3)"),
    ],
)
def test_wrong_values_name_key_and_value(tmp_path: Path, path: str, value: Any, expected: str) -> None:
    message = error_of(write(tmp_path, changed(path, value)))
    assert f": {path}: " in message
    assert expected in message


@pytest.mark.parametrize("key", ["model", "calibration", "schemes", "output"])
def test_missing_keys_are_named(tmp_path: Path, key: str) -> None:
    content = {name: value for name, value in GOOD.items() if name != key}
    assert error_of(write(tmp_path, content)).endswith(f": {key}: Field required")


def test_a_long_wrong_value_is_shortened(tmp_path: Path) -> None:
    assert len(error_of(write(tmp_path, changed("calibration.data", ["x" * 5000])))) < 1000


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ({"name": "a", "coverage": 0.5, "effective_bits": 12}, "got ['coverage', 'effective_bits']"),
        ({"name": "a", "include": ["*"], "max_predicted_score": 1.0}, "got ['max_predicted_score', 'include']"),
        ({"name": "a"}, "got none"),
    ],
)
def test_a_scheme_is_asked_for_in_one_way(tmp_path: Path, scheme: dict[str, Any], expected: str) -> None:
    message = error_of(write(tmp_path, changed("schemes", [scheme])))
    assert "scheme a: give exactly one of coverage, effective_bits, max_predicted_score, max_kl, include" in message
    assert message.endswith(expected)
    assert "Value error" not in message


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "-x", "é"])
def test_scheme_names_are_file_names(tmp_path: Path, name: str) -> None:
    message = error_of(write(tmp_path, changed("schemes.0.name", name)))
    assert "use letters, digits, '.', '_' and '-'" in message


def test_duplicate_names(tmp_path: Path) -> None:
    assert "two schemes are named full; rename one" in error_of(write(tmp_path, changed("schemes.0.name", "full")))


def test_a_task_needs_answers(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, changed("held_out.task", "exact_match")))
    assert "held_out.task: exact_match needs data of kind image_text" in message
    assert "this set is of kind jsonl" in message
    pairs = {"name": "pairs", "data": {"kind": "image_text", "path": "x"}, "task": "exact_match"}
    assert len(read_recipe(write(tmp_path, changed("held_out", [GOOD["held_out"], pairs]))).held_out) == 2
    message = error_of(write(tmp_path, changed("held_out", [pairs, {**GOOD["held_out"], "task": "exact_match"}])))
    assert "held_out.1.task: exact_match needs data of kind image_text" in message


def test_one_held_out_set_or_several(tmp_path: Path) -> None:
    one = read_recipe(write(tmp_path, GOOD)).held_out
    assert [(spec.name, spec.samples) for spec in one] == [("held_out", 4)]
    sets = [{"name": "text", "data": {"kind": "text", "path": "a.txt"}}, {"name": "left.over-1", "samples": 3}]
    several = read_recipe(write(tmp_path, changed("held_out", sets)))
    assert [(spec.name, spec.samples) for spec in several.held_out] == [("text", 32), ("left.over-1", 3)]
    assert several.held_out[0].data is not None
    assert several.held_out[0].data.path == str(tmp_path / "a.txt")
    assert Recipe.model_validate_json(several.model_dump_json()) == several


def test_held_out_sets_have_names_of_their_own(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, changed("held_out", [GOOD["held_out"], {"samples": 3}])))
    assert "two held-out sets are named held_out; give each a `name` of its own" in message
    message = error_of(write(tmp_path, changed("held_out.name", "a b")))
    assert "held_out: held-out set name 'a b': use letters, digits, '.', '_' and '-'" in message


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("text.txt", "held_out: give a held-out set or a list of them; got 'text.txt'"),
        ([], "held_out: List should have at least 1 item"),
        ([{"name": "a"}, {"name": "b", "sample": 3}], "unknown key 'held_out.1.sample'; did you mean 'samples'?"),
        ([{"name": "a"}, {"name": "b", "samples": 0}], "held_out.1.samples: "),
        ([3], "held_out.0: "),
    ],
)
def test_wrong_held_out_sets_are_named_as_they_are_written(tmp_path: Path, value: Any, expected: str) -> None:
    assert expected in error_of(write(tmp_path, changed("held_out", value)))


def test_files_that_are_not_recipes(tmp_path: Path) -> None:
    assert "does not exist; see recipes/" in error_of(tmp_path / "absent.yaml")
    assert "is a directory" in error_of(tmp_path)
    assert "is not YAML" in error_of(write(tmp_path, "model: {path: [\n"))
    assert "is not YAML" in error_of(write(tmp_path, "a: b: c\n"))
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not YAML" in error_of(tmp_path / "recipe.yaml")
    assert "holds 'just text'; a recipe is a mapping" in error_of(write(tmp_path, "just text\n"))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, GOOD)

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert "Permission denied" in error_of(path)


def test_a_yaml_tag_runs_nothing(tmp_path: Path) -> None:
    assert "is not YAML" in error_of(write(tmp_path, "output: !!python/object/apply:os.getcwd []\n"))


def test_paths_are_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    recipes.mkdir()
    elsewhere.mkdir()
    path = write(recipes, GOOD)
    monkeypatch.chdir(elsewhere)
    recipe = read_recipe(Path("../recipes") / path.name)
    assert recipe.model.path == str(recipes / "model")
    assert recipe.calibration[0].data.path == str(recipes / "data/text.txt")
    (held_out,) = recipe.held_out
    assert held_out.data is not None
    assert held_out.data.path == str(recipes / "data/held.jsonl")


def test_the_output_is_relative_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    path = write(tmp_path / "recipes", {**GOOD, "output": "../runs/one"})
    monkeypatch.chdir("/")
    assert read_recipe(path).output == str(tmp_path / "runs/one")


def test_absolute_paths_and_home_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    content = changed("model.path", "/models/qwen")
    content["calibration"]["data"]["path"] = "~/text.txt"
    content["output"] = "~/out"
    recipe = read_recipe(write(tmp_path, content))
    assert recipe.model.path == "/models/qwen"
    assert recipe.calibration[0].data.path == str(tmp_path / "home/text.txt")
    assert recipe.output == str(tmp_path / "home/out")


def test_package_paths_lie_in_the_installed_package(tmp_path: Path) -> None:
    package = Path(bitladder.__file__).parent
    content = changed("model.path", "package:demo/model")
    content["calibration"]["data"]["path"] = "package:demo/data/text.txt"
    recipe = read_recipe(write(tmp_path, content))
    assert recipe.model.path == str(package / "demo/model")
    assert recipe.calibration[0].data.path == str(package / "demo/data/text.txt")
    assert resolve_path("package:demo", tmp_path) == str(package / "demo")


def test_hub_ids_are_untouched(tmp_path: Path) -> None:
    content = changed("model.path", "Qwen/Qwen2.5-VL-3B-Instruct")
    content["calibration"]["data"] = {"kind": "huggingface", "path": "org/data"}
    recipe = read_recipe(write(tmp_path, content))
    assert recipe.model.path == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert recipe.calibration[0].data.path == "org/data"


def test_what_looks_like_a_hub_id_but_exists_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "models/qwen").mkdir(parents=True)
    (tmp_path / "org/data").mkdir(parents=True)
    content = changed("model.path", "models/qwen")
    content["calibration"]["data"] = {"kind": "huggingface", "path": "org/data"}
    recipe = read_recipe(write(tmp_path, content))
    assert recipe.model.path == str(tmp_path / "models/qwen")
    assert recipe.calibration[0].data.path == str(tmp_path / "org/data")


def test_held_out_may_be_what_calibration_leaves(tmp_path: Path) -> None:
    content = {key: value for key, value in GOOD.items() if key != "held_out"}
    assert read_recipe(write(tmp_path, content)).held_out[0].data is None


SETS: list[dict[str, Any]] = [
    {"data": {"kind": "text", "path": "data/text.txt"}, "samples": 8},
    {"data": {"kind": "generated"}, "sequence_length": 256, "seed": 3},
]


def test_calibration_may_be_a_list(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, changed("calibration", SETS)))
    assert [(spec.data.kind, spec.samples, spec.seed) for spec in recipe.calibration] == [
        ("text", 8, 0),
        ("generated", 64, 3),
    ]
    assert [spec.data.path for spec in recipe.calibration] == [str(tmp_path / "data/text.txt"), ""]
    assert [entry["samples"] for entry in recipe.model_dump(mode="json")["calibration"]] == [8, 64]
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_one_calibration_set_is_written_as_it_always_was(tmp_path: Path) -> None:
    wanted = {
        "data": {
            "kind": "text",
            "path": str(tmp_path / "data/text.txt"),
            "text_field": "text",
            "split": None,
            "annotations": None,
            "subset": None,
            "prompt": "Describe the image.",
            "temperature": None,
        },
        "samples": 8,
        "sequence_length": 512,
        "batch_size": 4,
        "seed": 0,
    }
    for content in (GOOD, changed("calibration", [GOOD["calibration"]])):
        recipe = read_recipe(write(tmp_path, content))
        assert recipe.model_dump(mode="json")["calibration"] == wanted
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("sets", "where", "expected"),
    [
        ([], "calibration", "at least 1 item"),
        ("captions", "calibration", "give a calibration set or a list of them; got 'captions'"),
        ([*SETS, {"data": {"kind": "text"}}], "calibration.2.data", "data of kind text needs a `path`"),
        ({"data": {"kind": "jsonl"}}, "calibration.data", "data of kind jsonl needs a `path`"),
        ({"data": {"kind": "generated", "path": "x"}}, "calibration.data", "has no path, the model writes it; got 'x'"),
        ({"data": {"kind": "generated", "temperature": 0}}, "calibration.data.temperature", "equal to 0.001 (got 0)"),
        ({"data": {"kind": "generated", "temperature": 1e-45}}, "calibration.data.temperature", "0.001 (got 1e-45)"),
        (
            {"data": {"kind": "text", "path": "x", "temperature": 1}},
            "calibration.data",
            "temperature is for data of ki",
        ),
        ([SETS[0], {**SETS[1], "sampels": 1}], "calibration.1.sampels", "did you mean 'samples'?"),
        ([SETS[0], {**SETS[1], "samples": 0}], "calibration.1.samples", "(got 0)"),
    ],
)
def test_wrong_calibration_sets(tmp_path: Path, sets: Any, where: str, expected: str) -> None:
    message = error_of(write(tmp_path, changed("calibration", sets)))
    assert f": {where}: " in message or f"'{where}'" in message
    assert expected in message


@pytest.mark.parametrize(
    ("kind", "key", "for_kinds"),
    [
        ("text", "text_field", "jsonl and huggingface and image_text and messages"),
        ("generated", "text_field", "jsonl and huggingface"),
        ("jsonl", "split", "huggingface and coco and messages"),
        ("coco", "subset", "huggingface and messages"),
        ("huggingface", "annotations", "coco"),
        ("messages", "prompt", "image_text and coco"),
    ],
)
def test_a_key_of_data_that_its_kind_would_pass_over_is_refused(
    tmp_path: Path, kind: str, key: str, for_kinds: str
) -> None:
    source = {"kind": kind, key: "other"} | ({} if kind == "generated" else {"path": "x"})
    message = error_of(write(tmp_path, changed("calibration", {"data": source})))
    assert f"calibration.data: {key} is for data of kind {for_kinds}" in message
    assert "remove it (got 'other')" in message


def test_a_kind_of_data_takes_every_key_of_its_own_and_the_defaults_of_others() -> None:
    for kind in ("text", "jsonl", "huggingface", "image_text", "coco", "messages"):
        spec = DataSpec(kind=kind, path="x")
        assert DataSpec(**spec.model_dump()) == spec
    DataSpec(kind="coco", path="x", split="val2017", annotations="mine.json", prompt="What?")
    DataSpec(kind="messages", path="x", text_field="chats", split="test", subset="en")


def test_what_calibration_leaves_over_must_be_known(tmp_path: Path) -> None:
    content = changed("calibration", SETS)
    del content["held_out"]["data"]
    assert "held_out needs `data` of its own, since calibration has 2 sets" in error_of(write(tmp_path, content))
    content["held_out"] = [GOOD["held_out"], {"name": "rest"}]
    assert "held_out.1 needs `data` of its own, since" in error_of(write(tmp_path, content))
    content["calibration"] = SETS[1]
    assert "held_out.1 needs `data` of its own: of what the model writes nothing" in error_of(write(tmp_path, content))
    content["calibration"] = [SETS[0]]
    assert read_recipe(write(tmp_path, content)).held_out[1].data is None


def test_a_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, GOOD))
    resolved = recipe.model_dump(mode="json")
    (tmp_path / "other").mkdir()
    again = read_recipe(write(tmp_path / "other", resolved))
    assert again == recipe
    assert isinstance(again, Recipe)


def test_schemes_from_a_command_line() -> None:
    (scheme,) = parse_schemes([{"name": "a", "coverage": 0.5}])
    assert scheme.coverage == 0.5
    with pytest.raises(RecipeError, match="no scheme is asked for"):
        parse_schemes([])
    with pytest.raises(RecipeError, match="unknown key 'covrage'; did you mean 'coverage'"):
        parse_schemes([{"name": "a", "covrage": 0.5}])
    with pytest.raises(RecipeError, match=r"less than or equal to 1 \(got 2\)"):
        parse_schemes([{"name": "a", "coverage": 2}])


@pytest.mark.parametrize(
    ("given", "engine", "method"),
    [
        ({}, "native", "fisher"),
        ({"engine": "native"}, "native", "fisher"),
        ({"engine": "modelopt"}, "modelopt", "gradient"),
        ({"engine": "modelopt", "method": "kl_div"}, "modelopt", "kl_div"),
        ({"method": "gradient"}, "native", "gradient"),
    ],
)
def test_the_method_that_is_left_out_is_the_engine_s_own(
    tmp_path: Path, given: dict[str, Any], engine: str, method: str
) -> None:
    measurement = read_recipe(write(tmp_path, changed("measurement", given))).measurement
    assert (measurement.engine, measurement.method) == (engine, method)
    dumped = measurement.model_dump(mode="json")
    assert (dumped["engine"], dumped["method"]) == (engine, method)
    assert MeasureSpec.model_validate(dumped) == measurement


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("measurement.damping", 0.5, "measurement: damping is of rounding: compensated, and nearest would pass"),
        ("measurement.score_samples", 9, "measurement.score_samples is 9, calibration.samples is 8; score at most as"),
        ("workers.address", "auto", "workers: address is of workers, of which count: 0 has none; set count, or remove"),
        ("workers.threads", 2, "workers: threads is of workers, of which count: 0 has none; set count, or remove"),
    ],
)
def test_what_would_be_passed_over_is_refused(tmp_path: Path, path: str, value: Any, expected: str) -> None:
    assert expected in error_of(write(tmp_path, changed(path, value)))


def test_what_decides_something_is_kept(tmp_path: Path) -> None:
    content = {**GOOD, "measurement": {"rounding": "compensated", "damping": 0.5, "score_samples": 8}}
    recipe = read_recipe(write(tmp_path, {**content, "workers": {"count": 1, "address": "auto", "threads": 2}}))
    assert (recipe.measurement.damping, recipe.measurement.score_samples) == (0.5, 8)
    assert (recipe.workers.address, recipe.workers.threads) == ("auto", 2)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"method": "fisher"}, "method: fisher needs engine: native; ModelOpt has gradient and kl_div"),
        ({"memory_gb": 12}, "memory_gb needs engine: native; ModelOpt takes what it needs"),
    ],
)
def test_what_modelopt_has_not_is_refused(tmp_path: Path, setting: dict, expected: str) -> None:
    message = error_of(write(tmp_path, changed("measurement", {"engine": "modelopt", **setting})))
    assert message.endswith(f"measurement: {expected}")


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "mps", ""])
def test_an_unknown_device_is_refused(tmp_path: Path, device: str) -> None:
    assert "use auto, cpu, cuda or cuda:N" in error_of(write(tmp_path, changed("measurement.device", device)))


@pytest.mark.parametrize("report", ["measurement.json", "report.json", ".", "checkpoints/full/config.json"])
def test_a_report_is_a_markdown_file(tmp_path: Path, report: str) -> None:
    assert "name a file that ends in .md" in error_of(write(tmp_path, changed("layout.report", report)))


def test_formats_are_named_once(tmp_path: Path) -> None:
    assert "fp8 is given twice" in error_of(write(tmp_path, changed("measurement.formats", ["fp8", "fp8"])))
    assert "give a list, as [a, b] (got 'fp8')" in error_of(write(tmp_path, changed("measurement.formats", "fp8")))
    assert "no format beside bf16" in error_of(write(tmp_path, changed("measurement.formats", ["bf16"])))
    recipe = read_recipe(write(tmp_path, changed("measurement.formats", ["nvfp4", "bf16"])))
    assert recipe.measurement.formats == ("nvfp4",)  # as in a scheme's: 16 bits are always there


def test_a_key_is_written_once(tmp_path: Path) -> None:
    text = yaml.safe_dump(GOOD) + "output: elsewhere\n"
    assert "'output' is given twice" in error_of(write(tmp_path, text))


@pytest.mark.parametrize(
    ("key", "value"), [("refine.marginal", "2"), ("schemes.0.coverage", "0.5"), ("calibration.samples", "8")]
)
def test_quoted_numbers_are_refused(tmp_path: Path, key: str, value: str) -> None:
    content: dict[str, Any] = {**copy.deepcopy(GOOD), "refine": {}}
    *parts, last = key.split(".")
    place: Any = content
    for part in parts:
        place = place[int(part)] if part.isdigit() else place[part]
    place[last] = value
    with pytest.raises(RecipeError, match=f"give a number, not the text '{value}'"):
        read_recipe(write(tmp_path, content))


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ({"max_kl": 0.1}, "scheme a: chosen_by goes with coverage, effective_bits or speed; leave it out"),
        ({"include": ["*"], "format": "fp8"}, "scheme a: chosen_by goes with coverage, effective_bits or speed"),
        ({"max_predicted_score": 1.0}, "scheme a: chosen_by goes with coverage, effective_bits or speed"),
        ({"effective_bits": 8, "image_weight": 0.5}, "scheme a: image_weight weighs scores, and chosen_by: kl goes by"),
        ({"max_kl": 0.1, "chosen_by": "score", "image_weight": 0.0}, "a: image_weight weighs scores, and max_kl goes"),
        ({"effective_bits": 8, "chosen_by": "KL"}, "'score' or 'kl'"),
    ],
)
def test_what_kl_cannot_choose_is_refused(tmp_path: Path, scheme: dict[str, Any], expected: str) -> None:
    chosen = {"name": "a", "chosen_by": "kl", **scheme}
    assert expected in error_of(write(tmp_path, {**GOOD, "schemes": [chosen]}))


FAST = {"name": "fast", "speed": {"decode": 1.2, "requests": 64}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "scheme fast asks for speed, which a profile of the device that serves predicts; name one as `profile`"),
        ({"profile": "h100", "refine": {"evaluations": 20}}, "refining swaps groups at a scheme's bits; set refine"),
        (
            {"profile": "h100", "schemes": [{"name": "a", "speed": {}}]},
            "schemes.0.speed: give either prefill or",
        ),
        (
            {"profile": "h100", "schemes": [{"name": "a", "speed": {"prefill": 1.1, "decode": 1.1}}]},
            "give either prefill",
        ),
        ({"profile": "h100", "schemes": [{"name": "a", "speed": {"decode": 0}}]}, "greater than 0"),
        ({"schemes": [{"name": "a", "coverage": 0.5, "prefer": "decode"}]}, "prefer goes with max_kl or max_predicted"),
        ({"schemes": [{"name": "a", "max_kl": 0.1, "prefer": "speed"}]}, "'bytes', 'prefill' or 'decode'"),
        ({"load": {"output_tokens": 1}}, "load.output_tokens: Input should be greater than 1"),
    ],
)
def test_speed_is_asked_for_as_it_can_be_predicted(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    assert expected in error_of(write(tmp_path, {**GOOD, "schemes": [FAST], **settings}))


def test_a_profile_is_a_file_beside_the_recipe_or_a_name(tmp_path: Path) -> None:
    content = {**GOOD, "schemes": [FAST], "load": {"requests": 8}}
    recipe = read_recipe(write(tmp_path, {**content, "profile": "profile.json"}))
    assert recipe.profile == str(tmp_path / "profile.json")
    assert recipe.schemes[0].speed is not None
    assert recipe.schemes[0].speed.target == ("decode", 1.2)
    assert (recipe.load.requests, recipe.load.prompt_tokens) == (8, 512)
    assert read_recipe(write(tmp_path, {**content, "profile": "h100"})).profile == "h100"
