"""Lets tools without PEP 517 build the project; everything is declared in pyproject.toml."""

from setuptools import setup

setup()
