"""A file system of a few megabytes, mounted where only processes see it that enter its namespace; it can really be full."""

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

_BLOCK = 4096


class NoSmallDiskError(Exception):
    """Nothing may be mounted here."""


class SmallDisk:
    """A tmpfs in a mount namespace of its own, held by a process that sleeps.

    Args:
        folder: The mount point; made if missing.
        size: Its size in bytes.

    Raises:
        NoSmallDiskError: Neither root nor a user with a namespace of their own may mount one.
    """

    def __init__(self, folder, size):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.size = folder, size
        self._user = os.geteuid() != 0
        if not self._hold():
            raise NoSmallDiskError("no tmpfs can be mounted, neither as root nor in a user namespace (unshare -rm)")

    def _hold(self):
        mount = f'mount -t tmpfs -o size={self.size} tmpfs "$0" && echo ready && exec cat'
        words = ["unshare", "-rm" if self._user else "-m", "sh", "-c", mount, str(self.folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:
            self._holder = subprocess.Popen(words, **pipes)
        except OSError:
            return False
        if self._holder.stdout.readline() == b"ready\n":
            return True
        self.close()
        return False

    @property
    def inside(self):
        """The namespaces that a process must enter to see it."""
        return [f"/proc/{self._holder.pid}/ns/{kind}" for kind in (["user", "mnt"] if self._user else ["mnt"])]

    @property
    def path(self):
        """The mounted folder, for those who are not inside."""
        return Path(f"/proc/{self._holder.pid}/root{self.folder}")

    def fill(self):
        """Take all space that is left."""
        with (self.path / "filler").open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(_BLOCK))

    def free(self):
        """Give the space back."""
        (self.path / "filler").unlink()

    def copy_to(self, folder):
        """Copy what it holds to a real folder."""
        shutil.copytree(self.path, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("filler"))

    def close(self):
        """Unmount."""
        self._holder.stdin.close()
        self._holder.wait(10)
