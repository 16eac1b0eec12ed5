"""A real PostgreSQL for tests, started in a temporary folder, and what its tests share."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

PASSWORD = "s3cr€t#word"
QUOTED = "s3cr%E2%82%ACt%23word"
FOUND = (shutil.which("postgres"), *sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres")))
BINARIES = [Path(path).resolve().parent for path in FOUND if path]


class Server:
    """A PostgreSQL of our own, in a temporary folder, run by a user who is not root."""

    def __init__(self) -> None:
        self.bin = next(path for path in BINARIES if (path / "initdb").exists())
        self.folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
        self.port = free_port()
        (self.folder / "pw").write_text(PASSWORD)
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres")
            shutil.chown(self.folder / "pw", "postgres")
        data = str(self.folder / "data")
        self.call("initdb", "-D", data, "-U", "nas", "--pwfile", str(self.folder / "pw"), "-A", "scram-sha-256", "-N")
        self.start()

    def call(self, program, *arguments):
        before = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        subprocess.run([*before, str(self.bin / program), *arguments], check=True, stdout=subprocess.DEVNULL, cwd="/")

    def start(self):
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -F"
        arguments = ("-D", str(self.folder / "data"), "-o", options, "-l", str(self.folder / "log"), "-w", "start")
        self.call("pg_ctl", *arguments)

    def stop(self):
        self.call("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")  # no goodbye: a crash

    @property
    def url(self):
        return f"postgresql+psycopg://nas:{QUOTED}@127.0.0.1:{self.port}/postgres"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def postgres_server():
    """Yield a server for a fixture; skips where there is none."""
    pytest.importorskip("psycopg", reason="the driver psycopg is in the extra [postgres]")
    if not BINARIES:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    running = Server()
    yield running
    running.stop()
    shutil.rmtree(running.folder)


def wait_for(truth, process, log):
    for _ in range(12_000):
        if truth():
            return
        assert process.poll() in (None, 0), Path(log.name).read_text()
        time.sleep(0.05)
    raise AssertionError(Path(log.name).read_text())


def assert_no_password(folder, printed):
    """Search every file that a study has left, and all that was printed, for the password."""
    texts = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path, text in {**texts, "output": printed.encode()}.items():
        for word in (PASSWORD.encode(), QUOTED.encode()):
            assert word not in text, path
