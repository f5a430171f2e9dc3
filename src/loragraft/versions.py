"""Which versions a figure belongs to."""

from importlib.metadata import PackageNotFoundError, version

import loragraft


def installed_versions(*packages: str) -> dict[str, str]:
    """Package -> its installed version; of this project also where it runs from a checkout that is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = loragraft.__version__ if package == "loragraft" else "not installed"
    return found
