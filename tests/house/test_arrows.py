"""The arrows of the house: who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A room and the rooms it may know, beyond itself. Rooms are modules of alps_kernels, packages
# taken whole, and csrc_triton. "selecting" rooms know torch and nothing of kernels.
LOCATING = {"layout", "locate", "recognise", "outputs", "projections", "sizes", "fused", "places", "verify", "probes"}
ALLOWED = {
    "csrc_triton": set(),
    "placement": set(),
    "ops": {"csrc_triton", "placement"},
    "files": set(),
    **{name: LOCATING for name in LOCATING},
    "mirrors": {"placement"},
    "binding": {"layout", "locate", "selection", "mirrors"},
    "sliced_projection": {"ops", "mirrors", "placement"},
    "sliceable": {"layout", "binding", "sliced_projection"},
    "sliced": {"layout", "locate", "selection", "binding", "mirrors", "sliceable", "sliced_projection"},
    "selection": {"layout", "binding", "files"},
    "cautions": {"state"},
    "guarding": {"layout", "binding", "selection", "mirrors", "placement", "sharding"},
    "optimizer": {"ops", "binding", "state", "saved_state", "arguments", "mirrors", "placement", "sharding", "replaced", "cautions"},
    "arguments": {"ops", "mirrors"},
    "saved_state": {"state", "placement", "sharding"},
    "state": {"ops", "binding", "mirrors", "placement", "sharding"},
    "sharding": {"binding", "placement"},
    "replaced": {"binding", "state"},
    "pictures": {"files", "scores", "selection"},
    "comparison": {"selection", "scores"},
    "scores": {"files", "selection", "layout", "pictures", "comparison"},
    "representation": {"layout", "ops"},
    "weights": {"layout", "locate", "mirrors"},
    # score_heads takes paths: it opens them with integrations.checkpoints, imported on demand.
    "scoring": {"ops", "layout", "scores", "weights", "representation", "integrations"},
    "integrations": {"layout", "locate", "weights", "binding", "files", "mirrors", "optimizer", "ops", "representation", "scores",
                     "scoring", "selection", "sliced", "state"},
    "slices_file": {"binding", "files", "layout"},
    "patch_file": {"selection", "slices_file"},
    "patch_source": {"layout", "locate", "mirrors", "slices_file"},
    "patch_make": {"binding", "patch_file", "patch_source", "selection", "slices_file"},
    # save_patch takes a folder as the base: opened with patch_checkpoint, imported on demand.
    "patch": {"binding", "mirrors", "patch_checkpoint", "patch_file", "patch_make", "patch_source", "selection", "slices_file"},
    "patch_checkpoint": {"binding", "files", "integrations", "patch_file", "patch_make", "patch_source",
                         "selection", "slices_file", "sparse"},
    "patch_diff": {"binding", "patch_file", "slices_file"},
    "sparse": {"slices_file"},
    "export": {"files", "patch_checkpoint", "patch_file", "patch_make", "patch_source", "slices_file", "sparse"},
    "patch_cli": {"export", "patch_checkpoint", "patch_diff", "patch_file", "patch_make", "selection"},
    "demo": {"binding", "files", "pictures", "optimizer", "scoring", "weights"},
    "cli": {"integrations", "patch_cli", "demo", "scores", "scoring", "selection"},
    "__main__": {"cli"},
    "__init__": set(),
}
# What a room may import from outside; a room that is not named here: anything installed.
OUTSIDE = {"csrc_triton": {"triton"}, "ops": {"torch", "triton"}, "optimizer": {"torch"}, "arguments": {"torch"}, "state": {"torch"},
           "saved_state": {"torch"}, "sharding": {"torch"}, "placement": {"torch"}, "replaced": {"torch"}, "guarding": {"torch"}, "cautions": {"torch"}, **{name: {"torch", "transformers"} for name in LOCATING}, "binding": {"torch"}, "selection": {"torch"}, "mirrors": {"torch"},
           "sliced": {"torch"}, "sliceable": {"torch"}, "sliced_projection": {"torch"},
           "files": set(), "__init__": set()}
STANDARD = __import__("sys").stdlib_module_names


def sources():
    for path in sorted((ROOT / "alps_kernels").rglob("*.py")):
        parts = path.relative_to(ROOT / "alps_kernels").with_suffix("").parts
        yield path, parts[0]
    for path in sorted((ROOT / "csrc_triton").rglob("*.py")):
        yield path, "csrc_triton"


def imports(path):
    """(module, names, is at the top of the file) of every import, absolute names."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    typing_only = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If)
                   and ast.unparse(node.test) == "TYPE_CHECKING" for n in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, [alias.name for alias in node.names], id(node) in top and id(node) not in typing_only


def rooms_of(module, names):
    """The rooms of our own that an import reaches."""
    head, *rest = module.split(".")
    if head == "csrc_triton":
        return {"csrc_triton"}
    if head != "alps_kernels":
        return set()
    return {rest[0]} if rest else set(names) - {"__version__"}


@pytest.mark.parametrize("path, room", [pytest.param(p, r, id=str(p.relative_to(ROOT))) for p, r in sources()])
def test_a_room_imports_only_what_its_arrows_allow(path, room):
    assert room in ALLOWED, f"{room} is a new room: give it its arrows here"
    for module, names, top in imports(path):
        ours = rooms_of(module, names)
        assert ours <= ALLOWED[room] | {room}, f"{path.name} imports {module} {names}"
        head = module.split(".")[0]
        if ours or head in ("alps_kernels", "csrc_triton") or head in STANDARD or head == "__future__":
            continue
        assert OUTSIDE.get(room) is None or head in OUTSIDE[room], f"{path.name} imports {module}"
        if room in LOCATING and head == "transformers":
            assert not top, f"{path.name} imports transformers when it is itself imported"


def test_the_table_has_no_room_that_is_gone():
    assert set(ALLOWED) == {room for _, room in sources()}


def test_only_ops_launches_kernels():
    for path, room in sources():
        for module, _, _ in imports(path):
            if module.split(".")[0] in ("csrc_triton", "triton") and room not in ("ops", "csrc_triton"):
                pytest.fail(f"{path.relative_to(ROOT)} imports {module}")
