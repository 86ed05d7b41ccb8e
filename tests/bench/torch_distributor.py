"""What a user would submit instead: TorchDistributor and DistributedDataParallel, as pyspark documents them.

    spark-submit torch_distributor.py TRAIN.parquet ROWS_PER_WORKER EPOCHS PROCESSES

https://spark.apache.org/docs/latest/api/python/reference/api/pyspark.ml.torch.distributor.TorchDistributor.html
"""

from __future__ import annotations

import sys

from measuring import LEARNING_RATE, MOMENTUM
from pyspark.ml.torch.distributor import TorchDistributor
from pyspark.sql import SparkSession


def train(path: str, rows: int, epochs: int, learning_rate: float, momentum: float) -> float:
    """Train LeNet in one of several processes; return the last loss."""
    import torch
    import torch.distributed as dist
    from measuring import LENET
    from one_process import load
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    from sparksgd.models import LeNet

    dist.init_process_group("gloo")
    dataset = TensorDataset(*load(path))
    model = DistributedDataParallel(LeNet(**LENET))
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)
    sampler: DistributedSampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=rows, sampler=sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
    dist.destroy_process_group()
    return float(loss.detach())


def main(path: str, rows: str, epochs: str, processes: str) -> None:
    """Start a session, train on its executors, and end it."""
    session = SparkSession.builder.appName("TorchDistributor").getOrCreate()
    distributor = TorchDistributor(num_processes=int(processes), local_mode=False, use_gpu=False)
    print(distributor.run(train, path, int(rows), int(epochs), LEARNING_RATE, MOMENTUM))
    session.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
