# make demo        train the demo's models under FP8 (an environment of its own in .venv, then `fp8fx demo`)
# make test        the whole suite, in .venv, a process per core (WORKERS=...); TEST_ARGS=tests/ops for a part
# make test-core   numerics and the gate only, with the Python that is there (PYTHON=...): nothing is installed
# make lint        ruff and mypy, in .venv
# make wheel       build the wheel and try it in a fresh environment, outside the checkout
# make clean       remove everything that these make

PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
TEST_ARGS ?=
WORKERS ?= logical

# Always with the constraints: without them pip replaces a CPU build of torch by a CUDA build of gigabytes.
# The build runs in the environment itself (setuptools is installed first), since an isolated one would not see them.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
CONSTRAINTS := $(CURDIR)/constraints.txt
INSTALL := -m pip install --quiet --no-input -c $(CONSTRAINTS)
BIN := $(VENV)/bin
ON_CHANGE := pyproject.toml constraints.txt
LINKS := build/types
WHEEL_ENV := build/wheel-env

.PHONY: demo test test-core lint wheel clean $(LINKS)

demo: $(VENV)/demo.stamp
	$(BIN)/fp8fx demo $(DEMO_ARGS)

# A file's tests stay in one process: they share what is compiled. In the order of collection, since the longest file has few tests.
test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations=15 $(TEST_ARGS)

# -P keeps the checkout's root, where fp8fx has no fp8fx.kernels, off sys.path: the linked tree is imported.
test-core: $(LINKS)
	PYTHONPATH=$(CURDIR)/$(LINKS) $(PYTHON) -P -m pytest -m core $(TEST_ARGS)

# fp8fx laid out as when installed (kernels/ is fp8fx.kernels), for what cannot follow setuptools' package-dir mapping.
$(LINKS):
	rm -rf $@ && mkdir -p $@/fp8fx
	ln -s $(CURDIR)/fp8fx/* $(CURDIR)/kernels $(CURDIR)/recipes $@/fp8fx/

$(VENV)/python.stamp:
	@echo "making an environment in $(VENV) (a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) setuptools
	touch $@

$(VENV)/demo.stamp: $(VENV)/python.stamp $(ON_CHANGE)
	$(BIN)/python $(INSTALL) --no-build-isolation -e '.[demo,triton]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/python.stamp $(ON_CHANGE)
	$(BIN)/python $(INSTALL) --no-build-isolation -e '.[dev]'
	touch $@

lint: $(VENV)/dev.stamp $(LINKS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(LINKS) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p fp8fx

# build/lib keeps files that were deleted since, and setuptools would pack them again.
wheel: $(VENV)/dev.stamp
	rm -rf build/lib build/bdist.* dist $(WHEEL_ENV)
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -c $(CONSTRAINTS) -w dist .
	$(PYTHON) -m venv $(WHEEL_ENV)
	$(WHEEL_ENV)/bin/python $(INSTALL) --no-compile dist/fp8fx-*.whl
	cd "$${TMPDIR:-/tmp}" && $(CURDIR)/$(WHEEL_ENV)/bin/python -I $(CURDIR)/.ci/smoke.py
	cd "$${TMPDIR:-/tmp}" && $(CURDIR)/$(WHEEL_ENV)/bin/fp8fx recipe list

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
