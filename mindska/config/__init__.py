"""Typed configuration: a YAML file, then the command line on top of it. An unknown key is an error."""

from ..errors import ConfigError
from .command_line import check_given, check_results, matching, parse_args
from .differences import differences, to_dict
from .recipe_files import notes, read_yaml
from .settings import TASKS_OF, TYPES, VALIDATION, Config, settings_that

__all__ = [
    "TASKS_OF",
    "TYPES",
    "VALIDATION",
    "Config",
    "ConfigError",
    "check_given",
    "check_results",
    "differences",
    "matching",
    "notes",
    "parse_args",
    "read_yaml",
    "settings_that",
    "to_dict",
]
