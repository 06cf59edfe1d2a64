"""Arrows between the core's modules that ci/rust_modules.py must see."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "ci" / "rust_modules.py"
TABLE = {"error": "", "kv": "error", "chain": "error kv"}


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rust_modules", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    (tmp_path / "lib.rs").write_text("pub mod chain;\npub mod error;\nmod kv;\n")
    (tmp_path / "error.rs").write_text("pub struct Error;\n")
    (tmp_path / "kv.rs").write_text("use crate::error::Error; // not crate::chain\n")
    (tmp_path / "chain").mkdir()
    (tmp_path / "chain" / "step.rs").write_text("use crate::{chain::mod_of, kv::{A, error}};\n")
    return tmp_path


def test_allowed_arrows_pass(script: ModuleType, sources: Path) -> None:
    assert script.errors(sources, TABLE) == []


@pytest.mark.parametrize(
    "line",
    [
        "use crate::chain::Chain;",
        "fn run(chain: &crate::chain::Chain) {}",
        "use crate::{\n    error::{self, Error},\n    chain::Chain,\n};",
    ],
)
def test_another_arrow_is_named(script: ModuleType, sources: Path, line: str) -> None:
    (sources / "kv.rs").write_text(line)
    assert script.errors(sources, TABLE) == ["kv.rs: kv may not use chain"]


def test_the_names_of_a_group_are_its_first_ones(script: ModuleType) -> None:
    assert script.used("use crate::{a::{x, y::z}, b, c as d};") == {"a", "b", "c"}


def test_a_cycle_in_the_table_is_named(script: ModuleType, sources: Path) -> None:
    (error,) = script.errors(sources, TABLE | {"error": "chain"})
    assert "cycle" in error and "chain" in error


def test_every_module_is_in_the_table(script: ModuleType, sources: Path) -> None:
    table = {"error": "", "kv": "error", "text": ""}
    assert script.errors(sources, table) == [
        "chain: in the table or in lib.rs only",
        "text: in the table or in lib.rs only",
        "chain/step.rs: chain may not use kv",
    ]


def test_the_table_of_the_core_has_no_cycle(script: ModuleType) -> None:
    assert not any("cycle" in line for line in script.errors(script.SOURCES, script.ALLOWED))
