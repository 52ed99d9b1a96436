"""Batched answers: those of transformers' own `generate`, and draws that depend on nothing but the sample."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5TextConfig

from paceline.data.completion import Prompt
from paceline.errors import ConfigError, OutOfMemoryError, StoppedError
from paceline.target.hf.generation import Generator
from tiny import save_tiny_target, tiny_tokenizer

TEXTS = ["a", "a longer question?", "of quite another length, to be padded", "b", "?!"]
PROMPTS = [Prompt(i, 0, [{"role": "user", "content": text}]) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path: Path = save_tiny_target(tmp_path_factory.mktemp("target"), request.param, seed=3)
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def alone(model: Any, tokenizer: Any, prompt: Prompt, num_tokens: int) -> list[int]:
    """New tokens of an unpadded greedy `generate`."""
    ids = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=False)
    output = model.generate(torch.tensor([ids]), max_new_tokens=num_tokens, do_sample=False)
    return output[0, len(ids) :].tolist()


def test_greedy_answers_of_a_batch_are_those_of_generate_one_by_one(target: tuple[Any, Any]) -> None:
    model, tokenizer = target
    answers = Generator(model, tokenizer, max_new_tokens=24).complete(PROMPTS)
    expected = [alone(model, tokenizer, prompt, 24) for prompt in PROMPTS]
    assert [a.text for a in answers] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert len({a.text for a in answers}) > 1


def test_answers_that_have_ended_leave_the_batch(target: tuple[Any, Any]) -> None:
    model, tokenizer = target
    end = alone(model, tokenizer, PROMPTS[1], 24)[3]
    sizes: list[int] = []
    hook = model.register_forward_hook(lambda _m, _i, output: sizes.append(len(output.logits)))
    configured = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = end
    try:
        answers = Generator(model, tokenizer, max_new_tokens=24).complete(PROMPTS)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert Generator(model, tokenizer, max_new_tokens=24).complete([prompt]) == [answer]
    finally:
        model.generation_config.eos_token_id = configured
        hook.remove()
    assert not answers[1].truncated
    assert any(answer.num_tokens > 8 for answer in answers)
    assert sizes[0] == len(PROMPTS)
    assert sizes[8] < len(PROMPTS)


def test_a_target_with_recurrent_layers_answers_a_batch_as_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        eos_token_id=256,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    tokenizer = tiny_tokenizer()
    answers = Generator(model, tokenizer, max_new_tokens=20).complete(PROMPTS)
    expected = [alone(model, tokenizer, prompt, 20) for prompt in PROMPTS]
    assert [a.text for a in answers] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]


def test_an_answer_ends_at_an_end_token_and_only_a_cut_one_is_marked(target: tuple[Any, Any]) -> None:
    model, tokenizer = target
    whole = [alone(model, tokenizer, prompt, 24) for prompt in PROMPTS]
    end = whole[1][7]  # a token of a real answer plays the end
    configured = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [end]
    try:
        answers = Generator(model, tokenizer, max_new_tokens=24).complete(PROMPTS)
    finally:
        model.generation_config.eos_token_id = configured
    ends = {end, tokenizer.eos_token_id}
    for answer, tokens in zip(answers, whole, strict=True):
        num_before = next((i for i, token in enumerate(tokens) if token in ends), None)
        assert answer.truncated == (num_before is None)
        assert answer.num_tokens == (24 if num_before is None else num_before + 1)
        assert answer.text == tokenizer.decode(tokens[:num_before], skip_special_tokens=True)
    assert not answers[1].truncated


def test_a_draw_depends_on_seed_sample_and_turn_and_not_on_the_batch(target: tuple[Any, Any]) -> None:
    model, tokenizer = target

    def draw(prompts: list[Prompt], seed: int = 0) -> dict[tuple[int, int], str]:
        torch.manual_seed(len(prompts))  # the global generator must not matter
        settings: Any = {"temperature": 1.3, "top_p": 0.9, "seed": seed}
        answers = Generator(model, tokenizer, max_new_tokens=16, **settings).complete(prompts)
        return {(p.sample_id, p.turn): a.text for p, a in zip(prompts, answers, strict=True)}

    together = draw(PROMPTS)
    assert draw(PROMPTS[::-1]) == together
    assert {key: text for one in PROMPTS for key, text in draw([one]).items()} == together
    assert draw(PROMPTS, seed=1) != together
    question = PROMPTS[1].messages
    assert len(set(draw([Prompt(i, turn, question) for i in range(2) for turn in range(2)]).values())) == 4


def test_draws_follow_the_targets_distribution(target: tuple[Any, Any]) -> None:
    model, tokenizer = target
    prompts = [Prompt(i, 0, PROMPTS[0].messages) for i in range(3000)]
    answers = Generator(model, tokenizer, max_new_tokens=1, temperature=2.0).complete(prompts)
    ids = tokenizer.apply_chat_template(PROMPTS[0].messages, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        expected = (model(torch.tensor([ids])).logits[0, -1].float() / 2.0).softmax(-1)
    token = int(expected[32:127].argmax()) + 32
    text = tokenizer.decode([token])
    same = [t for t in range(len(expected)) if tokenizer.decode([t], skip_special_tokens=True) == text]
    share = sum(answer.text == text for answer in answers) / len(answers)
    probability = float(expected[same].sum())
    assert 0.005 < probability < 0.9
    assert abs(share - probability) < 4 * (probability * (1 - probability) / len(answers)) ** 0.5 + 1e-3


def test_a_prompt_that_is_too_long_or_cannot_be_rendered_fails_alone(tiny_target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_target).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    tokenizer.chat_template = "{% if messages[0].content == '?!' %}{{ raise_exception('no marks') }}{% endif %}" + str(
        tokenizer.chat_template
    )
    long = Prompt(9, 0, [{"role": "user", "content": "x" * 4090}])
    first, second, third = Generator(model, tokenizer, max_new_tokens=8).complete([PROMPTS[0], long, PROMPTS[4]])
    assert first.failure is None
    assert second.failure == "the prompt is too long"
    assert "4096 positions" in second.detail
    assert third.failure == "the chat template refuses it"
    assert third.detail == "no marks"


def test_a_running_batch_stops_when_asked(tiny_target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_target).eval()
    stop = threading.Event()
    num_forwards = 0

    def count(*_: Any) -> None:
        nonlocal num_forwards
        num_forwards += 1
        if num_forwards == 3:
            stop.set()

    model.register_forward_hook(count)
    generator = Generator(model, AutoTokenizer.from_pretrained(tiny_target), max_new_tokens=500, stop=stop)
    with pytest.raises(StoppedError):
        generator.complete(PROMPTS)
    assert num_forwards == 3


def test_running_out_of_memory_names_the_setting_to_lower(tiny_target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_target).eval()

    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_hook(exhausted)
    generator = Generator(model, AutoTokenizer.from_pretrained(tiny_target), max_new_tokens=4)
    with pytest.raises(OutOfMemoryError, match=r"regeneration\.batch_size"):
        generator.complete(PROMPTS)


def test_a_tokenizer_without_a_chat_template_is_refused(tiny_target: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="chat template"):
        Generator(AutoModelForCausalLM.from_pretrained(tiny_target), tokenizer, max_new_tokens=4)
