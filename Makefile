# Every target works in a fresh clone: the first one makes .venv and installs what constraints.txt pins.
# On a machine whose Python already has torch and triton (a GPU machine without a network, say): make gpu PY=python3

VENV ?= .venv
PY ?= $(VENV)/bin/python
ifeq ($(PY),$(VENV)/bin/python)
READY := $(VENV)/.ready
endif
PIP = $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint test-peers gpu report lock lock-3.6 mutate peers clean

demo: $(READY)
	$(PY) -m vit demo

test: $(READY)
	$(PY) -m pytest -n 2 --dist loadgroup

# Beside timm, transformers and torchvision; `make test` skips these cases where the libraries are missing.
test-peers: peers
	$(PY) -m pytest -n 2 --dist loadgroup -m peers

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

gpu: $(READY)
	$(PY) -m benchmarks.gpu

# From the result files alone. A machine without a network makes the table, and says that the plots are left out.
report: $(READY)
	-$(PIP) matplotlib
	$(PY) -m benchmarks.report $(ARGS)

lock: $(READY)
	$(PY) tests/lock.py --update

# The Triton that torch 2.11 brings, beside the one that is installed: everything must compile with it, too.
lock-3.6: $(READY) build/triton-3.6.0
	PYTHONPATH=build/triton-3.6.0 $(PY) tests/lock.py

build/triton-3.6.0: | $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==3.6.0

mutate: $(READY)
	$(PY) tests/mutate.py

# The libraries to compare with. torchvision's CPU build is not in the registry: its Python part alone is enough here.
peers: $(READY)
	$(PIP) --no-deps timm torchvision
	$(PIP) transformers huggingface_hub safetensors pyyaml

clean:
	rm -rf build dist .venv *.egg-info

$(VENV)/.ready: setup.py constraints.txt
	python3 -m venv $(VENV)
	$(PIP) -e ".[test]"
	touch $@
