# The kernel starts a process with argc, argv, 0, envp, 0 on the stack (System V ABI, AMD64, 3.4.1).
.section .text, "ax"
function _start
    xor ebp, ebp
    mov rdi, rsp
    and rsp, -16
    call init_main
    ud2
end _start
