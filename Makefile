# sparksgd: `make run` trains LeNet on MNIST, `make test` passes the tests.  `make` lists all targets.

PYTHON ?= python3
VENV   := .venv
PINS   := conf/constraints.txt
BIN    := $(VENV)/bin
OUT    ?= runs/mnist-lenet
ARGS   ?=
MASTER ?= local[*]
READY  := $(VENV)/.installed
SPARK35_TESTS ?= tests/spark tests/test_jobs.py tests/test_readme.py

# Folders, too: one's time changes when a file of it goes.
SOURCES := $(filter-out %__pycache__/,$(wildcard sparksgd/ sparksgd/*/ sparksgd/py.typed sparksgd/*.py sparksgd/*/*.py))
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
CLASSES := dist/spark$(VENV:.venv%=%).jsa
WHEEL   := dist/sparksgd-$(VERSION)-py3-none-any.whl

export PATH := $(CURDIR)/$(BIN):$(PATH)

# Another Spark's, or another Python's, would be taken instead of those in .venv.
unexport SPARK_HOME SPARK_CONF_DIR PYSPARK_PYTHON PYSPARK_DRIVER_PYTHON

# Of an archive that is not there Java would take not even its own classes.
classes = $$([ ! -e '$(CLASSES)' ] || echo '-XX:SharedArchiveFile="$(CURDIR)/$(CLASSES)"')

ifneq ($(filter local%,$(MASTER)),)
export SPARK_LOCAL_IP ?= 127.0.0.1
endif

define check-python
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), but Python 3.11 or newer is needed:" \
	    "apt install python3.11 python3.11-venv, then make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments: apt install python3-venv" >&2; exit 1; }
endef

define check-java
	@java="$${JAVA_HOME:+$$JAVA_HOME/bin/}java"; \
	version=$$("$$java" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p'); \
	[ "$${version:-0}" -ge 17 ] || { \
	  echo "error: $$java is $${version:+version }$${version:-not there}, but Spark needs Java 17 or newer:" \
	    "apt install openjdk-17-jre-headless$${JAVA_HOME:+ (JAVA_HOME is $$JAVA_HOME)}" >&2; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help install warm run test test-spark35 soak test-cluster hadoop-jars check fix bench dist clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY) ## Make .venv with the pinned, tested versions

$(READY): pyproject.toml $(PINS)
	$(check-python)
	$(check-java)
	@echo "installing into $(VENV) (once; some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@awk -F == '!pinned[$$1]++' $(PINS) > $(VENV)/constraints.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt --editable '.[dev]'
	@touch $@

warm: $(CLASSES) ## Let Spark start some seconds sooner from then on (once; a minute, 190 MB)

$(CLASSES): $(READY)
	$(check-java)
	@echo "warming up: archiving Spark's classes in $@ (once; a minute)"
	@$(BIN)/python -m sparksgd.spark.warm_up $@

data/mnist/train.parquet data/mnist/test.parquet &: | $(READY)
	@$(BIN)/python jobs/prepare_data.py --dataset mnist --out data/mnist

run: $(READY) data/mnist/train.parquet data/mnist/test.parquet ## Train LeNet on MNIST; OUT=DIR ARGS='--set section.key=value'
	$(check-java)
	@SPARK_SUBMIT_OPTS="$$SPARK_SUBMIT_OPTS $(classes) "'-Dlog4j2.configurationFile="file:$(CURDIR)/conf/log4j2.properties"' \
	  spark-submit --master '$(MASTER)' --properties-file conf/spark-local.conf jobs/train.py --config conf/mnist-lenet.toml --out '$(OUT)' $(ARGS)

# Tests start Spark some dozens of times, each for seconds: Java's optimising compiler would never pay.
define pytest
	$(check-java)
	@[ -e '$(CLASSES)' ] || $(MAKE) --no-print-directory warm || true  # without, they only take longer
	@SPARK_SUBMIT_OPTS="$$SPARK_SUBMIT_OPTS $(classes) -XX:TieredStopAtLevel=1" $(BIN)/python -m pytest
endef

test: $(READY) ## Run the tests
	$(pytest) -m 'not soak and not cluster' $(TESTS)

test-spark35: ## Run the tests that start Spark on the oldest one that is supported; SPARK35_TESTS=... only some
	@$(MAKE) --no-print-directory test VENV=.venv-spark35 \
	  PINS='conf/constraints-spark35.txt conf/constraints.txt' TESTS='$(SPARK35_TESTS)'

soak: $(READY) ## Run the long tests: much data, many steps, killed executors, hosts of their own
	$(pytest) -m 'soak and not cluster' $(TESTS)

test-cluster: $(READY) data/mnist/train.parquet dist ## Run the tests on real servers: HDFS, YARN, a standalone cluster, a history server
	$(check-java)
	@$(BIN)/python tests/cluster/jars.py || true  # without them these tests are skipped, and say so
	@$(BIN)/python -m pytest -m cluster tests/cluster

hadoop-jars: $(READY) ## Fetch what test-cluster needs from Maven Central, unless SPARKSGD_HADOOP_JARS has it
	$(check-java)
	@$(BIN)/python tests/cluster/jars.py

check: $(READY) ## Lint and type-check
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

fix: $(READY) ## Format, and mend what ruff can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY) $(CLASSES) data/mnist/train.parquet ## Measure both engines against what one would use instead -> benchmark.json
	$(check-java)
	@SPARK_SUBMIT_OPTS="$$SPARK_SUBMIT_OPTS $(classes)" $(BIN)/python tests/bench/run.py --data data/mnist

dist: $(WHEEL) dist/sparksgd.zip dist/environment.tar.gz ## Build a wheel; and for clusters, sparksgd.zip and environment.tar.gz

# build/lib, which setuptools leaves, would keep modules that are gone.
$(WHEEL): $(SOURCES) pyproject.toml README.md | $(READY)
	@rm -rf build/lib
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@touch $@

dist/sparksgd.zip: $(SOURCES) | $(READY)
	@$(BIN)/python -m sparksgd.packing zip --out $@

dist/environment.tar.gz: pyproject.toml conf/constraints.txt sparksgd/packing.py | $(READY)
	@$(BIN)/python -m sparksgd.packing environment --out $@

clean: ## Remove what the targets made, except data/ and runs/
	rm -rf $(VENV) .venv-spark35 dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache spark-warehouse benchmark.json
