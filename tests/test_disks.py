"""What one worker does for the others, who wait for it."""

import subprocess
import sys

import pytest
from workers import ROOT, two_processes

PATIENCE = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from training import disks
from training.run import Run, StageError

dist.init_process_group("gloo", timeout=timedelta(seconds=2))
run = Run(Path(sys.argv[1]), "image", workers=2)

def long():
    time.sleep(5)
    return "made"

def wrong():
    time.sleep(5)
    raise StageError("no picture")

assert disks.on_rank_0(run, long) == (None if run.rank else "made")
try:
    disks.on_rank_0(run, wrong)
except StageError as error:
    assert str(error) == "no picture"
else:
    raise AssertionError("nobody was told")
"""


@pytest.mark.timeout(120)
def test_the_others_wait_for_longer_than_a_collective_may_take(tmp_path):
    codes, told = two_processes(PATIENCE, [str(tmp_path)])
    assert codes == [0, 0], told


LEAVING = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from training import cluster
from training.run import Run

dist.init_process_group("gloo", timeout=timedelta(seconds=30))
run = Run(Path(sys.argv[1]), "sft", workers=2)
cluster._LEAVING = float(sys.argv[2])
if sys.argv[3] == "all" or run.rank:
    assert cluster._all_leave(run) == (sys.argv[3] == "all")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("who", ["all", "one"])
def test_a_worker_alone_with_a_mistake_learns_that_the_others_do_not_leave(tmp_path, who):
    codes, told = two_processes(LEAVING, [str(tmp_path), "20" if who == "all" else "1", who])
    assert codes == [0, 0], told


ENDING = """
import atexit
from contextlib import suppress
from pathlib import Path

@atexit.register
def tell():
    for file in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # a thread that ends meanwhile
            print(file.read_text().strip())
    print("--")

from training import disks, zero
from training.run import Run, StageError

def wrong():
    raise StageError("no picture")

zero.init_distributed("cpu")
tell()
disks.on_rank_0(Run(Path("unused"), "image"), wrong)
"""


def test_a_worker_that_ends_leaves_no_thread_of_its_group():
    """Such a thread aborted it now and then, whatever it had to say."""
    ended = subprocess.run([sys.executable, "-c", ENDING], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "StageError: no picture" in ended.stderr
    before, after, _ = ended.stdout.split("--")
    assert "gloo" in before and "python" in after and "gloo" not in after
