# sparksgd: `make run` trains LeNet on MNIST, `make test` runs the tests.  `make` lists all targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= runs/mnist-lenet
ARGS   ?=
MASTER ?= local[*]
READY  := $(VENV)/.installed
SPARK35 := .venv-spark35
SPARK35_TESTS ?= tests/spark tests/test_jobs.py tests/test_readme.py
ONLY   ?= cluster
OF_CHECK := --ignore=tests/test_rooms.py --ignore=tests/test_purity.py

# Folders are in the list, too: a folder's time changes when a file in it is removed.
SOURCES := $(filter-out %__pycache__/,$(wildcard sparksgd/ sparksgd/*/ sparksgd/*/*/ sparksgd/py.typed sparksgd/*.py sparksgd/*/*.py sparksgd/*/*/*.py))
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
CLASSES := dist/spark.jsa
WHEEL   := dist/sparksgd-$(VERSION)-py3-none-any.whl

export PATH := $(CURDIR)/$(BIN):$(PATH)

# Otherwise another Spark or Python would be used instead of those in .venv.
unexport SPARK_HOME SPARK_CONF_DIR PYSPARK_PYTHON PYSPARK_DRIVER_PYTHON

# Otherwise each of the many processes would compile our files, and the tests, anew.
unexport PYTHONDONTWRITEBYTECODE

# Only if the archive exists: given a missing one, Java would not even use the archive of its own classes.
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
.PHONY: help install warm run test-quick test test-all soak test-spark35 test-cluster hadoop-jars check fix bench goodput faults dist clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY) ## Make .venv with the pinned, tested versions

$(READY): pyproject.toml conf/constraints.txt
	$(check-python)
	$(check-java)
	@echo "installing into $(VENV) (once; some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint conf/constraints.txt --editable '.[dev]'
	@touch $@

# All but Spark is that of .venv: to install it again would take a minute.
$(SPARK35)/.installed: conf/constraints-spark35.txt $(READY)
	@echo "installing the oldest Spark into $(SPARK35) (once)"
	@$(VENV)/bin/python -m venv --clear --without-pip $(SPARK35)
	@$(VENV)/bin/pip --python $(SPARK35)/bin/python install --quiet --disable-pip-version-check --no-deps --ignore-installed --requirement $<
	@$(VENV)/bin/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  > "$$($(SPARK35)/bin/python -c 'import site; print(site.getsitepackages()[0])')/of_venv.pth"
	@touch $@

warm: $(CLASSES) ## Make Spark start some seconds sooner (run it once; a minute, 190 MB)

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

# Tests start few JVMs, for some minutes each.  Java's optimising compiler, an archive of Spark's classes, and collectors
# of garbage that run beside the rest, would cost more than they save.
define pytest
	$(check-java)
	@SPARK_SUBMIT_OPTS="$$SPARK_SUBMIT_OPTS $(classes) -XX:TieredStopAtLevel=1 -XX:+UseSerialGC" $(BIN)/python -m pytest
endef

test-quick: $(READY) ## Run the tests that need no JVM (a minute)
	@$(BIN)/python -m pytest -m 'not jvm and not soak and not cluster' $(TESTS)

test: $(READY) ## Run the quick tests and those that share a few Spark sessions (6 minutes); TESTS=... runs some of them
	$(pytest) --numprocesses 2 --dist loadgroup -m 'not soak and not cluster' $(OF_CHECK) $(TESTS)

test-all: ## Run every test: test, soak, test-cluster, test-spark35 (before a piece of work is called done)
	$(MAKE) check
	$(MAKE) test
	$(MAKE) soak
	$(MAKE) test-cluster
	$(MAKE) test-spark35

test-spark35: $(SPARK35)/.installed ## Run the tests of Spark on the oldest version that is supported; SPARK35_TESTS=... runs some of them
	@$(MAKE) --no-print-directory test BIN=$(SPARK35)/bin CLASSES=dist/spark-spark35.jsa TESTS='$(SPARK35_TESTS)'

soak: $(READY) ## Run the long tests: much data, many steps, killed executors, several hosts
	@$(BIN)/python -c 'import grpc, zstandard' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check \
	  --constraint conf/constraints.txt --editable '.[connect]'
	$(pytest) -m 'soak and not cluster' $(TESTS)

test-cluster: $(READY) data/mnist/train.parquet dist ## Run the tests on real servers: HDFS, YARN, standalone, history; ONLY=gate runs a few
	$(check-java)
	@$(BIN)/python tests/cluster/jars.py || true  # without the jars these tests are skipped, and say so
	@$(BIN)/python -m pytest -m 'cluster and $(ONLY)' tests/cluster

hadoop-jars: $(READY) ## Fetch the jars of test-cluster from Maven Central, unless SPARKSGD_HADOOP_JARS has them
	$(check-java)
	@$(BIN)/python tests/cluster/jars.py

check: $(READY) ## Lint, type-check, and check the rooms: who imports whom, what is public, how long files are
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest --durations=0 --durations-min=9 tests/test_rooms.py tests/test_purity.py

fix: $(READY) ## Format, and fix what ruff can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY) $(CLASSES) data/mnist/train.parquet ## Measure both engines against what you would use instead -> benchmark.json
	$(check-java)
	@SPARK_SUBMIT_OPTS="$$SPARK_SUBMIT_OPTS $(classes)" $(BIN)/python tests/bench/run.py --data data/mnist

goodput: $(READY) data/mnist/train.parquet ## Measure what is left of the speed where things are killed -> goodput.json (40 minutes)
	$(check-java)
	@$(BIN)/python tests/bench/goodput.py --data data/mnist

faults: $(READY) ## Strike trainings with 17 kinds of faults -> tests/FAULTS.md; ARGS='--only WORD...' runs some
	$(check-java)
	@$(BIN)/python tests/faults/run.py $(ARGS)

dist: $(WHEEL) dist/sparksgd.zip dist/environment.tar.gz ## Build a wheel, and what travels to clusters: sparksgd.zip and environment.tar.gz

# setuptools leaves build/lib behind, which would bring removed modules into the wheel.
$(WHEEL): $(SOURCES) pyproject.toml README.md | $(READY)
	@rm -rf build/lib
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@touch $@

dist/sparksgd.zip: $(SOURCES) | $(READY)
	@$(BIN)/python -m sparksgd.cli.packing zip --out $@

dist/environment.tar.gz: pyproject.toml conf/constraints.txt sparksgd/cli/packing.py sparksgd/cli/packing_trial.py | $(READY)
	@$(BIN)/python -m sparksgd.cli.packing environment --out $@

clean: ## Remove what the targets made, except data/ and runs/
	rm -rf $(VENV) $(SPARK35) dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache spark-warehouse benchmark.json
