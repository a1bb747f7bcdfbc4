# Every target builds the environment it needs in .venv, from a lock file with hashes, and says what it does.
# Needs only make and Python 3.11 or newer (with venv and pip). A second call finds the environment ready.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input

# PYTHON=/path/to/python chooses the interpreter; by default the first of these that is new enough.
PYTHON_CANDIDATES := $(if $(PYTHON),$(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)
PYTHON_FITS := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

# One that was asked for by name, and is not what the environment was made with, means a new environment.
ifneq ($(PYTHON),)
PYTHON_IS := import sys; print(sys.base_prefix, sys.version_info[:3])
ifneq ($(shell { $(PYTHON) -c '$(PYTHON_IS)'; } 2>/dev/null),$(shell { $(PY) -c '$(PYTHON_IS)'; } 2>/dev/null))
NEW_ENVIRONMENT := yes
.PHONY: $(VENV)/.demo-ready $(VENV)/.dev-ready
endif
endif

# `make demo DEMO_ARGS=` keeps the status page up after the report; `make test TEST_ARGS=tests/unit` runs a part, and
# `make test LANES=2` everything in two processes side by side.
DEMO_ARGS ?= --no-wait
BENCH_ARGS ?=
TEST_ARGS ?=
LANES ?= 1
UV ?= uv

.PHONY: help demo test lint bench bench-peers bench-storage bench-growth compiled soak sbom docs picture clean lock

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo-ready ## stream real files through the whole service on an embedded broker, and check the result
	@echo "==> running the demo: embedded broker, sqlite and filesystem tiers in a temporary folder"
	$(PY) -m consumer demo $(DEMO_ARGS)

test: $(VENV)/.dev-ready ## run the whole test suite, on every Kafka broker this machine can start; LANES=2 is quicker
	@echo "==> running the tests"
	$(PY) $(if $(filter-out 1,$(LANES)),tests/side_by_side.py $(LANES),-m pytest) $(TEST_ARGS)

lint: $(VENV)/.dev-ready ## ruff, mypy --strict and the import contracts
	@echo "==> ruff"
	$(PY) -m ruff check .
	@echo "==> mypy --strict"
	$(PY) -m mypy
	@echo "==> import contracts"
	$(VENV)/bin/lint-imports

bench: $(VENV)/.demo-ready ## measure the service against a bare client loop on the same broker
	@echo "==> measuring throughput"
	$(PY) -m consumer bench $(BENCH_ARGS)

bench-peers: $(VENV)/.dev-ready ## compare with other Kafka consumers, given the folder of their drivers: PEERS=...
	@test -n "$(PEERS)" || { echo "hint: make bench-peers PEERS=/folder/of/the/peers" >&2; exit 2; }
	@echo "==> comparing with the peers"
	PYTHONPATH=tests $(PY) tests/peers/bench.py --source $(PEERS) $(BENCH_ARGS)

bench-storage: $(VENV)/.dev-ready ## what storage takes, beside a bare loop over the same client: BENCH_ARGS=sqlite, bigtable or gcs
	@echo "==> measuring storage"
	PYTHONPATH=tests $(PY) tests/storage_bench.py $(BENCH_ARGS)

bench-growth: $(VENV)/.dev-ready ## how cost grows with partitions, window, payload, distance, poison, processes; latency at half load
	@echo "==> measuring growth"
	PYTHONPATH=tests $(PY) tests/growth_bench.py $(BENCH_ARGS)

compiled: $(VENV)/.dev-ready ## build a wheel in dist/ for this machine that decodes and encodes compiled (needs a C compiler)
	TIERSTREAM_COMPILE=1 $(PY) -m hatchling build --target wheel --directory dist

soak: $(VENV)/.dev-ready ## faults under load, for long: SOAK_OPERATIONS (10000000), SOAK_REWRITE_KILLS (100), SOAK_KILLS (500), SOAK_STORM_MINUTES, SOAK_MINUTES (20), SOAK_LEADER_MINUTES (5), SOAK_SEED
	@echo "==> soaking: the storage's model, order of keys, kills, a storm of rebalances, everything mixed, leaders that move"
	$(PY) tests/soak.py

sbom: $(VENV)/.dev-ready ## write dist/tierstream.cdx.json: every package of the image with version and hashes (CycloneDX)
	@mkdir -p dist
	PYTHONWARNINGS=ignore $(VENV)/bin/cyclonedx-py requirements --pyproject pyproject.toml --mc-type application --output-reproducible \
		--of JSON --output-file dist/tierstream.cdx.json requirements-cloud.lock

picture: $(VENV)/.dev-ready ## take the pictures of status page and dashboard from a real run (needs chromium and prometheus)
	PYTHONPATH=tests $(PY) tests/picture.py

docs: $(VENV)/.dev-ready ## write the documents that are made from the code: reference pages, the chart's tables, the dashboard
	@echo "==> writing documents"
	PYTHONPATH=.:tests $(PY) tests/documents.py

clean: ## remove the environment, caches and build products
	rm -rf $(VENV) .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist
	find consumer tests -type d -name __pycache__ -prune -exec rm -rf {} +

# Run by hand after a change of dependencies; needs uv. No index address may enter the files (a test checks).
LOCK := env -u PIP_FIND_LINKS -u UV_FIND_LINKS $(UV) pip compile pyproject.toml --quiet --universal --python-version 3.11 \
	--generate-hashes --no-header --no-annotate
lock: ## resolve the dependencies again into requirements*.lock (needs uv)
	$(LOCK) --group build --extra demo --extra cloud --extra tracing --extra sentry --group lint --group test --output-file requirements-dev.lock
	$(LOCK) --group build --extra demo --constraint requirements-dev.lock --output-file requirements-demo.lock
	$(LOCK) --extra cloud --extra tracing --extra sentry --constraint requirements-dev.lock --output-file requirements-cloud.lock
	$(LOCK) --constraint requirements-dev.lock --output-file requirements.lock
	env -u PIP_FIND_LINKS -u UV_FIND_LINKS $(UV) pip compile --group build --quiet --universal --python-version 3.11 \
		--generate-hashes --no-header --no-annotate --constraint requirements-dev.lock --output-file requirements-build.lock

$(VENV)/.demo-ready: requirements-demo.lock pyproject.toml
	@$(call build_environment,requirements-demo.lock)
	@touch $@

# The dev lock holds everything the demo lock does, in the same versions (a test checks).
$(VENV)/.dev-ready: requirements-dev.lock pyproject.toml
	@$(call build_environment,requirements-dev.lock)
	@touch $@ $(VENV)/.demo-ready

define build_environment
set -e; \
if [ -n "$(NEW_ENVIRONMENT)" ] || ! $(PY) -c '$(PYTHON_FITS)' >/dev/null 2>&1; then \
	chosen=; \
	for candidate in $(PYTHON_CANDIDATES); do \
		if $$candidate -c '$(PYTHON_FITS)' >/dev/null 2>&1; then chosen=$$candidate; break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
		echo "tierstream needs Python 3.11 or newer with venv and pip; none of these fits: $(PYTHON_CANDIDATES)" >&2; \
		echo "hint: make PYTHON=/path/to/python3 ... ; on Debian and Ubuntu also: apt install python3-venv" >&2; \
		exit 1; \
	fi; \
	echo "==> creating $(VENV) with $$chosen ($$($$chosen -c 'import platform; print(platform.python_version())'))"; \
	$$chosen -m venv --clear $(VENV); \
fi; \
echo "==> installing the pinned packages of $(1) into $(VENV)"; \
$(PIP) install --quiet --require-hashes --requirement $(1); \
$(PIP) install --quiet --no-deps --no-build-isolation --no-index --editable .
endef
