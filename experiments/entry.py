"""How every experiment starts: the command line checked in a second, then `main(config)`.

A user's mistake is one line and exit code 2; a bug keeps its traceback.
"""

import ctypes
import dataclasses
import difflib
import dis
import errno
import importlib.util
import json
import math
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from absl import app, flags, logging

from configs.command_line import load_config, split_overrides
from configs.dataclass_config import field_types
from llm.data.config import cache_root
from llm.models.config import ComputeConfig

# Flags defined through this module belong to the experiment that calls it: --help shows them.
flags.disclaim_key_flags()

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_CPU_FUSIONS = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"
ACCELERATOR_PACKAGES = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
# M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD of mallopt(3): one heap, grown and never given back.
_KEEP_MEMORY = ((-8, 1), (-4, 0), (-1, 2**31 - 1))
BUG, USER_ERROR, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141

# The operating system's own words about a path of the user's; so are its others that name a file.
_PATH_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# Where print_json writes: the real standard output once --json has turned fd 1 to standard error.
_json_output = sys.stdout


def run(
    main: Callable[..., None],
    config_type: type | tuple[type, ...] | None = None,
    *,
    default_config: str | None = None,
) -> None:
    """Parse the command line and call `main(config)`, or `main()` without a `config_type`.

    With a `config_type` the experiment has `--config=recipe.py[:argument]` and one override for
    every field, `--config.optimizer.learning_rate=3e-4`; both are checked before `main` starts. Of
    several types the recipe's own is taken.

    Exit codes: 0; 2 a mistake of the user's (one line on standard error); 130 Ctrl-C; 141 the
    reader of a pipe went away; 1 and a traceback for a bug. SystemExit passes, so Run's 75 does.
    A process whose peer died or hangs ends with 76 (llm/training/peers.py).
    With --verbosity=1 a mistake shows its traceback too.
    """
    if config_type is not None:
        flags.DEFINE_string(
            "config",
            default_config,
            "The recipe, a file with get_config(): path.py or path.py:argument. Every field can be "
            "overridden: --config.section.field=value (fields: configs/schema.py).",
        )
    try:
        app.run(
            lambda arguments: _start(main, arguments),
            flags_parser=lambda argv: _parse_command_line(argv, config_type),
        )
    except KeyboardInterrupt:
        _exit("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # `inspect | head`: nobody reads on. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except Exception as error:
        if not _is_users_mistake(error) or logging.get_verbosity() >= logging.DEBUG:
            if not _has_peers():
                raise
            _exit("".join(traceback.format_exception(error)), BUG)
        _exit(f"error: {_message(error)}", USER_ERROR)


def define_json() -> flags.FlagHolder:
    """Define --json for an experiment that reports figures, and return its flag.

    Under --json everything that is printed goes to standard error, C++ libraries included, and
    only `print_json` writes on standard output.
    """
    return flags.DEFINE_boolean(
        "json", False, "Print one JSON object on standard output and nothing else there."
    )


def define_profile() -> flags.FlagHolder:
    """Define --profile for an experiment that trains; `profiled` obeys it."""
    return flags.DEFINE_integer(
        "profile",
        0,
        "Trace so many steps into workdir/profile, for TensorBoard or Perfetto, from the step "
        "config.run.profile_start_step of this process on.",
        lower_bound=0,
    )


def profiled(config: Any, num_steps: int) -> Any:
    """Return the config of a stage, with `run.profile_num_steps` set where --profile asks."""
    if not num_steps:
        return config
    run_config = dataclasses.replace(config.run, profile_num_steps=num_steps)
    return dataclasses.replace(config, run=run_config)


def command_line() -> str:
    """Return the command that is running, as it is typed from the repository's root."""
    name = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    return shlex.join(["python", "-m", f"experiments.{name}", *sys.argv[1:]])


def print_json(report: Any) -> None:
    """Print a report (dicts, dataclasses, numbers, arrays) as one line of strict JSON.

    NaN and infinities, which JSON does not have, become null.
    """
    print(json.dumps(plain(report), allow_nan=False), file=_json_output, flush=True)


# ------------------------------------------------------------------------- command line


def _parse_command_line(
    argv: Sequence[str], config_type: type | tuple[type, ...] | None
) -> tuple[Any, ...]:
    """Parse flags and config; return the arguments of `main`."""
    program, *arguments = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
    overrides = []
    if config_type is not None:
        arguments, overrides = split_overrides(arguments)
    try:
        positional = flags.FLAGS([program, *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        known = [*flags.FLAGS, *(f"config.{name}" for name in _fields(config_type))]
        near = [name for name in known if name == f"config.{error.flagname}"]
        near += difflib.get_close_matches(error.flagname, known, n=1)
        hint = f"; did you mean --{near[0]}?" if near else "; --help lists the flags"
        raise _UsageError(f"unknown flag --{error.flagname}{hint}") from error
    except flags.Error as error:
        raise _UsageError(_shorten(str(error))) from error
    if positional:
        raise _UsageError(f"unexpected argument {positional[0]!r}: flags are --name=value")
    if config_type is None:
        return ()
    recipe = flags.FLAGS.config
    if recipe is None:
        raise _UsageError("--config=RECIPE is required; configs/ holds the recipes")
    return (load_config(recipe, overrides, config_type),)


def _fields(config_type: type | tuple[type, ...] | None) -> list[str]:
    """Return the top-level fields of what an experiment takes."""
    types = config_type if isinstance(config_type, tuple) else (config_type,)
    return [name for each in types if each is not None for name in field_types(each)]


class _UsageError(ValueError):
    """A flag that is unknown, ill-typed or missing."""


def _shorten(message: str) -> str:
    required = re.match(r"flag --(\w+)=None: Flag --\1 must have a value", message)
    return f"--{required[1]} is required" if required else " ".join(message.split())


# ------------------------------------------------------------------------------- start


def _start(main: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    if not flags.FLAGS["verbosity"].present:  # absl marks its default as set
        logging.set_verbosity(logging.WARNING)  # Orbax alone logs a dozen lines a checkpoint
    if "json" in flags.FLAGS and flags.FLAGS.json:
        _keep_standard_output_for_json()
    tune_for_cpu()
    if any(_computes_deterministically(config) for config in arguments):
        _add_xla_flag(_DETERMINISTIC)
    _use_threads_for_fake_devices()
    _use_compilation_cache()
    main(*arguments)
    sys.stdout.flush()  # here, where a broken pipe is still handled


def _keep_standard_output_for_json() -> None:
    global _json_output
    sys.stdout.flush()
    _json_output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def tune_for_cpu() -> None:
    """Make XLA's CPU compiler fuse, and the C library keep, what they can (RESULTS.md).

    The compiler hands products and what surrounds them to its library together: it reads the
    variable at its first compilation, other backends ignore it. And memory that a step frees is
    kept for the next one: its large buffers would otherwise be fresh pages each time, which took a
    quarter of a small model's gradient. Hosts of accelerators keep the usual ways.
    """
    _add_xla_flag(_CPU_FUSIONS)
    if not any(importlib.util.find_spec(name) for name in ACCELERATOR_PACKAGES):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
        for option, value in _KEEP_MEMORY if mallopt else ():
            mallopt(option, value)


def _add_xla_flag(flag: str) -> None:
    """Set a flag of XLA's, which reads them at its start, unless the user has set it."""
    given = os.environ.get("XLA_FLAGS", "")
    if flag.partition("=")[0] not in given:
        os.environ["XLA_FLAGS"] = f"{given} {flag}".strip()


def _computes_deterministically(config: Any) -> bool:
    """Return whether a config, or a part of it, asks for compute.deterministic."""
    if isinstance(config, ComputeConfig):
        return config.deterministic
    if not dataclasses.is_dataclass(config):
        return False
    return any(_computes_deterministically(x) for x in vars(config).values())


def _use_threads_for_fake_devices() -> None:
    """Give XLA's CPU client threads enough for all programs in flight on several fake devices.

    It makes one for each core or device. Devices that wait for each other in a collective hold
    theirs, so that two programs in flight can stop each other for ever. XLA reads NPROC at start.
    """
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("NPROC", "256")


def _use_compilation_cache() -> None:
    """Keep compiled programs between runs, unless JAX_COMPILATION_CACHE_DIR says where."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax  # only now: a misspelt flag has been told before JAX loads

    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))


# ------------------------------------------------------------------------------ errors


def _is_users_mistake(error: Exception) -> bool:
    """Return whether an error's text is meant for the user rather than for a developer.

    So it is for paths, for exception classes of the house's own, and for a ValueError that a
    `raise` statement of the house's made; one that a library or an operation such as int() raised
    is a bug.
    """
    if isinstance(error, _PATH_ERRORS):
        return True
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return True
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return True
    if _is_house(type(error).__module__):
        return True
    return isinstance(error, ValueError) and _raised_by_the_house(error.__traceback__)


def _raised_by_the_house(trace: TracebackType | None) -> bool:
    """Return whether an exception began at a `raise` statement in the house's own code."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code, module = trace.tb_frame.f_code, trace.tb_frame.f_globals.get("__name__", "")
    return code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"] and _is_house(module)


def _is_house(module: str) -> bool:
    return module.split(".")[0] in ("llm", "configs", "experiments", "__main__")


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"  # without Python's "[Errno 2]"
    return str(error)


def _exit(message: str, code: int) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    if _has_peers():
        os._exit(code)  # the usual way out waits minutes for processes that may not come
    sys.exit(code)


def _has_peers() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def plain(value: Any) -> Any:
    """Return a value made of what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if hasattr(value, "tolist"):  # numpy and JAX arrays and scalars
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
