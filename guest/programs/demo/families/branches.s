# Instructions that change RIP. A wrong turn ends in `mov eax, 0xbad`.

.macro wrong_turn
    mov eax, 0xbad
    ret
.endm

# The callee returns its return address: a call that ran elsewhere shows here.
family fam_call, out=fam_call+5
function fam_call
    call return_address
    ret
end fam_call

family fam_call_rip, out=fam_call_rip+6
function fam_call_rip
    call qword ptr [rip + call_target]
    ret
end fam_call_rip

family fam_call_reg, in_di=return_address, out=fam_call_reg+2
function fam_call_reg
    call rdi
    ret
end fam_call_reg

family fam_call_table, in_di=jump_target, in_c=1, out=fam_call_table+3
function fam_call_table
    call qword ptr [rdi + rcx * 8]
    ret
end fam_call_table

family fam_jmp, in_di=0x1234, out=0x1234
function fam_jmp
    jmp landing
    wrong_turn
end fam_jmp

family fam_jmp_short, in_di=0x1234, out=0x1234
function fam_jmp_short
    jmp 1f
    wrong_turn
1:  mov rax, rdi
    ret
end fam_jmp_short

family fam_jmp_rip, in_di=0x1234, out=0x1234
function fam_jmp_rip
    jmp qword ptr [rip + jump_target]
    wrong_turn
end fam_jmp_rip

family fam_jmp_reg, in_si=landing, in_di=0x1234, out=0x1234
function fam_jmp_reg
    jmp rsi
    wrong_turn
end fam_jmp_reg

family fam_jcc_taken, in_di=0x1234, out=0x1234
function fam_jcc_taken
    jz 1f
    wrong_turn
1:  mov rax, rdi
    ret
end fam_jcc_taken

family fam_jcc_not_taken, in_di=0x1234, out=0x1234
function fam_jcc_not_taken
    jnz 1f
    mov rax, rdi
    ret
1:  wrong_turn
end fam_jcc_not_taken

family fam_jcc_near, in_di=0x1234, out=0x1234
function fam_jcc_near
    jc landing_near
    wrong_turn
end fam_jcc_near

# Less or equal looks at three flags.
family fam_jle, in_di=0x1234, out=0x1234
function fam_jle
    jle 1f
    wrong_turn
1:  mov rax, rdi
    ret
end fam_jle

# Backwards.
function backward
1:  mov rax, rdi
    ret
end backward
family fam_jmp_back, in_di=0x1234, out=0x1234
function fam_jmp_back
    jmp backward
    wrong_turn
end fam_jmp_back

family fam_loop, in_c=2, out=1
function fam_loop
    loop 1f
    wrong_turn
1:  mov rax, rcx
    ret
end fam_loop

family fam_loop_ends, in_c=1, out=0
function fam_loop_ends
    loop 1f
    mov rax, rcx
    ret
1:  wrong_turn
end fam_loop_ends

# loopne goes on while RCX is not 0 and ZF is 0; ZF is 1 here.
family fam_loopne, in_c=9, out=8
function fam_loopne
    loopne 1f
    mov rax, rcx
    ret
1:  wrong_turn
end fam_loopne

family fam_jrcxz, in_c=0, in_di=0x1234, out=0x1234
function fam_jrcxz
    jrcxz 1f
    wrong_turn
1:  mov rax, rdi
    ret
end fam_jrcxz

# The address-size prefix makes it look at ECX.
family fam_jecxz, in_c=0x100000000, in_di=0x1234, out=0x1234
function fam_jecxz
    jecxz 1f
    wrong_turn
1:  mov rax, rdi
    ret
end fam_jecxz

family fam_ret, in_a=0x1234, out=0x1234
function fam_ret
    ret
    wrong_turn
end fam_ret

# Drops the eight bytes that its caller pushed.
family fam_ret_imm, entry=.Lenter_ret_imm, in_a=0x1234, out=0x1234
.Lenter_ret_imm:
    push rdi
    call fam_ret_imm
    ret
function fam_ret_imm
    ret 8
end fam_ret_imm

family fam_retf, entry=.Lenter_retf, in_di=0x1234, out=0x1234
.Lenter_retf:
    mov eax, cs
    push rax
    lea rax, [rip + landing]
    push rax
    jmp fam_retf
function fam_retf
    retfq
end fam_retf

family fam_iretq, entry=.Lenter_iretq, in_di=0x1234, out=0x1234, flags=2+CF+SF
.Lenter_iretq:
    mov rcx, rsp
    mov eax, ss
    push rax
    push rcx
    push 2 + CF + SF
    mov eax, cs
    push rax
    lea rax, [rip + landing]
    push rax
    jmp fam_iretq
function fam_iretq
    iretq
end fam_iretq

# Far enough away for a 32-bit displacement.
.skip 256, 0xcc
function landing_near
    mov rax, rdi
    ret
end landing_near
