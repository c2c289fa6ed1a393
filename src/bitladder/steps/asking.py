"""Has vLLM load or serve checkpoints: what it is asked, and what our own evaluation says of the same files.

The runtime runs in a child process of its own environment (`bitladder.runtimes`); a failure is a result.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from bitladder.data.batches import DataSet
from bitladder.data.processors import has_template, load_processor
from bitladder.device import capability, resolve_device
from bitladder.errors import ModelError
from bitladder.evaluation import logprobs
from bitladder.evaluation.harness.tasks import Tasks
from bitladder.formats import FORMATS
from bitladder.formats.targets import served, target_of
from bitladder.recipe import VllmSpec
from bitladder.records import Paired, ProbeResult, ServedTask
from bitladder.runtimes.child import vllm_version
from bitladder.runtimes.vllm.job import Question, ServeJob, SpeedJob
from bitladder.runtimes.vllm.load import load_all
from bitladder.runtimes.vllm.serve import serve_all
from bitladder.runtimes.vllm.served import Served

_SERVED_ROWS = 32  # samples of each held-out set whose log-probabilities a runtime is asked for
_TEXT_PROMPTS = ("Describe a picture of a cat.", "Count from one to five.")  # asked beside them
_IMAGE_PROMPT = "Describe the image."
_QUESTIONS = 4  # pictures of the held-out sets that a runtime is asked about


def serve_samples(
    data: Mapping[str, DataSet],
    directories: Sequence[Path],
    source: Path,
    python: Path,
    *,
    device: str,
    timeout: float,
    tasks: Tasks | None = None,
) -> tuple[ProbeResult, ...]:
    """Serve checkpoints, and the original before them, on the first samples of every held-out set.

    Args:
        data: name of the held-out set -> its samples.
        directories: the checkpoints.
        source: the original in 16 bits.
        python: the interpreter of vLLM's environment.
        device: where our own evaluation runs; speeds are taken where it is a GPU.
        timeout: seconds for each.
        tasks: of lm-evaluation-harness, that are asked too; None: none.
    """
    sets = {split: _first_samples(one) for split, one in data.items()}
    pairs = [sample for one in sets.values() for sample in one.samples]
    questions = [Question(sample.prompt, sample.image) for sample in pairs[:_QUESTIONS]]
    job = ServeJob(
        questions=(*questions, *(Question(text) for text in _TEXT_PROMPTS)),
        sequences=tuple(row for split, one in sets.items() for row in logprobs.sequences(one, split, source)),
        rows=tasks.rows() if tasks is not None else (),
        chat=has_chat_template(source),
        speed=SpeedJob() if device.startswith("cuda") else None,
    )
    arithmetic = served(FORMATS, target_of(capability(device)))  # vLLM runs on the same machine, on a CPU without AMX
    expected = {}
    for directory in (source, *directories):
        with contextlib.suppress(ModelError):  # what our evaluation refuses is served all the same
            expected[directory] = logprobs.log_probs(
                directory, list(sets.values()), device=device, arithmetic=arithmetic
            )
    probes = serve_all(directories, python, job, source=source, expected=expected, timeout=timeout)
    if tasks is None:
        return probes.results
    answers = {directory: _answers(tasks, served) for directory, served in probes.served.items()}
    return tuple(
        result.model_copy(update={"tasks": _served_tasks(tasks, answers[directory], answers[source])})
        for directory, result in zip(directories, probes.results, strict=True)
    )


def _answers(tasks: Tasks, served: Served) -> dict[str, str]:
    """Return task -> a digit a question, 1 where a runtime's answer is right; {}: it didn't come so far."""
    log_probs = {row.token_ids: row.log_probs for row in served.rows}
    return tasks.answers_from(log_probs) if log_probs else {}


def _served_tasks(tasks: Tasks, right: Mapping[str, str], source: Mapping[str, str]) -> tuple[ServedTask, ...]:
    return tuple(
        ServedTask(task=name, sha256=task.sha256, answers=Paired(right=right[name], reference=source[name]))
        for name, task in tasks.summaries().items()
        if right and source
    )


def _first_samples(data: DataSet) -> DataSet:
    """Return whole batches of the first `_SERVED_ROWS` samples, or a little more."""
    rows, batches = 0, []
    for batch in data.batches:
        if rows >= _SERVED_ROWS:
            break
        batches.append(batch)
        rows += len(batch.labels)
    return dataclasses.replace(data, batches=tuple(batches), samples=data.samples[:rows])


def probe_directories(
    directories: Sequence[Path], spec: VllmSpec, *, source: Path | None = None, image: Path | None = None
) -> tuple[ProbeResult, ...]:
    """Have vLLM load (or serve) checkpoints that belong to no recipe; a failure is a result.

    Args:
        directories: the checkpoints.
        spec: the environment, and how far.
        source: the original, served before them, for the stage `generate`.
        image: a picture to ask about, for the stage `generate`.

    Raises:
        BitladderError: no vLLM in that environment, or no checkpoint in a directory.
    """
    python = Path(spec.python)
    vllm_version(python)
    if spec.stage == "load":
        return load_all(directories, python, timeout=spec.timeout)
    pictured = (Question(_IMAGE_PROMPT, str(image.resolve())),) if image is not None else ()
    job = ServeJob(
        questions=(*pictured, *(Question(text) for text in _TEXT_PROMPTS)),
        chat=all(has_chat_template(directory) for directory in directories),
        speed=SpeedJob() if resolve_device("auto").startswith("cuda") else None,
    )
    return serve_all(directories, python, job, source=source, timeout=spec.timeout).results


def has_chat_template(directory: Path) -> bool:
    """Return whether a model's files hold a chat template."""
    return has_template(load_processor(directory))
