"""Workers who meet at the driver's rendezvous, as threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sparksgd.peers.credentials import Credentials
from sparksgd.peers.mesh import Mesh, Rendezvous

HOST = "127.0.0.1"
ENDLESS_S = 3600.0
"""Longer than any test may take: what passes did not wait so long."""


class Company:
    """Some workers, each with its mesh, and the driver's rendezvous."""

    def __init__(self, count: int, *, encrypt: bool = False, timeout_s: float = 10) -> None:
        self.rendezvous = Rendezvous(
            run=b"a run...",
            num_workers=count,
            credentials=Credentials.new(encrypt=encrypt),
            host=HOST,
            listen_on=HOST,
            ports=None,
            timeout_s=timeout_s,
        )
        self.rendezvous.start()
        self.meshes = [Mesh() for _ in range(count)]

    def all(self, work: Callable[[int, Mesh], object]) -> list[object]:
        """Let all workers do something at once; return what they return, or raise."""
        results: list[object] = [None] * len(self.meshes)

        def one(worker: int) -> None:
            try:
                results[worker] = work(worker, self.meshes[worker])
            except Exception as error:
                results[worker] = error

        threads = [threading.Thread(target=one, args=(worker,)) for worker in range(len(self.meshes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def meet(self) -> list[object]:
        meeting = self.rendezvous.call()
        return self.all(lambda worker, mesh: mesh.meet(meeting, worker))

    def talk(self, step: int) -> list[object]:
        """Let every worker send its number to all others, and return what each has heard."""

        def one(worker: int, mesh: Mesh) -> list[int]:
            others = [rank for rank in range(len(self.meshes)) if rank != mesh.rank]
            heard = {rank: bytearray(1) for rank in others}
            own = memoryview(bytes([worker]))
            mesh.exchange(
                mesh.number,
                step,
                1,
                {rank: [own] for rank in others},
                {rank: [memoryview(room)] for rank, room in heard.items()},
            )
            assert all(mesh.workers[rank] == heard[rank][0] for rank in others)
            return sorted(heard[rank][0] for rank in others)

        return self.all(one)

    def close(self) -> None:
        self.rendezvous.close()
        for mesh in self.meshes:
            mesh.close()
