// Package qemu runs guests with QEMU (7.2 and later), machine type microvm.
//
// One Machine is one QEMU process. Everything it uses is handed to it as an open
// descriptor: disks through descriptor sets, the agent's port, QMP, the console
// and virtiofs connections as connected sockets. The only paths it opens are the
// kernel, the initramfs and its own parts, so it can be confined to nothing else
// (Options.Launch).
//
// A machine is watched from QMP greeting to end of file. The exit status proves
// nothing: QEMU exits 0 after a guest panic, and when KVM cannot execute a guest
// it does not exit at all but stops with the run state internal-error. So a
// machine fails when QMP says so, when the guest's agent has not answered within
// the boot timeout, or when the process ends without having been asked to.
//
// Accelerator. AccelAuto means KVM where ProbeKVM has run a 64-bit program in a
// virtual machine, else TCG. The answer is kept per boot of the host; a KVM that
// passes and still does not boot a guest is entered with RememberBroken by
// whoever retries with TCG. Under TCG the guest cannot measure its time stamp
// counter on this machine type, so the host's frequency, measured once per boot,
// goes on the kernel's command line.
//
// QEMU and the guest are not trusted: QMP lines are bounded, and what the guest
// writes to its console beyond a limit is dropped.
package qemu
