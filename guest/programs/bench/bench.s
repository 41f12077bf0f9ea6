# The bench guest: runs what the host has written into `schedule`, one loop after the other.
#
# The machine starts it at _start in 64-bit mode at CPL 0 with low memory identity-mapped, a flat GDT, interrupts off and no
# usable stack. It writes to the serial port before each entry of the schedule and behind the last one, and powers off.

.set SERIAL, 0x3f8
.set POWER_CONTROL, 0x604
.set SLEEP_S5, 0x2000
# A port without a device.
.set UNUSED_PORT, 0x80
.set VECTORS, 32
.set SCHEDULE_BYTES, 0x20000

.section .text.start, "ax"
function _start
    cld
    lea rsp, [rip + stack_top]

    # Every exception has a handler of its own: out of line, the host watches them (Intel SDM vol. 3A, 6.14.1).
    lea rdi, [rip + interrupt_table]
    lea rax, [rip + exception_entries]
    mov ecx, VECTORS
1:  mov [rdi], ax
    mov [rdi + 2], cs
    mov word ptr [rdi + 4], 0x8e00
    mov edx, eax
    shr edx, 16
    mov [rdi + 6], dx
    add rax, 16
    add rdi, 16
    dec ecx
    jnz 1b
    lidt [rip + interrupt_table_descriptor]

    # An entry of the schedule is a loop's address and how often it goes round; address 0 ends it.
    lea rbx, [rip + schedule]
1:  mov dx, SERIAL
    out dx, al
    mov rsi, [rbx]
    test rsi, rsi
    jz 2f
    mov ecx, [rbx + 8]
    add rbx, 16
    call rsi
    jmp 1b
2:  mov dx, POWER_CONTROL
    mov ax, SLEEP_S5
    out dx, ax
3:  hlt
    jmp 3b
end _start

# A function to call, and NAME_loop, which calls it ECX times. All functions but for one instruction are the same, and so are
# all loops, so that a difference in time is due to what happens in them.
.macro work name, instruction:vararg
function \name
    push rbp
    mov rbp, rsp
    .globl \name\()_instruction
\name\()_instruction:
    \instruction
    pop rbp
    ret
end \name

function \name\()_loop
1:  call \name
    dec ecx
    jnz 1b
    ret
end \name\()_loop
.endm

.section .text, "ax"
work plain, nop
work port, out UNUSED_PORT, al
work emulated, nop
work filtered, nop
work stepped, rdtsc
work returned, nop

# On a page of their own, as in a kernel, where nothing else that runs in a loop is. No exception is expected; the host takes
# a guest that sleeps with interrupts off for ended.
.p2align 12, 0xcc
function exception_entries
    .rept VECTORS
    .p2align 4, 0xcc
    hlt
    .endr
end exception_entries
.p2align 12, 0xcc

.section .data, "aw"
interrupt_table_descriptor:
    .word VECTORS * 16 - 1
    .quad interrupt_table

.section .bss, "aw", @nobits
.p2align 4
variable interrupt_table, VECTORS * 16
variable schedule, SCHEDULE_BYTES
variable stack, 4096
stack_top:
