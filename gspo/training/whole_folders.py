"""Folders and files that are on disk whole or not at all, and the proof of it.

step-12.partial/     is being written; a kill leaves it behind, and the next start removes it
step-12/             is whole: every file was on the disk before the folder got its name
step-12.previous/    is what step-12 replaces; if a kill between two renames leaves it alone, it is put back
SHA256SUMS           is in each folder, with the number of its files; `sha256sum -c SHA256SUMS` checks it

A file is never changed once its folder is whole. So equal weights in several folders can be one file on the
disk, with a hard link in each folder.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

CHECKSUMS = "SHA256SUMS"
# Only weights are linked. Smaller files are edited by hand sometimes, and an editor may write into the file
# itself, which would change it in all folders. (safetensors writes a new file.)
LINKED = ".safetensors"


class CannotSave(RuntimeError):
    """Something could not be written: the disk is full, most often."""


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn what libraries raise on a full or broken disk into CannotSave, with a message of one line."""
    try:
        yield
    except CannotSave:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise their own
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise CannotSave(f"cannot write {path}: {reason}") from error


@contextmanager
def whole_folder(target: Path, others: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield a new folder to fill, which takes the target's place when it is complete.

    Args:
        others: whole folders on the same disk. Weights in them that equal new ones take no room of their own.

    Raises:
        CannotSave: it could not be completed; the target is as it was, and nothing else is left.
    """
    partial, previous = (target.with_name(f"{target.name}.{part}") for part in ("partial", "previous"))
    with saving(target):
        try:
            remove(partial)
            partial.mkdir(parents=True)
            yield partial
            _set_usual_modes(partial)
            _write_checksums(partial)
            for path in (partial, *partial.rglob("*")):
                sync(path)
            _share_equal_files(partial, others)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if os.path.lexists(target):
            remove(previous)
            target.rename(previous)
        partial.rename(target)
        sync(target.parent)
        shutil.rmtree(previous, ignore_errors=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file, whole or not at all; text is written in UTF-8. Raises CannotSave."""
    partial = path.with_name(path.name + ".partial")
    with saving(path):
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(partial)
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def recover(parent: Path) -> None:
    """Undo what a kill left half done in a folder.

    A replaced folder whose successor is missing gets its name back; other pieces are removed.
    """
    for previous in parent.glob("*.previous"):
        target = previous.with_suffix("")
        if os.path.lexists(target):
            remove(previous)
        else:
            previous.rename(target)
    for partial in parent.glob("*.partial"):
        remove(partial)


def remove(path: Path) -> None:
    """Remove a folder, a file, or a link without what it points to. A path that does not exist is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def damage(folder: Path, needed: str) -> str | None:
    """Check a folder against its checksums. Returns what is wrong with it, or None.

    needed: a file without which the folder is of no use.
    """
    listed, wrong = _read_checksums(folder)
    if wrong:
        return wrong
    for name in (needed, *listed):
        if name not in listed or not (folder / name).is_file():
            return f"{name} is missing"
    for name, digest in listed.items():
        if _digest(folder / name) != digest:
            return f"{name} is cut short or damaged"
    return None


def listed(folder: Path) -> list[str]:
    """The files that belong to a whole folder, by their names in it."""
    return list(_read_checksums(folder)[0])


def drop_files(folder: Path, names: Sequence[str]) -> None:
    """Take files out of a whole folder, which stays whole if a kill comes in between. Raises CannotSave."""
    listed, wrong = _read_checksums(folder)
    kept = {name: digest for name, digest in listed.items() if name not in names}
    if kept != listed:
        write_whole(folder / CHECKSUMS, _checksum_lines(kept))
    if not wrong:
        for name in names:
            (folder / name).unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_usual_modes(folder: Path) -> None:
    """Give every file the mode that the umask asks for. Some libraries write theirs for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def _share_equal_files(new: Path, others: Sequence[Path]) -> None:
    """Replace weights in other whole folders that equal new ones by links to these.

    The old files give way: the new ones have just been read, while the old ones may be damaged since.
    """
    own = {digest: name for name, digest in _read_checksums(new)[0].items() if name.endswith(LINKED)}
    link = new / "link"
    for other in others:
        for name, digest in _read_checksums(other)[0].items():
            if digest in own:
                with suppress(OSError):  # a disk without hard links keeps the copies
                    os.link(new / own[digest], link)
                    os.replace(link, other / name)
                link.unlink(missing_ok=True)


def _write_checksums(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {path.relative_to(folder).as_posix(): _digest(path) for path in files}
    (folder / CHECKSUMS).write_text(_checksum_lines(listed), encoding="utf-8")


def _read_checksums(folder: Path) -> tuple[dict[str, str], str | None]:
    """The digests that a folder lists, by the files' names; or none, and what is wrong with the list."""
    try:
        header, *lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines() or [""]
    except (OSError, UnicodeDecodeError):
        return {}, f"it has no readable {CHECKSUMS}"
    listed: dict[str, str] = {}
    for line in lines:
        digest, separator, name = line.partition("  ")
        if separator:
            listed[name] = digest
    if header != _header(len(listed)):
        return {}, f"{CHECKSUMS} is cut short or damaged"
    return listed, None


def _checksum_lines(listed: dict[str, str]) -> str:
    lines = [f"{digest}  {name}\n" for name, digest in listed.items()]
    return "".join([_header(len(listed)) + "\n", *lines])


def _header(count: int) -> str:
    """The first line of SHA256SUMS, a comment to sha256sum. It shows when the list was cut short."""
    return f"# {count} files"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
