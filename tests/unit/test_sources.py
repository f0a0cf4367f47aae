"""Sources: which kind a path is, and folders whose every file is listed once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
from fuzz.archives import Entry, build

from flux_ft.config import SourceConfig
from flux_ft.data import folder, sources
from flux_ft.data.archive import ZipSource
from flux_ft.data.folder import FolderSource
from flux_ft.data.sources import open_source
from flux_ft.errors import DataError

POSIX = pytest.mark.skipif(os.name == "nt", reason="POSIX file systems only")
NOT_ROOT = pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may read everything")


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def listed(root):
    return {found.name: found.skip for found in FolderSource(root, "set").files()}


def refusal(path, **settings):
    with pytest.raises(DataError) as caught:
        open_source(SourceConfig(path=str(path), **settings))
    assert caught.value.hint
    return caught.value


class TestFolder:
    def test_every_file_once_sorted_by_name(self, tmp_path):
        put(
            tmp_path,
            "b.png",
            "a/z.png",
            "a.png",
            "a/deep/er/y.txt",
            "B.png",
            "猫/x",
            "a-b.png",
            "archive.ZIP",
            "Thumbs.db",
        )
        put(tmp_path, ".hidden.png", "a/.DS_Store", ".git/config", "a/__MACOSX/._z.png", "__MACOSX", "dir/desktop.ini")
        (tmp_path / "empty").mkdir()
        names = [found.name for found in FolderSource(tmp_path, "set").files()]
        assert names == sorted(names)
        assert listed(tmp_path) == {
            ".git/": "hidden folder, not entered",
            ".hidden.png": "hidden file",
            "B.png": None,
            "Thumbs.db": "system file",
            "__MACOSX": None,
            "a-b.png": None,
            "a.png": None,
            "a/.DS_Store": "hidden file",
            "a/__MACOSX/": "macOS resource folder, not entered",
            "a/deep/er/y.txt": None,
            "a/z.png": None,
            "archive.ZIP": "an archive in a folder is not opened; name it as a source of its own",
            "b.png": None,
            "dir/desktop.ini": "system file",
            "猫/x": None,
        }

    def test_read_gives_the_bytes_of_listed_files(self, tmp_path):
        put(tmp_path, "a/é.png", "b.png")
        source = FolderSource(tmp_path, "set")
        assert {one.name: source.read(one.name) for one in source.files()} == {
            name: name.encode() for name in ("a/é.png", "b.png")
        }

    def test_read_stays_inside(self, tmp_path):
        put(tmp_path, "in/a.png", "out.png", "in2/b.png")
        source = FolderSource(tmp_path / "in", "set")
        for name in ("../out.png", "a/../../out.png", str(tmp_path / "out.png"), "", ".", "../in2/b.png"):
            with pytest.raises(DataError, match="cannot be read: not inside the folder"):
                source.read(name)
        with pytest.raises(DataError, match="cannot be read: "):
            source.read("a\0.png")
        with pytest.raises(DataError, match="cannot be read: No such file or directory"):
            source.read("gone.png")
        with pytest.raises(DataError, match="cannot be read: "):
            FolderSource(tmp_path, "set").read("in")

    def test_files_that_are_too_large_are_told(self, tmp_path):
        with (put(tmp_path, "a.png") / "a.png").open("r+b") as file:
            file.truncate(folder.MAX_FILE_BYTES + 2**20)
        with pytest.raises(DataError, match="has 257 MiB; files up to 256 MiB are read"):
            FolderSource(tmp_path, "set").read("a.png")

    @POSIX
    def test_links_and_pipes(self, tmp_path):
        root = put(tmp_path / "set", "sub/a.png")
        put(tmp_path, "elsewhere.png")
        (root / "loop").symlink_to(root, target_is_directory=True)
        (root / "self").symlink_to(root / "self")
        (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
        (root / "linked.png").symlink_to(tmp_path / "elsewhere.png")
        os.mkfifo(root / "pipe.png")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(root / "socket.png"))
        assert listed(root) == {
            "gone.png": "cannot be read: No such file or directory",
            "linked.png": None,
            "loop/": "link to a folder, not followed",
            "pipe.png": "not a regular file",
            "self": "cannot be read: Too many levels of symbolic links",
            "socket.png": "not a regular file",
            "sub/a.png": None,
        }
        source = FolderSource(root, "set")
        assert source.read("linked.png") == b"elsewhere.png"
        # A file that was replaced by a pipe after it was listed must not be waited for.
        with pytest.raises(DataError, match="cannot be read: not a regular file"):
            source.read("pipe.png")

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
    def test_names_that_are_not_text(self, tmp_path):
        with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"), "wb") as file:
            file.write(b"picture")
        put(tmp_path, "line\nbreak.png", "back\\slash.png", "C:x.png")
        source = FolderSource(tmp_path, "set")
        names = [found.name for found in source.files()]
        assert sorted(names) == sorted(["C:x.png", "back\\slash.png", "caf\udce9.png", "line\nbreak.png"])
        assert source.read("caf\udce9.png") == b"picture"
        assert all(source.read(name) for name in names)

    @POSIX
    @NOT_ROOT
    def test_folders_that_cannot_be_entered(self, tmp_path):
        put(tmp_path, "a.png", "shut/b.png")
        (tmp_path / "shut").chmod(0)
        try:
            assert listed(tmp_path) == {"a.png": None, "shut/": "folder cannot be read: Permission denied"}
        finally:
            (tmp_path / "shut").chmod(0o700)

    def test_a_folder_that_vanishes_is_told(self, tmp_path, monkeypatch):
        put(tmp_path, "a.png", "gone/b.png")
        scan = os.scandir

        def vanishing(path):
            if path.endswith("gone/"):
                raise FileNotFoundError(2, "No such file or directory")
            return scan(path)

        monkeypatch.setattr(os, "scandir", vanishing)
        assert listed(tmp_path) == {"a.png": None, "gone/": "folder cannot be read: No such file or directory"}

    def test_a_root_that_cannot_be_read_is_refused(self, tmp_path, monkeypatch):
        source = FolderSource(put(tmp_path, "a.png"), "set")

        def denied(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "scandir", denied)
        with pytest.raises(DataError, match="`set` cannot be read: Permission denied"):
            source.files()

    def test_junctions_of_windows_are_links(self):
        tag = types.SimpleNamespace(st_reparse_tag=0xA0000003)
        entry = types.SimpleNamespace(name="x", is_symlink=lambda: False, stat=lambda follow_symlinks: tag)
        assert folder._why_not_entered(entry) == "link to a folder, not followed"

    def test_a_file_that_shrinks_or_grows_while_it_is_read_is_told(self, tmp_path, monkeypatch):
        source = FolderSource(put(tmp_path, "a.png"), "set")
        status = os.stat(tmp_path / "a.png")
        for size in (status.st_size - 1, status.st_size + 1):
            seen = types.SimpleNamespace(st_size=size, st_mode=status.st_mode)
            monkeypatch.setattr(os, "fstat", lambda _, seen=seen: seen)
            with pytest.raises(DataError, match="its length changed meanwhile"):
                source.read("a.png")

    def test_stamps_follow_the_file(self, tmp_path):
        put(tmp_path, "a.png", "b.png")

        def stamps():
            return [found.stamp for found in FolderSource(tmp_path, "set").files()]

        first = stamps()
        status = os.stat(tmp_path / "a.png")
        assert first[0] == f"{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"
        assert stamps() == first
        os.utime(tmp_path / "a.png", ns=(0, 1))
        assert stamps()[0] != first[0]
        assert stamps()[1] == first[1]

    def test_identity_is_one_for_all_ways_to_write_it(self, tmp_path, monkeypatch):
        put(tmp_path, "set/a.png")
        monkeypatch.chdir(tmp_path)
        ways = ("set", "./set/", "set/../set", str(tmp_path / "set"))
        assert {FolderSource(way, way).identity for way in ways} == {os.path.realpath(tmp_path / "set")}

    def test_empty_folders_are_refused(self, tmp_path):
        (tmp_path / "sub").mkdir()
        with pytest.raises(DataError, match="`set` is empty") as caught:
            FolderSource(tmp_path, "set").files()
        assert caught.value.hint


class TestOpening:
    def test_the_kind_follows_from_path_and_content(self, tmp_path, monkeypatch):
        hub = types.ModuleType("flux_ft.data.hub")
        hub.open_dataset = lambda config: f"dataset {os.path.basename(config.path)}"
        monkeypatch.setitem(sys.modules, "flux_ft.data.hub", hub)
        archive = build([Entry(b"a.png", b"x")])
        put(tmp_path, "folder/a.png", "shards/README.md", "shards/data/0.parquet", "shards/.gitattributes", "x.parquet")
        put(tmp_path, "saved/dataset_info.json", "saved/state.json", "saved/data.arrow", "dict/dataset_dict.json")
        put(tmp_path, "mixed/0.parquet", "mixed/a.png", "folder.zip/a.png", "state/state.json", "state/a.png")
        (tmp_path / "pics.ZIP").write_bytes(archive)
        (tmp_path / "upload").write_bytes(archive)
        (tmp_path / "none").mkdir()
        kinds = {}
        for name in os.listdir(tmp_path):
            found = open_source(SourceConfig(path=str(tmp_path / name)))
            kinds[name] = found if isinstance(found, str) else type(found)
            assert isinstance(found, str) or (found.label == str(tmp_path / name) and not found.rows)
        assert kinds == {
            "folder": FolderSource,
            "folder.zip": FolderSource,
            "mixed": FolderSource,
            "state": FolderSource,
            "none": FolderSource,
            "pics.ZIP": ZipSource,
            "upload": ZipSource,
            "x.parquet": "dataset x.parquet",
            "shards": "dataset shards",
            "saved": "dataset saved",
            "dict": "dataset dict",
        }
        assert open_source(SourceConfig(path="hf:owner/name")) == "dataset name"

    def test_what_is_not_there_is_told_with_what_is(self, tmp_path, monkeypatch):
        put(tmp_path, "Pictures/cats/a.png", "dogs.zip")
        error = refusal(tmp_path / "pictures" / "cats")
        assert error.message.endswith("cats`: no such file or folder")
        assert error.hint == f"did you mean `{tmp_path / 'Pictures'}`?"
        assert refusal(tmp_path / "dog.zip").hint == f"did you mean `{tmp_path / 'dogs.zip'}`?"
        assert refusal(tmp_path / "dogs.zip" / "a.png").hint == f"did you mean `{tmp_path / 'dogs.zip'}`?"
        assert refusal(tmp_path / "qqq").hint.startswith("give a folder or ZIP of pictures")
        monkeypatch.chdir(tmp_path)
        assert "Pictures" in refusal("picture").hint
        assert "no such file or folder" in refusal("n" * 200 + "/x").message
        assert "cannot be read" in refusal("n" * 300).message
        assert "cannot be read" in refusal("a\0b").message

    def test_other_files_are_refused(self, tmp_path):
        put(tmp_path, "a.png", "a.rar", "a.zip")
        assert refusal(tmp_path / "a.png").message.endswith("a.png` is a file, not a folder or ZIP")
        assert refusal(tmp_path / "a.rar").message.endswith("of archives, only ZIP is read")
        assert refusal(tmp_path / "a.zip").message.endswith("this is not a ZIP")
        with pytest.raises(DataError, match="is not a folder"):
            FolderSource(tmp_path / "a.png", "a.png")

    @POSIX
    def test_a_pipe_is_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        os.mkfifo(tmp_path / "pipe.zip")
        assert "not a regular file" in refusal(tmp_path / "pipe").message
        assert "not a regular file" in refusal(tmp_path / "pipe.zip").message


def test_the_folder_of_a_run_among_the_pictures_is_not_entered(tmp_path):
    for name in ("a.png", "runs/one/run.yaml", "runs/one/metrics.jsonl", "runs/one/previews/0.png", "b/run.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {one.name: one.skip for one in FolderSource(tmp_path, "x").files()}
    assert found == {"a.png": None, "b/run.yaml": None, "runs/one/": "folder of a run, not entered"}


def test_folders_and_zips_load_nothing_heavy(tmp_path):
    put(tmp_path, "set/a.png")
    (tmp_path / "a.zip").write_bytes(build([Entry(b"a.png", b"x")]))
    script = (
        "import sys\n"
        "from flux_ft.config import SourceConfig\n"
        "from flux_ft.data.sources import open_source\n"
        "for path in ('set', 'a.zip'): assert list(open_source(SourceConfig(path=path)).files())\n"
        "print(sorted({'torch', 'datasets', 'numpy', 'PIL'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sources.__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
