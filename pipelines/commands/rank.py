"""`pipelines rank FILE_OR_STAGE…`: a page on this machine where people rank answers."""

from __future__ import annotations

import os
import socket
import sys
import webbrowser
from pathlib import Path

from pipelines import files
from pipelines.commands import command_line
from pipelines.data import sources
from pipelines.data.rows import normalise
from pipelines.errors import DataError, SetupError
from pipelines.feedback.assignment import shared_keys
from pipelines.feedback.store import Store, read_rows, take_in

ABOUT = """\
Serves a page on this machine (127.0.0.1) where people rank the answers to each prompt from best to worst, tag what is
wrong with them and may write the ideal answer; by mouse, finger or keyboard (press ? on the page).

A source is a file with one row for each prompt, or the folder of a stage of kind sample (its samples.jsonl):
  {"prompt": "…", "completions": ["…", "…"], "models": ["sft", "policy"], "id": 7}        models and id may be left out
Who wrote an answer is not shown, and the answers are shuffled for each labeller.

Judgements go into one SQLite file, beside the first source unless --store says otherwise, and are on disk before the
page says "saved". The server may be stopped or killed at any time: the same command goes on, at the same address.
Several people can rank at once, each under a name. The results page has their agreement, their pace, prompts worth a
second look, and how the models compare.
"""
EXAMPLES = """
pipelines rank runs/demo/samples   rank what the stage `samples` sampled
pipelines rank answers.jsonl --tags too_long,unsafe   two more tags
pipelines rank runs/demo/samples --export rankings.jsonl   rows for `reward`, and rankings.ideal.jsonl for `sft`
pipelines rank runs/demo/samples --import runs/demo/rankings/rankings.jsonl   a judge's, to compare on the results page
pipelines rank runs/demo/samples --overlap 0.1   share the prompts out, a tenth goes to everybody
ssh -L 8765:127.0.0.1:8765 HOST   then open the same address at home
"""


def main(argv: list[str]) -> int:
    """Serve the page until Ctrl-C, or export and return."""
    parser = command_line("rank", ABOUT, EXAMPLES)
    parser.add_argument("sources", nargs="+", metavar="FILE_OR_STAGE", help="rows of prompt and completions")
    parser.add_argument("--store", metavar="FILE.db", help="where judgements are kept (default: SOURCE.rankings.db)")
    parser.add_argument("--tags", default="", metavar="A,B", help="tags beside inappropriate, irrelevant, inaccurate")
    parser.add_argument(
        "--overlap",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the prompts that everybody ranks, to see how far people agree; each of the rest goes to one "
        "labeller (default: 1, everybody ranks all)",
    )
    parser.add_argument("--port", type=int, default=8765, help="port on 127.0.0.1 (default: 8765; 0: any free one)")
    parser.add_argument("--export", metavar="FILE.jsonl", help="write the rankings made so far, serve nothing")
    parser.add_argument(
        "--import",
        dest="rankings",
        metavar="FILE.jsonl",
        help="take in the rankings of a file, such as a judge's (rankings.jsonl of a stage), so that the results page "
        "compares them with people's; serve nothing",
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    args = parser.parse_args(argv)
    if not 0 <= args.overlap <= 1:
        raise SetupError(f"--overlap {args.overlap}: a share of the prompts is from 0 to 1, such as 0.1")
    path = Path(args.store) if args.store else _beside(Path(args.sources[0]))
    if args.export:
        return _export(path, Path(args.export))
    if args.rankings:
        return _import(path, args)
    return _serve(args, path)


def _beside(source: Path) -> Path:
    """runs/x/samples -> runs/x/samples/samples.rankings.db; answers.jsonl.gz -> answers.rankings.db."""
    source = source / "samples.jsonl" if source.is_dir() else source
    name = source.name.removesuffix(".gz")
    return source.with_name(f"{Path(name).stem}.rankings.db")


def _export(store: Path, target: Path) -> int:
    if not store.is_file():
        raise SetupError(f"{store}: no judgements yet; rank first, or say where they are with --store")
    if not target.parent.is_dir():
        raise SetupError(f"--export {target}: there is no folder {target.parent}")
    judged, ideal = Store(store), target.with_name(f"{target.stem}.ideal.jsonl")
    print(f"{files.write_rows(target, judged.rankings())} rankings -> {target}")
    print(f"{files.write_rows(ideal, judged.ideals())} ideal answers -> {ideal}")
    return 0


def _import(path: Path, args) -> int:
    if not Path(args.rankings).is_file():
        raise SetupError(f"--import {args.rankings}: no such file")
    rankings = []
    for where, row in sources.read({"path": args.rankings}):
        try:
            rankings.append(normalise(row, "rankings") | {"labeller": row.get("labeller"), "where": where})
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    store = Store(path)
    saved, others = take_in(store, store.add(read_rows(args.sources)), rankings)
    print(f"{saved} rankings -> {path}" + (f"; {others} are about other answers: left out" if others else ""))
    return 0


def _serve(args, path: Path) -> int:
    try:  # an extra of its own, and its import takes longer than `--help` and `--export` together
        import uvicorn

        from pipelines.feedback.server import create_app
    except ImportError as error:
        raise SetupError(
            f"the ranking page needs fastapi and uvicorn ({error}); install them: pip install -e '.[feedback]'"
        ) from error
    rows = read_rows(args.sources)
    store = Store(path)
    keys = store.add(rows)
    tags = store.add_tags([tag.strip() for tag in args.tags.split(",") if tag.strip()])
    listener = _listen(args.port)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/{store.token}/"
    again = f" ({len(rows) - len(keys)} repeated rows are shown once)" if len(keys) < len(rows) else ""
    print(f"{len(keys)} prompts{again}; judgements are kept in {path}")
    if args.overlap < 1:
        print(f"{len(shared_keys(keys, args.overlap))} of them are for everybody, the others for one labeller each")
    print(f"\n  {address}\n\nOpen it on this machine. Ctrl-C ends the server; nothing is lost.", flush=True)
    # Without a display Python would open a text browser in this terminal.
    if not args.no_browser and (sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
        webbrowser.open(address)
    # No access log: every path holds the token.
    config = uvicorn.Config(
        create_app(store, keys, tags, args.overlap),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # Ctrl-C is how a server ends
    rankings = sum(1 for _ in store.rankings())
    print(
        f"\n{rankings} rankings so far. Export them: python -m pipelines rank {' '.join(args.sources)} --export "
        "FILE.jsonl"
    )
    return 0


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a killed server's port is free at once
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()  # before the address is printed: whoever opens it waits for the server rather than failing
    except (OSError, OverflowError) as error:
        raise SetupError(f"--port {port}: {error}; is a ranking page running already? Try --port {port + 1}") from error
    return listener
