"""From the command to the first step, cold and warm, and after an interruption.

    python -m benchmarks.startup --command="-m experiments.speedrun --workdir=/tmp/speedrun"
        [--starts=3]

Starts the command as a child; when it says that its first step is done it gets SIGTERM, leaves with
code 75, and is started again. Printed is the time from the start of the child to that line, and the
run's own account of it. The last line is one JSON object.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
import time

from absl import app, flags

_COMMAND = flags.DEFINE_string("command", None, "What python runs.", required=True)
_STARTS = flags.DEFINE_integer("starts", 3, "How often it is started.", lower_bound=1)
_FIRST_STEP = re.compile(r"first step done (.*)")


def main(_):
    report = []
    for _i in range(_STARTS.value):
        began = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, *shlex.split(_COMMAND.value)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        told, said = None, []
        for line in child.stderr:
            said.append(line)
            found = _FIRST_STEP.search(line)
            if found and told is None:
                told = found[1]
                seconds = time.monotonic() - began
                child.send_signal(signal.SIGTERM)
        if child.wait() != 75 or told is None:
            raise SystemExit(f"exit code {child.returncode}: {''.join(said[-20:])}")
        left = time.monotonic() - began - seconds
        report.append({"first_step_seconds": seconds, "leaving_seconds": left, "account": told})
        print(f"first step {seconds:.1f} s after the command; {told}; left in {left:.1f} s",
              flush=True)  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    app.run(main)
