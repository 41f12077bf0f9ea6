# The ticker: a guest that goes on until it is stopped.
#
# The machine starts every vCPU at _start in 64-bit mode at CPL 0 with low memory identity-mapped, a flat GDT, interrupts off
# and no usable stack: RDI = vCPU index. Each calls tick(n, vCPU) for n from 0 on, for ever, with a write to a port without a
# device in between, so that it leaves the guest now and then as any system does.

.set SERIAL, 0x3f8
.set UNUSED_PORT, 0x80
# vCPU 0 prints a line each time.
.set TICKS_A_LINE, 10000

.section .text.start, "ax"
function _start
    cld
    own_stack 4f
    mov r12, rdi
    xor ebx, ebx
    mov r13d, 1
1:  mov rdi, rbx
    mov rsi, r12
    call tick
    out UNUSED_PORT, al
    inc rbx
    dec r13d
    jnz 1b
    mov r13d, TICKS_A_LINE
    test r12, r12
    jnz 1b
    lea rsi, [rip + line]
    mov dx, SERIAL
2:  mov al, [rsi]
    test al, al
    jz 1b
    out dx, al
    inc rsi
    jmp 2b
4:  hlt
    jmp 4b
end _start

.section .text, "ax"
# tick(n, vCPU): counts, and returns the count.
function tick
    push rbp
    mov rbp, rsp
    lea rax, [rip + ticks]
    inc qword ptr [rax + rsi * 8]
    mov rax, [rax + rsi * 8]
    pop rbp
    ret
end tick

.section .rodata, "a"
line:
    .asciz "ticker: goes on\n"

.section .bss, "aw", @nobits
.p2align 4
# How often each vCPU has called tick, 64-bit words.
variable ticks, MAX_CPUS * 8
.p2align 12
variable stacks, MAX_CPUS * STACK_SIZE
