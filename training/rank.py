"""Ranked completions: K samples per prompt from the SFT model, ordered by a named judge or by a person in the terminal
(Stiennon et al. 2020; Ouyang et al. 2022, 3.5).

    rank/completions.jsonl   {"id", "prompt", "completions"}, one line a prompt
    rank/rankings.jsonl      the same with "ranking" (see data/rankings.py): what the reward stage reads

Both grow line by line, so a kill costs what was in the making. Prompts are of the training side alone and seeds belong
to the prompt, so a run that was interrupted makes the files of one that was not.

Leaves out: sampling on several workers; several people per ranking, and their agreement.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any, TextIO

from training.config import RankConfig
from training.data.prompts import Prompt, read_prompts
from training.data.records import DataError
from training.data.split import split, unseen
from training.judges import Judge, judge
from training.run import Run, StageError, read_jsonl, write_atomic
from training.seeds import derived_seed
from training.tokenizer import encode_prompt

SAMPLED_AT_ONCE = 64  # sequences in the engine
MIN_STOP_RATE = 0.5  # of the completions: the others were cut off

Line = dict[str, Any]


def run(config: RankConfig, run: Run) -> None:
    """Leaves completions.jsonl and rankings.jsonl. One process does it all; other workers return at once.

    Raises StageError where the model does not end its turns, and where a person has yet to rank, naming the command to
    do it with.
    """
    if run.rank:
        return
    sample(config, run)
    require_endings(read_jsonl(completions_path(run)), config.max_new_tokens)
    if config.judge == "person":
        _require_person(run)
    else:
        rank_by_judge(run, judge(config.judge))
    rankings = read_jsonl(rankings_path(run))
    run.log(len(rankings), len(rankings), **_summary(rankings))


def completions_path(run: Run) -> Path:
    return run.folder / "completions.jsonl"


def rankings_path(run: Run) -> Path:
    return run.folder / "rankings.jsonl"


# ---- completions


def sample(config: RankConfig, run: Run) -> None:
    """Append the completions that are missing, in the prompts' order."""
    from serving.engine.api import SamplingParams
    from serving.engine.torch_engine import TorchEngine
    from serving.model_folder import load_causal_lm

    folder = config.model or str(run.of("sft").model)
    try:
        model, tokenizer = load_causal_lm(folder)
    except ValueError as error:
        raise StageError(f"rank.model={folder}: {error}") from error
    engine = TorchEngine(model.to(run.device), tokenizer, max_num_seqs=SAMPLED_AT_ONCE)
    room = engine.context_tokens - config.max_new_tokens
    prompts = choose_prompts(config, run, lambda prompt: len(encode_prompt(tokenizer, prompt.messages)) <= room)
    path = completions_path(run)
    done = _resume(path)
    at_once = max(1, SAMPLED_AT_ONCE // config.num_completions)
    try:
        for start in range(done, len(prompts), at_once):
            batch = prompts[start : start + at_once]
            asked = [(prompt, k) for prompt in batch for k in range(config.num_completions)]
            ids = [encode_prompt(tokenizer, prompt.messages) for prompt, _ in asked]
            params = [
                SamplingParams(
                    config.max_new_tokens, config.temperature, seed=derived_seed(run.seed, prompt.identity, k)
                )
                for prompt, k in asked
            ]
            sampled = iter(engine.generate_all(ids, params))
            for prompt in batch:
                answers = [next(sampled) for _ in range(config.num_completions)]
                line = {"id": prompt.key, "prompt": prompt.messages, "completions": [a.text for a in answers]}
                _append(path, line | {"finish_reasons": [a.finish_reason for a in answers]})
            run.log(start + len(batch), len(prompts))
    finally:
        engine.close()


def require_endings(lines: Sequence[Line], max_new_tokens: int) -> None:
    """The gate after SFT: raises StageError where fewer than MIN_STOP_RATE of the completions end their turn."""
    reasons = [reason for line in lines for reason in line["finish_reasons"]]
    stop_rate = reasons.count("stop") / len(reasons)
    if stop_rate < MIN_STOP_RATE:
        raise StageError(
            f"rank: the model ends its turn in {stop_rate:.0%} of {len(reasons)} completions of at most "
            f"max_new_tokens={max_new_tokens}; below {MIN_STOP_RATE:.0%} neither reward nor PPO can learn from them: "
            "train SFT longer, on shorter answers, or raise rank.max_new_tokens"
        )


def choose_prompts(config: RankConfig, run: Run, fits: Callable[[Prompt], bool]) -> list[Prompt]:
    """At most `num_prompts` distinct prompts of the training side that fit, in an order that the seed alone decides."""
    training, _ = split(read_prompts(config.prompts), run.seed, run.val_fraction)
    shuffled = sorted(unseen(training), key=lambda p: hashlib.sha256(f"{run.seed}\0{p.identity}".encode()).digest())
    chosen: list[Prompt] = []
    for prompt in shuffled:
        if len(chosen) == config.num_prompts:
            break
        if fits(prompt):
            chosen.append(prompt)
    if not chosen:
        raise DataError(
            f"rank.prompts={config.prompts}: none of {len(shuffled)} prompts leaves room for "
            f"rank.max_new_tokens={config.max_new_tokens} in the model's context: lower it, or give shorter prompts"
        )
    if len(chosen) < config.num_prompts:
        run.note(
            f"rank.num_prompts={config.num_prompts} are asked for: {len(shuffled)} different ones are there to learn "
            f"from, and {len(chosen)} of them leave room for a completion"
        )
    return chosen


# ---- rankings


def rank_by_judge(run: Run, score: Judge) -> None:
    """Append the rankings that are missing: best score first, equal scores tie."""
    path = rankings_path(run)
    done = _resume(path)
    for line in read_jsonl(completions_path(run))[done:]:
        scores = [score(line["prompt"], completion) for completion in line["completions"]]
        _append(path, line | {"ranking": ranks_of(scores), "scores": scores})


def ranks_of(scores: Sequence[float]) -> list[int]:
    """1 + how many are better, for each: [0.2, 0.9, 0.2] -> [2, 1, 2]."""
    return [1 + sum(other > score for other in scores) for score in scores]


def _require_person(run: Run) -> None:
    ranked, total = len(read_jsonl(rankings_path(run))), len(read_jsonl(completions_path(run)))
    if ranked < total:
        raise StageError(
            f"{ranked} of {total} prompts are ranked: rank the rest with `chatforge rank {run.root.name}`, "
            "then give the same command again"
        )


def _summary(rankings: list[Line]) -> dict[str, float]:
    """What the reward stage gets: prompts, completions each, and how much of it ties."""
    pairs = [(a, b) for line in rankings for i, a in enumerate(line["ranking"]) for b in line["ranking"][i + 1 :]]
    distinct = sum(len(set(line["completions"])) for line in rankings)
    return {
        "prompts": len(rankings),
        "pairs": sum(a != b for a, b in pairs),
        "tied": sum(a == b for a, b in pairs) / len(pairs),
        "distinct_completions": distinct / sum(len(line["completions"]) for line in rankings),
    }


# ---- a person in the terminal


HELP = 'Best first, as in "b a=c d" (= is a tie); s skips, u undoes the last one, q quits: '


def rank_in_terminal(run: Run, stdin: TextIO = sys.stdin, stdout: TextIO = sys.stdout) -> tuple[int, int]:
    """Ask for an order of every prompt's completions that has none yet; returns (ranked, all).

    Every answer is on disk when the next question appears: quitting, the end of the input or a kill lose none. A
    skipped prompt counts as ranked, with all its completions tied: it teaches nothing. Raises StageError where there
    are no completions.
    """
    lines = read_jsonl(completions_path(run))
    if not lines:
        raise StageError(f"run {run.root.name!r} has no completions to rank: train its rank stage first")
    path = rankings_path(run)
    answered = _resume(path)
    while answered < len(lines):
        _show(lines[answered], answered, len(lines), stdout)
        answer = _ask(len(lines[answered]["completions"]), stdin, stdout)
        if answer == "quit":
            break
        if answer == "undo":
            answered -= _drop_last(path)
            continue
        skipped = {"skipped": True} if answer == "skip" else {}
        ranking = [1] * len(lines[answered]["completions"]) if answer == "skip" else answer
        _append(path, lines[answered] | {"ranking": ranking} | skipped)
        answered += 1
    print(f"{answered} of {len(lines)} prompts are ranked.", file=stdout)
    return answered, len(lines)


def parse_order(text: str, completions: int) -> list[int]:
    """`b a=c d` as ranks of a, b, c, d: [2, 1, 2, 4]; `>` and commas may stand for spaces.

    Raises ValueError naming the letter that is wrong, repeated or missing.
    """
    letters = ascii_lowercase[:completions]
    spaced = re.sub(r"\s*=\s*", "=", re.sub(r"[>,]", " ", text.lower()))
    groups = [group.split("=") for group in spaced.split()]
    ranks: dict[str, int] = {}
    for group in groups:
        rank = len(ranks) + 1
        for letter in group:
            if len(letter) != 1 or letter not in letters:
                raise ValueError(f"{letter!r} is none of the letters a to {letters[-1]}")
            if letter in ranks:
                raise ValueError(f"{letter} is there twice")
            ranks[letter] = rank
    missing = [letter for letter in letters if letter not in ranks]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: name every letter once")
    return [ranks[letter] for letter in letters]


def _ask(completions: int, stdin: TextIO, stdout: TextIO) -> Any:
    """Ranks, or one of skip, undo, quit; asks again until it understands."""
    while True:
        print(HELP, end="", flush=True, file=stdout)
        line = stdin.readline()
        command = line.strip().lower()
        if not line or command == "q":
            return "quit"
        if command in ("s", "u"):
            return {"s": "skip", "u": "undo"}[command]
        try:
            return parse_order(command, completions)
        except ValueError as error:
            print(f"  {error}", file=stdout)


def _show(line: Line, number: int, total: int, stdout: TextIO) -> None:
    print(f"\n[{number + 1} of {total}]", file=stdout)
    for message in line["prompt"]:
        print(f"  {message['role']}: {message['content']}", file=stdout)
    print(file=stdout)
    for letter, completion in zip(ascii_lowercase, line["completions"], strict=False):
        print(f"  {letter}  {completion.strip() or '(nothing)'}".replace("\n", "\n     "), file=stdout)
    print(file=stdout)


# ---- files that grow by lines


def _resume(path: Path) -> int:
    """How many whole lines the file has; a line that a kill cut short is removed, so that the next one starts clean."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return content.count(b"\n")


def _append(path: Path, line: Line) -> None:
    with path.open("a", encoding="ascii") as file:  # JSON escapes what some readers take for the end of a line
        file.write(json.dumps(line) + "\n")


def _drop_last(path: Path) -> int:
    """Remove the last line; returns how many were removed (none from an empty file)."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    write_atomic(path, "".join(lines[:-1]))
    return int(bool(lines))
