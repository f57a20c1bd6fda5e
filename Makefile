# `make demo`, `make demo-full`, `make test` and `make stress` do everything on a fresh machine: each makes .venv first.
PY := .venv/bin/python

.venv/run: requirements.txt
	python3 -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@

demo: .venv/run
	PATH="$$PWD/.venv/bin:$$PATH" sh runs/demo.sh

demo-full: .venv/run
	PATH="$$PWD/.venv/bin:$$PATH" sh runs/demo.sh full

test: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2

stress: .venv/dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 -m stress

.PHONY: demo demo-full test stress
