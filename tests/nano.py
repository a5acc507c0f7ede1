"""A recipe of every stage, as small as it goes, and the numbers that its run leaves."""

import json
import re
from pathlib import Path

import numpy as np

from training.run import Run

TRAINED = ("pretrain", "sft", "reward", "ppo", "translation", "image_vae", "image")


def write_data(folder):
    """What the recipe reads beside the tiny world's files: pairs, and pictures each of one colour."""
    pairs = folder / "pairs.tsv"
    pairs.write_text("".join(f"{a} und {b}\t{a} and {b}\n" for a in range(20) for b in range(20)), "utf-8")
    colours = np.random.default_rng(0).integers(0, 256, (24, 1, 1, 3), np.uint8)
    np.savez(folder / "pictures.npz", images=np.broadcast_to(colours, (24, 16, 16, 3)))
    captions = [{"caption": "{} {} {}".format(*colour.flatten())} for colour in colours]
    (folder / "pictures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in captions), "utf-8")


def nano(world, folder):
    """Every stage, as small as it goes, with a checkpoint every few steps."""
    shared = {"batch_size": 8, "micro_batch_size": 8, "checkpoint_every": 4, "dtype": "fp32"}
    size = {"num_layers": 2, "num_heads": 2, "hidden_size": 32}
    small = {**size, "seq_len": 128}
    tokens = {"batch_tokens": 256, "micro_batch_tokens": 256, "max_length": 32, "vocab_size": 340}
    drawn = {"images": [str(folder / "pictures.npz")], "resolution": 16, "steps": 40, "sample_every": 20, **shared}
    net = {"attention_levels": [1], "num_heads": 2, "text_layers": 1, "text_hidden_size": 16, "num_inference_steps": 2}
    return {
        "name": "nano",
        "seed": 5,
        "val_fraction": 0.2,
        "tokenizer": {"text": [str(world.corpus)], "vocab_size": 512},
        "pretrain": {"text": [str(world.corpus)], "tokens": 8 * 128 * 60, "learning_rate": 3e-3, **small, **shared},
        "sft": {"chats": [str(world.chats)], "num_train_epochs": 8, "learning_rate": 1e-2, **shared},
        "rank": {"prompts": [str(world.prompts)], "num_prompts": 16, "max_new_tokens": 32},
        "reward": {"rankings": [str(world.rankings)], "num_train_epochs": 10, "learning_rate": 3e-3, **shared},
        "ppo": {"prompts": [str(world.prompts)], "total_episodes": 160, "response_length": 16, **shared},
        "translation": {"pairs": ["pairs.tsv"], "steps": 60, "eval_every": 6, "checkpoint_every": 4, **size, **tokens},
        "image_vae": {"channels": [8, 16], "latent_channels": 2, "perceptual_weight": 0.0, **drawn},
        "image": {"channels": [16, 32], "max_caption_tokens": 8, **net, **drawn},
        "evaluate": {"num_prompts": 8, "max_new_tokens": 16, "num_drawings": 4},
    }


def trajectory(root: Path, stage):
    """Every logged number that is not a rate."""
    lines = Run(root, stage).metrics()
    timing = re.compile("time|per_second")
    return [{k: v for k, v in line.items() if not timing.search(k)} for line in lines]
