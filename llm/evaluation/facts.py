"""On what a result was measured: the machine and the versions, for reports and benchmarks."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import jax

_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy",
    "zstandard",
)  # fmt: skip
_OURS = "ontogeny-llm"


def hardware_facts() -> dict[str, str]:
    """Return the CPU's model, its cores and memory that this process may use, the accelerator."""
    return {
        "CPU": _cpu_model(),
        "CPU cores": _cpu_cores(),
        "memory": f"{_memory_bytes() / 2**30:.1f} GiB" if _memory_bytes() else "unknown",
        "accelerator": _accelerator(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def version_facts() -> dict[str, str]:
    """Return the versions of Python, this project (and its commit, if any) and its libraries."""
    facts = {"python": platform.python_version(), _OURS: _version(_OURS)}
    commit = _git_commit()
    if commit:
        facts["git commit"] = commit
    return facts | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git_commit() -> str:
    """Return the commit of the checkout this file is in, "+ changes" if it was edited, or ""."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():  # installed elsewhere: an outer repository is not ours
        return ""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(here), *command],
                capture_output=True, text=True, check=True, timeout=10,
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit[:12] + (" + changes" if changes else "")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.M)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def _cpu_cores() -> str:
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    quota = _cgroup_cores()
    if quota is not None and quota < usable:
        return f"{quota:g} of {total} (a container's limit)"
    return f"{usable}" if usable == total else f"{usable} of {total}"


def _cgroup_cores() -> float | None:
    """Return the cores that a container's quota allows, or None."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _memory_bytes() -> int:
    """Return the machine's memory or a container's limit, whichever is less; 0 if unknown."""
    sizes = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        sizes.append(int(text))
    return min(sizes, default=0)


def _accelerator() -> str:
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return "none"
    return f"{len(devices)} × {devices[0].device_kind}"
