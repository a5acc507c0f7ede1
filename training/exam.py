"""The exam: the same held-out prompts and seeds for every model of a run, their answers, and what these are worth."""

import math
import random
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from serving.engine.api import Completion, SamplingParams
from serving.model_folder import context_length
from training import measure
from training.config import EvaluateConfig
from training.copies import local_copy
from training.data.chats import Message
from training.data.prompts import read_prompts
from training.data.split import split
from training.judges import judge
from training.recipe import Recipe
from training.run import Run
from training.seeds import derived_seed
from training.stats import Estimate, distinct_n, mean_and_stderr, most_frequent, paired_difference
from training.store import is_uri
from training.tokenizer import encode_prompt
from training.verdict import Result

SHOWN = 12  # held-out samples that evaluation.json keeps, the first of a random order: nobody picked them


@dataclass(frozen=True)
class Exam:
    """What the models of a run are asked."""

    config: EvaluateConfig
    run: Run
    recipe: Recipe

    def folder(self, stage: str) -> str | None:
        """The model that plays a stage's part: the stage's own, or the one that PPO is told to start from."""
        if stage in self.recipe.stages:
            own = self.run.of(stage).model
            return str(own) if own.is_dir() else None
        ppo = self.recipe.ppo
        return _on_this_disk({"sft": ppo.model, "reward": ppo.reward_model}.get(stage)) if ppo else None

    @property
    def ppo_start(self) -> str | None:
        """The model that PPO started from."""
        named = self.recipe.ppo.model if self.recipe.ppo else None
        return _on_this_disk(named) or self.folder("sft")

    @cached_property
    def prompts(self) -> list[list[Message]]:
        """Up to `num_prompts` of the held-out side that fit the SFT model, in a random order of the seed's."""
        folder, sources = self.folder("sft"), _prompt_sources(self.recipe)
        if not folder or not sources:
            return []
        _, records = split(read_prompts(sources), self.run.seed, self.run.val_fraction)
        random.Random(self.run.seed).shuffle(records)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        room = (context_length(AutoConfig.from_pretrained(folder)) or math.inf) - self.config.max_new_tokens
        fitting = (r.messages for r in records if len(encode_prompt(tokenizer, r.messages)) <= room)
        return list(islice(fitting, self.config.num_prompts))

    @property
    def temperature(self) -> float:
        """What PPO sampled at."""
        return self.recipe.ppo.temperature if self.recipe.ppo else 1.0

    @property
    def params(self) -> list[SamplingParams]:
        """One for each prompt, with a seed that every model gets."""
        seeds = [derived_seed(self.run.seed, "evaluate", number) for number in range(len(self.prompts))]
        new, temperature = self.config.max_new_tokens, self.temperature
        return [SamplingParams(max_new_tokens=new, temperature=temperature, seed=seed) for seed in seeds]


def _on_this_disk(model: str | None) -> str | None:
    """A model that the recipe names, as a folder where it is a URI."""
    return str(local_copy(model)) if model and is_uri(model) else model


def _prompt_sources(recipe: Recipe) -> list[str]:
    """Where people's turns are to be found, the likest to what PPO learnt from first."""
    if recipe.ppo:
        return recipe.ppo.prompts
    if recipe.rank:
        return recipe.rank.prompts
    return recipe.sft.chats if recipe.sft else []


@dataclass(frozen=True)
class Answers:
    """A model's completions of the held-out prompts."""

    prompt_ids: list[list[int]]
    completions: list[Completion]
    gold: list[float] | None  # the judge's score of each
    reward: list[float] | None  # the learned reward of each

    @property
    def texts(self) -> list[str]:
        return [completion.text for completion in self.completions]

    @property
    def token_ids(self) -> list[tuple[int, ...]]:
        return [completion.token_ids for completion in self.completions]


def answer(exam: Exam, model: Any, tokenizer: Any) -> Answers:
    """The model's completion of every held-out prompt, with what the judge and the reward model think of it."""
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in exam.prompts]
    completions = measure.generate(model, tokenizer, prompt_ids, exam.params)
    gold = reward = None
    if exam.config.judge:
        score = judge(exam.config.judge)
        gold = [score(prompt, c.text) for prompt, c in zip(exam.prompts, completions, strict=True)]
    if folder := exam.folder("reward"):
        learned = measure.reward_model(folder, exam.run.device)
        reward = learned(prompt_ids, [c.token_ids for c in completions]).tolist()
    return Answers(prompt_ids, completions, gold, reward)


def summary(answers: Answers) -> Result:
    """How a model answers: whether it ends its turn, how long, how varied, how good."""
    text, share = most_frequent(answers.texts)
    return {
        "stop_rate": asdict(mean_and_stderr([c.finish_reason == "stop" for c in answers.completions])),
        "length": asdict(mean_and_stderr([len(c.token_ids) for c in answers.completions])),
        "gold": asdict(mean_and_stderr(answers.gold)) if answers.gold else None,
        "reward": asdict(mean_and_stderr(answers.reward)) if answers.reward else None,
        "distinct_1": distinct_n(answers.texts, 1),
        "distinct_2": distinct_n(answers.texts, 2),
        "most_frequent": {"text": text, "share": share},
    }


def compare(exam: Exam, sft: Answers, ppo: Answers) -> Result:
    """How far PPO went, and what it gained, prompt by prompt: by the gold judge, and by the reward that taught it."""
    out: Result = {"kl": asdict(divergence(exam, ppo))}
    if sft.reward and ppo.reward:
        out["reward_gain"] = asdict(paired_difference(ppo.reward, sft.reward))
    if sft.gold and ppo.gold:
        wins = [0.5 * (1 + (p > s) - (p < s)) for p, s in zip(ppo.gold, sft.gold, strict=True)]
        out |= {"gold_gain": asdict(paired_difference(ppo.gold, sft.gold)), "wins": asdict(mean_and_stderr(wins))}
    return out


def divergence(exam: Exam, answers: Answers) -> Estimate:
    """KL(PPO ‖ what it started from) in nats per completion: the mean of log π − log π_ref over PPO's own samples.

    Unbiased. One model at a time is in memory.
    """
    sums = []
    for folder in (exam.folder("ppo"), exam.ppo_start):
        assert folder, "there are PPO's answers, so there is what it started from"
        model, _ = measure.load(folder, exam.run.device)
        sums.append(measure.completion_logprobs(model, answers.prompt_ids, answers.token_ids, exam.temperature))
    return paired_difference(*sums)


def fixed_answers(exam: Exam, stage: str, model: Any, tokenizer: Any) -> list[str]:
    """Greedy answers to the recipe's own prompts: what the model holds most likely, with no luck in it.

    The pretrained model has never seen a chat: it gets the prompt as the first line of a document, and its answer is
    the line that it would go on with.
    """
    params = SamplingParams(max_new_tokens=exam.config.max_new_tokens, temperature=0.0)
    if stage == "pretrain":
        texts = [tokenizer.bos_token + prompt + "\n" for prompt in exam.config.prompts]
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        params = replace(params, stop=("\n",))
    else:
        ids = [encode_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in exam.config.prompts]
    return [completion.text for completion in measure.generate(model, tokenizer, ids, [params] * len(ids))]


def side_by_side(exam: Exam, fixed: dict[str, list[str]]) -> list[Result]:
    """The recipe's own prompts with every stage's answer; nothing where no stage answers."""
    return [
        {"prompt": prompt, **{stage: texts[i] for stage, texts in fixed.items()}}
        for i, prompt in enumerate(exam.config.prompts)
        if fixed
    ]


def shown(exam: Exam, answers: dict[str, Answers]) -> list[Result]:
    """The first held-out prompts with every model's sampled answer and its scores."""
    rows = []
    for i, prompt in enumerate(exam.prompts[:SHOWN]):
        row: Result = {"prompt": prompt}
        for stage, given in answers.items():
            scores = {"gold": given.gold, "reward": given.reward}
            row[stage] = {"text": given.texts[i], **{name: s[i] for name, s in scores.items() if s}}
        rows.append(row)
    return rows
