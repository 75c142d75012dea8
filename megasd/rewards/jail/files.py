"""The files that a program sees: the interpreter's libraries, and an in-memory directory."""

import os
import stat
import struct
import sys

from . import kernel

LIBRARY = os.path.dirname(os.__file__)
# What Python reads after it has started: its own modules, the shared libraries that these need,
# and time zones. Not sys.prefix as a whole, which may be somebody's home.
READABLE = (
    LIBRARY,
    os.path.join(sys.base_prefix, "lib"),
    os.path.join(sys.base_prefix, "lib64"),
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/usr/share/zoneinfo",
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
MOUNT_POINT = "/tmp"  # any directory that every machine has; covered in our namespace only
SCRATCH = "/sandbox"  # inside: the program's directory and home
SCRATCH_FILES = 1000

# linux/landlock.h. Files: execute, write, read, then directories: read, remove, make; by version.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
ACCESS_FILE_SYSTEM = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
MAKE_DEVICES = 1 << 6 | 1 << 11  # MAKE_CHAR, MAKE_BLOCK
ACCESS_NETWORK = 3  # bind and connect TCP; since version 4
SCOPES = 3  # abstract sockets and signals to processes outside; since version 6
CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH = 1


def enter_root(scratch_bytes: int) -> None:
    """A new root of in-memory directories, in which READABLE is mounted read-only.

    Call it in a new mount namespace. `scratch_bytes`: what SCRATCH can hold.
    """
    root = MOUNT_POINT
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)  # nothing gets back outside
    quiet = kernel.MS_NOSUID | kernel.MS_NODEV
    # READABLE may lie below the mount point: it is held by descriptors before that is covered.
    sources = {
        path: os.open(path, os.O_PATH) for path in (*READABLE, *DEVICES) if os.path.exists(path)
    }
    kernel.mount("tmpfs", root, "tmpfs", quiet, "size=1m,mode=755")
    for path, source in sources.items():
        _bind(source, root + path, device=path in DEVICES)
        os.close(source)
    scratch = root + SCRATCH
    os.makedirs(scratch)
    kernel.lock_mount(root, kernel.MOUNT_ATTR_RDONLY)  # and all that is mounted below
    options = f"size={scratch_bytes},nr_inodes={SCRATCH_FILES},mode=1777"
    kernel.mount("tmpfs", scratch, "tmpfs", quiet | kernel.MS_NOEXEC, options)
    kernel.change_root(root)


def _bind(source: int, target: str, device: bool) -> None:
    if stat.S_ISDIR(os.fstat(source).st_mode):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    kernel.mount(f"/proc/self/fd/{source}", target, "", kernel.MS_BIND | kernel.MS_REC)
    attributes = kernel.MOUNT_ATTR_NOSUID
    kernel.lock_mount(target, attributes if device else attributes | kernel.MOUNT_ATTR_NODEV)


def restrict(scratch: bool) -> None:
    """Landlock: reads READABLE, writes DEVICES and, where there is one, SCRATCH; nothing else."""
    version = kernel.syscall(
        "landlock_create_ruleset",
        kernel.LANDLOCK_CREATE_RULESET,
        None,
        0,
        CREATE_RULESET_VERSION,
    )
    handled = max(mask for since, mask in ACCESS_FILE_SYSTEM.items() if since <= version)
    attributes = struct.pack("Q", handled)
    if version >= 4:
        attributes += struct.pack("Q", ACCESS_NETWORK)
    if version >= 6:
        attributes += struct.pack("Q", SCOPES)
    ruleset = kernel.syscall(
        "landlock_create_ruleset", kernel.LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0
    )
    for path in READABLE:
        _permit(ruleset, path, EXECUTE | READ_FILE | READ_DIR)
    for path in DEVICES:
        _permit(ruleset, path, READ_FILE | WRITE_FILE)
    if scratch:
        _permit(ruleset, SCRATCH, handled & ~MAKE_DEVICES)
    kernel.syscall("landlock_restrict_self", kernel.LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _permit(ruleset: int, path: str, access: int) -> None:
    try:
        directory = os.open(path, os.O_PATH)
    except OSError:  # no such path here, and a rule that is missing forbids
        return
    if not stat.S_ISDIR(os.fstat(directory).st_mode):
        access &= EXECUTE | READ_FILE | WRITE_FILE
    rule = struct.pack("=Qi", access, directory)
    kernel.syscall(
        "landlock_add_rule", kernel.LANDLOCK_ADD_RULE, ruleset, RULE_PATH_BENEATH, rule, 0
    )
    os.close(directory)


def open_to_others(whole_path: bool) -> bool:
    """Whether a user without rights can read Python's library; `whole_path`: from "/" on."""
    mode = os.stat(LIBRARY).st_mode
    path = LIBRARY
    while whole_path and path != "/":
        path = os.path.dirname(path)
        mode &= os.stat(path).st_mode | stat.S_IROTH  # passing through is enough
    return bool(mode & stat.S_IROTH and mode & stat.S_IXOTH)
