"""A bundle that exists: its manifest, and its files through the runtime's gate."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sedac_export.bundle.manifest import Manifest, parse_manifest
from sedac_runtime._core import BundleFiles
from sedac_runtime.choices import Verify

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked.

    Only what the manifest lists is opened, and as it was checked: what changes afterwards raises
    SedacError.
    """

    directory: Path
    manifest: Manifest
    files: BundleFiles = field(repr=False)

    @classmethod
    def open(
        cls,
        directory: Path,
        replaced: str | None = None,
        verify: Verify = "always",
        older: bool = False,
    ) -> "Bundle":
        """Check the bundle in `directory`, except files below its directory `replaced`.

        verify "changed" hashes only files that changed since they were last found whole. older
        takes bundles of an older schema too, to upgrade them.

        Raises SedacError when it is not a bundle, is damaged, or has a file outside its directory.
        """
        files = BundleFiles(directory, replaced=replaced, verify=verify, older=older)
        return cls(directory, parse_manifest(directory, files.manifest), files)

    def lists(self, name: str) -> bool:
        """Whether the bundle has the file `name`."""
        return name in self.manifest.files

    def read(self, name: str) -> bytes:
        """The contents of the file `name`."""
        return self.files.read(name)

    def path(self, name: str) -> Path:
        """The path of the file `name`, for libraries that open files themselves."""
        return self.files.path(name)

    def graph(self, name: str) -> "ModelProto":
        """The graph in the file `name`, its external weights left where they are."""
        # commands that read no graph start without onnx
        import onnx

        return onnx.load_model_from_string(self.read(name))
