# Every target works on a fresh clone with Python 3.10+ and make. `make help` lists them.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
LISTEN ?= 127.0.0.1:50051
DEVICE ?= cpu
# Arguments for pytest, for example: make test ARGS="-k wire -x"
ARGS   ?=
# TORCH=1 installs PyTorch, an oracle of the tests and the peer of the benchmarks.
TORCH  ?=
TORCH_VERSION := 2.13.0

.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# One marker a set of packages; a changed pyproject.toml installs anew.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.%: pyproject.toml | $(VENV)/.created
	$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@

$(VENV)/.torch: | $(VENV)/.test
	$(BIN)/pip install --quiet 'torch==$(TORCH_VERSION)'
	@touch $@

PROTOC := $(BIN)/python -m grpc_tools.protoc --proto_path=proto \
    --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc

proto: $(VENV)/.check  ## Generate the Python code of proto/ anew
	$(PROTOC) --python_out=client --mypy_out=quiet:client proto/sharednorm/v1/*.proto
	$(PROTOC) --grpc_python_out=client --mypy_grpc_out=quiet:client proto/sharednorm/v1/service.proto

.PHONY: help proto
