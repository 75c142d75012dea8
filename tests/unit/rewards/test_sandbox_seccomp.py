"""The filter of system calls, read by a small interpreter of its statements."""

import errno
import re
import struct
from pathlib import Path

import pytest

from megasd.rewards.jail import seccomp

OURS = 1234  # the process that the filter is for
ARCHITECTURES = list(seccomp.AUDIT_ARCH)
ALLOWED, KILLED = "allowed", "killed"
WORD = 1 << 32


def judge(machine: str, number: int, *arguments: int, arch: int | None = None) -> str | int:
    """What the filter says about a call: allowed, killed, or the error number."""
    arguments += (0,) * (6 - len(arguments))
    arch = seccomp.AUDIT_ARCH[machine] if arch is None else arch
    data = struct.pack("IIQ6Q", number, arch, 0, *arguments)
    code = list(struct.iter_unpack("HBBI", seccomp.assemble(machine, OURS)))
    here, value = 0, 0
    while True:
        operation, if_true, if_false, k = code[here]
        here += 1
        match operation:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                (value,) = struct.unpack_from("I", data, k)
            case 0x54:  # BPF_ALU | BPF_AND | BPF_K
                value &= k
            case 0x15:  # BPF_JMP | BPF_JEQ | BPF_K
                here += if_true if value == k else if_false
            case 0x35:  # BPF_JMP | BPF_JGE | BPF_K
                here += if_true if value >= k else if_false
            case 0x06:  # BPF_RET | BPF_K
                actions = {0x7FFF0000: ALLOWED, 0x80000000: KILLED, 0x00050000: k & 0xFFFF}
                return actions[k & 0xFFFF0000]
            case _:
                raise AssertionError(f"unknown operation {operation:#x}")


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_every_call_that_is_not_listed_fails(machine):
    listed = set(seccomp.numbers(machine).values())
    for number in range(600):
        if number not in listed:
            # As by a kernel that is too old for it, so that libraries fall back.
            assert judge(machine, number) == (errno.ENOSYS if number >= 424 else errno.EPERM)
    unconditional = set(seccomp.numbers(machine)) - set(seccomp.rules(OURS))
    for name in unconditional:
        assert judge(machine, seccomp.numbers(machine)[name], *[2**64 - 1] * 6) == ALLOWED
    for foreign in (*set(seccomp.AUDIT_ARCH.values()) - {seccomp.AUDIT_ARCH[machine]}, 0x40000003):
        assert judge(machine, 1, arch=foreign) == KILLED
    assert judge(machine, 0x40000000 | 39) == KILLED


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_arguments_decide_where_a_call_could_reach_others(machine):
    numbers = seccomp.numbers(machine)

    def call(name: str, *arguments: int) -> str | int:
        return judge(machine, numbers[name], *(a % WORD**2 for a in arguments))

    fork, thread = 17, 0x3D0F00
    assert call("clone", thread) == ALLOWED
    for flags in (fork, 0, thread | 0x10000000, thread | 0x20000, thread & ~0x10000, 0x4111):
        assert call("clone", flags) == errno.EPERM
    for name in ("kill", "tgkill"):
        assert call(name, OURS, 9) == ALLOWED
        assert call(name, OURS + 7 * WORD, 9) == ALLOWED  # the kernel reads the low half
        for process in (-1, 0, 1, -OURS, OURS + 1):
            assert call(name, process, 9) == errno.EPERM
    assert call("prlimit64", 0, 7) == ALLOWED
    assert call("prlimit64", 1, 7) == errno.EPERM
    assert call("sendto", 3, 0, 0, 0, 0) == ALLOWED
    for address in (1, WORD, WORD + 1, -1):
        assert call("sendto", 3, 0, 0, 0, address) == errno.EPERM
    assert call("socketpair", 1) == ALLOWED
    assert {call("socketpair", family) for family in (0, 2, 10, 16, 17)} == {errno.EPERM}
    assert call("fcntl", 3, 1) == ALLOWED
    assert {call("fcntl", 3, command) for command in (8, 10, 15, 1026, 1033)} == {errno.EINVAL}
    assert call("ioctl", 0, 0x5421) == ALLOWED
    assert {call("ioctl", 0, request) for request in (0x5412, 0x8901, 0)} == {errno.ENOTTY}
    for name, place in (("open", 1), ("openat", 2)):
        if name in numbers:
            read, write, truncate = 0, 1, 0o1000
            before = (0,) * place
            assert call(name, *before, read) == ALLOWED
            assert call(name, *before, write | truncate | 0o100) == ALLOWED  # Landlock's to judge
            assert call(name, *before, read | truncate | 0o2000000) == errno.EPERM


@pytest.mark.parametrize(
    ("machine", "header"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        ("aarch64", "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_the_numbers_are_the_kernels(machine, header):
    if not Path(header).exists():
        pytest.skip("no kernel headers here")
    text = Path(header).read_text()
    known = {name: int(n) for name, n in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    if machine == "aarch64":  # the generic header has two of them under the names of 32 bits
        known |= {"newfstatat": known["fstatat"]}
    numbers = seccomp.numbers(machine)
    assert len(numbers) > 90
    assert numbers == {name: known[name] for name in numbers}
