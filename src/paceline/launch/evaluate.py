"""`paceline evaluate`: what a run's drafts are worth in real speculative decoding, proven lossless."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.data.chat import ChatTokenizer
from paceline.data.conversations import read_conversations
from paceline.data.prepared import PreparedData
from paceline.errors import DataError
from paceline.evaluation.decoding import Choice
from paceline.evaluation.evaluate import (
    Reference,
    decode_references,
    evaluate_algorithm,
    evaluate_lookup,
    repeated_share,
)
from paceline.evaluation.losslessness import Prompt
from paceline.launch.prepare import load_run_tokenizer, prepare_data
from paceline.launch.target_facts import known_facts
from paceline.launch.trained import (
    Which,
    build_draft,
    check_same_target,
    choose_drafts,
    is_trained_data,
    load_trained,
    recall_token_counts,
)
from paceline.schema.target_info import TargetInfo
from paceline.target.hf.engine import HFEngine
from paceline.target.hf.stepping import SteppingTarget
from paceline.target.hf.weights import CheckpointWeights

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Evaluation:
    """What was measured, as plain data but for the order of `drafts`."""

    drafts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By draft: figures of `DecodingResult.result`, and "untrained" and "lookup" with theirs where asked for."""
    samples: list[tuple[str, str]] = field(default_factory=list)
    """(prompt, answer) of the target, as text."""
    repeated_share: float = 0.0
    """Of 4-grams in the target's answers."""
    num_prompts: int = 0
    temperature: float = 0.0


def evaluate_run(
    config: RunConfig, names: list[str], which: Which = "best", baselines: bool = False, num_samples: int = 2
) -> Evaluation:
    """Decode held-out prompts with the target alone and with each draft; writes evaluation.json.

    Args:
        baselines: decode with each draft untrained and with prompt look-up as well.

    Raises:
        LosslessnessError: a draft changed the target's output: a greedy token, or the distribution of drawn ones.
        RunDirectoryError: the run was trained against another target.
    """
    run, names = RunDir(Path(config.run_dir)), choose_drafts(config, names)
    target_config = config.target
    if config.evaluation.dtype != "auto":
        target_config = target_config.model_copy(update={"dtype": config.evaluation.dtype})
    facts = known_facts(config)
    prepared, counts = prepare_data(config, run, facts), recall_token_counts(run)
    if not is_trained_data(run, prepared):
        logger.warning(
            "this is not the data %s was trained on (files, [data] settings or chat template differ): held-out prompts "
            "may have been trained on, or be rendered in another way",
            run.root,
        )
    engine = HFEngine(target_config)
    try:
        info = engine.info()
        check_same_target(run, info)
        target = SteppingTarget(engine.model, info.eos_token_ids)
        weights = CheckpointWeights(target_config, target.device, target.dtype)
        prompts = list(_prompts(config, prepared))
        limit, choice = config.evaluation.max_new_tokens, Choice(config.evaluation.temperature, config.seed)
        references = decode_references(target, prompts, limit, choice)
        evaluation = _describe(references, engine.tokenizer, num_samples)
        evaluation.temperature = choice.temperature
        for name in names:
            algorithm = build_draft(config, name, info, weights, counts, target.device, target.dtype)
            algorithm.draft.eval()
            figures: dict[str, Any] = {}
            if baselines:
                figures["untrained"] = evaluate_algorithm(target, references, algorithm, limit, choice).result()
                figures["lookup"] = evaluate_lookup(target, references, algorithm.num_drafted, limit, choice).result()
            load_trained(algorithm, run, name, which)
            trained = evaluate_algorithm(target, references, algorithm, limit, choice)
            evaluation.drafts[name] = trained.result() | figures
    finally:
        engine.close()
    run.evaluation.write_text(json.dumps(evaluation_facts(evaluation, info), indent=1) + "\n", encoding="utf-8")
    return evaluation


def evaluation_facts(evaluation: Evaluation, info: TargetInfo) -> dict[str, Any]:
    """evaluation.json."""
    return {
        "target": info.name,
        "dtype": info.dtype,
        "prompts": evaluation.num_prompts,
        "temperature": evaluation.temperature,
        "repeated_4grams": evaluation.repeated_share,
        "samples": [{"prompt": prompt, "answer": answer} for prompt, answer in evaluation.samples],
        "drafts": evaluation.drafts,
    }


def _describe(references: list[Reference], tokenizer: PreTrainedTokenizerBase, num_samples: int) -> Evaluation:
    answers = [reference.plain.tokens for reference in references]

    def text(tokens: Any) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    return Evaluation(
        samples=[(text(r.prompt.tokens), text(r.plain.tokens)) for r in references[:num_samples]],
        repeated_share=repeated_share(answers),
        num_prompts=len(references),
    )


def _prompts(config: RunConfig, prepared: PreparedData) -> Iterator[Prompt]:
    """Texts up to where the last assistant turn begins: of `evaluation.prompts`, else of the held-out data."""
    count = 0
    source = config.evaluation.prompts
    for prompt in _read_prompts(source, config) if source else _held_out_prompts(prepared):
        if count == config.evaluation.num_prompts:
            return
        count += 1
        yield prompt
    if not count:
        raise DataError(f"{source or 'the held-out data'} has no prompt with an assistant turn to decode")


def _held_out_prompts(prepared: PreparedData) -> Iterator[Prompt]:
    for i in range(len(prepared.eval)):
        sample = prepared.eval.sample(i)
        start = int(sample.spans[-1, 0]) if len(sample.spans) else 0
        if start:
            yield Prompt(str(sample.sample_id), tuple(int(token) for token in sample.tokens[:start]))


def _read_prompts(source: str, config: RunConfig) -> Iterator[Prompt]:
    # Rendered by what renders training data: a tool call's arguments, say, reach the template in the same form.
    chat = ChatTokenizer(load_run_tokenizer(config, known_facts(config)), template_args=config.data.chat_template_args)
    for conversation in read_conversations(source):
        messages = conversation.messages
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if messages:
            (tokens,) = chat.encode([chat.render(messages, conversation.tools, add_generation_prompt=True)])
            yield Prompt(str(conversation.sample_id), tuple(tokens))
