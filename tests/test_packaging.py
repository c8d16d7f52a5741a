"""What a stranger's machine needs: locks without hosts, an environment that matches the metadata, a chapter that is complete, imports that go one way."""
import ast
import json
import re
import subprocess
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# Groups of modules, and the groups that each may import when it is loaded (an import inside a function is a door for the user's convenience).
GROUPS = {
    "filters": {"bases", "fills", "recipes", "steering", "filters"},
    "networks": {"audit", "surgery", "algebra", "layers", "lcnets", "models", "backward"},
    "data": {"catalogue", "archives", "official", "releases", "integrity", "data", "pack"},
    "training": {"batches", "grouped", "machine", "many", "measure", "steps", "train"},
    "study": {"keys", "stamp", "rows", "chapters", "claims", "plots", "study", "check"},
    "bench": {"bench", "gpu", "rivals", "starts"},
    "book": {"pages", "render", "warm", "zygote", "zygote_client"},
    "command line": {"__main__"},
}
MAY_IMPORT = {
    "filters": set(), "networks": {"filters"}, "data": set(), "training": {"data", "networks"}, "study": {"data"}, "bench": {"training", "networks"},
    "book": {"study"}, "command line": {"study", "book", "data", "training", "bench"},
}


def direct(requirements):
    return {re.match(r"[\w.-]+", r)[0].lower() for r in requirements}


def text_files():
    """Tracked and new files of the repository that are text, build outputs left out."""
    try:
        names = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], check=True, capture_output=True, text=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / n for n in names if n and (ROOT / n).is_file() and (ROOT / n).suffix not in (".npz", ".png", ".gz")]


def test_environment_lists_what_the_project_needs():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    assert pip == ["-r requirements/lock.txt"], "conda users get the same lock as make"
    python = next(d for d in env["dependencies"] if str(d).startswith("python"))
    assert python.removeprefix("python") == PROJECT["requires-python"]
    comments = set(re.findall(r"[\w.-]+", " ".join(line for line in (ROOT / "environment.yml").read_text().splitlines() if line.startswith("#   "))))
    extras = PROJECT["optional-dependencies"]
    missing = direct(PROJECT["dependencies"] + extras["test"] + extras["book"] + extras["zoo"]) - {c.lower() for c in comments}
    assert not missing, f"environment.yml does not say who needs {sorted(missing)}"


def test_lock_holds_every_direct_requirement_hashed_and_names_no_host():
    text = (ROOT / "requirements" / "lock.txt").read_text()
    locked = {m[1].lower() for m in re.finditer(r"^([\w.-]+)==", text, re.M)}
    extras = PROJECT["optional-dependencies"]
    missing = direct(PROJECT["dependencies"] + extras["test"] + extras["book"] + extras["zoo"]) | {"hatchling", "editables"}
    assert not missing - locked, f"run `make lock`: {sorted(missing - locked)}"
    for path in (ROOT / "requirements").glob("*.txt"):
        text = path.read_text()
        assert "://" not in text
        entries = re.split(r"\n(?=\S)", text.strip())
        assert all("--hash=sha256:" in e for e in entries if not e.startswith("#")), path.name
    assert "resolved" not in (ROOT / ".ci" / "axe" / "package-lock.json").read_text()


def test_no_path_of_one_machine_and_no_registry_host():
    words = re.compile("|".join([r"/wor" r"k/", r"/roo" r"t/", r"/hom" r"e/\w", r"pypi\.or" "g", "pythonhoste" "d", r"registry\.npm" "js", r"deb\.debia" "n"]))
    found = []
    for path in text_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in words.finditer(text)]
    assert not found, found


def test_licence_and_citation():
    assert "MIT License" in (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "MIT"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == "MIT"


def test_imports_go_one_way():
    graph = {}
    for path in (ROOT / "src" / "frozenfilters").glob("*.py"):
        graph[path.stem] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").split(".")[0] == "frozenfilters"):
                module = (node.module or "").removeprefix("frozenfilters").lstrip(".")
                graph[path.stem] |= {module.split(".")[0]} if module else {a.name for a in node.names if (path.parent / f"{a.name}.py").exists()}
    list(TopologicalSorter(graph).static_order())                       # raises CycleError
    group = {module: name for name, members in GROUPS.items() for module in members}
    unknown = set(graph) - set(group) - {"__init__"}
    assert not unknown, f"give {sorted(unknown)} a place in GROUPS"
    assert not graph["__init__"], "importing the package must cost nothing"
    wrong = [f"{a} imports {b}" for a in graph if a in group for b in graph[a] if group[b] not in {group[a]} | MAY_IMPORT[group[a]]]
    assert not wrong, wrong


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_is_complete(path):
    nb = json.loads(path.read_text())
    assert nb["metadata"]["kernelspec"]["language"] == "python", "papermill needs it"
    tags = [set(c["metadata"].get("tags", [])) for c in nb["cells"]]
    for tag in ("parameters", "setup", "trial", "measure", "figure"):
        assert any(tag in t for t in tags), f"no cell is tagged {tag}"
    assert sum("parameters" in t for t in tags) == 1
    trials = [t for c, t in zip(nb["cells"], tags, strict=True) if "def trial(" in "".join(c["source"])]
    assert trials and not any(t & {"hide-input", "remove-input", "remove-cell"} for t in trials), "the measured function is always visible"
    first = "".join(nb["cells"][0]["source"])
    assert first.startswith("# ") and "\n\n*" in first, "a title, then the question in italics"
    assert path.stem in yaml.safe_load((ROOT / "notebooks" / "presets.yml").read_text())
    assert f"- file: chapters/{path.stem}\n" in (ROOT / "book" / "_toc.yml").read_text()
    claims = yaml.safe_load((ROOT / "book" / "claims.yml").read_text())
    assert any(str(c["id"]).startswith(path.stem[:2] + ".") for c in claims), "a chapter has claims"
