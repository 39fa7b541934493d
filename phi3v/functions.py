"""Functions of the user's own, named module:function in a recipe.

Their module lies in the current folder or is installed; what is installed goes first. To import a
module is to run it, so only what the user's own recipe or command line names comes here.
"""

import importlib
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from phi3v.errors import ConfigError


@lru_cache(maxsize=64)
def find_function(name: str, key: str, advice: str) -> Callable[..., Any]:
    """Import module:function; the current folder's modules are found too.

    key     of the recipe that names it
    advice  what to write where there is no such function

    Raises: ConfigError if there is none, or its module cannot be imported.
    """
    module_name, _, function_name = name.rpartition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise ConfigError(
            f"{key} {name} cannot be imported: {type(error).__name__}, {error}; the module lies in "
            "the current folder or is installed"
        ) from error
    found = getattr(module, function_name, None)
    if not callable(found):
        place = f" (it is {file})" if (file := getattr(module, "__file__", None)) else ""
        raise ConfigError(
            f"{key} {name}: module {module_name} has no function '{function_name}'{place}; {advice}"
        )
    function: Callable[..., Any] = found
    return function
