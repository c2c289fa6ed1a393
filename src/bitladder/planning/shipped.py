"""Profiles of devices that come with Bitladder, by name."""

from pathlib import Path

from bitladder.errors import RecordError
from bitladder.records import Profile

_DIRECTORY = Path(__file__).with_name("profiles")


def names() -> tuple[str, ...]:
    """Return what they are called: the device, then the model."""
    return tuple(sorted(path.stem for path in _DIRECTORY.glob("*.json")))


def profile_named(name: str) -> Profile:
    """Return the profile of this name, or in this file.

    Raises:
        RecordError: there is none.
    """
    if name in names():
        return Profile.read(_DIRECTORY / f"{name}.json")
    path = Path(name)
    if not path.is_absolute():
        known = ", ".join(names()) or "none"
        raise RecordError(
            f"no profile {name} comes with Bitladder ({known}); name one of them, or a file that `bitladder profile` "
            "wrote"
        )
    return Profile.read(path)
