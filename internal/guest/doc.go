// Package guest is the agent: PID 1 of a sandbox's virtual machine.
//
// Nouns. The port is the virtio-serial device that leads to the supervisor; the
// link is the stream of frames on it (package agentproto). A session is one id
// of the link: an exec (a program), a file request, a transfer.
//
// Life. Main mounts /dev, /proc and /sys, loads modules, opens the port and says
// hello. The supervisor answers with Boot: the agent puts the root file system
// together, moves to it, prepares /dev/shm, /tmp and the like, mounts volumes
// parents first, lets their file systems fill disks that were made longer, and
// says ready. It then serves sessions until it is told to
// shut down: programs are ended, file systems unmounted in reverse order,
// goodbye is said, the machine powers off. Any failure before ready is reported
// as BootFailed with the step's name, and the machine powers off too.
//
// Invariants. Every child process is reaped by one goroutine (reap.go), which
// holds the lock that starting a program takes, so that no exit is lost. A
// program's exit is reported after all of its own output. Output is read only as
// fast as the supervisor gives credit. The agent never exits while it serves:
// the kernel would panic.
//
// Trust. Whatever the host sends is obeyed. Programs are not trusted: files such
// as /etc/passwd are read with limits and without blocking, and nothing a
// program leaves behind may hang the shutdown.
package guest
