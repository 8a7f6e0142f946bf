"""One of two gloo processes that audit a model whose parameters are shared out between them (FSDP2).

Usage: ``python -m tests.auditing.fsdp_worker RANK STORE_FILE``
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import cheapgrad
from cheapgrad import audit
from cheapgrad.sketch import RowSample
from tests.auditing import planted
from tests.auditing.planted import make_batch, make_network, mean_loss


def _make_model(convert: bool) -> nn.Module:
    torch.manual_seed(0)
    model = make_network(planted.exact)
    model[3] = nn.Linear(planted.H, planted.H)
    if convert:
        cheapgrad.approximate(model, cheapgrad.Rule("*", cotangent=RowSample(keep=0.5)), skip_small=False)
    return model


def main(rank: int, store_file: str) -> None:
    """Run the audits; an exception is the failure."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store_file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    batch = make_batch(seed=rank)
    sharded = _make_model(convert=True)
    fully_shard(sharded[3], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    report = audit(sharded, mean_loss, batch, group=torch.distributed.group.WORLD)
    print(report)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
