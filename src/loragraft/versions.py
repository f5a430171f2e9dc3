"""Which versions a figure belongs to, and how a package that is missing is installed."""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def how_to_install(module: str) -> str:
    """The command for the package of `module`, in the version or by the extra that this project asks for.

    Of a package that is named unlike its module no name is guessed: installing the project brings it.
    """
    try:
        wanted = [Requirement(text) for text in requires("loragraft") or ()]
    except PackageNotFoundError:  # a checkout that is not installed
        wanted = []
    top = canonicalize_name(module.partition(".")[0])
    found = [one for one in wanted if canonicalize_name(one.name) == top]
    extras = [str(one.marker).partition('extra == "')[2].partition('"')[0] for one in found if one.marker]
    if found and len(extras) == len(found) and extras[0]:
        return f'pip install "loragraft[{extras[0]}]"'
    if found:
        return f'pip install "{found[0].name}{found[0].specifier}"'
    return "pip install --upgrade loragraft (in a checkout: pip install -e .)"
