"""The one tiny world: real text, a tokenizer learnt from it, two models with random weights, and small data files."""

import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # two files at a time on two cores: a second thread each would be in the way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST = ("test_end_to_end", "test_cluster", "test_jobs_ray", "test_cluster_stages", "test_resize", "test_ppo_engines")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that none is left alone at the end where two run at a time."""
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))


@dataclass(frozen=True)
class TinyWorld:
    """Everything a test may need, read only; copy what you change."""

    root: Path
    corpus: Path  # txt, about 100 kB of English: documents separated by blank lines
    tokenizer: Path  # a tokenizer folder, at most 512 tokens
    llama: Path  # model folders: 2 layers, width 32, 256 positions, random weights, the tokenizer beside them
    gpt2: Path
    translation: Path  # the same for an encoder-decoder, Marian, from German into English
    chats: Path  # jsonl: 96 chats of one or two exchanges, 8 of them labelled bad
    rankings: Path  # jsonl: 48 rankings of 4 completions, some with ties; more friendly words rank higher
    prompts: Path  # jsonl: 24 prompts


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    root = tmp_path_factory.mktemp("tiny_world")
    world = TinyWorld(root, *(root / name for name in ("corpus.txt", "tokenizer", "llama", "gpt2", "translation")),
                      *(root / f"{name}.jsonl" for name in ("chats", "rankings", "prompts")))  # fmt: skip
    world.corpus.write_text("\n\n".join(_documents()), "utf-8")
    _write_jsonl(world.chats, _chats())
    _write_jsonl(world.rankings, _rankings())
    _write_jsonl(world.prompts, [{"prompt": f"What is {thing}?"} for thing in _THINGS])
    _build_models(world)
    _build_translation_model(world)
    return world


_THINGS = ["a cat", "a dog", "the sea", "a tree", "bread", "snow", "a song", "the moon", "a book", "rain", "a friend"]
_THINGS += ["tea"]
_THINGS += [f"{colour} paint" for colour in ("red", "blue", "green", "black", "white", "brown")]
_THINGS += [f"a {size} house" for size in ("small", "big", "new", "old", "warm", "cold")]
_REPLIES = ("It is {} indeed.", "You know {} well.", "I like to think of {}.", "{} is not for me.")
_FRIENDLY = ("Go away.", "That is a question.", "Good question, I am glad.", "What a lovely, good, happy question!")


def _documents() -> list[str]:
    """Python's own help texts: English that every installation carries."""
    from pydoc_data.topics import topics

    pages = "\n\n".join(topics[name] for name in sorted(topics))
    return [paragraph.strip("\n") for paragraph in pages[:100_000].split("\n\n") if paragraph.strip()]


def _chats() -> list[dict[str, Any]]:
    chats: list[dict[str, Any]] = []
    for number, (thing, reply) in enumerate(itertools.product(_THINGS, _REPLIES)):
        contents = [f"What is {thing}?", reply.format(thing), "Are you sure?", "Yes, I am sure."]
        roles = ("user", "assistant") * 2
        turns = 4 if number % 3 == 0 else 2
        messages = [{"role": r, "content": c} for r, c in zip(roles[:turns], contents[:turns], strict=True)]
        chats.append({"messages": messages} | ({"label": "bad"} if number % 12 == 11 else {}))
    return chats


def _rankings() -> list[dict[str, Any]]:
    ranks = ([4, 3, 2, 1], [3, 3, 2, 1])
    return [
        {"prompt": f"{opening} {thing}?", "completions": list(_FRIENDLY), "ranking": ranks[number % 2]}
        for number, (thing, opening) in enumerate(itertools.product(_THINGS, ("What is", "Do you like")))
    ]


def _write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def _build_models(world: TinyWorld) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, LlamaConfig

    from training.data.text import read_documents
    from training.tokenizer import stop_ids, train_tokenizer

    tokenizer = train_tokenizer((document.text for document in read_documents([str(world.corpus)])), 512)
    tokenizer.save_pretrained(world.tokenizer)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # Wide weights: logits of random models must differ clearly for greedy outputs to be comparable.
    shared = {"vocab_size": len(tokenizer), "initializer_range": 0.3, "use_cache": True, **ids}
    configs = {
        world.llama: LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=256, tie_word_embeddings=False, **shared,
        ),
        world.gpt2: GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared
        ),
    }  # fmt: skip
    for folder, config in configs.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.generation_config = GenerationConfig(**(ids | {"eos_token_id": stop_ids(tokenizer)}))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        card = {"kind": "causal-lm", "run": "tiny", "stage": folder.name}
        (folder / "chatforge.json").write_text(json.dumps(card) + "\n", "utf-8")


def _build_translation_model(world: TinyWorld) -> None:
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, GenerationConfig, MarianConfig, MarianMTModel

    tokenizer = AutoTokenizer.from_pretrained(world.tokenizer)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, eos)]
    )
    tokenizer.chat_template = None
    ids = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": pad, "decoder_start_token_id": pad}
    layers = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in _MARIAN_SIDE.items()}
    torch.manual_seed(0)
    model = MarianMTModel(
        MarianConfig(
            vocab_size=len(tokenizer), d_model=32, max_position_embeddings=256, init_std=0.3, forced_eos_token_id=None,
            dropout=0.0, scale_embedding=True, **layers, **ids,
        )
    )  # fmt: skip
    model.generation_config = GenerationConfig(num_beams=2, length_penalty=0.5, max_length=256, **ids)
    model.save_pretrained(world.translation)
    tokenizer.save_pretrained(world.translation)
    card = {"kind": "translation", "run": "tiny", "stage": "translation", "source_script": "LATIN"}
    card |= {"source_language": "de", "target_language": "en"}
    (world.translation / "chatforge.json").write_text(json.dumps(card) + "\n", "utf-8")


_MARIAN_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}


@pytest.fixture(autouse=True)
def no_zero3_of_an_earlier_test() -> None:
    """transformers remembers the last ZeRO-3 config of the process, and would shard whatever is loaded next."""
    import sys

    remembered = sys.modules.get("transformers.integrations.deepspeed")
    if remembered:
        remembered.unset_hf_deepspeed_config()


@pytest.fixture
def goes_on_with_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Asserts that a stage interrupted as it logs step `at`, and run again, logs what an undisturbed run logs.

    `stage` is the stage's module, `make_run(name)` gives its config and a fresh run.
    """

    def check(stage: Any, make_run: Callable[[str], tuple[Any, Any]], at: int) -> None:
        from training.run import Run

        config, undisturbed = make_run("undisturbed")
        stage.run(config, undisturbed)
        _, stopped = make_run("stopped")
        log = Run.log

        def die(self: Run, step: int, total: int, **metrics: float) -> None:
            log(self, step, total, **metrics)
            if step == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, "log", die)
            stage.run(config, stopped)
        latest = stopped.latest_checkpoint()
        assert latest is not None and latest[0] < at
        stage.run(config, stopped)
        assert losses(stopped) == losses(undisturbed)

    return check


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An S3 API on loopback."""
    from s3 import s3_server

    with s3_server(tmp_path_factory.mktemp("s3") / "log") as server:
        yield server


@pytest.fixture
def bucket(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a new bucket, which this process and those it starts can use; copies go below tmp_path."""
    settings = {"CHATFORGE_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in {**settings, **s3.env}.items():
        monkeypatch.setenv(name, value)
    return s3.bucket(f"b-{uuid.uuid4().hex[:12]}")


@pytest.fixture
def nothing_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3 every parameter is sharded: by default DeepSpeed keeps those whole that tiny models have."""
    from training import zero

    settings = zero.deepspeed_config

    def sharded(config: Any, run: Any) -> dict[str, Any]:
        made = settings(config, run)
        return made | {"zero_optimization": made["zero_optimization"] | {"stage3_param_persistence_threshold": 0}}

    monkeypatch.setattr(zero, "deepspeed_config", sharded)


def losses(run: Any) -> list[float]:
    return [line["loss"] for line in run.metrics() if "loss" in line]
