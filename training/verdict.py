"""What an evaluation comes to: its headline numbers, and in plain words what did not turn out well.

Pure functions of the result that evaluate.py builds, as evaluation.json holds it.
"""

import math
from typing import Any

from training.stats import Estimate

STOP_RATE = 0.95
COLLAPSED = 0.5  # distinct-2 below this part of SFT's
PARROTED = 0.1  # one answer to more than this share of the prompts
LENGTH_BIAS = 0.5
SHOWN_CAPTIONS = 0.5  # of the drawings, that show what they should

Result = dict[str, Any]


def headline(result: Result) -> dict[str, float]:
    """The numbers that the run's metrics keep."""
    out: dict[str, float] = {}
    for stage, answers in result["answers"].items():
        out[f"{stage}_stop_rate"] = answers["stop_rate"]["mean"]
    if reward := result.get("reward"):
        out["reward_accuracy"] = reward["accuracy"]["mean"]
        out |= {name: reward[name]["mean"] for name in ("bag_of_words", "longer_wins") if name in reward}
    against = result.get("ppo_against_sft", {})
    if "gold_gain" in against:
        out |= {"gold_gain": against["gold_gain"]["mean"], "gold_gain_stderr": against["gold_gain"]["stderr"]}
    if "kl" in against:
        out["kl"] = against["kl"]["mean"]
    if translation := result.get("translation"):
        everything = translation["sources"][-1]["model"]
        out |= {"translation_bleu": everything["bleu"], "translation_chrf": everything["chrf"]}
    if image := result.get("image"):
        out["image_match"] = image["trained"]["match_5"]["mean"]
        out["image_frechet"] = image["frechet"] if image["frechet"] is not None else math.nan
    for stage, bits in result["bits_per_byte"].items():
        out[f"{stage}_bits_per_byte"] = bits["mean"]
    return {name: value for name, value in out.items() if math.isfinite(value)}


def warnings(result: Result) -> list[str]:
    """What did not turn out well, or makes the numbers weaker than they look, in plain words."""
    return [
        *_answer_warnings(result),
        *_reward_warnings(result.get("reward")),
        *_ppo_warnings(result),
        *_translation_warnings(result.get("translation")),
        *_image_warnings(result.get("image")),
    ]


def _answer_warnings(result: Result) -> list[str]:
    out = []
    asked, wanted = (result["settings"][name] for name in ("num_prompts", "num_prompts_wanted"))
    if result["answers"] and asked < wanted:
        out.append(f"Only {asked} held-out prompts were there, {wanted} were wanted: give more prompts.")
    for stage, answers in result["answers"].items():
        rate = answers["stop_rate"]["mean"]
        if rate < STOP_RATE:
            limit = result["settings"]["max_new_tokens"]
            out.append(f"{stage.upper()} ends its turn within {limit} tokens on {rate:.1%} of the prompts only.")
    return out


def _reward_warnings(reward: Result | None) -> list[str]:
    if reward is None:
        return []
    out = []
    for name, words in (("longer_wins", "“the longer one wins”"), ("bag_of_words", "a bag of words")):
        if name in reward and not Estimate(**reward[f"over_{name}"]).exceeds(0.0):
            out.append(
                f"The reward model ({reward['accuracy']['mean']:.1%}) is not better than {words} "
                f"({reward[name]['mean']:.1%}) by two standard errors."
            )
    if abs(reward["length_spearman"]) > LENGTH_BIAS:
        more = "longer" if reward["length_spearman"] > 0 else "shorter"
        out.append(f"The reward follows length (Spearman {reward['length_spearman']:+.2f}): it likes {more} answers.")
    return out


def _ppo_warnings(result: Result) -> list[str]:
    against, answers = result.get("ppo_against_sft"), result["answers"]
    if not against:
        return []
    out = []
    if "gold_gain" in against and not Estimate(**against["gold_gain"]).exceeds(0.0):
        gain = against["gold_gain"]
        out.append(
            f"PPO is not better than SFT by two standard errors: {gain['mean']:+.3f} ± {gain['stderr']:.3f} "
            f"over {gain['n']} prompts."
        )
    sft, ppo = answers["sft"], answers["ppo"]
    if ppo["distinct_2"] < COLLAPSED * sft["distinct_2"]:
        out.append(
            f"PPO's answers have collapsed (distinct-2 {ppo['distinct_2']:.2f}, SFT's {sft['distinct_2']:.2f}): "
            "reward hacking. The judge likes what it says, and it says little else."
        )
    top = ppo["most_frequent"]
    if top["share"] > max(PARROTED, 2 * sft["most_frequent"]["share"]):
        out.append(f"PPO gives the same answer to {top['share']:.0%} of the prompts: “{top['text']}”")
    return out


def _translation_warnings(translation: Result | None) -> list[str]:
    if translation is None:
        return []
    rivals = (("copy", "copying the source"), ("dictionary", "a word-for-word dictionary"))
    everything = translation["sources"][-1]
    return [
        f"The translations (chrF {everything['model']['chrf']:.1f}) are not better than {words} "
        f"({everything[name]['chrf']:.1f}) by two standard errors: source and target have not found each other yet."
        for name, words in rivals
        if not Estimate(**translation[f"over_{name}"]).exceeds(0.0)
    ]


def _image_warnings(image: Result | None) -> list[str]:
    if image is None:
        return []
    out = []
    share = image["trained"]["match_5"]["mean"]
    if share < SHOWN_CAPTIONS:
        out.append(f"Only {share:.0%} of the drawings of trained captions have a picture of it among the 5 nearest.")
    held_out = image["held_out"]
    if held_out and not Estimate(**{k: v for k, v in held_out["match_5"].items() if k != "chance"}).exceeds(
        held_out["match_5"]["chance"]
    ):
        out.append(
            f"Of {held_out['n']} held-out captions no more are drawn recognisably than chance would have: it knows "
            "what it was shown, and does not yet put words together."
        )
    return out


def finite(value: Any) -> Any:
    """The same, with null for what JSON has no number for (the error of a single value)."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
