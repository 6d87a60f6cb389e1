// A fiber: a stack of its own, to which the processor goes by exchanging registers. What a CUDA thread runs
// on.
#ifndef EMULATE_FIBERS_H
#define EMULATE_FIBERS_H
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Keeps where this stack stands in *from, and goes on where the other one stands. A function's own registers
// are all that has to be kept: for the compiler this is a call.
extern "C" void emulate_switch(void **from, void *to);
#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.type emulate_switch, @function
emulate_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulate_switch, . - emulate_switch
)");
enum { KEPT_WORDS = 6, ENTRY_WORD = 6, FRAME_WORDS = 7 };
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.type emulate_switch, @function
emulate_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulate_switch, . - emulate_switch
)");
enum { ENTRY_WORD = 11, FRAME_WORDS = 20 };
#else
#error "the emulation of CUDA threads knows x86-64 and arm64"
#endif

namespace emulate {

#ifdef __SANITIZE_ADDRESS__
enum { STACK_BYTES = 512 << 10 };
#else
enum { STACK_BYTES = 128 << 10 };
#endif
enum { PAGE_BYTES = 4096 };

struct Fiber {
    void *at;        // where its stack stands while another one runs
    char *bottom;    // NULL: the system's own stack, of a thread of the host
    size_t bytes;
    void *sanitizer; // what the address sanitizer keeps for it
    Fiber *next;     // in a list of free ones
};

// A new one, which begins with entry(). Below its stack lies a page that nobody may touch. Tops differ from
// fiber to fiber: at the same place in their pages all stacks would share the same few lines of the cache.
inline Fiber *new_fiber(void (*entry)(void), int number) {
    Fiber *fiber = (Fiber *)calloc(1, sizeof(Fiber));
    void *memory = mmap(NULL, STACK_BYTES + PAGE_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!fiber || memory == MAP_FAILED || mprotect(memory, PAGE_BYTES, PROT_NONE)) {
        fprintf(stderr, "emulation: no memory for the stack of a CUDA thread\n");
        abort();
    }
    fiber->bottom = (char *)memory + PAGE_BYTES;
    fiber->bytes = STACK_BYTES;
    uintptr_t top = (uintptr_t)fiber->bottom + STACK_BYTES - (uintptr_t)(number % 32) * 192;
    void **frame = (void **)(top & ~(uintptr_t)63) - FRAME_WORDS - 1;
    frame += (uintptr_t)(frame + ENTRY_WORD) % 16 ? -1 : 0; // entry finds the stack as behind a call
#ifdef __aarch64__
    frame = (void **)((uintptr_t)frame & ~(uintptr_t)15);
#endif
    for (int i = 0; i < FRAME_WORDS; i++) frame[i] = NULL;
    frame[ENTRY_WORD] = (void *)entry;
    fiber->at = frame;
    return fiber;
}

inline void go(Fiber *from, Fiber *to) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from->sanitizer, to->bottom, to->bytes);
    emulate_switch(&from->at, to->at);
    __sanitizer_finish_switch_fiber(from->sanitizer, NULL, NULL);
#else
    emulate_switch(&from->at, to->at);
#endif
}
// What a fiber does first of all.
inline void arrived(void) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(NULL, NULL, NULL);
#endif
}

} // namespace emulate
#endif
