# Everything a bare machine with Python 3.11 needs: `make demo` and `make test` set up .venv themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
# PyTorch's builds for plain CPUs and GPUs are large; these pins are what the suite is tested with.
TORCH := torch==2.14.1 torchvision==0.29.1
export HF_HUB_OFFLINE := 1
export WANDB_MODE := offline
export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-bert test lint types doors wheel bench clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(RUN) -m lightning_nas.recipes.demo_vit

demo-bert: $(VENV)/.installed
	$(RUN) -m lightning_nas.recipes.demo_bert

test: lint types doors
	$(RUN) -m pytest -q -rfE --durations=15 -n 2 --dist worksteal

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# lightning_nas.callbacks lies in callbacks/: only a real install shows it to mypy and import-linter. The built
# wheel is one, and so it is what is checked.
types: $(VENV)/.wheel
	cd $(VENV) && wheel/bin/python -m mypy --config-file ../pyproject.toml -p lightning_nas

doors: $(VENV)/.wheel
	cd $(VENV) && wheel/bin/python -c "from importlinter.cli import lint_imports_command as run; run()" ../pyproject.toml

wheel: $(VENV)/.wheel

# A fresh environment that holds the built wheel, beside the tools of the first one.
$(VENV)/.wheel: $(VENV)/.installed $(shell find lightning_nas callbacks recipes -name '*.py')
	rm -rf $(VENV)/dist $(VENV)/wheel build
	$(RUN) -m build --wheel --outdir $(VENV)/dist . > $(VENV)/build.log 2>&1 || (cat $(VENV)/build.log; exit 1)
	$(PYTHON) -m venv $(VENV)/wheel
	$(RUN) -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" > $(VENV)/first.txt
	cp $(VENV)/first.txt "$$($(VENV)/wheel/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/first_environment.pth"
	$(VENV)/wheel/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-installed $(VENV)/dist/*.whl
	rm -rf build
	cd $(VENV) && wheel/bin/python ../.ci/check_wheel.py "$$(wheel/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")"
	touch $@

bench: $(VENV)/.installed
	for script in benchmarks/bench_*.py; do $(RUN) $$script || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info
