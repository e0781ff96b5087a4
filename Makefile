# Every target works in a fresh clone: the first one makes .venv and installs what constraints.txt pins.
# On a machine whose Python already has torch and triton (a GPU machine without a network, say): make gpu PY=python3

VENV ?= .venv
PY ?= $(VENV)/bin/python
ifeq ($(PY),$(VENV)/bin/python)
READY := $(VENV)/.ready
endif
PIP = $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint test-peers test-suites gpu bench roofline cycles memory report profile tune bench-smoke \
	lock lock-3.6 mutate peers clean

demo: $(READY)
	$(PY) -m vit demo

test: $(READY)
	$(PY) -m pytest -p no:benchmark -n 2 --dist loadgroup

# Beside timm, transformers and torchvision; `make test` skips these cases where the libraries are missing.
test-peers: peers
	$(PY) -m pytest -p no:benchmark -n 2 --dist loadgroup -m peers

# Tests that timm's and transformers' source packages carry, and our restatement of them: what passes on an untouched
# model passes on an accelerated one. Nothing of theirs is kept here; without a network only the restatement runs.
test-suites: peers
	-$(PIP) parameterized
	-@test -d build/suites || $(MAKE) --no-print-directory build/suites
	$(PY) -m pytest -p no:benchmark -n 2 tests/suites/suite_*.py

build/suites: | $(READY)
	rm -rf build/sdists && mkdir -p build/sdists
	$(PY) -m pip download --quiet --disable-pip-version-check -c constraints.txt --no-deps \
		--no-binary timm,transformers --dest build/sdists timm transformers \
		|| { echo "no source packages of timm and transformers (no network?): without the tests that they carry"; exit 1; }
	for file in build/sdists/*.tar.gz; do tar -xzf $$file -C build/sdists || exit 1; done
	mv build/sdists $@

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

gpu: $(READY)
	$(PY) -m benchmarks.gpu

# Speed, on a GPU: make bench ARGS=--quick, or one point: make bench ARGS="--op attention --shape vit_base_patch16_224/b8"
bench: $(READY)
	$(PY) -m benchmarks $(ARGS)

# Predictions, no GPU: make roofline ARGS="--shape vit_base_patch16_224/b256 --arch 90"
roofline: $(READY)
	$(PY) -m benchmarks.roofline $(ARGS)

# A cycle model of the compiled kernels, no GPU: make cycles ARGS="--kernel attention", in a minute; a model takes three
cycles: $(READY)
	$(PY) -m benchmarks.cycles $(ARGS)

# Counted, no GPU: make memory ARGS="--shape vit_base_patch16_224/b256 --largest 79"
memory: $(READY)
	$(PY) -m benchmarks.memory $(ARGS)

# README's table and the plots, from the files in benchmarks/results; without any README says that nothing is measured.
# A machine without a network makes the table, and says that the plots are left out.
report: $(READY)
	-$(PIP) matplotlib
	$(PY) -m benchmarks.report $(ARGS)

profile: $(READY)
	$(PY) -m benchmarks.profile $(ARGS)

# Other configurations of an op than the pinned one: make tune OP=mlp, or make tune OP=attention ARGS="--budget 120".
# OP=gemm: each product of a block, which form of the kernel, which GELU, beside cuBLAS.
tune: $(READY)
	$(PY) -m benchmarks.tune $(OP) $(ARGS)

# All of the above, small, without a GPU: that it runs. Nothing is measured but the CPU path by pytest-benchmark.
bench-smoke: $(READY)
	$(PIP) matplotlib
	$(PY) -m benchmarks --rehearse
	$(PY) -m pytest benchmarks --benchmark-only --benchmark-columns=median -q
	$(PY) -m benchmarks.roofline --shape vit_tiny_patch16_224/b64 --arch 90
	$(PY) -m benchmarks.cycles --shape vit_tiny_patch16_224/b64 --kernel layer_norm_fwd
	$(PY) -m benchmarks.memory --shape vit_tiny_patch16_224/b64
	$(PY) -m benchmarks.tune layer_norm --limit 2
	$(PY) -m benchmarks.tune gemm_fc1 --limit 2
	$(PY) -m benchmarks.profile --top 10
	$(PY) -m benchmarks.report --check
	$(PY) -m pytest tests/benchmarks/test_bench_report.py -q -k "plots or bars"

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
