"""What lies in a directory: as marks that tell any change, and as results that two runs must have in common."""

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

Tree = dict[str, str]

# The only things in which two equal runs may differ: when they ran, how long, how much memory, and of which time and
# inode a file was. By the records' field names; in the report's pages by their form.
TIMES_IN_RECORDS = frozenset(
    ("run", "phases", "started", "digests", "content_sha256")
)  # the last is over the others too
_TIMES_IN_PAGES = re.compile(  # rows of: step, seconds, memory, device's memory; and their total; the date
    r"^\| [^|]+ \| [\d.,]+ \| (?:[\d.,]+ [KMG]iB)? \| [^|]*\|\n"
    r"|<tr>\s*<td>[^<]*</td>\s*<td class=n>[\d.,]+</td>\s*<td class=n>(?:[\d.,]+ [KMG]iB)?</td>.*?</tr>\s*"
    r"|, \d{4}-\d{2}-\d{2}(?: to \d{4}-\d{2}-\d{2})?(?=</p>)",
    re.MULTILINE | re.DOTALL,
)
_PAGES = re.compile(
    r"^\| [^|]+ \| [\d.,]+ \| [\d.,]+ [KMG]iB \| [^|]* \|$"  # step, seconds, memory, device's memory
    r"|<tr>\s*<td>[^<]*</td>\s*<td class=n>[\d.,]+</td>\s*<td class=n>[\d.,]+ [KMG]iB</td>.*?</tr>",
    re.MULTILINE | re.DOTALL,
)
_PAGES = (".html", ".md")
TEMPORARY = ".bitladder-tmp-"


def marks(directory: Path) -> Tree:
    """Return name -> kind, permissions, time of change and content of everything in `directory`."""
    found = {}
    for root, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = os.path.join(root, name)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            content: object = ""
            if kind == stat.S_IFREG:
                content = (status.st_mtime_ns, hashlib.sha256(Path(path).read_bytes()).hexdigest())
            elif kind == stat.S_IFLNK:
                content = os.readlink(path)
            found[os.path.relpath(path, directory)] = f"{status.st_mode:o} {content}"
    return found


def result_tree(directory: Path) -> Tree:
    """Return name -> SHA-256 of everything in an output directory, without times (`TIMES_IN_RECORDS`)."""
    found = {}
    for root, directories, files in os.walk(directory):
        for name in directories:
            found[os.path.relpath(os.path.join(root, name), directory) + "/"] = "directory"
        for name in files:
            path = Path(root, name)
            relative = str(path.relative_to(directory))
            if path.is_symlink():
                found[relative] = f"link to {os.readlink(path)}"
            elif relative != ".lock" and path.name != "run.log":
                found[relative] = hashlib.sha256(_without_times(path)).hexdigest()
    return found


def _without_times(path: Path) -> bytes:
    if not path.is_file():
        return b"no regular file"
    content = path.read_bytes()
    if path.suffix == ".json":
        try:
            return json.dumps(_stripped(json.loads(content)), sort_keys=True).encode()
        except (ValueError, RecursionError):
            return content
    if path.suffix in _PAGES:
        return _TIMES_IN_PAGES.sub("", content.decode()).encode()
    return content


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stripped(entry) for key, entry in value.items() if key not in TIMES_IN_RECORDS}
    if isinstance(value, list):
        return [_stripped(entry) for entry in value]
    return value


def differences(before: Tree, after: Tree) -> list[str]:
    """Return the names that are in one tree only, or that have another mark."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def temporaries(*directories: Path) -> list[str]:
    """Return everything that a run left which is no result: temporaries, and unfinished measurements."""
    return sorted(
        str(path)
        for directory in directories
        for path in directory.rglob("*")
        if TEMPORARY in path.name or path.name.startswith("bitladder-") or path.name == "measuring"
    )
