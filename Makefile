# Everything that is done often. `make demo` needs no torch; `make test` and `make check` install what they need.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(wildcard runtime/csrc/*)

.PHONY: help demo test test-wheel test-lowest check format lint types imports sanitize protocol bench soak proto clean

help:
	@echo "make demo        a three-prompt video and its contact sheet in out/ (no GPU, no torch)"
	@echo "make test        the whole test suite, ARGS='-k cache' to choose"
	@echo "make test-wheel  the suite against an installed wheel"
	@echo "make test-lowest what needs no torch, with the lowest versions that pyproject.toml allows (Python 3.11)"
	@echo "make check       format, lint, types, import contracts, the C core under sanitizers"
	@echo "make format      rewrite the sources as 'make check' wants them"
	@echo "make bench       benchmarks: table and JSON"
	@echo "make soak        the service under load and faults: figures as JSON (minutes; ARGS='--hour' adds an hour)"
	@echo "make proto       regenerate the gRPC code from protos/"

# The package and what it needs at run time. macOS's own python3 is 3.9; make there is 3.81, so nothing newer is used here.
$(VENV)/.core: $(BUILD_INPUTS)
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
		"$(PYTHON) is Python %d.%d and 3.11 is needed: name another one, PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

# What developers and tests need besides. torch comes first and alone, so that the version that is asked for is kept.
$(VENV)/.dev: $(VENV)/.core Makefile
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,export,serve,telemetry,tensorrt-rtx]"
	@touch $@

demo: $(VENV)/.core
	@mkdir -p out
	$(BIN)/swiftvideo generate --seed 7 --seconds 12 \
		--prompt "a red circle moving right at night" \
		--at 4s --prompt "a yellow square moving right at night" \
		--at 8s --prompt "a blue triangle bouncing at dawn" \
		--out out/demo.mp4 --contact-sheet out/demo.png

# One process for every core, four at most; modules stay whole. Without -n, as `.venv/bin/pytest`, it is one process.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

# A venv with the wheel and, through a .pth file, the third-party packages of the first one; not its editable install.
test-wheel: $(VENV)/.dev
	rm -rf build/wheel build/wheel-venv
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w build/wheel .
	$(BIN)/python -m venv build/wheel-venv
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$(build/wheel-venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	build/wheel-venv/bin/python -m pip install --quiet --no-deps --force-reinstall build/wheel/*.whl
	SWIFTVIDEO_INSTALLED=build/wheel-venv build/wheel-venv/bin/python -m pytest $(PARALLEL) $(ARGS)

# The lowest versions of what the package itself needs; torch and the service are not part of it.
LOWEST := build/lowest/bin/python -m
test-lowest:
	rm -rf build/lowest
	$(PYTHON) -m venv build/lowest
	$(LOWEST) pip install --quiet --disable-pip-version-check \
		$$($(PYTHON) -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
		print(*(need.replace('>=', '==') for need in project['dependencies']))") \
		pytest pytest-timeout hypothesis psutil
	$(LOWEST) pip install --quiet --disable-pip-version-check --no-deps -e .
	$(LOWEST) pytest tests/sdk $(addprefix tests/runtime/test_,pipeline.py session.py session_ending.py tensorfile.py) $(ARGS)

check: lint types imports protocol sanitize

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# mypy needs the import names: build/types/swiftvideo/X is folder X.
types: $(VENV)/.dev
	@mkdir -p build/types/swiftvideo
	@for part in sdk export runtime; do ln -sfn ../../../$$part build/types/swiftvideo/$$part; done
	@ln -sfn ../../../protos/swiftvideo/v1 build/types/swiftvideo/v1
	$(BIN)/mypy
	$(BIN)/stubtest swiftvideo.runtime._core --mypy-config-file pyproject.toml

# Style of the protocol, and that it still speaks with clients of protos/baseline.binpb, the last released one.
protocol: $(VENV)/.dev
	cd protos && $(abspath $(BIN))/buf lint && $(abspath $(BIN))/buf breaking --against baseline.binpb

imports: $(VENV)/.dev
	$(BIN)/lint-imports

sanitize: $(VENV)/.dev
	tests/runtime/core/sanitize.sh $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	@mkdir -p out
	$(BIN)/python -m tests.bench.core --json out/bench-core.json
	$(BIN)/swiftvideo bench --json out/bench.json

soak: $(VENV)/.dev
	@mkdir -p out
	$(BIN)/python -m tests.service.soak --json out/soak.json $(ARGS)

proto: $(VENV)/.dev
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=protos --pyi_out=protos --grpc_python_out=protos \
		$(wildcard protos/swiftvideo/v1/*.proto)

clean:
	rm -rf build out $(VENV)
