# Needs git, make, a C++ compiler and Python 3.12 or 3.13 somewhere on PATH; .venv is made on the way.

SHELL_SCRIPTS := .ci/run $(shell find examples launch tests -name '*.sh' -o -name '*.sbatch')

# With pytest-xdist, test files run side by side, the longest first (tests/durations.json). The tests of a file stay
# together, because they share what was trained.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Where it is set, each process compiles torch and Megatron again, which takes longer than most tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo results docs test test-all test-faults test-slurm test-browser test-mergekit test-readers test-trackers test-trl test-harness test-kubernetes gpu-check dist check format venv lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: venv ## real text, base, two stages, export and report in runs/demo
	.venv/bin/python -m examples.demo

results: venv ## experiments on a pretrained model in runs/experiments; RESULTS="lora ffn" for these files only
	@launch/extend_venv.sh results
	.venv-results/bin/python -m examples.experiments $(RESULTS)

test: venv ## the tests that start no training: no network, no GPU
	.venv/bin/python -m pytest $(PARALLEL) tests/unit tests/launch

test-all: venv ## all tests that need neither network nor GPU; PYTEST=--store-durations records how long files take
	.venv/bin/python -m pytest $(PARALLEL) $(PYTEST)

test-faults: venv ## kills, damaged and hostile files, full disks; FAULTS="--seed 2 --minutes 60" for a longer one
	.venv/bin/python -m tests.faults $(FAULTS)

test-slurm: venv ## two pretend nodes of a real Slurm on this machine; as root, installs Debian's packages
	@launch/extend_venv.sh slurm
	.venv/bin/python -m pytest tests/slurm

test-browser: venv ## reports and the chat page in a real Chromium; as root, installs Debian's packages
	@launch/extend_venv.sh browser
	.venv-browser/bin/python -m pytest tests/browser

test-mergekit: venv ## upcycling against mergekit, which is installed into .venv-mergekit
	@launch/extend_venv.sh mergekit
	.venv/bin/python -m pytest tests/mergekit

test-trl: venv ## samples of conversations against TRL's, which is installed into .venv-trl
	@launch/extend_venv.sh trl
	.venv/bin/python -m pytest tests/trl

test-readers: venv ## exports in llama.cpp and MLX; downloads both (100 MB)
	@launch/extend_venv.sh readers
	.venv-readers/bin/python -m pytest tests/readers

test-trackers: venv ## MLflow and W&B, whose clients are installed into .venv-trackers (200 MB)
	@launch/extend_venv.sh trackers
	.venv-trackers/bin/python -m pytest tests/trackers

test-harness: venv ## benchmarks with lm-eval, which is installed into .venv-harness
	@launch/extend_venv.sh harness
	.venv-harness/bin/python -m pytest tests/unit/measure/evaluate/test_harness.py

test-kubernetes: venv ## manifests against the schemas of Kubernetes, which are installed into .venv-kubernetes
	@launch/extend_venv.sh kubernetes
	.venv-kubernetes/bin/python -m pytest tests/kubernetes

gpu-check: venv ## try tests, benchmarks and trainer on all GPUs of this machine
	launch/first_contact.sh

docs: venv ## the documentation as a site in build/site, with the API; installs its tools into .venv-docs
	@launch/extend_venv.sh docs
	.venv-docs/bin/python docs/build_site.py

dist: venv ## source archive and wheels for Python 3.12 and 3.13, as far as they are on PATH, each installed and tried
	rm -rf build/dist && .venv/bin/python -c 'import setuptools.build_meta as build; build.build_sdist("build/dist")'
	set -e; for version in 3.12 3.13; do \
		try=$$(mktemp --directory) && python$$version -m venv $$try || continue; \
		$$try/bin/pip wheel --quiet --no-deps --wheel-dir build/dist build/dist/*.tar.gz; \
		$$try/bin/pip install --quiet --constraint constraints.txt numpy psutil; \
		$$try/bin/pip install --quiet --no-deps build/dist/*-cp$$(echo $$version | tr -d .)-*.whl; \
		(cd $$try && bin/moelpr --help >/dev/null && bin/python -c 'from moelpr.data import _language_bits'); \
		rm -rf $$try; \
	done; ls -l build/dist

check: venv ## format, lint, types, imports and style
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m ruff check .
	.venv/bin/python -m mypy
	.venv/bin/lint-imports --no-cache --no-logo
	.venv/bin/python -m tests.support.house_style
	.venv/bin/shfmt --indent 4 --diff $(SHELL_SCRIPTS)
	.venv/bin/shellcheck $(SHELL_SCRIPTS)
	.venv/bin/hadolint Dockerfile launch/container/cuda.Dockerfile

format: venv ## format, and repair what lint can
	.venv/bin/python -m ruff format .
	.venv/bin/python -m ruff check --fix .
	.venv/bin/shfmt --indent 4 --write $(SHELL_SCRIPTS)

venv: ## make .venv, or bring it up to date
	@launch/make_venv.sh

LOCK := .venv/bin/uv pip compile --quiet --universal --python-version 3.12 --no-header --no-annotate --generate-hashes \
	--no-emit-index-url --no-emit-find-links

lock: venv ## write constraints.txt and requirements/; UPGRADE=--upgrade for the newest versions
	echo 'pillow<13 # for Gradio' | $(LOCK) $(UPGRADE) --extra dev setup.py - --output-file requirements/dev.txt
	sed -En 's/^(\S+==\S+) .*/\1/p' requirements/dev.txt >constraints.txt
	for group in $$(sed -n '/^\[dependency-groups\]/,/^$$/s/ = .*//p' pyproject.toml); do $(LOCK) $(UPGRADE) --group $$group \
		--constraint constraints.txt $$(sed 's/==.*//; s/^/--no-emit-package /' constraints.txt) \
		--output-file requirements/$$group.txt || exit; done

clean: ## remove caches and build leftovers; virtual environments and runs/ stay
	rm -rf build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +
