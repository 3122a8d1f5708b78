"""Files of head patches: what is torn, foreign or hostile is refused with its name; saves leave old or new."""

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import alps_kernels as alps
from alps_kernels import HeadPatch, apply_patch, save_patch
from alps_kernels.patching.checkpoint import SparseUpdate

from .cases import build, pick, same_bytes, snapshot, tune

KEY = "alps_kernels.patch"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A base and the bytes of a patch of it."""
    path = tmp_path_factory.mktemp("patch") / "p.safetensors"
    base = build(dtype=torch.bfloat16)
    save_patch(tune(base, pick(base)), path, base=base, provenance={"why": "a test"})
    return base, path.read_bytes()


def split(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + size]), data[8 + size:]


def joined(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def with_document(change):
    """An edit of the document in the header."""
    def edit(data):
        header, body = split(data)
        document = json.loads(header["__metadata__"][KEY])
        changed = change(document)
        text = json.dumps(document) if changed is None else changed if isinstance(changed, str) else json.dumps(changed)
        header["__metadata__"][KEY] = text
        return joined(header, body)
    return edit


def with_header(change):
    def edit(data):
        header, body = split(data)
        return joined(change(header) or header, body)
    return edit


def drop(held, key):
    del held[key]


def tensor(**changes):
    return with_document(lambda d: d["tensors"][Q].update(changes))


def moved_name(old, new, whole=True):
    """Rename a tensor in the header, and (whole) wherever the document speaks of it."""
    def edit(data):
        header, body = split(data)
        if whole:
            header["__metadata__"][KEY] = header["__metadata__"][KEY].replace(json.dumps(old), json.dumps(new))
        header[new] = header.pop(old)
        return joined(header, body)
    return edit


def flipped(at):
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]


# Each: an edit of the file, and what the message must say.
HOSTILE = {
    "empty": (lambda d: b"", "not a valid"),
    "seven bytes": (lambda d: d[:7], "not a valid"),
    "no header": (lambda d: d[:8], "not a valid"),
    "half a header": (lambda d: d[:300], "not a valid"),
    "half the values": (lambda d: d[:-500], "not a valid"),
    "one byte short": (lambda d: d[:-1], "not a valid"),
    "one byte more": (lambda d: d + b"\0", "not a valid"),
    "text": (lambda d: b"a patch, honestly" * 9, "not a valid"),
    "a pickle": (lambda d: b"\x80\x04cos\nsystem\n(S'true'\ntR.", "not a valid"),
    "a zip": (lambda d: b"PK\x03\x04" + d, "not a valid"),
    "huge header length": (lambda d: struct.pack("<Q", 2**63) + d[8:], "not a valid"),
    "header longer than the file": (lambda d: struct.pack("<Q", len(d)) + d[8:], "not a valid"),
    "header of 200 MB said": (lambda d: struct.pack("<Q", 200 * 2**20) + d[8:], "not a valid"),
    "header not JSON": (lambda d: joined(b"{" * 64, split(d)[1]), "not a valid"),
    "header deeply nested": (lambda d: joined(b"[" * 100_000, split(d)[1]), "not a valid"),
    "header a list": (lambda d: joined([], split(d)[1]), "not a valid"),
    "header not UTF-8": (lambda d: joined(b'{"\xff": 1}', split(d)[1]), "not a valid"),
    "overlapping offsets": (with_header(lambda h: h[Q].update(data_offsets=[2, h[Q]["data_offsets"][1] + 2])), "not a valid"),
    "offsets backwards": (with_header(lambda h: h[Q].update(data_offsets=h[Q]["data_offsets"][::-1])), "not a valid"),
    "offsets past the end": (with_header(lambda h: h[Q].update(data_offsets=[0, 10**9])), "not a valid"),
    "negative offsets": (with_header(lambda h: h[Q].update(data_offsets=[-8, 8])), "not a valid"),
    "unknown dtype": (with_header(lambda h: h[Q].update(dtype="F63")), "not a valid"),
    "shape that does not fill": (with_header(lambda h: h[Q].update(shape=[1, 1])), "not a valid"),
    "shape whose size overflows": (with_header(lambda h: h[Q].update(shape=[2**62, 2**62])), "not a valid"),
    "same size, other shape": (with_header(lambda h: h[Q].update(shape=h[Q]["shape"][::-1])), r"q_proj.weight has shape .* its ranges make it"),
    "same size, other dtype": (with_header(lambda h: h[Q].update(dtype="F16")), "q_proj.weight is float16; its header says bfloat16"),
    "no metadata": (with_header(lambda h: {k: v for k, v in h.items() if k != "__metadata__"}), "does not say that it is one"),
    "metadata of another": (with_header(lambda h: h.update(__metadata__={"format": "pt"})), "does not say that it is one"),
    "metadata not text": (with_header(lambda h: h.update(__metadata__={KEY: 3})), "not a valid"),
    "document not JSON": (with_document(lambda d: "{"), "not a valid"),
    "document NaN": (with_document(lambda d: json.dumps(d).replace('"version": 1', '"version": NaN')), "NaN is not a number JSON allows"),
    "document Infinity": (with_document(lambda d: json.dumps(d).replace('"dim": 0', '"dim": Infinity')), "Infinity is not a number"),
    "document deeply nested": (with_document(lambda d: "[" * 100_000), "not a valid"),
    "document a list": (with_document(lambda d: [d]), "format is another"),
    "document with a key twice": (with_document(lambda d: json.dumps(d).replace('"version": 1', '"version": 1, "version": 1')), "given twice"),
    "huge number": (with_document(lambda d: json.dumps(d).replace('"dim": 0', '"dim": 1' + "0" * 5000)), "not a valid"),
    "other format": (with_document(lambda d: d.update(format="alps_kernels.sparse")), "format is another"),
    "version 2": (with_document(lambda d: d.update(version=2)), "schema version 2"),
    "version true": (with_document(lambda d: d.update(version=True)), "schema version True"),
    "no tensors": (with_document(lambda d: drop(d, "tensors")), "lists no tensors"),
    "tensors a list": (with_document(lambda d: d.update(tensors=[])), "lists no tensors"),
    "a tensor missing": (with_header(lambda h: h["__metadata__"].update({KEY: h["__metadata__"][KEY].replace(Q, Q + "2")})), "q_proj.weight"),
    "a tensor unlisted": (with_document(lambda d: drop(d["tensors"], Q)), "q_proj.weight', which its header does not list"),
    "an entry null": (with_document(lambda d: d["tensors"].update({Q: None})), "its entry is not an object"),
    "dim 2": (tensor(dim=2), "dim is 2"),
    "dim true": (tensor(dim=True), "dim is True"),
    "dim 1": (tensor(dim=1), "q_proj.weight has shape"),
    "ranges none": (tensor(ranges=None), "ranges is not a list"),
    "ranges empty": (tensor(ranges=[]), "do not cut"),
    "ranges backwards": (tensor(ranges=[[16, 8]]), "do not cut"),
    "ranges overlapping": (tensor(ranges=[[8, 14], [12, 16]]), "do not cut"),
    "ranges unsorted": (tensor(ranges=[[12, 16], [8, 11]]), "do not cut"),
    "ranges adjacent": (tensor(ranges=[[8, 12], [12, 16]]), "do not cut"),
    "ranges negative": (tensor(ranges=[[-8, 0]]), "do not cut"),
    "ranges past the end": (tensor(ranges=[[28, 36]]), "do not cut"),
    "ranges of floats": (tensor(ranges=[[8.0, 16.0]]), "ranges is not a list"),
    "ranges of booleans": (tensor(ranges=[[False, True]]), "ranges is not a list"),
    "ranges too few": (tensor(ranges=[[8, 12]]), "its ranges make it"),
    "ranges of strings": (tensor(ranges=["ab"]), "ranges is not a list"),
    "shape negative": (tensor(shape=[-32, 24]), "expected a list of sizes"),
    "shape of floats": (tensor(shape=[32.0, 24]), "expected a list of sizes"),
    "shape endless": (tensor(shape=[2**60, 24]), "expected a list of sizes"),
    "shape of many axes": (tensor(shape=[1] * 99), "expected a list of sizes"),
    "shape of another": (tensor(shape=[40, 24]), r"bfloat16 \[40, 24\] where it is cut, bfloat16 \[32, 24\] in the base"),
    "dtype of no kind": (tensor(dtype="nn"), "dtype is 'nn'"),
    "dtype dunder": (tensor(dtype="__doc__"), "dtype is"),
    "dtype a list": (tensor(dtype=["bfloat16"]), "dtype is"),
    "digest wrong": (tensor(values="0" * 64), "are not those that were written"),
    "digest missing": (with_document(lambda d: drop(d["tensors"][Q], "values")), "are not those that were written"),
    "base digest not hex": (tensor(base="g" * 64), "not a SHA-256 digest"),
    "base digest of one": (with_document(lambda d: drop(d["tensors"][Q], "base")), "digests of the base for"),
    "base digest changed": (tensor(base="0" * 64), "base_fingerprint is not that"),
    "a value changed": (lambda d: flipped(len(d) - 3)(d), "are not those that were written"),
    "selection missing": (with_document(lambda d: drop(d, "selection")), "not a valid head selection"),
    "selection a list": (with_document(lambda d: d.update(selection=[])), "not a valid head selection"),
    "selection out of range": (with_document(lambda d: d["selection"]["heads"].append([9, 0])), r"head \(9, 0\)"),
    "selection with a head twice": (with_document(lambda d: d["selection"]["heads"].append([0, 1])), "given twice"),
    "selection of strings": (with_document(lambda d: d["selection"].update(heads=["01"])), "not a valid head selection"),
    "outside missing": (with_document(lambda d: drop(d, "outside")), "does not describe the base"),
    "outside a list": (with_document(lambda d: d.update(outside=[])), "does not describe the base"),
    "outside entry": (with_document(lambda d: d["outside"].update({Q: [1]})), "not shape, dtype and digest"),
    "outside digest": (with_document(lambda d: d["outside"][Q].__setitem__(2, "zz")), "not a SHA-256 digest"),
    "outside without the cut": (with_document(lambda d: drop(d["outside"], Q)), "not in the base"),
    "outside changed": (with_document(lambda d: d["outside"]["lm_head.weight"].__setitem__(2, "0" * 64)), "fingerprint is not that"),
    "outside with more": (with_document(lambda d: d["outside"].update(x=[[1], "float32", "0" * 64])), "fingerprint is not that"),
    "fingerprint": (with_document(lambda d: d.update(fingerprint="0" * 64)), "its fingerprint is not that"),
    "architecture": (with_document(lambda d: d.update(architecture=None)), "its architecture is None"),
    "provenance": (with_document(lambda d: d.update(provenance=[1])), "provenance is not an object"),
    "a name that climbs, unlisted": (moved_name(Q, "../../etc/passwd", whole=False), "'../../etc/passwd', which its header does not list"),
}


@pytest.mark.fault("Bad input")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(good, case, tmp_path):
    """patch files that are torn, foreign or contradict themselves: refused by file and reason, nothing changed"""
    base, data = good
    edit, message = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(edit(data))
    assert path.read_bytes() != data
    before = snapshot(base)
    with pytest.raises(ValueError, match=message) as refused:
        apply_patch(base, path)
    assert str(path) in str(refused.value) and same_bytes(base, before)
    with pytest.raises(ValueError, match="hostile.safetensors"):
        HeadPatch.load(path)


def self_consistent(data, change):
    """A file that holds together, with something else in it: what a careful stranger would send."""
    header, body = split(data)
    document = json.loads(header["__metadata__"][KEY])
    change(header, document, body)
    rows = sorted([name, *entry] for name, entry in document["outside"].items())
    document["fingerprint"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    whole = {name: entry["base"] for name, entry in document["tensors"].items()}
    rows = [[name, shape, dtype, whole.get(name, digest)] for name, shape, dtype, digest in rows]
    document["base_fingerprint"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    header["__metadata__"][KEY] = json.dumps(document)
    return joined(header, body)


def renamed(new):
    def change(header, document, body):
        header[new] = header.pop(Q)
        for held in (document["tensors"], document["outside"]):
            held[new] = held.pop(Q)
    return change


CAREFUL = {
    "a name that climbs": (renamed("../../../etc/passwd"), "../../../etc/passwd is a parameter of the base only"),
    "a name of a class": (renamed("__class__.x"), "__class__.x is a parameter of the base only"),
    "empty name": (renamed(""), "is a parameter of the base only"),
    "rows of another head": (lambda h, d, b: d["tensors"][Q].update(ranges=[[0, 8]]), r"its heads rows \[\[8, 16\]\] of .*q_proj.weight here, and it holds rows \[\[0, 8\]\]"),
    "another head": (lambda h, d, b: d["selection"].update(heads=[[0, 2], [1, 0], [1, 3]]), "its heads rows"),
    "fewer heads": (lambda h, d, b: d["selection"].update(heads=[[1, 0], [1, 3]]), r"its heads nothing of .*layers.0.*here, and it holds"),
    "other parts": (lambda h, d, b: d["selection"].update(parts=["q"]), "its heads nothing of"),
    "other widths": (lambda h, d, b: d["selection"].update(heads_per_layer=[4, 5], summary=None), "its selection is of 9 heads, this model has 8"),
    "another model type": (lambda h, d, b: d.update(model_type="gpt2"), "it is of a gpt2"),
    "a parameter more": (lambda h, d, b: d["outside"].update(x=[[1], "float32", "0" * 64]), "x is a parameter of the base only"),
    "a parameter less": (lambda h, d, b: drop(d["outside"], "model.norm.weight"), "model.norm.weight is a parameter of this model only"),
    "a digest of the base": (lambda h, d, b: d["outside"]["model.norm.weight"].__setitem__(2, "0" * 64), "model.norm.weight is not the base's"),
    "another shape of the base": (lambda h, d, b: d["outside"]["model.norm.weight"].__setitem__(0, [25]), r"\[25\] there"),
    "another dtype of the base": (lambda h, d, b: d["outside"]["model.norm.weight"].__setitem__(1, "float16"), "is float16 .* there and bfloat16"),
}


@pytest.mark.fault("Bad input")
@pytest.mark.parametrize("case", CAREFUL)
def test_careful_strangers(good, case, tmp_path):
    """patch files that hold together and are not of this model: refused by name, nothing changed"""
    base, data = good
    change, message = CAREFUL[case]
    path = tmp_path / "careful.safetensors"
    path.write_bytes(self_consistent(data, change))
    HeadPatch.load(path)
    before = snapshot(base)
    with pytest.raises(ValueError, match=message) as refused:
        apply_patch(base, path)
    assert "careful" in str(refused.value) and same_bytes(base, before)


def test_the_careful_stranger_changes_nothing_else(good, tmp_path):
    base, data = good
    path = tmp_path / "p.safetensors"
    path.write_bytes(self_consistent(data, lambda h, d, b: None))
    assert apply_patch(build(dtype=torch.bfloat16), path) == ("p",)


@pytest.mark.fault("Fuzz")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.data())
def test_damaged_bytes_never_get_in(good, tmp_path, data):
    """random bytes overwritten anywhere in a patch file: refused, or the slices are those that were written"""
    base, whole = good
    at = data.draw(st.integers(0, len(whole) - 1))
    piece = data.draw(st.binary(min_size=1, max_size=9))
    damaged = whole[:at] + piece + whole[at + len(piece):]
    path = tmp_path / "p.safetensors"
    path.write_bytes(damaged)
    before = snapshot(base)
    try:
        loaded = HeadPatch.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:  # the damage is in what nothing depends on: the slices are the ones that were written
        (tmp_path / "good.safetensors").write_bytes(whole)
        good_patch = HeadPatch.load(tmp_path / "good.safetensors")
        assert loaded.cuts == good_patch.cuts and all(
            torch.equal(loaded.values[name].view(torch.int16), value.view(torch.int16)) for name, value in good_patch.values.items())
    assert same_bytes(base, before)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["float32", Q, "0" * 64]),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


def places(node, at=()):
    """The path of every node of a JSON document."""
    yield at
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(child, (*at, key))


def with_node(node, at, value):
    if not at:
        return value
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[at[0]] = with_node(node[at[0]], at[1:], value)
    return copy


@pytest.mark.fault("Fuzz")
@pytest.mark.parametrize("where", ["document", "header", "sparse"])
def test_any_node_of_the_json_may_be_anything(good, where, tmp_path):
    """any node of a patch's or a sparse update's header replaced by any JSON: refused by the file's name, or harmless"""
    base, whole = good
    before, path = snapshot(base), tmp_path / "p.safetensors"
    if where == "sparse":
        (tmp_path / "g.safetensors").write_bytes(whole)
        loaded = HeadPatch.load(tmp_path / "g.safetensors")
        SparseUpdate(loaded.cuts, loaded.values, loaded.base, {"patches": []}).save(path)
        whole = path.read_bytes()
    key = "alps_kernels.sparse" if where == "sparse" else KEY
    header, body = split(whole)
    tree = header if where == "header" else json.loads(header["__metadata__"][key])
    spots = list(places(tree))

    @settings(max_examples=250, deadline=None, derandomize=True)
    @given(st.sampled_from(spots), JSON)
    def try_one(at, value):
        changed = with_node(tree, at, value)
        if where == "header":
            data = joined(changed, body)
        else:
            data = joined({**header, "__metadata__": {key: json.dumps(changed)}}, body)
        path.write_bytes(data)
        try:
            if where == "sparse":
                SparseUpdate.load(path)
            else:
                apply_patch(base, path)
                assert alps.revert_patch(base) == ()
        except ValueError as error:
            assert "p.safetensors" in str(error) or "'p'" in str(error)
        assert same_bytes(base, before)

    try_one()


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        HeadPatch.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="is not a file"):
        HeadPatch.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a file"):
        HeadPatch.load(tmp_path / "pipe")
    with pytest.raises(ValueError, match="does not say that it is one"):
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
        HeadPatch.load(tmp_path / "x.safetensors")
    update = SparseUpdate({}, {}, {})
    update.save(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="does not say that it is one"):
        HeadPatch.load(tmp_path / "s.safetensors")


# -- writing ---------------------------------------------------------------------------------


def test_a_file_is_what_was_made(good, tmp_path):
    base, data = good
    path = tmp_path / "p.safetensors"
    path.write_bytes(data)
    loaded = HeadPatch.load(path)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == data
    assert loaded.provenance == {"why": "a test"} and loaded.architecture == "LlamaForCausalLM" and loaded.name == "p"
    assert loaded.selection == pick(base) and loaded.selection.summary is not None
    header, body = split(data)
    assert len(body) == loaded.nbytes == 2 * loaded.numel
    assert {Q, "__metadata__"} < set(header)


def test_modes_and_strays(good, tmp_path):
    old = os.umask(0o027)
    try:
        path = tmp_path / "p.safetensors"
        path.write_bytes(b"old")
        HeadPatch.load(write(tmp_path / "g.safetensors", good[1])).save(path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(file.name for file in tmp_path.iterdir()) == ["g.safetensors", "p.safetensors"]


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.fault("All or nothing")
@pytest.mark.parametrize("stage", ["save_file", "fsync", "chmod", "replace"])
def test_an_error_while_saving_leaves_the_old_file(good, stage, tmp_path, monkeypatch):
    """the disk is full at each stage of saving a patch: the old file stays, no stray beside it"""
    path = write(tmp_path / "p.safetensors", b"old")
    loaded = HeadPatch.load(write(tmp_path / "g.safetensors", good[1]))
    import pathlib

    import safetensors.torch

    def failing(*_, **__):
        raise OSError(28, "No space left on device")

    where, name = {"save_file": (safetensors.torch, "save_file"), "fsync": (os, "fsync"), "chmod": (pathlib.Path, "chmod"),
                   "replace": (os, "replace")}[stage]
    monkeypatch.setattr(where, name, failing)
    with pytest.raises(OSError, match="No space left"):
        loaded.save(path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


KILLED = textwrap.dedent("""
    import os, pathlib, signal, sys
    stage, source, target = sys.argv[1:]
    import safetensors.torch
    from alps_kernels import HeadPatch
    patch = HeadPatch.load(source)
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)
    save_file = safetensors.torch.save_file
    def torn(tensors, path, *rest):
        save_file(tensors, path, *rest)
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        die()
    replace = os.replace
    def after(*names):
        replace(*names)
        die()
    if stage == "half written": safetensors.torch.save_file = torn
    if stage == "before fsync": os.fsync = die
    if stage == "before replace": os.replace = die
    if stage == "after replace": os.replace = after
    patch.save(target)
""")


@pytest.mark.fault("All or nothing")
@pytest.mark.parametrize("stage, old", [("half written", True), ("before fsync", True), ("before replace", True), ("after replace", False)])
def test_killed_while_saving(good, stage, old, tmp_path):
    """kill -9 at each stage of saving a patch: the old file or the new one"""
    source, target = write(tmp_path / "g.safetensors", good[1]), write(tmp_path / "p.safetensors", b"old")
    ended = subprocess.run([sys.executable, "-c", KILLED, stage, str(source), str(target)], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-500:]
    assert target.read_bytes() == (b"old" if old else good[1])


def test_names_are_public():
    assert {"save_patch", "apply_patch", "revert_patch", "applied_patches", "HeadPatch", "export_lora", "export_merged",
            "export_sparse"} <= set(alps.__all__)
