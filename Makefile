# Two commands on a fresh machine: `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
READY_SERVE := $(VENV)/.ready-serve
READY_PLAYGROUND := $(VENV)/.ready-playground
PEERS := .venv-peers
READY_PEERS := $(PEERS)/.ready
INTEROP := .venv-interop
READY_INTEROP := $(INTEROP)/.ready
FAMILIES := .venv-families
READY_FAMILIES := $(FAMILIES)/.ready
LLAMA_VERSION := 11434.0.0
LLAMA_SERVER := $(INTEROP)/llama-server

.PHONY: demo demo-vlm serve playground test test-fast lint bench families interop clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.11 ..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

$(READY): requirements.txt requirements-demo.txt | $(BIN)/python
	$(BIN)/pip install -r requirements.txt
	$(BIN)/pip install --no-deps -r requirements-demo.txt
	@touch $@

$(READY_DEV): requirements-dev.txt $(READY)
	$(BIN)/pip install -r requirements-dev.txt
	@touch $@

$(READY_SERVE): requirements-serve.txt $(READY)
	$(BIN)/pip install -r requirements-serve.txt
	@touch $@

$(READY_PLAYGROUND): requirements-playground.txt $(READY)
	$(BIN)/pip install -r requirements-playground.txt
	@touch $@

$(READY_PEERS): benchmarks/requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install torch==2.13.0
	$(PEERS)/bin/pip install -r $<
	$(PEERS)/bin/pip install --no-deps steering-vectors==0.12.2
	@touch $@

$(READY_INTEROP): benchmarks/requirements-interop.txt requirements.txt requirements-harness.txt requirements-demo.txt
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install -r benchmarks/requirements-interop.txt
	$(INTEROP)/bin/pip install --no-deps -r requirements-demo.txt steering-vectors==0.12.2 repeng==0.4.0
	@touch $@

$(READY_FAMILIES): benchmarks/requirements-families.txt requirements.txt requirements-dev.txt requirements-demo.txt
	$(PYTHON) -m venv $(FAMILIES)
	$(FAMILIES)/bin/pip install -r $<
	$(FAMILIES)/bin/pip install --no-deps -r requirements-demo.txt
	@touch $@

$(LLAMA_SERVER): benchmarks/llama_server.sh | $(READY_INTEROP)
	bash $< $(INTEROP) $(LLAMA_VERSION) $@

## The three text stages on SmolLM2-135M-Instruct and the embedded questions.
demo: $(READY)
	cd src && PYTHON=../$(BIN)/python bash scripts/llm/demo.sh

## The three vision-language stages on the embedded small model and drawn scenes.
demo-vlm: $(READY)
	cd src && PYTHON=../$(BIN)/python bash scripts/vlm/demo.sh

## The embedded model behind OpenAI's interface on 127.0.0.1:8000, base and steered.
serve: $(READY_SERVE)
	cd src && ../$(BIN)/python serve.py --fit gradient caa

## A page on 127.0.0.1:7860 with the embedded models: attribution and steering to try.
playground: $(READY_PLAYGROUND)
	cd src && ../$(BIN)/python playground.py

## Lint and all tests.
test: lint
	$(BIN)/python -m pytest

## The tests that one runs at every save: without those that start scripts or train.
test-fast: $(READY_DEV)
	$(BIN)/python -m pytest -m "not slow"

## Tiny models of many families against their own forwards; writes docs/families.md.
families: $(READY_FAMILIES)
	$(FAMILIES)/bin/python benchmarks/families.py

## Exports in the real programs, lm-eval's tasks, the notebook; writes docs/interop.md.
interop: $(READY_INTEROP) $(READY_PEERS) $(LLAMA_SERVER)
	PYTHONPATH=src $(INTEROP)/bin/python benchmarks/interop.py --python $(INTEROP)/bin/python \
		--peers $(PEERS)/bin/python --server $(LLAMA_SERVER) --llama_version $(LLAMA_VERSION)
	$(INTEROP)/bin/python -m pytest tests_interop

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## Every stage against plain code, peers and the machine's limit; writes benchmarks/RESULTS.md.
## BASELINE=FOLDER: also against that checkout of an earlier commit.
bench: $(READY_DEV) $(READY_PEERS)
	$(BIN)/python benchmarks/bench.py --peers $(PEERS)/bin/python $(if $(BASELINE),--baseline $(BASELINE))

## Remove all results; the READMEs that say what belongs there stay.
clean:
	find src/results src/data/llm src/data/vlm -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
