import pytest

from orchestrator.commands import doctor

GIB = 2**30


@pytest.mark.parametrize(
    ("version", "ok"), [("2.59.1", True), ("2.60.0", True), ("2.59.0", False), ("2.9.0", False), (None, None)]
)
def test_versions(version, ok):
    check = doctor.version_check("ray", version)
    assert check.ok is ok
    assert bool(check.next_step) is (ok is not True)


def test_a_local_version_of_torch_counts():
    assert doctor.version_check("torch", "2.15.0+cu130").ok


@pytest.mark.parametrize(("free", "ok"), [(GIB // 2, False), (2 * GIB, None), (50 * GIB, True)])
def test_disk(free, ok, tmp_path):
    assert doctor.disk_check(free, tmp_path).ok is ok


@pytest.mark.parametrize(("free", "ok"), [(64 * 2**20, None), (GIB, True)])
def test_shared_memory(free, ok):
    assert doctor.shm_check(free).ok is ok


def test_without_a_compiler(tmp_path):
    check = doctor.compiler_check({"PATH": str(tmp_path)})
    assert check.ok is False
    assert "apt install g++" in check.next_step


def test_the_compiler_that_was_chosen(tmp_path):
    program = tmp_path / "my-c++"
    program.touch(mode=0o755)
    assert doctor.compiler_check({"PATH": str(tmp_path), "CXX": "my-c++ -O2"}).ok


def test_without_pythons_headers(tmp_path):
    assert doctor.headers_check(tmp_path).ok is False
    (tmp_path / "Python.h").touch()
    assert doctor.headers_check(tmp_path).ok


def test_old_pythons():
    assert doctor.python_check((3, 10, 4)).ok is False
    assert doctor.python_check((3, 11, 0)).ok


def test_what_is_not_set_is_no_failure():
    assert doctor.store_check(None).ok is None
    assert doctor.ray_check(None).ok is None


def test_a_name_that_is_no_store():
    check = doctor.store_check("/some/folder")
    assert check.ok is False
    assert "s3://bucket/prefix" in check.next_step
