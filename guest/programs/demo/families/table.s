# The table of instruction families. A family is a function whose first instruction belongs to it; `family` puts a row
# in the table that main.rs walks (struct Family), with the registers to call it with and the result to expect.

# in_*: RAX, RCX, RDX, RSI, RDI on entry. out: RAX on return. flags: RFLAGS on return, compared under mask, which
# leaves out what the manual calls undefined. Without `entry` the function is called by its own name; with it, by a
# stub that first puts something on the stack or into a register that call_checked does not set.
.macro family name, entry=0, in_a=0, in_c=0, in_d=0, in_si=0, in_di=0, out=0, flags=ENTRY_FLAGS, mask=0x3fffff
    .pushsection .rodata.names, "a"
7771:
    .ascii "\name"
7772:
    .popsection
    .pushsection .families, "a"
    .p2align 3
    .quad 7771b
    .quad 7772b - 7771b
    .ifeqs "\entry", "0"
    .quad \name
    .else
    .quad \entry
    .endif
    .quad \in_a, \in_c, \in_d, \in_si, \in_di
    .quad \out, \flags, \mask
    .popsection
.endm

.set CF, 0x001
.set PF, 0x004
.set AF, 0x010
.set ZF, 0x040
.set SF, 0x080
.set DF, 0x400
.set OF, 0x800
.set ALL_FLAGS, 0x3fffff
.set CELL, 0x1122334455667788

# Memory operands. A function that changes one puts the old value back by mov, which leaves the flags alone.
.section .data, "aw"
.p2align 4
.macro datum name, value
    .globl \name
    .type \name, @object
    .size \name, 8
\name: .quad \value
.endm
datum cell, CELL
datum cell_next, 0x99aabbccddeeff00
datum jump_target, landing
datum call_target, return_address
.globl buffer
.type buffer, @object
.size buffer, 32
buffer: .zero 32

.section .text, "ax"

# Where the indirect jumps land, and what the calls call.
function landing
    mov rax, rdi
    ret
end landing

function return_address
    mov rax, [rsp]
    ret
end return_address
