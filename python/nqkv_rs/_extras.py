"""Optional dependencies: one place that says what to install when one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["require"]


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or say which extra of nqkv-rs brings it.

    Args:
        module: name of the module, for example ``"torch"``.
        extra: the extra that installs it, for example ``"demo"``.

    Returns:
        The imported module.

    Raises:
        ModuleNotFoundError: ``module`` is not installed; the message holds the install command. A
            module that is there but fails inside keeps its own error: installing would not help.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"this needs the package {module!r}, which is not installed; "
            f'install it with: pip install "nqkv-rs[{extra}]"',
            name=module,
        ) from None
