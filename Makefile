# Every target sets up what it needs: it makes .venv where there is none, and installs again only when the content of
# pyproject.toml or constraints.txt has changed. `make PYTHON=python3.12 test` picks the interpreter of a new .venv.

PYTHON ?= python3
VENV ?= .venv
bin := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
run := $(VENV)/$(bin)/python
run_min := .venv-min/$(bin)/python
fingerprint = $(shell cat $(1) | cksum | cut -d ' ' -f 1)
ready := $(VENV)/installed-$(call fingerprint,pyproject.toml constraints.txt)
ready_min := .venv-min/installed-$(call fingerprint,pyproject.toml)
pip := -m pip --disable-pip-version-check install --quiet --prefer-binary

.PHONY: help install quickstart test test-slow test-slurm test-min smoke lint format audit docs bench clean

help: ## List the targets.
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1	\2/p' Makefile | expand -t 18

install: $(ready) ## Make .venv with the package (editable) and everything it can use.

quickstart: $(ready) ## Pretrain a small backbone on real images, evaluate it, draw the report: runs/quickstart/report.html.
	$(run) -m dinov3.run.quickstart

test: $(ready) ## The tests: no network, no accelerator, no weights needed.
	$(run) -m pytest

test-slow: $(ready) ## The tests that take minutes each.
	$(run) -m pytest -m slow

test-slurm: $(ready) ## Jobs on a real SLURM on this machine (Debian: slurmctld slurmd slurm-client munge).
	$(run) -m pytest --run-slow tests/run/test_slurm.py

test-min: $(ready_min) ## The tests with the lowest versions that pyproject.toml allows, in .venv-min.
	$(run_min) -m pytest

smoke: $(ready) ## Imports, torch.hub and one training step: what CI runs on macOS and Windows.
	$(run) -m pytest tests/test_architecture.py tests/test_smoke.py

lint: $(ready) ## Style, imports and types.
	$(run) -m ruff check .
	$(run) -m ruff format --check .
	$(run) -m mypy

format: $(ready) ## Sort imports, mend what can be mended, format.
	$(run) -m ruff check --fix .
	$(run) -m ruff format .

audit: $(ready) ## Known weaknesses of the installed packages (pip-audit; asks a server, so not part of CI).
	$(run) -m pip --disable-pip-version-check install --quiet pip-audit \
	|| { echo "pip-audit can't be installed here: nothing was audited"; exit 1; }
	$(run) -m pip_audit --skip-editable \
	|| { echo "Weaknesses were found, or the list of them could not be reached: see above"; exit 1; }

docs: $(ready) ## The documentation site, in site/.
	NO_MKDOCS_2_WARNING=1 $(run) -m mkdocs build

bench: $(ready) ## Speed and memory beside the alternatives, all of it (hours): benchmarks/RESULTS.md.
	$(run) -m benchmarks all

clean: ## Remove the virtual environments and every cache.
	rm -rf .venv .venv-min site .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info

$(ready): | $(VENV)/pyvenv.cfg
	@echo "Installing into $(VENV), once: minutes, and 6 GB on Linux"
	$(run) $(pip) -e '.[all]' -c constraints.txt
	rm -f $(VENV)/installed-*
	touch $@

# Lower bounds: every `"name>=version"` of pyproject.toml, read as `name==version`.
$(ready_min): | .venv-min/pyvenv.cfg
	sed -nE 's/^ *"([A-Za-z0-9_-]+)>=([^",]+)",?.*/\1==\2/p' pyproject.toml | sort -u > .venv-min/lowest.txt
	$(run_min) $(pip) -e '.[all]' -c .venv-min/lowest.txt
	rm -f .venv-min/installed-*
	touch $@

%/pyvenv.cfg:
	$(PYTHON) -m venv $*
