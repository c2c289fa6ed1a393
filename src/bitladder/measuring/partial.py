"""What an unfinished measurement keeps, so that a killed run goes on where it was."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from bitladder.measured import CODES, Amax, Codes, codes_files
from bitladder.measuring.job import BatchScores
from bitladder.reading import read_json, read_tensors, read_text
from bitladder.storage import atomic_path, atomic_write, discard, seal, unsealed

PARTIAL = "measuring"


class Partial:
    """What a measurement has so far, on disk."""

    def __init__(self, directory: Path, key: str) -> None:
        self.directory = directory.absolute()  # other processes may stand elsewhere
        path = directory / "key.json"
        damaged = unsealed(directory)
        if path in damaged or not path.exists() or read_text(path) != json.dumps({"key": key}):
            discard(directory)
            directory.mkdir(parents=True)
            self._keep_text(path, json.dumps({"key": key}))
        else:
            for one in damaged:  # what was in it is found again
                discard(one)

    @staticmethod
    def _keep_text(path: Path, text: str) -> None:
        atomic_write(path, text)
        seal(path)

    @staticmethod
    def _keep_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        with atomic_path(path) as temporary:
            save_file(dict(tensors), temporary)
        seal(path)

    def codes_file(self, layer: int) -> Path:
        """Return where the codes of a decoder layer's modules are kept, once they are made."""
        return self.directory / CODES / f"layer-{layer:05}.safetensors"

    def codes(self) -> "Codes":
        """Return the codes that are made so far."""
        return Codes.in_files(codes_files(self.directory / CODES))

    def amax(self) -> Amax | None:
        """Return the amax values of a finished calibration, or None."""
        path = self.directory / "amax.safetensors"
        return read_tensors(path) if path.exists() else None

    def keep_amax(self, amax: Amax) -> None:
        """Store the amax values."""
        self._keep_tensors(self.directory / "amax.safetensors", amax)

    def unweighed(self, count: int) -> list[int]:
        """Return of which of so many batches no lengths are stored yet."""
        return [batch for batch in range(count) if not self._lengths_file(batch).exists()]

    def lengths(self, batch: int) -> torch.Tensor:
        """Return how long the gradients of a batch's tokens are, [modules, rows, tokens], once they are stored."""
        lengths: torch.Tensor = read_tensors(self._lengths_file(batch))["lengths"]
        return lengths

    def keep_lengths(self, batch: int, lengths: torch.Tensor) -> None:
        """Store the lengths of one batch."""
        self._keep_tensors(self._lengths_file(batch), {"lengths": lengths})

    def _lengths_file(self, batch: int) -> Path:
        return self.directory / f"lengths-{batch:05}.safetensors"

    def scores(self, batch: int) -> BatchScores | None:
        """Return the scores of a batch, or None."""
        path = self.directory / f"scores-{batch:05}.json"
        if not path.exists():
            return None
        scores: BatchScores = read_json(path)
        return scores

    def unscored(self, count: int, formats: Sequence[str]) -> list[int]:
        """Return which of so many batches aren't scored in all of these formats yet; they are, all at once."""
        return [batch for batch in range(count) if not self._is_scored(batch, formats)]

    def _is_scored(self, batch: int, formats: Sequence[str]) -> bool:
        known = self.scores(batch)
        return known is not None and set().union(*known.values()).issuperset(formats)

    def keep_scores(self, batch: int, scores: BatchScores) -> None:
        """Store the scores of one batch (floats survive JSON exactly)."""
        self._keep_text(self.directory / f"scores-{batch:05}.json", json.dumps(scores))

    def remove(self) -> None:
        """Remove everything, once the measurement is written."""
        discard(self.directory)


def forget_partial(output: Path) -> None:
    """Remove what an unfinished measurement in `output` has so far."""
    discard(output / PARTIAL)
