# Two commands on a fresh machine: `make demo` and `make test`.
# TORCH=cuda takes whatever build pip finds (on Linux the CUDA one, several gigabytes) into an
# environment of its own; TORCH_INDEX=URL names the package index that torch comes from.
PYTHON ?= python3
TORCH ?= cpu
TORCH_INDEX ?=

ifeq ($(TORCH),cuda)
VENV ?= .venv-cuda
TORCH_REQUIREMENT = torch>=2.6
else
VENV ?= .venv
TORCH_REQUIREMENT = torch==2.13.0
endif
RUN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test lint bench clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH_REQUIREMENT)"
	$(RUN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(RUN)/uknowpan demo --out demo

test: $(STAMP)
	$(RUN)/python -m pytest -n auto

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy -p uknowpan

bench: $(STAMP)
	$(RUN)/python tests/benchmarks/bench.py

clean:
	rm -rf .venv .venv-cuda build dist demo *.egg-info
