"""Several workers, through a local Ray cluster of CPU processes, give the bytes of one process; dead ones included."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bitladder.errors import MeasurementError, ModelError, RecipeError
from bitladder.measuring import parallel
from bitladder.measuring.measure import measure as measure_now
from bitladder.models.target import find_target
from bitladder.recipe import MeasureSpec, WorkersSpec, parse_recipe
from bitladder.runinfo import no_progress, versions
from conftest import load_text, source_of

SETTINGS = {
    "fisher": {},
    "kl_div": {"method": "kl_div", "formats": ("fp8", "nvfp4")},
    "compensated": {"method": "gradient", "rounding": "compensated", "damping": 1.0, "formats": ("fp8", "int8")},
}
BATCHES = 6
RECORDS = ("measurement.json", "measurement.safetensors")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads change sums: this process has as many as each worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cluster():
    """A local Ray cluster with room for two workers of one core each; it is left as it is by a measurement."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    assert ray.is_initialized()
    ray.shutdown()


def measure(directory, text, output, workers=None, progress=no_progress, **settings):
    """Measure with two workers, or with this process alone."""
    output.mkdir(parents=True, exist_ok=True)
    data, target = load_text(directory, text, samples=2 * BATCHES), find_target(directory)
    spec = MeasureSpec(engine="native", **settings)
    return measure_now(directory, source_of(directory), target, data, spec, output, progress, workers)


def two(**changes):
    return WorkersSpec(**{"count": 2, "threads": 1, **changes})


def files_of(output):
    """Return the bytes of everything that a measurement wrote, without where and how it ran."""
    found = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    record = json.loads(found["measurement.json"])
    for name in ("run", "content_sha256"):  # the digest is of both
        record.pop(name, None)
    return {**found, "measurement.json": json.dumps(record)}


@pytest.fixture(scope="module")
def hollow(llama, tmp_path_factory):
    """The tiny Llama with a module that gives zeros alone, so that the next one's input has no scale."""
    source = shutil.copytree(llama, tmp_path_factory.mktemp("hollow") / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.fixture(scope="module")
def alone(llama, hollow, text_file, tmp_path_factory):
    """The files of each kind of measurement as one process writes them."""
    outputs = {kind: tmp_path_factory.mktemp(kind) for kind in SETTINGS}
    for kind, output in outputs.items():
        measure(hollow if kind == "compensated" else llama, text_file, output, **SETTINGS[kind])
    return {kind: files_of(output) for kind, output in outputs.items()}


def worker_processes():
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            if process.name().startswith("ray::_Worker") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Killer:
    """Kills a worker in a batch, once another has scored one; called as a measurement's progress."""

    def __init__(self):
        self.victim, self.killed, self.seen = None, [], []

    def __call__(self, phase, done, total):
        self.seen.append((phase, done, total))
        if (phase, done) == ("score", 0):
            self.victim = worker_processes()[0]
            self.victim.suspend()  # or it would be through with its batches before this process looks
        if (phase, done) == ("score", 1):
            self.victim.kill()
            self.victim.wait(10)
            self.killed.append(self.victim.pid)


@pytest.fixture
def replaced(monkeypatch):
    """What workers died at."""
    calls, replace = [], parallel._Pool._replace

    def spy(pool, worker, error):
        calls.append(worker.calls[0][1].method)
        replace(pool, worker, error)

    monkeypatch.setattr(parallel._Pool, "_replace", spy)
    return calls


@pytest.mark.usefixtures("cluster")
def test_two_workers_write_the_bytes_of_one_process(llama, text_file, tmp_path, alone, replaced):
    measurement = measure(llama, text_file, tmp_path, two(), **SETTINGS["kl_div"])
    assert files_of(tmp_path) == alone["kl_div"]
    assert not replaced
    assert not psutil.wait_procs(worker_processes(), timeout=20)[1]
    assert (measurement.run.workers, measurement.run.threads) == (2, 1)
    assert [phase.phase for phase in measurement.run.phases] == ["load model", "calibrate", "score"]


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_is_killed_is_replaced_and_the_bytes_are_the_same(hollow, text_file, tmp_path, alone, replaced):
    killer = Killer()
    measurement = measure(hollow, text_file, tmp_path, two(), killer, **SETTINGS["compensated"])
    assert killer.killed
    assert replaced == ["score"]
    assert files_of(tmp_path) == alone["compensated"]
    assert [done for phase, done, _ in killer.seen if phase == "score"] == list(range(BATCHES + 1))
    assert [phase.phase for phase in measurement.run.phases] == ["load model", "calibrate", "round", "score"]
    reason = "all zero in its input during calibration: no FP8 scale"  # it stays in 16 bits with workers too
    untouched = [module.name for module in measurement.untouched if module.reason == reason]
    assert untouched == ["model.layers.1.mlp.down_proj"]


@pytest.mark.usefixtures("cluster")
def test_workers_go_on_where_one_process_was_killed(llama, text_file, tmp_path, alone):
    def interrupt(phase, done, total):
        if (phase, done) == ("score", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(llama, text_file, tmp_path, None, interrupt)
    seen = []
    measure(llama, text_file, tmp_path, two(), lambda *told: seen.append(told))
    assert seen == [("score", done, BATCHES) for done in range(2, BATCHES + 1)]
    assert files_of(tmp_path) == alone["fisher"]


@pytest.mark.usefixtures("cluster")
def test_a_workers_error_is_raised_as_it_is_and_not_tried_again(llama, text_file, tmp_path, replaced):
    broken = shutil.copytree(llama, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.endswith("1.mlp.up_proj.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.weight holds NaN or Inf; fetch the model again$") as raised:
        measure(broken, text_file, tmp_path / "output", two(count=1))
    assert type(raised.value) is ModelError
    assert "\n" not in str(raised.value)
    assert not replaced


@pytest.mark.usefixtures("cluster")
def test_workers_that_die_again_and_again_end_the_run(llama, text_file, tmp_path, replaced):
    ended = threading.Event()

    def kill():
        while not ended.wait(0.05):
            for process in worker_processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(MeasurementError, match="3 workers died while loading the model .* lower") as raised:
            measure(llama, text_file, tmp_path, two(count=1))
    finally:
        ended.set()
        killer.join()
    assert "\n" not in str(raised.value)
    assert replaced == ["load"] * 3


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("asked", [{"count": 3}, {"threads": 2}])
def test_more_workers_than_there_is_room_for_are_refused(llama, text_file, tmp_path, asked):
    room = {"count": 2, "threads": 1}["count" if "count" in asked else "threads"]
    with pytest.raises(MeasurementError, match=rf"each needs \d cores .* room for {room}; lower it"):
        measure(llama, text_file, tmp_path, two(**asked))


def test_workers_whose_numbers_would_differ_are_refused():
    pool, same = SimpleNamespace(processor=None), versions()
    parallel._Pool._check_alike(pool, same, "H100")
    parallel._Pool._check_alike(pool, same, "H100")
    with pytest.raises(MeasurementError, match="a worker has A100 beside H100: who scores a batch would change"):
        parallel._Pool._check_alike(pool, same, "A100")
    with pytest.raises(MeasurementError, match=r"a worker has torch 0.1 \(\d.* here\)"):
        parallel._Pool._check_alike(pool, {**same, "torch": "0.1"}, "H100")


@pytest.mark.parametrize(("room", "left"), [(3, ["new", "old", "newer"]), (2, ["old", "newer"]), (1, ["old"])])
def test_workers_that_no_node_has_room_for_are_not_waited_for(room, left):
    load, item = parallel._Call("load", "loading", ()), parallel._Call("score", "scoring", (), 0)
    pool = parallel._Pool.__new__(parallel._Pool)
    pool.ray = SimpleNamespace(kill=lambda _: None)
    pool._room = lambda: room
    calls = {"new": load, "old": item, "newer": load}
    pool.hired = [parallel._Hired(name, deque([(None, call)])) for name, call in calls.items()]
    pool._give_up_waiting()
    assert [worker.actor for worker in pool.hired] == left
    pool.hired, pool._room = [parallel._Hired("new", deque([(None, load)]))], lambda: 0
    with pytest.raises(MeasurementError, match="no node of the Ray cluster is left"):
        pool._give_up_waiting()


def test_nan_and_larger_values_survive_the_merging_of_amax(monkeypatch):
    monkeypatch.setattr(parallel, "with_scales", lambda *_: None)
    job = SimpleNamespace(batches=("one", "other"), target=None, spec=None, progress=lambda *_: None)
    first = {"a": torch.tensor(1.0), "b": torch.tensor(float("nan")), "c": torch.tensor(3.0)}
    second = {"a": torch.tensor(2.0), "b": torch.tensor(1.0), "d": torch.tensor(4.0)}
    for order in ((first, second), (second, first)):
        pool = SimpleNamespace(each=lambda calls, order=order: zip(calls, order, strict=True))
        merged = parallel._calibrate(pool, job, 1)
        assert {name: float(merged[name]) for name in "acd"} == {"a": 2.0, "c": 3.0, "d": 4.0}
        assert merged["b"].isnan()


def test_without_ray_one_line_says_what_to_install(llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MeasurementError, match=r"workers.count is 2, which needs Ray: pip install 'bitladder\[ray\]'"):
        measure(llama, text_file, tmp_path, two())


def test_a_cluster_that_does_not_answer_is_named_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"127.0.0.1:{free.getsockname()[1]}"
        code = f"""
from bitladder.errors import MeasurementError
from bitladder.recipe import WorkersSpec
from bitladder.measuring import parallel
try:
    parallel._Pool(WorkersSpec(count=1, address="{address}"), 1, False, [])
except MeasurementError as error:
    print(error)
"""
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.startswith(f"no Ray cluster answers at workers.address {address} ([Errno 111]")
    assert result.stdout.count("\n") == 1


def recipe_of(directory, text, output, **changes):
    return {
        "model": {"path": str(directory)},
        "calibration": {
            "data": {"kind": "text", "path": str(text)},
            "samples": 2 * BATCHES,
            "sequence_length": 24,
            "batch_size": 2,
        },
        "workers": {"count": 2, "threads": 1},
        "schemes": [{"name": "half", "coverage": 0.5}],
        "output": str(output),
        **changes,
    }


@pytest.mark.parametrize(
    ("measurement", "message"),
    [
        (
            {"engine": "modelopt"},
            "workers.count is 2, but measurement.engine: modelopt measures in one process; use engine: native",
        ),
        ({"engine": "native", "device": "cuda:1"}, "cuda:1 names one GPU, workers take one each; use device: cuda"),
    ],
)
def test_a_recipe_that_workers_cannot_follow_is_refused(llama, text_file, tmp_path, measurement, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe_of(llama, text_file, tmp_path, measurement=measurement), "recipe")
    data, target = load_text(llama, text_file), find_target(llama)
    spec = MeasureSpec(**measurement)
    with pytest.raises(MeasurementError, match=message):
        measure_now(llama, source_of(llama), target, data, spec, tmp_path, no_progress, two())


def listening(process):
    """Return {(process, address)} of what a process and its children listen on."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it ended meanwhile
            found |= {(one.name(), c.laddr) for c in one.net_connections(kind="inet") if c.status == "LISTEN"}
    return found


def test_the_command_line_starts_a_cluster_of_its_own_that_listens_on_this_machine_alone(
    llama, text_file, tmp_path, alone
):
    output = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(llama, text_file, output)))
    command = [sys.executable, "-m", "bitladder.cli", "measure", str(recipe)]
    seen, environment = set(), {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w+") as said:
        child = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        process = psutil.Process(child.pid)
        while child.poll() is None:
            seen |= listening(process)
            time.sleep(0.1)
        said.seek(0)
        words = said.read()
    assert child.returncode == 0, words
    assert "ray" not in words.lower()
    assert all(files_of(output)[name] == alone["fisher"][name] for name in RECORDS)
    assert json.loads((output / "measurement.json").read_text())["run"]["workers"] == 2
    assert {"gcs_server", "raylet"} <= {name for name, _ in seen}
    assert len(seen) >= 5
    assert {address.ip.removeprefix("::ffff:") for _, address in seen} <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("before", [None, "1"])
def test_how_a_cluster_is_kept_to_this_machine_leaves_nothing_behind(before, monkeypatch):
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    constant = ray_constants.ENABLE_RAY_CLUSTER
    with parallel._on_loopback():
        assert (ray_constants.ENABLE_RAY_CLUSTER, os.environ[name]) == (False, "0")
    assert (ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(name)) == (constant, before)
