"""A bundle appears whole or not at all, whenever its builder is killed, and has one builder."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bad_input.command import snapshot

from sedac_export import SedacError
from sedac_export.bundle import Bundle
from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.edit import edited_bundle
from sedac_export.bundle.staging import claimed

# builds a bundle of one file and dies before its `end`-th rename or before it removes anything;
# with -1 it waits before it publishes
BUILDER = """
import os, shutil, signal, sys
from pathlib import Path
from sedac_export.bundle.staging import claimed

output, end = Path(sys.argv[1]), int(sys.argv[2])
rename, renames = Path.rename, []

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def rename_or_die(self, target):
    if len(renames) == end:
        die()
    renames.append(target)
    return rename(self, target)

Path.rename, shutil.rmtree = rename_or_die, die
with claimed(output) as claim, claim.staging() as staging, claim.scratch() as scratch:
    (staging / "text").write_text("new")
    (scratch / "text").write_text("meanwhile")
    if end < 0:
        print("building", flush=True)
        sys.stdin.read()
    claim.publish(staging, replace=True)
"""


def killed_builder(output: Path, end: int) -> None:
    died = subprocess.run([sys.executable, "-c", BUILDER, output, str(end)])
    assert died.returncode == -signal.SIGKILL


@contextmanager
def other_builder(output: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, at work on `output`."""
    command = [sys.executable, "-c", BUILDER, str(output), "-1"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        yield process
        process.kill()


def old_bundle(output: Path) -> Path:
    output.mkdir()
    (output / "text").write_text("old")
    return output


@pytest.mark.parametrize("end", [0, 1, 2, 3])
def test_killed_at_any_rename_one_of_the_bundles_is_there(tmp_path: Path, end: int) -> None:
    output = old_bundle(tmp_path / "bundle")
    killed_builder(output, end)
    assert len(list(tmp_path.iterdir())) > 1
    with claimed(output):
        assert (output / "text").read_text() == ("new" if end > 1 else "old")
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("end", [0, 1])
def test_killed_before_there_was_a_bundle(tmp_path: Path, end: int) -> None:
    output = tmp_path / "bundle"
    killed_builder(output, end)
    with claimed(output):
        assert output.exists() == (end > 0)
    assert list(tmp_path.iterdir()) == [output] * output.exists()


def test_a_bundle_that_was_being_removed_is_not_put_back(tmp_path: Path) -> None:
    output = old_bundle(tmp_path / "bundle")
    killed_builder(output, 3)
    shutil.rmtree(output)
    with claimed(output):
        assert not output.exists()


def test_one_process_at_a_time_and_none_cleans_up_after_a_live_one(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with other_builder(output) as builder:
        before = sorted(tmp_path.rglob("*"))
        assert tmp_path / ".bundle.building" / "text" in before
        with pytest.raises(SedacError, match="bundle is being built or changed by another"):
            claimed(output).__enter__()
        assert sorted(tmp_path.rglob("*")) == before
        builder.kill()
        builder.wait()
        with claimed(output):
            assert [path.name for path in tmp_path.iterdir()] == [".bundle.lock"]
    assert not list(tmp_path.iterdir())


def test_a_thread_claims_again_what_it_has_and_another_does_not(tmp_path: Path) -> None:
    refused = []

    def claim() -> None:
        try:
            claimed(output).__enter__()
        except SedacError as error:
            refused.append(error)

    output = tmp_path / "bundle"
    with claimed(output) as first, first.staging() as staging:
        with claimed(output):
            assert staging.is_dir()
        thread = threading.Thread(target=claim)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert not list(tmp_path.iterdir())


def test_what_only_resembles_debris_stays(tmp_path: Path) -> None:
    spared = [tmp_path / name for name in (".qwen2.5.building", ".qwen2.settings", "qwen2.lock")]
    for path in (*spared, tmp_path / ".qwen2.building", tmp_path / ".qwen2.scratch"):
        path.mkdir()
    with claimed(tmp_path / "qwen2"):
        pass
    assert sorted(tmp_path.iterdir()) == sorted(spared)


def test_a_link_stands_for_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    output = old_bundle(tmp_path / "disk" / "bundle")
    link = tmp_path / "link"
    link.symlink_to(output)
    with claimed(link) as claim, claim.staging() as staging:
        (staging / "text").write_text("new")
        claim.publish(staging, replace=True)
    assert link.readlink() == output
    assert (output / "text").read_text() == "new"
    assert not output.is_symlink()
    with other_builder(output), pytest.raises(SedacError, match="link is being built"):
        claimed(link).__enter__()


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "back")
    (tmp_path / "back").symlink_to(tmp_path / "link")
    with pytest.raises(SedacError, match="link is a link that leads back to itself"):
        claimed(tmp_path / "link").__enter__()


@pytest.mark.parametrize("there", [False, True])
def test_the_disk_holds_all_before_the_name_is_given(
    tmp_path: Path, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "bundle"
    if there:
        old_bundle(output)
    happened: list[int | str] = []
    fsync, rename = os.fsync, Path.rename

    def record_sync(descriptor: int) -> None:
        happened.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_rename(self: Path, target: Path) -> Path:
        happened.append(Path(target).name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "rename", record_rename)
    with claimed(output) as claim, claim.staging() as staging:
        (staging / "onnx").mkdir()
        (staging / "onnx" / "text").write_text("new")
        written = {path.stat().st_ino for path in (staging, *staging.rglob("*"))}
        claim.publish(staging, replace=True)
    named = happened.index("bundle")
    assert written <= set(happened[:named])
    assert happened[named + 1] == tmp_path.stat().st_ino


def test_what_the_disk_does_not_take_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    output = old_bundle(tmp_path / "bundle")
    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(SedacError, match="bundle cannot be written: Input/output error"),
        claimed(output) as claim,
        claim.staging() as staging,
    ):
        claim.publish(staging, replace=True)
    assert (output / "text").read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_an_edit_waits_for_nobody_and_carries_no_debris(demo_bundle: Path, tmp_path: Path) -> None:
    output = shutil.copytree(demo_bundle, tmp_path / "bundle")
    (output / ".bundle.json").write_text("{")
    (output / "notes").symlink_to("/etc/passwd")
    opened = Bundle.open(output)
    with other_builder(output), pytest.raises(SedacError, match="another process"):
        edited_bundle(opened).__enter__()
    with edited_bundle(opened) as copy:
        assert snapshot(copy) == snapshot(demo_bundle)
    assert snapshot(output) == snapshot(demo_bundle)


def test_an_opened_bundle_can_be_edited_again_and_again(demo_bundle: Path, tmp_path: Path) -> None:
    output = shutil.copytree(demo_bundle, tmp_path / "bundle")
    head = output / "onnx" / "head.data"
    inside = head if head.exists() else output / "onnx" / "embed.data"
    inside.rename(output / "blob")
    inside.symlink_to("../blob")
    opened = Bundle.open(output)
    for _ in range(3):
        with edited_bundle(opened, keep=False) as copy:
            assert (copy / inside.relative_to(output)).read_bytes() == inside.read_bytes()
            assert Bundle.open(copy).manifest == opened.manifest


def test_an_edit_takes_nothing_that_was_replaced_since_its_check(
    demo_bundle: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(demo_bundle, tmp_path / "bundle")
    opened = Bundle.open(output)
    (output / "tokenizer.json").unlink()
    (output / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(SedacError, match="is altered"):
        edited_bundle(opened).__enter__()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_a_manifest_whose_digest_was_left_behind_is_settled(
    demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "bundle"
    copy.mkdir()
    manifest = bundle.read_manifest(demo_bundle)
    bundle.write_manifest(copy, manifest)
    rename = Path.rename

    def fail_for_the_digest(self: Path, target: Path) -> Path:
        if Path(target).name == bundle.MANIFEST_DIGEST:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Path, "rename", fail_for_the_digest)
        bundle.write_manifest(copy, manifest.model_copy(update={"max_cache_length": 7}))
    with pytest.raises(SedacError, match="altered"):
        bundle.read_manifest(copy)
    bundle.settle_manifest(copy)
    assert bundle.read_manifest(copy).max_cache_length == 7
