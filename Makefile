# `make book` is all a reader needs; every target makes .venv in this checkout first (once, some minutes, about 5 GB).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help book test smoke lint strip readme lock clean

PY := .venv/bin/python
NOTEBOOKS := notebooks/*.ipynb
STRIP := -m nbstripout --keep-id --extra-keys "metadata.papermill metadata.language_info cell.metadata.papermill cell.metadata.execution"
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive
export JUPYTER_PREFER_ENV_PATH := 1
unexport PYTHONPATH PYTHONHOME

help:     ## this list
	@sed -n 's/^\([a-z]*\): [^#]*##/  make \1 \t/p' Makefile

ifneq ($(file <.venv/.ready),$(CURDIR))
.PHONY: .venv/.ready        # the checkout was moved, or the environment is another one's: install again
endif
.venv/.ready: requirements/lock.txt requirements/bootstrap.txt pyproject.toml
	@bash .ci/venv

book: .venv/.ready     ## every notebook live at its smallest size, then the pages; prints the address to open
	@$(PY) -m frozenfilters book

smoke: .venv/.ready     ## only the live pass over the notebooks
	@$(PY) -c "from frozenfilters import render; render.run_smoke()"

lint: .venv/.ready     ## style of code and notebooks; notebooks hold no outputs but small marked ones
	@$(PY) -m ruff check .
	@$(PY) $(STRIP) --verify $(NOTEBOOKS) || { echo "notebooks hold outputs: make strip"; exit 1; }

strip: .venv/.ready     ## take the outputs out of the notebooks, but those of cells tagged keep_output
	@$(PY) $(STRIP) $(NOTEBOOKS)

test: lint     ## what the project's check runs: lint, notebooks, book, links, unit tests
	@rm -rf book/_build/smoke; mkdir -p book/_build/smoke book/_build/ipython/profile_default
	@echo 'c.IPKernelApp.log_level = 50' > book/_build/ipython/profile_default/ipython_kernel_config.py
	@echo "notebooks, live (nbval):"
	@FROZENFILTERS_RESULTS="$(CURDIR)/book/_build/smoke" IPYTHONDIR="$(CURDIR)/book/_build/ipython" \
	  $(PY) -m frozenfilters.warm $(PY) -m pytest -n 2 --dist loadfile --nbval-lax --nbval-kernel-name={kernel} --nbval-cell-timeout=300 notebooks | tee book/_build/nbval.log
	@$(PY) -c "from frozenfilters import render; render.stamp_smoke()"
	@$(PY) -m frozenfilters book
	@$(PY) .ci/links.py book/_build/html
	@$(PY) -m frozenfilters check
	@echo "unit tests and docstring examples:"
	@$(PY) -m pytest -n 2 --doctest-modules tests src | tee book/_build/pytest.log

readme: .venv/.ready     ## README's answer table, from rows and claims
	@$(PY) -c "from frozenfilters import pages, study; pages.readme_is_stale(study.root(), write=True)"

lock:     ## choose versions anew; the files name packages, versions and hashes, never a host
	@$(PY) -m uv pip compile pyproject.toml requirements/torch.in requirements/build.in --extra test --extra book --extra zoo --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-annotate --no-header -q -o requirements/lock.txt
	@echo uv | $(PY) -m uv pip compile - --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header -q -o requirements/bootstrap.txt
	@! grep -n '://' requirements/*.txt

clean:     ## forget everything built; the measured rows and .venv stay
	rm -rf book/_build book/chapters book/generated .pytest_cache .ruff_cache .hypothesis
