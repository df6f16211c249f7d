# Two commands on a fresh machine: `make demo` and `make test`. TORCH=cuda takes whatever
# build pip finds (on Linux that is the CUDA one, several gigabytes).
PYTHON ?= python3
VENV ?= .venv
TORCH ?= cpu
RUN = $(VENV)/bin
STAMP = $(VENV)/.installed-$(TORCH)

.PHONY: demo test lint bench clean

ifeq ($(TORCH),cuda)
TORCH_REQUIREMENT = torch>=2.6
else
TORCH_REQUIREMENT = torch==2.13.0
endif

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet "$(TORCH_REQUIREMENT)"
	$(RUN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(RUN)/uknowpan demo --out demo

test: $(STAMP)
	$(RUN)/python -m pytest -n auto

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy uknowpan_cli models tiling

bench: $(STAMP)
	$(RUN)/python tests/benchmarks/bench.py

clean:
	rm -rf $(VENV) build dist demo *.egg-info
