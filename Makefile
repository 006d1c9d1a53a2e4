# make quickstart   run the arms of the paper's Figure 2 on the digits data set, a few minutes on two CPU cores
# make quickstart-noise  those of Figure 3, with half of the labels resampled
# make test         run the tests
# make faults       kill and resume runs, stacks, ranks and sweeps 260 times; the results must be bit-identical
# make integration  run the tests that are slow or need a server
# make lint         check style
# make image-test build the Docker image without an engine and train in it (root on Debian, with buildah)
# make gpu-check    check the project on a GPU and measure its speed; with PYTHON=python3 without .venv and network
# make ui           open the MLflow UI of the local store
# make lock         compile the dependencies of pyproject.toml to requirements.txt
PYTHON ?= python3
PORT ?= 5000
BIN = .venv/bin

.PHONY: quickstart quickstart-noise test faults integration lint ui lock image-test gpu-check

quickstart: .venv/installed
	$(BIN)/composer -n 2 recipes/imp.py $(foreach arm,init all all_half random easy hard,-f yamls/digits_$(arm).yaml)

quickstart-noise: .venv/installed
	$(BIN)/composer -n 2 recipes/imp.py $(foreach arm,init noise50_all noise50_all_half noise50_random noise50_easy,-f yamls/digits_$(arm).yaml)

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not integration and not faults"

faults: .venv/installed
	KILLS=120 $(BIN)/python -m pytest -n 2 --dist worksteal tests/faults tests/runs tests/tracking tests/test_benchmarks.py tests/test_gpu_check.py

integration: .venv/installed
	$(BIN)/python -m pytest -m "integration and not faults" -rs --durations=15

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile

image-test: .venv/installed
	tests/image/run.sh

ifeq ($(origin PYTHON),command line)  # the machine's own PyTorch, without .venv
gpu-check:
	$(PYTHON) benchmarks/gpu_check $(OPTIONS)
else
gpu-check: .venv/installed
	$(BIN)/python benchmarks/gpu_check $(OPTIONS)
endif

ui: .venv/installed
	@case "$$MLFLOW_TRACKING_URI" in \
	http*) echo "the MLflow store is a server with its own UI: open MLFLOW_TRACKING_URI in a browser";; \
	*) exec $(BIN)/python -m lth_diet ui --port $(PORT);; \
	esac

lock: .venv/installed
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip compile -q --universal --python-version 3.10 --no-header --generate-hashes --all-extras pyproject.toml -o requirements.txt

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 12) or sys.exit( \
		f"This is Python {v[0]}.{v[1]}; lth_diet needs 3.10, 3.11 or 3.12: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@
