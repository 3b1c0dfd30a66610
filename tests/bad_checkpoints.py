"""Checkpoints and exports that are damaged, or crafted with right checksums: a name, the damage, what is said of it."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

RANK, SHARD = "rank_00000.safetensors", "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], Any]


def sign(folder: Path, *more: str) -> None:
    """A manifest of what is there, with right checksums: as whoever crafts a checkpoint would write it."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.name != "MANIFEST.json"]
    files = {p.name: {"size": p.stat().st_size, "xxh3_128": xxhash.xxh3_128_hexdigest(p.read_bytes())} for p in paths}
    for name in more:
        files[name] = {"size": os.stat(folder / name).st_size, "xxh3_128": "0"}
    (folder / "MANIFEST.json").write_text(json.dumps({"files": files}))


def edit(name: str, change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    """Change a JSON file of a folder, or replace it by what `change` returns."""
    content = json.loads((folder / name).read_text())
    result = change(content)
    (folder / name).write_text(result if isinstance(result, str) else json.dumps(content))
    if name != "MANIFEST.json":
        sign(folder)


def header(name: str, change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    """Change the header of a safetensors file, or replace it by what `change` returns."""
    content = (folder / name).read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:length])
    result = change(entries)
    text = (result if isinstance(result, str) else json.dumps(entries)).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + content[length:])
    sign(folder)


def link(name: str, target: str, folder: Path) -> None:
    """Put a link in place of a file whose size and checksum stay right."""
    outside = folder.parent / "outside"
    if target == "outside":
        outside.write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(outside if target == "outside" else target)


def fifo(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def pickled(name: str, folder: Path) -> None:
    (folder / name).write_bytes(pickle.dumps({"weight": os.getcwd}))
    sign(folder)


def places(change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    def body(entries: dict[str, Any]) -> None:
        found = json.loads(entries["__metadata__"]["places"])
        result = change(found)
        entries["__metadata__"]["places"] = result if isinstance(result, str) else json.dumps(found)

    header(RANK, body, folder)


def first(entries: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = entries[next(name for name in entries if name != "__metadata__")]
    return found


def add_name(name: str, folder: Path) -> None:
    edit("MANIFEST.json", lambda c: c["files"].update({name: {"size": 0, "xxh3_128": ""}}), folder)


def overlap(entries: dict[str, Any]) -> None:
    entries["weight/out.weight"]["data_offsets"] = entries["ema/out.weight"]["data_offsets"]


def as_bytes(entries: dict[str, Any]) -> None:
    first(entries).update(dtype="U8", shape=[first(entries)["data_offsets"][1]])


def of(name: str) -> Callable[[Callable[[dict[str, Any]], Any]], Damage]:
    """Damage of one JSON file, by what changes its content."""
    return lambda change: partial(edit, name, change)


in_manifest, in_state, in_index, in_config = map(of, ("MANIFEST.json", "state.json", INDEX, "config.json"))


def in_header(change: Callable[[dict[str, Any]], Any], name: str = RANK) -> Damage:
    return partial(header, name, change)


def in_places(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return partial(places, change)


NOT_PLAIN = "is not a plain file of this folder"
MANIFEST_NAMES = ("/dev/zero", "../../x", "/etc/passwd", "a/b", "..", ".", "", "x\ny", "a\0b")
BAD: list[tuple[str, Damage, str]] = [
    *(
        (f"manifest names {name!r}", lambda f, name=name: add_name(name, f), "MANIFEST.json is damaged: files.")
        for name in MANIFEST_NAMES
    ),
    ("manifest a list", in_manifest(lambda c: "[]"), "MANIFEST.json is damaged: Input should be"),
    ("manifest deep", in_manifest(lambda c: "[" * 10_000), "MANIFEST.json is damaged: Invalid JSON: "),
    ("manifest of words", in_manifest(lambda c: c["files"][RANK].update(size="9")), "size: Input should be"),
    ("manifest a device", lambda f: link("MANIFEST.json", "/dev/zero", f), f"MANIFEST.json {NOT_PLAIN}"),
    ("manifest a pipe", partial(fifo, "MANIFEST.json"), f"MANIFEST.json {NOT_PLAIN}"),
    ("state a device", lambda f: link("state.json", "/dev/zero", f), f"state.json {NOT_PLAIN}"),
    ("state a pipe", partial(fifo, "state.json"), f"state.json {NOT_PLAIN}"),
    ("state elsewhere", lambda f: link("state.json", "outside", f), f"state.json {NOT_PLAIN}"),
    ("rank file elsewhere", lambda f: link(RANK, "outside", f), f"{RANK} {NOT_PLAIN}"),
    ("link to itself", lambda f: link(RANK, RANK, f), f"{RANK} cannot be read: Too many levels of symbolic links"),
    ("rank file a folder", lambda f: ((f / RANK).unlink(), (f / RANK).mkdir()), f"{RANK} is not a plain file"),
    ("no rank file", lambda f: ((f / RANK).unlink(), sign(f)), "holds no rank_*.safetensors file"),
    ("pickle", partial(pickled, RANK), f"{RANK} is damaged: it is no safetensors file"),
    ("state a list", in_state(lambda c: "[1]"), "state.json is damaged: Input should be an object"),
    ("state deep", in_state(lambda c: '{"a":' + "[" * 10_000), "state.json is damaged: Invalid"),
    ("state without data", in_state(lambda c: c.pop("data")), "state.json is damaged: data: Field"),
    ("step a word", in_state(lambda c: c.update(step="10")), "state.json is damaged: step: "),
    ("position below 0", in_state(lambda c: c["data"].update(consumed=-1)), "state.json is damaged: data"),
    ("no channels", in_state(lambda c: c["data_info"].update(channels=-4)), "state.json is damaged: data_info: Value"),
    ("no means", in_state(lambda c: c["data_info"].update(mean=[])), "state.json is damaged: data_info: Value error"),
    ("topology a list", in_state(lambda c: c.update(topology=[1])), "state.json is damaged: topology: "),
    ("config a list", in_state(lambda c: c.update(config=[])), "state.json is damaged: config: "),
    ("saved never", in_state(lambda c: c.update(saved_at="x")), "state.json is damaged: saved_at"),
    ("format a list", in_state(lambda c: c.update(format=[3])), "has checkpoint format [3], this"),
    ("shape below 0", in_state(lambda c: c["parameters"][0].update(shape=[-6, 5])), "parameters.0.shape.0"),
    ("header a string", in_header(lambda c: '"words"'), f"{RANK} is damaged: its header is damaged"),
    ("header deep", in_header(lambda c: '{"a":' * 10_000 + "1" + "}" * 10_000), "its header is damaged"),
    ("metadata a list", in_header(lambda c: c.update(__metadata__=[["places", "{}"]])), "its header is damaged"),
    ("metadata of numbers", in_header(lambda c: c["__metadata__"].update(a=1)), "its header is damaged"),
    ("offsets below 0", in_header(lambda c: first(c).update(data_offsets=[-120, 0])), "its header is damaged"),
    ("overlap", in_header(overlap), "its header is damaged"),
    ("offsets of words", in_header(lambda c: first(c).update(data_offsets=["0", "120"])), "its header is damaged"),
    ("shape of true", in_header(lambda c: c["weight/scale"].update(shape=[True])), "its header is damaged"),
    ("other dtype", in_header(lambda c: first(c).update(dtype="I32")), "has dtype I32 instead of F32"),
    ("bytes as weights", in_header(as_bytes), "has dtype U8 instead of F32"),
    ("unknown dtype", in_header(lambda c: first(c).update(dtype="Q4")), "its header is damaged"),
    ("places a list", in_places(lambda c: "[]"), f"{RANK} is damaged: in its places Input should be"),
    ("places broken", in_places(lambda c: "{"), f"{RANK} is damaged: in its places Invalid JSON"),
    ("place below 0", in_places(lambda c: c.update(scale=[-1, [1]])), "in its places scale.0: "),
    ("place outside", in_places(lambda c: c.update(scale=[1, [1]])), "elements 1 to 2 of scale of shape (1,)"),
    ("place of words", in_places(lambda c: c.update(scale="01")), f"{RANK} is damaged: in its places scale"),
    ("place missing", in_places(lambda c: c.pop("scale")), "it does not say where scale belongs"),
    ("huge shape", in_places(lambda c: c.update(scale=[0, [10**18, 10**18]])), "1 elements of weight scale are"),
]  # fmt: skip
BAD_EXPORTS: list[tuple[str, Damage, str]] = [
    ("index out of it", in_index(lambda c: c["weight_map"].update(scale="../x")), f"{INDEX} is damaged: weight_"),
    ("index absolute", in_index(lambda c: c["weight_map"].update(scale="/dev/zero")), f"{INDEX} is damaged: "),
    ("index of unverified", in_index(lambda c: c["weight_map"].update(scale="x")), f"{INDEX} is damaged: x is not in"),
    ("index a list", in_index(lambda c: "[]"), f"{INDEX} is damaged: Input should be an object"),
    ("index without map", in_index(lambda c: "{}"), f"{INDEX} is damaged: weight_map: Field required"),
    ("index names another", in_index(lambda c: c["weight_map"].update(x=SHARD)), f"{SHARD} is damaged: it has no x"),
    ("shard elsewhere", lambda f: link(SHARD, "outside", f), f"{SHARD} {NOT_PLAIN}"),
    ("shard of bytes", partial(header, SHARD, lambda c: first(c).update(dtype="F16")), "is not stored as BF16 or F32"),
    ("shard a pickle", partial(pickled, SHARD), f"{SHARD} is damaged: it is no safetensors file"),
    ("config a list", in_config(lambda c: "[]"), "config.json is damaged: Input should be an object"),
    ("config without data", in_config(lambda c: c.pop("data_info")), "config.json is damaged: data_info: "),
    ("config of int8", in_config(lambda c: c.update(dtype="int8")), "config.json is damaged: dtype: Input"),
    ("format of words", in_config(lambda c: c.update(format="2")), "has export format '2', this version"),
]  # fmt: skip
