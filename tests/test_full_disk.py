"""A disk that runs full in mid-training: the message says so, and with room again the same command goes on."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml

from training.run import Run

WAIT = 240  # seconds for one thing to happen, on a busy machine


@pytest.fixture
def disk(tmp_path):
    """A disk of six megabytes; `disk(MIB)` makes it another size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*words):
        return subprocess.run(["mount", "-t", "tmpfs", *words, "tmpfs", str(folder)], capture_output=True, check=False)

    if os.geteuid() or not shutil.which("mount") or mount("-o", "size=6m").returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder, lambda mib: mount("-o", f"remount,size={mib}m")
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.timeout(2 * WAIT)
def test_a_full_disk_is_named_and_nothing_is_lost(disk, tmp_path, tiny_world):
    folder, resize = disk
    text = [str(tiny_world.corpus)]
    size = {"num_layers": 2, "num_heads": 2, "hidden_size": 128, "seq_len": 64}
    pretrain = {
        "text": text,
        "tokens": 8 * 64 * 12,
        "batch_size": 8,
        "micro_batch_size": 8,
        "checkpoint_every": 4,
        **size,
    }
    recipe = {"name": "nano", "tokenizer": {"text": text, "vocab_size": 512}, "pretrain": pretrain}
    (tmp_path / "nano.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    command = [sys.executable, "-m", "services.cli", "train", "nano.yaml", "--runs", str(folder)]

    full = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=WAIT)
    assert full.returncode == 2
    assert f"error: pretrain: no space is left on the disk of {folder}/nano/pretrain: " in full.stderr
    assert "a worker died" not in full.stdout

    assert resize(64).returncode == 0
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=WAIT)
    assert again.returncode == 0, again.stdout + again.stderr
    steps = [line["step"] for line in Run(folder / "nano", "pretrain").metrics() if "loss" in line]
    assert steps == list(range(1, 13)) and "tokenizer: starts" not in again.stdout
