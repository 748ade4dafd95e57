"""The documents keep their promises: links lead somewhere, commands exist, YAML in them is a recipe that can
be read.
"""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from pipelines.__main__ import VERBS
from pipelines.kinds import KINDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("data/**/*.md")])


def names(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    heads = [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", h) for h in re.findall(r"^#+ (.*)$", text, flags=re.M)]
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def blocks(page: Path, languages=("", "bash", "sh", "console")) -> list[str]:
    """The text of the fenced blocks in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [text for language, text in found if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The command lines of ours in a page, as words, without comments."""
    lines = [line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python -m pipelines|pipelines|python benchmarks/|python data/)[^`]*)`", page.read_text())
    out = []
    for line in lines:
        line = line.partition("| ")[2] if line.startswith("echo ") else line
        try:
            words = shlex.split(line.partition(" #")[0])
        except ValueError:
            continue  # prose with an apostrophe
        if words[:1] in (["pipelines"], ["accelerate"]) or words[:2] in (["python", "-m"], ["python", "benchmarks"]):
            out.append(words)
        elif words[:1] == ["python"] and len(words) > 1:
            out.append(words)
    return out


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            broken.append(link)
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            broken.append(f"{link} (no such heading)")
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_exist(page):
    wrong = []
    for words in commands(page):
        if words[0] == "python" and words[1].endswith(".py"):
            if not (ROOT / words[1]).is_file():
                wrong.append(words)
            continue
        if "pipelines" not in words:
            continue
        rest = words[words.index("pipelines") + 1 :]
        if not rest or rest[0].startswith("-") or rest[0].isupper() or rest[0] == "…":
            continue
        verb, arguments = (rest[0], rest[1:]) if rest[0] in VERBS else ("run", rest)
        if verb == "run" and rest[0] not in VERBS and not re.search(r"\.yaml$|^[A-Z]+$|…", rest[0]):
            wrong.append(words)  # neither a verb nor a recipe
        if verb in ("run", "check", "plan", "status", "show") and arguments:
            recipe = arguments[0]
            if recipe.startswith("recipes/") and not (ROOT / recipe).is_file():
                wrong.append(words)
        if verb == "keys" and arguments and arguments[0].islower() and arguments[0] not in KINDS:
            wrong.append(words)
        for word in rest:
            if re.match(r"(data|accelerate_configs|benchmarks)/[\w./-]+$", word) and not list(ROOT.glob(word)):
                wrong.append(words)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_yaml_can_be_read_and_names_real_kinds_and_sections(page):
    for text in blocks(page, ("yaml",)):
        tree = yaml.safe_load(text)
        stages = tree.get("stages", tree) if isinstance(tree, dict) else {}
        for body in stages.values():
            if isinstance(body, dict) and body.get("kind") in KINDS:
                assert body.keys() - {"kind"} <= set(KINDS[body["kind"]].sections), body
            elif isinstance(body, dict) and "kind" in body:
                pytest.fail(f"no kind {body['kind']!r}")


def test_the_readme_is_short_and_names_every_kind():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert [kind for kind in KINDS if f"`{kind}`" not in text] == []


def test_every_document_is_reached_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w.-]+\.md)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md")} - linked == set()


def kinds_in(path: str) -> set[str]:
    """The kinds of the stages that a test file makes."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return set(re.findall(r'(?:"kind": |\bstage\(\s*|\()"(\w+)"', text)) & set(KINDS)


def test_what_is_called_run_on_gpus_is_what_the_tests_run():
    """The table of docs/gpus.md, kind by kind and launcher by launcher."""
    rows = re.findall(r"^\| (\w+) \|(.+)\|$", (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8"), flags=re.M)
    rows = {kind: [cell.strip() for cell in cells.split("|")] for kind, cells in rows if kind in KINDS}
    heads = ("one GPU", "ddp", "fsdp2", "zero2", "zero3", "offload", "vLLM", "bits")
    assert set(rows) == set(KINDS) - {"rank"} and all(len(cells) == len(heads) for cells in rows.values())
    column = lambda head, mark: {kind for kind, cells in rows.items() if cells[heads.index(head)].startswith(mark)}
    simulated = kinds_in("tests/stages/test_stages_on_a_gpu.py") - {"rank"}
    gloo = kinds_in("tests/training/test_launchers.py")
    assert column("one GPU", "simulated") == simulated
    assert column("ddp", "gloo") == gloo | {"sample", "evaluate"} & kinds_in(
        "tests/feedback/test_feedback_two_processes.py"
    )
    assert all(column(head, "gloo") == gloo for head in ("fsdp2", "zero2", "zero3"))
    assert column("fsdp2", "gloo, bf16") == gloo
    assert column("vLLM", "stand-in") == kinds_in("tests/generation/test_with_vllm.py") | {"ppo"}
    assert column("bits", "CPU") == kinds_in("tests/models/test_lora.py")
    assert not column("offload", "gloo") | column("offload", "simulated")
