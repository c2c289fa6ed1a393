"""Verify all checkpoints against their schemes, the source and each other."""

from bitladder import verification
from bitladder.errors import VerificationFailed
from bitladder.measured import read_amax
from bitladder.models.weights import DigestCache
from bitladder.records import Verification
from bitladder.steps.export import is_intact
from bitladder.steps.known import fingerprints
from bitladder.steps.step import doing, valid
from bitladder.steps.workspace import VERIFICATION_FILE, Workspace


def verify(work: Workspace, *, trust_times: bool = False) -> Verification:
    """Verify all checkpoints against their schemes, the source and each other.

    Args:
        work: the recipe and its output directory.
        trust_times: files whose size and modification time haven't changed since this run's directory read them are not
            read again, and what was verified before stays verified. False: every byte is read, the source's too.

    Raises:
        VerificationFailed: something is wrong; `verification.json` has all findings.
    """
    if not trust_times:
        work.cache = DigestCache()
    measurement, schemes, manifests = work.measurement(), work.schemes(), work.manifests()
    path = work.output / VERIFICATION_FILE
    directories = {scheme.name: work.checkpoint_directory(scheme.name) for scheme in schemes}
    result = None
    if trust_times and path.exists() and all(is_intact(work, s, directories[s.name]) for s in schemes):
        result = valid(work, Verification, path, manifest_sha256=fingerprints(manifests), ok=True)
    if result is None:
        with doing(work, "verify") as meter:
            with meter.phase("verify"):
                amax = read_amax(measurement, work.output)
                found = verification.verify(
                    schemes,
                    measurement,
                    amax,
                    work.model_directory,
                    directories,
                    work.progress,
                    work.recipe.export.carrier,
                )
            result = found.model_copy(update={"times_trusted": trust_times})
            result.write(path)
    refuse_findings(result, f"all in {path}")
    return result


def refuse_findings(result: Verification, more: str) -> None:
    """Raise VerificationFailed where something is wrong; `more` says where all of it is told."""
    findings = [(c.scheme, f) for c in result.checkpoints for f in c.findings]
    findings += [(f"{p.first} and {p.second}", f) for p in result.pairs for f in p.findings]
    if findings:
        where, first = findings[0]
        tensor = f", {first.tensor}" if first.tensor else ""
        raise VerificationFailed(
            f"verification found {len(findings)} problem(s); the first: {where}: {first.file}{tensor}: "
            f"{first.problem}; {first.remedy} ({more})"
        )
