# make demo and make test each set up a virtual environment of their own, and run. Needs Python 3.11 or newer.
#   PYTHON    which Python makes the environment
#   PIP_ARGS  further arguments of pip install, e.g. an index of builds for this machine
#   JOBS      test processes at a time
#   CONSTRAINTS  which versions are installed; constraints-lowest.txt has the oldest that are supported, and
#             constraints-highest.txt the newest; each gets an environment of its own:
#             make test CONSTRAINTS=constraints-lowest.txt
#   EXTRAS    what is installed beside the package; demo,dev,tensorrt,openvino,timm has the families of timm tested, too
PYTHON ?= python3
PIP_ARGS ?=
EXTRAS ?= demo,dev,tensorrt,openvino
JOBS ?= 2
CONSTRAINTS ?= constraints.txt
VENV := .venv$(patsubst constraints%.txt,%,$(CONSTRAINTS))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRAS)

.PHONY: setup demo test test-slow coverage scale speed kernel-code bench-kv bench-export bench-gpu lint format train schema results sweep retrieval clean

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tokcompile needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

demo: setup
	$(BIN)/tokred demo

test: setup
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --durations=15

# Models of real proportions, every family of the catalogue, and every block of the README and the docs.
test-slow: setup
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --durations=15 -m slow

# Runs the tests of every family of the catalogue and writes docs/models.md; fails when a cell was lost.
coverage: setup
	$(BIN)/python tests/model_table.py

# Times rewrites of models of 4 to 80 layers and writes docs/scale.md; some minutes, most of them capture.
scale: setup
	$(BIN)/python tests/scale_table.py

# Times a ViT-B/16 of 384 pixels with merged pairs and writes docs/speed.md; needs EXTRAS=demo,dev,timm and a quiet machine.
speed: setup
	$(BIN)/python tests/merge_speed.py

# Compiles every Triton kernel with every tile for two GPUs and writes docs/kernel-code.md; needs no GPU, and about ten
# minutes.
kernel-code: setup
	$(BIN)/python tests/machinecode_table.py

# Times caches that rules shorten against full ones and against kvpress, which gets an environment of its own, and writes
# docs/cache-speed.md; up to an hour on two cores, and a quiet machine.
bench-kv: setup
	$(BIN)/python tests/kv_speed.py $(BENCH_ARGS)

# Times ONNX files of two models of real size under rules against the files without one and against their ideals, and
# writes docs/export-speed.md; up to an hour on two cores, 8 GB of memory, 20 GB of disk, and a quiet machine.
bench-export: setup
	$(BIN)/python tests/export_speed.py $(BENCH_ARGS)

# Times kernels and whole models on a GPU, keeps figures in docs/gpu, and writes the tables of docs/performance.md; parts
# that are there are not measured again. Needs a GPU that holds a model of 8 billion numbers with 128k keys, and a build of
# torch for it.
bench-gpu: setup
	$(BIN)/python tests/gpu_speed.py $(BENCH_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Trains the small models of the demo and of make retrieval again; the checkpoints are committed.
train: setup
	$(BIN)/python -m tokcompile.models.recipe_llava_digits
	$(BIN)/python -m tokcompile.models.recipe_retrieval

# Writes docs/rule.schema.json from the models in tokcompile/rulefile.py.
schema: setup
	$(BIN)/python -c 'import json; from tokcompile.rulefile import json_schema; print(json.dumps(json_schema(), indent=2))' > docs/rule.schema.json

# Writes docs/results.md from the report of the last `make demo`.
results: setup
	$(BIN)/python -m tokcompile.pages.demo_results build/demo/report.json > docs/results.md

# Measures every rule of the library at six budgets on the model of the demo, goes on where an earlier run stopped, and
# writes docs/sweep.md and docs/sweep.svg. After a change of the package's code: make sweep SWEEP_ARGS=--fresh
SWEEP_ARGS ?=
sweep: setup
	$(BIN)/tokred sweep --out build/sweep $(SWEEP_ARGS)
	cp build/sweep/sweep.md build/sweep/sweep.svg docs/

# Measures every rule that evicts keys at six budgets on a model trained to find needles in long texts, goes on where an
# earlier run stopped, and writes docs/retrieval.md and its plots. After a change of the package's code:
# make retrieval RETRIEVAL_ARGS=--fresh
RETRIEVAL_ARGS ?=
retrieval: setup
	$(BIN)/tokred retrieval --out build/retrieval $(RETRIEVAL_ARGS)
	cp build/retrieval/retrieval.md build/retrieval/retrieval.svg build/retrieval/retrieval_depth.svg docs/

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
