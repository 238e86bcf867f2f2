"""The flag of every experiment that keeps what it does: --workdir."""

from absl import flags

WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept.", required=True)
