"""The kernel's calls that Python's standard library lacks, by name. Each raises OSError."""

import ctypes
import os
import struct

MACHINE = os.uname().machine

# Numbers from 424 on are the same on every machine; these two are older.
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
CAPSET = {"x86_64": 126, "aarch64": 91}
NO_CALL = -1  # fails with ENOSYS
MOUNT_SETATTR = 442
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4

# linux/sched.h: namespaces
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# linux/mount.h
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000

LAST_CAPABILITY = 63  # of a 64-bit set; the kernel knows about 41
_CAPABILITY_VERSION_3 = 0x20080522
_M_ARENA_MAX = -8  # malloc.h

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(what: str, number: int, *arguments: "int | bytes | None") -> int:
    """A system call by number; integers are passed as 64-bit words, bytes as a pointer."""
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *words), what)


def prctl(what: str, option: int, *arguments: "int | bytes") -> None:
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    words += [ctypes.c_ulong(0)] * (4 - len(words))
    _check(_libc.prctl(option, *words), what)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    words = [text.encode() for text in (source, target, kind)]
    call = _libc.mount(*words, ctypes.c_ulong(flags), options.encode())
    _check(call, f"mount {target}")


def lock_mount(target: str, attributes: int) -> None:
    """Sets `attributes` (MOUNT_ATTR_*) on a mount and on all mounts below it."""
    request = struct.pack("QQQQ", attributes, 0, 0, 0)
    flags, size = AT_RECURSIVE, len(request)
    syscall("mount_setattr", MOUNT_SETATTR, AT_FDCWD, target.encode(), flags, request, size)


def change_root(new_root: str) -> None:
    """`new_root` becomes "/"; what was "/" is unmounted, out of reach for good."""
    os.chdir(new_root)
    syscall(
        "pivot_root", PIVOT_ROOT.get(MACHINE, NO_CALL), b".", b"."
    )  # stacks the old root upon the new one
    _check(_libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")


def die_with_parent(signal: int) -> None:
    prctl("prctl(PR_SET_PDEATHSIG)", PR_SET_PDEATHSIG, signal)


def drop_capabilities() -> None:
    """No capability is left, and none can come back by running another file."""
    prctl("prctl(PR_CAP_AMBIENT)", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(LAST_CAPABILITY + 1):
        try:
            prctl("prctl(PR_CAPBSET_DROP)", PR_CAPBSET_DROP, capability)
        except OSError:  # past the kernel's last one, or we never had any to drop
            break
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    syscall("capset", CAPSET.get(MACHINE, NO_CALL), header, bytes(24))


def use_one_heap() -> None:
    """malloc keeps 64 MB of address space per thread otherwise, which RLIMIT_AS would count."""
    _libc.mallopt(_M_ARENA_MAX, 1)
