"""Sign bundles, and verify what was signed.

The digests in a bundle show damage. They do not show forgery: whoever can write the bundle can
write its digests, and its certificate's. A signature shows that it is what the holder of a private
key signed. It is that of OpenSSF Model Signing (https://github.com/ossf/model-signing-spec), made
by sigstore's model-signing, and covers every file but itself and git's.
"""

import re
import textwrap
from pathlib import Path
from typing import Any

from sedac_export.bundle import Bundle
from sedac_export.bundle.signature import SIGNATURE
from sedac_export.errors import SedacError
from sedac_runtime._core import read_unlisted


def sign_bundle(directory: Path, private_key: Path) -> None:
    """Sign the bundle in `directory` with a PEM file's elliptic curve key, unencrypted.

    Raises SedacError when the bundle is damaged or there is no such key in the file.
    """
    Bundle.open(directory)
    signing = _library().signing.Config()
    try:
        signing.use_elliptic_key_signer(private_key=private_key)
    except Exception as error:
        raise SedacError(
            f"{private_key} holds no key to sign with ({_reason(error)}); make one with openssl"
            " ecparam -name prime256v1 -genkey -noout -out KEY"
        ) from error
    staged = directory / f".{SIGNATURE}"
    staged.unlink(missing_ok=True)
    signing.set_hashing_config(_library().hashing.Config().set_ignored_paths(paths=[SIGNATURE]))
    try:
        signing.sign(directory, staged)
    except ValueError as error:
        raise SedacError(f"{directory} cannot be signed: {_reason(error)}; remove it") from error
    staged.rename(directory / SIGNATURE)


def verify_bundle(directory: Path, public_key: Path) -> None:
    """Check that the bundle in `directory` is whole and what the key's holder signed.

    Raises SedacError naming what is not.
    """
    Bundle.open(directory)
    verifying = _library().verifying.Config()
    try:
        verifying.use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:
        raise SedacError(
            f"{public_key} holds no key to verify with ({_reason(error)}); make one with openssl"
            " ec -in PRIVATE_KEY -pubout -out KEY"
        ) from error
    signature = directory / SIGNATURE
    if read_unlisted(directory, SIGNATURE) is None:
        raise SedacError(f"{directory} is not signed: it holds no {SIGNATURE}; sign it")
    try:
        verifying.verify(directory, signature)
    except Exception as error:
        # nothing that a damaged signature can raise has a base in common
        raise SedacError(
            f"{directory} is not what this key signed: {_reason(error)}; take it from whoever signs"
            " it, or sign it again"
        ) from error


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise SedacError("signatures need model-signing; pip install 'sedac[signing]'") from error
    return model_signing


def _reason(error: Exception) -> str:
    # the library's list of differences, without digests
    text = re.sub(r'[\[\]"\\]', "", str(error).split(": Expected")[0])
    return textwrap.shorten(text.strip(". \n") or type(error).__name__, 300)
