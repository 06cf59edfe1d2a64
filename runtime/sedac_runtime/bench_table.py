"""What benchmarks print."""

from collections.abc import Callable, Sequence
from functools import partial

from rich.console import Console
from rich.table import Column, Table

from sedac_runtime.bench_row import BenchRow
from sedac_runtime.peer_comparison import PeerRow


def print_rows(rows: Sequence[BenchRow]) -> None:
    """Print `rows` as a table."""
    table = Table(
        Column("row", no_wrap=True),
        *("ms/token", "min", "max", "tokens/s", "layers", "speed", "same"),
        # fits into 80 columns
        box=None,
        pad_edge=False,
    )
    for row in rows:
        table.add_row(
            row["name"],
            *(f"{row[key]:.3f}" for key in ("ms_per_token", "min_ms", "max_ms")),
            f"{row['tokens_per_second']:.1f}",
            f"{row['mean_exit_layer']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['agreement']:.1%}",
        )
    Console().print(table)


def markdown_table(rows: Sequence[PeerRow]) -> str:
    """`rows` as a table in Markdown, one line each."""
    columns: dict[str, Callable[[PeerRow], str]] = {
        "runtime": lambda row: f"{row['name']} {row['version']}",
        "first token, ms": lambda row: f"{row['prefill_ms']:.0f}",
        "tokens/s": lambda row: f"{row['tokens_per_second']:.1f}",
        "min": lambda row: f"{row['min_tokens_per_second']:.1f}",
        "max": lambda row: f"{row['max_tokens_per_second']:.1f}",
    }
    for peer in rows[0]["speedup"]:
        columns[f"over {peer}"] = partial(_ratio, peer)
    columns["agreement"] = lambda row: f"{row['agreement']:.1%}"
    if rows[0]["original_agreement"] is not None:
        columns["with transformers"] = lambda row: f"{row['original_agreement']:.1%}"
    columns["loaded, s"] = lambda row: f"{row['load_ms'] / 1e3:.2f}"
    columns["resident, MB"] = lambda row: f"{row['resident_bytes'] / 1e6:.0f}"
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[show(row) for show in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratio(peer: str, row: PeerRow) -> str:
    return f"{row['speedup'][peer]:.2f}x"
