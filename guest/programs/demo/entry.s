# Entry of every vCPU, exception entry, and the checked call.
#
# The machine starts a vCPU at _start in 64-bit mode at CPL 0 with low memory identity-mapped, a flat GDT, interrupts
# off and no usable stack: RDI = vCPU index, RSI = number of vCPUs, RDX = bytes of RAM.

.section .text.start, "ax"
function _start
    cld
    own_stack 1f
    call demo_main
1:  cli
    hlt
    jmp 1b
end _start

# 32 entries of 16 bytes: vector n enters at exception_entries + 16 * n. Every frame gets an error code, 0 where the
# CPU pushes none (Intel SDM vol. 3A, 6.15).
.section .text, "ax"
function exception_entries
    .set vector, 0
    .rept 32
    .p2align 4, 0xcc
    .if ((0x60227d00 >> vector) & 1) == 0
    push 0
    .endif
    push vector
    jmp exception_common
    .set vector, vector + 1
    .endr
end exception_entries

# Builds a `Frame` (exceptions.rs) and hands it to Rust, which may change it.
function exception_common
    cld
    push r15
    push r14
    push r13
    push r12
    push r11
    push r10
    push r9
    push r8
    push rdi
    push rsi
    push rbp
    push rdx
    push rcx
    push rbx
    push rax
    mov rdi, rsp
    call exception
    pop rax
    pop rbx
    pop rcx
    pop rdx
    pop rbp
    pop rsi
    pop rdi
    pop r8
    pop r9
    pop r10
    pop r11
    pop r12
    pop r13
    pop r14
    pop r15
    add rsp, 16
    iretq
end exception_common

# Flags at the entry of every family function: CF PF AF ZF SF OF and the bit that is always 1.
.set ENTRY_FLAGS, 0x8d7

.set PATTERN_rbx, 0x1b1b1b1b0b0b0b0b
.set PATTERN_rbp, 0x1717171707070707
.set PATTERN_r8, 0x1808080808080808
.set PATTERN_r9, 0x1909090909090909
.set PATTERN_r10, 0x1010101000000010
.set PATTERN_r11, 0x1111111101010111
.set PATTERN_r12, 0x1212121202020212
.set PATTERN_r13, 0x1313131303030313
.set PATTERN_r14, 0x1414141404040414
.set PATTERN_r15, 0x1515151505050515

# fn call_checked(family: *const Family, seen: *mut Seen) -> u64
#
# Calls family.entry with the family's registers and ENTRY_FLAGS, stores RAX and RFLAGS as the function left them in
# *seen, and returns how many of RBX, RBP, R8-R15 and RSP it changed, which no family function may.
function call_checked
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    push rsi
    push qword ptr [rdi + 16]
    mov [rip + checked_rsp], rsp
    mov rbx, PATTERN_rbx
    mov rbp, PATTERN_rbp
    mov r8, PATTERN_r8
    mov r9, PATTERN_r9
    mov r10, PATTERN_r10
    mov r11, PATTERN_r11
    mov r12, PATTERN_r12
    mov r13, PATTERN_r13
    mov r14, PATTERN_r14
    mov r15, PATTERN_r15
    mov rax, [rdi + 24]
    mov rcx, [rdi + 32]
    mov rdx, [rdi + 40]
    mov rsi, [rdi + 48]
    mov rdi, [rdi + 56]
    push ENTRY_FLAGS
    popfq
    call [rsp]
    .globl call_checked_return
call_checked_return:
    mov [rip + checked_rax], rax
    pushfq
    pop qword ptr [rip + checked_flags]
    push 2
    popfq
    xor eax, eax
    cmp rsp, [rip + checked_rsp]
    jz 1f
    inc eax
1:  mov rsp, [rip + checked_rsp]
    .irp reg, rbx, rbp, r8, r9, r10, r11, r12, r13, r14, r15
    mov rcx, PATTERN_\reg
    cmp rcx, \reg
    jz 2f
    inc eax
2:
    .endr
    pop rcx
    pop rsi
    mov rcx, [rip + checked_rax]
    mov [rsi], rcx
    mov rcx, [rip + checked_flags]
    mov [rsi + 8], rcx
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
end call_checked

.section .bss, "aw", @nobits
.p2align 4
variable stacks, MAX_CPUS * STACK_SIZE
variable checked_rsp, 8
variable checked_rax, 8
variable checked_flags, 8
