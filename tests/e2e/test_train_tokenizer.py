"""experiments.train_tokenizer as a user runs it."""

import json
import os
import pathlib
import subprocess
import sys

from transformers import AutoTokenizer

HOUSE = pathlib.Path(__file__).resolve().parents[2]

RECIPE = """
from configs.dataclass_config import to_config_dict
from configs.schema import PretrainConfig
from llm.data.config import SourceConfig

def get_config(arg=None):
    config = to_config_dict(PretrainConfig(total_steps=1))
    source = SourceConfig(paths=({path!r},), validation_fraction=0.5)
    config.data.sources = {{"letters": to_config_dict(source)}}
    config.data.tokenizer.vocab_size = 300
    return config
"""


def test_trains_saves_and_reports(tmp_path):
    rows = [{"text": f"Dear reader, this is letter {i} — ça va?\n"} for i in range(40)]
    path = tmp_path / "letters.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.py").write_text(RECIPE.format(path=str(path)))
    output = tmp_path / "tokenizer"
    result = subprocess.run(
        [sys.executable, "-m", "experiments.train_tokenizer", f"--config={tmp_path}/recipe.py"]
        + [f"--output={output}", f"--config.data.cache_dir={tmp_path}/cache", "--json"],
        cwd=HOUSE,
        env={**os.environ, "PATH": ""},  # no npm: the report does without GPT-2
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(result.stdout)
    letters = report["corpora"]["letters"]
    assert (report["vocab_size"], report["unfaithful_texts"]) == (300, 0)
    assert letters["split"] == "validation" and 8 <= letters["documents"] <= 32
    assert letters["bytes_per_token"].keys() == {"this"}
    assert 1.5 < letters["bytes_per_token"]["this"] < 20
    assert "npm, which is not installed" in " ".join(result.stderr.split())
    assert len(AutoTokenizer.from_pretrained(output)) == 300
