"""Print what vLLM fuses, architecture by architecture: the content of src/bitladder/models/fusing.json.

Read from vLLM's sources with `ast`: nothing of it is imported, so that any Python and any machine will do.

    python scripts/fusing_table.py .venv-vllm/lib/python3.11/site-packages/vllm > table.json   (`make fusing`)

Three places say what is fused: `packed_modules_mapping` of the model's class or its bases (what quantisation asks),
`self.packed_modules_mapping[...] = [...]` in its methods, and how its files are loaded (`stacked_params_mapping`,
`orig_to_new_stacked` of a WeightsMapper), which is taken from all of the source files that the class is made of.

Beside it stands by which name a module's layers ask the quantisation, where a model builds it under another name than
its own: `self.mamba = MambaMixer2(..., prefix=f"{prefix}.mixer")`.
"""

import ast
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

Fusions = dict[str, list[str]]  # fused name -> its members; names may begin with the module that they are in
Fusion = tuple[str, tuple[str, ...], bool]  # fused name, members, whether `packed_modules_mapping` has it
Pairs = list[tuple[ast.AST | None, ast.AST | None, ast.AST | None]]  # fused, member, which of them
_STACKED = re.compile(
    r"(stacked|_params)_(params_)?mappings?$|^stacked$|^(qkv|mla|mha)_params_mapping$|stacked_params$"
)


def _text(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _plain(name: str) -> str:
    return name.strip(".").removesuffix(".weight")


@dataclass
class Source:
    """One file of vLLM's models, or all files of a folder that holds one model."""

    name: str
    paths: list[Path]

    @cached_property
    def trees(self) -> list[ast.Module]:
        """What the files say, one tree a file."""
        return [ast.parse(path.read_text(encoding="utf-8")) for path in self.paths]

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of all trees."""
        return [node for tree in self.trees for node in ast.walk(tree)]

    @cached_property
    def classes(self) -> dict[str, ast.ClassDef]:
        """The classes that are defined here, by name."""
        return {node.name: node for tree in self.trees for node in tree.body if isinstance(node, ast.ClassDef)}

    @cached_property
    def imports(self) -> dict[str, tuple[str, str]]:
        """Name here -> (source of vLLM's models, name there)."""
        found = {}
        for node in self.nodes:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    found[alias.asname or alias.name] = (self._named(node), alias.name)
        return found

    def _named(self, node: ast.ImportFrom) -> str:
        """Return the source that an import is from; a folder's own files are one source."""
        module = node.module or ""
        if module.startswith("vllm.models."):
            return ".".join(module.split(".")[:3])
        if module.startswith("vllm.model_executor.models."):
            return module.split(".")[3]
        if node.level and self.name.startswith("vllm.models."):
            return self.name
        return module if node.level else ""

    @cached_property
    def stacked(self) -> list[tuple[str, tuple[str, ...]]]:
        """What the loading of this file's models puts together."""
        found: list[tuple[str, tuple[str, ...]]] = []
        for node in self.nodes:
            pairs: Pairs = []
            if isinstance(node, ast.keyword) and node.arg == "orig_to_new_stacked":
                pairs = _of_mapper(node.value)
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if isinstance(target, ast.Subscript) and ast.unparse(target.value) == "stacked":
                    pairs = _of_mapper(ast.Dict([target.slice], [node.value]))
                elif isinstance(target, ast.Name) and _STACKED.search(target.id):
                    pairs = _of_mapper(node.value) if isinstance(node.value, ast.Dict) else _of_list(node.value)
            found += _by_shard(pairs)
        return found

    @cached_property
    def asked(self) -> dict[str, str]:
        """Module -> the name by which its layers ask the quantisation, where a model builds it under another one."""
        found = {}
        for node in self.nodes:
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
                continue
            prefix = next((_last_part(word.value) for word in node.value.keywords if word.arg == "prefix"), None)
            if prefix is None:
                continue
            target = ast.unparse(node.targets[0])
            own = target.removeprefix("self.")
            if own != target and own.isidentifier() and prefix != own:
                found[own] = prefix
        return found


def _last_part(prefix: ast.AST) -> str | None:
    """Return `mixer` of f"{prefix}.mixer", and None of anything else."""
    match = re.fullmatch(r"f'\{prefix\}\.(\w+)'", ast.unparse(prefix))
    return match[1] if match else None


def _of_mapper(value: ast.AST) -> Pairs:
    if not isinstance(value, ast.Dict):
        return []
    return [
        (new.elts[0], old, new.elts[1])
        for old, new in zip(value.keys, value.values, strict=True)
        if old is not None and isinstance(new, ast.Tuple) and len(new.elts) == 2
    ]


def _of_list(value: ast.AST) -> Pairs:
    if not isinstance(value, ast.List):
        return []
    return [(e.elts[0], e.elts[1], e.elts[2]) for e in value.elts if isinstance(e, ast.Tuple) and len(e.elts) == 3]


def _by_shard(pairs: Pairs) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each fused name and its members in the order of their shards; shards with two names make two fusions."""
    shards: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for fused, member, shard in pairs:
        if (name := _text(fused)) and (old := _text(member)) and shard is not None and not old.endswith(".bias"):
            shards[_plain(name)][ast.unparse(shard)].append(_plain(old))
    for name, by_shard in shards.items():
        for nth in range(max(map(len, by_shard.values()))):
            yield name, tuple(names[nth] for names in by_shard.values() if nth < len(names))


@dataclass
class Models:
    """All of vLLM's models."""

    package: Path
    sources: dict[str, Source] = field(default_factory=dict)

    def source(self, name: str) -> Source | None:
        """Return a source by its name in the registry: a file's, or `vllm.models.<folder>` and what lies below."""
        name = ".".join(name.split(".")[:3])
        if name not in self.sources:
            folder = self.package / "models" / name.removeprefix("vllm.models.")
            path = self.package / "model_executor" / "models" / f"{name}.py"
            found = sorted(folder.rglob("*.py")) if name.startswith("vllm.models.") else [path] * path.is_file()
            if not found:
                return None
            self.sources[name] = Source(name, found)
        return self.sources[name]

    def find(self, file: str, name: str) -> tuple[str, ast.ClassDef] | None:
        """Return where a class is defined, and its definition."""
        source = self.source(file)
        if source is None:
            return None
        if name in source.classes:
            return file, source.classes[name]
        where = source.imports.get(name, (file, name))
        return self.find(*where) if where != (file, name) else None

    def line(self, file: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
        """Yield a class and its bases, itself first."""
        found = self.find(file, name)
        if found is not None:
            yield found
            for base in found[1].bases:
                if isinstance(base, ast.Name):
                    yield from self.line(found[0], base.id)

    def packed(self, file: str, name: str) -> Fusions:
        """Return a class's `packed_modules_mapping`: its own or that of the first base that has one, and additions."""
        own: Fusions = {}
        added: Fusions = {}
        found = False
        for where, definition in self.line(file, name):
            for node in ast.walk(definition):
                if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                    continue
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                spelt = ast.unparse(target)
                if spelt == "packed_modules_mapping" and node in definition.body and not found:
                    own, found = self._value(where, node.value), True
                elif isinstance(target, ast.Subscript) and spelt.startswith("self.packed_modules_mapping["):
                    added[_text(target.slice) or ""] = _names(node.value)
        return own | added

    def _value(self, file: str, value: ast.AST) -> Fusions:
        """Return what an expression of mappings comes to."""
        if isinstance(value, ast.BinOp):
            return self._value(file, value.left) | self._value(file, value.right)
        if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
            return self.packed(file, value.value.id)
        found: Fusions = {}
        for key, item in zip(value.keys, value.values, strict=True) if isinstance(value, ast.Dict) else ():
            found |= self._value(file, item) if key is None else {_text(key) or "": _names(item)}
        return found

    def fusions(self, file: str, name: str, multimodal: bool) -> tuple[Fusion, ...]:
        """Return what is fused in a class, without what is one module on disk already.

        The files of multimodal models are left out where they tell how to load: most of that is towers', while the
        language model inside is another architecture, with a mapping of its own.
        """
        if self.find(file, name) is None:
            raise SystemExit(f"{file} has no class {name}, though the registry names it; this script needs a change")
        packed = {fused.strip("."): members for fused, members in self.packed(file, name).items() if fused}
        found = [(fused, tuple(members), True) for fused, members in packed.items() if len(members) > 1]
        alone = {member for members in packed.values() if len(members) == 1 for member in members}
        known = {members for _, members, _ in found}
        for where in dict.fromkeys(where for where, _ in self.line(file, name) if not multimodal):
            source = self.source(where)
            for fused, members in source.stacked if source is not None else ():
                leaves = tuple(member.rpartition(".")[2] for member in members)
                if not {leaves, members} & known and not alone & set(leaves) and len(members) > 1:
                    found.append((fused, members, False))
                    known.add(members)
        return tuple(sorted(found))

    def asked(self, file: str, name: str) -> tuple[tuple[str, str], ...]:
        """Return (module, the name by which it asks the quantisation) of the source files that a class is made of."""
        found: dict[str, str] = {}
        for where in dict.fromkeys(where for where, _ in self.line(file, name)):
            source = self.source(where)
            found |= source.asked if source is not None else {}
        return tuple(sorted(found.items()))


def _names(value: ast.AST) -> list[str]:
    return [name for e in value.elts if (name := _text(e))] if isinstance(value, ast.List) else []


def registered(models: Models) -> dict[str, tuple[str, str, bool]]:
    """Return architecture -> (file, class, whether other architectures' language models are inside it)."""
    registry = models.source("registry")
    if registry is None:
        raise SystemExit(f"{models.package} has no registry of models; name the directory of an installed vllm package")
    found: dict[str, tuple[str, str, bool]] = {}
    for node in registry.trees[0].body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
            continue
        name = ast.unparse(node.targets[0])
        for key, value in zip(node.value.keys, node.value.values, strict=True):
            if _text(key) and isinstance(value, ast.Tuple) and len(value.elts) == 2:
                file, cls = (_text(e) or "" for e in value.elts)
                multimodal = name == "_MULTIMODAL_MODELS" or found.get(_text(key) or "", ("", "", False))[2]
                found[_text(key) or ""] = (file, cls, multimodal)
    return found


def table(package: Path) -> dict[str, object]:
    """Return the table as it is committed."""
    models = Models(package)
    version = re.search(r"""^__version__ = version = ['"]([^'"]+)""", _version_file(package), re.MULTILINE)
    alike: dict[tuple[tuple[Fusion, ...], bool, tuple[tuple[str, str], ...]], list[str]] = defaultdict(list)
    for architecture, (file, cls, multimodal) in registered(models).items():
        if file != "transformers":  # fused by structure, as the model is built: no names are written down
            asked = () if multimodal else models.asked(file, cls)
            alike[models.fusions(file, cls, multimodal), multimodal, asked].append(architecture)
    return {
        "vllm": version[1].partition("+")[0] if version else "?",
        "kinds": [
            {
                "fuses": [
                    {"name": name, "members": list(members), "packed": packed} for name, members, packed in fuses
                ],
                "multimodal": multimodal,
                "asked": dict(asked),
                "architectures": sorted(names),
            }
            for (fuses, multimodal, asked), names in sorted(alike.items(), key=lambda kind: (-len(kind[1]), kind))
        ],
    }


def _version_file(package: Path) -> str:
    path = package / "_version.py"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def render(content: dict[str, object]) -> str:
    """Return the table as text: one fusion a line, so that a new version of vLLM reads as a small difference."""
    text = re.sub(r"\{\s+(\"name\": [^{}]*?)\s+\}", _one_line, json.dumps(content, indent=1))
    return re.sub(r"\[\s+((?:\"[^\"]*\",?\s*)+)\]", _one_line, text)


def _one_line(match: re.Match[str]) -> str:
    inner = " ".join(match[1].split())
    brackets = ("{", "}") if inner.startswith('"name"') else ("[", "]")
    return f"{brackets[0]}{inner}{brackets[1]}".replace("[ ", "[").replace(" ]", "]")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("name the directory of an installed vllm package; its table is printed")
    print(render(table(Path(sys.argv[1]))))
