"""Two machines, here two network namespaces with a cable between them: each reads its own copy of the checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lowmem.processes.test_ranks import ROOT, assert_close, case, of_rank, run_alone
from tests.zoo.architectures import build

PORT = 29417
PER_NODE = 2
ONE = case("over-nodes", tight=True, options={"per_device_train_batch_size": 1})


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Namespaces and the addresses in them, with a virtual cable; gone afterwards."""
    names = tuple(f"lowmem-{os.getpid()}-{end}" for end in "ab")
    cables = tuple(f"lm{os.getpid() % 100_000}{end}" for end in "ab")
    addresses = ("10.231.7.1", "10.231.7.2")
    with ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
            ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
            for name, cable, address in zip(names, cables, addresses, strict=True):
                ip("link", "set", cable, "netns", name)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
                for device in (cable, "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs root and ip(8) for network namespaces: {error}")
        yield tuple(zip(names, cables, strict=True)), addresses  # type: ignore[misc]


@pytest.mark.slow
def test_two_nodes_train_the_adapter_of_one_process(nodes: Any, tmp_path: Path) -> None:
    (places, addresses), children = nodes, []
    build("llama", tmp_path / "a" / "llama", changes={"num_hidden_layers": 8})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for number, (name, cable) in enumerate(places):
        folder = tmp_path / "ab"[number]
        (folder / "cases.json").write_text(json.dumps([ONE]))
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--nproc_per_node", str(PER_NODE), "--node-rank", str(number), "--local-addr", addresses[number]]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{addresses[0]}:{PORT}", "--rdzv-id", "nodes"]
        command += ["-m", "tests.lowmem.processes.ranks_job", str(folder)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": cable}
        children.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    for child in children:
        said, _ = child.communicate(timeout=280)
        assert child.returncode == 0, said[-6000:]
    ranks = [of_rank(tmp_path / "ab"[rank // PER_NODE], ONE["name"], rank) for rank in range(2 * PER_NODE)]
    for other in ranks[1:]:
        for name, value in ranks[0]["adapter"].items():
            assert torch.equal(other["adapter"][name], value), name
    whole = {**ONE["options"], "per_device_train_batch_size": 2 * PER_NODE}
    alone = run_alone({**ONE, "model": str(tmp_path / "a" / "llama"), "options": whole}, tmp_path)
    assert_close(ranks[0], alone)
    for node in range(2):
        read = sum(one["read_bytes"] for one in ranks[node * PER_NODE : (node + 1) * PER_NODE])
        assert 0 < read <= 1.05 * alone["read_bytes"], "each machine reads once"
