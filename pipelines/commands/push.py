"""`pipelines push RUN/STAGE HUB_ID`: upload a finished stage to the Hugging Face hub, in one commit.

The folder goes up as it is: model card, weights, tokenizer, `stage.json` and `history.jsonl`. Not, unless asked:
TensorBoard's logs, and the adapter that is already merged into the weights.
"""

from __future__ import annotations

from pathlib import Path

from pipelines.commands import command_line
from pipelines.errors import SetupError
from pipelines.files import FINISHED, STARTED, read_json, refuse_edited

EXAMPLES = """
pipelines push runs/demo/policy you/policy --dry-run   what would go up; nothing is sent
pipelines push runs/demo/policy you/policy --private
"""
LEFT_OUT = ("logs", "adapter", "checkpoints")  # folders, wherever they lie in the stage's


def files(folder: Path, also: list[str] = ()) -> list[Path]:
    """The files of a finished stage that are uploaded, `also` naming folders of `LEFT_OUT` to keep.

    Raises `SetupError` for a folder that is no finished stage.
    """
    if not (folder / FINISHED).is_file():
        made = sorted(p.parent.name for p in folder.glob(f"*/{FINISHED}"))
        if (folder / STARTED).is_file():
            raise SetupError(f"{folder}: this stage is not finished; run its recipe to the end first")
        if made:
            raise SetupError(f"{folder}: this is a whole run; name one of its stages: {', '.join(made)}")
        raise SetupError(f"{folder}: no finished stage here (no {FINISHED})")
    if not (folder / "config.json").is_file():
        raise SetupError(f"{folder}: this stage made no model (no config.json); only models are uploaded")
    left_out = set(LEFT_OUT) - set(also)
    inside = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    return [p for p in inside if not left_out & set(p.parts[:-1]) and not any(x.startswith(".") for x in p.parts)]


def push(folder: Path, hub_id: str, private: bool = False, also: list[str] = ()) -> str:
    """Create the repository where there is none, upload in one commit, return the commit's address.

    Raises `SetupError` with the hub's answer where it refuses, and for an existing public repository when `private`
    was asked for.
    """
    import httpx2  # what huggingface_hub talks HTTP with: it lets its errors through
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    stage = read_json(folder / FINISHED)
    additions = [CommitOperationAdd(path.as_posix(), folder / path) for path in files(folder, also)]
    api = HfApi()
    try:
        hub_id = api.create_repo(hub_id, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(hub_id).private:
            raise SetupError(
                f"{hub_id} is there already and is public: make it private in its settings, or drop --private"
            )
        done = api.create_commit(
            hub_id, additions, commit_message=f"{stage['stage']} ({stage['kind']}) of {stage['recipe']}"
        )
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise SetupError(
            f"{hub_id}: not uploaded: {str(error).strip()}\nLog in with `hf auth login` (or set HF_TOKEN to a token "
            "that "
            "may write), and use a name of your own: you/model"
        ) from error
    return done.commit_url


def main(argv: list[str]) -> int:
    """`push RUN/STAGE HUB_ID [--private] [--also logs] [--dry-run]`; returns the exit code."""
    parser = command_line("push", "Upload a finished stage to the Hugging Face hub, in one commit.", EXAMPLES)
    parser.add_argument(
        "folder", type=Path, metavar="RUN/STAGE", help="a finished stage's folder, e.g. runs/demo/policy"
    )
    parser.add_argument("hub_id", metavar="HUB_ID", help="where to: you/model")
    parser.add_argument("--private", action="store_true", help="only you can see it")
    parser.add_argument("--also", action="append", default=[], choices=LEFT_OUT, help="upload this folder too")
    parser.add_argument("--dry-run", action="store_true", help="list what would be uploaded; nothing is sent")
    args = parser.parse_args(argv)
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(args.hub_id)
    except HFValidationError as error:
        raise SetupError(f"{args.hub_id}: not a hub id (owner/name): {error}") from error
    chosen = files(args.folder, args.also)
    refuse_edited(args.folder, [path.as_posix() for path in chosen])
    sizes = [(args.folder / path).stat().st_size for path in chosen]
    for path, size in zip(chosen, sizes, strict=True):
        print(f"  {size / 1e6:10.3f} MB  {path}")
    print(f"{len(chosen)} files, {sum(sizes) / 1e6:.1f} MB -> {args.hub_id}")
    if not args.dry_run:
        print(push(args.folder, args.hub_id, args.private, args.also))
    return 0
