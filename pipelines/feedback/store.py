"""People's judgements in one SQLite file: what was shown, who ranked it how, and every correction.

A judgement is never changed: a correction is a further row that names the one it replaces, so the history stays. The
page makes the id of a judgement, so one that is sent twice (a lost reply, a restarted server) is stored once. Two
unique indexes hold these rules even when two servers use the same file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from pipelines import errors, files
from pipelines.data import sources
from pipelines.data.rows import normalise
from pipelines.errors import SetupError

TAGS = ("inappropriate", "irrelevant", "inaccurate")  # inappropriate language, irrelevance, factual inaccuracy
MOST = 9  # answers to one prompt: each place has a digit key
SHOWN = 5  # broken rows named in an error
WAIT = 5.0  # seconds to wait for another program that holds the file

# DELETE and EXTRA: a commit has reached the disk, its directory entry too, before `commit` returns. WAL would be faster
# but does not work on the network file systems of clusters.
PRAGMAS = """
PRAGMA journal_mode = DELETE;
PRAGMA synchronous = EXTRA;
PRAGMA foreign_keys = ON;
"""
SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, row TEXT NOT NULL);
CREATE TABLE judgements (
  number INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  item TEXT NOT NULL REFERENCES items (key),
  labeller TEXT NOT NULL,
  replaces TEXT UNIQUE,
  content TEXT NOT NULL,
  seconds REAL NOT NULL,
  saved_at TEXT NOT NULL,
  UNIQUE (id, item, labeller),
  FOREIGN KEY (replaces, item, labeller) REFERENCES judgements (id, item, labeller)
);
CREATE UNIQUE INDEX one_first ON judgements (item, labeller) WHERE replaces IS NULL;
CREATE VIEW current AS
  SELECT * FROM judgements j WHERE NOT EXISTS (SELECT 1 FROM judgements k WHERE k.replaces = j.id);
"""
PARTS = {"meta", "items", "judgements", "current"}

# Everything a browser sends: type and range. No half surrogates anywhere: pydantic takes text that is Unicode only.
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=64, pattern=r"^\P{Cc}+$")]
Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{8,64}$")]
Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{20}$")]
Text = Annotated[str, StringConstraints(max_length=100_000)]
Rank = Annotated[int, Field(ge=1, le=MOST)]


class Judgement(BaseModel):
    """What one labeller thinks of the K answers to one prompt; `ranks` is None where the prompt was skipped."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Id
    item: Key
    labeller: Name
    replaces: Id | None = None  # the judgement that this one corrects
    ranks: Annotated[list[Rank], Field(min_length=2, max_length=MOST)] | None  # (K,) 1 is best, ties share a number
    tags: Annotated[  # (K,) what is wrong with each answer
        list[Annotated[list[Name], Field(max_length=100)]], Field(min_length=2, max_length=MOST)
    ]
    note: Text = ""
    ideal: Text = ""  # the answer that the labeller would have given
    seconds: Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)] = 0.0  # time spent on it

    @model_validator(mode="after")
    def _close_gaps(self):
        if self.ranks is not None:
            self.ranks = dense(self.ranks)
        return self

    def content(self) -> str:
        """What was judged, as canonical JSON: equal for equal judgements."""
        return self.model_dump_json(include={"ranks", "tags", "note", "ideal"})


class StoreError(SetupError):
    """The file of judgements cannot be used now: gone, empty, another one, locked, damaged, no room. Nothing was
    written.
    """


class Conflict(ValueError):
    """The prompt was judged or corrected elsewhere in the meantime; `current` is the judgement that stands (or
    None).
    """

    def __init__(self, current: dict | None):
        super().__init__("this prompt was saved elsewhere in the meantime")
        self.current = current


def dense(ranks: list[int]) -> list[int]:
    """The same order and ties without gaps: [1, 4, 4, 9] -> [1, 2, 2, 3]."""
    places = {rank: n for n, rank in enumerate(sorted(set(ranks)), 1)}
    return [places[rank] for rank in ranks]


def read_rows(paths: list[str]) -> list[dict]:
    """Rows `prompt, completions[, models][, id]` of files or stage folders; `SetupError` names every broken row."""
    rows, wrong = [], []
    for path in map(Path, paths):
        if path.is_dir():
            if not (path / "samples.jsonl").is_file():
                raise SetupError(
                    f"{path}: no samples.jsonl in this folder; name a stage of kind sample, or a file of rows"
                )
            path = path / "samples.jsonl"
        for where, raw in sources.read({"path": str(path)}):
            try:
                rows.append(_row(raw))
            except errors.DataError as error:
                wrong.append(f"{where}: {error}")
    if wrong:
        more = [f"… and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        raise SetupError("\n  ".join(["rows that cannot be ranked:", *wrong[:SHOWN], *more]))
    if not rows:
        raise SetupError(f"{', '.join(paths)}: no rows")
    return rows


def _row(raw: dict) -> dict:
    completions, models = raw.get("completions"), raw.get("models")
    if not isinstance(completions, list):
        raise errors.DataError(
            f"no list `completions` of answers to one prompt; the row has {', '.join(raw) or 'nothing'}"
        )
    if len(completions) > MOST:
        raise errors.DataError(f"{len(completions)} completions: the page ranks at most {MOST}")
    row = normalise(raw, "samples")
    if len(set(row["completions"])) < 2:
        raise errors.DataError("all completions are the same answer: there is nothing to rank")
    out = {"prompt": row["prompt"], "completions": row["completions"]}
    return out | ({"models": models} if models else {}) | ({"id": raw["id"]} if raw.get("id") is not None else {})


class Store:
    """Prompts and judgements in the SQLite file `path`, made where there is none, readable by its owner only.

    Every call opens the file anew and looks whether it still is the one of the first call: a file that is moved away,
    emptied or replaced meanwhile is a `StoreError`, and a judgement is never written into a file without a name. Any
    thread may call.
    """

    def __init__(self, path: str | Path):
        self.path, self.token = Path(path), ""
        if not self.path.exists():
            self._make()
        with self._open() as db:
            damage = [row[0] for row in db.execute("PRAGMA quick_check(3)")]
            # The token is kept: a page that is open when the server dies goes on when the server is back.
            token = db.execute("SELECT value FROM meta WHERE name = 'token'").fetchone()
        if damage != ["ok"] or token is None:
            raise StoreError(
                f"{self.path}: this store of judgements is damaged "
                f"({'; '.join(damage) if damage != ['ok'] else 'no token'}). "
                f"Put a copy of it back, or read out what is left: sqlite3 {self.path} .recover | sqlite3 mended.db"
            )
        self.token: str = token[0]

    def _make(self) -> None:
        """The file appears under its name with its tables and token inside, or not at all."""
        fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))  # it holds the page's token
            with contextlib.closing(sqlite3.connect(fresh)) as db, db:
                db.executescript(PRAGMAS + SCHEMA)
                db.execute("INSERT INTO meta VALUES ('token', ?)", [secrets.token_hex(16)])
            with contextlib.suppress(FileExistsError):  # another server made it in the same moment
                os.link(fresh, self.path)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{self.path}: cannot be made as a store of judgements: {error}") from error
        finally:
            fresh.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection for one call, committed at its end. Raises `StoreError` for whatever is wrong with the file."""
        try:
            if not self.path.is_file():
                raise StoreError(
                    f"{self.path}: the store of judgements is gone: moved, renamed or deleted. Put it back; "
                    "what was saved is in it."
                )
            if self.path.stat().st_size == 0:
                raise StoreError(
                    f"{self.path}: the store of judgements is empty (0 bytes). Something cut it short: put a copy of "
                    "it "
                    "back, or delete the file to begin anew."
                )
            address = f"file:{quote(str(self.path.absolute()))}?mode=rw"  # never makes a file
            with contextlib.closing(sqlite3.connect(address, uri=True, timeout=WAIT)) as db, db:
                db.row_factory = sqlite3.Row
                db.executescript(PRAGMAS)
                self._check(db)
                yield db
        except sqlite3.IntegrityError:
            raise  # a rule of the tables, for `save`
        except (OSError, sqlite3.Error) as error:
            told = "another program holds it locked" if "locked" in str(error) else str(error)
            raise StoreError(f"{self.path}: the store of judgements cannot be used now: {told}.") from error

    def _check(self, db: sqlite3.Connection) -> None:
        names = {row[0] for row in db.execute("SELECT name FROM sqlite_master")}
        if not names >= PARTS:
            found = ", ".join(sorted(names)[:5]) or "nothing"
            raise StoreError(
                f"{self.path}: a database of something else (it holds {found}), not a store of judgements."
            )
        token = db.execute("SELECT value FROM meta WHERE name = 'token'").fetchone()
        if self.token and (token is None or token[0] != self.token):
            raise StoreError(
                f"{self.path}: another store of judgements than at the start of this server lies here. Put the right "
                "one "
                "back, or restart the server."
            )

    def add(self, rows: list[dict]) -> list[str]:
        """Take in rows of `read_rows`; returns their keys, in order, equal rows once. A row already known is kept."""
        keys = {}
        for row in rows:
            same = [row["prompt"], row["completions"], row.get("models")]
            key = hashlib.blake2b(json.dumps(same).encode(), digest_size=10).hexdigest()
            keys.setdefault(key, row)
        with self._open() as db:
            for key, row in keys.items():
                db.execute("INSERT OR IGNORE INTO items (key, row) VALUES (?, ?)", [key, json.dumps(row)])
        return list(keys)

    def add_tags(self, tags: list[str]) -> list[str]:
        """Tags accumulate, so that an older judgement can always be shown and corrected; returns all of them."""
        for tag in tags:
            try:
                TypeAdapter(Name).validate_python(tag)
            except ValidationError:
                raise SetupError(
                    f"--tags: {tag!a} cannot be a tag: at most 64 characters, no control characters"
                ) from None
        with self._open() as db:
            known = db.execute("SELECT value FROM meta WHERE name = 'tags'").fetchone()
            merged = list(dict.fromkeys([*(json.loads(known[0]) if known else TAGS), *tags]))
            db.execute("INSERT OR REPLACE INTO meta VALUES ('tags', ?)", [json.dumps(merged)])
        return merged

    def item(self, key: str) -> dict | None:
        """The row with this key."""
        with self._open() as db:
            found = db.execute("SELECT row FROM items WHERE key = ?", [key]).fetchone()
        return json.loads(found[0]) if found else None

    def save(self, judgement: Judgement) -> None:
        """Write a judgement; it is on disk when this returns. The same one again changes nothing.

        `Conflict` where it is not the successor of the judgement that stands for this prompt and labeller.
        """
        j, content = judgement, judgement.content()
        try:
            with self._open() as db:
                db.execute(
                    "INSERT INTO judgements (id, item, labeller, replaces, content, seconds, saved_at) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [j.id, j.item, j.labeller, j.replaces, content, j.seconds, files.now()],
                )
        except sqlite3.IntegrityError:
            with self._open() as db:
                known = db.execute("SELECT * FROM judgements WHERE id = ?", [j.id]).fetchone()
            if known is None or (known["item"], known["labeller"], known["content"]) != (j.item, j.labeller, content):
                raise Conflict(self.current(j.item, j.labeller)) from None

    def current(self, item: str, labeller: str) -> dict | None:
        """The judgement of a labeller that stands for a prompt: id, ranks, tags, note, ideal, seconds."""
        with self._open() as db:
            found = db.execute("SELECT * FROM current WHERE item = ? AND labeller = ?", [item, labeller]).fetchone()
        return _judgement(found) if found else None

    def history(self, labeller: str) -> list[dict]:
        """The standing judgements of a labeller, in the order in which the prompts were first judged."""
        with self._open() as db:
            found = db.execute(
                "SELECT c.* FROM current c JOIN judgements f ON f.item = c.item AND f.labeller = c.labeller "
                "AND f.replaces IS NULL WHERE c.labeller = ? ORDER BY f.number",
                [labeller],
            ).fetchall()
        return [_judgement(row) for row in found]

    def judgements(self) -> Iterator[dict]:
        """Every standing judgement with its prompt, completions, models and id, by prompt and then labeller."""
        with self._open() as db:
            found = db.execute(
                "SELECT c.*, i.row FROM current c JOIN items i ON i.key = c.item ORDER BY i.number, c.labeller"
            ).fetchall()
        for row in found:
            yield json.loads(row["row"]) | _judgement(row)

    def rankings(self) -> Iterator[dict]:
        """Rows for the stage `reward` (and for `datasets.Dataset.from_list`): one for each ranking of each labeller."""
        for j in self.judgements():
            if j["ranks"] is not None:
                row = {name: j[name] for name in ("prompt", "completions", "ranks", "tags", "labeller", "note")}
                yield row | {name: j[name] for name in ("models", "id") if name in j}

    def ideals(self) -> Iterator[dict]:
        """Rows for the stage `sft`: the answers that labellers wrote themselves."""
        for j in self.judgements():
            if j["ideal"].strip():
                yield {"prompt": j["prompt"], "completion": j["ideal"].strip(), "labeller": j["labeller"]}

    def labellers(self) -> list[str]:
        """Everybody who has judged something, in order of arrival."""
        with self._open() as db:
            found = db.execute("SELECT labeller FROM judgements GROUP BY labeller ORDER BY min(number)").fetchall()
        return [row[0] for row in found]

    def ranked_by(self) -> dict[str, set[str]]:
        """For every prompt that somebody has ranked (not skipped) who did."""
        with self._open() as db:
            found = db.execute("SELECT item, labeller, content FROM current").fetchall()
        by: dict[str, set[str]] = {}
        for row in found:
            if json.loads(row["content"])["ranks"] is not None:
                by.setdefault(row["item"], set()).add(row["labeller"])
        return by


def take_in(store: Store, keys: list[str], rankings: list[dict]) -> tuple[int, int]:
    """Save rankings from a file (a judge's, or an export) under their labellers' names: `(saved, about other answers)`.

    Every ranking has `where`. The same one again changes nothing; another one by the same labeller of the same prompt
    replaces it.
    """
    same = lambda row: json.dumps([row["prompt"], sorted(row["completions"], key=json.dumps)])
    known = {same(item): (key, item["completions"]) for key in keys if (item := store.item(key))}
    ours = [row for row in rankings if same(row) in known]
    store.add_tags(sorted({tag for row in ours for tags in row.get("tags") or [] for tag in tags}))
    for row in ours:
        key, shown = known[same(row)]
        place = {answer: i for i, answer in enumerate(row["completions"])}
        ranks = dense([row["ranks"][place[answer]] for answer in shown])
        tags = [(row.get("tags") or [[]] * len(shown))[place[answer]] for answer in shown]
        labeller = row.get("labeller") or "imported"
        standing = store.current(key, labeller)
        if standing is None or (standing["ranks"], standing["tags"]) != (ranks, tags):
            before = standing["judgement"] if standing else None
            word = json.dumps([labeller, key, ranks, tags, before])
            name = f"imported-{hashlib.blake2b(word.encode(), digest_size=12).hexdigest()}"
            try:
                judgement = Judgement(id=name, item=key, labeller=labeller, ranks=ranks, tags=tags, replaces=before)
            except ValidationError as error:
                what = error.errors()[0]
                raise errors.DataError(f"{row['where']}: {what['loc'][0]}: {what['msg']}") from None
            store.save(judgement)
    return len(ours), len(rankings) - len(ours)


def _judgement(row: sqlite3.Row) -> dict:
    kept = {name: row[name] for name in ("item", "labeller", "saved_at")}
    # Older versions took any number of seconds; what is no length of time is not known.
    kept["seconds"] = row["seconds"] if isinstance(row["seconds"], float) and math.isfinite(row["seconds"]) else None
    return kept | json.loads(row["content"]) | {"judgement": row["id"]}
