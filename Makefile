# `make demo` and `make test` are the two commands; both do all their own set-up. They need Python 3.11 or later, cargo,
# a C compiler and the package registries.
#
# Two environments share one copy of every package: .venv holds what uv.lock names, without peftrs; $(INSTALLED), outside
# the checkout, holds the built wheel and sees .venv through a path file. Whatever runs peftrs runs in the second.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$(( n < 4 ? n : 4 )))
CHECKOUT := $(shell printf '%s' '$(CURDIR)' | cksum | cut -d' ' -f1)
INSTALLED ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/peftrs/$(CHECKOUT)

CACHE := .cache
UV := $(CACHE)/tools/bin/uv
PIP := $(CACHE)/tools/bin/python -m pip
IN_VENV := .venv/bin/python -P -m
IN_INSTALLED := $(INSTALLED)/bin/python -P
OLDEST := $(INSTALLED)-oldest
REPORTS := $(CACHE)/reports
SOURCES = $(shell find rust python -name '*.rs' -o -name '*.py' -o -name '*.pyi' -o -name 'py.typed' -o -name 'Cargo.toml')
VADER := $(CACHE)/data/vaderSentiment-3.3.2.tar.gz

# Tests start many interpreters, each of which would compile the libraries anew.
unexport PYTHONDONTWRITEBYTECODE
export UV_PYTHON_DOWNLOADS := never
export UV_NO_PROGRESS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export CARGO_TERM_COLOR ?= auto

.PHONY: help demo smollm2 test test-all test-oldest test-gpu lint format develop clean test-rust test-python

help: ## Lists the commands
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 16

demo: $(INSTALLED)/.installed $(VADER) ## Fine-tunes a real model on real text, saves, reloads and merges the adapter
	$(INSTALLED)/bin/python examples/demo.py --data $(VADER) --output $(CACHE)/demo

smollm2: $(INSTALLED)/.installed ## Teaches SmolLM2-135M-Instruct a text, saves, reloads and merges the adapter
	$(INSTALLED)/bin/python examples/smollm2_instruct.py --output $(CACHE)/smollm2

test: lint test-rust test-python ## Runs every check and test of both languages
	@$(CACHE)/tools/bin/python .ci/summary.py $(REPORTS)

test-all: export PYTEST_ADDOPTS = -m "long or not long"
test-all: lint test-rust test-python ## Runs `make test` with the long tiers, then the benches in quick mode
	cargo test --locked --package peftrs-cli -- --ignored
	$(INSTALLED)/bin/python benches/run.py --quick --rows rows weighted
	$(INSTALLED)/bin/python benches/merge_memory.py --quick
	$(INSTALLED)/bin/python benches/merge_disk.py --quick
	$(INSTALLED)/bin/python benches/host.py --quick
	@$(CACHE)/tools/bin/python .ci/summary.py $(REPORTS)

test-oldest: $(OLDEST)/.installed ## Runs the Python tests with the oldest versions supported
	mkdir -p $(REPORTS)
	$(OLDEST)/bin/python -P -m pytest -n $(WORKERS) --junitxml $(REPORTS)/pytest-oldest.xml

test-gpu: $(INSTALLED)/.installed ## Checks and times what needs a GPU, and says so where there is none
	$(INSTALLED)/bin/python benches/gpu.py

lint: .venv/.synced ## Checks formats, lints, types and the extension's stub
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(IN_VENV) mypy
	$(MAKE) --no-print-directory $(INSTALLED)/.installed
	$(IN_INSTALLED) -m mypy.stubtest peftrs._native --mypy-config-file pyproject.toml --allowlist .ci/stubtest-allowlist.txt

format: .venv/.synced ## Formats both languages
	cargo fmt --all
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

develop: .venv/.synced ## Builds the extension in place and links python/ into .venv, for work on peftrs itself
	PATH="$(CURDIR)/$(CACHE)/tools/bin:$$PATH" VIRTUAL_ENV=$(CURDIR)/.venv .venv/bin/maturin develop --uv

clean: ## Removes what the commands above made, but for uv's own cache
	rm -rf .venv $(CACHE) $(INSTALLED) $(OLDEST) target

test-rust:
	mkdir -p $(REPORTS)
	cargo test --locked 2>&1 | tee $(REPORTS)/cargo.txt

test-python: $(INSTALLED)/.installed
	mkdir -p $(REPORTS)
	$(IN_INSTALLED) -m pytest -n $(WORKERS) --junitxml $(REPORTS)/pytest.xml

$(UV):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "peftrs needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(CACHE)/tools
	$(PIP) install --quiet 'uv>=0.9,<1'

.venv/.synced: uv.lock pyproject.toml | $(UV)
	$(UV) sync --frozen --no-install-project --inexact --python $(CACHE)/tools/bin/python
	touch $@

$(CACHE)/wheel/.built: $(SOURCES) pyproject.toml Cargo.toml Cargo.lock README.md LICENSE | .venv/.synced
	rm -rf $(CACHE)/wheel
	.venv/bin/maturin build --release --locked --interpreter .venv/bin/python --out $(CACHE)/wheel
	touch $@

# The wheel in a folder outside the checkout, so that tests cannot import the sources by accident.
$(INSTALLED)/.installed: $(CACHE)/wheel/.built .venv/.synced
	$(UV) venv --quiet --clear --python .venv/bin/python $(INSTALLED)
	$(UV) pip install --quiet --no-deps --python $(INSTALLED)/bin/python $(CACHE)/wheel/*.whl
	.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(INSTALLED)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/locked.pth"
	touch $@

$(OLDEST)/.installed: $(CACHE)/wheel/.built uv.lock
	UV_PROJECT_ENVIRONMENT=$(OLDEST) $(UV) sync --frozen --no-install-project --no-default-groups --group oldest
	$(UV) pip install --quiet --no-deps --reinstall --python $(OLDEST)/bin/python $(CACHE)/wheel/*.whl
	touch $@

# The source distribution carries the review snippets; the wheel does not.
$(VADER): examples/data.txt | $(UV)
	mkdir -p $(@D)
	$(PIP) download --quiet --no-deps --no-binary :all: --require-hashes --dest $(@D) --requirement $<
	touch $@
