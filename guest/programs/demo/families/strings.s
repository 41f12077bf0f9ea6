# String instructions, repeated and single.

family fam_rep_movsb, in_c=16, in_si=cell, in_di=buffer, out=buffer+16+CELL
function fam_rep_movsb
    rep movsb
    mov rax, [rip + buffer]
    lea rax, [rax + rdi]
    lea rax, [rax + rcx]
    ret
end fam_rep_movsb

family fam_rep_stosq, in_a=0x1234, in_c=4, in_di=buffer, out=0x1234+buffer+32
function fam_rep_stosq
    rep stosq
    mov rax, [rip + buffer + 24]
    lea rax, [rax + rdi]
    lea rax, [rax + rcx]
    ret
end fam_rep_stosq

# Nothing to do: no register changes.
family fam_rep_none, in_a=0x1234, in_c=0, in_di=buffer, out=buffer
function fam_rep_none
    rep stosb
    mov rax, rdi
    ret
end fam_rep_none

family fam_movsq, in_si=cell, in_di=buffer, out=buffer+CELL+8
function fam_movsq
    movsq
    mov rax, [rip + buffer]
    lea rax, [rax + rdi]
    ret
end fam_movsq

family fam_lodsb, in_si=cell, in_a=-1, out=0xffffffffffffff88
function fam_lodsb
    lodsb
    ret
end fam_lodsb

# Finds 0x55 as the fourth byte.
family fam_repne_scasb, in_a=0x55, in_c=8, in_di=cell, out=4, flags=2+PF+ZF
function fam_repne_scasb
    repne scasb
    mov rax, rcx
    ret
end fam_repne_scasb

# The first bytes, 0x88 and 0x00, differ already.
family fam_repe_cmpsb, in_c=8, in_si=cell, in_di=cell_next, out=7, flags=2+PF+SF
function fam_repe_cmpsb
    repe cmpsb
    mov rax, rcx
    ret
end fam_repe_cmpsb
