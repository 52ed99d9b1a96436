"""Prepared data: tokenized once, split, packed, kept on disk by the fingerprint of everything it depends on.

Two directories, each published whole by one rename:
    samples-<fingerprint>/  train.arrow eval.arrow token_counts.npy summary.json  of data, tokenizer, template, settings
    rows-<fingerprint>/     train.npz eval.npz prepared.json                      of those, row_tokens, window and seed
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from transformers import PreTrainedTokenizerBase

from paceline.config.data import DataConfig
from paceline.data.packing import RowPlan
from paceline.data.publishing import publish_directory
from paceline.data.samples import SAMPLE_FEATURES, SampleTokenizer
from paceline.data.sources import Source
from paceline.data.split import PreparedSample, PreparedSplit, write_split
from paceline.data.summary import HELD_OUT, PrepareSummary, SplitSummary, check_summary
from paceline.errors import DataError

__all__ = [
    "PreparedData",
    "PreparedSample",
    "PreparedSplit",
    "check_vocabulary",
    "load_prepared",
    "prepare",
    "tokenizer_fingerprint",
]

_log = logging.getLogger(__name__)
_FORMAT = 1  # raise it when the same input gives other samples or other files
_MAP_ROWS = 256


@dataclass(frozen=True, slots=True, eq=False)
class PreparedData:
    """Everything training needs of its data; opens in milliseconds."""

    directory: Path
    fingerprint: str
    """Of data, tokenizer, template, settings, and of the packing: equal fingerprints mean equal rows."""
    train: PreparedSplit
    eval: PreparedSplit
    """Held out: no content of it is in `train`. May be empty."""
    train_plan: RowPlan
    eval_plan: RowPlan
    token_counts: np.ndarray
    """int64[max id + 1]: how often each token is supervised in `train`."""
    summary: PrepareSummary


def prepare(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    target_vocab_size: int,
    cache_root: Path,
    seed: int,
    reserved_tokens: frozenset[int] = frozenset(),
) -> PreparedData:
    """Tokenize, split and pack, or reuse what an earlier call with the same fingerprint left in `cache_root`.

    Which samples are held out depends on their content alone, so that runs with other seeds are comparable.

    Args:
        config: where the data is and how it becomes rows.
        tokenizer: of the target.
        target_vocab_size: V, rows of the target's embedding and lm_head.
        cache_root: directory for prepared data; created.
        seed: of packing and of the order of rows.
        reserved_tokens: ids that mean something else to a draft of the run than text (DFlash's mask token): samples
            with one are skipped and counted.

    Raises:
        DataError: a file that cannot be read, a tokenizer that does not fit the target or has no chat template,
            more skipped samples than `config.max_skipped_fraction`, no sample left, a full disk.
    """
    check_vocabulary(tokenizer, target_vocab_size)
    tokenize = SampleTokenizer(tokenizer, config, reserved_tokens)
    train = Source(config.train)
    held_out = Source(config.eval) if config.eval is not None else None
    samples_key = _hash(
        {
            "format": _FORMAT,
            "train": train.fingerprint(),
            "eval": held_out.fingerprint() if held_out else config.eval_fraction,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "template": tokenize.template,
            "settings": config.model_dump(
                include={
                    "chat_template_args",
                    "train_on",
                    "assistant_start",
                    "assistant_end",
                    "max_sample_tokens",
                }
            )
            | {"min_supervised_tokens": tokenize.min_supervised_tokens, "reserved_tokens": sorted(reserved_tokens)},
        }
    )
    samples = cache_root / f"samples-{samples_key}"
    publish_directory(samples, lambda work: _write_samples(work, config, tokenize, train, held_out, target_vocab_size))
    summary = _read_summary(samples)
    check_summary(summary, config.max_skipped_fraction, target_vocab_size)
    packing = {"row_tokens": config.row_tokens, "window": config.packing_window, "seed": seed}
    fingerprint = _hash({"samples": samples_key, "packing": packing})
    rows = cache_root / f"rows-{fingerprint}"
    publish_directory(rows, lambda work: _write_rows(work, samples, fingerprint, packing))
    return load_prepared(rows)


def load_prepared(directory: Path) -> PreparedData:
    """What `prepare` left in `directory` (its `PreparedData.directory`), memory-mapped.

    Raises:
        DataError: the directory is not prepared data, or damaged.
    """
    try:
        facts = json.loads((directory / "prepared.json").read_text())
        samples = directory.parent / facts["samples"]
        return PreparedData(
            directory=directory,
            fingerprint=facts["fingerprint"],
            train=PreparedSplit(samples / "train.arrow"),
            eval=PreparedSplit(samples / "eval.arrow"),
            train_plan=RowPlan.load(directory / "train.npz"),
            eval_plan=RowPlan.load(directory / "eval.npz"),
            token_counts=np.load(samples / "token_counts.npy"),
            summary=_read_summary(samples),
        )
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"prepared data {directory} cannot be read ({error}): delete it and prepare again") from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """xxh3-128 (32 hex digits) of all that decides which ids a text gets, the chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        algorithm = json.loads(backend.to_str())
        for state in ("padding", "truncation"):  # what the last call happened to ask for
            algorithm.pop(state, None)
    else:
        algorithm = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _hash({"algorithm": algorithm, "special": special, "template": tokenizer.chat_template})


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, target_vocab_size: int) -> None:
    """Raise unless the target has an embedding for every token of the tokenizer.

    Raises:
        DataError: names the token.
    """
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if largest >= target_vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path!r} has token {largest} ({token!r}), the target's lm_head has "
            f"{target_vocab_size} rows: tokenizer and target do not belong together; see data.tokenizer"
        )


def _write_samples(
    work: Path,
    config: DataConfig,
    tokenize: SampleTokenizer,
    train_source: Source,
    eval_source: Source | None,
    target_vocab_size: int,
) -> None:
    train = _tokenize_source(train_source, tokenize, config.num_workers, work / "scratch-train")
    largest, origin = _largest_token(train)
    in_eval = np.zeros(0, np.int64)
    if eval_source is None:
        usable, content = _usable(train), _integers(train, "content")
        chosen = usable & choose_held_out(content, usable, config.eval_fraction)
        eval_rows, eval_keep = train, chosen
        train_keep = usable & ~chosen
    else:
        eval_rows = _tokenize_source(eval_source, tokenize, config.num_workers, work / "scratch-eval")
        largest, origin = max((largest, origin), _largest_token(eval_rows))
        train_keep, eval_keep = _usable(train), _usable(eval_rows)
        in_eval = _integers(eval_rows, "content")[eval_keep]
    # Also by tokens: a template can make one text of two contents, or of the beginning of a longer conversation.
    leaked = train_keep & (
        np.isin(_integers(train, "content"), in_eval)
        | np.isin(_integers(train, "tokens_hash"), _integers(eval_rows, "tokens_hash")[eval_keep])
    )
    train_keep &= ~leaked
    summary = PrepareSummary(_count_skipped(train), SplitSummary(), largest, origin)
    if eval_source is not None:
        summary.eval = _count_skipped(eval_rows)
    if leaked.any():
        summary.train.skipped[HELD_OUT] = int(leaked.sum())
        summary.train.examples[HELD_OUT] = str(train[int(np.flatnonzero(leaked)[0])]["origin"])
    # Before counting: a stray id of two thousand million would make the counts that long.
    check_summary(PrepareSummary(SplitSummary(num_samples=1), SplitSummary(), largest, origin), 1.0, target_vocab_size)
    counts = write_split(work / "train.arrow", train, train_keep, summary.train)
    write_split(work / "eval.arrow", eval_rows, eval_keep, summary.eval)
    np.save(work / "token_counts.npy", counts)
    (work / "summary.json").write_text(json.dumps(summary.to_dict(), indent=1))
    for scratch in ("scratch-train", "scratch-eval"):
        shutil.rmtree(work / scratch, ignore_errors=True)


def choose_held_out(content: np.ndarray, usable: np.ndarray, fraction: float) -> np.ndarray:
    """bool[n]: which samples are held out, by their content alone, so that adding data moves no other sample.

    If chance holds out none of a small data set, the content with the lowest hash is.

    Args:
        content: int64[n] content hashes, uniform in [0, 2**63).
        usable: bool[n].
        fraction: in [0, 1).
    """
    chosen = usable & (content < int(fraction * 2**63))
    distinct = np.unique(content[usable])
    if fraction > 0 and not chosen.any() and len(distinct) > 1:
        chosen = usable & (content == distinct[0])
    return chosen


def _tokenize_source(source: Source, tokenize: SampleTokenizer, num_workers: int, scratch: Path) -> datasets.Dataset:
    """Samples and skipped entries of a source, memory-mapped from `scratch`."""
    mapped = []
    for number, part in enumerate(source.load(scratch)):
        mapped.append(
            part.rows.map(
                partial(tokenize, part_name=part.name),
                batched=True,
                batch_size=_MAP_ROWS,
                with_indices=True,
                remove_columns=part.rows.column_names,
                features=SAMPLE_FEATURES,
                num_proc=min(num_workers, len(part.rows)) if num_workers > 1 else None,
                cache_file_name=str(scratch / f"samples-{number}.arrow"),
                new_fingerprint=f"paceline-{number}",
                load_from_cache_file=False,
                desc=f"Tokenizing {part.name}",
            )
        )
    return datasets.concatenate_datasets(mapped)


def _count_skipped(rows: datasets.Dataset) -> SplitSummary:
    summary = SplitSummary(num_read=len(rows))
    for index in np.flatnonzero(~_usable(rows)).tolist():
        entry = rows[index]
        reason, detail = entry["reason"], entry["detail"]
        summary.skipped[reason] = summary.skipped.get(reason, 0) + 1
        if reason not in summary.examples:
            summary.examples[reason] = f"{entry['origin']}: {detail}" if detail else entry["origin"]
            _log.warning("skipped, %s: %s (more of this reason are only counted)", reason, summary.examples[reason])
    return summary


def _largest_token(rows: datasets.Dataset) -> tuple[int, str]:
    """The largest token id, and where a sample with it is; (-1, "") without tokens."""
    best, first = -1, 0
    for batch in _column(rows, "tokens").chunks:
        values = batch.flatten().to_numpy()
        if len(values) and int(values.max()) > best:
            best = int(values.max())
            place = int(values.argmax()) + batch.offsets[0].as_py()
            best_row = first + int(np.searchsorted(batch.offsets.to_numpy(), place, side="right")) - 1
        first += len(batch)
    return (best, rows[best_row]["origin"]) if best >= 0 else (-1, "")


def _column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    return rows.with_format("arrow")[:].column(name)


def _integers(rows: datasets.Dataset, name: str) -> np.ndarray:
    """int64[n]; 0 for skipped entries."""
    values: np.ndarray = _column(rows, name).fill_null(0).to_numpy()
    return values


def _usable(rows: datasets.Dataset) -> np.ndarray:
    usable: np.ndarray = _column(rows, "reason").is_null().to_numpy()
    return usable


def _write_rows(work: Path, samples: Path, fingerprint: str, packing: dict[str, int]) -> None:
    for name in ("train", "eval"):
        RowPlan.build(PreparedSplit(samples / f"{name}.arrow").lengths, **packing).save(work / f"{name}.npz")
    facts = {"fingerprint": fingerprint, "samples": samples.name, **packing}
    (work / "prepared.json").write_text(json.dumps(facts, indent=1))


def _read_summary(samples: Path) -> PrepareSummary:
    return PrepareSummary.from_dict(json.loads((samples / "summary.json").read_text()))


def _hash(facts: Any) -> str:
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
