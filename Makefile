.DEFAULT_GOAL := help
PYTHON ?= python3
CHROMIUM ?= chromium
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints/cpu.txt
CORE := .venv/.core
SETUP := .venv/.complete
ORACLES := .venv/.oracles
ZOO := .venv/zoo
FITS := import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else \
	"Python 3.11, 3.12 or 3.13 is needed, and this is %d.%d. Name another: make PYTHON=python3.12 ..." % v)
# a prerequisite only where .venv is missing, does not run, or is of another Python
ANEW := $(shell $(BIN)/python -c '$(FITS)' 2>/dev/null || echo anew)

help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

anew:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Install Python 3.11, 3.12 or 3.13."; exit 1; }
	@$(PYTHON) -c '$(FITS)'
	rm -rf .venv
	$(PYTHON) -m venv .venv

$(CORE): pyproject.toml constraints/cpu.txt $(ANEW)
	@echo "Installing what training needs into .venv. The first time takes minutes, most of them for PyTorch."
	@$(BIN)/python -c 'import pip' 2>/dev/null || $(BIN)/python -m ensurepip
	$(PIP) -e .
	@touch $@

$(SETUP): $(CORE)
	@echo "Installing what development needs too."
	$(PIP) -e '.[dev]'
	@touch $@

setup: $(SETUP) ## Make .venv and install everything, versions pinned by constraints/cpu.txt

setup-cuda: setup ## On a GPU machine: build mamba-ssm and causal-conv1d too (optional, needs nvcc; docs/gpu.md)
	@$(BIN)/python -c "import sys, torch; sys.exit(None if torch.version.cuda else 'This torch has no CUDA: see docs/gpu.md')"
	$(BIN)/python -m pip install --disable-pip-version-check setuptools wheel packaging ninja
	MAMBA_KEEP_CUDA_BUILD=TRUE $(BIN)/python -m pip install --disable-pip-version-check \
		--no-build-isolation -c constraints/cpu.txt -e '.[cuda]'
	$(BIN)/python -c "from mambaseg.scan import available_backends; print(*available_backends('cuda'))"

setup-launchers: setup ## Add the launchers and the search: joblib, submitit, Ray, Optuna (docs/sweeps.md)
	$(PIP) -e '.[launchers,ray,search]'

train: $(CORE) ## Train Mamba-UNet on the synthetic phantom, test it, print the score table
	$(BIN)/mambaseg train experiment=quickstart

demo: $(CORE) ## A local page for trying a network out: make demo [RUN=<run folder or .ckpt>]; newest run otherwise
	@$(BIN)/python -c 'import gradio' 2>/dev/null || $(PIP) -e '.[demo]'
	$(BIN)/mambaseg demo $(if $(RUN),'run="$(RUN)"')

sweep: $(CORE) ## The three-network comparison on whatever data are found
	$(BIN)/mambaseg train -m model=unet,swin_unet,mamba_unet

methods: $(CORE) ## Rewrite the table of docs/methods.md from configs and classes
	$(BIN)/python docs/site/tables.py

models: $(ZOO) ## Measure every network and rewrite docs/models.md (minutes; keep the machine idle)
	PYTHONPATH=$(ZOO):tests/helpers $(BIN)/python -c "import torchvision_on_cpu; from mambaseg.app.console import main; main()" \
		benchmark profile models=all threads=2 outputs=outputs/models
	$(BIN)/python docs/site/tables.py "$$(ls outputs/models/profile-*.json | tail -n 1)"

EQUAL := $(BIN)/mambaseg train -m experiment=acdc_equal logger=csv seed=1,2,3
results: $(CORE) ## The comparison of docs/results.md on ACDC (ACDC_ROOT=...): 39 trainings, a day on two cores; resumes
	$(EQUAL) optim=adamw model=unet,swin_unet,mamba_unet,mamba_unet_no_scan
	$(EQUAL) optim=sgd model=unet,swin_unet,mamba_unet
	$(EQUAL) optim=adamw model=attention_unet,ultralight_vm_unet,u_mamba_bot,u_mamba_none,trans_unet,nnunet_2d
	$(BIN)/mambaseg report pack outputs/acdc_equal --to docs/results/acdc_equal
	$(BIN)/mambaseg report --no-images docs/results/acdc_equal
	$(BIN)/mambaseg report power docs/results/acdc_equal

pictures: setup ## Make the pictures of README.md again, of the phantom (needs Chromium: CHROMIUM=chromium)
	$(BIN)/mambaseg train -m logger=csv trainer=cpu data=phantom data.size=64 data.steps=100 data.val_every=50 \
		optim=adamw name=phantom model=unet,swin_unet,mamba_unet seed=1,2
	$(BIN)/mambaseg report outputs/phantom
	cp outputs/phantom/unet-*-seed1-*/figures/median_*.png docs/overlay.png
	$(CHROMIUM) --headless --hide-scrollbars --window-size=1280,1180 --screenshot=docs/report.png \
		"file://$(CURDIR)/outputs/phantom/report/index.html"
	$(BIN)/python -c "from PIL import Image; Image.open('docs/report.png').convert('RGB').quantize(256).save('docs/report.png', optimize=True)"

$(ORACLES): $(SETUP) constraints/oracles.txt
	$(PIP) --no-deps -r constraints/oracles.txt
	@touch $@

oracles: $(ORACLES) ## Add nnU-Net itself, with whose plan tests compare ours (constraints/oracles.txt says how)

$(ZOO): $(SETUP) constraints/zoo.txt
	rm -rf $@
	$(PIP) --no-deps --target $@ -r constraints/zoo.txt

zoo: $(ZOO) ## Test the networks of the extra zoo (constraints/zoo.txt says how)
	PYTHONPATH=$(ZOO):tests/helpers $(BIN)/python -m pytest -p torchvision_on_cpu -n 3 -m "not slow" \
		-k "zoo or smp or timm_u"

test: setup ## Run the test suite (no network; real ACDC where ACDC_ROOT is set)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow"

test-long: setup ## Run everything, also the tests that take minutes each
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-launchers: setup-launchers ## Run real sweeps on every launcher, a simulated SLURM and a search
	$(BIN)/python -m pytest tests/app/test_launching.py tests/app/test_search.py

lock: ## Rewrite constraints/lock.txt: the versions of cpu.txt with hashes (needs uv)
	echo 'setuptools>=77' | uv pip compile pyproject.toml - --quiet --generate-hashes \
		--extra dev --extra docs --extra launchers --extra ray --extra search --constraints constraints/cpu.txt \
		--python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate \
		--no-emit-index-url --custom-compile-command "make lock" --output-file constraints/lock.txt

docs: setup ## Build the documentation as a site with search: build/docs/html/index.html
	$(PIP) --quiet -e '.[docs]'
	$(BIN)/python docs/site/build.py

notebooks: setup ## Run the notebooks and store their outputs: make notebooks; .venv/bin/jupyter lab notebooks opens them
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints/cpu.txt -c constraints/notebooks.txt -e '.[notebooks]'
	$(BIN)/python notebooks/store.py

lint: setup ## ruff (lint and format) and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --config pyproject.toml

format: setup ## Apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup ## mypy
	$(BIN)/mypy

data-check: $(CORE) ## Check a dataset: make data-check DATA=<root> [ARGS=--help]
	@test -n "$(DATA)" || { echo "usage: make data-check DATA=<folder of the dataset>"; exit 2; }
	$(BIN)/mambaseg check "$(DATA)" $(ARGS)

doctor: $(CORE) ## Is this machine fit for training? Versions, GPU, scan backends, disk, data, W&B
	$(BIN)/mambaseg doctor

clean: ## Remove caches of tools (never data, runs or .venv)
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help anew setup setup-cuda setup-launchers oracles train demo sweep methods models results pictures zoo test test-long test-launchers docs notebooks lint format types data-check doctor clean
