"""The import graph of the packages, folder by folder: `python -m tests.import_graph [PACKAGE]`.

A node is a sub-folder, or a file that lies directly in a package. Nodes are printed floor by floor, what runs on top
first; each only imports from floors below its own. Circles have no floor and are listed at the end.
"""

import sys
from collections.abc import Mapping

import grimp

PACKAGES = ("cluster", "bootstrap", "trainer", "model", "data_pipeline")
Graph = dict[str, set[str]]


def folder_graph(package: str) -> Graph:
    """Return for each node of a package the nodes of the same package that it imports."""
    prefix = f"isthmus.{package}."
    modules = grimp.build_graph("isthmus", cache_dir=None)

    def node(module: str) -> str:
        return module.removeprefix(prefix).split(".")[0]

    graph: Graph = {node(module): set() for module in modules.modules if module.startswith(prefix)}
    for module in modules.modules:
        if module.startswith(prefix):
            for imported in modules.find_modules_directly_imported_by(module):
                if imported.startswith(prefix) and node(imported) != node(module):
                    graph[node(module)].add(node(imported))
    return graph


def floors(graph: Mapping[str, set[str]]) -> tuple[list[list[str]], list[str]]:
    """Return the nodes by floor, lowest first, and the nodes that circles keep from having one."""
    placed: set[str] = set()
    found: list[list[str]] = []
    while ready := sorted(node for node in graph if node not in placed and graph[node] <= placed):
        found.append(ready)
        placed |= set(ready)
    return found, sorted(set(graph) - placed)


def main(packages: tuple[str, ...] = PACKAGES) -> int:
    """Print the graph of each package; return 1 when one has a circle."""
    has_circle = False
    for package in packages:
        graph = folder_graph(package)
        levels, circles = floors(graph)
        arrows = sum(map(len, graph.values()))
        print(f"{package}: {len(graph)} nodes, {arrows} arrows, {len(levels)} floors, {len(circles)} in circles")
        for floor in reversed(range(len(levels))):
            for node in levels[floor]:
                print(f"  {floor}  {node:<16} -> {', '.join(sorted(graph[node])) or '-'}")
        for node in circles:
            print(f"  circle  {node} -> {', '.join(sorted(graph[node] & set(circles)))}")
        has_circle |= bool(circles)
    return 1 if has_circle else 0


if __name__ == "__main__":
    raise SystemExit(main(tuple(sys.argv[1:]) or PACKAGES))
