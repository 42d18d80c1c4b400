"""The commit that results name."""

import os
import subprocess

import pytest

from srlib import machine


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout inside another repository, and the environment of a git hook that runs in a third one."""
    monkeypatch.delenv("SRLIB_COMMIT", raising=False)
    for folder in ("outer", "outer/checkout", "third"):
        git(tmp_path, "init", "-q", folder)
        git(tmp_path / folder, "commit", "-q", "--allow-empty", "-m", folder)
    (tmp_path / "outer" / "checkout" / "file").write_text("1")
    git(tmp_path / "outer" / "checkout", "add", "file")
    git(tmp_path / "outer" / "checkout", "commit", "-q", "-m", "file")
    monkeypatch.setattr(machine, "ROOT", tmp_path / "outer" / "checkout")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "third" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "third"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "third" / ".git" / "index"))
    return tmp_path / "outer" / "checkout"


def git(folder, *command):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    someone = ["-c", "user.name=Someone", "-c", "user.email=someone@example.invalid"]
    done = subprocess.run(
        ["git", *someone, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_commit_is_this_checkout_s(checkout, monkeypatch):
    own = git(checkout, "rev-parse", "HEAD")
    assert machine.commit() == (own, False)
    monkeypatch.setenv("SRLIB_COMMIT", "0" * 40)  # of a copy that was sent elsewhere from here
    assert machine.commit() == (own, False)
    (checkout / "file").write_text("2")
    assert machine.commit() == (own, True)


def test_a_copy_without_git_names_the_commit_that_it_was_given(checkout, monkeypatch):
    (checkout / ".git").rename(checkout / "away")
    assert machine.commit() == ("unknown", False)
    monkeypatch.setenv("SRLIB_COMMIT", "0" * 40)
    assert machine.commit() == ("0" * 40, False)
    assert machine.describe()["commit"] == "0" * 40


def test_a_broken_git_folder_is_not_looked_past(checkout):
    (checkout / ".git" / "HEAD").unlink()
    assert machine.commit() == ("unknown", False)
