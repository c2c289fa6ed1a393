"""The small world of the trials: a tiny Llama, its data, recipes, and everything around that no run may touch.

base/       the model, the same in several files, data; read only by agreement
around/     sentinels: another model, notes, links, a home and a directory for temporaries
trial/      what a trial changes: its recipe, its model, where it runs
out/        the output directory, always under this one path, for records name it
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from faults.hook import Fault
from faults.server import Job, Outcome, Server
from faults.tree import Tree, marks

Json = dict[str, Any]
LAYERS = 2


def make_model(directory: Path, layers: int = LAYERS, **options: Any) -> Path:
    """Write a random Llama of some thousand parameters, and its tokenizer, to `directory`."""
    import transformers

    from conftest import llama_config, save_model, save_tokenizer

    config = llama_config(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    save_model(transformers.LlamaForCausalLM, config, directory, tokenizer=False, **options)
    save_tokenizer(directory, 300)
    return directory


@dataclass(frozen=True)
class World:
    """The directories of one series of trials; `make` builds them."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def model(self) -> Path:
        return self.base / "llama"

    @property
    def sharded(self) -> Path:
        return self.base / "sharded"

    @property
    def around(self) -> Path:
        return self.root / "around"

    @property
    def trial(self) -> Path:
        return self.root / "trial"

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def kept(self) -> Path:
        """Finished output directories, to start trials from."""
        return self.root / "kept"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that let a run's home and temporaries lie among the sentinels."""
        home, scratch = self.around / "home", self.root / "scratch"
        return {
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / ".cache"),
            "TMPDIR": str(self.around / "tmp"),
            "FAULTS_SCRATCH": str(scratch),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    @classmethod
    def make(cls, root: Path) -> "World":
        """Build all directories in `root`, which is emptied."""
        from conftest import make_text

        world = cls(root)
        shutil.rmtree(root, ignore_errors=True)
        for directory in (world.base, world.around / "tmp", world.around / "home", world.kept, root / "scratch"):
            directory.mkdir(parents=True)
        make_model(world.model)
        make_model(world.sharded, max_shard_size="6KB")
        (world.sharded / "chat_template.jinja").write_text("{{ messages }}")
        (world.sharded / "LICENSE").write_text("a licence\n")
        (world.base / "calibration.txt").write_text(make_text(200))
        (world.base / "held_out.txt").write_text(make_text(150, seed=9))
        shutil.copytree(world.model, world.around / "another_model")
        (world.around / "notes.txt").write_text("precious\n" * 100)
        (world.around / "notes.safetensors").write_bytes(bytes(range(256)) * 4)
        (world.around / "link").symlink_to("notes.txt")
        (world.around / "private").mkdir(mode=0o700)
        (world.around / "private" / "key").write_text("secret\n")
        world.clear()
        return world

    def clear(self) -> None:
        """Empty what trials change."""
        for directory in (self.trial, self.out):
            shutil.rmtree(directory, ignore_errors=True)
        (self.trial / "cwd").mkdir(parents=True)

    def recipe(self, **changes: Any) -> Json:
        """Return a recipe; keys of `changes` replace its own."""
        sampled = {"samples": 4, "sequence_length": 12, "batch_size": 2, "seed": 0}
        recipe = {
            "model": {"path": str(self.model)},
            "calibration": {"data": {"kind": "text", "path": str(self.base / "calibration.txt")}, **sampled},
            "held_out": [
                {"name": "prose", "data": {"kind": "text", "path": str(self.base / "held_out.txt")}, **sampled}
            ],
            "controls": {"kinds": []},
            "schemes": [{"name": "half", "coverage": 0.5}, {"name": "full", "coverage": 1.0}],
            "output": str(self.out),
        }
        return deepcopy({**recipe, **changes})

    def write(self, recipe: Mapping[str, Any], name: str = "recipe.yaml") -> Path:
        """Write a recipe into the trial's directory and return its path."""
        path = self.trial / name
        path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
        return path

    def job(self, argv: Sequence[str | Path], fault: Fault | None = None, **options: Any) -> Job:
        """Return a run of `argv` that may write to the output directory."""
        options.setdefault("allowed", (str(self.out), str(self.around / "tmp")))
        return Job(argv=tuple(map(str, argv)), cwd=str(self.trial / "cwd"), fault=fault, **options)

    def sentinels(self) -> Tree:
        """Return what must stay as it is: everything but the output directory."""
        parts = (self.base, self.around, self.trial)
        found = {f"{part.name}/{name}": mark for part in parts for name, mark in marks(part).items()}
        return {**found, **{name: "entry" for name in os.listdir(self.root) if name != self.out.name}}

    def keep(self, name: str) -> None:
        """Keep a copy of the output directory, times included."""
        shutil.rmtree(self.kept / name, ignore_errors=True)
        shutil.copytree(self.out, self.kept / name, symlinks=True)

    def restore(self, name: str) -> None:
        """Let the output directory be as it was kept."""
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.kept / name, self.out, symlinks=True)


def sound_run(server: Server, world: World, recipe: Path) -> Outcome:
    """Return the outcome of a run that nothing disturbs; it must succeed.

    Raises:
        RuntimeError: it doesn't.
    """
    outcome = server.run(world.job(["run", recipe]))[0]
    if outcome.status:
        raise RuntimeError(f"an undisturbed run fails: {outcome.output[-2000:]}")
    return outcome
