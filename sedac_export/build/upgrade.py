"""`sedac-export upgrade`: bring a bundle of schema 1 to schema 2 without its model.

In schema 1 the embed engine gave the contexts as well, so whoever needed those alone embedded
tokens for nothing. The graph of that engine is taken apart here, and both parts run against it.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sedac_export.arrays import Array
from sedac_export.bundle import Bundle
from sedac_export.bundle import manifest as bundle
from sedac_export.bundle.edit import edited_bundle, write_config
from sedac_export.bundle.exit_config import read_exit_config
from sedac_export.bundle.plan_entries import BuildOptions
from sedac_export.bundle.portable_runner import PortableRunner
from sedac_export.bundle.sessions import Engine
from sedac_export.errors import SedacError
from sedac_export.graph.split import split_embed
from sedac_export.graph.stamp import save_engine
from sedac_runtime.flavour import Target

RunGraph = Callable[[dict[str, Array]], dict[str, Array]]

# positions of one pass of the comparison
_PASS = 256


@dataclass(frozen=True)
class UpgradedBundle:
    """What an upgrade wrote: whether the certificate holds for it, and plans left out by target."""

    output: Path
    certified: bool
    incomplete: dict[Target, BuildOptions]


def upgrade_bundle(directory: Path, output: Path | None = None) -> UpgradedBundle:
    """Upgrade the bundle in `directory` in place, or as `output`. All of it is done, or nothing.

    Raises SedacError when there is nothing to upgrade, when the bundle is damaged, and when the new
    engines do not give the same bits as the old one.
    """
    old = Bundle.open(directory, older=True)
    if old.manifest.schema_version == bundle.SCHEMA_VERSION:
        raise SedacError(
            f"{directory} is of schema {bundle.SCHEMA_VERSION}, which is the newest; it needs no"
            " upgrade"
        )
    with edited_bundle(old, output=output) as staging:
        incomplete = _Upgrade(old, staging).run()
        new = Bundle.open(staging)
        certified = _renew_certificate(old, new)
    return UpgradedBundle(output or directory, certified, incomplete)


@dataclass
class _Upgrade:
    old: Bundle
    staging: Path

    def run(self) -> dict[Target, BuildOptions]:
        """Write the new graphs and the manifest; the options of targets that lost a plan."""
        manifest = self.old.manifest
        engines, portable = manifest.engines, manifest.portable
        contexts = self._split(engines.embed, "contexts", self._load_engine)
        update: dict[str, object] = {
            "schema_version": bundle.SCHEMA_VERSION,
            "engines": engines.model_copy(update={"contexts": contexts}),
        }
        written = [] if contexts is None else [engines.embed, contexts]
        dropped: list[str] = []
        incomplete: dict[Target, BuildOptions] = {}
        if portable is not None:
            graph = self._split(portable.embed, "portable_contexts", self._load_portable)
            update["portable"] = portable.model_copy(update={"contexts_graph": graph})
            if graph is not None:
                written += [portable.embed, graph]
                incomplete = {target: plans.options for target, plans in manifest.plans.items()}
                update["plans"], dropped = self._without_plans_of(portable.embed)
        files = {name: e for name, e in manifest.files.items() if name not in dropped}
        for name in dropped:
            (self.staging / name).unlink(missing_ok=True)
        files |= {name: bundle.file_entry(self.staging, name) for name in written}
        bundle.write_manifest(self.staging, manifest.model_copy(update=update | {"files": files}))
        return incomplete

    def _split(self, embed: str, name: str, load: Callable[[str], RunGraph]) -> str | None:
        """Take the graph `embed` apart and check both parts; the path of the contexts' one."""
        parts = split_embed(self.old.graph(embed))
        if parts[1] is None:
            return None
        contexts = str(Path(embed).with_name(f"{name}.onnx"))
        before = list(self._digests([load(embed)]))
        save_engine(parts[0], self.staging / embed)
        save_engine(parts[1], self.staging / contexts)
        if list(self._digests([load(embed), load(contexts)])) != before:
            raise SedacError(
                f"{self.old.directory / embed}: its parts do not give the bits that it gives;"
                " build the bundle again"
            )
        return contexts

    def _digests(self, graphs: list[RunGraph]) -> Iterator[dict[str, str]]:
        """What `graphs` give together, at every position and for each of some passes."""
        length = self.old.manifest.max_cache_length
        starts = range(0, length, _PASS)
        passes = [range(start, min(start + _PASS, length)) for start in starts]
        rng = np.random.default_rng(0)
        for positions in (*passes, range(1), range(length - 1, length)):
            tokens = rng.integers(0, self.old.manifest.model.vocab_size, len(positions))
            feeds = {"input_ids": tokens[None], "position_ids": np.array(positions)[None]}
            outputs: dict[str, Array] = {}
            for run in graphs:
                outputs |= run(feeds)
            yield {name: _digest(array) for name, array in outputs.items()}

    def _load_engine(self, graph: str) -> RunGraph:
        return Engine(self.staging / graph).run

    def _load_portable(self, graph: str) -> RunGraph:
        return functools.partial(PortableRunner(self.staging, self.old.manifest.precision), graph)

    def _without_plans_of(self, graph: str) -> tuple[dict[Target, object], list[str]]:
        """The plans but those of `graph`, which computes something else now, and these' files."""
        plans = self.old.manifest.plans
        kept: dict[Target, object] = {
            target: those.model_copy(
                update={"plans": [plan for plan in those.plans if plan.graph != graph]}
            )
            for target, those in plans.items()
        }
        dropped = [
            plan.file for those in plans.values() for plan in those.plans if plan.graph == graph
        ]
        return kept, dropped


def _digest(array: Array) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return f"{array.dtype} {array.shape} {digest}"


def _renew_certificate(old: Bundle, new: Bundle) -> bool:
    """Make a certificate that holds for the `old` engines hold for the `new` ones, if there is one.

    A certificate names the digest of the engines that it was measured on. It is carried over to
    other files here for one reason only: that these compute the same was checked, bit by bit, just
    before. A certificate of yet other engines stays the stale one that it is.
    """
    certificate = read_exit_config(new.directory).certificate
    if certificate is None or certificate.setting.engines_sha256 != old.files.engines_sha256:
        return False
    # everything else in the file stays as the user wrote it
    config = json.loads((new.directory / bundle.EXIT_CONFIG).read_text())
    config["certificate"]["setting"]["engines_sha256"] = new.files.engines_sha256
    write_config(new.directory, json.dumps(config, indent=1) + "\n")
    return True
