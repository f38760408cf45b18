# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make the .venv they need.

PYTHON ?= python3
VENV := .venv

.DEFAULT_GOAL := help
.PHONY: help demo test test-frameworks check format bench dashboards pictures clean

help:  ## What can be made
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(VENV)/.demo  ## Train a small classifier in two ranks, and see what became of its telemetry
	@$(VENV)/bin/stepspan demo

test: $(VENV)/.dev  ## Run the tests; those against real servers need `make stack` before
	$(VENV)/bin/python -m pytest -n auto --dist loadfile

test-frameworks: .venv-frameworks/.installed  ## Train with torch, Lightning and Hugging Face (some GB) before the real stack
	OMP_NUM_THREADS=1 .venv-frameworks/bin/python -m pytest tests/frameworks tests/test_torch.py tests/test_ddp.py

check: $(VENV)/.dev  ## Lint, type-check, and see that imports only point down
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -q -p no:cacheprovider tests/test_layers.py tests/test_words.py
	$(VENV)/bin/mypy
	if $(VENV)/bin/python -c 'import grafana_foundation_sdk' 2>&-; then \
		$(VENV)/bin/mypy --python-version 3.11 collector-config/dashboards; fi

format: $(VENV)/.dev  ## Format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.dev  ## Measure: the figures of benchmarks/README.md
	$(VENV)/bin/python benchmarks/hot_path.py
	$(VENV)/bin/python benchmarks/sync.py

dashboards: $(VENV)/.dev  ## Write Grafana's dashboards and Prometheus' recording rules from their code
	cd collector-config && ../$(VENV)/bin/python -m dashboards

pictures: $(VENV)/.pictures  ## Draw the README's pictures of the dashboards, from a training (5 min; `make stack` before)
	PYTHONPATH=tests $(VENV)/bin/python tools/pictures

clean:  ## Remove what was made, but for the stack
	rm -rf $(VENV) .venv-frameworks .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "stepspan needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.pictures: $(VENV)/.dev
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[pictures]'
	@touch $@

.venv-frameworks/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-frameworks
	.venv-frameworks/bin/python -m pip install --quiet --disable-pip-version-check -e '.[demo,lightning,huggingface]' \
		'hypothesis>=6.100' 'pytest>=8.3' 'pytest-timeout>=2.3' 'pytorch-lightning>=2.4' 'pyyaml>=6'
	@touch $@

include collector-config/stack.mk
