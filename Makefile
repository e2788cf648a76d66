# Short names for the commands in README.md. `make` alone lists them.

VENV ?= .venv
PYTHON ?= python3
DATASET ?=
INPUT ?=
CONFIG ?= $(if $(DATASET),config/train_text.py,config/train_shakespeare_char.py)
ARGS ?=
NGPUS ?=
LINES = calculator reverser wordcalc
# what a recipe takes without a GPU, and with one; with weights that are loaded come their sizes
ifneq ($(filter $(LINES:%=train_%.py),$(notdir $(CONFIG))),)
OVERLAY ?= config/cpu_lines.py config/modern.py
GPU_OVERLAY ?= config/modern.py
else ifeq ($(notdir $(CONFIG)),train_shakespeare_char.py)
OVERLAY ?= config/cpu.py config/modern.py
GPU_OVERLAY ?= config/modern.py config/short.py
else ifeq ($(filter finetune_% eval_%,$(notdir $(CONFIG))),)
OVERLAY ?= config/cpu.py
endif

PY = $(VENV)/bin/python
# those of NVIDIA and AMD; a Mac takes the small size, and trains it on its CPU
GPUS = $$($(PY) -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
# config/train_NAME.py, or config/train_NAME_char.py where only that exists; - stands for _
RECIPE = $(firstword $(wildcard config/train_$(subst -,_,$*).py config/train_$(subst -,_,$*)_char.py) config/train_$(subst -,_,$*).py)
SMALL_DATASETS = shakespeare_char shakespeare $(LINES)

.PHONY: help install test train clean generate-all
.DEFAULT_GOAL = help

help:
	@echo 'make train-shakespeare      install, prepare, train and sample: the whole tour, 2 minutes without a GPU'
	@echo 'make test                   the test suite'
	@echo 'make install                make $(VENV) with the pinned dependencies'
	@echo 'make generate-DATASET       run data/DATASET/prepare.py:$(patsubst data/%/prepare.py, %,$(wildcard data/*/prepare.py))'
	@echo 'make generate-all           prepare the small ones: $(SMALL_DATASETS)'
	@echo 'make train-RECIPE           train config/train_RECIPE.py:$(patsubst config/train_%.py, %,$(wildcard config/train_*.py))'
	@echo 'make sample-RECIPE          samples from what it trained'
	@echo 'make eval-RECIPE            score it: loss, perplexity, exact match'
	@echo 'make train CONFIG=config/train_gpt2.py NGPUS=8 ARGS="--max_iters=10"'
	@echo '                            any recipe; NGPUS: all that are visible, unless given'
	@echo 'make train DATASET=notes INPUT=notes.txt    your own text, or without INPUT a dataset that is prepared'
	@echo 'make clean                  remove $(VENV) and caches; data and trained runs (out-*) stay'

# done again only when pyproject.toml has changed since
install:
	@cmp -s pyproject.toml $(VENV)/pyproject.installed || { \
	  set -e; $(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null || $(PYTHON) -m venv --clear $(VENV); \
	  echo 'installing into $(VENV) ...'; $(PY) -m pip install --disable-pip-version-check -e '.[test]'; \
	  cp pyproject.toml $(VENV)/pyproject.installed; }

test: install
	$(PY) -m pytest -q $(ARGS)

generate-all: $(addprefix generate-,$(SMALL_DATASETS))

generate-shakespeare: generate-shakespeare_char # in GPT-2's BPE, and in characters

generate-%: install
	$(PY) data/$(subst -,_,$*)/prepare.py

# without a GPU: the overlay; on one: plain python; on several: torchrun
train: install
	@set -e; test -f '$(CONFIG)' || { echo 'error: no recipe $(CONFIG); make lists them' >&2; exit 2; }; \
	recipe=$$(sed -n "s/^dataset *= *['\"]\([^'\"]*\).*/\1/p" '$(CONFIG)'); dataset='$(or $(DATASET),$(patsubst --dataset=%,%,$(filter --dataset=%,$(ARGS))))'; dataset=data/$${dataset:-$${recipe:-openwebtext}}; \
	test -z '$(INPUT)' || $(PY) data/text/prepare.py --input='$(INPUT)' --dataset='$(DATASET)'; \
	test -f "$$dataset/train.bin" -a -f "$$dataset/val.bin" -o ! -f "$$dataset/prepare.py" || $(PY) "$$dataset/prepare.py"; \
	gpus=$(GPUS); n=$(NGPUS); n=$${n:-$$gpus}; overlay='$(GPU_OVERLAY)'; test $$gpus -gt 0 || overlay='$(OVERLAY)'; \
	launch='$(PY)'; test $$n -le 1 || launch="$(VENV)/bin/torchrun --standalone --nproc_per_node=$$n"; \
	set -x; $$launch train.py '$(CONFIG)' $$overlay $(if $(DATASET),'--dataset=$(DATASET)' '--out_dir=out-$(DATASET)') $(ARGS)

train-%:
	@test -f '$(RECIPE)' || { echo 'error: no recipe $(RECIPE); make lists them' >&2; exit 2; }
	@$(MAKE) --no-print-directory train CONFIG=$(RECIPE)

sample-%: install
	$(PY) sample.py $(firstword $(wildcard config/sample_$(subst -,_,$*).py) $(RECIPE)) $(ARGS)

eval-%: install
	$(PY) eval.py $(RECIPE) $(ARGS)

train-shakespeare:
	@$(MAKE) --no-print-directory train CONFIG=config/train_shakespeare_char.py
	@$(MAKE) --no-print-directory sample-shakespeare ARGS=

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
