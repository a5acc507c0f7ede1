"""Pretraining in one process: the loop against oracles, resume, and the arithmetic that must not matter."""

import math

import pytest
import torch
from conftest import losses
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

from training import pretrain, zero
from training.config import PretrainConfig
from training.run import Run

SIZES = {"num_layers": 2, "num_heads": 2, "hidden_size": 32, "seq_len": 32}


@pytest.fixture(scope="module", autouse=True)
def distributed():
    zero.init_distributed("cpu")


@pytest.fixture
def make_run(tmp_path, tiny_world):
    def make(name="r", **changes):
        run = Run(tmp_path / name, "pretrain", seed=3, val_fraction=0.1)
        run.folder.mkdir(parents=True)
        run.of("tokenizer").folder.mkdir()
        run.of("tokenizer").model.symlink_to(tiny_world.tokenizer)
        settings = {"text": [str(tiny_world.corpus)], "tokens": 32 * 8 * 12, "batch_size": 8, "micro_batch_size": 8}
        settings |= {"dtype": "fp32", "learning_rate": 3e-3, "checkpoint_every": 4, "eval_every": 6}
        return PretrainConfig(**{**SIZES, **settings, **changes}), run

    return make


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_it_learns_and_leaves_a_model_folder(make_run, architecture):
    config, run = make_run(architecture=architecture, tokens=32 * 8 * 30, dtype="bf16")
    pretrain.run(config, run)
    assert losses(run)[0] == pytest.approx(math.log(512), abs=0.3)  # a fresh model knows nothing
    assert losses(run)[-1] < losses(run)[0] - 0.5
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert sum(p.numel() for p in model.parameters()) == config.parameters(model.config.vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.bos_token_id]


def test_a_run_that_was_stopped_goes_on_with_the_same_losses(make_run, goes_on_with_the_same_losses):
    goes_on_with_the_same_losses(pretrain, make_run, at=7)


def test_micro_batches_are_a_matter_of_memory_alone(make_run):
    config, whole = make_run("whole")
    pretrain.run(config, whole)
    config, parts = make_run("parts", micro_batch_size=2)
    pretrain.run(config, parts)
    assert losses(parts) == pytest.approx(losses(whole), abs=2e-3)


def test_blocks_that_are_computed_again_change_nothing(make_run, monkeypatch):
    passes, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: passes.append(self.training) or forward(self, x))
    counts = []
    for name, again in (("kept", False), ("again", True)):
        config, run = make_run(name, gradient_checkpointing=again)
        pretrain.run(config, run)
        counts.append(sum(passes))
        passes.clear()
    assert counts[1] == 2 * counts[0]
    assert losses(run) == losses(Run(run.root.parent / "kept", "pretrain"))


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_every_zero_stage_gives_the_same_model(make_run, nothing_stays_whole, zero_stage):
    config, reference = make_run("reference")
    pretrain.run(config, reference)
    config, sharded = make_run("sharded", zero_stage=zero_stage, gradient_checkpointing=zero_stage == 3)
    pretrain.run(config, sharded)
    assert losses(sharded) == pytest.approx(losses(reference), abs=2e-3)
    ids = torch.arange(20)[None] + 10
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(r.model)(ids).logits for r in (reference, sharded)]
    torch.testing.assert_close(*logits, atol=2e-2, rtol=0)


def test_bits_per_byte_against_counting_by_hand(make_run, tiny_world):
    config, run = make_run()
    pretrain.run(config, run)
    val = pretrain.PackedTokens(run.folder / "shards", "val", config.seq_len)
    model = AutoModelForCausalLM.from_pretrained(run.model)
    nats = tokens = 0.0
    with torch.no_grad():
        for i in range(len(val)):
            batch = val.batch([i])
            logprobs = model(
                batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits.log_softmax(-1)
            targets = batch["input_ids"][0, 1:]
            nats -= logprobs[0, :-1].gather(1, targets[:, None]).sum().item()
            tokens += len(targets)
    by_hand = nats / tokens / math.log(2) * val.side.tokens / val.side.bytes
    assert run.final_metrics()["val_bits_per_byte"] == pytest.approx(by_hand, rel=1e-3)


def test_workers_share_one_global_batch():
    shares = []
    for rank in range(4):
        run = Run(root=None, stage="pretrain", workers=4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", str(rank))
            shares += pretrain.worker_share(list(range(8)), run)
    assert shares == list(range(8))


def test_weight_decay_is_for_matrices_alone(tiny_world):
    model = AutoModelForCausalLM.from_pretrained(tiny_world.gpt2)
    decayed, plain = zero.parameter_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and p.dim() == 2 for p in decayed["params"])
    assert not any("wte" in names[id(p)] or "wpe" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) == 4 * model.config.n_layer
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
