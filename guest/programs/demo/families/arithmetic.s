# Instructions that compute, with the flags they leave.

family fam_add, in_a=-1, in_di=1, out=0, flags=2+CF+PF+AF+ZF
function fam_add
    add rax, rdi
    ret
end fam_add

family fam_add_rip, in_a=0x10, out=CELL+0x10, flags=2
function fam_add_rip
    add rax, [rip + cell]
    ret
end fam_add_rip

# Read, modify and write memory.
family fam_add_rip_store, in_di=0x10, out=CELL+0x10, flags=2
function fam_add_rip_store
    add [rip + cell], rdi
    mov rax, [rip + cell]
    movabs rcx, CELL
    mov [rip + cell], rcx
    ret
end fam_add_rip_store

family fam_adc, in_a=0x7fffffffffffffff, out=0x8000000000000000, flags=2+PF+AF+SF+OF
function fam_adc
    adc rax, 0
    ret
end fam_adc

family fam_sub, in_a=1, in_di=2, out=-1, flags=2+CF+PF+AF+SF
function fam_sub
    sub rax, rdi
    ret
end fam_sub

family fam_sub_rsp, out=PATTERN_rbp, flags=0, mask=0
function fam_sub_rsp
    sub rsp, 16
    mov [rsp], rbp
    mov rax, [rsp]
    add rsp, 16
    ret
end fam_sub_rsp

family fam_sbb, in_a=5, in_di=3, out=1, flags=2
function fam_sbb
    sbb rax, rdi
    ret
end fam_sbb

family fam_and, in_a=0xff0, in_di=0x3c, out=0x30, flags=2+PF, mask=ALL_FLAGS-AF
function fam_and
    and rax, rdi
    ret
end fam_and

family fam_or, in_a=0x8000000000000000, in_di=1, out=0x8000000000000001, flags=2+SF, mask=ALL_FLAGS-AF
function fam_or
    or rax, rdi
    ret
end fam_or

family fam_xor, in_a=-1, out=0, flags=2+PF+ZF, mask=ALL_FLAGS-AF
function fam_xor
    xor eax, eax
    ret
end fam_xor

family fam_xor_rip, in_a=0, out=CELL, flags=2+PF, mask=ALL_FLAGS-AF
function fam_xor_rip
    xor rax, [rip + cell]
    ret
end fam_xor_rip

family fam_cmp, in_di=3, in_si=5, out=0, flags=2+CF+AF+SF
function fam_cmp
    cmp edi, esi
    ret
end fam_cmp

# RIP-relative with an immediate behind the displacement.
family fam_cmp_rip_imm, out=0, flags=2+PF+ZF
function fam_cmp_rip_imm
    cmp dword ptr [rip + cell], 0x55667788
    ret
end fam_cmp_rip_imm

family fam_test, in_di=-1, out=0, flags=2+PF+SF, mask=ALL_FLAGS-AF
function fam_test
    test rdi, rdi
    ret
end fam_test

family fam_test_rip_imm, out=0, flags=2+PF+ZF, mask=ALL_FLAGS-AF
function fam_test_rip_imm
    test byte ptr [rip + cell], 0x77
    ret
end fam_test_rip_imm

# inc and dec leave CF alone.
family fam_inc, in_a=-1, out=0, flags=2+CF+PF+AF+ZF
function fam_inc
    inc rax
    ret
end fam_inc

family fam_dec, in_a=1, out=0, flags=2+CF+PF+ZF
function fam_dec
    dec rax
    ret
end fam_dec

family fam_neg, in_a=1, out=-1, flags=2+CF+PF+AF+SF
function fam_neg
    neg rax
    ret
end fam_neg

family fam_not, in_a=0, out=-1
function fam_not
    not rax
    ret
end fam_not

family fam_imul, in_di=-3, out=-300, flags=2, mask=2+CF+OF
function fam_imul
    imul rax, rdi, 100
    ret
end fam_imul

family fam_mul, in_a=-1, in_d=0, in_di=2, out=-2, flags=2+CF+OF, mask=2+CF+OF
function fam_mul
    mul rdi
    ret
end fam_mul

family fam_div, in_a=1000, in_d=0, in_di=7, out=142, mask=0
function fam_div
    div rdi
    ret
end fam_div

family fam_idiv, in_a=-1000, in_d=-1, in_di=7, out=-142, mask=0
function fam_idiv
    idiv rdi
    ret
end fam_idiv

family fam_shl, in_a=0x4000000000000001, out=0x8000000000000002, flags=2+SF+OF, mask=ALL_FLAGS-AF
function fam_shl
    shl rax
    ret
end fam_shl

family fam_shr_cl, in_a=0x8000000000000000, in_c=63, out=1, flags=2, mask=ALL_FLAGS-AF-OF
function fam_shr_cl
    shr rax, cl
    ret
end fam_shr_cl

# A shift by 0 leaves every flag alone.
family fam_shl_zero, in_a=0x1234, in_c=64, out=0x1234
function fam_shl_zero
    shl rax, cl
    ret
end fam_shl_zero

family fam_sar, in_a=-8, out=-2, flags=2+SF, mask=ALL_FLAGS-AF-OF
function fam_sar
    sar rax, 2
    ret
end fam_sar

family fam_rol, in_a=0x8000000000000000, out=1, flags=2+CF+PF+AF+ZF+SF+OF
function fam_rol
    rol rax
    ret
end fam_rol

family fam_shld, in_a=1, in_di=0x8000000000000000, out=3, flags=2+PF, mask=ALL_FLAGS-AF-OF
function fam_shld
    shld rax, rdi, 1
    ret
end fam_shld

family fam_bt, in_di=0x80, in_si=6, flags=2, mask=2+CF
function fam_bt
    bt rdi, rsi
    ret
end fam_bt

# A bit offset beyond the operand reaches into the memory behind it; bit 3 of the operand itself is set.
family fam_bt_rip, in_si=64+3, flags=2, mask=2+CF
function fam_bt_rip
    bt [rip + cell], rsi
    ret
end fam_bt_rip

family fam_bts, in_a=0, in_c=5, out=0x20, flags=2, mask=2+CF
function fam_bts
    bts rax, rcx
    ret
end fam_bts

family fam_bsf, in_di=0x50, out=4, flags=2, mask=2+ZF
function fam_bsf
    bsf rax, rdi
    ret
end fam_bsf

family fam_bsr, in_di=0x50, out=6, flags=2, mask=2+ZF
function fam_bsr
    bsr rax, rdi
    ret
end fam_bsr

family fam_xadd, in_a=0x10, out=CELL, flags=2
function fam_xadd
    lock xadd [rip + cell], rax
    mov [rip + cell], rax
    ret
end fam_xadd

family fam_cmpxchg, in_a=CELL, in_di=0x42, out=0x42, flags=2+PF+ZF
function fam_cmpxchg
    lock cmpxchg [rip + cell], rdi
    mov rcx, rax
    mov rax, [rip + cell]
    mov [rip + cell], rcx
    ret
end fam_cmpxchg

family fam_cmpxchg_fails, in_a=CELL+1, in_di=0x42, out=CELL, flags=2
function fam_cmpxchg_fails
    lock cmpxchg [rip + cell], rdi
    ret
end fam_cmpxchg_fails

family fam_lock_inc, out=CELL+1, flags=2+CF
function fam_lock_inc
    lock inc qword ptr [rip + cell]
    mov rax, [rip + cell]
    movabs rcx, CELL
    mov [rip + cell], rcx
    ret
end fam_lock_inc
