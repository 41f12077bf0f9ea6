# What the bare-metal guests share.

# The frame of each function: a symbol with its size, at a 16-byte boundary behind int3s.

.macro function name
    .globl \name
    .type \name, @function
    .p2align 4, 0xcc
\name:
.endm

.macro end name
    .size \name, . - \name
.endm

# A variable in .bss, with its size in bytes.
.macro variable name, size
    .globl \name
    .type \name, @object
    .size \name, \size
\name: .zero \size
.endm

.set MAX_CPUS, 64
.set STACK_SIZE, 4096

# The stack of the vCPU whose index is in RDI, out of `stacks`, MAX_CPUS * STACK_SIZE bytes; one without a stack goes to `without`.
.macro own_stack without
    cmp rdi, MAX_CPUS
    jae \without
    lea rax, [rdi + 1]
    imul rax, rax, STACK_SIZE
    lea rsp, [rax + stacks]
    xor ebp, ebp
.endm
