"""The flags of every experiment that trains: --workdir and --profile."""

from absl import flags

from experiments import entry

WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept.", required=True)
PROFILE = entry.define_profile()
