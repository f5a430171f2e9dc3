"""Signatures over everything that is published, through OpenSSF's `model-signing` with a local key (ECDSA, PEM).

    model.sig      a Sigstore bundle: a DSSE envelope over the sha256 of every file beside it, `loragraft.json` included

`pip install "loragraft[signing]"`. A signature says who published; whether to trust that key is the reader's decision.
"""

from pathlib import Path
from typing import Any

from loragraft.disk import write_atomic
from loragraft.zoo.entry import SIGNATURE, ZooError

OUTSIDE = (SIGNATURE, "status.json", ".gitattributes", ".cache")
"""What no signature covers: itself, what may change, and what the Hub and its client add."""


def make_keys(private: Path) -> Path:
    """A new P-256 key in `private` (readable by you alone) and `private`.pub; returns the latter. Raises ZooError if one exists."""
    _library()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    public = private.with_name(private.name + ".pub")
    for path in (private, public):
        if path.exists():
            raise ZooError(f"{path} exists: a key is never overwritten")
    key = ec.generate_private_key(ec.SECP256R1())
    private.parent.mkdir(parents=True, exist_ok=True)
    private.touch(mode=0o600)
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    write_atomic(
        public,
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
    )
    return public


def sign(folder: Path, signature: Path, private: Path) -> None:
    """Signs every file of `folder`. Raises ZooError for a key that is not there or is none."""
    library = _library()
    if not private.is_file():
        raise ZooError(f"no key {private}: make one with `loragraft zoo key {private}`")
    try:
        config = library.signing.Config().use_elliptic_key_signer(private_key=private)
    except (ValueError, TypeError) as error:
        raise ZooError(f"{private} is not a private key in PEM: {error}") from error
    config.set_hashing_config(_hashing(library)).sign(folder, signature)


def verify_signature(folder: Path, public: Path) -> None:
    """Raises ZooError unless `folder`/model.sig was made with the private half of `public` over exactly these files."""
    library = _library()
    if not public.is_file():
        raise ZooError(f"no key {public}: give the publisher's public key, a PEM file")
    try:
        config = library.verifying.Config().use_elliptic_key_verifier(public_key=public)
    except (ValueError, TypeError) as error:
        raise ZooError(f"{public} is not a public key in PEM: {error}") from error
    try:
        config.set_hashing_config(_hashing(library)).verify(folder, folder / SIGNATURE)
    except Exception as error:  # the library raises many kinds for what is one answer: not signed with this key
        raise ZooError(
            f"{folder / SIGNATURE} is not a signature of these files by {public}: {str(error) or type(error).__name__}"
        ) from error


def _hashing(library: Any) -> Any:
    return library.hashing.Config().set_ignored_paths(paths=OUTSIDE, ignore_git_paths=True)


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:  # of the library, or of something that it needs
        raise ZooError(
            f'signatures need model-signing, which cannot be imported ({error}): pip install "loragraft[signing]"'
        ) from error
    return model_signing
