"""Speculative decoding with real small drafts: greedy output is the target's own, whatever the draft says."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3_5TextConfig

from paceline.drafts.interface import DraftDecoder
from paceline.errors import ConfigError, LosslessnessError
from paceline.evaluation import decoding
from paceline.evaluation.decoding import Choice, accept_by_rejection, decode_plain, decode_with_draft
from paceline.evaluation.evaluate import (
    DecodingResult,
    decode_references,
    evaluate_decoder,
    evaluate_lookup,
    repeated_share,
    text_features,
)
from paceline.evaluation.lookup import LookupDecoder
from paceline.evaluation.losslessness import Prompt, Surprise, check_drawn, check_equal, count_ties, measure_surprise
from paceline.evaluation.walk import WalkSums, candidate_starts, walk_spans
from paceline.target.hf.stepping import SteppingTarget
from tiny import VOCAB_SIZE, tiny_config

K = 4
NEW_TOKENS = 40
LAYERS = (0, 2)


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """Sharpen a random model's attention until its greedy output does not fall into a loop at once."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            if "q_proj" in name or "q_norm" in name:
                parameter.mul_(4.0)
            if "embed" in name:
                parameter.mul_(0.3)
    return model.eval()


@pytest.fixture(scope="module")
def target() -> SteppingTarget:
    torch.manual_seed(1)
    return SteppingTarget(lively(AutoModelForCausalLM.from_config(tiny_config("qwen3"))))


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    return [Prompt(f"p{n}", tuple(torch.randint(0, 256, (n,), generator=generator).tolist())) for n in (1, 9, 17)]


class TextDraft(DraftDecoder):
    """Proposes from the text alone: a function of all tokens so far."""

    num_drafted = K

    def __init__(self, first: int, guess: Callable[[list[int]], list[int]]) -> None:
        self.text = [first]
        self.guess = guess
        self.seen = torch.zeros(0)

    def extend(self, hidden: Tensor, next_tokens: Tensor) -> None:
        assert len(hidden) == len(next_tokens)
        self.text += next_tokens.tolist()
        self.seen = torch.cat([self.seen, hidden]) if len(self.seen) else hidden

    def propose(self) -> Tensor:
        return torch.tensor(self.guess(self.text), dtype=torch.int64)


@torch.no_grad()
def continue_with(model: PreTrainedModel, text: list[int], num_tokens: int = K) -> list[int]:
    """Greedy continuation without a cache."""
    text = list(text)
    for _ in range(num_tokens):
        text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[-num_tokens:]


def random_guess(text: list[int]) -> list[int]:
    return torch.randint(0, 256, (K,), generator=torch.Generator().manual_seed(len(text))).tolist()


def sometimes_right(model: PreTrainedModel) -> Callable[[list[int]], list[int]]:
    """The target's own continuation, wrong from a place that changes with the length of the text."""

    def guess(text: list[int]) -> list[int]:
        right = continue_with(model, text)
        wrong_from = (len(text) * 7) % (K + 1)
        return right[:wrong_from] + [(token + 1) % 256 for token in right[wrong_from:]]

    return guess


def truncated(target: SteppingTarget) -> PreTrainedModel:
    """The target without its last layer."""
    short = AutoModelForCausalLM.from_config(tiny_config("qwen3", num_hidden_layers=3))
    short.load_state_dict(target.model.state_dict(), strict=False)
    return short.eval()


def guesses_of(kind: str, target: SteppingTarget) -> Callable[[list[int]], list[int]]:
    if kind == "random":
        return random_guess
    if kind == "oracle":
        return lambda text: continue_with(target.model, text)
    if kind == "truncated":
        short = truncated(target)
        return lambda text: continue_with(short, text)
    return sometimes_right(target.model)


def acceptance_length_of(steps: list) -> float:
    sums = WalkSums(K)
    sums.add_steps(steps)
    return sums.result()["acceptance_length"]


def test_the_target_of_these_tests_does_not_just_repeat_itself(target: SteppingTarget, prompts: list[Prompt]) -> None:
    for prompt in prompts[1:]:
        assert len(set(target.generate(prompt.tensor(), NEW_TOKENS))) > 10


@pytest.mark.parametrize("kind", ["random", "oracle", "truncated", "sometimes right"])
def test_greedy_output_equals_generate_whatever_the_draft_proposes(
    kind: str, target: SteppingTarget, prompts: list[Prompt]
) -> None:
    guess = guesses_of(kind, target)
    sums = WalkSums(K)
    for prompt in prompts:
        draft = TextDraft(prompt.tokens[0], guess)
        decoded = decode_with_draft(target, draft, LAYERS, prompt.tensor(), NEW_TOKENS)
        assert decoded.tokens == target.generate(prompt.tensor(), NEW_TOKENS)
        sums.add_steps(decoded.steps)
        # The draft has seen the states that a plain forward over the whole text gives.
        text = torch.tensor([draft.text])
        states = target.model(text, output_hidden_states=True).hidden_states
        expected = torch.cat([states[i + 1][0] for i in LAYERS], dim=-1)
        torch.testing.assert_close(draft.seen, expected[:-1], rtol=1e-4, atol=1e-4)
    length = sums.result()["acceptance_length"]
    if kind == "oracle":
        assert length == K + 1
    elif kind == "random":
        assert 1.0 <= length < 1.1
    else:
        assert 1.1 < length < K


@pytest.mark.parametrize("kind", ["random", "oracle", "sometimes right"])
def test_a_text_that_outgrows_a_length_of_longrope_is_read_anew(kind: str, prompts: list[Prompt]) -> None:
    """From 33 tokens on Phi-3 turns the whole text by other frequencies: a forward without a cache says how."""
    torch.manual_seed(1)
    target = SteppingTarget(lively(AutoModelForCausalLM.from_config(tiny_config("phi3"))))
    guess = guesses_of(kind, target)
    for prompt in prompts:
        assert len(prompt.tokens) <= 32 < len(prompt.tokens) + NEW_TOKENS
        draft = TextDraft(prompt.tokens[0], guess)
        decoded = decode_with_draft(target, draft, LAYERS, prompt.tensor(), NEW_TOKENS)
        text = torch.tensor([[*prompt.tokens, *decoded.tokens]])
        with torch.no_grad():
            short = target.model(text[:, :32], output_hidden_states=True)
            whole = target.model(text, output_hidden_states=True)
        logits = torch.cat([short.logits[0], whole.logits[0, 32:]])
        assert decoded.tokens == logits.argmax(-1)[len(prompt.tokens) - 1 : -1].tolist()
        expected = torch.cat(
            [torch.cat([short.hidden_states[i + 1][0], whole.hidden_states[i + 1][0, 32:]]) for i in LAYERS], dim=-1
        )
        torch.testing.assert_close(draft.seen, expected[: len(draft.seen)], rtol=1e-4, atol=1e-4)
        assert len(draft.seen) > 32


@pytest.mark.parametrize("kind", ["random", "oracle", "sometimes right"])
def test_decoding_and_the_walk_over_its_text_take_the_same_steps(
    kind: str, target: SteppingTarget, prompts: list[Prompt]
) -> None:
    guess = guesses_of(kind, target)
    for prompt in prompts:
        decoded = decode_with_draft(target, TextDraft(prompt.tokens[0], guess), (0,), prompt.tensor(), NEW_TOKENS)
        row = text_features(target, (0,), prompt, decoded.tokens)
        starts = candidate_starts(row.row, K, first_start=0)
        proposals = torch.tensor([guess(row.row.tokens[: p + 1].tolist()) for p in starts]).numpy()
        (walked,) = walk_spans(row.row, row.features.greedy.numpy(), starts, proposals, first_start=0)
        assert walked == decoded.steps


def test_decoding_stops_at_the_first_end_token_like_generate(target: SteppingTarget, prompts: list[Prompt]) -> None:
    written = target.generate(prompts[1].tensor(), NEW_TOKENS)
    ends = (written[10], written[22])
    stopping = SteppingTarget(target.model, eos_token_ids=ends)
    expected = stopping.generate(prompts[1].tensor(), NEW_TOKENS)
    assert len(expected) < NEW_TOKENS  # the premise
    guess = guesses_of("oracle", target)
    decoded = decode_with_draft(stopping, TextDraft(prompts[1].tokens[0], guess), (0,), prompts[1].tensor(), NEW_TOKENS)
    assert decoded.tokens == expected
    assert decode_plain(stopping, prompts[1].tensor(), NEW_TOKENS).tokens == expected
    assert sum(step.num_tokens for step in decoded.steps) == len(expected) - 1
    assert decoded.uncut_accepted >= sum(step.accepted for step in decoded.steps)


@pytest.mark.parametrize("kind", ["sliding", "recurrent"])
def test_caches_that_forget_are_cropped_without_a_trace(kind: str, prompts: list[Prompt]) -> None:
    torch.manual_seed(2)
    if kind == "sliding":
        config = tiny_config("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    else:
        layer_types = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
        shapes = tiny_config("qwen3").to_diff_dict() | {"layer_types": layer_types, "dtype": "float32"}
        linear = {f"linear_{side}_head_dim": 8 for side in ("key", "value")}
        config = Qwen3_5TextConfig(
            **{k: v for k, v in shapes.items() if k not in ("model_type", "architectures")},
            **linear,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
        )
    target = SteppingTarget(lively(AutoModelForCausalLM.from_config(config)))
    draft = TextDraft(prompts[2].tokens[0], sometimes_right(target.model))
    decoded = decode_with_draft(target, draft, LAYERS, prompts[2].tensor(), NEW_TOKENS)
    assert decoded.tokens == target.generate(prompts[2].tensor(), NEW_TOKENS)
    assert 1 < acceptance_length_of(decoded.steps) < K
    states = target.model(torch.tensor([draft.text]), output_hidden_states=True).hidden_states
    expected = torch.cat([states[i + 1][0] for i in LAYERS], dim=-1)
    torch.testing.assert_close(draft.seen, expected[:-1], rtol=1e-3, atol=1e-3)


def test_a_text_cannot_be_cropped_beyond_its_newest_forward(target: SteppingTarget) -> None:
    sequence = target.sequence()
    sequence.advance(torch.arange(5))
    sequence.advance(torch.arange(3))
    with pytest.raises(ValueError, match="cannot remove 3"):
        sequence.crop(3)
    sequence.crop(2)
    assert sequence.num_tokens == 6


def test_a_capture_layer_the_target_does_not_have_is_refused(target: SteppingTarget) -> None:
    with pytest.raises(ConfigError, match=r"\[1, 4\].*0\.\.3"):
        target.sequence((1, 4))


def test_evaluation_counts_every_prompt_and_knows_the_speed_without_a_draft(
    target: SteppingTarget, prompts: list[Prompt]
) -> None:
    references = decode_references(target, prompts[1:2] * 2, NEW_TOKENS)
    guess = guesses_of("oracle", target)
    result = evaluate_decoder(
        target, references, lambda: TextDraft(prompts[1].tokens[0], guess), (0,), NEW_TOKENS
    ).result()
    assert result["acceptance_length"] == K + 1
    assert result["lossless"] == "exact"
    assert result["prompts"] == 2
    assert result["new_tokens"] == 2 * NEW_TOKENS
    assert result["rate"] == [1.0] * K
    assert result["tokens_per_forward"] == NEW_TOKENS / 9  # the prompt's forward, 7 steps of 5 tokens, one of 4
    assert result["plain_tokens_per_s"] > 0


def test_a_loop_that_accepts_everything_is_found_out(target: SteppingTarget, prompts: list[Prompt]) -> None:
    reference = decode_references(target, prompts[:1], 8)[0]
    wrong = list(reference.plain.tokens)
    wrong[3] = (wrong[3] + 1) % 256
    with pytest.raises(LosslessnessError, match=r"prompt p1, new token 3: .* wrote"):
        check_equal(prompts[0], wrong, reference.generated)
    with pytest.raises(LosslessnessError, match=r"new token 7: speculative decoding wrote nothing"):
        check_equal(prompts[0], reference.generated[:7], reference.generated)


def test_in_bf16_a_text_is_scored_and_ties_are_counted(target: SteppingTarget, prompts: list[Prompt]) -> None:
    torch.manual_seed(1)
    model = lively(AutoModelForCausalLM.from_config(tiny_config("qwen3"))).to(torch.bfloat16)
    half = SteppingTarget(model)
    guess = sometimes_right(model)
    (reference,) = references = decode_references(half, prompts[1:2], NEW_TOKENS)
    assert reference.generated is None
    result = evaluate_decoder(half, references, lambda: TextDraft(prompts[1].tokens[0], guess), (0,), NEW_TOKENS)
    assert result.result()["lossless"] == "within ties"
    for at in (0, NEW_TOKENS - 1):
        wrong = list(reference.plain.tokens)
        wrong[at] = (wrong[at] + 1) % 256
        with pytest.raises(LosslessnessError, match=f"prompt p9, new token {at}"):
            count_ties(half, prompts[1], wrong, NEW_TOKENS)
    with pytest.raises(LosslessnessError, match="39 tokens"):
        count_ties(half, prompts[1], reference.plain.tokens[:39], NEW_TOKENS)


def test_a_nearly_equal_token_is_a_tie_and_not_an_error(target: SteppingTarget, prompts: list[Prompt]) -> None:
    logits = target.score(torch.tensor((*prompts[1].tokens, 5)), num_logits=1)[0]
    best, second = logits.topk(2).indices.tolist()
    with torch.no_grad():
        weight = target.model.lm_head.weight
        before = weight.clone()
        try:
            weight[second] = weight[best] * 0.999
            assert count_ties(target, prompts[1], [best], 1) == 0
            assert count_ties(target, prompts[1], [second], 1) == 1
        finally:
            weight.copy_(before)


def test_lookup_proposes_what_followed_the_latest_longest_match() -> None:
    draft = LookupDecoder(3)
    draft.extend(torch.empty(6, 0), torch.tensor([1, 2, 3, 9, 2, 3]))
    assert draft.propose().tolist() == [9, 2, 3]
    draft.extend(torch.empty(1, 0), torch.tensor([7]))
    assert draft.propose().tolist() == []
    draft.extend(torch.empty(3, 0), torch.tensor([1, 2, 3]))
    assert draft.propose().tolist() == [9, 2, 3]  # after 1 2 3, not after the later 2 3


def test_lookup_is_lossless_and_helps_on_a_text_that_repeats_itself() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()  # the next token depends on the newest alone: soon a cycle
    target = SteppingTarget(model)
    references = decode_references(target, [Prompt("loop", (1, 2, 3))], NEW_TOKENS)
    assert repeated_share([references[0].plain.tokens]) > 0.5  # the premise
    assert evaluate_lookup(target, references, K, NEW_TOKENS).result()["acceptance_length"] > 1.5


def test_the_share_of_repeated_4_grams_counts_within_a_text() -> None:
    assert repeated_share([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]) == 0.0
    assert repeated_share([[1, 1, 1, 1, 1, 1]]) == 2 / 3
    assert repeated_share([[1, 2]]) == 0.0


def test_sampled_steps_are_distributed_like_the_target() -> None:
    """8,000 sampled steps over 4 tokens: frequencies of every outcome within 5 standard errors."""
    probabilities = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.4, 0.1]])
    drafts = torch.tensor([1, 3])
    generator = torch.Generator().manual_seed(0)
    num_draws = 8_000
    first, second_after_1, third_after_13 = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    for _ in range(num_draws):
        tokens = accept_by_rejection(drafts, probabilities, generator).tolist()
        first[tokens[0]] += 1
        if len(tokens) > 1:
            second_after_1[tokens[1]] += 1
        if len(tokens) > 2:
            third_after_13[tokens[2]] += 1
    for counts, expected in zip((first, second_after_1, third_after_13), probabilities, strict=True):
        n = counts.sum()
        error = (expected * (1 - expected) / n).sqrt()
        assert ((counts / n - expected).abs() <= 5 * error + 1e-9).all()
    assert first.sum() == num_draws


@torch.no_grad()
def test_sampled_decoding_with_a_draft_has_the_distribution_of_sampling_without(
    target: SteppingTarget, prompts: list[Prompt]
) -> None:
    prompt, temperature, num_draws = prompts[1], 0.1, 300
    endless = SteppingTarget(target.model, eos_token_ids=())
    texts = torch.tensor([[*prompt.tokens, token] for token in range(VOCAB_SIZE)])
    first, second = (torch.softmax(target.model(texts).logits[:, at] / temperature, -1) for at in (-2, -1))
    expected = first[0] @ second  # of the second new token, whatever the first was: the first a draft has a say in
    likely = int(expected.argmax())
    assert 0.05 < expected[likely] < 0.95  # the premise: neither certain nor flat
    counts = torch.zeros(VOCAB_SIZE)
    for seed in range(num_draws):
        generator = torch.Generator().manual_seed(seed)
        draft = TextDraft(prompt.tokens[0], lambda _: [likely] * K)
        decoded = decode_with_draft(endless, draft, (), prompt.tensor(), 2, temperature, generator)
        counts[decoded.tokens[1]] += 1
    error = (expected * (1 - expected) / num_draws).sqrt()
    assert ((counts / num_draws - expected).abs() <= 5 * error + 2 / num_draws).all()


WARM = Choice(temperature=0.1, seed=1)


@pytest.fixture(scope="module")
def endless(target: SteppingTarget) -> SteppingTarget:
    return SteppingTarget(target.model, eos_token_ids=())


def test_texts_the_target_draws_surprise_it_as_much_as_they_should(
    endless: SteppingTarget, prompts: list[Prompt]
) -> None:
    """At its own temperature; those of another, and greedy ones, are found out."""

    def surprise_of(temperature: float) -> Surprise:
        total = Surprise()
        for seed in range(2):
            for i, prompt in enumerate(prompts):
                drawn = decode_plain(endless, prompt.tensor(), 40, temperature, Choice(1.0, seed).generator(i))
                total += measure_surprise(endless, prompt, drawn.tokens, WARM.temperature)
        return total

    honest = surprise_of(WARM.temperature)
    assert honest.num_tokens == 2 * 3 * 40
    assert honest.spread > 5, "the premise: there is something to choose from"
    assert abs(honest.deviation) < 4
    check_drawn(honest, WARM.temperature)
    for other, kind in ((0.0, "less"), (0.07, "less"), (0.15, "more")):
        with pytest.raises(LosslessnessError, match=f"240 tokens drawn at temperature 0.1 .* nats {kind} surprising"):
            check_drawn(surprise_of(other), WARM.temperature)


def test_one_rare_token_among_certain_ones_is_chance_and_many_are_not() -> None:
    certain = Surprise(0.0, 1e-3, 1000)
    rare = Surprise(14.0, 1e-6, 1)
    check_drawn(certain + rare, 0.1)
    assert (certain + rare).deviation > 5, "the premise: a test of standard deviations alone would not have it"
    with pytest.raises(LosslessnessError, match="more surprising"):
        check_drawn(certain + rare + rare + rare, 0.1)
    check_drawn(Surprise(), 0.1)


def evaluate_drawn(endless: SteppingTarget, prompt: Prompt, kind: str, choice: Choice = WARM) -> DecodingResult:
    """Three answers of 40 tokens."""
    references = decode_references(endless, [prompt] * 3, 40, choice)
    guess = guesses_of(kind, endless)
    return evaluate_decoder(endless, references, lambda: TextDraft(prompt.tokens[0], guess), (0,), 40, choice)


def test_drawn_output_is_held_against_the_targets_distribution(endless: SteppingTarget, prompts: list[Prompt]) -> None:
    result = evaluate_drawn(endless, prompts[1], "oracle")
    figures = result.result()
    assert re.fullmatch(r"as drawn at temperature 0\.1 \([+-]\d\.\d sd\)", figures["lossless"])
    assert "walk" not in figures, "the walk asks for greedy tokens"
    assert figures["acceptance_length"] > 1.5
    assert result.surprise.num_tokens == figures["new_tokens"] == 3 * 40
    assert len({tuple(answer) for answer in result.answers}) == 3, "each prompt has draws of its own"
    assert evaluate_drawn(endless, prompts[1], "oracle").answers == result.answers
    assert evaluate_drawn(endless, prompts[1], "random", Choice(0.1, seed=2)).answers != result.answers


def test_a_loop_that_takes_the_drafts_word_for_it_is_found_out_when_drawing_too(
    endless: SteppingTarget, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    def accept_all(drafts: Tensor, probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.cat([drafts, torch.multinomial(probabilities[len(drafts)], 1, generator=generator)])

    monkeypatch.setattr(decoding, "accept_by_rejection", accept_all)
    for kind, way in (("random", "more"), ("oracle", "less")):
        with pytest.raises(LosslessnessError, match=f"nats {way} surprising"):
            evaluate_drawn(endless, prompts[1], kind)
