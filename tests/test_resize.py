"""A stage goes on with another number of workers than wrote its checkpoint (DeepSpeed's Universal Checkpoint)."""

import pytest
from conftest import losses
from workers import two_workers

from training import pretrain, sft, zero
from training.config import PretrainConfig, SFTConfig
from training.run import Run

SIZES = {"num_layers": 2, "num_heads": 2, "hidden_size": 32, "seq_len": 32}
SHARED = {"batch_size": 8, "micro_batch_size": 4, "dtype": "fp32", "learning_rate": 3e-3, "checkpoint_every": 4}


@pytest.fixture(scope="module", autouse=True)
def distributed():
    zero.init_distributed("cpu")


@pytest.fixture
def make(tmp_path, tiny_world):
    def make(stage, workers, zero_stage):
        run = Run(tmp_path / "run", stage, seed=3, workers=workers)
        run.folder.mkdir(parents=True, exist_ok=True)
        for parent, model in (("tokenizer", tiny_world.tokenizer), ("pretrain", tiny_world.llama)):
            link = run.of(parent).model
            if stage != parent and not link.exists():
                link.parent.mkdir(exist_ok=True)
                link.symlink_to(model)
        if stage == "pretrain":
            return run, PretrainConfig(
                text=[str(tiny_world.corpus)], tokens=32 * 8 * 10, zero_stage=zero_stage, **SIZES, **SHARED
            )
        return run, SFTConfig(chats=[str(tiny_world.chats)], num_train_epochs=1, zero_stage=zero_stage, **SHARED)

    return make


STAGES = {"pretrain": pretrain, "sft": sft}


@pytest.mark.parametrize(("stage", "zero_stage"), [("pretrain", 0), ("pretrain", 1), ("pretrain", 3), ("sft", 1)])
def test_from_two_workers_to_one(make, stage, zero_stage):
    run, config = make(stage, 2, zero_stage)
    codes, told = two_workers(stage, config, run.root)
    assert codes == [0, 0], told
    whole = losses(run)
    step, folder = run.latest_checkpoint()
    assert (folder / "workers").read_text() == "2"
    alone, _ = make(stage, 1, zero_stage)
    STAGES[stage].run(config, alone)
    assert len(losses(alone)) == len(whole)
    whole_batches = slice(step, 10)  # the last of an epoch is a part, which workers divide otherwise
    assert losses(alone)[whole_batches] == pytest.approx(whole[whole_batches], abs=1e-4)


def test_from_one_worker_to_two(make):
    run, config = make("pretrain", 1, 2)
    pretrain.run(config, run)
    whole, (step, _) = losses(run), run.latest_checkpoint()
    codes, told = two_workers("pretrain", config, run.root)
    assert codes == [0, 0], told
    assert losses(run)[step:] == pytest.approx(whole[step:], abs=1e-4)
