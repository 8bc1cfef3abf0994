"""Atomic writes: whole or not at all, where links point, with the permissions of a plain open, and nothing left."""

import ast
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import quant2e.files
from quant2e.files import atomic_file, write_text

ROOT = Path(__file__).parents[2]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "one")

    def interrupted():
        with atomic_file(path) as part:
            assert part.suffix == ".txt"
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path.read_text(), names(tmp_path)) == ("one", ["a.txt"])
    write_text(path, "two")
    assert (path.read_text(), names(tmp_path)) == ("two", ["a.txt"])


def test_permissions_are_those_of_a_plain_open(tmp_path, umask):
    new, plain = tmp_path / "new", tmp_path / "plain"
    plain.write_text("")
    write_text(new, "x")
    assert mode(new) == mode(plain) == 0o640
    for there in (0o600, 0o664, 0o444 | stat.S_IWUSR):
        new.chmod(there)
        with atomic_file(new) as part:
            assert mode(part) & ~there == 0  # nobody reads it before it is there who could not read the old one
            part.write_text("y")
        assert mode(new) == there


@pytest.mark.parametrize("dangling", [False, True])
def test_the_file_that_a_link_points_at_is_replaced(tmp_path, dangling):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "model.pt2", tmp_path / "latest"
    link.symlink_to(Path("real") / "model.pt2")
    if not dangling:
        target.write_text("old")
    write_text(link, "new")
    assert link.is_symlink()
    assert (target.read_text(), names(tmp_path / "real")) == ("new", ["model.pt2"])


def loop(folder):
    (folder / "x").symlink_to(folder / "x")
    return folder / "x"


def pipe(folder):
    os.mkfifo(folder / "x")
    return folder / "x"


def folder_there(folder):
    (folder / "x").mkdir()
    return folder / "x"


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (loop, OSError),
        (pipe, OSError),
        (folder_there, IsADirectoryError),
        (lambda folder: folder / "missing" / "x", FileNotFoundError),
        (lambda folder: Path(os.devnull), OSError),
    ],
)
def test_what_cannot_be_a_file_is_told_before_anything_is_written(tmp_path, make, kind):
    path = make(tmp_path)
    before = names(tmp_path)
    with pytest.raises(kind), atomic_file(path):
        pytest.fail("the block runs")
    assert names(tmp_path) == before


def test_a_write_protected_file_is_not_replaced_by_those_who_may_not(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("old")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError), atomic_file(path):
        pytest.fail("the block runs")
    assert names(tmp_path) == ["x"]


DIES = """
import os, signal, sys
from pathlib import Path
from quant2e.files import atomic_file
with atomic_file(Path(sys.argv[1])) as part:
    part.write_text("half of it")
    print(part, flush=True)
    if sys.argv[2] == "now":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def writer(path, when):
    command = [sys.executable, "-c", DIES, str(path), when]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_what_killed_writers_left_is_cleaned_and_what_others_write_is_not(tmp_path):
    dead = writer(tmp_path / "a.pt2", "now")
    left = Path(dead.stdout.readline().strip())
    assert dead.wait() == -signal.SIGKILL
    alive = writer(tmp_path / "b.pt2", "later")
    busy = Path(alive.stdout.readline().strip())
    assert not left.exists()  # the second writer of this folder has cleaned it
    foreign = tmp_path / ".a.tmp123.pt2"
    foreign.write_text("somebody else's")
    lookalike = tmp_path / ".quant2e-folder"
    lookalike.mkdir()
    (tmp_path / ".quant2e-link").symlink_to(foreign)
    write_text(tmp_path / "c.txt", "c")
    assert names(tmp_path) == sorted([busy.name, foreign.name, lookalike.name, ".quant2e-link", "c.txt"])
    alive.communicate("")
    assert alive.returncode == 0
    assert (tmp_path / "b.pt2").read_text() == "half of it"


def test_the_files_of_another_machine_are_cleaned_after_a_day(tmp_path):
    young, old = tmp_path / ".quant2e-0badcafe-1.pt2", tmp_path / ".quant2e-0badcafe-2.pt2"
    young.write_text("")
    old.write_text("")
    os.utime(old, (0, 0))
    write_text(tmp_path / "x", "x")
    assert names(tmp_path) == sorted([young.name, "x"])


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    texts, failed = [str(number) * 50_000 for number in range(8)], []

    def write(text):
        try:
            for _ in range(20):
                write_text(tmp_path / "x", text)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert (tmp_path / "x").read_text() in texts
    assert names(tmp_path) == ["x"]


def test_the_folder_is_flushed_after_the_move(tmp_path, monkeypatch):
    seen = []
    real = os.fsync

    def fsync(handle):
        seen.append((stat.S_ISDIR(os.fstat(handle).st_mode), names(tmp_path)))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "x", "x")
    assert [is_folder for is_folder, _ in seen] == [False, True]
    assert seen[1][1] == ["x"]


def test_long_names_and_no_descriptor_is_left(tmp_path):
    handles = Path("/proc/self/fd")
    before = len(list(handles.iterdir())) if handles.exists() else 0
    for name in ("n" * 250, "n." + "s" * 250):
        write_text(tmp_path / name, "x")
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "x", "x")
    assert before == (len(list(handles.iterdir())) if before else 0)


def test_a_folder_without_locks_keeps_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(quant2e.files, "_locks", None)
    (tmp_path / ".quant2e-0badcafe-1").write_text("")
    write_text(tmp_path / "x", "x")
    assert names(tmp_path) == [".quant2e-0badcafe-1", "x"]


# ------------------------------------------------------------------------------------------------- everybody uses it

WRITES = frozenset({"write_text", "write_bytes", "savez", "savez_compressed", "save", "copyfile", "copy", "copy2"})
MODULES = frozenset({"ir", "np", "shutil"})
"""Modules whose functions take the path, shutil's last, the others' anywhere."""

INSIDE = frozenset({"part", "stream", "weights_part", "again"})
"""What may be written to: what an `atomic_file` gave, by its name in the block and wherever it is handed on."""

PRIVATE = ("quant2e/files.py", "quant2e/observers/native/build.py", "lowering/inductor/package_file.py")
"""The mechanism itself; what a compiler writes, moved by its caller; copies in a temporary folder."""


def written(call):
    """What a call writes to, as text; None for a call that writes no file."""
    function = call.func
    name = getattr(function, "attr", getattr(function, "id", ""))
    texts = [ast.unparse(argument) for argument in call.args]
    owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
    if name == "open":
        mode = "".join(texts[0 if owner else 1 :][:1]) + "".join(ast.unparse(key.value) for key in call.keywords)
        return (owner or texts[0]) if re.match("'[rbt]*[wax+]", mode) else None
    if name == "ZipFile":
        return texts[0] if len(texts) > 1 else None
    if name not in WRITES or (name in ("copy", "save") and owner not in MODULES):
        return None
    return (texts[-1] if owner == "shutil" else " ".join(texts)) if owner in MODULES else owner


@pytest.mark.parametrize("package", ["quant2e", "quantizers", "lowering"])
def test_every_writer_is_atomic(package):
    found = []
    for file in sorted((ROOT / package).rglob("*.py")):
        path = file.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if path not in PRIVATE else ():
            where = written(node) if isinstance(node, ast.Call) else None
            if where is not None and not INSIDE & set(re.findall(r"\w+", where)):
                found.append(f"{path}:{node.lineno} writes to {where}, not to what atomic_file gives")
    assert found == []


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("Path(x).write_text(t)", "Path(x)"),
        ("open(x, 'wb')", "x"),
        ("x.open('a')", "x"),
        ("shutil.copyfile(a, x)", "x"),
        ("zipfile.ZipFile(x, 'w')", "x"),
        ("np.savez(x, a=1)", "x"),
        ("open(x)", None),
        ("x.open('rb')", None),
        ("zipfile.ZipFile(x)", None),
        ("a.copy()", None),
    ],
)
def test_what_counts_as_a_writer(source, where):
    assert written(ast.parse(source).body[0].value) == where
