"""`share_out` on gloo ranks.

usage: share_ranks.py FOLDER WORLD BALANCE   (batches.pt) -> rank0.pt, rank1.pt, ...
"""

import sys
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from drama.balance import share_out
from drama.data.batches import RankBatch
from drama.data.packing import TokenRows


def work(rank: int, folder: Path, world: int, balance: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    values = torch.load(folder / "batches.pt")[rank]
    batch = RankBatch(**values | {"rows": TokenRows.of(values["rows"])})
    share = share_out(batch, balance=balance, group=None)
    stored = {f.name: getattr(share, f.name) for f in fields(share) if f.init}
    torch.save(stored, folder / f"rank{rank}.pt")
    dist.barrier()  # gloo aborts when a peer closes during teardown
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(
        work, (Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1"), nprocs=int(sys.argv[2])
    )
