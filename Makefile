# Every target makes or repairs its environment in .venv first; a second call finds it ready.
PYTHON := .venv/bin/python
READY := .venv/.ready
# COVERAGE=95 measures coverage too, which takes half as long again, and fails below that.
COVERAGE ?=
ARGS ?=
# Test files run in two processes; what ARGS names runs in one, which starts sooner.
WORKERS ?= $(if $(ARGS),0,2)

.PHONY: help demo test test-vllm check docs setup setup-vllm clean

help:
	@echo "make demo        train a real 135M model by asynchronous RL, here, in minutes"
	@echo "make test        the tests, but for those that need minutes or vLLM; ARGS=... to pytest"
	@echo "make test-vllm   the tests on real vLLM servers on the CPU, in .venv-vllm"
	@echo "make check       ruff, pyright and the tests"
	@echo "make docs        the documentation, as a site in build/site"
	@echo "make clean       remove caches, runs and logs; the environment stays"

demo: $(READY)
	@$(PYTHON) recipes/arithmetic_cpu/train.py $(ARGS)

test: $(READY)
	@$(PYTHON) -m pytest -q -m "not vllm and not slow and not gpu" \
		$(if $(COVERAGE),--cov --cov-fail-under=$(COVERAGE)) \
		-n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-vllm: setup-vllm
	@$(PYTHON) -m pytest -q -m vllm --timeout=600 $(ARGS)

check: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright
	@$(MAKE) --no-print-directory test COVERAGE=95

docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict
	@echo "Open build/site/index.html."

setup: $(READY)

setup-vllm: $(READY)
	@bash .ci/setup-vllm

$(READY): pyproject.toml .ci/constraints.txt .ci/setup
	@bash .ci/setup
	@touch $@

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis .coverage htmlcov lightning_logs runs build
	find . -name __pycache__ -type d -not -path './.venv*/*' -prune -exec rm -rf {} +
