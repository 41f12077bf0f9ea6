# Instructions of unusual length and place.

# 15 bytes, the longest there is: lock, segment and address-size prefix, two more for the operation, SIB, displacement
# and immediate. The address wraps at 32 bits.
family fam_longest, in_a=cell-0x1000000, in_c=0, out=CELL+0x11223344, flags=2+PF
function fam_longest
    lock add qword ptr fs:[eax + ecx * 8 + 0x1000000], 0x11223344
    mov rax, [rip + cell]
    movabs rcx, CELL
    mov [rip + cell], rcx
    ret
end fam_longest

# A byte pattern that a search for int3 would trip over.
family fam_int3_inside, out=0xcccccccc
function fam_int3_inside
    mov eax, 0xcccccccc
    ret
end fam_int3_inside

# Three of its ten bytes are on one page, seven on the next.
family fam_page_cross, out=CELL
    .p2align 12, 0xcc
    .skip 4096 - 3, 0xcc
    .globl fam_page_cross
    .type fam_page_cross, @function
fam_page_cross:
    movabs rax, CELL
    ret
end fam_page_cross

# The first byte, where a probe's int3 goes, is the last of its page.
family fam_page_last, in_di=0x1234, out=0x1234
    .p2align 12, 0xcc
    .skip 4096 - 1, 0xcc
    .globl fam_page_last
    .type fam_page_last, @function
fam_page_last:
    mov rax, rdi
    ret
end fam_page_last
