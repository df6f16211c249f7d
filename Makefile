# Two commands on a fresh machine: `make demo` and `make test`.
# TORCH=cuda takes the default build of PyTorch (on Linux the CUDA one, several gigabytes) into an environment of its own.
# TORCH_INDEX=URL names the package index that PyTorch comes from.
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
LIBRARIES = $(VENV)/.libraries
FILES = $(VENV)/.files
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-lowest lint bench docs qgis clean again

$(LIBRARIES): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH_REQUIREMENT)"
	$(RUN)/python -m pip install --quiet -e ".[dev]" --config-settings editable_mode=strict
	touch $@

# A strict editable install links the files that were there: a new or moved file needs another one.
$(FILES): again | $(LIBRARIES)
	@find uknowpan_cli models tiling -type f ! -path '*/__pycache__/*' | LC_ALL=C sort > $@.now
	@cmp -s $@.now $@ && rm $@.now || mv $@.now $@

$(INSTALLED): $(LIBRARIES) $(FILES)
	rm -rf build
	$(RUN)/python -m pip install --quiet --no-deps --no-build-isolation -e . --config-settings editable_mode=strict
	touch $@

demo: $(INSTALLED)
	$(RUN)/uknowpan demo -o demo

# The tests of the packaging build a wheel, install it into an environment of its own and run the demo from there.
# One thread a worker: two workers of two threads each would spin on two cores.
test: lint
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n auto

# The oldest direct dependencies that pyproject.toml allows, by uv; of PyTorch that is a CUDA build on Linux (5 GB).
test-lowest:
	uv venv --clear .venv-lowest
	uv pip install --python .venv-lowest --resolution lowest-direct -e ".[dev]" --config-settings editable_mode=strict
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n auto

lint: $(INSTALLED)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy -p uknowpan

bench: $(INSTALLED)
	$(RUN)/python tests/benchmarks/bench.py

# The site of the pages in docs/, which needs no network: build/site/index.html.
docs: $(INSTALLED)
	$(RUN)/mkdocs build --strict --config-file docs/mkdocs.yml

# The plugin for QGIS, which QGIS installs from this file.
DIST ?= dist
qgis:
	rm -rf build/uknowpan_qgis
	mkdir -p build/uknowpan_qgis $(DIST)
	cp LICENSE uknowpan_cli/qgis/*.* build/uknowpan_qgis
	cd build && $(PYTHON) -m zipfile -c $(abspath $(DIST))/uknowpan_qgis.zip uknowpan_qgis

clean:
	rm -rf .venv .venv-cuda .venv-lowest build dist demo *.egg-info
