# The C functions that the compiler may call (core's documentation, "How to use the core library").
.section .text, "ax"

.macro function name
    .globl \name
    .type \name, @function
\name:
.endm

.macro end name
    .size \name, . - \name
.endm

# void *memcpy(void *to, const void *from, size_t len)
function memcpy
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
end memcpy

# void *memmove(void *to, const void *from, size_t len): backwards when the areas overlap the wrong way round.
function memmove
    mov rax, rdi
    mov rcx, rdx
    sub rdi, rsi
    cmp rdi, rdx
    lea rdi, [rax]
    jb 1f
    rep movsb
    ret
1:  lea rsi, [rsi + rcx - 1]
    lea rdi, [rdi + rcx - 1]
    std
    rep movsb
    cld
    ret
end memmove

# void *memset(void *to, int byte, size_t len)
function memset
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret
end memset

# int memcmp(const void *a, const void *b, size_t len), and bcmp, which promises less.
function memcmp
    .globl bcmp
    .type bcmp, @function
bcmp:
    xor eax, eax
    xor ecx, ecx
1:  cmp rcx, rdx
    je 2f
    movzx eax, byte ptr [rdi + rcx]
    movzx r8d, byte ptr [rsi + rcx]
    inc rcx
    sub eax, r8d
    je 1b
2:  ret
end memcmp
end bcmp

# size_t strlen(const char *text)
function strlen
    lea rax, [rdi - 1]
1:  inc rax
    cmp byte ptr [rax], 0
    jne 1b
    sub rax, rdi
    ret
end strlen
