# Every target makes what it needs first: on a fresh machine `make demo` or `make test` is the first command.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo serve cluster test test-slow test-browser fuzz coverage lint fmt notebooks new-op check-kernel bench bench-decode acceptance bench-edits bench-grammars bench-linears bench-levers bench-selector bench-budget bench-first-token bench-replay bench-batch bench-serve performance pictures recording page-picture tune tune-wide mutations gpu-check tiny-checkpoint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/core ## complete held-out functions with the embedded checkpoint, plainly and with Orthrus
	@$(BIN)/orthrus demo

serve: $(VENV)/serve ## answer OpenAI's requests on this machine with the embedded checkpoint; options in SERVE="..."
	@$(BIN)/orthrus serve $(SERVE)

cluster: $(VENV)/cluster ## the same with engines on Ray: docs/scaling.md; options in SERVE="--replicas 2"
	@$(BIN)/orthrus serve --ray $(SERVE)

test: $(VENV)/test ## the test suite, no GPU needed
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/load $(VENV)/cluster ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-browser: $(VENV)/browser ## the page of `orthrus serve` in Chromium, which must be on the PATH, with axe
	$(BIN)/python -m pytest -m slow tests/test_page_browser.py

fuzz: $(VENV)/test ## odd checkpoints, settings, processes; FUZZ="config --seed 7 --count 50000": one of them, longer
	$(BIN)/python tests/fuzz/run.py $(FUZZ)

coverage: $(VENV)/test ## lines of src/ that the suite runs, kernels in the interpreter too; slower than test
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --cov=src --cov-report=term:skip-covered

lint: $(VENV)/lint ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: $(VENV)/lint ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

new-op: $(VENV)/core ## scaffold an operation: make new-op NAME=squared_relu
	@$(BIN)/python -m tools.new_op '$(NAME)'

check-kernel: $(VENV)/test ## tests, registers and time of a kernel against main: make check-kernel OP=swiglu; options in CHECK="..."
	@$(BIN)/python -m tools.check_kernel '$(OP)' $(CHECK)

notebooks: $(VENV)/notebooks ## execute the notebooks on the CPU into runs/notebooks, with pictures, as .ipynb and .html
	$(BIN)/python -m notebooks.run

bench: $(VENV)/bench ## every kernel beside its peers on this GPU, 5 minutes; BENCH="--quick": one
	$(BIN)/python -m bench.kernels $(BENCH)

bench-decode: $(VENV)/bench ## whole decoding steps beside their floors on this GPU, 4 minutes; options in BENCH="..."
	$(BIN)/python -m bench.decode $(BENCH)

acceptance: $(VENV)/bench ## tokens a cycle of chains and draft trees, with intervals; options in ACCEPTANCE="..."
	$(BIN)/python -m bench.acceptance $(ACCEPTANCE)

bench-edits: $(VENV)/bench ## tokens a cycle of trees with what lookup finds and without, on texts that repeat; options in BENCH="..."
	$(BIN)/python -m bench.edits $(BENCH)

bench-grammars: $(VENV)/bench $(VENV)/serve ## cycles of texts held to JSON schemas beside free ones, on this GPU, 1 minute; options in BENCH="..."
	$(BIN)/python -m bench.grammars $(BENCH)

bench-linears: $(VENV)/bench ## all linears of a model in Gluon and in Triton, bit for bit, and beside cuBLAS on this GPU, 1 minute; options in BENCH="..."
	$(BIN)/python -m bench.linears $(BENCH)

bench-levers: $(VENV)/bench ## which training levers bring tokens a cycle? on a GPU, 7 minutes; options in BENCH="..."
	$(BIN)/python -m bench.levers $(BENCH)

bench-selector: $(VENV)/bench ## what a selector of draft candidates keeps on held-out prompts, 1 minute on a GPU; options in BENCH="..."
	$(BIN)/python -m bench.selector $(BENCH)

bench-budget: $(VENV)/bench ## does strategy "auto" find the fastest cycle? on this GPU, 3 minutes; options in BENCH="..."
	$(BIN)/python -m bench.budget $(BENCH)

bench-first-token: $(VENV)/bench ## milliseconds from generate to the first token on this GPU, 2 minutes; options in BENCH="..."
	$(BIN)/python -m bench.first_token $(BENCH)

bench-replay: $(VENV)/bench ## tokens/s at 8B shapes on this GPU, acceptance replayed from a recorded trace; options in BENCH="..."
	$(BIN)/python -m bench.decode --replay bench/results/trace-h100.json $(if $(BENCH),$(BENCH),--models 8B)

bench-batch: $(VENV)/bench ## tokens/s of 1 to 64 texts at once on this GPU, 15 minutes; LENGTHS=FILE: your texts; options in BENCH="..."
	$(BIN)/python -m bench.decode --batch 1 8 32 64 $(if $(LENGTHS),--lengths '$(LENGTHS)') $(if $(BENCH),$(BENCH),--models 8B 1.7B embedded)

bench-serve: $(VENV)/bench ## orthrus serve over HTTP at 1 to 64 clients on this GPU, at most 8 minutes a model; LENGTHS=FILE: your texts; on a CPU BENCH="--models embedded --loads 1 4"
	$(BIN)/python -m bench.serve $(if $(LENGTHS),--lengths '$(LENGTHS)') $(if $(BENCH),$(BENCH),--models 8B 1.7B)

performance: $(VENV)/bench ## docs/performance.md and its picture anew from the recorded runs
	$(BIN)/python -m tools.docs.performance

pictures: $(VENV)/core ## docs/mask.svg, docs/speed.svg, docs/batch.svg, docs/serve.svg anew, from the definition of visibility and recorded runs
	$(BIN)/python -m tools.docs.pictures

recording: $(VENV)/core ## docs/demo.svg anew: a terminal recording of `orthrus demo` on this machine
	$(BIN)/python -m tools.docs.recording

page-picture: $(VENV)/browser ## docs/page.png anew: the page of `orthrus serve` in Chromium, with a run on this machine
	$(BIN)/python -m tools.docs.page

tune: $(VENV)/bench ## make the linears' launch table anew on this GPU; options in TUNE="..."
	$(BIN)/python -m bench.tune $(TUNE)

tune-wide: $(VENV)/bench ## wide tiles of the linears in Gluon beside Triton and cuBLAS on this GPU, 1 minute; options in TUNE="..."
	$(BIN)/python -m bench.tune_wide $(TUNE)

mutations: $(VENV)/test ## plant known bugs in a copy, each to be caught by its test, 10 minutes; options in MUTATIONS="..."
	$(BIN)/python -m tests.mutations.run $(MUTATIONS)

gpu-check: $(VENV)/test ## the kernel tests compiled on this GPU, whole models, then compute-sanitizer; half an hour; options in GPU_CHECK="..."
	$(BIN)/python -m tools.gpu_check $(GPU_CHECK)

tiny-checkpoint: $(VENV)/core ## train the embedded checkpoint anew into runs/tiny (a GPU of 80 GB, half an hour)
	$(BIN)/orthrus tiny-checkpoint runs/tiny

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, $(PYTHON) is not: name another one with make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv module is missing: install it first (Debian, Ubuntu: the package python3-venv)" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (torch is large: this takes minutes the first time)"
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/serve: $(VENV)/core
	@$(PIP) install -c constraints.txt -e '.[serve]'
	@touch $@

$(VENV)/test: $(VENV)/core
	@$(PIP) install -c constraints.txt -e '.[test,serve,notebooks]'
	@touch $@

$(VENV)/browser: $(VENV)/test
	@$(PIP) install -c constraints.txt -e '.[browser]'
	@touch $@

$(VENV)/load: $(VENV)/test
	@$(PIP) install -c constraints.txt -e '.[load]'
	@touch $@

$(VENV)/cluster: $(VENV)/core
	@$(PIP) install -c constraints.txt -e '.[cluster]'
	@touch $@

$(VENV)/notebooks: $(VENV)/core
	@$(PIP) install -c constraints.txt -e '.[notebooks]'
	@touch $@

$(VENV)/lint: $(VENV)/core
	@$(PIP) install -c constraints.txt -e '.[lint]'
	@touch $@

$(VENV)/bench: $(VENV)/core
	@$(PIP) install -c constraints.txt -e '.[bench,serve]'
	@touch $@
