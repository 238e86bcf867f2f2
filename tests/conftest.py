"""Eight fake CPU devices for the whole suite; programs compiled quickly, since most run once."""

import os
import tempfile

import hypothesis

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No LLVM optimisation: compiling takes a third less, and no test is about speed.
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
# XLA gives its CPU client as many threads as there are cores or devices. Programs in flight whose
# devices wait for each other in a collective can hold them all: then none goes on (seen in
# checksums of sharded arrays). Threads that wait cost nothing.
os.environ.setdefault("NPROC", "256")
# What one test, worker or child process has compiled, the others of this run load. Never what an
# earlier run has: a test would then not see what a change did to compiling.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# The same examples each time; HYPOTHESIS_PROFILE=long searches longer, from other seeds each time.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("long", deadline=None, max_examples=3000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
