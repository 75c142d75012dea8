"""Programs that try to leave the sandbox do not, with all layers and with one missing."""

import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megasd.rewards.sandbox import Limits, SandboxError, run
from tests.unit.escapes import ATTACKS, SECRET, program
from tests.unit.rewards.test_sandbox import REPOSITORY, processes_of, wait_until

# Containers have no namespaces, old kernels no Landlock: what is left must hold alone.
LAYERS = {"all layers": (), "no namespaces": ("namespaces",), "no Landlock": ("landlock",)}


class Victim:
    """What a program must not reach: a folder with a secret, a service, the environment."""

    def __init__(self, folder: Path, service: socket.socket) -> None:
        self.folder = folder
        self.port = service.getsockname()[1]
        self.secret = folder / "secret.txt"
        self.secret.write_text(SECRET)
        self.secret.chmod(0o666)  # the layers must protect it, not its owner
        folder.chmod(0o777)
        self.before = self.look()

    def look(self) -> object:
        status = self.secret.stat()
        return (
            sorted(path.name for path in self.folder.iterdir()),
            self.secret.read_text(),
            (status.st_mode, status.st_uid, status.st_mtime_ns, status.st_ino),
        )

    def is_unharmed(self) -> bool:
        return self.look() == self.before


@pytest.fixture
def victim(tmp_path: Path, monkeypatch) -> Iterator[Victim]:
    monkeypatch.setenv("SANDBOX_SECRET", SECRET)
    with socket.create_server(("127.0.0.1", 0)) as service:
        yield Victim(tmp_path, service)


@pytest.mark.parametrize("without", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("name", ATTACKS)
def test_it_stays_inside(name, without, victim):
    code = program(name, str(victim.folder), victim.port)
    try:
        ended = run(code, limits=Limits(seconds=20.0), without=without)
    except SandboxError as refusal:
        assert without  # all layers that there are must be enough
        pytest.skip(str(refusal))
    assert "ESCAPED" not in ended.stdout
    assert ended.stdout.endswith("the end\n"), ended.stderr  # every attempt was made
    assert SECRET not in ended.stdout + ended.stderr
    wait_until(lambda: not processes_of(os.getpid()))
    assert victim.is_unharmed()


@pytest.mark.parametrize(
    "name", ["write_outside", "read_outside", "sockets", "signals", "environment_of_the_parent"]
)
def test_the_same_attack_gets_out_without_the_sandbox(name, victim):
    """Or the tests above would show nothing."""
    code = program(name, str(victim.folder), victim.port)
    if name == "write_outside":
        code = code.partition("for folder in")[0] + "attempt(os.mkdir, OUTSIDE + '/escaped')"
    code = code.replace("os.getppid(), -1,", "os.getppid(),")  # one process is enough to signal
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=victim.folder, capture_output=True, text=True, timeout=30
    )
    assert "ESCAPED" in ended.stdout


def test_threads_are_limited():
    code = (
        "import threading, time\n"
        "threading.stack_size(65536)\n"
        "for _ in range(300): threading.Thread(target=time.sleep, args=(2,), daemon=True).start()\n"
    )
    ended = run(code)
    if "namespaces" not in ended.layers:
        pytest.skip("without namespaces memory bounds the threads")
    assert "can't start new thread" in ended.stderr


def test_calls_of_another_table_end_the_program():
    """x86_64 has three tables of system calls: the filter knows the numbers of one."""
    if os.uname().machine != "x86_64":
        pytest.skip("this machine has one table")
    code = "import ctypes\nctypes.CDLL(None).syscall(0x40000000 | 39)\nprint('ESCAPED')"
    ended = run(code)
    assert (ended.stdout, ended.exit_code) == ("", 128 + 31)  # SIGSYS


def test_nothing_is_left_behind(victim):
    """The program's directory is memory of its own namespace: no clean-up that could be tricked."""
    before = {path.name for path in Path("/tmp").iterdir()}
    code = (
        "import os\n"
        "os.makedirs('deep/' * 50)\n"
        f"os.symlink({str(victim.folder)!r}, 'deep/link')\n"
        "open('file', 'w').write('x')\n"
        "print(sorted(os.listdir('.')))"
    )
    ended = run(code)
    if "namespaces" not in ended.layers:
        pytest.skip("without namespaces a program has no directory")
    assert ended.stdout == "['deep', 'file']\n"
    assert run("import os\nprint(os.listdir('.'))").stdout == "[]\n"
    new = {path.name for path in Path("/tmp").iterdir()} - before
    assert not new & {"deep", "file"}
    assert victim.is_unharmed()


def test_root_is_left_behind_too():
    ended = run("import os\nprint(os.getuid(), os.getgid(), os.getgroups())")
    if "no root" not in ended.layers:
        pytest.skip(ended.missing["no root"])
    user, group, groups = ended.stdout.split(maxsplit=2)
    assert user != "0"
    assert group != "0"
    assert "0" not in groups.strip("[]\n").split(", ")


ORDINARY_USER = """
import sys
from megasd.rewards.sandbox import Limits, SandboxError, run
from tests.unit.escapes import ATTACKS, program
for without in ((), ("namespaces",), ("landlock",)):
    try:
        run("", without=without)
    except SandboxError:
        continue
    for name in ATTACKS:
        ended = run(program(name, sys.argv[1]), limits=Limits(seconds=20.0), without=without)
        assert "ESCAPED" not in ended.stdout, (name, without, ended.stdout)
        assert ended.stdout.endswith("the end\\n"), (name, without, ended.stderr)
    print(without, ended.layers)
"""


def test_an_ordinary_user_contains_them_as_well(victim):
    """Slurm jobs run as users. Needs root, to become one, and an interpreter that all can read."""
    python = "/usr/bin/python3"
    if os.geteuid() != 0 or not Path(python).exists():
        pytest.skip("needs root and /usr/bin/python3")
    if subprocess.run(
        [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    ).returncode:
        pytest.skip("needs a system Python of 3.11 or later")
    ended = subprocess.run(
        [python, "-B", "-c", ORDINARY_USER, str(victim.folder)],
        cwd=REPOSITORY,
        user=pwd.getpwnam("nobody").pw_uid,
        group=pwd.getpwnam("nobody").pw_gid,
        extra_groups=[],
        capture_output=True,
        text=True,
    )
    assert ended.stderr == ""
    assert ended.stdout.startswith("() ('")
    assert victim.is_unharmed()
