"""Check Kubernetes manifests against the schemas of Kubernetes: python ci/manifests.py FILE...

Needs kubernetes-validate. It has no schema of RayService, whose pod templates are checked as pods.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

VERSION = "1.37"


def objects(file: Path) -> Iterator[dict[str, Any]]:
    """What of `file` Kubernetes has a schema for."""
    for manifest in yaml.safe_load_all(file.read_text()):
        if manifest["kind"] != "RayService":
            yield manifest
            continue
        cluster = manifest["spec"]["rayClusterConfig"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            yield {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "pod"},
                **group["template"],
            }


def errors(file: Path) -> list[str]:
    """One line for each object of `file` that its schema does not allow."""
    found = []
    for checked in objects(file):
        try:
            kubernetes_validate.validate(checked, VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            place = ".".join(map(str, error.path))
            found.append(f"{file}: {checked['kind']}: {place}: {error.message}")
    return found


if __name__ == "__main__":
    lines = [line for name in sys.argv[1:] for line in errors(Path(name))]
    print("\n".join(lines) or "manifests: as the schemas of Kubernetes say")
    sys.exit(bool(lines))
