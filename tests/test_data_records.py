"""Chats, prompts and rankings: what a valid record is, and what an error says of another."""

import json

import pytest

from training.data.chats import read_chats
from training.data.prompts import read_prompts
from training.data.rankings import read_rankings
from training.data.records import DataError
from training.data.split import split


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    spoken = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + spoken


@pytest.fixture
def write(tmp_path):
    def write(*records) -> list[str]:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return [str(path)]

    return write


def test_only_good_and_unlabelled_chats_teach(write):
    records = [{"messages": turns("q", f"a{i}"), "label": label} for i, label in enumerate(["good", "bad", None])]
    chats, counts = read_chats(write(*records, {"messages": turns("q", "a3", "q", "a4", system="s"), "id": 7}))
    assert counts == {"good": 1, "bad": 1, "unlabelled": 2}
    assert [chat.messages[-1]["content"] for chat in chats] == ["a0", "a2", "a4"]
    assert [chat.key for chat in chats] == ["q", "q", "7"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"message": []}, "messages: is missing"),
        ({"messages": []}, "messages: must be a non-empty list"),
        ({"messages": ["hi"]}, r"messages\[0\]: must be an object with role and content"),
        ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\]\.role: 'bot' is none of system"),
        ({"messages": turns("q", " ")}, r"messages\[1\]\.content: must be a text that is not empty"),
        ({"messages": turns("q")}, "the last message must be of role 'assistant', not 'user'"),
        ({"messages": turns(system="s")}, "the last message must be of role 'assistant', not 'system'"),
        ({"messages": turns("q", "a")[::-1]}, r"messages\[0\]\.role: is 'assistant' where 'user' is next"),
        ({"messages": turns("q", "a", system="s")[:2] * 2}, r"messages\[2\]\.role: is 'system' where 'assistant'"),
        ({"messages": turns("q", "a"), "label": "great"}, "label: 'great' is neither good nor bad"),
        ({"messages": turns("q", "a"), "id": 1.5}, "id: must be a text or a whole number, not 1.5"),
    ],
)
def test_a_wrong_chat_is_pointed_to(write, record, message):
    with pytest.raises(DataError, match=rf"records\.jsonl:2: .*{message}"):
        read_chats(write({"messages": turns("q", "a")}, record))


def test_prompts_are_texts_messages_or_the_user_turns_of_chats(write):
    prompts = read_prompts(
        write(
            {"prompt": "one"},
            {"prompt": turns("two", "a", "three")},
            {"messages": turns("four", "a", "five", "b", system="s"), "id": "c"},
            {"messages": turns("six", "a", "seven")},
        )
    )
    assert [prompt.messages[-1]["content"] for prompt in prompts] == ["one", "three", "four", "five", "six", "seven"]
    assert [len(prompt.messages) for prompt in prompts] == [1, 3, 2, 4, 1, 3]
    assert [prompt.key for prompt in prompts] == ["one", "two", "c", "c", "six", "six"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "prompt: is missing"),
        ({"prompt": ""}, r"prompt\[0\]\.content: must be a text that is not empty"),
        ({"prompt": turns("q", "a")}, "prompt: the last message must be of role 'user'"),
        ({"messages": turns("q", "a")[1:]}, r"messages\[0\]\.role: is 'assistant' where 'user' is next"),
    ],
)
def test_a_wrong_prompt_is_pointed_to(write, record, message):
    with pytest.raises(DataError, match=rf"records\.jsonl:1: .*{message}"):
        read_prompts(write(record))


def test_a_ranking_has_a_rank_for_every_completion(write):
    rankings = read_rankings(
        write(
            {"prompt": "q", "completions": ["c", "a", "b", ""], "ranking": [2, 1, 2, 5]},
            {"prompt": turns("q", "x", "y"), "chosen": "good", "rejected": "bad"},
            {"prompt": "q", "completions": ["a", "b"], "ranking": [1, 1]},
        )
    )
    assert [ranking.ranks for ranking in rankings] == [[2, 1, 2, 5], [1, 2], [1, 1]]
    assert [ranking.completions for ranking in rankings] == [["c", "a", "b", ""], ["good", "bad"], ["a", "b"]]
    assert {ranking.key for ranking in rankings} == {"q"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"completions": ["a", "b"], "ranking": [1, 2]}, "prompt: is missing"),
        ({"prompt": "q", "completions": ["a"], "ranking": [1]}, "completions: must be a list of at least two"),
        ({"prompt": "q", "completions": ["a", 2], "ranking": [1, 2]}, r"completions\[1\]: must be a text, not 2"),
        ({"prompt": "q", "completions": ["a", "b"]}, "ranking: must be a list of ranks.* not None"),
        ({"prompt": "q", "completions": ["a", "b"], "ranking": [0, 1]}, "ranking: must be a list of ranks"),
        ({"prompt": "q", "completions": ["a", "b"], "ranking": [1, 2, 3]}, "ranking: has 3 ranks for 2 completions"),
        ({"prompt": "q", "chosen": "a"}, "rejected: must be a text, not None"),
    ],
)
def test_a_wrong_ranking_is_pointed_to(write, record, message):
    with pytest.raises(DataError, match=rf"records\.jsonl:1: .*{message}"):
        read_rankings(write(record))


def test_a_conversation_is_on_one_side_in_every_kind_of_record(write):
    """Chats, the prompts made of them and rankings of those prompts share keys, with and without ids."""
    questions = [f"Question {i}?" for i in range(200)]
    chats, _ = read_chats(write(*({"messages": turns(q, "a", "and?", "b")} for q in questions)))
    prompts = read_prompts(write(*({"messages": turns(q, "a", "and?", "b")} for q in questions)))
    rankings = read_rankings(write(*({"prompt": q, "chosen": "a", "rejected": "b"} for q in questions)))
    held = [{record.key for record in split(records, 1, 0.2)[1]} for records in (chats, prompts, rankings)]
    assert held[0] == held[1] == held[2] and len(held[0]) > 20


def test_the_tiny_world_is_valid(tiny_world):
    chats, counts = read_chats([str(tiny_world.chats)])
    assert (len(chats), counts["bad"]) == (88, 8)
    assert len(read_prompts([str(tiny_world.prompts)])) == 24
    assert len(read_rankings([str(tiny_world.rankings)])) == 48
