"""A signed bundle is what was signed, or is refused in one line."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input.command import Result, assert_one_line_error, call, rewrite_manifest, snapshot
from conftest import THREADS, TinyBundle
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

import sedac_export.cli
from sedac_export.bundle import Bundle
from sedac_export.bundle.edit import edited_bundle, write_config
from sedac_export.bundle.hashing import sha256
from sedac_export.bundle.manifest import list_files, read_manifest, write_manifest
from sedac_runtime import SedacModel

Run = Callable[..., Result]


def write_keys(
    directory: Path,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    encryption: KeySerializationEncryption | None = None,
) -> tuple[Path, Path]:
    """The private and the public key in PEM files."""
    directory.mkdir()
    private, public = directory / "key.pem", directory / "key.pub"
    hidden = encryption or NoEncryption()
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden))
    shown = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    public.write_bytes(shown)
    return private, public


@pytest.fixture
def export(capfd: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: call(sedac_export.cli.main, [str(a) for a in arguments], capfd)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path / "keys", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def signed(
    tiny_bundle: Callable[[str], TinyBundle],
    tmp_path: Path,
    keys: tuple[Path, Path],
    export: Run,
) -> Path:
    bundle = shutil.copytree(tiny_bundle("llama")[1], tmp_path / "bundle")
    result = export("sign", bundle, "--private-key", keys[0])
    assert result.code == 0, result
    return bundle


def test_a_signed_bundle_is_verified_and_used(
    signed: Path, keys: tuple[Path, Path], export: Run
) -> None:
    assert export("verify", signed, "--public-key", keys[1]).code == 0
    assert export("inspect", signed).code == 0
    SedacModel.from_pretrained(signed, threads=THREADS).generate([1], max_new_tokens=1)
    # signing again replaces the signature, and whatever a killed one left
    (signed / ".model.sig").write_text("half")
    assert export("sign", signed, "--private-key", keys[0]).code == 0
    moved = signed.rename(signed.with_name("moved"))
    assert export("verify", moved, "--public-key", keys[1]).code == 0


def alter_weights(bundle: Path) -> None:
    path = bundle / "onnx" / "layer_000.data"
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def forge_weights(bundle: Path) -> None:
    alter_weights(bundle)
    files = json.loads((bundle / "bundle.json").read_text())["files"]
    name = "onnx/layer_000.data"
    files[name]["sha256"] = sha256(bundle / name)
    rewrite_manifest(bundle, files=files)


def forge_config(bundle: Path) -> None:
    (bundle / "sedac_config.json").write_text('{"tau": 0.5}')


def remove_config(bundle: Path) -> None:
    (bundle / "sedac_config.json").unlink()


def add_file(bundle: Path) -> None:
    (bundle / "onnx" / "more.data").write_bytes(b"more")


def link_out(bundle: Path) -> None:
    (bundle / "onnx" / "more.data").symlink_to("/etc/hostname")


def remove_signature(bundle: Path) -> None:
    (bundle / "model.sig").unlink()


def forge_signature(bundle: Path) -> None:
    path = bundle / "model.sig"
    signature = json.loads(path.read_text())
    signature["dsseEnvelope"]["signatures"][0]["sig"] = "AAAA"
    path.write_text(json.dumps(signature))


def empty_signature(bundle: Path) -> None:
    (bundle / "model.sig").write_text("{}")


def damage_signature(bundle: Path) -> None:
    (bundle / "model.sig").write_bytes(b"\xff\x00")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (alter_weights, "layer_000.data is altered"),
        (forge_weights, "'bundle.json'"),
        (forge_config, "sedac_config.json"),
        (remove_config, "sedac_config.json"),
        (add_file, "onnx/more.data"),
        (link_out, "more.data"),
        (remove_signature, "not signed"),
        (forge_signature, "not what this key signed"),
        (empty_signature, "not what this key signed"),
        (damage_signature, "not what this key signed"),
    ],
)
def test_what_was_not_signed_is_refused(
    damage: Callable[[Path], None],
    words: str,
    signed: Path,
    keys: tuple[Path, Path],
    export: Run,
) -> None:
    damage(signed)
    result = export("verify", signed, "--public-key", keys[1])
    assert_one_line_error(result, str(signed), words)


def test_keys_that_cannot_be_used_are_refused(signed: Path, tmp_path: Path, export: Run) -> None:
    other = write_keys(tmp_path / "other", ec.generate_private_key(ec.SECP256R1()))
    refused = export("verify", signed, "--public-key", other[1])
    assert_one_line_error(refused, "not what this key signed", "Key mismatch")
    secret = BestAvailableEncryption(b"secret")
    curve, small = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256K1())
    wrong = [
        write_keys(tmp_path / "rsa", rsa.generate_private_key(65537, 2048)),
        write_keys(tmp_path / "small", small),
        (tmp_path / "none.pem", tmp_path / "none.pub"),
        (other[1], other[0]),
    ]
    before = snapshot(signed)
    for private, public in wrong:
        assert_one_line_error(export("sign", signed, "--private-key", private), str(private))
        assert_one_line_error(export("verify", signed, "--public-key", public), str(public))
    locked, _ = write_keys(tmp_path / "locked", curve, secret)
    assert_one_line_error(export("sign", signed, "--private-key", locked), "encrypted")
    assert snapshot(signed) == before


def test_only_whole_bundles_are_signed(signed: Path, keys: tuple[Path, Path], export: Run) -> None:
    alter_weights(signed)
    before = snapshot(signed)
    assert_one_line_error(export("sign", signed, "--private-key", keys[0]), "altered")
    assert snapshot(signed) == before


def test_a_change_removes_the_signature(
    signed: Path, keys: tuple[Path, Path], export: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    signature = signed / "model.sig"
    assert "model.sig" not in list_files(signed)
    with edited_bundle(Bundle.open(signed), keep=False) as copy:
        write_config(copy, "{}")
    assert signature.exists()
    assert "removed" not in capfd.readouterr().err
    write_config(signed, "{}")
    assert not signature.exists()
    assert "model.sig was removed" in capfd.readouterr().err
    assert export("sign", signed, "--private-key", keys[0]).code == 0
    with edited_bundle(Bundle.open(signed)) as copy:
        write_manifest(copy, read_manifest(copy))
    assert not signature.exists()
    assert "model.sig was removed" in capfd.readouterr().err


def test_the_extra_is_named_where_it_is_missing(
    signed: Path, keys: tuple[Path, Path], export: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for command, option, key in (
        ("sign", "--private-key", keys[0]),
        ("verify", "--public-key", keys[1]),
    ):
        assert_one_line_error(export(command, signed, option, key), "sedac[signing]")
