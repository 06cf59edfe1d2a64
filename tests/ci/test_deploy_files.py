"""What deploy/ repeats of other files."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_the_image_has_the_rust_of_the_toolchain_file() -> None:
    toolchain = tomllib.loads((ROOT / "rust-toolchain.toml").read_text())["toolchain"]
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert re.findall(r"FROM rust:([\d.]+)", dockerfile) == [toolchain["channel"]]


def test_the_ray_service_has_the_ray_of_the_lock_file() -> None:
    locked = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    (version,) = [package["version"] for package in locked if package["name"] == "ray"]
    service = yaml.safe_load((ROOT / "deploy" / "ray.yaml").read_text())
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == version
