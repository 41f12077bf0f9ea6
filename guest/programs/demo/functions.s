# The functions with work of their own. Their callers count the calls.

.section .text, "ax"

# fn tick(index: u64, cpu: u64): called by every vCPU.
function tick
    push rbp
    mov rbp, rsp
    lock inc qword ptr [rip + ticks]
    pop rbp
    ret
end tick

# fn fib(n: u64) -> u64: the Fibonacci number by double recursion, counting the calls that it makes itself.
function fib
    push rbp
    mov rbp, rsp
    push rbx
    push r12
    mov rax, rdi
    cmp rdi, 2
    jb 1f
    mov rbx, rdi
    lea rdi, [rbx - 1]
    inc qword ptr [rip + fib_calls]
    call fib
    mov r12, rax
    lea rdi, [rbx - 2]
    inc qword ptr [rip + fib_calls]
    call fib
    add rax, r12
1:  pop r12
    pop rbx
    pop rbp
    ret
end fib

# fn copy_bytes(to: *mut u8, from: *const u8, len: u64) -> *mut u8: eight bytes at a time in a loop, the rest by
# rep movsb. Returns the end of the copy.
function copy_bytes
    mov rcx, rdx
    shr rcx, 3
    jz 2f
1:  mov rax, [rsi]
    mov [rdi], rax
    add rsi, 8
    add rdi, 8
    dec rcx
    jnz 1b
2:  mov ecx, edx
    and ecx, 7
    rep movsb
    mov rax, rdi
    ret
end copy_bytes

# fn checksum(from: *const u8, len: u64) -> u64: rotate left by 5 and exclusive-or each byte in.
function checksum
    xor eax, eax
    test rsi, rsi
    jz 2f
1:  movzx edx, byte ptr [rdi]
    rol rax, 5
    xor rax, rdx
    inc rdi
    dec rsi
    jnz 1b
2:  ret
end checksum

# fn smp_add(n: u64), fn smp_xadd(n: u64) -> u64: locked additions to one sum, called by every vCPU.
function smp_add
    lock add qword ptr [rip + smp_sum], rdi
    ret
end smp_add

function smp_xadd
    mov rax, rdi
    lock xadd qword ptr [rip + smp_sum], rax
    ret
end smp_xadd

# Exceptions that the program raises on purpose; exceptions.rs expects them at exactly these addresses.

# fn own_int3(): #BP, a trap: the frame shows the address behind the int3.
function own_int3
    int3
    ret
end own_int3

# fn own_ud2(): #UD, a fault: the handler skips the instruction.
function own_ud2
    ud2
    ret
end own_ud2

# fn own_fault(address: u64): #GP for a non-canonical, #PF for an unmapped address; the handler skips the load.
function own_fault
    mov rax, [rdi]
    .globl own_fault_end
own_fault_end:
    ret
end own_fault

# fn own_step(): sets TF, so that a #DB follows the nop; the handler clears TF in the frame.
function own_step
    pushfq
    or qword ptr [rsp], 0x100
    popfq
    nop
    .globl own_step_end
own_step_end:
    ret
end own_step

.section .bss, "aw", @nobits
.p2align 3
variable ticks, 8
variable fib_calls, 8
variable smp_sum, 8
