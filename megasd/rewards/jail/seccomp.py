"""The system calls that a program may make. All others fail.

A list of what is allowed, since a list of what is forbidden forgets the next kernel's calls. Left
out on purpose, besides all that needs privileges:

- fork, vfork, clone of anything but a thread, execve: one process, so nothing can outlive it;
- socket, connect, bind, and sendto with an address: no network, no local services either;
- ptrace, process_vm_readv, pidfd_*, kill of others, fcntl(F_SETOWN): no other process is named;
- setsid, setpgid, prctl: it stays in the group that is killed, and dies with its parent;
- chmod, chown, utime, setxattr, truncate by path: Landlock does not judge them (all kernels);
- memfd_create, shmget: memory that RLIMIT_AS would not count.
"""

import ctypes
import errno
import struct

from . import kernel

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h

# name, its number on x86_64, on aarch64 ("-": it has none), from the kernel's unistd.h
SYSCALLS = """
read 0 63            write 1 64            readv 19 65            writev 20 66
pread64 17 67        pwrite64 18 68        preadv 295 69          pwritev 296 70
open 2 -             openat 257 56         close 3 57             close_range 436 436
stat 4 -             lstat 6 -             fstat 5 80             newfstatat 262 79
statx 332 291        lseek 8 62            access 21 -            faccessat 269 48
faccessat2 439 439   readlink 89 -         readlinkat 267 78      getdents64 217 61
statfs 137 43        fstatfs 138 44        getcwd 79 17           chdir 80 49
fchdir 81 50         mkdir 83 -            mkdirat 258 34         rmdir 84 -
unlink 87 -          unlinkat 263 35       rename 82 -            renameat 264 38
renameat2 316 276    link 86 -             linkat 265 37          symlink 88 -
symlinkat 266 36     ftruncate 77 46       fallocate 285 47       fsync 74 82
fdatasync 75 83      umask 95 166          sendfile 40 71         copy_file_range 326 285
fadvise64 221 223    flock 73 32           dup 32 23              dup2 33 -
dup3 292 24          pipe 22 -             pipe2 293 59           fcntl 72 25
ioctl 16 29          select 23 -           pselect6 270 72        poll 7 -
ppoll 271 73         epoll_create1 291 20  epoll_ctl 233 21       epoll_wait 232 -
epoll_pwait 281 22   eventfd2 290 19       socketpair 53 199      sendto 44 206
recvfrom 45 207      mmap 9 222            munmap 11 215          mremap 25 216
mprotect 10 226      madvise 28 233        brk 12 214             futex 202 98
rt_sigaction 13 134  rt_sigprocmask 14 135 rt_sigreturn 15 139    rt_sigpending 127 136
rt_sigsuspend 130 133                      rt_sigtimedwait 128 137
sigaltstack 131 132  pause 34 -            restart_syscall 219 128
set_robust_list 273 99                     set_tid_address 218 96 rseq 334 293
gettid 186 178       getpid 39 172         getppid 110 173        getpgrp 111 -
getuid 102 174       geteuid 107 175       getgid 104 176         getegid 108 177
getresuid 118 148    getresgid 120 150     getgroups 115 158      getpgid 121 155
getrandom 318 278    getrusage 98 165      times 100 153          time 201 -
gettimeofday 96 169  clock_gettime 228 113 clock_getres 229 114   clock_nanosleep 230 115
nanosleep 35 101     alarm 37 -            setitimer 38 103       getitimer 36 102
sched_yield 24 124   sched_getaffinity 204 123                    getcpu 309 168
uname 63 160         sysinfo 99 179        prlimit64 302 261      getrlimit 97 163
setrlimit 160 164    wait4 61 260          waitid 247 95          clone 56 220
kill 62 129          tgkill 234 131        exit 60 93             exit_group 231 94
"""
FIRST_SHARED_NUMBER = 424  # calls since Linux 5.1
X32 = 0x40000000  # x86_64's second table of calls, by a bit of the number

# What threads of glibc, and of musl, are made with (CLONE_VM | CLONE_FS | ... | CLONE_THREAD).
THREAD_FLAGS = (0x003D0F00, 0x007D0F00)
AF_UNIX = 1
FIONBIO = 0x5421
# fcntl: duplicate, flags, file locks. F_SETOWN and F_SETSIG would send signals to any process.
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
O_ACCMODE, O_TRUNC = 0o3, 0o1000

# linux/bpf_common.h and linux/seccomp.h
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
FILTER = 2  # PR_SET_SECCOMP's mode


def numbers(machine: str) -> dict[str, int]:
    """The number of each allowed call on `machine`; calls that it has not are left out."""
    words = SYSCALLS.split()
    column = {"x86_64": 1, "aarch64": 2}[machine]
    return {
        words[i]: int(words[i + column])
        for i in range(0, len(words), 3)
        if words[i + column] != "-"
    }


def statement(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One struct sock_filter; the jumps count the statements to skip."""
    return struct.pack("HBBI", code, if_true, if_false, value)


def fail(number: int) -> bytes:
    return statement(RETURN, ERRNO | number)


def argument(index: int, high: bool = False) -> bytes:
    """Loads half of an argument. The kernel reads an int argument's low half only; so do we."""
    return statement(LOAD, ARGUMENTS + 8 * index + 4 * high)


def one_of(index: int, values: tuple[int, ...], otherwise: int = errno.EPERM) -> bytes:
    """Allows the call where argument `index` is one of the values."""
    tests = [statement(EQUAL, v, 0, 1) + statement(RETURN, ALLOW) for v in values]
    return argument(index) + b"".join(tests) + fail(otherwise)


def null(index: int) -> bytes:
    """Allows the call where the pointer in argument `index` is NULL."""
    return (
        argument(index)
        + statement(EQUAL, 0, 1, 0)
        + fail(errno.EPERM)
        + argument(index, high=True)
        + statement(EQUAL, 0, 1, 0)
        + fail(errno.EPERM)
        + statement(RETURN, ALLOW)
    )


def not_truncating_unwritable(flags: int) -> bytes:
    """Refuses O_RDONLY | O_TRUNC, which empties a file unseen by Landlock before Linux 6.2."""
    return (
        argument(flags)
        + statement(AND, O_TRUNC | O_ACCMODE)
        + statement(EQUAL, O_TRUNC, 0, 1)
        + fail(errno.EPERM)
        + statement(RETURN, ALLOW)
    )


def rules(process: int) -> dict[str, bytes]:
    """What decides on a call by its arguments, for the calls that are not simply allowed."""
    return {
        "clone": one_of(0, THREAD_FLAGS),
        "kill": one_of(0, (process,)),
        "tgkill": one_of(0, (process,)),
        "prlimit64": one_of(0, (0,)),
        "fcntl": one_of(1, FCNTL_COMMANDS, errno.EINVAL),
        "ioctl": one_of(1, (FIONBIO,), errno.ENOTTY),
        "socketpair": one_of(0, (AF_UNIX,)),
        "sendto": null(4),
        "open": not_truncating_unwritable(1),
        "openat": not_truncating_unwritable(2),
    }


def assemble(machine: str, process: int) -> bytes:
    """The filter, as an array of struct sock_filter, for the process with this id."""
    code = [
        statement(LOAD, ARCHITECTURE),
        statement(EQUAL, AUDIT_ARCH[machine], 1, 0),
        statement(RETURN, KILL_PROCESS),  # 32-bit calls have other numbers
        statement(LOAD, NUMBER),
        statement(AT_LEAST, X32, 0, 1),
        statement(RETURN, KILL_PROCESS),
    ]
    special = rules(process)
    for name, number in numbers(machine).items():
        rule = special.get(name, statement(RETURN, ALLOW))
        code += [statement(EQUAL, number, 0, len(rule) // 8), rule]
    # glibc tries new calls, clone3 for one, and uses the old ones where the kernel lacks the new.
    code += [statement(AT_LEAST, FIRST_SHARED_NUMBER, 0, 1), fail(errno.ENOSYS), fail(errno.EPERM)]
    return b"".join(code)


def install(process: int) -> None:
    """Puts the filter on this thread and all that it starts. Cannot be undone."""
    if kernel.MACHINE not in AUDIT_ARCH:
        raise OSError(f"no table of system calls for {kernel.MACHINE}")
    code = assemble(kernel.MACHINE, process)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    kernel.prctl("prctl(PR_SET_SECCOMP)", kernel.PR_SET_SECCOMP, FILTER, filter_program)
