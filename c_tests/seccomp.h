// Seccomp filters: io_uring as other machines have it.
#ifndef RINGEST_SECCOMP_H
#define RINGEST_SECCOMP_H

#include "check.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

// From now on `call` ends with `error`; with opcode >= 0 only when its second argument, but for the highest bit, is that.
UNUSED void deny(long call, int opcode, int error) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)call, 0, 4),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
        BPF_STMT(BPF_ALU | BPF_AND | BPF_K, opcode < 0 ? 0 : 0x7fffffff),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, opcode < 0 ? 0 : (uint32_t)opcode, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (uint32_t)error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) skip("no seccomp filters here");
}

// Runs a body in a child, which the filters of others do not reach.
UNUSED void in_child(void (*body)(void)) {
    int status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        body();
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status));
    if (WEXITSTATUS(status) == 77) _exit(77);
    CHECK(WEXITSTATUS(status) == 0);
}

#endif
