"""Data-parallel training of a digit classifier with PyTorch, telemetry included: a plain DDP loop.

    torchrun --nproc-per-node 2 examples/torch_ddp.py
    torchrun --nproc-per-node 2 examples/torch_ddp.py --slow-rank 1 --slow-by 0.03
    stepspan report stepspan-runs

Needs torch and scikit-learn, whose digits it learns; on GPUs it talks NCCL, otherwise gloo. OTEL_EXPORTER_OTLP_ENDPOINT
says where to deliver. The slow rank takes longer to compute, and both ranks' steps take equally long all the same,
because the other one waits. What tells them apart is the wait in the all-reduce:
`bottomk(1, avg by (rank) (avg_over_time(training_step_wait_seconds{split="train"}[5m])))`.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import stepspan
from stepspan.integrations.torch import watch_collectives


def main(options: argparse.Namespace) -> None:
    """One rank's training."""
    cuda = torch.cuda.is_available()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(7)

    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16.0
    labels = torch.tensor(digits.target)
    held_out = len(labels) // 5
    train = TensorDataset(pixels[held_out:], labels[held_out:])
    validation = TensorDataset(pixels[:held_out], labels[:held_out])
    sampler = DistributedSampler(train, seed=7)
    loader = DataLoader(train, batch_size=options.batch_size, sampler=sampler)

    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device),
        device_ids=[device] if cuda else None,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)
    loss_of = nn.CrossEntropyLoss()

    with stepspan.start_run(name="digits-ddp", tags=["example"]) as run:
        watch_collectives(model, run)
        run.log_hyperparams({**vars(options), "optimizer": "SGD", "model": "mlp-128"})
        run.set_total_steps(options.epochs * len(loader))
        for epoch in range(options.epochs):
            sampler.set_epoch(epoch)
            with run.epoch(epoch):
                for x, y in run.steps(loader, samples=lambda batch: len(batch[0])):
                    with run.span("forward", cuda=cuda):
                        loss = loss_of(model(x.to(device)), y.to(device))
                        if rank == options.slow_rank:
                            time.sleep(options.slow_by)
                    with run.span("backward", cuda=cuda):
                        optimizer.zero_grad()
                        loss.backward()
                    with run.span("optimizer", cuda=cuda):
                        optimizer.step()
                    run.log_metrics({"loss": loss, "learning_rate": options.lr})  # a CUDA tensor: nobody waits for it
                accuracy = evaluate(run, model.module, validation, device)
            if rank == 0:
                print(f"epoch {epoch + 1}/{options.epochs}  accuracy {accuracy:.1%}", flush=True)
        if rank == 0:
            with run.span("checkpoint"):
                options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
                torch.save(model.module.state_dict(), options.checkpoint)
            run.log_artifact("model", options.checkpoint, kind="checkpoint")
    dist.destroy_process_group()


def evaluate(run: stepspan.Run, model: nn.Module, data: TensorDataset, device: torch.device) -> float:
    """The accuracy on data that every rank has the whole of."""
    right = 0
    for x, y in run.steps(DataLoader(data, batch_size=len(data)), split="val"):
        with torch.no_grad():
            output = model(x.to(device))
        right += int((output.argmax(1).cpu() == y).sum())
        loss = nn.functional.cross_entropy(output.cpu(), y)
        run.log_metrics({"loss": loss, "accuracy": right / len(data)})
    return right / len(data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--checkpoint", type=Path, default=Path("stepspan-runs/digits.pt"))
    parser.add_argument("--slow-rank", type=int, help="this rank takes longer to compute ...")
    parser.add_argument("--slow-by", type=float, default=0.03, help="... by so many seconds a step")
    main(parser.parse_args())
