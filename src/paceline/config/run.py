"""RunConfig: the whole configuration of a run."""

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from paceline.config.base import Config
from paceline.config.data import DataConfig, RegenerationConfig
from paceline.config.drafts import AnyDraftConfig
from paceline.config.placement import PlacementConfig, PoolConfig, TransportConfig
from paceline.config.recording import RecordingConfig
from paceline.config.target import TargetConfig
from paceline.config.training import EvaluationConfig, ExportConfig, TrackingConfig, TrainingConfig


class RunConfig(Config):
    """One TOML file: a target, data, drafts, and how to train them."""

    run_dir: str = Field(min_length=1)
    """Everything a run writes goes here; running again resumes."""
    seed: int = 0
    """Of packing, epoch order, anchors, draft initialisation, and of what `evaluate` draws."""
    target: TargetConfig
    data: DataConfig
    drafts: dict[str, AnyDraftConfig] = Field(min_length=1)
    training: TrainingConfig = TrainingConfig()
    placement: PlacementConfig = PlacementConfig()
    transport: TransportConfig = TransportConfig()
    pool: PoolConfig = PoolConfig()
    recording: RecordingConfig = RecordingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    regeneration: RegenerationConfig = RegenerationConfig()
    tracking: TrackingConfig = TrackingConfig()
    export: ExportConfig = ExportConfig()

    @property
    def min_supervised_tokens(self) -> int:
        """`data.min_supervised_tokens`, or what the most demanding draft of the run wants."""
        if self.data.min_supervised_tokens is not None:
            return self.data.min_supervised_tokens
        return max(draft.fewest_supervised_tokens for draft in self.drafts.values())

    @field_validator("drafts")
    @classmethod
    def _names_are_plain(cls, drafts: dict[str, AnyDraftConfig]) -> dict[str, AnyDraftConfig]:
        for name in drafts:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
                raise ValueError(f"draft name {name!r}: use letters, digits, '_' and '-', at most 64")
        return drafts

    @model_validator(mode="after")
    def _rows_of_several_ranks_come_in_parts(self) -> Self:
        num_parts, placement = self.training.sequence_parallel, self.placement
        if num_parts == 1:
            return self
        if placement.target == "inline":
            raise ValueError(
                f'training.sequence_parallel = {num_parts} with placement.target = "inline": each rank would compute '
                'and hold the features of whole rows; set placement.target to "servers" or "urls", whose servers send '
                'each rank its part, or to "recorded"'
            )
        if placement.launcher != "external" and placement.num_trainers % num_parts:
            raise ValueError(
                f"training.sequence_parallel = {num_parts} does not divide placement.num_trainers = "
                f"{placement.num_trainers}: set one of them so that all groups have as many ranks"
            )
        return self

    @model_validator(mode="after")
    def _other_engines_are_servers(self) -> Self:
        if self.placement.target == "inline" and self.target.engine != "hf":
            raise ValueError(
                f'target.engine = "{self.target.engine}" with placement.target = "inline": such an engine is a process '
                'of its own; set placement.target = "servers" (placement.server_devices may name the trainer\'s device)'
            )
        return self

    @model_validator(mode="after")
    def _a_recorded_target_is_somewhere(self) -> Self:
        if self.placement.target == "recorded" and self.data.recorded is None:
            raise ValueError(
                'placement.target = "recorded" without data.recorded: set data.recorded to the directory that '
                "`paceline record` wrote"
            )
        return self
