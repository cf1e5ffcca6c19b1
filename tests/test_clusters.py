"""Two "nodes" on this machine, started as on a cluster, give what two ranks of one node give."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drama.distributed import free_port

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "launchers" / "train.py"
BIN = Path(sys.executable).parent


def run_nodes(commands: list[list[str]]) -> None:
    """All nodes at once, until the last one is done; each has its share of the cores, as the two
    ranks of one node have: sums of as many threads are the same to the last bit."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // len(commands))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONSAFEPATH": "1"}
    nodes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            preexec_fn=partial(os.sched_setaffinity, 0, cores[node * share :][:share] or cores),
        )
        for node, command in enumerate(commands)
    ]
    try:
        for node in nodes:
            said = node.communicate(timeout=300)[0]
            assert node.returncode == 0, said[-3000:]
    finally:
        for node in nodes:
            node.kill()


def same_run(one: Path, other: Path) -> None:
    """Losses and gradient norms of every step, and the weights, to the last bit."""
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, other)
    ]
    for ours, theirs in zip(*lines, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    weights = [load_file(run / "model" / "model.safetensors") for run in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_deepspeed_on_two_nodes(world, tmp_path):
    """The launcher's own way for clusters without ssh: the same line on each node, but its rank."""
    hosts = tmp_path / "hosts"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    port = str(free_port())
    run_nodes(
        [
            [
                str(BIN / "deepspeed"), "--hostfile", str(hosts), "--no_ssh",
                "--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", port,
                str(TRAIN), "--recipe", str(world / "recipe.yaml"),
                "--set", f"output={tmp_path / 'run'}",
            ]
            for node in range(2)
        ]
    )  # fmt: skip
    same_run(tmp_path / "run", world / "whole")


@pytest.mark.slow
def test_torchrun_on_two_nodes(world, tmp_path):
    port = str(free_port())
    run_nodes(
        [
            [
                str(BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1",
                "--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", port,
                str(TRAIN), "--recipe", str(world / "recipe.yaml"),
                "--set", f"output={tmp_path / 'run'}",
            ]
            for node in range(2)
        ]
    )  # fmt: skip
    same_run(tmp_path / "run", world / "whole")
