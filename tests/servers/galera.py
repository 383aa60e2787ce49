"""A Galera cluster of MariaDB nodes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

from .mariadb import Node
from .ports import HOST, MissingProgram, ServerError, find_program, ports


class GaleraNode(Node):
    """One node. A cluster makes its nodes; it is no use alone."""

    kind = "galera"
    start_timeout = 90.0

    def __init__(self, cluster: GaleraCluster, name: str) -> None:
        super().__init__(name)
        self.cluster = cluster
        self.base_port = ports.reserve(4)  # for the group; IST; unused; SST
        self.isolated = False

    def command(self) -> list[str]:
        # The script that transfers a node's data fails without it, long after the start.
        find_program("rsync", package="rsync")
        base = f"{HOST}:{self.base_port}"
        provider_options = {
            "base_port": str(self.base_port),
            "gmcast.listen_addr": f"tcp://{base}",
            "ist.recv_addr": f"{HOST}:{self.base_port + 1}",
            "gcache.size": "16M",
            # Galera's defaults are for links between data centres: 5, 15 and 7.5 seconds.
            "evs.keepalive_period": "PT0.5S",
            "evs.suspect_timeout": "PT1.5S",
            "evs.inactive_timeout": "PT3S",
            "evs.install_timeout": "PT3S",
            # How long a node that was cut off is kept waiting at the door: 5 seconds by default.
            "gmcast.time_wait": "PT0.5S",
        }
        return [
            *super().command(),
            "--binlog-format=ROW",
            "--innodb-autoinc-lock-mode=2",
            "--wsrep-on=ON",
            f"--wsrep-provider={_provider()}",
            f"--wsrep-cluster-name={self.cluster.name}",
            f"--wsrep-cluster-address=gcomm://{','.join(self.cluster.members_to_join(self))}",
            f"--wsrep-node-name={self.name}",
            f"--wsrep-node-address={base}",
            "--wsrep-sst-method=rsync",
            f"--wsrep-sst-receive-address={HOST}:{self.base_port + 3}",
            "--wsrep-provider-options=" + ";".join(f"{k}={v}" for k, v in provider_options.items()),
        ]

    def ready(self) -> bool:
        return super().ready() and self.synced()

    def status(self) -> dict[str, str]:
        """The node's wsrep_… status variables, without that prefix."""
        rows = self.sql("SHOW GLOBAL STATUS LIKE 'wsrep_%'", timeout=5).splitlines()
        parts = (row.partition("\t") for row in rows)
        return {name[len("wsrep_") :]: value for name, _, value in parts}

    def synced(self) -> bool:
        """Whether the node can be used, as it says itself."""
        try:
            status = self.status()
        except ServerError:
            return False
        wanted = {"ready": "ON", "cluster_status": "Primary", "local_state": "4"}
        return all(status.get(name) == value for name, value in wanted.items())

    def provider_option(self, option: str) -> None:
        """Set an option of Galera's library at runtime: ``name=value``."""
        self.sql(f"SET GLOBAL wsrep_provider_options = '{option}'")

    def start(self, wait: bool = True) -> GaleraNode:
        if not self.running:
            self.isolated = False
        super().start(wait)
        return self

    def close(self) -> None:
        super().close()
        ports.release(self.base_port)

    def restore(self) -> None:
        self.cluster.restore()

    def restore_settings(self) -> None:
        """What a single node's restore() does; the cluster then brings the nodes together."""
        super().restore()


class GaleraCluster:
    """A cluster; ``with GaleraCluster() as cluster`` starts it."""

    def __init__(self, size: int = 3) -> None:
        self.name = f"tests-{time.monotonic_ns()}"
        self.nodes = [GaleraNode(self, f"galera-{n + 1}") for n in range(size)]

    def __iter__(self) -> Iterator[GaleraNode]:
        return iter(self.nodes)

    def __getitem__(self, index: int) -> GaleraNode:
        return self.nodes[index]

    def start(self) -> GaleraCluster:
        """Start all nodes, with Node.set_up's database and users. Takes some 5 seconds."""
        first, *others = self.nodes
        first.start()
        first.set_up()
        first.stop()
        # A node that joins with these data lacks a few events and gets these, in 3 s. With none
        # it would get a full copy of another node's data, in 8 s.
        for node in others:
            shutil.copytree(first.datadir, node.datadir)
            node.give(node.datadir)
            (node.datadir / "gvwstate.dat").unlink(missing_ok=True)
            node.prepared = True
        for node in self.nodes:  # one by one: two that join at once get in each other's way
            node.start()
        for node in self.nodes:
            node.remember_globals()
        return self

    def members_to_join(self, node: GaleraNode) -> list[str]:
        """The addresses of the nodes that a node shall look for; none: it makes a new cluster."""
        running = [other for other in self.nodes if other is not node and other.running]
        if not running:
            _allow_bootstrap(node)
        return [f"{HOST}:{other.base_port}" for other in running]

    def isolate(self, node: GaleraNode, timeout: float = 60.0) -> None:
        """Cut a node off from the others; it stays alive. Returns when it has noticed."""
        node.provider_option("gmcast.isolate=1")
        node.isolated = True
        _wait(lambda: node.status().get("ready") == "OFF", timeout, f"{node.name} did not notice")

    def wait_without(self, node: GaleraNode, timeout: float = 60.0) -> None:
        """Return when the other nodes have formed a cluster without this one."""
        others = [other for other in self.nodes if other is not node]
        for other in others:
            _wait(
                lambda status=other.status: status().get("cluster_size") == str(len(others)),
                timeout,
                f"{other.name} did not notice that {node.name} is gone",
            )

    def rejoin(self, node: GaleraNode, timeout: float = 60.0) -> None:
        """Let an isolated node back. Returns when it is in sync again."""
        node.provider_option("gmcast.isolate=0")
        node.isolated = False
        _wait(node.synced, timeout, f"{node.name} did not come back")

    def restore(self) -> None:
        """Make all nodes usable again, whatever was done to them."""
        for node in self.nodes:
            if node.running and node.frozen:
                node.thaw()
            if node.running and node.isolated:
                node.provider_option("gmcast.isolate=0")
                node.isolated = False
        running = [node for node in self.nodes if node.running]
        # A node that joins before the others know who is gone waits for ever.
        _wait(lambda: all(_knows(node, len(running)) for node in running), 30, "no agreement")
        if running and not any(node.synced() for node in running):
            # They cannot know that they are not the ones cut off, and wait for a word from us.
            running[0].provider_option("pc.bootstrap=1")
            _wait(lambda: all(node.synced() for node in running), 30, "the nodes are not in sync")
        for node in self.nodes:
            node.start()
        for node in self.nodes:
            node.restore_settings()
        _wait(lambda: all(node.synced() for node in self.nodes), 30, "the nodes are not in sync")

    def close(self) -> None:
        for node in self.nodes:
            node.close()

    def __enter__(self) -> GaleraCluster:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()


def _provider() -> Path:
    for folder in ("/usr/lib/galera", "/usr/lib64/galera-4", "/usr/lib64/galera"):
        library = Path(folder) / "libgalera_smm.so"
        if library.exists():
            return library
    raise MissingProgram("Galera is not installed. On Debian and Ubuntu: apt-get install galera-4")


def _allow_bootstrap(node: GaleraNode) -> None:
    """Let a node make a new cluster although it may not have been the last to stop."""
    state = node.datadir / "grastate.dat"
    if state.exists():
        state.write_text(state.read_text().replace("safe_to_bootstrap: 0", "safe_to_bootstrap: 1"))


def _knows(node: GaleraNode, size: int) -> bool:
    """Whether a node sees just so many nodes, and is either in sync with them or without quorum."""
    status = node.status()
    return status["cluster_size"] == str(size) and (
        status["cluster_status"] == "non-Primary" or node.synced()
    )


def _wait(condition: Callable[[], bool], timeout: float, complaint: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError(f"{complaint} within {timeout} s")
        time.sleep(0.05)
