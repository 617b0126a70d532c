# `make quickstart`, `make quickstart-t2i`, `make quickstart-cifar10`, `make test`; `make demo`,
# `make demo CLASSES="ship cat"` or `make demo-page`. Each sets up .venv; PYTHON=python3.12 picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
QUICKSTART ?= full
SHELL := /bin/bash

quickstart: $(VENV)/.installed
	@PATH="$(abspath $(VENV))/bin:$$PATH" bash examples/quickstart.sh classes $(QUICKSTART)

quickstart-t2i: $(VENV)/.installed
	@PATH="$(abspath $(VENV))/bin:$$PATH" bash examples/quickstart.sh captions $(QUICKSTART)

quickstart-cifar10: $(VENV)/.installed
	@PATH="$(abspath $(VENV))/bin:$$PATH" bash examples/quickstart.sh cifar10 $(QUICKSTART)

demo: $(VENV)/.installed
	@"$(abspath $(VENV))/bin/python" examples/demo.py $(CLASSES)

demo-page: $(VENV)/.installed
	@"$(abspath $(VENV))/bin/python" examples/demo.py --page

test: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal

# Made again when the requirements change, or when PYTHON= asks for another interpreter.
ifneq ($(origin PYTHON),file)
ifneq ($(shell cat $(VENV)/.installed 2>/dev/null),$(shell $(PYTHON) -c 'import sys; print(sys.version)' 2>/dev/null))
.PHONY: $(VENV)/.installed
endif
endif
$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"error: Python >= 3.10 is needed, {sys.executable} is {sys.version.split()[0]}; give another with PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(PYTHON) -c 'import sys; print(sys.version)' > $@

.PHONY: quickstart quickstart-t2i quickstart-cifar10 demo demo-page test
