# `make demo` and `make test` set up .venv first; a second run reuses it. PYTHON=python3.12 takes another Python than
# python3, STACK=newest (or oldest: tools/stacks) other releases of what we work with, in .venv-newest.
.DEFAULT_GOAL := help
bin := .venv$(if $(STACK),-$(STACK))/bin

.PHONY: help setup demo test servers browser docs wheel bench benchlong accuracy lint types format clean

help:  ## Shows this list.
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup:  ## Makes .venv: torch, Transformer Engine, Megatron-Core, ModelOpt, transformers, quantplug.
	@PYTHON="$(PYTHON)" STACK="$(STACK)" tools/setup_env.sh

demo: setup  ## Tiny Qwen3-MoE checkpoint to NVFP4 through Megatron-Core, verified; everything lands in demo-out/.
	@BIN="$(bin)" tools/demo.sh

test: setup  ## The whole test suite, on two cores. PYTEST_ARGS adds arguments, such as PYTEST_ARGS="-k nvfp4 -n 0".
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

servers: setup  ## What a real vLLM computes of our exports, and SGLang loads (in .venv-servers): docs/readers.md, cell by cell.
	@PYTHON="$(PYTHON)" tools/setup_servers.sh
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -n 0 tests/servers $(PYTEST_ARGS)

docs:  ## The documentation as a site, in site/; links are checked. In a small environment of its own (.venv-docs).
	@PYTHON="$(PYTHON)" tools/build_docs.sh

wheel: setup  ## Builds the wheel, and uses it in an environment of what it declares and nothing else.
	@BIN="$(bin)" tools/check_wheel.sh

browser: setup  ## Reports, and the site of `make docs`, in a real browser: Chromium without a window. QUANTPLUG_SCREENSHOTS=DIR keeps pictures.
	@BIN="$(bin)" tools/setup_browser.sh
	OMP_NUM_THREADS=1 $(bin)/python -m pytest -n 0 tests/browser $(PYTEST_ARGS)

bench: setup  ## The quick benchmarks: packing, its tools, calibration. Each writes its section of benchmarks/RESULTS.md.
	$(bin)/python benchmarks/packing.py
	$(bin)/python benchmarks/packing_tools.py
	OMP_NUM_THREADS=1 $(bin)/torchrun --standalone --nproc_per_node 2 benchmarks/calibration_sync.py

benchlong: setup  ## Whole exports, on CPUs, against ModelOpt's own and against their parts: about 20 minutes, and 10 GB of disk.
	OMP_NUM_THREADS=2 $(bin)/python benchmarks/model_free.py --layers 1 --layers 4 --record
	OMP_NUM_THREADS=2 $(bin)/python benchmarks/overlap.py --record
	OMP_NUM_THREADS=1 $(bin)/python benchmarks/verify_scale.py --record
	OMP_NUM_THREADS=2 $(bin)/python benchmarks/verify_source.py --record
	$(bin)/python benchmarks/end_to_end.py --record

accuracy: setup  ## What each format and algorithm loses on the trained model of tests/data: writes the tables of docs/accuracy.md, in ten minutes.
	PYTHONPATH=. $(bin)/python benchmarks/accuracy.py
	PYTHONPATH=. OMP_NUM_THREADS=1 $(bin)/python benchmarks/calibrated_accuracy.py

lint: setup  ## ruff, as a linter and as a format check.
	$(bin)/ruff check .
	$(bin)/ruff format --check .

types: setup  ## mypy.
	$(bin)/mypy

format: setup  ## Lets ruff fix and format the sources.
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

clean:  ## Removes what the demo, the tests and the tools left; keeps the environments.
	rm -rf demo-out build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find quantplug examples tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
