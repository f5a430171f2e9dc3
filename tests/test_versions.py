"""Versions that a figure names, and the command for a package that is missing."""

from importlib import metadata

import pytest

import loragraft
from loragraft import versions

REQUIRED = [
    "jsonschema>=4.23",
    'gradio<7,>=6.20; extra == "demo"',
    'flash-attn-4>=4.0.0b36; extra == "flash-attn-4"',
    "triton>=3.6; platform_system == 'Linux'",
]


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("jsonschema", 'pip install "jsonschema>=4.23"'),
        ("jsonschema.exceptions", 'pip install "jsonschema>=4.23"'),
        ("gradio", 'pip install "loragraft[demo]"'),
        ("flash_attn_4", 'pip install "loragraft[flash-attn-4]"'),
        ("triton", 'pip install "triton>=3.6"'),
        ("unheard_of", "pip install --upgrade loragraft (in a checkout: pip install -e .)"),
    ],
)
def test_a_missing_package_is_installed_as_the_project_asks_for_it(
    module: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "requires", lambda _: REQUIRED)
    assert versions.how_to_install(module) == command


def test_a_checkout_that_is_not_installed_has_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "requires", lacking)
    monkeypatch.setattr(versions, "version", lacking)
    assert "pip install -e ." in versions.how_to_install("jsonschema")
    assert versions.installed_versions("loragraft", "x") == {"loragraft": loragraft.__version__, "x": "not installed"}
