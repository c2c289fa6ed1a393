"""What is known of how runtimes treat the checkpoints."""

import re
from collections.abc import Mapping
from pathlib import Path

from bitladder.records import CheckpointManifest, ProbeResult
from bitladder.steps.workspace import PROBES, Workspace


def probe_path(work: Workspace, result: ProbeResult) -> Path:
    """Return where a probe's result lies."""
    version = re.sub(r"[^A-Za-z0-9.+]+", "_", result.version)
    return work.output / PROBES / f"{result.scheme}--{result.runtime}-{version}-{result.stage}.json"


def probes(work: Workspace, manifests: Mapping[str, CheckpointManifest]) -> tuple[ProbeResult, ...]:
    """Return what is known of how the runtimes treat these checkpoints; results of earlier ones are removed."""
    digests = {name: manifest.fingerprint() for name, manifest in manifests.items()}
    found = []
    for path in sorted((work.output / PROBES).glob("*.json")):
        result = work.known(ProbeResult, path)
        if result is None or result.scheme is None or probe_path(work, result) != path:
            continue  # not what its name says: written again where it belongs, else none of ours
        if digests.get(result.scheme) == result.manifest_sha256:
            found.append(result)
        else:
            path.unlink()
    return tuple(found)
