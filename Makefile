# Every command there is. `make` alone explains them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := .stamps

.DEFAULT_GOAL := help
.PHONY: help setup run test test-faults simulate-queue bench check fix clean

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMPS)/venv: requirements.lock pyproject.toml
	@mkdir -p $(STAMPS)
	@test -x $(BIN)/python || { echo "Making the virtual environment ..."; $(PYTHON) -m venv $(VENV); }
	@echo "Installing the locked dependencies (the first time this takes some minutes) ..."
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -r requirements.lock
	@$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

$(STAMPS)/browser: $(STAMPS)/venv package-lock.json
	@echo "Fetching the browser files ..."
	@$(BIN)/python -m app.web.assets
	@touch $@

setup: $(STAMPS)/venv $(STAMPS)/browser

run: setup ## Start the studio: sets up whatever is missing, prints the link to open
	@exec $(BIN)/studio up

test: setup ## Run every test (T=path for some of them)
	@$(BIN)/python -m pytest $(T)

test-faults: setup ## Kill, fill, lock and stop everything, over and over (an hour; FAULTS_SEED repeats one)
	@$(BIN)/python -m pytest -m faults $(T)

simulate-queue: $(STAMPS)/venv ## 200 workers and 20,000 runs on PostgreSQL: what the queue bears
	@$(BIN)/python -m benchmarks.queue_simulation

# The peers get an environment of their own: the studio's holds nothing of theirs.
$(STAMPS)/bench: requirements.lock pyproject.toml
	@mkdir -p $(STAMPS)
	@test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@echo "Installing the peers and the locked dependencies (the first time this takes some minutes) ..."
	@.venv-bench/bin/python -m pip install --disable-pip-version-check -q -r requirements.lock
	@.venv-bench/bin/python -m pip install --disable-pip-version-check -q --no-build-isolation \
	  -c requirements.lock -e '.[bench]'
	@touch $@

bench: $(STAMPS)/bench ## Compare with TRL + PEFT: speed, memory, losses (90 minutes; CASE=banking77/lora for one)
	@HF_HUB_OFFLINE=1 .venv-bench/bin/python -m benchmarks.bench $(CASE)

check: $(STAMPS)/venv ## Check format, style and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

fix: $(STAMPS)/venv ## Format, and mend what can be mended by itself
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## Remove what set-up made (your data stays)
	rm -rf $(VENV) $(STAMPS) node_modules static/vendor build *.egg-info
