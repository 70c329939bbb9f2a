"""`torchrun --nnodes 2`: two machines, each with a copy of the checkpoint. Here they are two network namespaces.

Slow, and needs root: `ip netns` makes the namespaces and a pair of interfaces between them, and takes them away again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lowmem.processes.test_ranks import ROOT, STACKS, WITHOUT_BALANCE, accumulated, assert_close, case, run_alone
from tests.offload.kernel_counts import why_uncounted
from tests.zoo.architectures import build

pytestmark = pytest.mark.slow

NUM_NODES = NUM_LOCAL = 2
SIZE = NUM_NODES * NUM_LOCAL
PORT = 29471
CASES = [
    case("sft"),
    case("streamed", model="deep", tight=True),
    case("dora-accumulated", adapter={"use_dora": True}, options=accumulated()),
    case("experts", model="qwen3_moe", adapter=STACKS, options=WITHOUT_BALANCE, tight=True),
    case("dpo", task="dpo"),
]
# On the second node "another" is another training, and "missing" is not there.
REFUSED = [{"name": name, "opens": [name] * SIZE} for name in ("another", "missing")]


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of its own, as far as the network goes."""

    name: str
    address: str
    interface: str


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("needs root and ip, to make network namespaces")
    stem = f"lm{os.getpid()}"
    made = tuple(
        Node(name=f"{stem}-{number}", address=f"10.213.97.{number + 1}", interface=f"{stem}v{number}")
        for number in range(NUM_NODES)
    )
    with ExitStack() as stack:
        for node in made:
            _ip("netns", "add", node.name)
            stack.callback(subprocess.run, ["ip", "netns", "delete", node.name], check=True)
        _ip("link", "add", made[0].interface, "type", "veth", "peer", "name", made[1].interface)
        for node in made:
            _ip("link", "set", node.interface, "netns", node.name)
            inside = ("-n", node.name)
            _ip(*inside, "address", "add", f"{node.address}/24", "dev", node.interface)
            _ip(*inside, "link", "set", node.interface, "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield made  # type: ignore[misc]


def command_on(node: Node, *, first: Node, folder: Path) -> list[str]:
    """The documented command on a node, with what its name would tell torchrun if it had one."""
    environment = [f"GLOO_SOCKET_IFNAME={node.interface}", "OMP_NUM_THREADS=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(NUM_NODES)]
    torchrun += ["--nproc_per_node", str(NUM_LOCAL), "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", f"{first.address}:{PORT}", "--local-addr", node.address]
    torchrun += ["--rdzv-conf", f"is_host={int(node is first)}"]
    job = ["-m", "tests.lowmem.processes.ranks_job", str(folder)]
    return ["ip", "netns", "exec", node.name, "env", *environment, *torchrun, *job]


def make_models(folder: Path, *, second: bool) -> None:
    build("llama", folder / "llama")
    build("llama", folder / "deep", changes={"num_hidden_layers": 8})
    build("qwen3_moe", folder / "qwen3_moe", changes={"num_experts": 8, "num_experts_per_tok": 2})
    build("llama", folder / "another", seed=int(second))
    if not second:
        build("llama", folder / "missing")


def run_on_nodes(nodes: tuple[Node, Node], folders: tuple[Path, Path], cases: list[dict[str, Any]]) -> list[int]:
    """Run cases on both nodes, each with a folder of its own that has its copies of the models; how torchrun ended."""
    with ExitStack() as stack:
        running = []
        for number, node in enumerate(nodes):
            make_models(folders[number], second=number == 1)
            (folders[number] / "cases.json").write_text(json.dumps(cases))
            said = stack.enter_context(open(folders[number] / "said.txt", "w"))
            command = command_on(node, first=nodes[0], folder=folders[number])
            one = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
            stack.callback(one.kill)
            running.append(one)
        return [one.wait(timeout=600) for one in running]


@pytest.fixture(scope="module")
def folders(nodes: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What each node's ranks wrote."""
    made = (tmp_path_factory.mktemp("node0"), tmp_path_factory.mktemp("node1"))
    ended = run_on_nodes(nodes, made, [*CASES, *REFUSED])
    assert ended == [0, 0], [(folder / "said.txt").read_text()[-6000:] for folder in made]
    return made


def of_rank(folders: tuple[Path, Path], name: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folders[rank // NUM_LOCAL] / f"{name}.rank{rank}.pt", weights_only=True)
    return found


@pytest.mark.parametrize("one", [pytest.param(one, id=one["name"]) for one in CASES])
def test_two_nodes_train_what_one_process_trains_with_the_whole_batch(
    one: dict[str, Any], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    found = [of_rank(folders, one["name"], rank) for rank in range(SIZE)]
    for other in found[1:]:
        for key, value in found[0]["adapter"].items():
            assert torch.equal(other["adapter"][key], value), key
    options = {**one["options"], "per_device_train_batch_size": SIZE * one["options"]["per_device_train_batch_size"]}
    alone = run_alone({**one, "model": str(folders[0] / one["model"]), "options": options}, tmp_path)
    assert_close(found[0], alone)
    for node in range(NUM_NODES):
        ranks = found[node * NUM_LOCAL : (node + 1) * NUM_LOCAL]
        # Each node reads its own copy, once.
        assert sum(rank["read_bytes"] for rank in ranks) <= 1.05 * alone["read_bytes"]
        if one.get("tight") and not why_uncounted(tmp_path):
            on_its_way = 3 * max(alone["block_bytes"])
            assert sum(rank["storage_bytes"] for rank in ranks) <= 1.05 * alone["storage_bytes"] + on_its_way


def test_rank_0_alone_writes_checkpoints(folders: tuple[Path, Path]) -> None:
    assert not list((folders[1] / "sft").rglob("adapter_model*"))


@pytest.mark.parametrize("rank", range(SIZE))
def test_another_training_on_the_second_node_is_refused_by_name_on_every_rank(
    rank: int, folders: tuple[Path, Path]
) -> None:
    refused = of_rank(folders, "another", rank)["refused"]
    assert refused.startswith(f"ValueError: rank {rank} of {SIZE}: the files of {folders[1] / 'another'} on ")
    assert "which ranks 2, 3 have opened, are not copies of those of" in refused
    assert str(folders[0] / "another") in refused


@pytest.mark.parametrize("rank", range(SIZE))
def test_a_folder_that_the_second_node_has_not_ends_every_rank_with_the_reason(
    rank: int, folders: tuple[Path, Path]
) -> None:
    refused = of_rank(folders, "missing", rank)["refused"]
    assert str(folders[1] / "missing") in refused
    if rank < NUM_LOCAL:
        assert refused.startswith(f"OffloadError: rank {rank} of {SIZE}: rank ")
        assert "could not open the model: FileNotFoundError" in refused


def test_a_rank_that_is_killed_on_one_node_ends_those_of_the_other(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    folders = (tmp_path / "node0", tmp_path / "node1")
    before = set(os.listdir("/dev/shm"))
    dies = {"rank": SIZE - 1, "when": "training"}
    ended = run_on_nodes(nodes, folders, [case("killed", dies=dies, options={"max_steps": 1000})])
    ended_s = time.time() - float((folders[1] / "killed.txt").read_text())
    said = [(folder / "said.txt").read_text() for folder in folders]
    assert 0 not in ended
    assert ended_s < 60
    assert "a rank of this run has ended or cannot be reached" in said[0], said[0][-6000:]
    assert "Signal 9 (SIGKILL)" in said[1]
    assert set(os.listdir("/dev/shm")) <= before
