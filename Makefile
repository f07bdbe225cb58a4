# make test   sets everything up, then checks formatting, style, types and tests
# make demo   runs the demonstration
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
RUN := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: test nightly demo wheel format clean

test: $(VENV)/dev.stamp
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy -p rgc
	HYPOTHESIS_PROFILE=ci $(RUN) -m pytest -n $(JOBS)

nightly: $(VENV)/dev.stamp
	HYPOTHESIS_PROFILE=nightly $(RUN) -m pytest -n $(JOBS)

demo: $(VENV)/demo.stamp
	$(RUN) examples/demo.py

wheel: $(VENV)/dev.stamp
	rm -rf build dist
	$(RUN) -m build --no-isolation
	$(RUN) -m pytest -q tests/test_packaging.py
	@ls -l dist

format: $(VENV)/dev.stamp
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch and torchvision go through one pip call, so that the resolver picks releases made for each other.
$(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/python
	@echo "Installing rgc[$*] into $(VENV): torch alone is a few gigabytes, so the first time takes minutes."
	$(RUN) -m pip install --progress-bar on -e ".[$*]"
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "rgc needs Python 3.11 or newer, and $(PYTHON) is not: run 'make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
