# Every target works on a fresh clone with Python 3.10+ and make. `make help` lists them.

# Another interpreter gets another virtual environment: make test PYTHON=python3.12
PYTHON ?= python3
# Arguments for pytest: make test ARGS="-k wire -x"
ARGS   ?=
# TORCH=1 installs PyTorch, an oracle of the tests and the peer of the benchmarks. Of its builds pip takes the one
# that its settings lead to; the one for the CPU is enough.
TORCH  ?=
# CUDA=1 builds PyCUDA, about a minute once per machine, for the tests that run it on an emulated driver: no GPU, but
# the CUDA toolkit's headers and g++.
CUDA   ?=
# make serve LISTEN=unix:/run/sharednorm.sock
LISTEN ?= 127.0.0.1:50051
DEVICE ?= cpu
# The default is a directory: make serve STATE=memory:
STATE  ?=
# Which service of docker/compose.yaml `make up` starts: cuda or cpu.
PROFILE ?= cuda

TORCH_VERSION := 2.13.0
FATBIN := kernels/sharednorm_kernels/sharednorm.fatbin

# LOWEST=1 tests with the oldest releases of packages that are allowed.
LOWEST ?=

ifneq ($(LOWEST),)
VENV ?= .venv-lowest
else ifeq ($(origin PYTHON),file)
VENV ?= .venv
else
VENV ?= .venv-$(shell $(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null || echo none)
endif
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# What generates the code of proto/ is older than what runs it: see `proto` in pyproject.toml.
GENERATOR := .venv-proto

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo demo-torch test test-all soak serve check docs bench gpu-check kernels proto resolve images up down image-check clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY)-demo  ## Several processes share layers on one server, on real data (under a minute); SERVER= is one that runs
	$(BIN)/python -m examples.demo $(if $(SERVER),--server '$(SERVER)')

demo-torch: $(READY)-demo $(READY)-torch  ## Workers with tiny batches train a network with PyTorch, normalized as one; STEPS= is how long
	$(BIN)/python -m examples.synchronized $(if $(STEPS),--steps $(STEPS))

test: $(READY)-test $(if $(TORCH),$(READY)-torch) $(if $(CUDA),$(READY)-cuda)  ## Run every test that this machine can run; TORCH=1 adds PyTorch, CUDA=1 PyCUDA; LOWEST=1: with the oldest packages
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-all:  ## `make test` with each Python from 3.10 to 3.14 that pyenv has, and with the oldest packages; 3.14 also from Debian, as root
	@for python in $$(find "$$(pyenv root)/versions" -maxdepth 1 -name '3.1[0-4].*' | sort -V); do \
	    $(MAKE) test PYTHON="$$python/bin/python" || exit; \
	done
	@ls -d "$$(pyenv root)"/versions/3.14.* >/dev/null 2>&1 || \
	    tests/packaging/python314.sh make test PYTHON=python3 $(if $(ARGS),,ARGS='tests/unit tests/contract')
	$(MAKE) test LOWEST=1

soak: $(READY)-test  ## Hours of faults: 1,000 networks that break, 200 servers that are killed, a million damaged messages, 5,000 steps through three servers; SEEDS=, KILLS=, MESSAGES= and STEPS= for fewer
	SHAREDNORM_SEEDS=$(or $(SEEDS),167) SHAREDNORM_KILLS=$(or $(KILLS),200) SHAREDNORM_MESSAGES=$(or $(MESSAGES),125000) \
	SHAREDNORM_STEPS=$(or $(STEPS),5000) \
	    $(BIN)/python -m pytest -n auto -o timeout=36000 tests/faults/crashes/test_exactly_once.py \
	    tests/faults/crashes/test_server_killed.py tests/unit/codec/test_wire_agreement.py tests/redis/test_many_servers.py $(ARGS)

serve: $(READY)-server $(if $(findstring cuda,$(DEVICE)),$(READY)-gpu $(FATBIN))  ## Run a server in the foreground; LISTEN=, DEVICE= and STATE= are its options
	exec $(BIN)/sharednorm serve --listen '$(LISTEN)' --device '$(DEVICE)' $(if $(STATE),--state '$(STATE)')

check: $(READY)-check $(READY)-test $(READY)-demo $(GENERATOR)/.ready  ## Lint, types, the contract, whether the generated code is fresh, and the lines of each room
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/cpu.Dockerfile docker/cuda.Dockerfile docker/client.Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml docker/compose.secure.yaml
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(call generate,$(GENERATOR)/generated)
	diff -r -x __init__.py -x __pycache__ $(GENERATOR)/generated/sharednorm/v1 client/sharednorm/v1 \
	    || { echo 'client/sharednorm/v1 is not what proto/ makes: run `make proto`' >&2; exit 1; }
	$(BIN)/python -m tests.support.rooms

docs: $(READY)-check  ## Build the documentation's site, in build/site; a warning is an error
	$(BIN)/mkdocs build --quiet --clean

bench: $(READY)-bench $(READY)-server $(READY)-torch  ## Compare with PyTorch, gloo, Arrow Flight and raw gRPC; writes benchmarks/results and the tables that show them
	$(BIN)/python -m benchmarks.local
	$(BIN)/python -m benchmarks.datapath
	$(BIN)/python -m benchmarks.remote
	$(BIN)/python -m benchmarks.groups
	$(BIN)/python -m benchmarks.durability
	$(BIN)/python -m benchmarks.overload
	$(BIN)/python -m benchmarks.servers
	$(BIN)/python -m benchmarks.call_path
	$(BIN)/python -m benchmarks.plot
	$(BIN)/python -m benchmarks.tables

gpu-check: $(READY)-test $(READY)-torch $(READY)-cuda $(READY)-demo  ## On a machine with a GPU: compile, test and measure everything that runs on it
	$(BIN)/python -m benchmarks.gpu.check

kernels:  ## Compile the CUDA kernels into a fatbin, which needs nvcc; warnings and spilled registers are errors
	PYTHONPATH=kernels $(PYTHON) -m sharednorm_kernels.build

$(FATBIN): $(wildcard kernels/sharednorm_kernels/*.cu kernels/sharednorm_kernels/*.cuh)
	PYTHONPATH=kernels $(PYTHON) -m sharednorm_kernels.build

proto: $(GENERATOR)/.ready  ## Generate the Python code of proto/ anew
	$(call generate,$(GENERATOR)/generated)
	find client/sharednorm/v1 -name '*_pb2*' -delete
	cp $(GENERATOR)/generated/sharednorm/v1/* client/sharednorm/v1/

resolve:  ## Ask pip whether sharednorm can be installed beside other packages, and write docs/dependencies.md
	$(PYTHON) tests/packaging/resolve.py

images:  ## Build the images with Docker: sharednorm:cuda, sharednorm:cpu and sharednorm:client
	$(call need,docker,install Docker Engine)
	docker build --build-arg CUDA_TOOLKIT --build-arg CUDA_BASE --build-arg PIP_INDEX_URL \
	    --file docker/cuda.Dockerfile --tag sharednorm:cuda .
	docker build --build-arg CPU_BASE --build-arg PIP_INDEX_URL --file docker/cpu.Dockerfile --tag sharednorm:cpu .
	docker build --build-arg CPU_BASE --build-arg PIP_INDEX_URL --file docker/client.Dockerfile --tag sharednorm:client .

up:  ## Build and start the server with Docker Compose: on a GPU, or with PROFILE=cpu without one; PROFILE=scale: two and Redis
	$(call need,docker,install Docker Engine)
	docker compose --file docker/compose.yaml --profile '$(PROFILE)' up --detach --build --wait --wait-timeout 300 $(if $(filter scale,$(PROFILE)),one two,'$(PROFILE)')

down:  ## Stop the server that `make up` has started; the volume with its state stays
	$(call need,docker,install Docker Engine)
	docker compose --file docker/compose.yaml --profile '*' down

image-check: $(READY)-test $(READY)-cuda $(READY)-demo  ## Build all images with podman and use what is in them; Debian, as root, no Docker and no GPU
	$(BIN)/python -m docker.image_check

clean:  ## Remove what the targets made, virtual environments included
	rm -rf .venv .venv-* build dist demo-output $(FATBIN) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find client server kernels tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call need,PROGRAM,WHAT TO DO)
need = @command -v $1 >/dev/null || { echo '$1 is not installed: $2' >&2; exit 1; }

# $(call generate,DIRECTORY): the Python code of proto/, into an empty directory.
PROTOC = $(GENERATOR)/bin/python -m grpc_tools.protoc --proto_path=proto \
    --plugin=protoc-gen-mypy=$(GENERATOR)/bin/protoc-gen-mypy \
    --plugin=protoc-gen-mypy_grpc=$(GENERATOR)/bin/protoc-gen-mypy_grpc
define generate
	rm -rf '$1' && mkdir -p '$1'
	$(PROTOC) --python_out='$1' --mypy_out=quiet:'$1' $$(cd proto && find sharednorm -name '*.proto' | sort)
	$(PROTOC) --grpc_python_out='$1' --mypy_grpc_out=quiet:'$1' $$(cd proto && grep -rl '^service ' sharednorm | sort)
endef

# One marker for each set of packages, an extra of pyproject.toml; a changed pyproject.toml installs anew.
$(READY)-torch: $(READY)-test Makefile
	$(BIN)/pip install --quiet 'torch==$(TORCH_VERSION)'
	@touch $@

$(READY)-cuda: $(READY)-test Makefile tests/emulation/pycuda_wheel.py
	@echo 'building PyCUDA, unless this machine has built it before'
	$(BIN)/python -m tests.emulation.pycuda_wheel
	@touch $@

# What a server with a GPU needs: PyCUDA, which pip builds against the CUDA toolkit and the driver of this machine.
$(READY)-gpu: $(READY)-server
	@echo 'building PyCUDA, which takes a minute or two'
	$(BIN)/pip install --quiet --editable '.[cuda]'
	@touch $@

$(READY)-%: pyproject.toml | $(VENV)/.created
	@echo 'installing the packages for `make $*` into $(VENV)'
	$(if $(LOWEST),$(BIN)/python tests/packaging/lowest.py > $(VENV)/lowest.txt)
	$(BIN)/pip install --quiet $(if $(LOWEST),--constraint $(VENV)/lowest.txt) --editable '.[$*]'
	@touch $@

$(GENERATOR)/.ready: pyproject.toml | $(GENERATOR)/.created
	@echo 'installing the packages that generate the code of proto/ into $(GENERATOR)'
	$(GENERATOR)/bin/pip install --quiet --only-binary grpcio-tools --editable '.[proto]' || { rm -rf $(GENERATOR); \
	    echo 'the generator has wheels for Python 3.10 to 3.13: make TARGET PYTHON=python3.13, or an older one' >&2; exit 1; }
	@touch $@

$(VENV)/.created $(GENERATOR)/.created: %/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	    { echo 'sharednorm needs Python 3.10 or newer, and $(PYTHON) is not: make TARGET PYTHON=python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo '$(PYTHON) has no venv module: apt-get install python3-venv, or the like' >&2; exit 1; }
	@echo 'making the virtual environment $*'
	@$(PYTHON) -m venv $*
	@touch $@
