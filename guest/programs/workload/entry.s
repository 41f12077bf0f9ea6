# The kernel starts a process with argc, argv, 0, envp, 0 on the stack (System V ABI, AMD64, 3.4.1).
.section .text, "ax"
function _start
    xor ebp, ebp
    mov rdi, rsp
    and rsp, -16
    call workload_main
    ud2
end _start

# What a signal handler returns to: rt_sigreturn.
function signal_return
    mov eax, 15
    syscall
end signal_return

# Two ways of raising SIGTRAP; the handler (traps.rs) clears TF.
function own_int3
    int3
    ret
end own_int3

function own_step
    pushfq
    or qword ptr [rsp], 0x100
    popfq
    nop
    ret
end own_step

# What the guest's own uprobe stands on.
function traced_function
    push rbp
    pop rbp
    ret
end traced_function
