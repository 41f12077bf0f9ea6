# The frame of each function of the bare-metal guests: a symbol with its size, at a 16-byte boundary behind int3s.

.macro function name
    .globl \name
    .type \name, @function
    .p2align 4, 0xcc
\name:
.endm

.macro end name
    .size \name, . - \name
.endm
