"""Batched answers of a transformers causal LM, for `regenerate`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import numpy as np
import torch
from torch.nn import functional
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from paceline.data.completion import Answer, Prompt
from paceline.errors import ConfigError, OutOfMemoryError, StoppedError

_TOKENS_BETWEEN_CHECKS = 8
"""Tokens generated before answers that have ended leave the batch: `generate` starts again in a few milliseconds."""


class Generator:
    """Answers prompts in batches with a KV cache; greedy, or drawn from (seed, sample id, turn).

    One call holds a cache of len(prompts) x (longest prompt + `max_new_tokens`) positions, never more. Not for
    several threads at once; the model must be in eval mode.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: threading.Event | None = None,
        template_args: dict[str, Any] | None = None,
    ) -> None:
        """`stop`, once set, ends a running `complete` with StoppedError after the token it is at; `template_args` are
        variables handed to the chat template.

        Raises:
            ConfigError: the tokenizer has no chat template, or nothing says which token ends an answer.
        """
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template: set data.chat_template to a file"
            )
        self._model = model
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._top_p = top_p
        self._seed = seed
        self._stop = stop or threading.Event()
        self._template_args = template_args or {}
        self._end_ids = end_token_ids(model, tokenizer)
        self._max_positions: int = getattr(model.config.get_text_config(), "max_position_embeddings", 2**31)

    def complete(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """One answer a prompt, in order; a prompt that cannot be rendered or is too long gets `failure`.

        Raises:
            OutOfMemoryError: the batch did not fit on the device.
            StoppedError: `stop` was set.
        """
        answers: list[Answer | None] = [None] * len(prompts)
        rendered: list[tuple[int, list[int]]] = []
        for i, prompt in enumerate(prompts):
            try:
                ids = self._render(prompt)
            except (jinja2.TemplateError, TypeError, ValueError) as error:
                answers[i] = Answer("", failure="the chat template refuses it", detail=str(error))
                continue
            if len(ids) + self._max_new_tokens > self._max_positions:
                wanted = f"{len(ids)} + {self._max_new_tokens} (max_new_tokens) tokens"
                detail = f"{wanted}, the target has {self._max_positions} positions"
                answers[i] = Answer("", failure="the prompt is too long", detail=detail)
                continue
            rendered.append((i, ids))
        if rendered:
            keys = [(prompts[i].sample_id, prompts[i].turn) for i, _ in rendered]
            outputs = self._generate([ids for _, ids in rendered], keys)
            for (i, _), output in zip(rendered, outputs, strict=True):
                answers[i] = self._answer(output)
        return [answer for answer in answers if answer is not None]

    def _render(self, prompt: Prompt) -> list[int]:
        tools: Any = prompt.tools
        text = self._tokenizer.apply_chat_template(
            prompt.messages, tools=tools, add_generation_prompt=True, tokenize=False, **self._template_args
        )
        return list(self._tokenizer.encode(str(text), add_special_tokens=False))

    def _answer(self, output: list[int]) -> Answer:
        ended = self._has_ended(output)
        text = self._tokenizer.decode(
            output[:-1] if ended else output, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return Answer(str(text), num_tokens=len(output), truncated=not ended)

    def _generate(self, prompts: list[list[int]], keys: list[tuple[int, int]]) -> list[list[int]]:
        """New tokens of each prompt, up to and with the one that ends it.

        A few tokens at a time: answers that have ended leave the batch, so that they cost nothing while the
        longest one goes on.
        """
        model: Any = self._model  # transformers' own annotations make `generate` a tensor
        tokens, mask = (part.to(model.get_input_embeddings().weight.device) for part in self._left_padded(prompts))
        longest = tokens.shape[1]
        outputs: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))
        cache = self._divisible_cache()
        with torch.inference_mode(), self._memory_explained(len(prompts), longest):
            while running:
                num_left = self._max_new_tokens - (tokens.shape[1] - longest)
                output = model.generate(
                    input_ids=tokens,
                    attention_mask=mask,
                    past_key_values=cache,
                    max_new_tokens=num_left if cache is None else min(num_left, _TOKENS_BETWEEN_CHECKS),
                    logits_processor=self._processors([keys[i] for i in running], longest),
                    stopping_criteria=StoppingCriteriaList([_StopRequested(self._stop)]),
                    **self._plain_settings(),
                )
                kept = []
                for row, new_tokens in enumerate(output[:, tokens.shape[1] :].tolist()):
                    outputs[running[row]] += self._cut(new_tokens)
                    if not self._has_ended(outputs[running[row]]):
                        kept.append(row)
                if output.shape[1] - longest >= self._max_new_tokens or not kept:
                    break
                mask = functional.pad(mask, (0, output.shape[1] - tokens.shape[1]), value=1)[kept]
                tokens = output[kept]
                running = [running[row] for row in kept]
                if cache is not None and len(kept) < len(output):
                    cache.batch_select_indices(torch.tensor(kept, device=tokens.device))
        return outputs

    def _left_padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(ids) for ids in prompts)
        tokens = torch.full((len(prompts), longest), min(self._end_ids))
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(prompts):
            tokens[row, longest - len(ids) :] = torch.tensor(ids)
            mask[row, longest - len(ids) :] = 1
        return tokens, mask

    def _plain_settings(self) -> dict[str, Any]:
        """Greedy is greedy, whatever the checkpoint's generation_config.json says."""
        return {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "repetition_penalty": 1.0,
            "num_beams": 1,
            "eos_token_id": sorted(self._end_ids),
            "pad_token_id": min(self._end_ids),
        }

    def _divisible_cache(self) -> DynamicCache | None:
        """A cache whose rows can be dropped; None for targets with recurrent layers, which keep a batch to its end."""
        cache = DynamicCache(config=self._model.config)
        divisible = {DynamicLayer, DynamicSlidingWindowLayer}
        return cache if all(type(layer) in divisible for layer in cache.layers) else None

    def _has_ended(self, output: list[int]) -> bool:
        return bool(output) and output[-1] in self._end_ids

    def _cut(self, new_tokens: list[int]) -> list[int]:
        for i, token in enumerate(new_tokens):
            if token in self._end_ids:
                return new_tokens[: i + 1]
        return new_tokens

    def _processors(self, keys: list[tuple[int, int]], num_prompt_tokens: int) -> LogitsProcessorList:
        if self._temperature == 0.0:
            return LogitsProcessorList()
        processors = LogitsProcessorList([TemperatureLogitsWarper(self._temperature)])
        if self._top_p < 1.0:
            processors.append(TopPLogitsWarper(self._top_p))
        uniforms = np.stack(
            [np.random.default_rng([self._seed, *key]).random(self._max_new_tokens) for key in keys], axis=1
        )
        processors.append(_DrawPerSample(torch.from_numpy(uniforms), num_prompt_tokens))
        return processors

    @contextlib.contextmanager
    def _memory_explained(self, num_prompts: int, longest: int) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"no memory for {num_prompts} answers of up to {longest} + {self._max_new_tokens} tokens: "
                "lower regeneration.batch_size or regeneration.max_new_tokens"
            ) from error


class _DrawPerSample(LogitsProcessor):
    """Leaves one token a row: the one that the row's own uniform number picks from its distribution.

    Greedy choice after it is then a draw that depends neither on the other rows nor on the global generator.
    """

    def __init__(self, uniforms: torch.Tensor, num_prompt_tokens: int) -> None:
        self._uniforms = uniforms  # float64[max new tokens, rows]
        self._num_prompt_tokens = num_prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = self._uniforms[input_ids.shape[1] - self._num_prompt_tokens].to(scores.device)
        cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
        threshold = (uniform * cumulative[:, -1]).unsqueeze(1)
        token = torch.searchsorted(cumulative, threshold, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class _StopRequested(StoppingCriteria):
    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self._stop.is_set():
            raise StoppedError("generation was asked to stop")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the generation configuration's and the tokenizer's own.

    Raises:
        ConfigError: there is none.
    """
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    ids.discard(None)
    if not ids:
        raise ConfigError("neither generation_config.json nor the tokenizer names an end-of-sequence token")
    return frozenset(ids)
