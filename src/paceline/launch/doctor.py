"""`paceline doctor`: what this machine can run, and why not."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from paceline.version import VERSION


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that works here, or does not."""

    works: bool
    what: str
    detail: str


def examine() -> list[Finding]:
    """Look at this machine by trying, not by guessing from versions."""
    return [*_software(), *_devices(), *_storage(), *examine_extras()]


def _software() -> Iterator[Finding]:
    yield Finding(True, f"paceline {VERSION}", f"Python {platform.python_version()}, {platform.platform()}")
    for name in ("torch", "transformers", "tokenizers", "datasets", "safetensors"):
        try:
            yield Finding(True, f"{name} {version(name)}", "")
        except PackageNotFoundError:
            yield Finding(False, name, f"not installed: pip install {name}")


def _devices() -> Iterator[Finding]:
    yield Finding(True, "CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "no usable GPU or driver"
        yield Finding(False, "CUDA", f"{why}: targets and drafts run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        bf16 = torch.cuda.is_bf16_supported()
        detail = f"{facts.total_memory / 2**30:.0f} GiB, bf16 {'yes' if bf16 else 'no: set training.dtype = float32'}"
        yield Finding(bf16, f"cuda:{index} {facts.name}", detail)
    yield _try_flex_attention()


def _try_flex_attention() -> Finding:
    """Attention of drafts on a GPU compiles a kernel: try a small one."""
    from paceline.drafts.attention import attend_context, build_visibility

    q = torch.randn(128, 2, 64, device="cuda", dtype=torch.bfloat16)
    index = torch.arange(128, device="cuda")
    try:
        attend_context(q, q, q, build_visibility(torch.zeros_like(index), index + 1, 128))
        torch.cuda.synchronize()
    except (RuntimeError, ImportError, OSError) as error:
        return Finding(False, "flex_attention", f"{str(error).splitlines()[0]}: is a C compiler installed?")
    return Finding(True, "flex_attention", "compiles and runs")


def _storage() -> Iterator[Finding]:
    for path in (".", "/dev/shm"):  # noqa: S108 - looked at, not written
        try:
            free = shutil.disk_usage(path).free / 2**30
        except OSError as error:
            yield Finding(False, path, f"{error.strerror}")
            continue
        yield Finding(free > 1, f"free space in {path}", f"{free:.0f} GiB")


def examine_extras() -> Iterator[Finding]:
    """Optional packages, and how to install those that are missing."""
    for name, use in (
        ("tensorboard", "tracking.tensorboard"),
        ("wandb", "tracking.wandb"),
        ("accelerate", "target.device_map, target.tensor_parallel"),
        ("ray", 'placement.launcher = "ray"'),
        ("vllm", 'target.engine = "vllm"'),
        ("sglang", 'target.engine = "sglang"'),
    ):
        found = importlib.util.find_spec(name) is not None
        elsewhere = ", or target.engine_python" if "engine" in use else ""
        remedy = f': pip install "paceline[{name}]"{elsewhere}'
        yield Finding(found, name, f"for {use}{'' if found else remedy}")
