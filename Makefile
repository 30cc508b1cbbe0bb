# The everyday commands. `make help` lists them; each is a line or two that you may type yourself.

PYTHON ?= python3
VENV := .venv
RUN_PYTHON := $(VENV)/bin/python
# Not --quiet: pip shows what it downloads and how far it is.
INSTALL := $(RUN_PYTHON) -m pip install --disable-pip-version-check -c constraints.txt

# One's own text: a file, folder, glob or URI. Without one: input.txt if there is one, else the
# embedded corpus, the source text of Python's standard library.
INPUT ?= $(if $(wildcard input.txt),input.txt,stdlib)
# The dataset's name follows from the input: books for books.txt, corpus/ and corpus/*.jsonl.
# make splits words at spaces, so the name has _ for them.
space := $(subst ,, )
one_word = $(subst $(space),_,$(INPUT))
stem = $(subst *,,$(subst ?,,$(firstword $(subst ., ,$(notdir $(1:/=))))))
NAME ?= $(or $(call stem,$(one_word)),$(call stem,$(patsubst %/,%,$(dir $(one_word)))),text)
# A value as one word of the shell, whatever is in it.
quoted = '$(subst ','\'',$1)'

# For the training and evaluation targets; without them the programs find the only dataset there
# is, and the newest run.
DATA ?=
RUN ?=
DEVICE ?= auto
NPROC ?= 4
ARGS ?=
run_word = $(if $(RUN),$(call quoted,$(RUN)))
data_flag = $(if $(DATA),--data $(call quoted,$(DATA)))

# The demo's vocabulary: the size of one trained on its text, or gpt2.
VOCAB ?= 4096
demo := demo$(if $(filter-out 4096,$(VOCAB)),-$(VOCAB))
demo_vocab := $(if $(filter-out gpt2,$(VOCAB)),--vocab-size $(VOCAB))
# Steps are cheap in a small vocabulary: larger batches lower the optimizer's share of the time.
demo_batch := $(if $(filter-out gpt2,$(VOCAB)),--total-batch-size 2048 --micro-batch 16)

.DEFAULT_GOAL := help
.PHONY: help setup doctor data demo train-small train-gpu4 eval sample play report readme export verify-resume test test-all lint

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/core ## create the environment in .venv

$(VENV)/core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: expected Python 3.11 or newer, found $$($(PYTHON) --version): make setup PYTHON=python3.12, say"; exit 2; }
	test -x $(RUN_PYTHON) || $(PYTHON) -m venv $(VENV)
	@echo "packages: torch is most of the download; without a GPU take its CPU build, see README.md, Install"
	$(INSTALL) -e '.[offline,plots]'
	@touch $@
	@echo "ready: make demo, or source $(VENV)/bin/activate and type commands yourself"

$(VENV)/dev: $(VENV)/core
	@echo "packages: what the tests need"
	$(INSTALL) -e '.[offline,plots,dev]'
	@touch $@

$(VENV)/all: $(VENV)/dev
	@echo "packages: Ray, lm-eval and the projects that the benchmarks compare with"
	$(INSTALL) -e '.[offline,plots,dev,ray,lm-eval,bench]'
	@# litdata brings torchvision, made for the index's build of torch. Beside another build it fails to
	@# be imported, and transformers with it; without it both do what is asked of them here.
	@$(RUN_PYTHON) -c 'import torchvision' 2>/dev/null || $(RUN_PYTHON) -m pip uninstall --quiet --yes torchvision
	@touch $@

doctor: $(VENV)/core ## what of this machine works, and what to do about the rest
	@$(RUN_PYTHON) -m mygpt.doctor $(ARGS)

data: $(VENV)/core ## prepare a dataset: INPUT=file|folder|glob|uri, NAME=... (ARGS=... more flags)
	$(RUN_PYTHON) -m prepare $(call quoted,$(INPUT)) --out $(call quoted,data/$(NAME)) $(ARGS)

demo: $(VENV)/core ## text to trained, evaluated model here, in at most ten minutes: VOCAB=4096|gpt2
	$(RUN_PYTHON) -m prepare stdlib --out data/$(demo) $(demo_vocab)
	$(RUN_PYTHON) train.py tiny --data data/$(demo) --log-dir log/$(demo) $(demo_batch)
	$(RUN_PYTHON) eval.py log/$(demo) --loss --prompt class --prompt def --num-samples 1 --temperature 0.9 --top-k 50
	@echo
	@echo "picture     log/$(demo)/loss.png"
	@echo "log         log/$(demo)/log.txt"
	@echo "checkpoint  $$(ls -d log/$(demo)/checkpoints/step_* | tail -n 1)"
	@echo "samples     above; more by: $(RUN_PYTHON) eval.py log/$(demo) --prompt 'import os'"
	@echo "next        make data INPUT=your.txt, then: make train-small DATA=data/your"

train-small: $(VENV)/core ## train GPTConfigSmall: DATA=data/NAME RUN=log/NAME (ARGS=... more flags)
	$(RUN_PYTHON) train.py small $(data_flag) --log-dir $(call quoted,$(or $(RUN),log/small)) --device $(DEVICE) $(ARGS)

train-gpu4: $(VENV)/core ## train GPT-2 124M on four GPUs: NPROC=n, DEVICE=cpu, DATA=, RUN=
	@# Several ranks on a CPU are hardly what was meant, so they are never taken unasked.
	$(RUN_PYTHON) -m mygpt.launch --standalone --nproc_per_node=$(NPROC) train.py gpt2 $(data_flag) \
	  --log-dir $(call quoted,$(or $(RUN),log/gpt2)) --device $(DEVICE:auto=cuda) $(ARGS)

eval: $(VENV)/core ## evaluate and sample from the newest checkpoint: RUN=log/NAME (ARGS=... more flags)
	$(RUN_PYTHON) eval.py $(run_word) $(data_flag) $(ARGS)

sample: $(VENV)/core ## a text from the newest checkpoint, within seconds: RUN=log/NAME PROMPT='Once upon'
	$(RUN_PYTHON) eval.py $(run_word) --no-loss $(if $(PROMPT),--prompt $(call quoted,$(PROMPT))) --num-samples 1 $(ARGS)

play: $(VENV)/core ## a page for the browser where runs continue what is typed: RUN=log/NAME or RUNS='log/a log/b'
	$(RUN_PYTHON) -m mygpt.play $(or $(RUNS),$(run_word)) $(ARGS)

readme: $(VENV)/dev # what the README shows of the demo: its output, curve and report, all of one run
	$(RUN_PYTHON) -m tests.docs.readme

report: $(VENV)/core ## write RUN/report.html, everything about a run on one page: RUN=log/NAME; RUNS='log/a log/b' compares
	$(RUN_PYTHON) -m mygpt.report $(or $(RUNS),$(run_word),$(error give the run: make report RUN=log/NAME)) $(ARGS)

export: $(VENV)/core ## a run's model for Hugging Face's library: RUN=log/NAME OUT=FOLDER
	$(RUN_PYTHON) -m mygpt.hub export $(or $(run_word),$(error give the run: make export RUN=log/NAME)) \
	  $(if $(OUT),$(call quoted,$(OUT)),exported/"$$(basename $(run_word))") $(ARGS)

verify-resume: $(VENV)/core ## does a resumed run equal one never stopped, here? DATA=, PRESET=tiny, STEPS=10
	$(RUN_PYTHON) -m mygpt.doctor.verify_resume $(or $(PRESET),tiny) $(data_flag) --device $(DEVICE) \
	  --steps $(or $(STEPS),10) $(ARGS)

test: $(VENV)/dev ## all tests but the slow ones
	$(RUN_PYTHON) -m pytest -n auto -m 'not slow' $(ARGS)

test-all: $(VENV)/all ## the slow tests too, and those that need Ray, lm-eval or another project
	$(RUN_PYTHON) -m pytest -n auto $(ARGS)

lint: $(VENV)/dev ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
