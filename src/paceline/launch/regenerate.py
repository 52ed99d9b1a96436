"""`paceline regenerate`: the target rewrites the answers of `data.train`, which drafts learn best from."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import xxhash

from paceline.config.run import RunConfig
from paceline.config.run_dir import RunDir
from paceline.data.conversations import read_conversations
from paceline.data.prepared import check_vocabulary, tokenizer_fingerprint
from paceline.data.regeneration import RegenerationSummary, regenerate
from paceline.launch.prepare import load_run_tokenizer
from paceline.launch.target_facts import read_checkpoint_facts
from paceline.target.hf.fingerprint import fingerprint_weights
from paceline.target.hf.generation import Generator
from paceline.target.hf.loading import load_model, resolve_checkpoint, resolve_device

Progress = Callable[[RegenerationSummary], None]


def regenerate_data(
    config: RunConfig,
    stop: threading.Event,
    on_progress: Progress | None = None,
    source: str | None = None,
    output: Path | None = None,
) -> RegenerationSummary:
    """Rewrite `source` (`data.train` unless given) into `output`; goes on where an earlier call ended.

    Raises:
        DataError: unreadable input, a tokenizer that does not fit the target, or an output that belongs to other
            conversations.
        RunDirectoryError: the output was made with another target or other settings.
    """
    settings, target = config.regeneration, config.target
    checkpoint = resolve_checkpoint(target.model, target.revision, target.trust_remote_code)
    facts = read_checkpoint_facts(config)
    tokenizer = load_run_tokenizer(config, facts)
    check_vocabulary(tokenizer, facts.vocab_size)
    model = load_model(target, checkpoint, resolve_device(target.device))
    generator = Generator(
        model,
        tokenizer,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        stop=stop,
        template_args=config.data.chat_template_args,
    )
    source = source or config.data.train
    made_with = {
        "source": source,
        "target": fingerprint_weights(checkpoint),
        "chat_template": xxhash.xxh3_64_hexdigest(str(tokenizer.chat_template).encode()),
        "chat_template_args": config.data.chat_template_args,
        **settings.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"}),
    }
    if config.data.tokenizer is not None:
        made_with["tokenizer"] = tokenizer_fingerprint(tokenizer)
    chosen = Path(settings.output) if settings.output else RunDir(Path(config.run_dir)).regenerated
    return regenerate(
        read_conversations(source),
        generator.complete,
        output or chosen,
        batch_size=settings.batch_size,
        made_with=made_with,
        stop=stop,
        on_progress=on_progress,
    )
