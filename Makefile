# Short names for the commands in README.md. `make` alone lists them.

VENV ?= .venv
PYTHON ?= python3
DATASET ?=
INPUT ?=
CONFIG ?= $(if $(DATASET),config/train_text.py,config/train_shakespeare_char.py)
ARGS ?=
NGPUS ?=
# The overlays of a recipe without a GPU, and with one. Loaded weights have sizes of their own.
LINES = calculator reverser wordcalc
ifneq ($(filter $(LINES:%=train_%.py),$(notdir $(CONFIG))),)
OVERLAY ?= config/cpu_lines.py config/modern.py
GPU_OVERLAY ?= config/modern.py
else ifeq ($(notdir $(CONFIG)),train_shakespeare_char.py)
OVERLAY ?= config/cpu.py config/modern.py config/beyond.py
GPU_OVERLAY ?= config/modern.py config/short.py
else ifeq ($(filter finetune_% eval_%,$(notdir $(CONFIG))),)
OVERLAY ?= config/cpu.py
endif

PY = $(VENV)/bin/python
# At most four processes at a time: each imports torch.
PYTEST = $(PY) -m pytest -q --numprocesses=auto --maxprocesses=4 --dist=worksteal
# GPUs of NVIDIA and AMD. A Mac takes the small size and trains it on its CPU.
GPUS = import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)
OF_DATASET = $(if $(DATASET),'--dataset=$(DATASET)' '--out_dir=out-$(DATASET)')
# The dataset that a recipe names. If the recipe has an error, train.py reports it.
NAMED = import runpy, sys; print(runpy.run_path(sys.argv[1]).get("dataset", "openwebtext"))
# config/train_NAME.py, or config/train_NAME_char.py where only that exists; - stands for _
NAME = $(subst -,_,$*)
RECIPES = $(wildcard config/train_$(NAME).py config/train_$(NAME)_char.py)
RECIPE = $(firstword $(RECIPES) config/train_$(NAME).py)
SMALL_DATASETS = shakespeare_char shakespeare $(LINES)

.PHONY: help install lint test test-all train clean generate-all
.DEFAULT_GOAL = help

help:
	@echo 'make train-shakespeare      install, prepare, train and sample: 2 minutes without a GPU'
	@echo 'make install                make $(VENV) with the tested versions of the packages'
	@echo 'make lint                   check the code with ruff'
	@echo 'make test                   the tests, without the slow ones'
	@echo 'make test-all               all tests'
	@echo 'make generate-DATASET       run data/DATASET/prepare.py; DATASET is one of'
	@echo '                           $(patsubst data/%/prepare.py, %,$(wildcard data/*/prepare.py))'
	@echo 'make generate-all           prepare the small datasets: $(SMALL_DATASETS)'
	@echo 'make train-RECIPE           train config/train_RECIPE.py; RECIPE is one of'
	@echo '                           $(patsubst config/train_%.py, %,$(wildcard config/train_*.py))'
	@echo 'make sample-RECIPE          sample from the model that it trained'
	@echo 'make eval-RECIPE            score that model: loss, perplexity, exact match'
	@echo 'make train CONFIG=config/train_gpt2.py NGPUS=8 ARGS="--max_iters=10"'
	@echo '                            train any recipe; NGPUS is the number of GPUs, by default all'
	@echo 'make train DATASET=notes INPUT=notes.txt'
	@echo '                            train on your own text; without INPUT, on a prepared dataset'
	@echo 'make clean                  remove $(VENV) and caches; data and runs (out-*) stay'

# Installs again only after one of the two files has changed.
install:
	@cat pyproject.toml constraints.txt | cmp -s - $(VENV)/installed.txt || { set -e; \
	$(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null || \
	  $(PYTHON) -m venv --clear $(VENV); \
	echo 'installing into $(VENV) ...'; \
	$(PY) -m pip install --disable-pip-version-check -e '.[test]' -c constraints.txt; \
	cat pyproject.toml constraints.txt > $(VENV)/installed.txt; }

lint: install
	$(PY) -m ruff check
	$(PY) -m ruff format --check

test: install
	$(PYTEST) -m 'not slow' $(ARGS)

test-all: install
	$(PYTEST) $(ARGS)

generate-all: $(addprefix generate-,$(SMALL_DATASETS))

generate-shakespeare: generate-shakespeare_char # in GPT-2's BPE, and in characters

generate-%: install
	$(PY) data/$(NAME)/prepare.py

# Without a GPU: with the overlay. With one: plain python. With several: torchrun.
train: install
	@test -f '$(CONFIG)' || { echo 'error: no recipe $(CONFIG); make lists them' >&2; exit 2; }
	@test -z '$(INPUT)' || $(PY) data/text/prepare.py --input='$(INPUT)' --dataset='$(DATASET)'
	@dataset='$(or $(DATASET),$(patsubst --dataset=%,%,$(filter --dataset=%,$(ARGS))))'; \
	test -n "$$dataset" || dataset=$$($(PY) -c '$(NAMED)' '$(CONFIG)' 2> /dev/null); \
	data="data/$$dataset"; \
	if test -f "$$data/prepare.py" && ! test -f "$$data/train.bin" -a -f "$$data/val.bin"; then \
	  $(PY) "$$data/prepare.py"; fi
	@set -e; gpus=$$($(PY) -c '$(GPUS)'); n=$(or $(NGPUS),$$gpus); \
	overlay='$(OVERLAY)'; test $$gpus -eq 0 || overlay='$(GPU_OVERLAY)'; \
	launch='$(PY)'; \
	test $$n -le 1 || launch="$(VENV)/bin/torchrun --standalone --nproc_per_node=$$n"; \
	set -x; $$launch train.py '$(CONFIG)' $$overlay $(OF_DATASET) $(ARGS)

train-%:
	@test -f '$(RECIPE)' || { echo 'error: no recipe $(RECIPE); make lists them' >&2; exit 2; }
	@$(MAKE) --no-print-directory train CONFIG=$(RECIPE)

sample-%: install
	$(PY) sample.py $(firstword $(wildcard config/sample_$(NAME).py) $(RECIPE)) $(ARGS)

eval-%: install
	$(PY) eval.py $(RECIPE) $(ARGS)

train-shakespeare:
	@$(MAKE) --no-print-directory train CONFIG=config/train_shakespeare_char.py
	@$(MAKE) --no-print-directory sample-shakespeare ARGS=

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
