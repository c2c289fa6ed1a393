"""Import directions: who may know whom. Read from the source, so that an import inside a function counts too."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "bitladder"
# The house, from the ground up: a room imports from floors below its own, and no other room of its floor.
FLOORS = (
    {"errors", "lazily"},
    {"reading"},
    {"storage"},
    {"recipe"},
    {"records"},
    {"device", "runinfo"},
    {"formats"},
    {"models"},
    {"measured"},
    {"data", "planning", "runtimes", "verification"},  # what steps stand on
    {"checkpoints", "evaluation", "measuring", "report"},  # what a step does
    {"steps"},
    {"library"},
    {"cli", "demo"},
)
SECOND_OPINION = {"verification": {"checkpoints", "models.weights"}, "evaluation": {"checkpoints", "measuring"}}
NO_TORCH = (
    "errors",
    "reading",
    "storage",
    "records",
    "recipe",
    "formats",
    "planning",
    "planning.importing",
    "planning.controls",
    "models.fusing",
    "report",
    "runtimes.preflight",
    "measured",
    "models.weights",
    "runinfo",
    "steps.workspace",
    "steps.plan",
    "steps.report",
    "steps.known",
    "steps.step",
    "library",
    "planning.prediction",
)


def files_of(module):
    path = SOURCE / module
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imports_of(path):
    """Return the dotted names that a file imports, wherever in it; type-checking imports don't count."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(id(child) for child in ast.walk(node))
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def ours(path):
    """Return the modules of ours that a file imports, without the package's name."""
    return {name.removeprefix("bitladder.") for name in imports_of(path) if name.startswith("bitladder.")}


def room_of(name):
    return name.partition(".")[0]


ROOMS = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def test_every_room_is_on_a_floor():
    found = {path.relative_to(SOURCE).with_suffix("").parts[0] for path in SOURCE.rglob("*.py")}
    assert found - {"__init__"} == ROOMS.keys()


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_no_import_climbs(room):
    for path in files_of(room):
        for name in ours(path):
            other = room_of(name)
            if other in ROOMS and other != room:
                assert ROOMS[other] < ROOMS[room], f"{path.relative_to(SOURCE)} imports {name}"


def test_no_two_modules_import_each_other():
    """However many modules the circle has, and wherever in a function the import stands."""
    paths = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    known = {}
    for name, path in paths.items():
        found = ours(path) & paths.keys() - {name}
        known[name] = {one for one in found if one not in {other.rpartition(".")[0] for other in found}}
    while True:
        free = {name for name, others in known.items() if not others & known.keys()}
        if not free:
            break
        known = {name: others for name, others in known.items() if name not in free}
    assert not known, f"in a circle, or above one: {sorted(known)}"


@pytest.mark.parametrize("module", sorted(SECOND_OPINION))
def test_a_second_opinion_shares_no_code(module):
    for path in files_of(module):
        for name in ours(path):
            assert not any(name == other or name.startswith(f"{other}.") for other in SECOND_OPINION[module]), path


def test_nobody_imports_the_command_line():
    for path in SOURCE.rglob("*.py"):
        assert "cli" not in map(room_of, ours(path)) or SOURCE / "cli" in path.parents, path


def test_vllm_is_never_imported_at_the_top():
    for path in SOURCE.rglob("*.py"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
        assert "vllm" not in {name.partition(".")[0] for name in names}, path


def test_no_pickle_anywhere():
    for path in SOURCE.rglob("*.py"):
        assert not {"pickle", "torch.save", "torch.load"} & imports_of(path), path
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "torch.save(" not in text, path


@pytest.mark.parametrize("module", NO_TORCH)
def test_planning_and_reporting_work_without_torch(module):
    code = f"import sys; sys.modules['torch'] = None; import bitladder.{module}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_planning_works_without_transformers_and_scipy():
    code = "import sys; sys.modules.update(torch=None, transformers=None, scipy=None); import bitladder.planning"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_check_above_can_fail():
    code = "import sys; sys.modules['torch'] = None; import bitladder.formats.grids"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode != 0


def test_help_is_quick_because_nothing_heavy_is_imported():
    heavy = ("torch", "transformers", "modelopt", "numpy", "pydantic", "rich", "yaml")
    code = f"import sys; import bitladder.cli; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["planning", "records", "report"])
def test_a_package_gives_late_what_it_says_it_has(package):
    """The names stand three times: for type checkers, in `__all__`, and with the modules that they come from."""
    tree = ast.parse((SOURCE / package / "__init__.py").read_text())
    (either,) = (node for node in tree.body if isinstance(node, ast.If))
    checked = {node.module.rpartition(".")[2]: tuple(name.name for name in node.names) for node in either.body}
    (given,) = either.orelse
    assert ast.literal_eval(given.value.args[1]) == checked
    names = {name: module for module, found in checked.items() for name in found}
    assert not names.keys() & {path.stem for path in files_of(package)}
    imported = importlib.import_module(f"bitladder.{package}")
    constants = {name for name, value in vars(imported).items() if isinstance(value, str) and name.isupper()}
    assert set(imported.__all__) == names.keys() | constants
    for name, module in names.items():
        assert getattr(imported, name) is getattr(importlib.import_module(f"bitladder.{package}.{module}"), name)
    with pytest.raises(AttributeError, match=f"module 'bitladder.{package}' has no attribute 'nothing'"):
        _ = imported.nothing


def test_no_schema_is_built_before_its_first_use():
    code = (
        "from bitladder import records, recipe; import bitladder.report.types\n"
        "from bitladder.records.base import Part; from bitladder.recipe.sections import Section\n"
        "def under(kind): return [found for one in kind.__subclasses__() for found in (one, *under(one))]\n"
        "kinds = [*under(Part), *under(Section)]\n"
        "assert len(kinds) > 60\n"
        "print([kind.__name__ for kind in kinds if kind.__pydantic_complete__])\n"
        "for kind in kinds: kind.model_rebuild()\n"
        "print([kind.__name__ for kind in kinds if not kind.__pydantic_complete__])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]", "[]"]


READERS = {"open", "safe_open", "load_file", "read_text", "read_bytes", "ZipFile", "fromfile", "memmap", "from_file"}
OURS = ("reading.", "WeightFiles.open", "StreamedLayers.open")  # these read by `reading`
# (file, what it calls or names) -> why it needs no `reading`
OPENED_ELSEWHERE = {
    ("data/pictures.py", "Image.open"): "bytes that were read already",
    ("models/fusing.py", "files(__package__).joinpath('fusing.json').read_text"): "a resource of this package",
    ("data/packaged.py", "zipfile.ZipFile"): "a file that is open already",
    ("cli/telling.py", "os.open"): "the log, to add to it",
    ("steps/workspace.py", "os.open"): "the lock, for writing too: that waits for nobody",
    ("report/page.py", "(here / 'page.css').read_text"): "a resource of this package",
    ("report/page.py", "(here / name).read_text"): "a resource of this package",
    ("storage.py", "os.open"): "to flush what was written, directories too; nothing is read",
    ("models/weights.py", "np.memmap"): "a file that is open already",
}
# Run by the runtime's own interpreter, which has no Bitladder: they read what their parent has written or checked.
CHILDREN = {f"runtimes/vllm/child_{name}.py" for name in ("kernels", "load", "serve", "watch")}


def openers_in(tree):
    """Return what a module calls, hands on or imports by the name of something that opens files to read them."""
    writing = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and re.fullmatch("[wxa]b?", str(node.args[0].value))
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in READERS and id(node) not in writing:
            found.add(ast.unparse(node))
        elif isinstance(node, ast.Name) and node.id in {"open", "safe_open"}:
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("bitladder"):
            found.update(f"{node.module}.{alias.name}" for alias in node.names if alias.name in READERS)
    return {name for name in found if not name.startswith(OURS)}


def test_only_reading_opens_files_to_read_them():
    names = {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*.py")}
    assert names.keys() > CHILDREN
    found = {
        (name, opener)
        for name, path in names.items()
        if name not in {"reading.py", *CHILDREN}
        for opener in openers_in(ast.parse(path.read_text()))
    }
    assert found - OPENED_ELSEWHERE.keys() == set(), "open files by bitladder.reading"
    assert OPENED_ELSEWHERE.keys() - found == set(), "no longer there: take it off the list"


@pytest.mark.parametrize("name", sorted(CHILDREN))
def test_what_another_interpreter_runs_imports_nothing_of_ours(name):
    assert not any(module.partition(".")[0] == "bitladder" for module in imports_of(SOURCE / name))


@pytest.mark.parametrize(
    "code",
    [
        "with open(path) as file: pass",
        "with path.open() as file: pass",
        "with path.open('rb') as file: pass",
        "with path.open(mode='rb') as file: pass",
        "with path.open('r+b') as file: pass",
        "io.open(path)",
        "os.open(path, os.O_RDONLY)",
        "json.loads(path.read_text(encoding='utf-8'))",
        "list(map(Path.read_bytes, paths))",
        "opener = open",
        "from safetensors import safe_open as other",
        "def late():\n    from safetensors.torch import load_file",
        "from io import open as other",
        "zipfile.ZipFile(wheel)",
        "np.fromfile(path)",
    ],
)
def test_every_way_to_open_a_file_is_seen(code):
    assert openers_in(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    ["path.open('xb')", "path.open('w')", "reading.read_text(path)", "read_bytes(path)", "WeightFiles.open(path)"],
)
def test_writing_and_our_own_reading_are_let_through(code):
    assert not openers_in(ast.parse(code))
