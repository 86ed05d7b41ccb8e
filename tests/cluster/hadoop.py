"""A Hadoop cluster of real servers on the loopback interface, for tests.

NameNode, DataNode, ResourceManager and two NodeManagers, each a process of its own, whose hosts are
127.0.0.2 and 127.0.0.3. Every port is chosen by the server that listens on it and read from what it
publishes, in the order in which others need it: NameNode and ResourceManager first, then who reports
to them. All files are in one folder, and no process outlives the one that started the cluster.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shlex
import sys
import urllib.error
import urllib.request
import xml.sax.saxutils
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jars import class_path, java, spark_jars
from servers import Process, kept, node_environment, stop, wait_for  # tests/hosts

__all__ = ["NODE_HOSTS", "NODE_MEMORY_MIB", "NODE_VCORES", "Hadoop"]

NODE_HOSTS = ("127.0.0.2", "127.0.0.3")
NODE_MEMORY_MIB = 6144
NODE_VCORES = 3
LOST_S = 10
"""A NodeManager that is silent for so long is lost; the ResourceManager looks every third of it."""

_ANY = "127.0.0.1:0"
_WEB_PORT = r"Jetty bound to port (\d+)"
_RM_PORTS = ("address", "scheduler.address", "resource-tracker.address", "admin.address")
_QUICK_JAVA = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"
_JAVA_OPTIONS = ("-Xmx256m", *_QUICK_JAVA.split(), "-XX:-UsePerfData")
_LOGGING = """\
rootLogger.level = {level}
rootLogger.appenderRef.console.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{{HH:mm:ss.SSS}} %p %c{{1}}: %m%n%ex
"""
_HDFS = """\
#!/bin/sh
# What Hadoop's own `hdfs` does, for the commands that tests and README need.
case "$1" in
  dfs) shift; exec {java} org.apache.hadoop.fs.FsShell "$@" ;;
  *) echo "hdfs: no such command here: $1" >&2; exit 2 ;;
esac
"""
_YARN = """\
#!/bin/sh
# What Hadoop's own `yarn` does, for the commands that tests and README need.
case "$1" in
  application|app|applicationattempt|container) exec {java} {cli}.ApplicationCLI "$@" ;;
  node) shift; exec {java} {cli}.NodeCLI "$@" ;;
  *) echo "yarn: no such command here: $1" >&2; exit 2 ;;
esac
"""

_CLI = "org.apache.hadoop.yarn.client.cli"

_HDFS_SITE = {
    "dfs.replication": "1",
    "dfs.namenode.http-address": _ANY,
    "dfs.namenode.safemode.extension": "0",
    "dfs.namenode.datanode.registration.ip-hostname-check": "false",  # a reverse look-up
    "dfs.namenode.resource.du.reserved": "0",  # or it is read-only on a disk that is almost full
    "dfs.datanode.address": _ANY,
    "dfs.datanode.http.address": _ANY,
    "dfs.datanode.ipc.address": _ANY,
    "dfs.datanode.hostname": "127.0.0.1",
    "dfs.client.block.write.replace-datanode-on-failure.enable": "false",  # there is one
    "dfs.heartbeat.interval": "1",
}
_YARN_SITE = {
    "yarn.resourcemanager.hostname": "127.0.0.1",
    "yarn.resourcemanager.webapp.address": _ANY,
    "yarn.resourcemanager.scheduler.class": (
        "org.apache.hadoop.yarn.server.resourcemanager.scheduler.capacity.CapacityScheduler"
    ),
    "yarn.resourcemanager.nodemanagers.heartbeat-interval-ms": "250",
    "yarn.resourcemanager.nodemanagers.heartbeat-interval-min-ms": "250",
    "yarn.nm.liveness-monitor.expiry-interval-ms": str(1000 * LOST_S),
    "yarn.scheduler.minimum-allocation-mb": "1",  # sizes are rounded up to multiples of it
    "yarn.scheduler.maximum-allocation-mb": str(NODE_MEMORY_MIB),
    "yarn.scheduler.maximum-allocation-vcores": str(NODE_VCORES),
    "yarn.nodemanager.resource.memory-mb": str(NODE_MEMORY_MIB),
    "yarn.nodemanager.resource.cpu-vcores": str(NODE_VCORES),
    "yarn.nodemanager.pmem-check-enabled": "true",
    "yarn.nodemanager.vmem-check-enabled": "false",
    # true, the default, leaves all to cgroups, also where there are none: nothing is ever killed
    "yarn.nodemanager.resource.memory.enforced": "false",
    "yarn.nodemanager.container-monitor.interval-ms": "500",
    "yarn.nodemanager.disk-health-checker.max-disk-utilization-per-disk-percentage": "100",
    "yarn.nodemanager.disk-health-checker.min-free-space-per-disk-mb": "0",
    "yarn.nodemanager.delete.debug-delay-sec": "0",
    # what containers get from their node; not admin-env, which appends to what Spark hands on itself
    "yarn.nodemanager.env-whitelist": "JAVA_HOME,PATH,LANG,TZ,SPARK_LOCAL_IP",
    "yarn.log-aggregation-enable": "false",  # container_logs reads them where they are written
}
_SCHEDULER = {
    "yarn.scheduler.capacity.root.queues": "default",
    "yarn.scheduler.capacity.root.default.capacity": "100",
    "yarn.scheduler.capacity.maximum-am-resource-percent": "0.5",
    "yarn.scheduler.capacity.resource-calculator": (
        "org.apache.hadoop.yarn.util.resource.DominantResourceCalculator"  # counts vcores, too
    ),
    "yarn.scheduler.capacity.node-locality-delay": "0",
}


class Hadoop:
    """A cluster in a folder, for the time of a `with` block.

    Attributes:
        conf_dir: what HADOOP_CONF_DIR names.
        environment: what `spark-submit`, `hdfs dfs` and `yarn application` must see, over this process's own:
            HADOOP_CONF_DIR, YARN_CONF_DIR, SPARK_CONF_DIR with `spark_settings` as defaults, and PATH.
        spark_settings: settings that save each submission the upload of Spark's jars, and half a minute of
            compiling them well: its processes share few cores, and end soon.
        default_fs: hdfs://127.0.0.1:PORT.
        namenode_web, rm_web: http://127.0.0.1:PORT.

    Raises:
        NoJars: the jars are not here; `with` has then started nothing.
        RuntimeError: a server does not come up; the message ends with its log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf_dir = folder / "conf"
        self.default_fs = self.namenode_web = self.rm_web = ""
        self.environment: dict[str, str] = {}
        options = {f"spark.{who}.extraJavaOptions": _QUICK_JAVA for who in ("driver", "executor", "yarn.am")}
        self.spark_settings = {"spark.yarn.jars": f"local:{spark_jars()}/*", **options}
        self._jars: Sequence[Path] = ()
        self._processes: dict[str, Process] = {}
        self._node_ids: dict[int, str] = {}

    def __enter__(self) -> Hadoop:
        self._jars = class_path()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all servers and containers."""
        stop(*self._processes.values())

    def log(self, server: str) -> str:
        """Return what a server logged: namenode, datanode, resourcemanager, nodemanager-0 or -1."""
        return (self.folder / f"{server}.log").read_text(errors="replace")

    # YARN

    def nodes(self, state: str = "RUNNING") -> list[dict[str, Any]]:
        """Return what the ResourceManager says of the NodeManagers in a state."""
        found = self._rest(f"/ws/v1/cluster/nodes?states={state}")["nodes"] or {}
        return found.get("node", [])

    def node_id(self, number: int) -> str:
        """Return the id, host:port, of a NodeManager; a restarted one has another."""
        return self._node_ids[number]

    def kill_node_manager(self, number: int) -> None:
        """Kill a NodeManager and all its containers, as if its host were gone; YARN notices later."""
        stop(self._processes[f"nodemanager-{number}"])

    def restart_node_manager(self, number: int) -> None:
        """Start a killed NodeManager anew; return when the ResourceManager counts it."""
        self._start_node_manager(number)
        self._await_node_manager(number)

    def wait_until_lost(self, number: int, timeout_s: float = 4 * LOST_S) -> None:
        """Return when the ResourceManager has noticed that a NodeManager is gone."""
        mine = self._node_ids[number]
        wait_for(
            lambda: mine in [node["id"] for node in self.nodes("LOST")],
            f"the loss of {mine}",
            timeout_s=timeout_s,
        )

    def applications(self) -> list[dict[str, Any]]:
        """Return what the ResourceManager says of all applications, the newest first."""
        found = (self._rest("/ws/v1/cluster/apps")["apps"] or {}).get("app", [])
        return sorted(found, key=lambda application: -application["startedTime"])

    def application(self, app_id: str) -> dict[str, Any]:
        """Return what the ResourceManager says of an application: state, finalStatus, diagnostics, ..."""
        return self._rest(f"/ws/v1/cluster/apps/{app_id}")["app"]

    def wait_for_application(self, app_id: str, *states: str, timeout_s: float = 60) -> dict[str, Any]:
        """Return an application once it is in one of some states; by default, once it has ended."""
        wanted = states or ("FINISHED", "FAILED", "KILLED")

        def reached() -> dict[str, Any] | None:
            found = self.application(app_id)
            return found if found["state"] in wanted else None

        return wait_for(reached, f"{app_id} {' or '.join(wanted)}", timeout_s=timeout_s)

    def kill_application(self, app_id: str) -> None:
        """Have the ResourceManager kill an application; return when it has."""
        who = f"user.name={getpass.getuser()}"
        self._rest(f"/ws/v1/cluster/apps/{app_id}/state?{who}", put={"state": "KILLED"})
        self.wait_for_application(app_id)

    def container_logs(self, app_id: str) -> dict[str, str]:
        """Return what each container of an application wrote, by the container's id."""
        found: dict[str, str] = {}
        for number in range(len(NODE_HOSTS)):
            of_node = self.folder / f"nodemanager-{number}" / "logs" / app_id
            for container in sorted(of_node.glob("container_*")):
                files = (file for file in sorted(container.iterdir()) if file.is_file())
                text = "".join(f"{file.name}:\n{file.read_text(errors='replace')}\n" for file in files)
                found[container.name] = text
        return found

    # HDFS

    def read(self, path: str) -> bytes:
        """Return what a file on HDFS holds."""
        try:
            return self._fetch(f"{self.namenode_web}/webhdfs/v1{path}?op=OPEN&user.name={getpass.getuser()}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise FileNotFoundError(path) from error
            raise

    def kill_name_node(self) -> None:
        """Kill the NameNode, as if its host were gone."""
        stop(self._processes["namenode"])

    def restart_name_node(self) -> None:
        """Start a killed NameNode anew, at the same address; return when it takes writes."""
        self._write_conf("namenode", fs=self.default_fs)
        self._start_name_node()
        self._await_storage()

    # how it starts

    def _start(self) -> None:
        self._write_tools()
        self._unpack_web_pages()
        names = self.folder / "name"
        self._write_conf("namenode", fs="hdfs://" + _ANY)
        formatting = self._server("namenode", "hdfs.server.namenode.NameNode", "-format", "-nonInteractive")
        self._write_conf("resourcemanager", fs="hdfs://" + _ANY, rm=dict.fromkeys(_RM_PORTS, _ANY))
        self._server("resourcemanager", "yarn.server.resourcemanager.ResourceManager")
        if formatting.wait(timeout=60) or not names.exists():
            raise RuntimeError(f"the NameNode cannot be formatted\n{self.log('namenode')}")
        self._start_name_node()
        self._write_conf("datanode", fs=self.default_fs)
        self._server("datanode", "hdfs.server.datanode.DataNode")

        web = self._logged("resourcemanager", _WEB_PORT)
        self.rm_web = f"http://127.0.0.1:{web}"
        self._logged("resourcemanager", r"(Transitioned to active state)")
        ports = {name: f"127.0.0.1:{self._rm_port(name)}" for name in _RM_PORTS}
        ports["webapp.address"] = f"127.0.0.1:{web}"
        self._rm = ports
        self._write_site(self.conf_dir, fs=self.default_fs, rm=ports)
        for number in range(len(NODE_HOSTS)):
            self._start_node_manager(number)

        self._await_storage()
        user = getpass.getuser()
        home = f"/webhdfs/v1/user/{user}?op=MKDIRS&user.name={user}"  # relative paths are below it
        self._get(self.namenode_web + home, put={})
        for number in range(len(NODE_HOSTS)):
            self._await_node_manager(number)

    def _start_name_node(self) -> None:
        self._server("namenode", "hdfs.server.namenode.NameNode")
        rpc = self._logged("namenode", r"NameNode RPC up at: \S*:(\d+)")
        self.default_fs = f"hdfs://127.0.0.1:{rpc}"
        web = self._logged("namenode", _WEB_PORT)
        self.namenode_web = f"http://127.0.0.1:{web}"

    def _await_storage(self) -> None:
        """Return when HDFS takes writes."""
        state = "/jmx?qry=Hadoop:service=NameNode,name=FSNamesystemState"
        self._await(
            "datanode",
            lambda: self._get(self.namenode_web + state)["beans"][0]["NumLiveDataNodes"] == 1,
        )
        safe = "/jmx?qry=Hadoop:service=NameNode,name=NameNodeInfo"
        self._await("namenode", lambda: not self._get(self.namenode_web + safe)["beans"][0]["Safemode"])

    def _server(self, name: str, of_class: str, *options: str) -> Process:
        """Start a server, in a folder of its own."""
        own = self.folder / name
        temporary = own / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        words = [*self._java(own / "conf", "info"), f"-Djava.io.tmpdir={temporary}"]
        words += [f"org.apache.hadoop.{of_class}", *options]
        foreign = ("HADOOP_", "YARN_")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        # host names need not resolve, and a driver in a container has no other way to know its address
        environment = node_environment(environment) | {"SPARK_LOCAL_IP": "127.0.0.1"}
        self._processes[name] = kept(words, self.folder / f"{name}.log", environment=environment)
        return self._processes[name]

    def _java(self, conf: Path, level: str) -> list[str]:
        """Return the command that runs a class of Hadoop, but for the class."""
        classes = os.pathsep.join(map(str, (conf, self.folder / "pages", *self._jars)))
        logging = f"-Dlog4j2.configurationFile={self.folder / f'log4j2-{level}.properties'}"
        return [java(), *_JAVA_OPTIONS, logging, "-cp", classes]

    def _start_node_manager(self, number: int) -> None:
        name, host = f"nodemanager-{number}", NODE_HOSTS[number]
        own = self.folder / name
        node = {
            "hostname": host,
            "bind-host": host,
            "local-dirs": str(own / "local"),
            "log-dirs": str(own / "logs"),
        }
        ports = ("address", "localizer.address", "webapp.address", "collector-service.address")
        node |= dict.fromkeys(ports, f"{host}:0")
        self._write_conf(name, fs=self.default_fs, rm=self._rm, node=node)
        self._server(name, "yarn.server.nodemanager.NodeManager")

    def _await_node_manager(self, number: int) -> None:
        name = f"nodemanager-{number}"
        self._node_ids[number] = self._logged(name, r"Registered with ResourceManager as (\S+) ")
        self._await(name, lambda: self._node_ids[number] in [node["id"] for node in self.nodes()])

    def _rm_port(self, name: str) -> str:
        """Ask the ResourceManager where it listens: its own configuration tells, once it does."""
        found = self._get(f"{self.rm_web}/conf?name=yarn.resourcemanager.{name}")
        port = found["property"]["value"].rpartition(":")[2]
        assert int(port), found
        return port

    def _logged(self, server: str, pattern: str) -> str:
        """Return what a server tells its log, as soon as it does."""
        found = self._await(server, lambda: re.search(pattern, self.log(server)))
        return found[1]

    def _await(self, server: str, ready: Any) -> Any:
        log = self.folder / f"{server}.log"
        return wait_for(ready, server, process=self._processes[server], log=log)

    def _rest(self, path: str, put: Mapping[str, str] | None = None) -> dict[str, Any]:
        return self._get(self.rm_web + path, put)

    @staticmethod
    def _get(url: str, put: Mapping[str, str] | None = None) -> dict[str, Any]:
        return json.loads(Hadoop._fetch(url, put))

    @staticmethod
    def _fetch(url: str, put: Mapping[str, str] | None = None) -> bytes:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        body = None if put is None else json.dumps(put).encode()
        method = "GET" if put is None else "PUT"
        request = urllib.request.Request(url, data=body, headers=headers, method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=30) as answer:
            return answer.read()

    # what it writes

    def _write_conf(self, server: str, **which: Any) -> None:
        self._write_site(self.folder / server / "conf", **which)

    def _write_site(
        self,
        folder: Path,
        *,
        fs: str,
        rm: Mapping[str, str] | None = None,
        node: Mapping[str, str] | None = None,
    ) -> None:
        """Write a folder of configuration: of all, and where NameNode and ResourceManager are."""
        folder.mkdir(parents=True, exist_ok=True)
        storage = {
            "dfs.namenode.name.dir": (self.folder / "name").as_uri(),
            "dfs.datanode.data.dir": (self.folder / "data").as_uri(),
        }
        resource_manager = {f"yarn.resourcemanager.{key}": value for key, value in (rm or {}).items()}
        node_manager = {f"yarn.nodemanager.{key}": value for key, value in (node or {}).items()}
        sites = {
            "core-site.xml": {
                "fs.defaultFS": fs,
                "hadoop.tmp.dir": str(self.folder / "tmp"),
                "hadoop.http.staticuser.user": getpass.getuser(),
            },
            "hdfs-site.xml": {**_HDFS_SITE, **storage},
            "yarn-site.xml": {**_YARN_SITE, **resource_manager, **node_manager},
            "capacity-scheduler.xml": _SCHEDULER,
        }
        for name, settings in sites.items():
            lines = [
                f"  <property><name>{key}</name><value>{xml.sax.saxutils.escape(value)}</value></property>\n"
                for key, value in settings.items()
            ]
            (folder / name).write_text(f"<configuration>\n{''.join(lines)}</configuration>\n")

    def _write_tools(self) -> None:
        """Write the commands, and what those who use the cluster must see."""
        for level in ("info", "warn"):
            (self.folder / f"log4j2-{level}.properties").write_text(_LOGGING.format(level=level))
        tools, spark = self.folder / "bin", self.folder / "spark-conf"
        tools.mkdir()
        spark.mkdir()
        command = shlex.join(self._java(self.conf_dir, "warn"))
        for name, script in (("hdfs", _HDFS), ("yarn", _YARN)):
            (tools / name).write_text(script.replace("{java}", command).replace("{cli}", _CLI))
            (tools / name).chmod(0o755)
        defaults = "".join(f"{key} {value}\n" for key, value in self.spark_settings.items())
        (spark / "spark-defaults.conf").write_text(defaults)
        path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self.environment = {
            "HADOOP_CONF_DIR": str(self.conf_dir),
            "YARN_CONF_DIR": str(self.conf_dir),
            "SPARK_CONF_DIR": str(spark),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "PYSPARK_PYTHON": sys.executable,
            "PATH": path,
        }

    def _unpack_web_pages(self) -> None:
        """Unpack the servers' web pages; else each server looks through whole jars, for seconds."""
        for jar in self._jars:
            if jar.name.startswith("hadoop-client-"):
                with zipfile.ZipFile(jar) as archive:
                    pages = [name for name in archive.namelist() if name.startswith("webapps/")]
                    archive.extractall(self.folder / "pages", pages)
