"""mkdocs hook: reference pages generated from the code."""

import json
import subprocess
import sys
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

from sedac_export.bundle.exit_config import ExitConfig
from sedac_export.bundle.manifest import Manifest

COMMANDS = {"sedac-runtime": "sedac_runtime.cli", "sedac-export": "sedac_export.cli"}
SCHEMAS: dict[str, type[BaseModel]] = {"bundle": Manifest, "sedac_config": ExitConfig}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each command, and a JSON schema for each file that is read by both sides."""
    for path, content in (*_commands(), *_schemas()):
        files.append(File.generated(config, path, content=content))
    return files


def _commands() -> Iterator[tuple[str, str]]:
    for name, module in COMMANDS.items():
        text = subprocess.run(
            [sys.executable, "-m", "typer", module, "utils", "docs", "--name", name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        yield f"reference/{name.removeprefix('sedac-')}-cli.md", text


def _schemas() -> Iterator[tuple[str, str]]:
    for name, model in SCHEMAS.items():
        schema = json.dumps(model.model_json_schema(), indent=2)
        yield f"reference/{name}.schema.json", schema
