"""A child process in another interpreter: what comes back when it succeeds, crashes, hangs, or isn't there."""

import sys
import time
from pathlib import Path

import pytest

from bitladder.errors import BitladderError
from bitladder.runtimes.child import installed_version, run_child

PYTHON = Path(sys.executable)
PRELUDE = "import json, os, sys, time\njob = json.load(open(sys.argv[1]))\n"
KNOWN = "json.dump({'seen': job['question']}, open(sys.argv[2], 'w'))\n"


def run(tmp_path, body, timeout=60.0, **options):
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + body)
    return run_child(PYTHON, script, {"question": [1, None, "x"]}, timeout=timeout, **options)


def test_a_job_goes_in_and_a_result_comes_back(tmp_path):
    outcome = run(tmp_path, KNOWN + "print('out'); print('err', file=sys.stderr)")
    assert outcome.result == {"seen": [1, None, "x"]}
    assert (outcome.returncode, outcome.timed_out) == (0, False)
    assert "out" in outcome.output
    assert "err" in outcome.output


def test_what_a_crashing_child_knew_is_kept(tmp_path):
    outcome = run(tmp_path, KNOWN + "raise ValueError('the reason')")
    assert outcome.result == {"seen": [1, None, "x"]}
    assert outcome.returncode == 1
    assert "ValueError: the reason" in outcome.output
    killed = run(tmp_path, KNOWN + "os.kill(os.getpid(), 9)")
    assert (killed.returncode, killed.result) == (-9, {"seen": [1, None, "x"]})


def test_a_child_that_wrote_nothing_or_half_a_result(tmp_path):
    assert run(tmp_path, "").result == {}
    assert run(tmp_path, "open(sys.argv[2], 'w').write('{\"a\": ')").result == {}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_hanging_child_is_killed_with_its_own_children(tmp_path):
    pid = tmp_path / "pid"
    body = KNOWN + (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    start = time.monotonic()
    outcome = run(tmp_path, body, timeout=3.0)
    assert time.monotonic() - start < 60
    assert outcome.timed_out
    assert outcome.result == {"seen": [1, None, "x"]}
    while alive(pid.read_text()):  # for a moment after the signal
        assert time.monotonic() - start < 60
        time.sleep(0.01)


def test_the_callers_environment_goes_before_the_defaults(tmp_path, monkeypatch):
    body = "json.dump([os.environ['BITLADDER_A'], os.environ['BITLADDER_B']], open(sys.argv[2], 'w'))"
    monkeypatch.setenv("BITLADDER_A", "caller")
    defaults = {"BITLADDER_A": "default", "BITLADDER_B": "default"}
    assert run(tmp_path, body, environment=defaults).result == ["caller", "default"]


def test_no_interpreter_is_refused_with_the_remedy(tmp_path):
    text = tmp_path / "python"
    text.write_text("not executable")
    for path in (tmp_path / "missing", text, tmp_path):
        with pytest.raises(BitladderError, match="no Python interpreter at .*make vllm-env"):
            run_child(path, Path("x.py"), {}, timeout=1)
        with pytest.raises(BitladderError, match="no Python interpreter"):
            installed_version(path)


def test_the_version_of_a_package_in_another_environment():
    import pydantic

    assert installed_version(PYTHON, ("no-such-package", "pydantic")) == pydantic.VERSION
    assert installed_version(PYTHON, ("no-such-package",)) is None
