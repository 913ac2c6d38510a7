# `make help` lists the targets. The virtual environments are made on first use and brought up to
# date when the requirements change; PYTHON=... chooses the interpreter (3.11 or newer).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

# The first of these that runs and is new enough: pyenv's shims exist without running.
is_new = -c 'import sys; sys.exit(sys.version_info < (3, $(1)))' 2>/dev/null
first_python = $(shell for p in $(2); do $$p $(call is_new,$(1)) && { echo $$p; break; }; done)
PYTHON ?= $(call first_python,11,python3 python3.11 python3.12 python3.13)
PYTHON_LATEST ?= $(call first_python,12,python3.13 python3.12 python3 \
    $(wildcard $(HOME)/.pyenv/versions/3.13*/bin/python) \
    $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python))

VENV ?= .venv
VENV_LATEST ?= .venv-latest
VENV_HF ?= .venv-hf
# The tests also hold for 5.24.0; name another VENV_HF with it.
TRANSFORMERS ?= 5.23.0
VENV_TPU ?= .venv-tpu
REQUIREMENTS := requirements.txt pyproject.toml constraints-py311.txt constraints-latest.txt
comma := ,
# Two workers: a test is mostly compilation, which one core does.
WORKERS := --numprocesses 2 --dist loadfile
FAST := -m "not slow and not more and not hf and not prove_tpu" --ignore=tests/hf $(WORKERS)
ALL := -m "not hf and not prove_tpu" --ignore=tests/hf $(WORKERS)

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

.PHONY: train
train: $(VENV)/.installed  ## pre-train the tiny model on a CPU (five to eight minutes on two cores)
	@echo "make: pre-training a tiny Super on the Python library's source: five to eight minutes on two cores"
	$(VENV)/bin/python train.py --config=configs/pretrain_tiny.py --workdir=runs/tiny
	@echo "make: next, make report says how good it is; make sft, then make chat, gives a model to talk to;"
	@echo "make: docs/tutorials/first_run.md goes on from here"

.PHONY: sft
sft: $(VENV)/.installed  ## fine-tune a small model to use a calculator, in runs/sft
	$(VENV)/bin/python train.py --config=configs/sft_tiny.py --workdir=runs/sft

.PHONY: grpo
grpo: $(VENV)/.installed  ## let rewards teach a small model that often guesses, in runs/grpo
	$(VENV)/bin/python train.py --config=configs/grpo_tiny.py --workdir=runs/grpo

# RUN=DIR names another run's or a hub model's directory; CHAT=... gives more flags.
.PHONY: chat
chat: $(VENV)/.installed  ## talk to a model: RUN=runs/sft CHAT=--no_thinking by default
	$(VENV)/bin/python -m nemotron_jax.chat --checkpoint=$(or $(RUN),runs/sft) $(or $(CHAT),--no_thinking)

# RUN=DIR names another run's or a hub model's directory; SERVE=... gives more flags.
.PHONY: serve
serve: $(VENV)/.installed  ## serve RUN=runs/sft to OpenAI clients on http://127.0.0.1:8000
	$(VENV)/bin/python -m nemotron_jax.serve --checkpoint=$(or $(RUN),runs/sft) $(SERVE)

.PHONY: report
report: $(VENV)/.installed  ## evaluate RUN=runs/tiny into build/report/report.html
	$(VENV)/bin/python eval.py --checkpoint=$(or $(RUN),runs/tiny) --suites=perplexity --output=build/report

.PHONY: speedrun
speedrun: $(VENV)/.installed  ## every stage of a small model, up to a served answer; one report in build/speedrun
	$(VENV)/bin/python -m experiments.speedrun $(SPEEDRUN)

.PHONY: notebook
notebook: $(VENV)/.installed  ## open examples/ in JupyterLab, which it installs
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[notebooks]'
	$(VENV)/bin/jupyter lab --notebook-dir=examples

.PHONY: docs
docs: $(VENV)/.installed  ## build docs/ as pages in build/site, with mkdocs, which it installs
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(VENV)/bin/python -m mkdocs build --strict --quiet

.PHONY: wheel
wheel: $(VENV)/.installed  ## build dist/nemotron_jax-….whl, which brings nemotron-jax and configs/
	$(VENV)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

.PHONY: test
test: $(VENV)/.installed  ## run every fast test
	@$(VENV)/bin/python -m pytest $(FAST)

.PHONY: test-more
test-more: $(VENV)/.installed  ## run the crossings that `test` only samples (fifteen minutes on two cores)
	@$(VENV)/bin/python -m pytest -m "more and not slow" --ignore=tests/hf $(WORKERS)

.PHONY: test-all
test-all: $(VENV)/.installed  ## run the slow tests too
	@$(VENV)/bin/python -m pytest $(ALL)

.PHONY: test-hf
test-hf: $(VENV_HF)/.installed  ## compare with Hugging Face transformers and PEFT, in an environment of its own
	@$(VENV_HF)/bin/python -m pytest tests/hf -m hf

.PHONY: test-latest
test-latest: $(VENV_LATEST)/.installed  ## run the fast tests on Python >= 3.12 with the newest jax
	@$(VENV_LATEST)/bin/python -m pytest $(FAST)

.PHONY: prove
prove: $(VENV_TPU)/.installed  ## compile every TPU kernel for v5p, v5e, v6e and tpu7x; no TPU is needed
	@$(VENV_TPU)/bin/python -m pallas_kernels.prove --target=v5p,v5e,v6e,tpu7x $(PROVE)

.PHONY: prove-v5p
prove-v5p: $(VENV_TPU)/.installed  ## the same as a test, for v5p alone (within 14 minutes on two cores)
	@JAX_ENABLE_COMPILATION_CACHE=0 $(VENV_TPU)/bin/python -m pytest -m prove_tpu --numprocesses 2 \
	    tests/pallas_kernels/test_prove.py tests/test_plan.py tests/test_plan_decode.py \
	    tests/model/test_kernels.py \
	    tests/planning/test_compiled_experts.py

.PHONY: sandbox
sandbox: $(VENV)/.installed  ## say which sandbox runs model-written code here, and what would better it
	@$(VENV)/bin/python -m nemotron_jax.environments.sandbox

.PHONY: bench
bench: $(VENV)/.installed  ## speed and memory on this CPU, beside transformers where .venv-hf is made
	@$(VENV)/bin/python -m tests.benchmarks.compare --peer-python=$(VENV_HF)/bin/python $(BENCH)

.PHONY: lint
lint: $(VENV)/.installed  ## check style and formatting
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

.PHONY: clean
clean:  ## remove environments and caches; runs/ is kept
	rm -rf $(VENV) $(VENV_LATEST) $(VENV_HF) $(VENV_TPU) build .jax_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,environment,interpreter,packages): jax and flax pair up by Python version, so the
# constraints do too.
define install
	@if [ -z "$(2)" ] || ! $(2) $(call is_new,11); then \
	    echo "make: Python 3.11 or newer is needed and none was found; set PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	fi
	@echo "make: installing into $(1) with $$($(2) --version)" >&2
	@$(2) -m venv $(1)
	@constraints=constraints-py311.txt; \
	if $(1)/bin/python $(call is_new,12); then constraints=constraints-latest.txt; fi; \
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(3) --constraint $$constraints
	@touch $(1)/.installed
endef

$(VENV)/.installed: $(REQUIREMENTS)
	$(call install,$(VENV),$(PYTHON),--editable '.[dev]')

# Apart from the others: where libtpu is installed, jax looks for a TPU at every start.
$(VENV_TPU)/.installed: $(REQUIREMENTS)
	$(call install,$(VENV_TPU),$(PYTHON),--editable '.[dev$(comma)tpu]')

$(VENV_HF)/.installed: $(REQUIREMENTS)
	$(call install,$(VENV_HF),$(PYTHON),--editable '.[dev]' torch==2.13.0 \
	    transformers==$(TRANSFORMERS) peft==0.21.2 'lm-eval[hf]>=0.4.13$(comma)<0.5')

$(VENV_LATEST)/.installed: $(REQUIREMENTS)
	@if [ -z "$(PYTHON_LATEST)" ]; then \
	    echo "make: test-latest needs Python 3.12 or newer; set PYTHON_LATEST=/path/to/python3.13" >&2; \
	    exit 1; \
	fi
	$(call install,$(VENV_LATEST),$(PYTHON_LATEST),--editable '.[dev]')
