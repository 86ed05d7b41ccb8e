"""torch_distributor.py with what people add to it: a checkpoint after each epoch, from which it goes on.

    spark-submit torch_distributor_saving.py TRAIN.parquet ROWS_PER_WORKER EPOCHS PROCESSES FOLDER

FOLDER/progress says how many rows have been trained, for goodput.py.
"""

from __future__ import annotations

import sys

from measuring import LEARNING_RATE, MOMENTUM
from pyspark.ml.torch.distributor import TorchDistributor
from pyspark.sql import SparkSession


def train(path: str, rows: int, epochs: int, learning_rate: float, momentum: float, folder: str) -> float:
    """Train LeNet in one of several processes; return the last loss."""
    from pathlib import Path

    import torch
    import torch.distributed as dist
    from measuring import LENET
    from one_process import load
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    from sparksgd.models import LeNet

    def replace(name: str, write) -> None:  # type: ignore[no-untyped-def]  # as in a user's script
        write(Path(folder, f"{name}.new"))
        Path(folder, f"{name}.new").replace(Path(folder, name))

    dist.init_process_group("gloo")
    dataset = TensorDataset(*load(path))
    model = DistributedDataParallel(LeNet(**LENET))
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)
    first, saved = 0, Path(folder, "checkpoint.pt")
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epochs"]
    sampler: DistributedSampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=rows, sampler=sampler)
    for epoch in range(first, epochs):
        sampler.set_epoch(epoch)
        for step, (images, labels) in enumerate(loader, 1):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            if dist.get_rank() == 0 and step % 10 == 0:
                trained = epoch * len(dataset) + step * rows * dist.get_world_size()
                replace("progress", lambda file, trained=trained: file.write_text(str(trained)))
        if dist.get_rank() == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}
            replace(saved.name, lambda file, state=state: torch.save(state, file))
        dist.barrier()
    dist.destroy_process_group()
    return float(loss.detach())


def main(path: str, rows: str, epochs: str, processes: str, folder: str) -> None:
    """Start a session, train on its executors, and end it."""
    session = SparkSession.builder.appName("TorchDistributor").getOrCreate()
    distributor = TorchDistributor(num_processes=int(processes), local_mode=False, use_gpu=False)
    print(distributor.run(train, path, int(rows), int(epochs), LEARNING_RATE, MOMENTUM, folder))
    session.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
