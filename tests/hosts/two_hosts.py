"""Runs a program as the driver of a standalone cluster of two worker hosts that are network namespaces.

    python two_hosts.py [--rate 1gbit] [--cores 1] [--memory 2g] [--properties FILE] FOLDER PROGRAM WORD...

The hosts have names that resolve to loopback, as Debian has them, an address on the bridge that
joins them with the driver, another that leads nowhere, and local directories that no other host sees.
What passed the links to the workers is left in FOLDER/links.json, as tc tells it.
Nothing of it outlives this process, which must be the first of a namespace of its own: see INSIDE.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from servers import start_server

INSIDE = [
    *("unshare", "--user", "--map-root-user", "--mount", "--net", "--uts", "--pid", "--fork"),
    *("--kill-child", "--mount-proc"),
]
"""Command that runs another one where two_hosts.py may run."""

PROBE = (
    "ip link add bridge type bridge && ip link add left type veth peer name right "
    "&& tc qdisc add dev left root tbf rate 1gbit burst 100kb latency 50ms"
)
"""Shell command that fails, inside, where such hosts cannot be made."""

DRIVER = "192.0.2.1"
WORKERS = {"worker1": "192.0.2.11", "worker2": "192.0.2.12"}
_NOWHERE = "198.51.100.1"
_BURST = ("burst", "100kb", "latency", "50ms")  # a large one would let a whole gradient pass at once


def run(*words: str) -> None:
    subprocess.run(words, check=True)


def worker_host(name: str, address: str, rate: str | None, local: Path) -> list[str]:
    """Make a host; return the command that runs another one on it."""
    holder = subprocess.Popen(["unshare", "--net", "--uts", "--mount", "sleep", "infinity"])
    theirs = Path(f"/proc/{holder.pid}/ns/net")
    while theirs.readlink() == Path("/proc/self/ns/net").readlink():
        time.sleep(0.01)
    on_host = ["nsenter", f"--target={holder.pid}", "--net", "--uts", "--mount"]
    run(*on_host, "mount", "-t", "tmpfs", "local", str(local))
    run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
    run("ip", "link", "set", name, "master", "bridge", "up")
    run(*on_host, "hostname", name)
    run(*on_host, "ip", "link", "set", "lo", "up")
    run(*on_host, "ip", "link", "add", "spare", "type", "veth", "peer", "name", "nowhere")
    for link, of in (("spare", _NOWHERE), ("eth0", address)):
        run(*on_host, "ip", "address", "add", f"{of}/24", "dev", link)
        run(*on_host, "ip", "link", "set", link, "up")
    if rate is not None:
        limit = ["root", "tbf", "rate", rate, *_BURST]
        run("tc", "qdisc", "add", "dev", name, *limit)
        run(*on_host, "tc", "qdisc", "add", "dev", "eth0", *limit)
    return on_host


def main() -> int:
    """Make the hosts, start the cluster, run the program; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", help="limit of each host's link, as tc has it")
    parser.add_argument("--cores", default="1", help="slots of each host")
    parser.add_argument("--memory", default="2g", help="for the executors of each host")
    parser.add_argument("--properties", help="Spark's settings of master and workers")
    parser.add_argument("folder", type=Path)
    parser.add_argument("program", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    (options.folder / "local").mkdir()
    names = options.folder / "hosts"
    names.write_text(f"127.0.0.1 localhost\n127.0.1.1 driver {' '.join(WORKERS)}\n")
    run("mount", "--bind", str(names), "/etc/hosts")
    run("hostname", "driver")
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "bridge", "type", "bridge")
    run("ip", "address", "add", f"{DRIVER}/24", "dev", "bridge")
    run("ip", "link", "set", "bridge", "up")
    settings = [] if options.properties is None else ["--properties-file", options.properties]
    environment = os.environ | {"SPARK_LOCAL_DIRS": str(options.folder / "local")}
    of_driver = ["--host", DRIVER, "--port", "0", *settings]
    _, master = start_server("Master", options.folder / "master.log", *of_driver, environment=environment)
    for name, address in WORKERS.items():
        host = worker_host(name, address, options.rate, options.folder / "local")
        of_worker = ["--host", address, "--cores", options.cores, "--memory", options.memory, *settings]
        of_worker += ["--work-dir", str(options.folder / name), master]
        log = options.folder / f"{name}.log"
        start_server("Worker", log, *of_worker, environment=environment, host=host)
    program = subprocess.run([*options.program, master], check=False)
    links = subprocess.run(["tc", "-s", "-j", "qdisc"], check=True, capture_output=True)
    (options.folder / "links.json").write_bytes(links.stdout)
    return program.returncode


if __name__ == "__main__":
    sys.exit(main())
