"""Memory that was freed stays with the process that trains."""

import os
import subprocess
import sys

HOLD_THEN_TELL = """
import sys
import torch
from drama.memory import keep_freed_memory

keep_freed_memory()
from torch.utils.tensorboard import SummaryWriter


def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20


writer = SummaryWriter(sys.argv[1])
writer.add_scalar("warm", 0.0, 0)
blocks = [torch.ones(2**16) for _ in range(400)]  # 100 MiB in pieces
del blocks[::2], blocks
before = resident_mib()
for step in range(3000):
    writer.add_scalar("loss", 1.0, step)
writer.close()
print(before - resident_mib())
"""


def test_events_do_not_trim_the_heap(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PROTOCOL_BUFFERS")}
    run = subprocess.run(
        [sys.executable, "-c", HOLD_THEN_TELL, str(tmp_path)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(run.stdout) < 10  # MiB given back, of 100
