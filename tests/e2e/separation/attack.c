/* What a hostile program in a worker tries against other processes. Prints a line for each attempt:
 * the process, the attempt, and its outcome: the errno's name, or OK.
 *
 *   attack abi                  prints the version of Landlock's ABI, 0 without Landlock
 *   attack trace PID…           tries to trace, and to take memory and descriptors
 *   attack signal PID…          tries to stop and to kill
 *   attack limit PID…           tries to starve by limits and priorities
 *
 * Each attack first prints the process that runs this program. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SYS_landlock_create_ruleset
#define SYS_landlock_create_ruleset 444
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif

#define UNUSED_USER 4294967290U

static void say(pid_t pid, const char *attempt, long result) {
  printf("%d %s %s\n", (int)pid, attempt, result == -1 ? strerrorname_np(errno) : "OK");
  fflush(stdout);
}

static void open_in_proc(pid_t pid, const char *name, int flags) {
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
  say(pid, name, open(path, flags | O_CLOEXEC));
}

static void trace(pid_t pid) {
  char memory[8], path[64], target[256];
  struct iovec here = {memory, sizeof memory}, there = {&errno, sizeof memory};
  int process = (int)syscall(SYS_pidfd_open, pid, 0);
  say(pid, "pidfd_getfd", syscall(SYS_pidfd_getfd, process, 0, 0));
  say(pid, "process_vm_readv", process_vm_readv(pid, &here, 1, &there, 1, 0));
  open_in_proc(pid, "mem", O_RDWR);
  /* Linux 6.13 and newer let a process with CAP_PERFMON read, whatever security modules say. */
  if (geteuid() != 0) open_in_proc(pid, "environ", O_RDONLY);
  open_in_proc(pid, "fd/0", O_RDONLY);
  open_in_proc(pid, "fd/1", O_WRONLY);
  snprintf(path, sizeof path, "/proc/%d/fd/2", (int)pid);
  say(pid, "readlink", readlink(path, target, sizeof target));
  long result = ptrace(PTRACE_SEIZE, pid, 0, 0);
  say(pid, "PTRACE_SEIZE", result);
  if (result == -1) {
    result = ptrace(PTRACE_ATTACH, pid, 0, 0);
    say(pid, "PTRACE_ATTACH", result);
  }
}

static void hit(pid_t pid) {
  int process = (int)syscall(SYS_pidfd_open, pid, 0);
  union sigval value = {0};
  say(pid, "kill(0)", kill(pid, 0));
  say(pid, "pidfd_send_signal", syscall(SYS_pidfd_send_signal, process, SIGSTOP, 0, 0));
  say(pid, "tgkill", syscall(SYS_tgkill, pid, pid, SIGSTOP));
  say(pid, "sigqueue", sigqueue(pid, SIGSTOP, value));
  say(pid, "SIGSTOP", kill(pid, SIGSTOP));
  say(pid, "SIGKILL", kill(pid, SIGKILL));
}

static void limit(pid_t pid) {
  struct rlimit none = {0, 0}, old;
  struct sched_param parameter = {0};
  cpu_set_t cpu;
  CPU_ZERO(&cpu);
  CPU_SET(0, &cpu);
  say(pid, "prlimit", prlimit(pid, RLIMIT_NOFILE, &none, NULL));
  say(pid, "setpriority", setpriority(PRIO_PROCESS, pid, 19));
  say(pid, "setpriority(group)", setpriority(PRIO_PGRP, getpgid(pid), 19));
  /* A user without processes: if the call isn't denied, it fails with ESRCH and hits nobody. */
  say(pid, "setpriority(user)", setpriority(PRIO_USER, UNUSED_USER, 19));
  say(pid, "sched_setscheduler", sched_setscheduler(pid, SCHED_IDLE, &parameter));
  say(pid, "sched_setparam", sched_setparam(pid, &parameter));
  say(pid, "sched_setaffinity", sched_setaffinity(pid, sizeof cpu, &cpu));
  say(pid, "ioprio_set", syscall(SYS_ioprio_set, 1, pid, 3 << 13));
  /* What a program does to itself is its own affair. */
  if (prlimit(0, RLIMIT_NOFILE, NULL, &old) || setrlimit(RLIMIT_NOFILE, &old) ||
      setpriority(PRIO_PROCESS, 0, 19) || sched_setaffinity(0, sizeof cpu, &cpu))
    say(pid, "itself", -1);
}

int main(int count, char **arguments) {
  if (count == 2 && !strcmp(arguments[1], "abi")) {
    long version = syscall(SYS_landlock_create_ruleset, NULL, 0, 1);
    printf("%ld\n", version < 0 ? 0 : version);
    return 0;
  }
  if (count < 3) return 64;
  printf("self %d\n", (int)getppid());
  for (int i = 2; i < count; i++) {
    pid_t pid = (pid_t)atoi(arguments[i]);
    if (pid == getppid()) continue;
    if (!strcmp(arguments[1], "trace")) trace(pid);
    else if (!strcmp(arguments[1], "limit")) limit(pid);
    else hit(pid);
  }
  return 0;
}
