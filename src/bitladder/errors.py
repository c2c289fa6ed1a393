"""Every error that Bitladder raises on purpose.

    BitladderError                exit status 2, one line: what was asked, what is possible, what to do
    ├── RecipeError               the recipe (or a flag) is wrong: unknown key, bad value
    ├── DataError                 calibration or held-out data is missing, empty, too short or malformed
    ├── ModelError                the model's files are missing, truncated, or hold NaN/Inf
    │   └── UnsupportedModel      a model without a language model we can search, or with modules we can't quantise
    ├── MeasurementError          the engine produced something that can't be used (NaN scores, no scores, no amax)
    ├── PlanError                 a scheme can't be planned
    │   ├── InfeasibleTarget      the target lies outside the attainable range, which the message names
    │   └── DuplicateSchemes      two schemes have the same assignment
    ├── RecordError               a file that we wrote is corrupt, foreign, or of another schema
    ├── StaleRecord               a record belongs to another model, measurement or scheme than the one at hand
    ├── OutputError               the output directory can't be used: holds something else, no space, no permission
    ├── VerificationFailed        a checkpoint doesn't match its scheme; the findings are in `verification.json`
    ├── ProbeFailed               a runtime wouldn't load a checkpoint, or not run it as it says; the findings say why
    ├── LowMemory                 so little memory was left that results may depend on it
    └── EngineError               ModelOpt or transformers behaved otherwise than we rely on

Only the command line catches these.
"""

import contextlib
from collections.abc import Iterator


class BitladderError(Exception):
    """Base of all errors with a remedy; `str(error)` is one line for the user."""


class RecipeError(BitladderError):
    """The recipe or a command-line value is wrong."""


class DataError(BitladderError):
    """Calibration or held-out data can't be used."""


class ModelError(BitladderError):
    """The model's files can't be used."""


class UnsupportedModel(ModelError):
    """The model is intact, but Bitladder can't search it."""


class MeasurementError(BitladderError):
    """A measurement went wrong or lacks what the next step needs."""


class PlanError(BitladderError):
    """A scheme can't be planned."""


class InfeasibleTarget(PlanError):
    """The target lies outside the attainable range."""


class FrontierTooLarge(PlanError):
    """The whole trade-off of a measurement has too many points to hold; single budgets can be planned."""


class DuplicateSchemes(PlanError):
    """Two schemes assign the same format to every group."""


class RecordError(BitladderError):
    """A record on disk is corrupt, foreign, or of another schema version."""


class StaleRecord(BitladderError):
    """A record belongs to another model, measurement or scheme."""


class OutputError(BitladderError):
    """The output directory can't be used."""


class VerificationFailed(BitladderError):
    """A checkpoint doesn't match its scheme."""


class ProbeFailed(BitladderError):
    """A runtime wouldn't load a checkpoint, or not run it as it says."""


class LowMemory(BitladderError):
    """So little memory was left at one time that results may depend on it."""


class EngineError(BitladderError):
    """ModelOpt or transformers behaved otherwise than we rely on."""


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error says that there is no memory, or none for a thread; RuntimeErrors do, too."""
    texts = ("out of memory", "can't allocate memory", "can't start new thread")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def reason_of(error: BaseException) -> str:
    """Return the first line of somebody else's error that isn't blank, or the error's kind: for a line of ours.

    A line that ends in a colon goes on in the next one.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@contextlib.contextmanager
def foreign(kind: type[BitladderError], what: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever a library raises in the body into one line of ours: `what: reason; remedy`.

    For calls into transformers and the like, which raise whatever a damaged file leads them to. Our own errors, and a
    lack of memory, pass.
    """
    try:
        yield
    except BitladderError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        reason = reason_of(error) if str(error).strip("' \"") and not isinstance(error, KeyError) else repr(error)
        raise kind(f"{what}: {reason}{f'; {remedy}' if remedy else ''}") from error
