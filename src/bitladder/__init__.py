"""One sensitivity measurement of a model, a ladder of mixed-precision checkpoints from it, and the evidence for each.

    import bitladder

    run = bitladder.Run("recipe.yaml")
    run.measure(); run.plan(); run.export()
    model = bitladder.load(run.checkpoint("top50"))

`Run` does what the command line does, `load` opens a checkpoint (`bitladder.library`); every error with a remedy is a
`BitladderError`. The steps meet only through the records in `bitladder.records`:
`measure -> plan -> export -> verify -> evaluate -> report`. Importing this package imports nothing else of it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitladder.errors import BitladderError
    from bitladder.library import Run, load

__all__ = ["BitladderError", "Run", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from bitladder import errors, library

        return getattr(errors if name == "BitladderError" else library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
