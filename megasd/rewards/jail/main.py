"""Supervisor, init and program: see the package's docstring. Started by megasd.rewards.sandbox."""

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from . import files, kernel, program, seccomp

NAMESPACES = (
    kernel.CLONE_NEWNS
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
)
# Dynamic users of systemd: no account has these numbers, and a container's map holds them.
FIRST_SPARE_USER, SPARE_USERS = 61184, 4336
LOST = 125  # our exit code where the process that we wait for could not even start


class Jail:
    """Which layers stand, and why the others do not. `without`: layers not even tried (tests)."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.present: list[str] = []
        self.missing: dict[str, str] = {}

    def has(self, layer: str) -> bool:
        return layer in self.present

    def put(self, layer: str, build: Callable[[], None]) -> None:
        """Notes whether `build` could put the layer in place."""
        self.present = [name for name in self.present if name != layer]
        try:
            if layer in self.request["without"]:
                raise OSError("switched off")
            build()
        except OSError as error:
            self.missing[layer] = str(error)
        else:
            self.present.append(layer)


def main() -> None:
    """The supervisor. Arguments: descriptors of request, status and result; the worker's id."""
    request_file, status, result, worker = map(int, sys.argv[2:6])
    kernel.die_with_parent(signal.SIGKILL)
    if os.getppid() != worker:
        os._exit(LOST)
    with os.fdopen(request_file) as file:
        jail = Jail(json.load(file))
    jail.put("namespaces", enter_namespaces)
    alive, held = os.pipe()
    init = os.fork()
    if init == 0:
        os.close(held)
        return run_init(jail, alive, status, result)
    os.write(held, b".")
    os.close(status)
    os.close(result)
    leave_with(init)


def enter_namespaces() -> None:
    """Root makes them as it is, and can then become another user; others need a user namespace."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            return kernel.unshare(NAMESPACES)
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(NAMESPACES | kernel.CLONE_NEWUSER)
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def run_init(jail: Jail, alive: int, status: int, result: int) -> None:
    """Process 1 of the pid namespace: prepares the files, starts the program, waits for it."""
    kernel.die_with_parent(signal.SIGKILL)
    if not os.read(alive, 1):  # the supervisor died before it could take us along
        os._exit(LOST)
    os.close(alive)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # should memory run out, the kernel ends this before a trainer
    if jail.has("namespaces"):
        jail.put("namespaces", lambda: files.enter_root(jail.request["file_bytes"]))
    init = os.getpid()
    child = os.fork()
    if child:
        os.close(status)
        os.close(result)
        leave_with(child)
    become_program(jail, init, status)
    program.run(jail.request, result)


def leave_with(child: int) -> None:
    """Waits for the child and ends as it ended, a signal as 128 + its number, as shells do."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def become_program(jail: Jail, init: int, status: int) -> None:
    """Puts up the remaining layers, or refuses. What comes after this is untrusted."""
    jail.put("no root", lambda: leave_root(jail))
    jail.put("no capabilities", kernel.drop_capabilities)
    # Not before: the kernel forgets this with every change of user.
    kernel.die_with_parent(signal.SIGKILL)
    if os.getppid() != init:
        os._exit(LOST)
    jail.put("rlimits", lambda: limit_resources(jail))
    kernel.prctl("prctl(PR_SET_NO_NEW_PRIVS)", kernel.PR_SET_NO_NEW_PRIVS, 1)
    scratch = jail.has("namespaces")
    jail.put("landlock", lambda: files.restrict(scratch))
    home = files.SCRATCH if scratch else "/"
    os.chdir(home)
    os.environ.clear()
    os.environ.update(HOME=home, TMPDIR=home)
    kernel.use_one_heap()
    jail.put("seccomp", lambda: seccomp.install(os.getpid()))
    os.write(status, json.dumps({"present": jail.present, "missing": jail.missing}).encode())
    os.close(status)
    if lacking(jail.present):
        os._exit(LOST)


def lacking(present: list[str]) -> str | None:
    """What a machine must have and this one has not; None where programs can be contained."""
    if "seccomp" not in present:
        return "seccomp, which keeps the network away"
    if "no capabilities" not in present:
        return "way to give up capabilities, which could undo the rest"
    if "rlimits" not in present:
        return "rlimits, which bound memory and processor time"
    if not {"namespaces", "landlock"} & set(present):
        return "namespaces or landlock, one of which keeps files outside away"
    return None


def leave_root(jail: Jail) -> None:
    """Another user, where we are root and may become one. The layer is there for all others."""
    if os.geteuid() == 0 and files.open_to_others(whole_path=not jail.has("namespaces")):
        user = FIRST_SPARE_USER + jail.request["serial"] % SPARE_USERS
        with contextlib.suppress(OSError):  # a container may have taken the right away
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
    if os.geteuid() == 0:
        raise OSError("no right to change the user, or only root can read Python's library")


def limit_resources(jail: Jail) -> None:
    request = jail.request
    seconds = int(request["seconds"]) + 1
    limits = {
        resource.RLIMIT_AS: (request["memory_bytes"], request["memory_bytes"]),
        resource.RLIMIT_CPU: (seconds, seconds + 1),  # a warning that can be caught, then the end
        resource.RLIMIT_FSIZE: (request["file_bytes"], request["file_bytes"]),
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_STACK: (64 << 20, 64 << 20),  # room for deep recursion
    }
    # It counts all threads of a user: of one made for this program, or of one in its namespace.
    # Elsewhere the trainer's threads would count, and memory is what bounds the program's.
    own_user = FIRST_SPARE_USER <= os.geteuid() < FIRST_SPARE_USER + SPARE_USERS
    if own_user or jail.has("namespaces"):
        limits[resource.RLIMIT_NPROC] = (64, 64)
    for kind, (soft, hard) in limits.items():
        most = resource.getrlimit(kind)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(kind, (soft, hard))
