# make demo: the main job.  make test: all tests.  Both set up what they need.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3.10 || command -v python3)
VENV ?= .venv
# Named exactly, so that a machine with a CPU build of it at hand takes that.
TORCH ?= torch==2.13.0
OUT ?= out
BIN := $(VENV)/bin
SETUP := $(VENV)/.set-up

.PHONY: setup demo demo-tiny test emulate reliability compat census bench gpu study clean

setup: $(SETUP)

$(SETUP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo,test]"
	touch $@

demo: $(SETUP)
	$(BIN)/alps demo --out $(OUT)

demo-tiny: $(SETUP)
	$(BIN)/alps demo --out $(OUT) --tiny

# Two processes of one thread each; a file stays in one of them, so that a kernel is compiled once.
test: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore=tests/interpreted -m "not slow" -n 2 --dist loadfile
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreted -m "not slow" -n 2 --dist loadfile

# The kernel tests as compiled code, in the emulator of PTX whose folder PTXEMU names, and what only it can see; about
# 6 minutes. Without the faults that are planted for the interpreter, the tests of Triton's interpreter, and those of
# `projection`, of which tests/emulated has its own: each would be compiled anew.
emulate: $(SETUP)
	@test -d "$(PTXEMU)" || { echo "PTXEMU names no folder: make emulate PTXEMU=folder/of/the/emulator"; exit 2; }
	env -u TRITON_INTERPRET OMP_NUM_THREADS=1 PYTHONPATH=.:$(PTXEMU) \
	  $(BIN)/python -m pytest -p ptxplugin --noconftest -o addopts= -m "not slow" -n 2 --dist loadfile tests/interpreted \
	  --ignore-glob="*_faults.py" --ignore-glob="*_projection_kernel.py" --ignore=tests/interpreted/test_interpreter.py tests/emulated

# The faults that are tried, in one process, and docs/reliability.md from that run.
reliability: $(SETUP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore=tests/interpreted -m fault --write-reliability

# The fast tests with the oldest and newest versions, each in an environment of its own: gigabytes where torch comes with CUDA.
compat:
	python3 -m tests.compat

census: $(SETUP)
	$(BIN)/python -m tests.census --write-table

# Every benchmark with the baselines that can be had, then docs/results.md; BENCH=--quick takes about two minutes.
bench: $(SETUP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[bench]"
	OMP_NUM_THREADS=1 $(BIN)/python -m bench $(BENCH)
	$(BIN)/python -m bench.report

# The study of docs/evidence.md: PROFILE=cpu takes three hours of a core (started twice, the two share the cells), PROFILE=gpu is written
# for one GPU. It goes on where it stopped.
PROFILE ?= cpu
study: $(SETUP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[study]"
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.study run --profile $(PROFILE)
	$(BIN)/python -m bench.study report --profile $(PROFILE)

# On a machine with a GPU and an environment of its own (the python3 that holds torch): tests, sanitizer, benches, report.
gpu:
	python3 -m bench.gpu

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info
