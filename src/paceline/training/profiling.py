"""A window of training steps under the torch profiler."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from paceline.config.training import ProfileConfig

logger = logging.getLogger(__name__)


class StepProfiler:
    """Writes one Chrome trace of the configured steps, and rank; does nothing without a configuration."""

    def __init__(self, config: ProfileConfig | None, directory: Path, rank: int = 0) -> None:
        self._window = range(0) if config is None else range(config.start, config.start + config.steps)
        self._directory = directory
        self._suffix = f"-rank-{rank}" if rank else ""
        self._profile: profile | None = None

    def before_step(self, step: int) -> None:
        """Start if `step` (from 0) is in the window; a resumed run starts inside it."""
        if self._profile is None and step in self._window:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities)
            self._profile.start()

    def after_step(self, step: int) -> None:
        """End behind the window's last step."""
        if step + 1 not in self._window:
            self.close()

    def close(self) -> None:
        """Write what was profiled, if anything was."""
        if self._profile is None:
            return
        ended, self._profile = self._profile, None
        ended.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"steps-{self._window.start}-{self._window.stop - 1}{self._suffix}.json"
        ended.export_chrome_trace(str(path))
        logger.info("profile of steps %d to %d written to %s", self._window.start, self._window.stop - 1, path)
