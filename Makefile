# NVR: `make` lists the targets. Needs git, make and Python 3.11 or newer; everything else is fetched by `make setup`.
# All state lies in .nvr/, the two environments in .venv/ (what a task container holds) and .venv-airflow/.

PYTHON       ?= $(or $(shell for p in python3 python3.13 python3.12 python3.11; do \
                  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done),python3)
RECIPE       ?= demo
SET          ?=
AIRFLOW_PORT ?= 8080
MLFLOW_PORT  ?= 5000
CHROMIUM     ?= $(firstword $(shell command -v chromium chromium-browser google-chrome 2>/dev/null))
TORCH_BACKEND ?=# e.g. cpu or cu130: uv then takes torch from pytorch.org; empty: from the configured index

# uv does not read pip's settings; pass on what is set for pip, so that closed networks work without further setup.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
ifneq ($(PIP_INDEX_URL),)
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifneq ($(PIP_EXTRA_INDEX_URL),)
export UV_INDEX ?= $(PIP_EXTRA_INDEX_URL)
export UV_INDEX_STRATEGY ?= unsafe-best-match
endif
export UV_PYTHON_DOWNLOADS := never
export UV_NO_PROGRESS := 1

# Services and tests talk over loopback, never through a proxy. A star alone stands for all hosts, so it stays alone.
past_proxy = $(if $(findstring *,$(1)),$(1),$(if $(1),$(1)$(comma))127.0.0.1$(comma)localhost)
comma := ,
past_proxy_given := $(or $(no_proxy),$(NO_PROXY))
export NO_PROXY := $(call past_proxy,$(or $(NO_PROXY),$(past_proxy_given)))
export no_proxy := $(call past_proxy,$(past_proxy_given))

UV      := $(or $(shell command -v uv 2>/dev/null),.tools/bin/uv)
INSTALL := $(UV) pip install --quiet --constraint constraints.txt $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND))
LOCAL   := .venv-airflow/bin/python tools/local.py --airflow-port $(AIRFLOW_PORT) --mlflow-port $(MLFLOW_PORT)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo up down test test-published test-recipes test-docker test-k8s lint bench bench-docker verdicts lock clean images image-gpu compose-up compose-down

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.ready .venv-airflow/.ready ## build .venv (stages) and .venv-airflow; a second time costs nothing

demo: setup ## run the workflow once, in this terminal: make demo [RECIPE=demo] [SET="train.steps=20 mine.method=abs"] (no spaces within a value)
	@$(LOCAL) demo --recipe '$(RECIPE)' $(foreach pair,$(SET),--set '$(pair)')

up: setup ## start Airflow and MLflow on loopback and print where: make up [AIRFLOW_PORT=8080] [MLFLOW_PORT=5000]
	@$(LOCAL) up

down: ## stop what `make up` started
	@test ! -x .venv-airflow/bin/python || $(LOCAL) down

# Two queues side by side, about equally long: DAGs and what talks to real services, and the rest.
test: lint ## every check and test, in both environments
	@echo "» tests, and beside them those of DAGs and with real services (.nvr/test-services.log)"
	@{ .venv-airflow/bin/python -m pytest tests/integration/test_scheduler.py; dags=$$?; \
	    .venv-airflow/bin/python -m pytest tests/airflow; dags=$$((dags | $$?)); \
	    .venv/bin/python -m pytest tests/integration --ignore=tests/integration/test_scheduler.py --ignore=tests/integration/test_s3.py; \
	    exit $$((dags | $$?)); } > .nvr/test-services.log 2>&1 & services=$$!; \
	    .venv/bin/python -m pytest --ignore=tests/airflow --ignore=tests/integration; tasks=$$?; \
	    .venv/bin/python -m pytest tests/integration/test_s3.py; tasks=$$((tasks | $$?)); \
	    wait $$services; rest=$$?; cat .nvr/test-services.log; exit $$((tasks | rest))

test-published: setup ## all-MiniLM-L6-v2 on SciFact and NFCorpus below NVR_DATA, whole, sharded, killed and resumed: the published scores
	@NVR_PUBLISHED=1 .venv/bin/python -m pytest tests/integration/test_published.py

lint: setup ## ruff, mypy strict, import rules
	@echo "» ruff, mypy, import rules"
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/mypy --no-error-summary nvr_tasks tools/bench/*.py tools/verdicts/*.py tools/chart_docs.py helm/nvr/files/*.py
	@.venv/bin/mypy --no-error-summary --python-executable .venv-airflow/bin/python --follow-imports=silent dags tools/local*.py tools/process_tree.py tools/containers.py
	@.venv/bin/lint-imports --no-logo > .nvr/lint-imports.log 2>&1 || { cat .nvr/lint-imports.log; exit 1; }

test-recipes: setup ## every shipped recipe in miniature, from download to gate, each within two minutes (about ten together)
	@NVR_TEST_RECIPES=$(or $(NVR_TEST_RECIPES),timed) .venv/bin/python -m pytest tests/test_recipes.py

images: ## build the images nvr-tasks, nvr-airflow and nvr-mlflow on the Docker engine; wheels in docker/wheels/cpu win
	@$(PYTHON) tools/containers.py images

image-gpu: ## build nvr-tasks-gpu (several GB of CUDA; wants no GPU)
	@$(PYTHON) tools/containers.py image-gpu

compose-up: ## images, then Airflow, MLflow, PostgreSQL and S3 as containers on loopback; stages run as containers beside them
	@$(PYTHON) tools/containers.py up

compose-down: ## stop the containers of `make compose-up`; data stays in its volumes
	@$(PYTHON) tools/containers.py down

# The runner first: it needs no more than the base image. NVR_TEST_PATIENCE=3 triples the time limits on a busy machine.
test-docker: setup images ## the images, the docker runner and the whole workflow in containers, on a real Docker engine
	@NVR_TEST_DOCKER=1 .venv-airflow/bin/python -m pytest tests/containers/test_runner.py
	@NVR_TEST_DOCKER=1 .venv/bin/python -m pytest tests/containers/test_images.py tests/containers/test_compose.py

# On a cluster that does not share this machine's Docker engine: NVR_TEST_PULL=IfNotPresent NVR_TEST_VALUES=values.yaml (images in
# a registry) NVR_TEST_STAGE_IMAGE=… (made from tests/containers/nvr.Dockerfile).
test-k8s: setup $(if $(NVR_TEST_PULL),,images) ## the kubernetes runner and the chart on a real cluster: make test-k8s KUBECONFIG=FILE
	@test -n '$(KUBECONFIG)' || { echo 'error: which cluster? make test-k8s KUBECONFIG=FILE' >&2; exit 1; }
	@for tool in $(or $(HELM),helm) $(or $(KUBECTL),kubectl); do command -v $$tool >/dev/null || { echo "error: $$tool is not installed (or name it: HELM=…, KUBECTL=…)" >&2; exit 1; }; done
	@KUBECONFIG='$(KUBECONFIG)' NVR_TEST_K8S=1 .venv-airflow/bin/python -m pytest tests/cluster/test_runner.py
	@KUBECONFIG='$(KUBECONFIG)' NVR_TEST_K8S=1 .venv/bin/python -m pytest tests/cluster/test_chart.py

bench-docker: setup images ## what a stage costs as a container instead of a process: the table in docs/containers.md
	@.venv/bin/python tools/bench/overhead.py

verdicts: setup ## every verdict of the gate through scheduler, MLflow and UI, into docs/gate.md with screenshots (NVR_DATA; most of an hour)
	@$(INSTALL) --python .venv/bin/python playwright
	@.venv/bin/python tools/verdicts/story.py $(if $(CHROMIUM),--chromium '$(CHROMIUM)')

bench: setup ## measure speed and memory against the peers and write docs/benchmarks.md (about half an hour, on an idle machine), or one section: make bench [ONLY=Training]
	@.venv/bin/python tools/bench/run.py $(ONLY)

.PHONY: memory
memory: setup ## count the GPU memory that training a 7B recipe takes, without GPU and weights: make memory [ARGS="--no-checkpointing"]
	@.venv/bin/python tools/bench/memory.py $(ARGS)

.PHONY: chart-docs
chart-docs: setup ## write the table of values in helm/nvr/README.md from helm/nvr/values.yaml
	@.venv/bin/python tools/chart_docs.py

lock: | .nvr/uv.ready ## pin newly added packages in constraints.txt; pins that are there stay (delete a line to move it)
	@$(UV) pip compile --quiet --no-header --no-annotate --no-emit-index-url --no-emit-find-links --all-extras \
	    --constraint constraints.txt pyproject.toml | sed 's/+cpu$$//' > .nvr/constraints.new
	@cp .nvr/constraints.new constraints.txt
	@echo "» constraints.txt holds $$(grep -c == constraints.txt) pins"

clean: down ## remove both environments and all state in .nvr/ (artefacts, databases, logs)
	rm -rf .venv .venv-airflow .tools .nvr .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info

# ── environments ────────────────────────────────────────────────────────────────────────────────────────────────
# A stamp file per environment: rebuilt when what it is made of changes.

.venv/.ready: pyproject.toml constraints.txt | .nvr/uv.ready
	@echo "» building .venv: what a stage needs (torch, sentence-transformers, mteb, mlflow …)"
	@test -x .venv/bin/python || $(UV) venv --quiet --python $(PYTHON) .venv
	@$(INSTALL) --python .venv/bin/python -e '.[tasks,faiss-cpu,demo,dev]'
	@touch $@

.venv-airflow/.ready: pyproject.toml constraints.txt | .nvr/uv.ready .venv/.ready # in turn: both build the package in place
	@echo "» building .venv-airflow: Airflow and its providers"
	@test -x .venv-airflow/bin/python || $(UV) venv --quiet --python $(PYTHON) .venv-airflow
	@$(INSTALL) --python .venv-airflow/bin/python -e '.[airflow]' pytest pytest-timeout psutil
	@touch $@

.nvr/uv.ready:
	@mkdir -p .nvr
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("NVR needs Python 3.11 or newer, $(PYTHON) is %d.%d: make setup PYTHON=python3.11" % v[:2])'
	@command -v $(UV) >/dev/null 2>&1 || { \
	    echo "» fetching uv"; \
	    { $(PYTHON) -m venv .tools || $(PYTHON) -m virtualenv -q .tools; } > .nvr/uv.log 2>&1 \
	        || { cat .nvr/uv.log; echo "error: $(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv) or uv" >&2; exit 1; }; \
	    .tools/bin/python -m pip install --quiet uv || { echo "error: pip could not install uv: check the network, or PIP_INDEX_URL" >&2; exit 1; }; }
	@touch $@
