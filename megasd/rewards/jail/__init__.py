"""What runs inside the sandbox's own process: a fresh interpreter that imports nothing of megasd.

`megasd.rewards.sandbox` starts it and reads its pipes. Three processes, each forked from the last:

    supervisor   outside; dies with the worker that started it (PR_SET_PDEATHSIG)
      init       process 1 of a new pid namespace: all inside it dies when init does
        program  the untrusted code, behind every layer below

Layers, each enough by itself against most escapes:

- namespaces: a file system of its own (the interpreter's libraries, read-only, and a small
  in-memory directory), no network device, no other process to see or to signal;
- Landlock: the same files again, by rule of the kernel's security module;
- seccomp: only listed system calls; none that makes a process, a socket or a privilege, or that
  names another process;
- rlimits: CPU time, memory, file size, open files, threads;
- no root: another user where we are root; no capabilities and no new privileges in any case.

A machine may lack namespaces (containers forbid them) or Landlock (old kernels). One of the two is
needed, for files outside are hidden by them only, and so are seccomp, rlimits and the loss of
capabilities. Without them nothing is run. Without namespaces a program has no directory to write
in, can learn that a file outside exists (stat), and its threads are bounded by memory alone.

What remains: faults of the kernel itself in the calls that are allowed, and what can be learned
from the time that things take.
"""
