# `make` or `make help` lists the targets. Everything runs from .venv, which the first target that needs it sets up.
PYTHON = python3
LOCK = constraints.txt
# tools run as modules: pip's scripts break when the checkout's path has a space or the checkout moves
VENV = .venv/bin/python
READY = .venv/.ready

.PHONY: help run test test-long check figures bench lock lock-check clean

help:  ## list the targets
	@echo 'Targets (PYTHON=python3.12 chooses the interpreter that sets up .venv):'
	@sed -n 's/^\([a-z-]*\):[^#]*##  */  \1\t/p' Makefile | expand -t 14

run: $(READY)  ## the main job on the bundled digits data; ARGS='--rounds 5' adds options
	$(VENV) -m fedxmr.simulate --clients 3 --dataset digits $(ARGS)

test: $(READY)  ## the fast tests; ARGS='tests/unit -x' adds options
	$(VENV) -m pytest $(ARGS)

test-long: $(READY)  ## the slow tests
	$(VENV) -m pytest -m long $(ARGS) || [ $$? -eq 5 ]  # 5: no test is marked long

check: $(READY)  ## lint, format and types
	$(VENV) -m ruff check
	$(VENV) -m ruff format --check
	$(VENV) -m mypy

FIGURES = wikipedia fedcmr-figure3 fedcmr-gamma dlsl-figure2-alpha dlsl-figure2-beta mccn-figure2-lambda mccn-figure2-m \
          jfse-figure10-beta jfse-figure10-gamma jfse-figure10-lambda jfse-figure10-noise jfse-figure11a

figures: $(READY)  ## run the experiments in FIGURES, or what is missing of them, and draw their figures
	for name in $(FIGURES); do \
		$(VENV) -m fedxmr.reproduce experiments/$$name.yaml --figures experiments/figures/$$name $(ARGS) || exit; \
	done

# No stamp: start from an empty .venv. An outdated one: bring the packages up to date in place.
# The two variables pin the isolated build too: older pips read the first for it, pip 25.3 and later the second.
$(READY): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit("fedxmr needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is %d.%d: choose another with make PYTHON=..." % v[:2])'
	test -e $@ || $(PYTHON) -m venv --clear .venv
	PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK) $(VENV) -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

bench: $(READY)  ## time fedxmr against a bare loop and others, over an hour on a quiet machine; ARGS='metric start' chooses
	$(VENV) -m benchmarks $(ARGS)

lock: TORCH = $(shell sed -n 's/^torch==//p' $(LOCK))
lock:  ## renew constraints.txt: the newest versions that go together, with its torch (needs Python 3.11)
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 12) or sys.exit("the lock is made with Python 3.11, the oldest that it serves, but $(PYTHON) is %d.%d" % v[:2])'
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --upgrade setuptools
	build/lock/bin/python -m pip install 'torch==$(TORCH)' -e '.[dev]'
	build/lock/bin/python -m pip check
	build/lock/bin/python -m pip list --format=freeze --exclude pip --exclude fedxmr > build/lock/installed
	{ grep '^#' $(LOCK); sed -E -e '/^(nvidia|cuda|triton)/d' -e 's/[+].*//' build/lock/installed; } > build/$(LOCK)
	mv build/$(LOCK) $(LOCK)
	rm -rf build/lock

# The newest pip with fast-deps reads each wheel's metadata alone; earlier ones fetch whole wheels, torch's CUDA ones too.
lock-check:  ## see that constraints.txt resolves for PYTHON, installing nothing
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --quiet --upgrade pip
	PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK) build/lock/bin/python -m pip install --use-feature=fast-deps --dry-run -e '.[dev]'
	rm -rf build/lock

clean:  ## remove .venv, caches and build files; runs/ stays
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fedxmr clients server tests -name __pycache__ -prune -exec rm -rf {} +
