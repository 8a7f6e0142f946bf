"""One of two processes that draw gradients of the table's representative rows under DDP and FSDP2.

Usage: ``python -m tests.contexts.distributed_worker RANK STORE_FILE RESULT_FILE``
"""

from __future__ import annotations

import sys

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cheapgrad.sketch import fusing, random
from tests.contexts.runners import converted_model, problem
from tests.contexts.table import ROWS, Row

RANKS = 2
DRAWS = 48


def wrap(context: str, model: nn.Module) -> nn.Module:
    """Return the model under DDP or FSDP2."""
    if context == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def averaged_gradient(model: nn.Module, wrapped: nn.Module, row: Row, share: float = 1.0) -> Tensor:
    """Return the weight gradient averaged over ranks, for `share` times the diagonal cotangent."""
    x, cotangent = problem(row, "cpu")
    weight = model.get_parameter(row.layer.parameter)
    weight.grad = None
    wrapped(x).backward(cotangent * share)
    gradient = weight.grad
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()


def own_gradients(context: str, row: Row, rank: int) -> list[Tensor]:
    """Return what each rank draws by itself from the same seed: the other one's cotangent is zero meanwhile."""
    drawn = []
    for turn in range(RANKS):
        model = converted_model(row, "cpu")
        wrapped = wrap(context, model)
        torch.manual_seed(5)
        drawn.append(RANKS * averaged_gradient(model, wrapped, row, share=float(rank == turn)))
    return drawn


def draw_row(context: str, row: Row, rank: int) -> dict[str, object]:
    """Return the draws of one row, and whether all ranks hold the same averaged gradient."""
    torch.manual_seed(3)
    model = converted_model(row, "cpu")
    wrapped = wrap(context, model)
    torch.manual_seed(4)
    draws = torch.stack([averaged_gradient(model, wrapped, row) for _ in range(DRAWS)])
    gathered = [torch.empty_like(draws) for _ in range(RANKS)]
    torch.distributed.all_gather(gathered, draws)
    return {
        "draws": draws,
        "synchronised": all(torch.equal(draws, other) for other in gathered),
        "own": own_gradients(context, row, rank),
    }


def main(rank: int, store_file: str, result_file: str) -> None:
    """Draw everything and let rank 0 write it."""
    torch.set_num_threads(1)
    # The table's layers are small: fused codecs are to run fused.
    fusing._LEAST = 0
    torch.distributed.init_process_group("gloo", init_method=f"file://{store_file}", rank=rank, world_size=RANKS)
    results = {}
    for context in ("ddp", "fsdp2"):
        for row in ROWS:
            if row.is_representative:
                results[context, row.name] = draw_row(context, row, rank)
    # The twin without the rank in its draws: both ranks then draw the same.
    random._salt = lambda: None
    results["unsalted"] = own_gradients("ddp", ROWS[0], rank)
    if rank == 0:
        torch.save(results, result_file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
