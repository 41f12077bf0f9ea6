# Pushes and pops of the awkward kind: 16-bit, and with RSP as the operand or in the address.

family fam_push_word, in_a=-1, in_c=0x5555, out=0xffffffffffff5555
function fam_push_word
    push cx
    pop ax
    ret
end fam_push_word

family fam_pop_word, entry=.Lenter_pop_word, in_a=-1, in_c=0x5555, out=0xffffffffffff5555
.Lenter_pop_word:
    push cx
    jmp fam_pop_word
function fam_pop_word
    pop ax
    ret
end fam_pop_word

# Pushes RSP as it was before.
family fam_push_rsp, out=0, mask=0
function fam_push_rsp
    push rsp
    pop rax
    sub rax, rsp
    ret
end fam_push_rsp

family fam_push_rsp_mem, out=call_checked_return
function fam_push_rsp_mem
    push qword ptr [rsp]
    pop rax
    ret
end fam_push_rsp_mem

# The value popped is what RSP becomes.
family fam_pop_rsp, entry=.Lenter_pop_rsp, in_di=0x1234, out=0x1234
.Lenter_pop_rsp:
    mov rcx, rsp
    push rdi
    push rcx
    jmp fam_pop_rsp
function fam_pop_rsp
    pop rsp
    mov rax, rdi
    ret
end fam_pop_rsp

# The address is computed with RSP as it is after the pop.
family fam_pop_rsp_mem, entry=.Lenter_pop_rsp_mem, in_si=0x5678, in_di=0x1234, out=0x5678
.Lenter_pop_rsp_mem:
    push rdi
    push rsi
    jmp fam_pop_rsp_mem
function fam_pop_rsp_mem
    pop qword ptr [rsp]
    pop rax
    ret
end fam_pop_rsp_mem

# The target is read with RSP as it is before the return address is pushed.
family fam_call_rsp_mem, entry=.Lenter_call_rsp_mem, in_di=return_address, out=fam_call_rsp_mem+3
.Lenter_call_rsp_mem:
    push rdi
    jmp fam_call_rsp_mem
function fam_call_rsp_mem
    call qword ptr [rsp]
    pop rcx
    ret
end fam_call_rsp_mem
