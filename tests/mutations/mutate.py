"""One change to a bundle, drawn at random: by bytes, by file, or by what a field means."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

MANIFEST = "bundle.json"

# where tokens may exit is free: it changes what is asked for, not what is computed
FREE = "/exit_layers"

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 64, 0.5, 1e308),
    *("", ".", "..", "/", "/etc/passwd", "../outside/secret", "onnx/../../outside/secret"),
    *(
        "/dev/zero",
        "onnx/embed.onnx",
        "onnx/contexts.onnx",
        "onnx/layer_000.onnx",
        "onnx/kv_001.onnx",
        "bundle.json",
    ),
    *("\0", "\u202e", "x" * 4096, [], {}, [[]], [1, 2], {"heads": 1}, [-1, 0], ["context_0"] * 9),
)


@dataclass(frozen=True)
class Mutation:
    """What was done. sealed: the digests fit again; forged: they vouch for other weights, text or
    arithmetic, which only a signature could tell from the author's own."""

    what: str
    sealed: bool = False
    forged: bool = False


def mutate(bundle: Path, outside: Path, draw: random.Random) -> Mutation:
    """Change the bundle in place, files replaced and never written to."""
    return draw.choice(_WAYS)(bundle, outside, draw)


def bring(source: Path, target: Path) -> None:
    """A copy of the bundle whose files are hard links."""
    shutil.copytree(source, target, copy_function=os.link)


def _any_file(bundle: Path, draw: random.Random) -> Path:
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    return draw.choice(files)


def _replace(path: Path, contents: bytes) -> None:
    path.unlink()
    path.write_bytes(contents)


def _flip(bundle: Path, _: Path, draw: random.Random) -> Mutation:
    path = _any_file(bundle, draw)
    contents = _flipped(path.read_bytes(), draw)
    _replace(path, contents)
    return Mutation(f"flip bytes of {path.relative_to(bundle)}")


def _flipped(contents: bytes, draw: random.Random) -> bytes:
    changed = bytearray(contents)
    for _ in range(draw.choice((1, 1, 2, 16))):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _resize(bundle: Path, _: Path, draw: random.Random) -> Mutation:
    path = _any_file(bundle, draw)
    contents = path.read_bytes()
    cut = contents[: draw.randrange(len(contents) + 1)]
    _replace(path, draw.choice((cut, contents + b"\0", b"", contents + contents[:4096])))
    return Mutation(f"resize {path.relative_to(bundle)}")


def _swap_kind(bundle: Path, outside: Path, draw: random.Random) -> Mutation:
    """Put something else in a file's place: a link, a pipe, a directory, nothing."""
    path = _any_file(bundle, draw)
    name = path.relative_to(bundle)
    twin = outside / "twin"
    shutil.copy(path, twin)
    path.unlink()
    kind = draw.choice(("copy outside", "secret", "device", "circle", "pipe", "directory", "gone"))
    links = {
        "copy outside": twin,
        "secret": Path(os.path.relpath(outside / "secret", path.parent)),
        "device": Path("/dev/zero"),
        "circle": Path(path.name),
    }
    if kind in links:
        path.symlink_to(links[kind])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    return Mutation(f"{kind} in place of {name}")


def _swap_files(bundle: Path, _: Path, draw: random.Random) -> Mutation:
    one, other = _any_file(bundle, draw), _any_file(bundle, draw)
    first, second = one.read_bytes(), other.read_bytes()
    _replace(one, second)
    if one != other:
        _replace(other, first)
    return Mutation(f"{one.relative_to(bundle)} and {other.relative_to(bundle)} change places")


def _change_manifest(bundle: Path, _: Path, draw: random.Random) -> Mutation:
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    places = [p for p in _pointers(manifest, "") if not p.startswith(("/files/", FREE))]
    place = draw.choice(places)
    what = _change_value(manifest, place, draw)
    return _seal(bundle, manifest, f"bundle.json {place}: {what}")


def _change_file_entry(bundle: Path, _: Path, draw: random.Random) -> Mutation:
    """A file under another name, size or digest, or one more that is none of the bundle's."""
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    files = manifest["files"]
    name = draw.choice(sorted(files))
    new = draw.choice([value for value in VALUES if isinstance(value, str)])
    what = draw.choice(("rename", "add", "drop", "bytes", "sha256"))
    if what == "rename":
        files[new] = files.pop(name)
    elif what == "add":
        files[new] = files[name]
    elif what == "drop":
        del files[name]
    else:
        files[name][what] = draw.choice(VALUES)
    return _seal(bundle, manifest, f"{what} {name} in files ({new!r})")


def _change_json(bundle: Path, _: Path, draw: random.Random) -> Mutation:
    """A tokenizer or its configuration with another value in it, and the digests to it."""
    names = [n for n in ("tokenizer.json", "tokenizer_config.json") if (bundle / n).exists()]
    name = draw.choice(names)
    value = json.loads((bundle / name).read_bytes())
    places = _pointers(value, "")
    # few of many thousand places are in the vocabulary's outline
    short = [place for place in places if place.count("/") < 4] or places
    place = draw.choice(draw.choice((short, places)))
    what = _change_value(value, place, draw)
    _replace(bundle / name, json.dumps(value).encode())
    return _enter(bundle, name, f"{name} {place}: {what}", forged=True)


def _change_template(bundle: Path, _: Path, draw: random.Random) -> Mutation:
    name = "chat_template.jinja"
    template = draw.choice(
        (
            "{% for i in range(10**9) %}x{% endfor %}",
            "{{ 'a' * 10**10 }}",
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "{{ messages.__class__.__mro__ }}",
            "{% include '/etc/passwd' %}",
            "{{ raise_exception('no') }}",
            "{{ (1).__add__(1) }}{{ 9**9**9 }}",
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{{",
            "{{ messages | tojson(indent=10**9) }}",
            "{{ '%1000000000d' | format(1) }}",
            _flipped((bundle / name).read_bytes(), draw).decode("utf-8", "replace"),
        )
    )
    _replace(bundle / name, template.encode())
    return _enter(bundle, name, f"template {template[:40]!r}", forged=True)


def _reseal_bytes(bundle: Path, _: Path, draw: random.Random) -> Mutation:
    """Flipped bytes of any file, with digests that fit them."""
    names = [name for name in _listed(bundle) if not name.endswith(".data")]
    name = draw.choice(names)
    _replace(bundle / name, _flipped((bundle / name).read_bytes(), draw))
    return _enter(bundle, name, f"flip bytes of {name}", forged=True)


def _change_graph(bundle: Path, _: Path, draw: random.Random) -> Mutation:
    """A graph that takes, gives or stores something else, and the digests to it."""
    name = draw.choice([name for name in _listed(bundle) if name.endswith(".onnx")])
    model = onnx.load(bundle / name, load_external_data=False)
    change, forged = draw.choice(_GRAPH_CHANGES)
    what = change(model.graph, draw)
    _replace(bundle / name, model.SerializeToString())
    return _enter(bundle, name, f"{name}: {what}", forged=forged)


def _rename_graph(graph: onnx.GraphProto, draw: random.Random) -> str:
    graph.name = draw.choice(
        ("", "embed", "contexts", "layer_000", "layer_001", "kv_000", "head", "monolith")
    )
    return f"called {graph.name}"


def _change_axis(graph: onnx.GraphProto, draw: random.Random) -> str:
    value = draw.choice([*graph.input, *graph.output])
    axes = value.type.tensor_type.shape.dim
    if axes:
        draw.choice(axes).dim_value = draw.choice((-1, 0, 1, 3, 1 << 40))
    return f"an axis of {value.name}"


def _change_type(graph: onnx.GraphProto, draw: random.Random) -> str:
    value = draw.choice([*graph.input, *graph.output])
    value.type.tensor_type.elem_type = draw.randrange(24)
    return f"the type of {value.name}"


def _rename_value(graph: onnx.GraphProto, draw: random.Random) -> str:
    value = draw.choice([*graph.input, *graph.output])
    old, value.name = value.name, draw.choice(("", "x", "y", "logits", "risk"))
    return f"{old} called {value.name}"


def _change_place(graph: onnx.GraphProto, draw: random.Random) -> str:
    """Weights from elsewhere: of another file they are others, and nothing here can tell."""
    places = [entry for tensor in graph.initializer for entry in tensor.external_data]
    if not places:
        return "no weights"
    entry = draw.choice(places)
    strings = [value for value in VALUES if isinstance(value, str) and "\0" not in value]
    entry.value = draw.choice((*strings, "-1", "0x10", str(1 << 63), str(1 << 64), "4095"))
    return f"{entry.key} {entry.value[:40]}"


def _change_stored(graph: onnx.GraphProto, draw: random.Random) -> str:
    if not graph.initializer:
        return "no weights"
    tensor = draw.choice(graph.initializer)
    if draw.random() < 0.5:
        tensor.data_type = draw.randrange(30)
        return f"the type of {tensor.name}"
    del tensor.dims[:]
    tensor.dims.extend(draw.choices((-1, 0, 1, 16, 1 << 20, 1 << 40, 1 << 62), k=2))
    return f"the shape of {tensor.name}"


def _change_node(graph: onnx.GraphProto, draw: random.Random) -> str:
    if not graph.node:
        return "no nodes"
    index = draw.randrange(len(graph.node))
    node = graph.node[index]
    kind = draw.choice(("drop", "operator", "attribute", "input"))
    if kind == "drop":
        del graph.node[index]
    elif kind == "operator":
        node.op_type = draw.choice(("Identity", "Loop", "Nothing", "GroupQueryAttention", "If"))
    elif kind == "attribute" and node.attribute:
        draw.choice(node.attribute).i = draw.choice((-1, 0, 1 << 31, 1 << 40))
    elif node.input:
        node.input[draw.randrange(len(node.input))] = draw.choice(("", "x", "nothing"))
    return f"{kind} of a {node.op_type} node"


_GRAPH_CHANGES: tuple[tuple[Callable[[onnx.GraphProto, random.Random], str], bool], ...] = (
    (_rename_graph, False),
    (_change_axis, False),
    (_change_type, False),
    (_rename_value, False),
    (_change_place, True),
    (_change_stored, True),
    (_change_node, True),
)


def _change_value(root: Any, place: str, draw: random.Random) -> str:
    """Replace, remove or double the value at `place` of `root`."""
    *path, last = place.split("/")[1:]
    parent = root
    for key in path:
        parent = parent[int(key)] if isinstance(parent, list) else parent[_unescaped(key)]
    key: Any = int(last) if isinstance(parent, list) else _unescaped(last)
    if draw.random() < 0.15:
        del parent[key]
        return "removed"
    value = draw.choice(VALUES)
    if isinstance(parent[key], int) and draw.random() < 0.3:
        value = parent[key] + draw.choice((-1, 1, 2))
    parent[key] = value
    return repr(value)[:60]


def _pointers(value: Any, at: str) -> list[str]:
    """Pointers to all values below `value`."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = [(key.replace("~", "~0").replace("/", "~1"), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        items = list(enumerate(value))
    found = []
    for key, inner in items:
        found += [f"{at}/{key}", *_pointers(inner, f"{at}/{key}")]
    return found


def _unescaped(key: str) -> str:
    return key.replace("~1", "/").replace("~0", "~")


def _listed(bundle: Path) -> list[str]:
    return sorted(json.loads((bundle / MANIFEST).read_bytes())["files"])


def _enter(bundle: Path, name: str, what: str, forged: bool) -> Mutation:
    """Give the manifest the size and digest that the file `name` has now."""
    contents = (bundle / name).read_bytes()
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    digest = hashlib.sha256(contents).hexdigest()
    manifest["files"][name] = {"bytes": len(contents), "sha256": digest}
    return _seal(bundle, manifest, what, forged)


def _seal(bundle: Path, manifest: Any, what: str, forged: bool = False) -> Mutation:
    text = json.dumps(manifest).encode()
    _replace(bundle / MANIFEST, text)
    line = f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n"
    _replace(bundle / "bundle.sha256", line.encode())
    return Mutation(what, sealed=True, forged=forged)


_WAYS = (
    _flip,
    _resize,
    _swap_kind,
    _swap_files,
    _change_manifest,
    _change_manifest,
    _change_file_entry,
    _change_json,
    _change_template,
    _reseal_bytes,
    _change_graph,
    _change_graph,
)
