# Everything a newcomer needs: `make quickstart`, `make test`. Only the installation needs a network.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export HF_HUB_OFFLINE = 1

# Of TABLE=t09-statistics: its sweep file, its folder under results/published, its rows trained anew.
FILE      = $(or $(wildcard experiments/$(TABLE).yaml experiments/laptop/$(TABLE).yaml),$(error TABLE=$(TABLE): no such file in experiments/ or experiments/laptop/; try TABLE=t09-statistics))
PUBLISHED = results/published/$(patsubst experiments/%.yaml,%,$(FILE))
AGAIN     = build/reproduced/$(TABLE)

.DEFAULT_GOAL := help
.PHONY: help venv quickstart publish reproduce test test-all lint format slow chaos docs bench gpu clean

help: ## Show these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## Make the virtual environment .venv and install (again only if the pins changed)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make venv PYTHON=python3.11")'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,dev,docs]'
	touch $@

quickstart: venv ## Run experiments/quickstart.yaml and print its table
	$(BIN)/sweep run experiments/quickstart.yaml
	$(BIN)/sweep table experiments/quickstart.yaml

publish: venv ## Put a finished table into results/published (TABLE=t09-statistics)
	$(BIN)/sweep publish $(FILE) -o $(PUBLISHED) $(if $(REPORT),--report)
	$(BIN)/python experiments/findings.py

reproduce: venv ## Train a published table anew and compare it row by row (TABLE=t09-statistics)
	$(BIN)/sweep run $(FILE) --results $(AGAIN) --no-mirror
	$(BIN)/sweep diff $(PUBLISHED) $(AGAIN) $(FILE) --rows

test: venv lint ## Lint, then the tests, on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: ## The tests on each Python from 3.11 to 3.13 that is installed, an environment each
	@set -e; for v in 3.11 3.12 3.13; do \
	  if answer=$$(python$$v -c "" 2>&1); then $(MAKE) test PYTHON=python$$v VENV=.venv-$$v; \
	  else echo "python$$v: not installed, it says: $$(echo "$$answer" | head -n 1)"; fi; done

lint: venv ## Style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv ## Bring the code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: venv ## The slow tests
	$(BIN)/python -m pytest -m slow

chaos: venv ## Accidents of every kind to a real cluster, as root (SEEDS=10: ten times)
	FPT_SWEEP_CHAOS_SEEDS=$(or $(SEEDS),1) $(BIN)/python -m pytest -m slow tests/chaos/test_chaos.py

docs: venv ## Build the site into site/, strictly: a broken link or reference fails
	$(BIN)/mkdocs build --strict

bench: venv ## Measure what README and CHANGELOG quote
	@set -e; for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

gpu: venv ## Ten minutes of a GPU: whether it trains there as on a CPU, and how fast; writes gpu.json
	$(BIN)/python benchmarks/gpu.py --out gpu.json

clean: ## Remove the environment and all caches (never results/)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
