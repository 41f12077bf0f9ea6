# Flags, ports, and instructions that only the kernel may run.

family fam_pushf, out=ENTRY_FLAGS
function fam_pushf
    pushfq
    pop rax
    ret
end fam_pushf

family fam_popf, entry=.Lenter_popf, in_di=2+CF+AF+SF+OF, flags=2+CF+AF+SF+OF
.Lenter_popf:
    push rdi
    jmp fam_popf
function fam_popf
    popfq
    ret
end fam_popf

# The operand-size prefix: two bytes from the stack, and the upper flags stay.
family fam_popf_word, entry=.Lenter_popf_word, in_c=2+CF+AF+SF+OF, flags=2+CF+AF+SF+OF
.Lenter_popf_word:
    push cx
    jmp fam_popf_word
function fam_popf_word
    .byte 0x66, 0x9d
    ret
end fam_popf_word

family fam_pushf_word, in_a=-1, out=0xffffffffffff0000+ENTRY_FLAGS
function fam_pushf_word
    .byte 0x66, 0x9c
    pop ax
    ret
end fam_pushf_word

family fam_lahf, out=(ENTRY_FLAGS&0xff)<<8
function fam_lahf
    lahf
    ret
end fam_lahf

family fam_sahf, in_a=0x100, out=0x100, flags=2+CF+OF
function fam_sahf
    sahf
    ret
end fam_sahf

family fam_clc, flags=ENTRY_FLAGS-CF
function fam_clc
    clc
    ret
end fam_clc

family fam_cmc, flags=ENTRY_FLAGS-CF
function fam_cmc
    cmc
    ret
end fam_cmc

family fam_std, out=ENTRY_FLAGS+DF
function fam_std
    std
    pushfq
    cld
    pop rax
    ret
end fam_std

# Interrupts are on for one instruction; every source is masked.
family fam_sti, out=ENTRY_FLAGS+0x200
function fam_sti
    sti
    pushfq
    cli
    pop rax
    ret
end fam_sti

family fam_cli, entry=.Lenter_cli, out=ENTRY_FLAGS
.Lenter_cli:
    sti
    nop
    jmp fam_cli
function fam_cli
    cli
    pushfq
    pop rax
    ret
end fam_cli

# The vendor's name comes out the same a second time.
family fam_cpuid, out=0, mask=0
function fam_cpuid
    cpuid
    mov esi, ebx
    xor eax, eax
    cpuid
    mov eax, ebx
    sub eax, esi
    movabs rbx, PATTERN_rbx
    ret
end fam_cpuid

# The time-stamp counter does not run backwards.
family fam_rdtsc, in_a=-1, in_d=-1, out=1, mask=0
function fam_rdtsc
    rdtsc
    shl rdx, 32
    lea rsi, [rax + rdx]
    rdtsc
    shl rdx, 32
    add rax, rdx
    cmp rax, rsi
    setae al
    movzx eax, al
    ret
end fam_rdtsc

# The line status register of the serial port: transmitter empty.
family fam_in, in_d=0x3fd, out=0x20, mask=0
function fam_in
    in al, dx
    and eax, 0x20
    ret
end fam_in

# Port 0x80 shows a byte on a board that has a display for it, and does nothing else.
family fam_out, in_a=0x1234, out=0x1234
function fam_out
    out 0x80, al
    ret
end fam_out

# CR0.PE is on.
family fam_mov_from_cr, out=1, mask=0
function fam_mov_from_cr
    mov rax, cr0
    and eax, 1
    ret
end fam_mov_from_cr

family fam_mov_to_cr, entry=.Lenter_mov_to_cr, out=0, mask=0
.Lenter_mov_to_cr:
    mov rcx, cr3
    jmp fam_mov_to_cr
function fam_mov_to_cr
    mov cr3, rcx
    mov rax, cr3
    sub rax, rcx
    ret
end fam_mov_to_cr

# EFER: long mode enabled and active.
family fam_rdmsr, in_c=0xc0000080, out=0x500, mask=0
function fam_rdmsr
    rdmsr
    and eax, 0x500
    ret
end fam_rdmsr

family fam_wrmsr, entry=.Lenter_wrmsr, in_c=0xc0000080, out=0x500, mask=0
.Lenter_wrmsr:
    rdmsr
    jmp fam_wrmsr
function fam_wrmsr
    wrmsr
    rdmsr
    and eax, 0x500
    ret
end fam_wrmsr

# Interrupts and single-step traps wait for one more instruction behind it.
family fam_mov_ss, entry=.Lenter_mov_ss, in_di=0x1234, out=0x1234
.Lenter_mov_ss:
    mov ecx, ss
    jmp fam_mov_ss
function fam_mov_ss
    mov ss, ecx
    mov rax, rdi
    ret
end fam_mov_ss
