"""The rules of the house, read from the source: rooms, faces, arrows, circles, sizes; test_arrows.py breaks each.

A room is a folder of alps_kernels; csrc_triton beside it is one too. The first line of a room's `__init__.py`, its
face, ends in "Imports: a, b.": the rooms that it imports. Other rooms may import what a face lists in `__all__`.
"""

import ast
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

# A room imports only rooms that stand above it.
ROOMS = ("csrc_triton", "tensors", "ops", "layout", "selection", "weights", "scoring", "optim", "slicing", "patching",
         "integrations", "demo", "cli")
FILES = {"__init__", "__main__", "version"}  # beside the rooms
SIBLINGS = {"scoring", "optim", "slicing", "patching"}
# What no first line can allow.
FORBIDDEN = {"csrc_triton": set(ROOMS), "tensors": set(ROOMS), "layout": {"ops"}, "selection": {"ops"},
             **{room: SIBLINGS - {room} for room in SIBLINGS}}
# Packages that a room may import: when it is imported itself, and in functions.
OUTSIDE = {
    "": ("", ""),
    "csrc_triton": ("triton", ""),
    "tensors": ("torch", "safetensors"),
    "ops": ("torch einops", "csrc_triton triton"),
    "layout": ("torch einops numpy", "transformers"),
    "selection": ("torch einops", ""),
    "weights": ("torch einops", "safetensors transformers"),
    "scoring": ("torch einops", "matplotlib numpy safetensors tqdm"),
    "optim": ("torch einops", ""),
    "slicing": ("torch einops", ""),
    "patching": ("torch einops", "safetensors"),
    "integrations": ("torch einops safetensors transformers", ""),
    "cli": ("typer", "bench"),
    "demo": ("torch einops", "gguf tokenizers tqdm transformers"),
}
# Files whose `import_module` takes computed names: of the public names, whose table is read, and of no room.
COMPUTED = {"alps_kernels/__init__.py", "alps_kernels/demo/text.py"}
LONGEST = 300
# What else imports: `import_module` and `__import__` are read where they are called by name, the others nowhere.
LOADERS = {"import_module", "__import__", "exec", "find_spec", "resolve_name", "run_module"}


class Import(NamedTuple):
    """One import; `name` of `from module import name`; `runs`: when the file is imported, not in a function."""

    line: int
    module: str
    name: str | None
    runs: bool


@lru_cache(maxsize=None)
def imports(text: str, package: str) -> tuple[Import, ...]:
    """Every import of a file in `package`: lazy ones, typing-only ones and `import_module` too, absolute names."""
    tree = ast.parse(text)
    return tuple(_walk(tree, package.split("."), True)) + tuple(_public(tree) if package == "alps_kernels" else ())


def _walk(node: ast.AST, package: list[str], runs: bool):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(child.lineno, alias.name, None, runs) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = _absolute("." * child.level + (child.module or ""), package)
            yield from (Import(child.lineno, module, alias.name, runs) for alias in child.names)
        elif isinstance(child, ast.Call) and ast.unparse(child.func).split(".")[-1] in ("import_module", "__import__"):
            yield Import(child.lineno, _named(child.args[0] if child.args else None, package), None, runs)
        elif isinstance(child, (ast.Name, ast.Attribute)) and ast.unparse(child).split(".")[-1] in LOADERS:
            called = isinstance(node, ast.Call) and node.func is child
            if not called or "import" not in ast.unparse(child).split(".")[-1]:
                yield Import(child.lineno, "", None, runs)
        if isinstance(child, ast.ImportFrom) and any(a.name in LOADERS and a.asname for a in child.names):
            yield Import(child.lineno, "", None, runs)
        if isinstance(child, ast.If) and ast.unparse(child.test).split(".")[-1] == "TYPE_CHECKING":
            yield from _walk(ast.Module(child.body, []), package, False)
            yield from _walk(ast.Module(child.orelse, []), package, runs)
        else:
            lazy = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _walk(child, package, runs and not lazy)


def _named(argument: ast.expr | None, package: list[str]) -> str:
    """The module that a call imports, as far as its text says; "" for one that is computed."""
    if isinstance(argument, ast.JoinedStr):
        argument = argument.values[0]
    written = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    return _absolute(argument.value.rstrip("."), package) if written else ""


def _absolute(module: str, package: list[str]) -> str:
    """A module that may be named from `package` on; one above the top of the package keeps its dots."""
    name = module.lstrip(".")
    dots = len(module) - len(name)
    if not dots or dots > len(package):
        return module
    return ".".join([*package[:len(package) - dots + 1], *filter(None, [name])])


def _public(tree: ast.Module):
    """The public names, from the table {name: room} of the package's `__init__.py`, as imports in a function."""
    for node in tree.body:
        table = node.value if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) else ast.Dict([], [])
        for key, value in zip(table.keys, table.values):
            yield Import(key.lineno, f"alps_kernels.{value.value}", key.value, False)


@lru_cache(maxsize=None)
def exported(text: str) -> frozenset[str]:
    """`__all__` of a face, where it is a plain list."""
    for node in ast.parse(text).body:
        named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if named and isinstance(node.value, ast.List):
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


class House:
    """The sources under a folder: text and imports by dotted module name."""

    def __init__(self, root: Path):
        self.files = {}
        self.root = root
        for path in sorted(p for top in ("alps_kernels", "csrc_triton") for p in (root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            self.files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.relative_to(root).as_posix()
        self.text = {module: (root / file).read_text() for module, file in self.files.items()}
        self.packages = {module for module, file in self.files.items() if file.endswith("__init__.py")}
        self.imports = {m: imports(text, m if m in self.packages else m.rpartition(".")[0])
                        for m, text in self.text.items()}
        self.faces = {room: room if room == "csrc_triton" else f"alps_kernels.{room}" for room in ROOMS}

    def everything(self):
        """Every file and folder, what tools leave there apart."""
        for path in sorted(p for top in ("alps_kernels", "csrc_triton") for p in (self.root / top).rglob("*")):
            if not any(part == "__pycache__" or part.startswith(".") for part in path.relative_to(self.root).parts):
                yield path

    def room(self, module: str) -> str:
        """The room that a module is in; "" for what stands beside the rooms or is not ours."""
        top, inner = (module.split(".") + [""])[:2]
        return top if top == "csrc_triton" else inner if top == "alps_kernels" and inner not in FILES else ""

    def target(self, found: Import) -> str:
        """The module that an import takes its name from: a face where the face exports it, else a file."""
        inner = f"{found.module}.{found.name}"
        return inner if inner in self.files and found.name not in self.exports(found.module) else found.module

    def exports(self, module: str) -> frozenset[str]:
        return exported(self.text.get(module, ""))

    def door(self, module: str, target: str) -> str | None:
        """The face that leads from a module to `target`: of the outermost folder that only `target` is in."""
        parts = target.split(".")
        above = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        return next((m for m in above if m in self.packages and not f"{module}.".startswith(f"{m}.")), None)

    def ours(self):
        """(module, its room, the import, the room that the import reaches) of every import of our own files."""
        for module, found in ((m, f) for m, all_of in self.imports.items() for f in all_of):
            if found.module.split(".")[0] in ("alps_kernels", "csrc_triton"):
                yield module, self.room(module), found, self.room(self.target(found))

    def at(self, module: str, line: int) -> str:
        return f"{self.files[module]}:{line}:"

    def listed(self, room: str) -> list[str] | None:
        """The rooms that the first line of a room's face lists."""
        first = (ast.get_docstring(ast.parse(self.text[self.faces[room]])) or "").split("\n")[0]
        line = re.search(r"^.+\. Imports: ([a-z_, ]+)\.$", first)
        return None if line is None else [] if line[1] == "nothing" else line[1].split(", ")


def violations(root: Path) -> list[str]:
    """What the sources under `root` break of the rules, one line each: file, line, what to do."""
    house = House(root)
    rules = (unknown_rooms, unlisted_and_stale, upwards, past_a_face, circles, too_long, not_of_this_room)
    return [line for rule in rules for line in rule(house)]


def unknown_rooms(house: House):
    for folder in house.everything():
        if folder.is_dir():
            name = folder.relative_to(house.root)
            if not (folder / "__init__.py").exists():
                yield f"{name}: a folder without a face: say in its __init__.py what it does"
            elif not (ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""):
                yield f"{name}/__init__.py:1: says nothing of what the folder does"
            if folder.parent.name == "alps_kernels" and folder.name not in ROOMS:
                yield f"{name} is not a room: move it into one, or give ROOMS a folder with a face"
    there = {house.room(module) for module in house.files} - {""}
    for module in house.files:
        room = house.room(module)
        if room and (room not in ROOMS or house.faces[room] not in house.packages):
            yield f"{house.at(module, 1)} {room} is not a room: move it into one, or give ROOMS a folder with a face"
    yield from (f"alps_kernels: the room {room} is gone: take it out of ROOMS" for room in ROOMS if room not in there)


def unlisted_and_stale(house: House):
    """The first line is the table: what is imported stands in it, what stands in it is imported, from above."""
    used = {room: {} for room in ROOMS}
    for module, room, found, other in house.ours():
        if room in used and other and other != room:
            used[room].setdefault(other, house.at(module, found.line))
    for room in ROOMS:
        if room == "csrc_triton" or house.faces[room] not in house.files:
            continue  # device code imports no room: FORBIDDEN
        at, listed = house.at(house.faces[room], 1), house.listed(room)
        if listed is None:
            yield f'{at} the first line has to end in "Imports: a, b." or "Imports: nothing."'
            continue
        for other, where in used[room].items():
            if other not in listed:
                yield f"{where} {room} imports {other}, which the first line of {at[:-3]} does not list: list it"
        if len(set(listed)) < len(listed):
            yield f"{at} lists a room twice"
        for other in listed:
            if other not in ROOMS or ROOMS.index(other) >= ROOMS.index(room):
                yield f"{at} lists {other}, which does not stand above {room}: turn the arrow round"
            elif other not in used[room]:
                yield f"{at} lists {other}, which no file of {room} imports: take it out"


def upwards(house: House):
    """The order of the rooms, and what no first line can allow."""
    for module, room, found, other in house.ours():
        if module == "alps_kernels.version" or (module == "alps_kernels" and other and found.runs):
            yield f"{house.at(module, found.line)} {module} imports {found.module}: it stands above the rooms"
        if room not in ROOMS or other not in ROOMS or other == room:
            continue
        if ROOMS.index(other) > ROOMS.index(room):
            yield f"{house.at(module, found.line)} {room} imports {other}, which stands below it: turn the arrow round"
        if other in FORBIDDEN.get(room, ()) or (other == "csrc_triton" and room != "ops"):
            yield f"{house.at(module, found.line)} {room} must know nothing of {other}"


def past_a_face(house: House):
    """From outside a room: `from ..room import name`, where the face exports `name`, and nothing else."""
    for module, room, found, other in house.ours():
        at, asked = house.at(module, found.line), f"{found.module}.{found.name}" if found.name else found.module
        if found.module not in house.files:
            yield f"{at} imports {found.module}, which does not exist"
        elif not other:
            if found.module != "alps_kernels.version" or found.name is None:
                yield f"{at} imports {asked}: take the name from the face of its room, or from ..version"
        elif (face := house.door(module, house.target(found))) not in (None, "csrc_triton"):
            if found.module != face or found.name not in house.exports(face):
                inner = face.removeprefix("alps_kernels.")
                yield f"{at} imports {asked} past the face of {inner}: from {inner} import a name of its __all__"
    for face in house.packages - {"alps_kernels"}:
        named = {found.name: found for found in house.imports[face]}
        for name in sorted({*named, *house.exports(face)} - {None}):
            if f"{face}.{name}" in house.files:
                yield f"{house.at(face, 1)} a face exports names, not files: import from .{name}"
            elif name in house.exports(face) and name in named and not named[name].module.startswith(face):
                yield f"{house.at(face, 1)} hands on {name} of {named[name].module}: import it where it is used"


def circles(house: House):
    """Files that import each other, by the shortest way round. A name of a face comes from its `__init__.py`."""
    arrows = {module: set() for module in house.files}
    for module, _, found, _ in house.ours():
        parts = house.target(found).split(".")
        reached = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        inside = {".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 2)}
        arrows[module] |= ((reached - inside) | {house.target(found)}) & set(house.files) - {module}
    told = set()
    for start in house.files:
        ways, seen = [[start]], set()
        for way in ways:  # grows while it is read: breadth first
            if start in arrows[way[-1]]:
                if frozenset(way) not in told:
                    told.add(frozenset(way))
                    round_trip = " -> ".join(house.files[module] for module in (*way, start))
                    yield f"{house.at(start, 1)} a circle of imports: {round_trip}: move what both need into a third"
                break
            ways += [[*way, nxt] for nxt in sorted(arrows[way[-1]] - seen)]
            seen |= arrows[way[-1]]


def too_long(house: House):
    for path in house.everything():
        if path.is_file() and (n_lines := len(path.read_bytes().splitlines())) > LONGEST:
            at = f"{path.relative_to(house.root)}:{n_lines}:"
            yield f"{at} {n_lines} lines, {LONGEST} at most: find the concept that is missing"


def not_of_this_room(house: House):
    """Packages that are not ours: which room may import which, and when."""
    for module, found in ((m, f) for m, all_of in house.imports.items() for f in all_of):
        package, room, at = found.module.split(".")[0], house.room(module), house.at(module, found.line)
        if found.module.startswith("."):
            yield f"{at} imports {found.module}, above the top of the package: write the import absolute"
        elif not package and house.files[module] not in COMPUTED:
            yield f"{at} imports a module by a name that is computed: write the name out"
        if package in sys.stdlib_module_names or package in (room, "" if room == "csrc_triton" else "alps_kernels", ""):
            continue
        first, lazily = (words.split() for words in OUTSIDE.get(room, ("", "")))
        if package not in (*first, *lazily):
            yield f"{at} imports {package}, which {room or 'the package itself'} may not: see OUTSIDE"
        elif found.runs and package not in first:
            yield f"{at} imports {package} when it is itself imported: import it in the function that needs it"
