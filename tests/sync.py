"""Same name, same code: copies what stands in one script into all other scripts that have it.

    python tests/sync.py              copies functions, classes and tables (AUGMENT, MODELS) from clip.py
    python tests/sync.py declip       copies them from declip.py
    python tests/sync.py --check      changes nothing; prints the first line that differs in each block

main, parse_args and RECIPES are each script's own. A script with uncommitted changes is not overwritten.
"""

import ast
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# a new script joins the tests by its name here
SCRIPTS = ("clip", "declip", "protoclip", "aclip", "tinyclip", "slip", "flame", "frequency", "nmtune")
OWN = {"main", "parse_args", "RECIPES"}


@lru_cache(None)
def blocks(source):
    """{name: (first line, line after the last)} of the functions, classes and tables at the top level, from 0."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
            found[node.name] = first - 1, node.end_lineno
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.lineno - 1, node.end_lineno
    return found


def code(source, name):
    """Lines of a block."""
    first, end = blocks(source)[name]
    return source.split("\n")[first:end]


def differences(script, other):
    """[(name, line of the block from 1, its text in script, its text in other)], one for each block that differs."""
    mine, theirs = ((ROOT / f"{name}.py").read_text() for name in (script, other))
    found = []
    for name in blocks(mine):
        if name in blocks(theirs) and name not in OWN and code(mine, name) != code(theirs, name):
            a, b = code(mine, name) + ["(end)"], code(theirs, name) + ["(end)"]
            i = next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)
            found.append((name, i + 1, a[i], b[i]))
    return found


def main(argv):
    check, names = "--check" in argv, [arg.removesuffix(".py") for arg in argv if arg != "--check"]
    if len(names) > 1 or not {*names} <= {*SCRIPTS}:
        raise SystemExit(f"{__doc__}\nThe scripts: {', '.join(SCRIPTS)}")
    script, failed = (names or ["clip"])[0], False
    for other in SCRIPTS:
        changed = differences(script, other)
        for name, line, mine, theirs in changed if check else ():
            print(f"{name} of {other}.py, line {line}:\n  {script}.py: {mine.strip()}\n  {other}.py: {theirs.strip()}")
        if check or not changed:
            failed |= bool(changed)
            continue
        path = ROOT / f"{other}.py"
        if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", path], cwd=ROOT).returncode:
            raise SystemExit(f"{other}.py has uncommitted changes: commit or stash them, then run this again")
        source, text = (ROOT / f"{script}.py").read_text(), path.read_text()
        for name, *_ in changed:
            lines, (first, end) = text.split("\n"), blocks(text)[name]
            text = "\n".join(lines[:first] + code(source, name) + lines[end:])
        path.write_text(text)
        print(f"{other}.py: {', '.join(name for name, *_ in changed)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
