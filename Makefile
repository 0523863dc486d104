# Everything a newcomer needs: `make demo` and `make test` set up what they run on.
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
ARGS ?=
# A test file stays in one process; two processes, as several tests start clusters of their own.
PYTEST := $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test lint bench clean

setup: $(READY)

$(READY): pyproject.toml constraints/cpu.txt
	@# Debian's python3 has no ensurepip without python3-venv: the system's pip then fills the environment.
	@test -x $(PYTHON) || python3 -m venv $(VENV) 2>/dev/null || \
		{ rm -rf $(VENV) && python3 -m venv --without-pip $(VENV) && python3 -m pip --python $(PYTHON) install --quiet pip; }
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e '.[dev]'
	@touch $@

demo: setup
	$(PYTHON) launch/demo.py $(ARGS)

test: setup
	$(PYTEST) $(ARGS)

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# All that need no GPU and no hours (benchmarks/ablation.py trains twenty models).
BENCHMARKS := $(filter-out benchmarks/shared.py benchmarks/gpu_training.py benchmarks/ablation.py, $(wildcard benchmarks/*.py))

bench: setup
	@for script in $(BENCHMARKS); do echo "== $$script"; $(PYTHON) $$script || exit 1; done

clean:
	rm -rf outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
