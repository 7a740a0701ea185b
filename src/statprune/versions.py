"""The versions of everything that can change a number."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("statprune", "torch", "lightning", "transformers", "torchmetrics")


def versions() -> dict[str, str]:
    """Of Python and of these packages, by name, without importing them."""
    return {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
