# Instructions that move data and leave the flags alone.

family fam_nop, in_di=0x1234, out=0x1234
function fam_nop
    nop
    mov rax, rdi
    ret
end fam_nop

family fam_nop5, in_di=0x1234, out=0x1234
function fam_nop5
    nop dword ptr [rax + rax]
    mov rax, rdi
    ret
end fam_nop5

family fam_endbr64, in_di=0x1234, out=0x1234
function fam_endbr64
    endbr64
    mov rax, rdi
    ret
end fam_endbr64

family fam_push, out=PATTERN_rbp
function fam_push
    push rbp
    mov rbp, rsp
    mov rax, [rbp]
    pop rbp
    ret
end fam_push

family fam_push_rex, out=PATTERN_r12
function fam_push_rex
    push r12
    pop rax
    ret
end fam_push_rex

family fam_push_imm, out=-2
function fam_push_imm
    push -2
    pop rax
    ret
end fam_push_imm

family fam_push_mem, out=CELL
function fam_push_mem
    push qword ptr [rip + cell]
    pop rax
    ret
end fam_push_mem

family fam_pop, entry=.Lenter_pop, in_di=0x1234, out=0x1234
.Lenter_pop:
    push rdi
    jmp fam_pop
function fam_pop
    pop rax
    ret
end fam_pop

family fam_pop_mem, entry=.Lenter_pop_mem, in_di=0x1234, out=0x1234
.Lenter_pop_mem:
    push rdi
    jmp fam_pop_mem
function fam_pop_mem
    pop qword ptr [rip + cell]
    mov rax, [rip + cell]
    mov rcx, CELL
    mov [rip + cell], rcx
    ret
end fam_pop_mem

family fam_mov, in_di=0x1234, out=0x1234
function fam_mov
    mov rax, rdi
    ret
end fam_mov

family fam_mov_imm, in_a=-1, out=0x89abcdef
function fam_mov_imm
    mov eax, 0x89abcdef
    ret
end fam_mov_imm

family fam_mov_imm64, out=CELL
function fam_mov_imm64
    movabs rax, CELL
    ret
end fam_mov_imm64

family fam_mov_load, in_di=cell, out=CELL
function fam_mov_load
    mov rax, [rdi]
    ret
end fam_mov_load

family fam_mov_index, in_di=cell-8, in_c=1, out=0x99aabbccddeeff00
function fam_mov_index
    mov rax, [rdi + rcx * 8 + 8]
    ret
end fam_mov_index

family fam_mov_store, in_di=buffer, in_si=0x5678, out=0x5678
function fam_mov_store
    mov [rdi], rsi
    mov rax, [rip + buffer]
    ret
end fam_mov_store

family fam_mov_rip, out=CELL
function fam_mov_rip
    mov rax, [rip + cell]
    ret
end fam_mov_rip

family fam_mov_rip_store, in_di=0x9abc, out=0x9abc
function fam_mov_rip_store
    mov [rip + buffer], rdi
    mov rax, [rip + buffer]
    ret
end fam_mov_rip_store

# The displacement does not end the instruction: an immediate follows.
family fam_mov_rip_imm, out=-0x1234
function fam_mov_rip_imm
    mov qword ptr [rip + buffer], -0x1234
    mov rax, [rip + buffer]
    ret
end fam_mov_rip_imm

# Only the low byte changes.
family fam_mov_byte, in_a=-1, in_di=0x55, out=0xffffffffffffff55
function fam_mov_byte
    mov al, dil
    ret
end fam_mov_byte

family fam_mov_high_byte, in_a=-1, in_c=0x55, out=0xffffffffffff55ff
function fam_mov_high_byte
    mov ah, cl
    ret
end fam_mov_high_byte

family fam_mov_word, in_a=-1, in_di=0x5555, out=0xffffffffffff5555
function fam_mov_word
    mov ax, di
    ret
end fam_mov_word

# A segment override; the base of FS is 0.
family fam_mov_fs, in_di=cell, out=CELL
function fam_mov_fs
    mov rax, fs:[rdi]
    ret
end fam_mov_fs

family fam_mov_moffs, out=CELL
function fam_mov_moffs
    movabs rax, [cell]
    ret
end fam_mov_moffs

family fam_movzx, in_a=-1, out=0x88
function fam_movzx
    movzx eax, byte ptr [rip + cell]
    ret
end fam_movzx

family fam_movsx, out=0xffffffffffffff88
function fam_movsx
    movsx rax, byte ptr [rip + cell]
    ret
end fam_movsx

family fam_movsxd, in_di=0x80000001, out=0xffffffff80000001
function fam_movsxd
    movsxd rax, edi
    ret
end fam_movsxd

family fam_lea, in_di=0x1000, in_si=0x10, out=0x1085
function fam_lea
    lea rax, [rdi + rsi * 8 + 5]
    ret
end fam_lea

family fam_lea_rip, out=fam_lea_rip
function fam_lea_rip
    lea rax, [rip + fam_lea_rip]
    ret
end fam_lea_rip

family fam_xchg, in_a=1, in_di=2, out=2
function fam_xchg
    xchg rdi, rax
    ret
end fam_xchg

family fam_xchg_mem, in_di=0x77, out=CELL
function fam_xchg_mem
    xchg [rip + cell], rdi
    mov rax, rdi
    mov [rip + cell], rdi
    ret
end fam_xchg_mem

family fam_bswap, in_a=CELL, out=0x8877665544332211
function fam_bswap
    bswap rax
    ret
end fam_bswap

family fam_cmov_taken, in_di=0x1234, out=0x1234
function fam_cmov_taken
    cmovc rax, rdi
    ret
end fam_cmov_taken

# Not taken, but a 32-bit destination loses its upper half all the same.
family fam_cmov_not_taken, in_a=-1, in_di=0x1234, out=0xffffffff
function fam_cmov_not_taken
    cmovnc eax, edi
    ret
end fam_cmov_not_taken

family fam_setcc, in_a=0xff00, out=0xff01
function fam_setcc
    setz al
    ret
end fam_setcc

family fam_cdqe, in_a=0x80000000, out=0xffffffff80000000
function fam_cdqe
    cdqe
    ret
end fam_cdqe

family fam_cqo, in_a=-5, out=-1
function fam_cqo
    cqo
    mov rax, rdx
    ret
end fam_cqo

family fam_leave, entry=.Lenter_leave, in_di=0x1234, out=0x1234
.Lenter_leave:
    push rdi
    push rbp
    mov rbp, rsp
    push rdi
    push rdi
    jmp fam_leave
function fam_leave
    leave
    pop rax
    ret
end fam_leave

family fam_enter, out=PATTERN_rbp
function fam_enter
    enter 16, 0
    mov rax, [rbp]
    leave
    ret
end fam_enter
