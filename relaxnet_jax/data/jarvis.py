"""Download and import of JARVIS-DFT's raw VASP archives, from the index on figshare to a store.

jarvis-tools gives the address of the index (``raw_files`` in `jarvis.db.figshare.get_db_info`). The
index is a zip with one JSON object, ``{category: [{"name": "JVASP-39.zip", "download_url": …, "size":
…, "computed_md5": …}, …]}``; entries that are not objects are ignored, as in jarvis-tools. The
category "DFT-SCF" holds the geometry optimisations (POSCAR, INCAR, KPOINTS, OSZICAR, vasprun.xml);
the others hold band structures, optics, elastic constants and so on.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin

from relaxnet_jax.data.download import Policy, fetch, verify_zip
from relaxnet_jax.data.files import atomic_path, one_line
from relaxnet_jax.data.importing import ImportReport, import_files
from relaxnet_jax.data.sources import DAMAGE
from relaxnet_jax.errors import InputError

RELAXATIONS = "DFT-SCF"
_SAFE = re.compile(r"[A-Za-z0-9][\w.+@-]*\.zip")
_MD5 = re.compile(r"[0-9a-fA-F]{32}")


class Archive(NamedTuple):
    """An archive listed in the index.

    Attributes:
      id: material, e.g. "JVASP-39".
      name: file name.
      url: address.
      size: size in bytes, None if the index does not state it.
      md5: MD5 sum in hexadecimal, None if the index does not state it.
    """

    id: str
    name: str
    url: str
    size: int | None
    md5: str | None


@dataclasses.dataclass(frozen=True)
class JarvisReport:
    """Outcome of `fetch_jarvis`.

    Attributes:
      came: number of archives that are there.
      failed: reason for each archive that could not be downloaded, by name.
      skipped: reason for each archive that was not tried, by name (by id if not in the index).
      manifest: path of the manifest, which records all of this by archive.
      imported: outcome of the import.
    """

    came: int
    failed: dict[str, str]
    skipped: dict[str, str]
    manifest: Path
    imported: ImportReport


class Manifest:
    """A file of JSON lines, one for each archive.

    Their fields are ``name``, ``id``, ``status`` ("came", "failed" or "skipped"), ``reason`` or
    ``how``, ``url``, ``bytes``, and ``not_read`` for relaxations that could not be imported.

    Lines are appended as things happen; a later line overrides an earlier one of the same name, and
    `compact` leaves one per archive. A line truncated by an interruption is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[str, dict[str, Any]] = {}
        self._torn = False
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            self._torn = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                try:
                    entry = json.loads(line)
                    self.lines[str(entry["name"])] = entry
                except (ValueError, TypeError, KeyError):
                    continue

    def add(self, name: str, **fields: Any) -> None:
        """Records the status of an archive.

        Raises:
          InputError: the file cannot be written.
        """
        self.lines[name] = {"name": name, **fields}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * self._torn + json.dumps(self.lines[name]) + "\n")
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}): choose another output path"
            ) from error
        self._torn = False

    def compact(self) -> None:
        """Rewrites the file with one line per archive."""
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines.values()))


def fetch_jarvis(
    out: str | os.PathLike[str],
    ids: Sequence[str] | None = None,
    limit: int | None = None,
    downloads: str | os.PathLike[str] | None = None,
    index: str | None = None,
    category: str = RELAXATIONS,
    report: Callable[[str], None] | None = None,
    policy: Policy | None = None,
    *,
    jobs: int | None = 1,
    scheduler: str | None = None,
) -> JarvisReport:
    """Downloads raw archives of JARVIS-DFT and imports their relaxations into a store.

    Archives that are there and sound are not downloaded again, so repeating an interrupted call
    resumes it. An archive that cannot be downloaded never stops the others.

    Args:
      out: the store to write, ending in .h5; an existing one is replaced (the command refuses that
        without --overwrite). The manifest ``NAME.manifest.jsonl`` is beside it.
      ids: materials such as "JVASP-39"; all by default.
      limit: largest number of archives.
      downloads: folder for the archives, by default ``NAME-downloads`` beside the store.
      index: file or address of the index, by default figshare's; addresses in it may be relative
        to its own.
      category: category of the index.
      report: called with one line for each archive, and by the import.
      policy: how persistently to try, see `Policy`.
      jobs, scheduler: what reads the archives, see `import_files`.

    Raises:
      InputError: the index cannot be obtained or has no such category, no archive could be
        downloaded, or none of them holds a relaxation. In the latter two cases the manifest is
        complete nevertheless.
    """
    say, out = report or (lambda _: None), Path(out)
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: give 1 or more archives")
    folder = Path(downloads) if downloads else out.with_name(f"{out.stem}-downloads")
    content, origin = read_index(index, folder, policy)
    archives, skipped = select(content, category, ids, limit, origin)
    manifest = Manifest(out.with_name(f"{out.stem}.manifest.jsonl"))
    for name, reason in skipped.items():
        manifest.add(name, id=_material(name), status="skipped", reason=reason)
        say(f"{name}: skipped: {reason}")
    known = sum(archive.size or 0 for archive in archives)
    say(f"{len(archives)} archives" + (f", {known / 1e9:.3g} GB" if known else ""))
    here: dict[str, Path] = {}
    failed: dict[str, str] = {}
    for k, archive in enumerate(archives, 1):
        target = folder / category / archive.name
        facts = {"id": archive.id, "url": archive.url}
        try:
            got = fetch(archive.url, target, verify_zip, archive.size, archive.md5, policy)
        except InputError as error:
            reason = failed[archive.name] = str(error).removeprefix(f"{archive.url}: ")
            manifest.add(archive.name, **facts, status="failed", reason=reason)
            say(f"{k}/{len(archives)} {archive.name}: failed: {reason}")
        else:
            here[archive.name] = target
            manifest.add(archive.name, **facts, status="came", how=got.how, bytes=got.size)
            say(f"{k}/{len(archives)} {archive.name}: {got.how}")
    try:
        if not here:
            reasons = {**skipped, **failed}
            name = next(iter(reasons), category)
            others = f" (nor could the other {len(reasons) - 1} be fetched)" * (len(reasons) > 1)
            raise InputError(
                f"{name}: {reasons.get(name, 'no archives in the index')}{others}: "
                f"see {manifest.path}"
            )
        imported = import_files(list(here.values()), out, say, jobs=jobs, scheduler=scheduler)
        names = {str(path): name for name, path in here.items()}
        for file, id, why in imported.skipped:
            line = manifest.lines[names[file]]
            line.setdefault("not_read", []).append(f"{id}: {why}" if id else why)
    finally:
        manifest.compact()
    return JarvisReport(len(here), failed, skipped, manifest.path, imported)


def read_index(
    source: str | None, folder: Path, policy: Policy | None = None
) -> tuple[dict[str, Any], str]:
    """Returns the index and its address ("" for a file); a downloaded one is kept in ``folder``.

    Args:
      source: file or address of a JSON file, possibly in zip or gzip form; None for figshare's.

    Raises:
      InputError: it cannot be obtained, or is not an index.
    """
    if source is None:
        from jarvis.db.figshare import get_db_info

        source = str(get_db_info()["raw_files"][0])
    if not source.lower().startswith(("http://", "https://")):
        path = Path(source)
        if not path.is_file():
            raise InputError(f"{source}: no such index: give a file or an address")
        try:
            return _parsed(path), ""
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    # One file per address, since mirrors may hold different versions.
    tag = hashlib.sha256(source.encode()).hexdigest()[:8]
    path = folder / f"index-{tag}.json"
    fetch(source, path, _verify_index, policy=policy)
    return _parsed(path), source


def _verify_index(path: Path) -> None:
    _parsed(path)


def _parsed(path: Path) -> dict[str, Any]:
    """The index in a file; raises InputError, which does not name the file, if it is not one."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                names = [name for name in packed.namelist() if name.endswith(".json")]
                data = packed.read(names[0]) if len(names) == 1 else b""
        else:
            data = path.read_bytes()
            data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        index = json.loads(data)
    except (*DAMAGE, ValueError, RuntimeError, RecursionError) as error:
        raise InputError(f"not an index ({one_line(error)}): fetch it again") from error
    if not isinstance(index, dict) or not any(isinstance(v, list) for v in index.values()):
        raise InputError("not an index of raw files: give one with lists by category")
    return index


def select(
    index: dict[str, Any],
    category: str,
    ids: Sequence[str] | None = None,
    limit: int | None = None,
    origin: str = "",
) -> tuple[list[Archive], dict[str, str]]:
    """Selects archives of an index.

    Returns:
      The archives to download, and by name the reason why others are skipped.

    Raises:
      InputError: there is no such category.
    """
    entries = index.get(category)
    if not isinstance(entries, list):
        raise InputError(f"index: no category {category!r}: use one of {', '.join(index)}")
    wanted = None if ids is None else set(ids)
    archives: dict[str, Archive] = {}
    skipped: dict[str, str] = {}
    found = set()
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        name, url = entry.get("name"), entry.get("download_url")
        material = _material(str(name))
        if wanted is not None and material not in wanted:
            continue
        found.add(material)
        if not isinstance(name, str) or not _SAFE.fullmatch(name) or not isinstance(url, str):
            skipped[str(name)] = "not a zip archive with an address"
        elif name not in archives:
            size, md5 = entry.get("size"), str(entry.get("computed_md5") or "")
            archives[name] = Archive(
                material,
                name,
                urljoin(origin, url),
                size if isinstance(size, int) and size > 0 else None,
                md5 if _MD5.fullmatch(md5) else None,
            )
        elif urljoin(origin, url) != archives[name].url:
            skipped[f"{name} ({url})"] = "another archive of this name comes first"
    for missing in [] if ids is None else [id for id in ids if id not in found]:
        skipped[missing] = f"not in the index under {category}"
    return list(archives.values())[:limit], skipped


def _material(name: str) -> str:
    """Material of an archive: "JVASP-39" for "JVASP-39.zip" and "JVASP-39_Negative.zip"."""
    return name.split(" ")[0].split("_")[0].removesuffix(".zip")


def read_ids(text: str) -> list[str]:
    """Reads ids from a file with one per line, or from comma-separated text.

    Raises:
      InputError: there are no ids, or the file cannot be read.
    """
    given = text
    # Not Path.is_file, which may raise if a list of ids is too long for a file name.
    if os.path.isfile(given):
        try:
            text = Path(given).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{given}: cannot be read: give a text file with one id per line"
            ) from error
    ids = [id for id in re.split(r"[,\s]+", text) if id]
    if not ids:
        raise InputError(f"--ids {given!r}: no ids: name them like JVASP-39,JVASP-1002")
    return list(dict.fromkeys(ids))
