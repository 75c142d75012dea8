"""Programs that try to leave the sandbox: each prints ESCAPED where one of its attempts succeeds.

None would do harm outside: signals are those that a process ignores, loops end, memory and files
are taken in small steps. OUTSIDE is a directory of the test's, which holds `secret.txt`; PARENT is
the id of the test's process.
"""

import os

SECRET = "sesame-7161"

# Comes before each program. `attempt` runs a function; only an exception means containment.
HELPERS = """
import ctypes, errno, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)

def attempt(action, *args):
    try:
        action(*args)
    except (Exception, SystemExit) as error:
        print("contained:", type(error).__name__)
    else:
        print("ESCAPED:", getattr(action, "__name__", action), args, flush=True)

def call(number, *args):
    if libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in args]) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def number(x86_64, aarch64):
    return x86_64 if os.uname().machine == "x86_64" else aarch64
"""

ATTACKS = {
    "fork_bomb": """
for _ in range(200):
    try:
        if os.fork() == 0:
            time.sleep(3); os._exit(0)
        print("ESCAPED: fork", flush=True)
    except OSError:
        pass
attempt(call, number(58, 220), 17)  # vfork; clone(SIGCHLD)
attempt(call, 435, 0, 0)  # clone3
""",
    "daemon_that_survives": """
def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1)
            open(OUTSIDE + "/daemon", "w").write("alive")
        os._exit(0)
attempt(daemon)
attempt(os.setsid)
attempt(os.setpgid, 0, 0)
""",
    "another_program": """
attempt(os.execv, "/bin/sh", ["sh", "-c", "echo ESCAPED"])
attempt(os.execv, sys.executable, [sys.executable, "-c", "print('ESCAPED')"])
attempt(os.posix_spawn, sys.executable, [sys.executable, "-c", "print('ESCAPED')"], {})
""",
    "write_outside": """
home = os.path.expanduser("~root")
for folder in (OUTSIDE, OUTSIDE + "/..", REPOSITORY, home, "/", "/etc", "/dev/shm", "/var/tmp"):
    attempt(open, folder + "/escaped.txt", "w")
    attempt(os.mkdir, folder + "/escaped")
attempt(os.mknod, "pipe-or-device", 0o20600, os.makedev(1, 1))
attempt(open, "/dev/mem", "w")
""",
    "change_or_delete_outside": """
secret = OUTSIDE + "/secret.txt"
attempt(os.open, secret, os.O_WRONLY)
attempt(os.open, secret, os.O_RDONLY | os.O_TRUNC)
attempt(os.truncate, secret, 0)
attempt(os.unlink, secret)
attempt(os.rename, secret, secret + "2")
attempt(os.chmod, secret, 0)
attempt(os.chown, secret, 12345, 12345)
attempt(os.utime, secret, (0, 0))
attempt(os.setxattr, secret, "user.mark", b"1")
attempt(os.link, secret, "link")
attempt(os.rmdir, OUTSIDE)
""",
    "read_outside": """
for path in (OUTSIDE + "/secret.txt", REPOSITORY + "/pyproject.toml", "/etc/passwd", "/etc/shadow"):
    attempt(open, path)
def list_more_than_its_own(path):
    # Its own root has such directories too, of at most three names: they lead to its libraries.
    if len(os.listdir(os.path.expanduser(path))) <= 3:
        raise OSError
for path in (OUTSIDE, REPOSITORY, "~", "/etc", "~/.ssh", "/proc", "/sys", "/dev"):
    attempt(list_more_than_its_own, path)
attempt(os.listdir, OUTSIDE)
""",
    "symlinks_out": """
import shutil
for i, target in enumerate((OUTSIDE, OUTSIDE + "/secret.txt", REPOSITORY, "/proc/1/root")):
    try:
        os.symlink(target, f"link{i}")
    except OSError:
        pass
    attempt(os.listdir, f"link{i}/")
    attempt(open, f"link{i}")
    attempt(open, f"link{i}/secret.txt")
    attempt(open, f"link{i}/escaped.txt", "w")
attempt(os.listdir, "../../../../../.." + OUTSIDE)
""",
    "environment_of_the_parent": """
if "SANDBOX_SECRET" in os.environ or libc.getenv(b"SANDBOX_SECRET"):
    print("ESCAPED: environment")
for process in (PARENT, os.getppid(), "self", 1):
    for name in ("environ", "mem", "maps", "cmdline", "root/etc/passwd", "fd/1"):
        if (process, name) == ("self", "fd/1"):
            continue  # its own
        attempt(open, f"/proc/{process}/{name}", "rb")
""",
    "signals": """
for process in (PARENT, os.getppid(), -1, -PARENT, 0, -os.getpgid(0)):
    attempt(os.kill, process, signal.SIGCONT)
for group in (PARENT, os.getppid(), os.getpgid(0)):
    attempt(os.killpg, group, signal.SIGCONT)
attempt(call, 424, 0, signal.SIGCONT, 0, 0)  # pidfd_send_signal
attempt(call, number(200, 130), PARENT, signal.SIGCONT)  # tkill
attempt(call, number(234, 131), PARENT, PARENT, signal.SIGCONT)  # tgkill
attempt(call, number(129, 138), PARENT, signal.SIGCONT, 0)  # rt_sigqueueinfo
import fcntl
F_SETOWN, F_SETSIG, F_SETOWN_EX = 8, 10, 15
reader, writer = os.pipe()
attempt(fcntl.fcntl, reader, F_SETOWN, PARENT)
attempt(fcntl.fcntl, reader, F_SETSIG, signal.SIGCONT)
""",
    "memory_of_the_parent": """
buffer = ctypes.create_string_buffer(64)
vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 64)
address = ctypes.addressof(vector)
attempt(call, number(101, 117), 0x4206, PARENT, 0, 0)  # PTRACE_SEIZE
attempt(call, number(310, 270), PARENT, address, 1, address, 1, 0)  # process_vm_readv
attempt(call, number(311, 271), PARENT, address, 1, address, 1, 0)  # process_vm_writev
attempt(call, 434, PARENT, 0)  # pidfd_open
attempt(call, number(312, 272), PARENT, PARENT, 0, 0, 0)  # kcmp
""",
    "sockets": """
import socket
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, 17, 38, 40):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        attempt(socket.socket, family, kind)
attempt(socket.create_connection, ("127.0.0.1", PORT), 1)
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
attempt(ours.connect, OUTSIDE + "/socket")
attempt(ours.connect, "\\0abstract")
attempt(ours.sendto, b"x", OUTSIDE + "/socket")
attempt(ours.bind, "mine")
attempt(call, 425, 8, 0)  # io_uring_setup
""",
    "new_rights": """
attempt(os.setuid, 0)
attempt(os.setgroups, [0])
attempt(os.chroot, "/")
for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000):
    attempt(call, number(272, 97), flag)  # unshare
attempt(call, number(165, 40), 0, 0, 0, 4096, 0)  # mount
attempt(call, number(166, 39), 0, 2)  # umount2
attempt(call, number(308, 268), 0, 0)  # setns
attempt(call, number(321, 280), 0, 0, 0)  # bpf
attempt(call, number(298, 241), 0, 0, -1, -1, 0)  # perf_event_open
attempt(call, number(250, 219), 0, -3, 1)  # keyctl
attempt(call, number(323, 282), 0)  # userfaultfd
attempt(call, number(319, 279), 0, 0)  # memfd_create
attempt(call, number(157, 167), 1, 0)  # prctl(PR_SET_PDEATHSIG, none)
attempt(call, number(135, 92), 0x40000)  # personality
attempt(call, number(16, 29), 0, 0x5412, 0)  # ioctl(TIOCSTI)
""",
    "its_own_limits": """
import resource
for name in ("AS", "CPU", "FSIZE", "NOFILE", "CORE"):
    kind = getattr(resource, "RLIMIT_" + name)
    soft, hard = resource.getrlimit(kind)
    attempt(resource.setrlimit, kind, (hard + 1, hard + 1))
    attempt(resource.setrlimit, kind, (-1, -1))
attempt(resource.prlimit, PARENT, resource.RLIMIT_CORE)
attempt(os.sched_setaffinity, PARENT, {0})
attempt(os.setpriority, os.PRIO_PROCESS, PARENT, 0)
""",
    "100_gigabytes": """
import mmap
attempt(bytearray, 100 << 30)
attempt(mmap.mmap, -1, 100 << 30)
held = []
try:
    for _ in range(64):
        held.append(bytearray(16 << 20))
    print("ESCAPED: a gigabyte")
except MemoryError:
    print("contained: after", len(held))
""",
    "one_big_file": """
def fill():
    with open("big", "wb") as file:
        for _ in range(64):
            file.write(bytes(1 << 20)); file.flush()
attempt(fill)
""",
    "many_files": """
def fill():
    for i in range(64):
        with open(f"file{i}", "wb") as file:
            file.write(bytes(1 << 20))
def litter():
    for i in range(5000):
        open(f"litter{i}", "w").close()
attempt(fill)
attempt(litter)
""",
}


def program(name: str, outside: str, port: int = 1) -> str:
    """The attack called `name`, with what it has to know about its victim."""
    repository = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    known = (
        f"OUTSIDE, REPOSITORY, PARENT, PORT = {outside!r}, {repository!r}, {os.getpid()}, {port}"
    )
    return f"{HELPERS}\n{known}\n{ATTACKS[name]}\nprint('the end')\n"
