"""Records one PPO update of TRL 1.12, the last with a PPO trainer, into ppo_trl112_trajectory.npz.

    pip install --no-deps --target TRL112 trl==1.12.0
    PYTHONPATH=TRL112 python tests/record_trl112.py

TRL 1.12 runs on the versions that this project pins (transformers 5.23). Prompts, completions and weights are fixed and
tiny; completions have one length, so that what 1.12 does to pads plays no part. Two epochs of one mini-batch, so the
second one clips. Everything recorded is a local of its `train()` or a weight.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
FIXTURE = HERE / "ppo_trl112_trajectory.npz"
VOCAB, WIDTH, CONTEXT, PAD, EOS = 32, 16, 12, 0, 1
EPISODES, ACTIONS, ENDED = 8, 5, 5  # the first ENDED completions end their turn
SETTINGS = {
    "temperature": 0.7,
    "kl_coef": 0.3,
    "gamma": 0.98,
    "lam": 0.9,
    "cliprange": 0.2,
    "cliprange_value": 0.005,
    "vf_coef": 0.1,
    "whiten_rewards": True,
    "missing_eos_penalty": 1.0,
    "num_ppo_epochs": 2,
    "num_mini_batches": 1,
}
LEARNING_RATE = 0.02  # of SGD: the weights after an update are then its gradients
MEASURED = ("logprobs", "ref_logprobs", "values", "scores", "rewards", "advantages", "returns")
STATS = ("approxkl_stats", "pg_loss_stats", "vf_loss_stats", "pg_clipfrac_stats", "vf_clipfrac_stats")


def tiny(model_class: type[PreTrainedModel], seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_layer=1,
        n_head=2,
        n_positions=CONTEXT,
        initializer_range=0.3,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        num_labels=1,
    )
    return model_class(config)


def episodes() -> tuple[list[list[int]], torch.Tensor]:
    """Prompts of 2 to 5 tokens, and completions [EPISODES, ACTIONS] without pads."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 6, (EPISODES,), generator=generator).tolist()
    prompts = [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    completions = torch.randint(2, VOCAB, (EPISODES, ACTIONS), generator=generator)
    completions[:ENDED, -1] = EOS
    return prompts, completions


def main() -> None:
    assert trl.__version__ == "1.12.0", f"this is TRL {trl.__version__}; see the docstring"
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    prompts, completions = episodes()
    recorded: dict[str, Any] = {}

    def replay(model: Any, queries: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """In place of sampling: each prompt's fixed completion, and its logits at the sampling temperature."""
        order = [prompts.index([t for t in row if t != PAD]) for row in queries.tolist()]
        recorded["order"] = np.array(order)
        sequences = torch.cat([queries, completions[order]], 1)
        logits = ppo_trainer.forward(model, sequences, PAD).logits[:, queries.shape[1] - 1 : -1]
        return sequences, logits / (SETTINGS["temperature"] + 1e-7)

    class Recorder(PPOTrainer):
        def log(self, *args: Any, **kwargs: Any) -> None:
            local = sys._getframe(1).f_locals
            recorded.update({name: local[name].detach().numpy().squeeze() for name in (*MEASURED, *STATS)})

    ppo_trainer.batch_generation = replay
    parts = {
        "policy": tiny(GPT2LMHeadModel, 1),
        "reference": tiny(GPT2LMHeadModel, 1),
        "reward": tiny(GPT2ForSequenceClassification, 3),
        "critic": tiny(GPT2ForSequenceClassification, 4),
    }
    with torch.no_grad():  # a reference that is near the policy, and not on it
        for i, p in enumerate(parts["reference"].parameters()):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    weights = {f"{part}/{name}": t.clone().numpy() for part, m in parts.items() for name, t in m.state_dict().items()}

    trainable = [*parts["policy"].parameters(), *parts["critic"].parameters()]
    optimizer = torch.optim.SGD(trainable, lr=LEARNING_RATE)
    trainer = Recorder(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=EPISODES,
            gradient_accumulation_steps=1,
            total_episodes=EPISODES,
            response_length=ACTIONS,
            stop_token="eos",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            num_sample_generations=0,
            **SETTINGS,
        ),
        processing_class=tokenizer(),
        model=parts["policy"],
        ref_model=parts["reference"],
        reward_model=parts["reward"],
        value_model=parts["critic"],
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )
    trainer.train()
    order = np.argsort(recorded.pop("order"))
    recorded |= {name: recorded[name][order] for name in MEASURED}
    after = {f"after/{p}/{n}": t.numpy() for p in ("policy", "critic") for n, t in parts[p].state_dict().items()}
    np.savez_compressed(FIXTURE, **weights, **after, **recorded)
    print({name: recorded[name] for name in STATS}, FIXTURE.stat().st_size, "bytes")


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": EOS, **{f"w{i}": i for i in range(2, VOCAB)}}, "w2"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left")


if __name__ == "__main__":
    main()
