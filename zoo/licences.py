"""Under which licence an adapter may be published: its base's, for an adapter is a derivative of it.

What the cards of the bases' repositories declare. Some forbid commercial use; the card that we write says the same as theirs.
"""

from loragraft.backbones.load import find_spec
from loragraft.zoo.entry import Licence, ZooError

HUB_URL = "https://huggingface.co"


def _other(name: str, repository: str, file: str = "LICENSE.md") -> Licence:
    return Licence(id="other", name=name, link=f"{HUB_URL}/{repository}/blob/main/{file}")


EMBEDDED = Licence(id="apache-2.0")
"""Of bases that travel with this package."""
OF_REPOSITORY = {
    "black-forest-labs/FLUX.1-dev": _other("flux-1-dev-non-commercial-license", "black-forest-labs/FLUX.1-dev"),
    "black-forest-labs/FLUX.1-schnell": Licence(id="apache-2.0"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Licence(id="creativeml-openrail-m"),
    "stabilityai/sd-turbo": _other("sai-nc-community", "stabilityai/sd-turbo", "LICENSE"),
    "stabilityai/stable-diffusion-xl-base-1.0": Licence(id="openrail++"),
    "stabilityai/sdxl-turbo": _other("sai-nc-community", "stabilityai/sdxl-turbo"),
    **{
        f"Efficient-Large-Model/{name}": _other("nscl-v2-custom", f"Efficient-Large-Model/{name}", "LICENSE.txt")
        for name in ("Sana_600M_1024px_diffusers", "Sana_1600M_1024px_diffusers", "Sana_1600M_1024px_BF16_diffusers")
    },
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": Licence(id="openrail++"),
}


def repository_of(base: str) -> str | None:
    """Where the 16-bit weights of a base are published; None if they travel with this package.

    Raises ValueError for an unknown base.
    """
    external = find_spec(base).external
    return external.hub_id if external is not None else None


def licence_for(base: str, asked: str | None) -> Licence:
    """The base's licence; for a base whose licence is not known here, the one that was `asked` for.

    Raises ZooError without either, and where `asked` is not the known one: a derivative does not choose.
    """
    repository = repository_of(base)
    known = EMBEDDED if repository is None else OF_REPOSITORY.get(repository)
    if known is None:
        if not asked:
            raise ZooError(
                f"the licence of {repository} is not known here, and an adapter is published under its base's: look at the "
                "base's card and give --licence ID (for example openrail++)"
            )
        return Licence(id=asked)
    if asked and asked not in (known.id, known.name) and repository is not None:
        raise ZooError(
            f"--licence {asked}: {repository} is under {known.name or known.id}, and so is an adapter for it: leave the option out"
        )
    return Licence(id=asked) if asked and repository is None else known
