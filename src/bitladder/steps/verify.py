"""Verify all checkpoints against their schemes, the source and each other."""

from bitladder import verification
from bitladder.errors import VerificationFailed
from bitladder.measured import read_amax
from bitladder.models.weights import DigestCache
from bitladder.records import Verification
from bitladder.runinfo import Meter
from bitladder.steps.export import is_intact
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
    wanted = {name: manifest.fingerprint() for name, manifest in manifests.items()}
    result = None
    if trust_times and path.exists() and all(is_intact(work, s, work.checkpoint_directory(s.name)) for s in schemes):
        known = work.known(Verification, path)
        if known is not None and {c.scheme: c.manifest_sha256 for c in known.checkpoints} == wanted and known.ok:
            result = known
    if result is None:
        meter = Meter()
        with meter.phase("verify"):
            directories = {scheme.name: work.checkpoint_directory(scheme.name) for scheme in schemes}
            amax = read_amax(measurement, work.output)
            result = verification.verify(schemes, measurement, amax, work.model_directory, directories, work.progress)
        result = result.model_copy(update={"times_trusted": trust_times})
        result.write(path)
        work.finished("verify", meter.phases)
    findings = [(c.scheme, f) for c in result.checkpoints for f in c.findings]
    findings += [(f"{p.first} and {p.second}", f) for p in result.pairs for f in p.findings]
    if findings:
        where, first = findings[0]
        tensor = f", {first.tensor}" if first.tensor else ""
        raise VerificationFailed(
            f"verification found {len(findings)} problem(s); the first: {where}: {first.file}{tensor}: "
            f"{first.problem}; {first.remedy} (all in {path})"
        )
    return result
