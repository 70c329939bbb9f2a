"""Where the package runs, and what children of fork see of its memory."""

import signal
import subprocess
import sys

import pytest


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", ["offload", "lowmem"])
@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_on_other_systems_the_import_says_in_a_sentence_where_it_runs(package: str, system: str) -> None:
    done = run(f"import sys; sys.platform = {system!r}; import {package}")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: lowmem and offload run on Linux and in WSL2 on Windows, and this is " + system)


_CHILD_READS = """
import os
from offload import StagingBuffer
buffer = StagingBuffer(8192, in_children={in_children})
buffer.tensor.fill_(7)
child = os.fork()
if child == 0:
    os._exit(int(buffer.tensor[5000]))
_, status = os.waitpid(child, 0)
print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status))
"""


def test_memory_that_transfers_use_is_not_shared_with_children() -> None:
    assert run(_CHILD_READS.format(in_children=True)).stdout.strip() == "-7"
    assert run(_CHILD_READS.format(in_children=False)).stdout.strip() == str(int(signal.SIGSEGV))
