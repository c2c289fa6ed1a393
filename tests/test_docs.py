"""The documentation is true: every command is described as it is, links lead somewhere, recipes are valid."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer.main

from bitladder.cli import app
from bitladder.recipe import Recipe, read_recipe
from bitladder.records import ErrorClass

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def test_the_command_line_reference_is_current():
    result = subprocess.run(
        [sys.executable, "scripts/cli_reference.py"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (ROOT / "docs" / "cli.md").read_text() == result.stdout, "run `make docs`"


def test_every_command_has_help_with_an_example_and_is_in_the_reference():
    reference = (ROOT / "docs" / "cli.md").read_text()
    for name, command in typer.main.get_command(app).commands.items():
        assert "Example: bitladder" in command.help, name
        assert f"## bitladder {name}" in reference


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_are_valid(path):
    recipe = read_recipe(path)
    assert all(Path(spec.data.path).exists() for spec in recipe.calibration)
    assert all(spec.data is None or Path(spec.data.path).exists() for spec in recipe.held_out)


def test_the_guide_names_every_recipe_key():
    guide = (ROOT / "docs" / "guide.md").read_text()
    for section, field in Recipe.model_fields.items():
        several = (
            getattr(field.annotation, "__args__", ()) if section in ("calibration", "held_out") else ()
        )  # one or a list
        keys = getattr(several[0] if several else field.annotation, "model_fields", {})
        for key in keys:
            assert f"`{section}.{key}`" in guide or f"`.{key}`" in guide, f"{section}.{key}"
        assert f"`{section}" in guide, section


def test_commands_in_the_readme_exist():
    names = set(typer.main.get_command(app).commands)
    for used in re.findall(r"`?bitladder ([a-z0-9|]+)", (ROOT / "README.md").read_text()):
        assert set(used.split("|")) <= names | {"run"}, used


def test_no_page_names_a_path_of_one_machine():
    for page in PAGES:
        assert not re.search(r"/(root|home|tmp|work)/", page.read_text()), page


def test_every_error_class_of_a_probe_is_described():
    text = (ROOT / "docs" / "runtimes.md").read_text().partition("## Error classes")[2]
    assert tuple(re.findall(r"^\| `(\w+)` \|", text, re.M)) == get_args(ErrorClass)
