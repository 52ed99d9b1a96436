"""Runs on recorded features: the rows they have, and whether the recording is the one they need."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from paceline.client.recording import Recording
from paceline.config.run import RunConfig
from paceline.data.prepared import PreparedData, load_prepared
from paceline.data.rows import RowSource
from paceline.errors import ConfigError
from paceline.launch.target_facts import open_recording
from paceline.schema.features import FeatureSpec
from paceline.schema.recording import SPEC_NAME, row_key
from paceline.schema.rows import request_features

_ROWS_LOOKED_AT = 100
logger = logging.getLogger(__name__)


def recorded_data(config: RunConfig, reserved_tokens: frozenset[int]) -> PreparedData:
    """The rows of the recording, in the order of the run's own seed; the data files are not read.

    Args:
        reserved_tokens: ids that mean something else to a draft of the run than text.

    Raises:
        ConfigError: settings that ask for other rows than were recorded; names both values.
        DataError: the recording is damaged, or not finished.
    """
    recording = open_recording(config)
    _check_settings(config, recording, reserved_tokens)
    prepared = load_prepared(recording.paths.rows(recording.manifest.data_fingerprint))
    return dataclasses.replace(
        prepared,
        train_plan=dataclasses.replace(prepared.train_plan, seed=config.seed),
        eval_plan=dataclasses.replace(prepared.eval_plan, seed=config.seed),
    )


def check_recording(recording: Recording, specs: Mapping[str, FeatureSpec], rows: RowSource) -> None:
    """Return if the recording has every feature that `specs` ask for; say how many of the rows it has.

    Raises:
        ConfigError: names what is missing.
    """
    recording.check_covers(specs)
    num = min(rows.num_rows, _ROWS_LOOKED_AT)
    axes = recording.info.num_position_axes
    keys = [row_key(request_features(rows.planned_row(row_id, row_id), SPEC_NAME, axes)) for row_id in range(num)]
    num_found = sum(recording.find(key) is not None for key in keys)
    if num_found:
        logger.info("%s has %d of the first %d training rows", recording.name, num_found, num)
    else:
        logger.warning(
            "%s has none of the first %d training rows: it is of other data, or packed with another seed, "
            "data.row_tokens or data.packing_window; these rows are asked of the target",
            recording.name,
            num,
        )


def _check_settings(config: RunConfig, recording: Recording, reserved_tokens: frozenset[int]) -> None:
    rows, data = recording.manifest.rows, config.data
    wrong = [
        f"data.{name} = {asked!r}, recorded with {there!r}"
        for name, asked, there in (
            ("row_tokens", data.row_tokens, rows.row_tokens),
            ("packing_window", data.packing_window, rows.packing_window),
            ("train_on", data.train_on, rows.train_on),
            ("max_sample_tokens", data.max_sample_tokens, rows.max_sample_tokens),
        )
        if asked != there
    ]
    if config.min_supervised_tokens > rows.min_supervised_tokens:
        wrong.append(
            f"samples need {config.min_supervised_tokens} supervised tokens (data.min_supervised_tokens, or what the "
            f"drafts want), recorded were those with {rows.min_supervised_tokens}"
        )
    if missing := sorted(reserved_tokens - set(rows.reserved_tokens)):
        wrong.append(
            f"tokens {missing} mean something of their own to a draft, samples with them were not left out; reserved "
            f"were {list(rows.reserved_tokens)}"
        )
    if config.target.dtype not in ("auto", recording.info.dtype):
        wrong.append(f"target.dtype = {config.target.dtype!r}, recorded with {recording.info.dtype!r}")
    if wrong:
        raise ConfigError(
            f"{recording.name} holds other rows than this configuration asks for:\n  "
            + "\n  ".join(wrong)
            + "\nset these to what was recorded, or record again"
        )
