"""What all tests share: Spark on the loopback interface, modules that users might write, hosts to run on."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

MODULES = Path(__file__).parent / "modules"

os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")  # a host name need not resolve where tests run
os.environ["PYSPARK_PYTHON"] = sys.executable
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(MODULES), os.environ.get("PYTHONPATH")]))
sys.path[:0] = [str(MODULES), str(MODULES.parent / "hosts"), str(MODULES.parent / "cluster")]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C

pytest_plugins = ["cluster_fixtures"]  # not a conftest.py: tests import from the one of tests/spark
