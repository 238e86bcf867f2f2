"""Every recipe loads into a stage's config, through the command that its docstring gives."""

import ast
import dataclasses
import pathlib
import re

import pytest

from configs import schema
from configs.command_line import load_config
from configs.dataclass_config import ConfigError

HOUSE = pathlib.Path(__file__).resolve().parents[2]
RECIPES = {
    file.name: ast.get_docstring(ast.parse(file.read_text())) or ""
    for file in sorted((HOUSE / "configs").glob("*.py"))
    if "\ndef get_config(" in file.read_text()
}
STAGES = [
    stage
    for stage in vars(schema).values()
    if dataclasses.is_dataclass(stage) and stage.__module__ == "configs.schema"
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_loads_as_its_docstring_says(recipe):
    docstring = RECIPES[recipe]
    assert "python -m experiments." in docstring, "the docstring gives no command that runs it"
    # An experiment whose default it is needs no --config.
    named = re.search(rf"--config=(configs/{recipe}(?::[\w.-]+)?)", docstring)
    errors = []
    for stage in STAGES:
        try:
            load_config(named[1] if named else f"configs/{recipe}", [], stage)
            return
        except ConfigError as error:
            errors.append(f"{stage.__name__}: {error}")
    pytest.fail("\n".join(errors))


def test_there_are_recipes():
    assert {"pretrain_tiny.py", "gpt2_124m.py", "gpt3_175b.py"} <= set(RECIPES)
