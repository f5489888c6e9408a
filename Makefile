# make demo: the main job on the embedded default; make test: the suite; make check: that, with ruff and pyright;
# make chaos: every fault of the catalogue, counted, into docs/reliability.md.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test check chaos assets install
demo: install
	$(BIN)/python -m train.demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

chaos: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --json docs/measures/reliability.json --page docs/reliability.md

assets: install
	$(BIN)/python -m train.assets

install: .venv/installed

# torch alone and first. On Linux, PyPI's brings gigabytes of CUDA; where there is no GPU:
#     make demo TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
.venv/installed: setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "querybridge needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e ".[test]"
	touch $@
