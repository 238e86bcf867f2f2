"""The GPU's five phenomena over many seeds, for a TPU slice of 64 chips (v5p-128).

    python -m experiments.emergence --config=configs/emergence_tpu.py --workdir=gs://BUCKET/emergence

Runs of one shape spread over the chips, one or some a chip: narrow intervals where the smaller
recipes have three, five or eight seeds. Compiled for v5p:4x4x4 without
one (experiments.plan; benchmarks/RESULTS.md has the memory); not run.
"""

import dataclasses

from configs import emergence_gpu
from configs.dataclass_config import to_config_dict
from configs.emergence import chosen
from configs.schema import EmergenceConfig


def get_config(arg=None):
    sections = {
        name: dataclasses.replace(section, seeds=tuple(range(32)))
        for name, section in emergence_gpu.sections().items()
    }
    return to_config_dict(EmergenceConfig(**chosen(sections, arg)))
