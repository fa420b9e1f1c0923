# `make` prints the targets. Set-up is part of them: nothing to do before `make run` or `make test`.
VENV ?= .venv
JOBS ?= 2
ARGS ?=
# 1: all cases of each grid of faults instead of a sample.
FULL ?=
SEED ?=

# The first Python from 3.11 to 3.13; `make PYTHON=/path/to/python run` chooses another.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
endif
BIN := $(VENV)/bin

# Stamps carry a hash of the lock and of this folder, so that a change of either sets up again.
stamp = $(VENV)/.$(1)-$(shell $(PYTHON) -c "import hashlib, os; print(hashlib.sha256(open('requirements/$(1).txt', 'rb').read() + open('pyproject.toml', 'rb').read() + os.getcwd().encode()).hexdigest()[:12])" 2>/dev/null)
RUN := $(call stamp,run)
DEV := $(call stamp,dev)
BENCH := $(call stamp,bench)

.DEFAULT_GOAL := help
.PHONY: help run test lint bench fault slow images containers e2e kubeconfig docs golden lock clean setup

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(RUN) ## raw data in, a promoted model out, with a report; ARGS="train.epochs=12" sets parameters
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/millrace run $(ARGS)

test: $(DEV) ## the tests that need no images and no cluster, in some 10 minutes on 2 cores; ARGS="-k name" chooses
	@$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not container and not cluster" $(ARGS)

lint: $(DEV) ## format, lint, types, and that generated files are up to date
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/python -m pipelines.dvcfile --check
	@$(BIN)/python -m pipelines.docs --check
	@$(BIN)/python -m pipelines.golden --check
	@$(BIN)/python -m pipelines.manifests --check

# A benchmark ends with 2 where the machine lacks what it measures.
bench: $(BENCH) ## the numbers of the README and docs, each beside its peer; ONLY="goodput" chooses
	@set -e; for file in benchmarks/$(or $(ONLY),*).py; do echo "== $$file"; PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python $$file || test $$? = 2; done

fault: $(DEV) ## the long fault tests (the short ones are part of test): a sample of each grid, all with FULL=1; SEED=... repeats
	@FULL=$(FULL) SEED=$(SEED) $(BIN)/python -m pytest -n $(JOBS) -m "fault and slow" $(ARGS)

slow: $(DEV) ## the slow tests: whole presets, the network unplugged
	@$(BIN)/python -m pytest -m "slow and not fault and not container and not cluster" $(ARGS)

# docker if its daemon answers, else podman. The names are as Docker and Kubernetes mean `millrace/data:VERSION`.
CONTAINER ?= $(shell docker info >/dev/null 2>&1 && echo docker || echo podman)
BUILD ?= $(CONTAINER) build
BASE ?= python:3.11-slim
REGISTRY ?= docker.io/millrace
IMAGES ?= data trainer launcher
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' trainer/__init__.py)

images: ## build the images; IMAGES="data", BASE=..., REGISTRY=... and BUILD="podman build ..." choose
	@set -e; for name in $(IMAGES); do echo "== $(REGISTRY)/$$name:$(VERSION)"; \
	$(BUILD) -t $(REGISTRY)/$$name:$(VERSION) -f images/$$name.Dockerfile --build-arg BASE=$(BASE) \
	--build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) \
	--build-arg CREATED=$$(TZ=UTC git log -1 --format=%cd --date=format-local:%Y-%m-%dT%H:%M:%SZ 2>/dev/null) \
	--build-arg SOURCE=$$(git config remote.origin.url | sed -nE 's|^https?://([^/@]*@)?|https://|p') .; done

containers: $(DEV) images ## the tests that run in the images, over docker or the socket that DOCKER_HOST names
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -m container $(ARGS)

# How an image gets into the cluster: words that the image's name is added to, such as `docker push`. Empty: it is there.
E2E_LOAD ?=

e2e: kubeconfig $(DEV) images ## the tests on the cluster of KUBECONFIG; E2E_LOAD="kind load docker-image" hands it the images
	@set -e; $(if $(E2E_LOAD),for name in $(IMAGES); do $(E2E_LOAD) $(REGISTRY)/$$name:$(VERSION); done)
	@PATH="$(abspath $(BIN)):$$PATH" E2E_IMAGES=$(REGISTRY) $(BIN)/python -m pytest -m cluster $(ARGS)

kubeconfig:
	@test -n "$(KUBECONFIG)" || { echo "error: KUBECONFIG is not set" >&2; \
	echo "  fix: name the configuration of a cluster for tests: KUBECONFIG=~/.kube/config make e2e" >&2; exit 2; }

docs: $(DEV) ## regenerate dvc.yaml and the generated pages of docs/
	@$(BIN)/python -m pipelines.dvcfile
	@$(BIN)/python -m pipelines.docs

golden: $(DEV) ## regenerate tests/golden, and the rights and samples of manifests/
	@$(BIN)/python -m pipelines.golden
	@$(BIN)/python -m pipelines.manifests

lock: ## resolve requirements/*.txt again (needs uv)
	@uv pip compile $(LOCK) pyproject.toml --extra laptop -o requirements/run.txt
	@uv pip compile $(LOCK) pyproject.toml --extra laptop --extra track --group dev -c requirements/run.txt -o requirements/dev.txt
	@uv pip compile $(LOCK) pyproject.toml --extra laptop --extra track --group dev --group bench -c requirements/dev.txt -o requirements/bench.txt
	@uv pip compile $(LOCK) pyproject.toml --extra data --extra dvc --extra s3 $(HUB) -c requirements/run.txt -o requirements/data.txt
	@uv pip compile $(LOCK) pyproject.toml --extra train --extra tune --extra compress --extra evaluate --extra s3 $(HUB) $(SQL) -c requirements/run.txt -o requirements/trainer.txt
	@uv pip compile $(LOCK) pyproject.toml --extra launcher --extra s3 --no-emit-package numpy -c requirements/run.txt -o requirements/launcher.txt

# Requirements of packages in the images that nothing there imports: tokenizers' downloads, and Optuna's databases.
HUB := $(addprefix --no-emit-package=,huggingface-hub hf-xet httpx2 httpcore2 httpx2-jsfetch truststore)
SQL := $(addprefix --no-emit-package=,sqlalchemy alembic mako)
LOCK := --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --custom-compile-command "make lock"

clean: ## remove what the pipeline made; the registry and the environment stay
	@rm -rf out data/raw dvc_plots .dvc/tmp .dvc/cache build *.egg-info .mypy_cache .ruff_cache .pytest_cache

setup: $(DEV) ## only set up the environment

# $(1): the lock to install.
define install
	@$(if $(PYTHON),,echo "error: Python 3.11, 3.12 or 3.13 is needed" >&2; \
	echo "  fix: install one, or name it: make PYTHON=/path/to/python3.12 run" >&2; exit 2)
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); } || { rm -rf $(VENV); \
	echo "error: $(PYTHON) cannot make a virtual environment" >&2; \
	echo "  fix: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 2; }
	@rm -f $(VENV)/.run-* $(VENV)/.dev-* $(VENV)/.bench-*  # of another clone, or of another lock
	@echo "installing requirements/$(1).txt into $(VENV) (once; minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/$(1).txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
endef

$(RUN):
	$(call install,run)
	@touch $@

# What tests and benchmarks need holds what a run needs.
$(DEV):
	$(call install,dev)
	@touch $@ $(RUN)

$(BENCH):
	$(call install,bench)
	@touch $@ $(DEV) $(RUN)
